"""Lights from OpenEXR and Radiance files: what is read, and what is said of files that cannot be."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from near.errors import NearError
from near.lighting import load_environment
from near.lighting.radiance import decode_radiance


def write_exr(path: Path, rgb: np.ndarray) -> Path:
    import OpenEXR

    OpenEXR.File({"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}, {"RGB": np.ascontiguousarray(rgb)}).write(str(path))
    return path


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_exr_round_trip(tmp_path: Path, dtype) -> None:
    rgb = np.random.default_rng(0).random((16, 32, 3)).astype(dtype)
    env = load_environment(write_exr(tmp_path / "a.exr", rgb))
    assert env.rgb_lin709.dtype == torch.float32 and np.array_equal(env.rgb_lin709.numpy(), rgb.astype(np.float32))


def test_grey_exr(tmp_path: Path) -> None:
    import OpenEXR

    grey = np.random.default_rng(0).random((8, 16)).astype(np.float32)
    OpenEXR.File({"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}, {"Y": grey}).write(str(tmp_path / "y.exr"))
    assert np.array_equal(load_environment(tmp_path / "y.exr").rgb_lin709[..., 1].numpy(), grey)


@pytest.mark.parametrize("value, code", [(np.nan, "light-not-finite"), (np.inf, "light-not-finite"), (-0.5, "light-negative")])
def test_what_is_not_light(tmp_path: Path, value: float, code: str) -> None:
    rgb = np.ones((8, 16, 3), np.float16)
    rgb[3, 5, 1], rgb[2, 2] = value, 7
    path = write_exr(tmp_path / "bad.exr", rgb)
    with pytest.raises(NearError) as error:
        load_environment(path)
    assert error.value.code == code and "bad.exr" in error.value.what
    repaired = load_environment(path, allow_repair=True).rgb_lin709
    assert repaired[3, 5, 1] == (7 if value == np.inf else 0) and repaired.sum() < 8 * 16 * 3 + 30


def test_unusable_files(tmp_path: Path) -> None:
    good = write_exr(tmp_path / "good.exr", np.random.default_rng(0).random((64, 128, 3)).astype(np.float32)).read_bytes()
    window = good.find(b"dataWindow\0box2i\0") + len(b"dataWindow\0box2i\0") + 4
    files = {"missing.exr": (None, "light-missing"), "empty.exr": (b"", "light-unreadable"), "photo.hdr": (b"\x89PNG\r\n" + bytes(40), "light-format"),
             "huge.exr": (good[: window + 8] + struct.pack("<ii", 40000, 20000) + good[window + 16 :], "light-too-large")}
    files |= {f"cut{n}.exr": (good[: int(len(good) * n)], "light-unreadable") for n in (0.002, 0.1, 0.6, 0.98)}
    for name, (content, code) in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(NearError) as error:
            load_environment(tmp_path / name)
        assert error.value.code == code and name in error.value.what, (name, error.value)
    square = write_exr(tmp_path / "square.exr", np.ones((32, 32, 3), np.float32))
    with pytest.raises(NearError, match="32 x 32"):
        load_environment(square)
    with pytest.raises(NearError, match="folder"):
        load_environment(tmp_path)


def rgbe(rgb: np.ndarray) -> np.ndarray:
    exponent = np.ceil(np.log2(rgb.max(-1))) + 1e-9
    e = np.floor(exponent).astype(int)
    e = np.where(rgb.max(-1) >= 2.0 ** e, e + 1, e)
    return np.concatenate([np.floor(rgb / (2.0 ** e)[..., None] * 256), (e + 128)[..., None]], -1).astype(np.uint8)


def hdr_file(pixels: np.ndarray, style: str, size: str = "-Y {h} +X {w}", head: str = "FORMAT=32-bit_rle_rgbe\n") -> bytes:
    """A Radiance file of RGBE pixels [H, W, 4]; style: flat, old or new (run-length)."""
    h, w = pixels.shape[:2]
    body = b""
    for row in pixels:
        if style == "flat":
            body += row.tobytes()
        elif style == "old":
            at = 0
            while at < w:
                run = 1
                while at + run < w and run < 256 and (row[at + run] == row[at]).all():
                    run += 1
                body += row[at].tobytes() + (bytes([1, 1, 1, run - 1]) if run > 1 else b"")
                at += run
        else:
            body += bytes([2, 2, w >> 8, w & 255])
            for plane in row.T:
                at = 0
                while at < w:
                    run = 1
                    while at + run < w and run < 127 and plane[at + run] == plane[at]:
                        run += 1
                    body += bytes([128 + run, plane[at]]) if run > 2 else bytes([run]) + plane[at : at + run].tobytes()
                    at += run
    return f"#?RADIANCE\n# made by a test\n{head}\n{size.format(h=h, w=w)}\n".encode() + body


@pytest.mark.parametrize("style", ["flat", "old", "new"])
def test_radiance_styles(tmp_path: Path, style: str) -> None:
    rgb = np.repeat(np.exp(np.random.default_rng(0).normal(0, 2, (12, 6, 3))), 4, axis=1)
    pixels = rgbe(rgb)
    (tmp_path / "a.hdr").write_bytes(hdr_file(pixels, style))
    out = load_environment(tmp_path / "a.hdr").rgb_lin709.numpy()
    assert (np.abs(out - rgb) / rgb.max(-1, keepdims=True)).max() < 1 / 127


def test_radiance_orientation_exposure_and_black() -> None:
    pixels = rgbe(np.exp(np.random.default_rng(1).normal(0, 1, (8, 16, 3))))
    pixels[0, 0] = 0
    plain = decode_radiance(hdr_file(pixels, "new"), 10**6)
    assert (plain[0, 0] == 0).all()
    flipped = decode_radiance(hdr_file(pixels, "new", "+Y {h} -X {w}", "EXPOSURE=2.0\nEXPOSURE=2.0\n"), 10**6)
    assert np.allclose(flipped, plain[::-1, ::-1] / 4)
    turned = decode_radiance(hdr_file(pixels, "flat", "+X {h} -Y {w}"), 10**6)
    assert np.array_equal(turned, plain.transpose(1, 0, 2))


def test_broken_radiance_files() -> None:
    good = hdr_file(rgbe(np.exp(np.random.default_rng(1).normal(0, 1, (64, 128, 3)))), "new")
    rng = np.random.default_rng(0)
    broken = [good[:n] for n in (5, 30, 60, 400, len(good) - 1)]
    broken += [good.replace(b"-Y 64", b"-Y 9999"), good.replace(b"rgbe", b"xyze"), good.replace(b"-Y 64 +X 128", b"-Y 64 +Y 128")]
    for data in broken:
        with pytest.raises(NearError):
            decode_radiance(data, 10**6)
    for _ in range(40):
        noisy = bytearray(good)
        for at in rng.integers(0, len(noisy), 5):
            noisy[at] = rng.integers(256)
        try:
            decode_radiance(bytes(noisy), 10**6)
        except NearError:
            pass


BLENDER_SCRIPT = """
import os, sys
import numpy as np, bpy
folder = sys.argv[-1]
pixels = np.load(folder + "/in.npy")
h, w = pixels.shape[:2]
image = bpy.data.images.new("x", w, h, float_buffer=True, alpha=False)
image.colorspace_settings.name = "Linear Rec.709"
image.pixels.foreach_set(np.ascontiguousarray(np.concatenate([pixels[::-1], np.ones((h, w, 1), np.float32)], -1)).ravel())
scene = bpy.context.scene
for name, suffix in (("HDR", "hdr"), ("OPEN_EXR", "exr")):
    scene.render.image_settings.file_format = name
    image.save_render(folder + "/out." + suffix, scene=scene)
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.bpy
@pytest.mark.slow
def test_files_written_by_blender(tmp_path: Path) -> None:
    rgb = np.exp(np.random.default_rng(2).normal(0, 2, (32, 64, 3))).astype(np.float32)
    np.save(tmp_path / "in.npy", rgb)
    subprocess.run([sys.executable, "-c", BLENDER_SCRIPT, str(tmp_path)], check=True, timeout=180, capture_output=True)
    peak = rgb.max(-1, keepdims=True)
    assert (np.abs(load_environment(tmp_path / "out.hdr").rgb_lin709.numpy() - rgb) / peak).max() < 1 / 127
    assert (np.abs(load_environment(tmp_path / "out.exr").rgb_lin709.numpy() - rgb) / peak).max() < 1e-3
