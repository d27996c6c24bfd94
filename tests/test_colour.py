"""AgX against Blender and OpenColorIO, the inverse, the sRGB curve."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from near.colour import agx_inverse, agx_srgb, agx_srgb_ocio, srgb_decode, srgb_encode, to_uint8
from near.colour.tetrahedral import interpolate, interpolate_torch
from near.errors import NearError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))


def dense_colours(count: int = 60_000) -> np.ndarray:
    """Dark to 64, saturated, negative, very bright."""
    rng = np.random.default_rng(7)
    level = np.exp2(rng.uniform(-13, 6, (count, 1)))
    return np.concatenate([level * rng.dirichlet([0.35] * 3, count) * 3, np.exp2(rng.uniform(-13, 6, (count, 3))),
                           rng.uniform(-1, 2, (count, 3)), np.exp2(rng.uniform(6, 15, (count, 3)))]).astype(np.float32)


@pytest.fixture(scope="session")
def blender_colour_config() -> Path:
    """Blender's colormanagement folder, found beside the bpy module without importing it."""
    spec = find_spec("bpy")
    if spec is None:
        pytest.skip("bpy is not installed")
    found = sorted(Path(spec.origin).parent.glob("4.5/datafiles/colormanagement/config.ocio"))
    if not found:
        pytest.skip("this bpy is not 4.5")
    return found[0].parent


def test_agx_equals_blenders_configuration(blender_colour_config: Path) -> None:
    colours = dense_colours()
    error = np.abs(agx_srgb(colours) - agx_srgb_ocio(colours, blender_colour_config)) * 255
    assert error.max() < 0.02, f"{error.max():.4f}/255"


def test_ocio_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(NearError, match="colour configuration"):
        agx_srgb_ocio(np.zeros((1, 3), np.float32), tmp_path)


BLENDER_SCRIPT = """
import os, sys
import numpy as np, bpy
source, folder = sys.argv[-2:]
pixels = np.load(source)
h, w = pixels.shape[:2]
image = bpy.data.images.new("x", w, h, float_buffer=True, alpha=False)
image.colorspace_settings.name = "Linear Rec.709"
rgba = np.concatenate([pixels[::-1], np.ones((h, w, 1), np.float32)], -1)
image.pixels.foreach_set(np.ascontiguousarray(rgba).ravel())
scene = bpy.context.scene
scene.display_settings.display_device = "sRGB"
scene.view_settings.view_transform, scene.view_settings.look = "AgX", "None"
scene.view_settings.exposure, scene.view_settings.gamma = 0, 1
scene.render.dither_intensity = 0
s = scene.render.image_settings
s.file_format, s.color_mode, s.color_depth = "PNG", "RGB", "8"
image.save_render(folder + "/agx.png", scene=scene)
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.bpy
@pytest.mark.slow
def test_agx_equals_a_png_saved_by_blender(tmp_path: Path) -> None:
    from PIL import Image

    colours = dense_colours(4096)[: 128 * 128].reshape(128, 128, 3)
    np.save(tmp_path / "in.npy", colours)
    subprocess.run([sys.executable, "-c", BLENDER_SCRIPT, str(tmp_path / "in.npy"), str(tmp_path)], check=True, timeout=180, capture_output=True)
    theirs = np.asarray(Image.open(tmp_path / "agx.png").convert("RGB")).astype(int)
    difference = np.abs(to_uint8(agx_srgb(colours)).astype(int) - theirs)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.005


def test_agx_torch_and_numpy_agree() -> None:
    colours = dense_colours(5000)
    assert np.abs(agx_srgb(torch.from_numpy(colours)).numpy() - agx_srgb(colours)).max() < 1e-5


def test_agx_keeps_shape_and_type() -> None:
    assert agx_srgb(torch.rand(2, 5, 7, 3)).shape == (2, 5, 7, 3)
    assert agx_srgb(torch.rand(4, 3).half()).dtype == torch.float16
    assert agx_srgb(np.random.rand(4, 3)).dtype == np.float32
    assert agx_srgb(torch.zeros(0, 3)).shape == (0, 3)


def test_agx_of_nothing_and_too_much() -> None:
    wild = np.array([[np.nan, 1, 1], [np.inf, np.inf, np.inf], [-np.inf, 0, 0], [-5, -5, -5], [1e30, 0, 0]], np.float32)
    for values in (agx_srgb(wild), agx_srgb(torch.from_numpy(wild)).numpy()):
        assert np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1
        assert values[1].min() > 0.97 and values[3].max() < 0.01


def test_agx_gradient_is_right_and_finite() -> None:
    x = torch.from_numpy(np.exp2(np.random.default_rng(0).uniform(-8, 3, (400, 3)))).requires_grad_()
    gradient = torch.autograd.grad(agx_srgb(x).sum(), x)[0]
    step = torch.zeros(3, dtype=torch.float64)
    worst = []
    for axis in range(3):
        step[:] = 0
        step[axis] = 1e-7
        numeric = (agx_srgb(x.detach() + step) - agx_srgb(x.detach() - step)).sum(-1) / 2e-7
        worst.append((numeric - gradient[:, axis]).abs() / (gradient[:, axis].abs() + 1e-2))
    # Points within the step of a tetrahedron's face may disagree; there are few.
    assert torch.stack(worst).quantile(0.99) < 1e-4
    edge = torch.tensor([[0.0, 0, 0], [-1, 0, 0], [1e6, 1, 0], [float("nan"), 0, 1]], requires_grad=True)
    assert torch.autograd.grad(agx_srgb(edge).sum(), edge)[0].isfinite().all()


@settings(max_examples=30, deadline=None)
@given(arrays(np.float32, (64, 3), elements=st.floats(-0.5, 1.5, width=32)))
def test_tetrahedral_twins(codes: np.ndarray) -> None:
    table = np.random.default_rng(1).random((5, 5, 5, 3), np.float32)
    assert np.allclose(interpolate(table, codes), interpolate_torch(torch.from_numpy(table), torch.from_numpy(codes)).numpy(), atol=1e-5)


def test_tetrahedral_reproduces_linear_functions() -> None:
    node = np.linspace(0, 1, 9, dtype=np.float32)
    table = np.stack(np.meshgrid(node, node, node, indexing="ij"), -1) @ np.array([[1, 2, 3], [0, 1, -1], [4, 0, 1]], np.float32)
    x = np.random.default_rng(2).random((500, 3), np.float32)
    assert np.allclose(interpolate(np.ascontiguousarray(table), x), x @ np.array([[1, 2, 3], [0, 1, -1], [4, 0, 1]], np.float32), atol=1e-5)


def test_inverse_of_photos() -> None:
    rng = np.random.default_rng(3)
    albedo = rng.uniform(0.03, 0.9, (50_000, 3)) * np.exp2(rng.uniform(-4, 2, (50_000, 1)))
    photo = np.round(agx_srgb(albedo.astype(np.float32)) * 255) / 255
    back = agx_srgb(agx_inverse(photo.astype(np.float32)))
    error = np.abs(back - photo) * 255
    assert error.mean() < 0.2 and np.quantile(error, 0.999) < 3


def test_inverse_of_greys_is_exact_monotone_and_bounded() -> None:
    grey = torch.arange(256)[:, None].expand(-1, 3) / 255
    linear = agx_inverse(grey)
    assert (linear.diff(dim=0) >= 0).all()
    assert (linear / linear[:, :1] - 1).abs().max() < 5e-3  # stays grey
    assert linear.min() > 0 and linear.max() < 12.1
    middle = slice(2, 250)
    assert (agx_srgb(linear)[middle] - grey[middle]).abs().max() < 0.25 / 255


def test_inverse_of_any_display_colour_is_finite() -> None:
    corners = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [float("nan"), 0.5, 2]])
    linear = agx_inverse(corners)
    assert linear.isfinite().all() and (linear > 0).all() and (linear < 12.1).all()


@settings(max_examples=50, deadline=None)
@given(arrays(np.float32, (16, 3), elements=st.floats(0, 1, width=32)))
def test_srgb_round_trip(values: np.ndarray) -> None:
    assert np.allclose(srgb_decode(srgb_encode(values)), values, atol=1e-5)
    assert np.allclose(srgb_encode(torch.from_numpy(values)).numpy(), srgb_encode(values), atol=1e-6)
    assert np.array_equal(to_uint8(torch.from_numpy(values)).numpy(), to_uint8(values))


def test_srgb_gradient_at_black() -> None:
    x = torch.zeros(3, requires_grad=True)
    assert torch.autograd.grad(srgb_encode(x).sum(), x)[0].isfinite().all()


def test_published_tone_map(shared_dir: Path) -> None:
    from parity_checks.light import check_tonemap

    rows = check_tonemap(shared_dir / "fixtures")
    assert len(rows) == 4 and all(r.ok for r in rows), rows


def test_agx_is_fast_enough_for_losses() -> None:
    import time

    x = (torch.rand(256, 256, 3) * 3).requires_grad_()
    agx_srgb(x).sum().backward()
    start = time.perf_counter()
    for _ in range(3):
        agx_srgb(x).sum().backward()
    assert (time.perf_counter() - start) / 3 < 0.2  # 7 ms on one free core; generous for a busy machine
