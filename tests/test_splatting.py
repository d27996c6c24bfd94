"""The splatter: compiled code against plain torch, both against the published frames, and what callers rely on."""

from __future__ import annotations

import math

import numba
import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from near.errors import NearError
from near.geometry.cameras import Camera, orbit_camera
from near.models.anchors import build_anchors, decode_anchors
from near.models.harmonics import fibonacci_sphere
from near.splatting import PUBLISHED, SURFACE, Gaussians, SplatSettings, cpu, downsample2, splat, splat_weights, trim_coverage, visible
from near.splatting.blending import EXP_COEFFICIENTS
from near.splatting.coverage import trim_coverage_reference
from near.splatting.filters import KERNELS, blackman_harris, blackman_harris_taps, downsample2_reference, kernel_taps
from near.splatting.reference import project
from near.splatting.types import quaternion_from_rotation, rotation_from_quaternion


def scene(seed: int, count: int, spread: float = 0.4, size: tuple[float, float] = (0.01, 0.2), flat: bool = False) -> Gaussians:
    """Random Gaussians around the origin; sizes log-uniform."""
    rng = torch.Generator().manual_seed(seed)
    low, high = (math.log(s) for s in size)
    scales = torch.exp(low + (high - low) * torch.rand(count, 3, generator=rng))
    if flat:
        scales[:, 2] = scales[:, :2].amin(1) * 1e-3
    return Gaussians(torch.randn(count, 3, generator=rng) * spread, torch.randn(count, 4, generator=rng), scales,
                     torch.rand(count, generator=rng) * 1.1 - 0.05)


def assert_frames_agree(ours, oracle, tolerance: float = 1e-3) -> None:
    """Within the tolerance, up to threshold flips in 0.5 % of the pixels (or 2): a contribution of 1/255 that one side drops, or the
    last one of a pixel, which can weigh a tenth (opaque at a transmittance of 0.1)."""
    error = torch.cat([(ours.channels - oracle.channels).abs(), (ours.alpha - oracle.alpha).abs()[..., None]], -1).amax(-1)
    assert torch.isfinite(error).all()
    assert (error > tolerance).sum() <= max(2, 0.005 * error.numel()), f"largest difference {error.max():.2e}"
    assert error.max() <= 0.11
    solid = (ours.alpha > 0.05) & (oracle.alpha > 0.05) & (error <= tolerance)
    torch.testing.assert_close(ours.depth[solid], oracle.depth[solid].float(), rtol=5e-3, atol=5e-3)
    assert torch.equal(torch.isinf(ours.depth), ours.alpha < 1e-4)


def reference64(gaussians: Gaussians, channels, camera, config):
    """The oracle in double precision: thin and far Gaussians lose digits in float32."""
    frame = splat(gaussians.to(torch.float64), channels.double(), camera, config, "reference")
    return type(frame)(frame.channels.float(), frame.alpha.float(), frame.depth.float())


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 120), width=st.integers(1, 70), height=st.integers(1, 70),
       channels=st.sampled_from([0, 1, 3, 4, 7, 14]), radius=st.floats(0.05, 4), shift=st.tuples(st.floats(-40, 40), st.floats(-40, 40)),
       focal=st.tuples(st.floats(5, 200), st.floats(5, 200)), orthographic=st.booleans(), flat=st.booleans(),
       size=st.sampled_from([(1e-6, 1e-3), (0.01, 0.2), (0.01, 3.0), (1.0, 100.0)]), config=st.sampled_from([SURFACE, PUBLISHED]))
def test_cpu_agrees_with_reference(seed, count, width, height, channels, radius, shift, focal, orthographic, flat, size, config):
    gaussians = scene(seed, count, size=size, flat=flat)
    orbit = orbit_camera(seed * 0.1, math.sin(seed), radius, 0.7, width, height)
    K = [[focal[0], 0, width / 2 + shift[0]], [0, focal[1], height / 2 + shift[1]], [0, 0, 1]]
    camera = Camera(orbit.cam_from_world, K, width, height, near=0.01, far=50, projection="orthographic" if orthographic else "perspective")
    values = torch.rand(count, channels, generator=torch.Generator().manual_seed(seed)) * 2 - 0.5
    ours = splat(gaussians, values, camera, config, "cpu")
    assert ours.channels.shape == (height, width, channels) and ours.alpha.shape == ours.depth.shape == (height, width)
    assert_frames_agree(ours, reference64(gaussians, values, camera, config))


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), count=st.integers(0, 100), width=st.integers(1, 60), height=st.integers(1, 60))
def test_weights_and_visibility_agree_with_the_blend(seed, count, width, height):
    gaussians, camera = scene(seed, count), orbit_camera(seed, 0.3, 1.5, 0.9, width, height)
    values = torch.rand(count, 3)
    frame = splat(gaussians, values, camera, backend="cpu")
    indptr, index, weight = splat_weights(gaussians, camera)
    assert (indptr.dtype, index.dtype, weight.dtype) == (torch.int64, torch.int32, torch.float32)
    matrix = scipy.sparse.csr_matrix((weight.numpy(), index.numpy(), indptr.numpy()), shape=(height * width, count))
    np.testing.assert_allclose((matrix @ values.numpy()).reshape(height, width, 3), frame.channels.numpy(), atol=1e-5)
    np.testing.assert_allclose(np.asarray(matrix.sum(1)).reshape(height, width), frame.alpha.numpy(), atol=1e-5)
    largest = np.asarray(abs(matrix).max(0).todense()).reshape(-1) if count and matrix.nnz else np.zeros(count)
    assert torch.equal(visible(gaussians, camera, floor=1e-3), torch.from_numpy(largest > 1e-3))


def test_pixel_entries_run_front_to_back():
    gaussians, camera = scene(3, 80), orbit_camera(0.1, 0.2, 2.0, 0.7, 32, 32)
    depths = project(gaussians, camera, SURFACE).depths
    indptr, index, _ = splat_weights(gaussians, camera)
    for p in range(32 * 32):
        z = depths[index[indptr[p] : indptr[p + 1]].long()]
        assert (z.diff() >= 0).all()


def test_published_frames(shared_dir):
    """Spec section 7.4 on the captured inputs of the official renderer: projection, then the frame."""
    fixture = load_file(shared_dir / "fixtures" / "render.safetensors")
    for n, name in ((0, "base"), (0, "view"), (1, "base"), (1, "view")):
        part = {k.split("/")[-1]: v for k, v in fixture.items() if k.startswith(f"raster{n}/{name}/")}
        camera = Camera(part["viewmats"][0], part["Ks"][0], 64, 64, near=1, far=3)
        gaussians = Gaussians(part["means"], part["quats"], part["scales"], part["opacities"])
        projected, valid = project(gaussians, camera, PUBLISHED), part["proj_valid"][0]
        assert torch.equal(projected.valid, valid)
        for key, ours in (("means2d", projected.means2d), ("conics", projected.conics), ("depths", projected.depths),
                          ("compensations", projected.compensations), ("opacities", projected.opacities)):
            torch.testing.assert_close(ours[valid], part[f"proj_{key}"][0][valid], atol=1e-5, rtol=1e-5)
        for backend in ("reference", "cpu"):
            frame = splat(gaussians, part["colors"], camera, PUBLISHED, backend)
            alpha = fixture[f"out{n}/alpha" + ("_view" if name == "view" else "")][0]
            depth = fixture[f"out{n}/depth" + ("_view" if name == "view" else "")][0]
            torch.testing.assert_close(frame.alpha, alpha, atol=5e-5, rtol=0)
            torch.testing.assert_close(torch.where(frame.depth.isinf(), 0.0, frame.depth), depth, atol=2e-4, rtol=0)
            if "render" in part:  # the capture negated the normals' y and z in place afterwards
                flipped = frame.channels.clone()
                flipped[..., -2:] *= -1
                torch.testing.assert_close(flipped, part["render"][..., :-1], atol=1e-4, rtol=0)


def test_reference_is_differentiable():
    gaussians, camera = scene(5, 12, spread=0.2).to(torch.float64), orbit_camera(0.2, 0.1, 2.0, 0.6, 20, 18)
    tensors = [t.clone().requires_grad_() for t in (*gaussians.tensors(), torch.rand(12, 2, dtype=torch.float64))]
    pattern = torch.rand(18, 20, 2, dtype=torch.float64)

    def loss(*values):
        frame = splat(Gaussians(*values[:4]), values[4], camera, backend="auto")
        return (frame.channels * pattern).sum() + frame.alpha.square().sum()

    gradients = torch.autograd.grad(loss(*tensors), tensors)
    for i, gradient in enumerate(gradients):
        direction = torch.randn_like(tensors[i])
        step = 1e-6 * direction
        with torch.no_grad():
            plus, minus = ([t + s * step if j == i else t for j, t in enumerate(tensors)] for s in (1, -1))
            difference = (loss_reference(plus, camera, pattern) - loss_reference(minus, camera, pattern)) / 2e-6
        assert math.isclose(difference.item(), (gradient * direction).sum().item(), rel_tol=2e-2, abs_tol=2e-3)


def loss_reference(values, camera, pattern):
    frame = splat(Gaussians(*values[:4]), values[4], camera, backend="reference")
    return (frame.channels * pattern).sum() + frame.alpha.square().sum()


@pytest.mark.parametrize("kernel", KERNELS)
def test_supersampling_is_splatting_large_and_filtering(kernel):
    gaussians, camera = scene(7, 200), orbit_camera(0.4, 0.3, 2.0, 0.7, 37, 23)
    values = torch.rand(200, 5)
    large = splat(gaussians, values, camera.scaled(2), backend="cpu")
    for backend in ("cpu", "reference"):
        fused = splat(gaussians, values, camera, backend=backend, supersample=2, kernel=kernel)
        torch.testing.assert_close(fused.channels, downsample2(large.channels, kernel), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(fused.alpha, downsample2(large.alpha[..., None], kernel)[..., 0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(fused.depth, large.depth.view(23, 2, 37, 2).amin((1, 3)), atol=1e-3, rtol=1e-3)


def test_an_asset_in_the_world_looks_as_from_its_own_space():
    gaussians, camera = scene(9, 150), orbit_camera(0.5, 0.2, 6.0, 0.7, 48, 40, near=0.5, far=60)
    world_from_asset = torch.eye(4)
    world_from_asset[:3, :3] = rotation_from_quaternion(torch.tensor([0.3, -0.5, 0.7, 0.2])) * 2.5
    world_from_asset[:3, 3] = torch.tensor([0.4, -0.3, 0.2])
    values = torch.rand(150, 4)
    world = splat(gaussians.transformed(world_from_asset), values, camera)
    local = splat(gaussians, values, camera.moved(world_from_asset))
    torch.testing.assert_close(world.channels, local.channels, atol=1e-3, rtol=0)
    solid = world.alpha > 0.5
    torch.testing.assert_close(world.depth[solid], local.depth[solid] * 2.5, atol=1e-3, rtol=1e-3)


def test_several_assets_hide_each_other():
    disc = Gaussians(torch.zeros(1, 3), torch.tensor([[1.0, 0, 0, 0]]), torch.full((1, 3), 0.3), torch.tensor([0.99]))
    behind = torch.eye(4)
    behind[1, 3] = 1.0  # the camera at yaw 0 looks along +Y
    both = Gaussians.concat([disc.transformed(behind), disc])
    frame = splat(both, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), orbit_camera(0, 0, 3, 0.7, 33, 33))
    assert len(both) == 2 and frame.channels[16, 16, 1] > 0.98 and frame.channels[16, 16, 0] < 0.02
    assert math.isclose(frame.depth[16, 16].item(), 3.0, abs_tol=0.02)


def test_behind_the_camera_and_not_finite_draw_nothing():
    camera = orbit_camera(0, 0, 3, 0.7, 32, 32)
    gaussians = scene(1, 8)
    away = gaussians.means.clone()
    away[:, 1] -= 20
    broken = [Gaussians(away, *gaussians.tensors()[1:])]
    for bad in (math.nan, math.inf, -math.inf):
        for field in range(4):
            broken.append(Gaussians(*(torch.full_like(t, bad) if i == field else t for i, t in enumerate(gaussians.tensors()))))
    for cloud in broken[:1] + [b for b in broken[1:] if not torch.isposinf(b.opacities).any()]:
        frame = splat(cloud, torch.rand(8, 3), camera, backend="cpu")
        assert frame.alpha.max() == 0 and torch.isinf(frame.depth).all() and frame.channels.abs().max() == 0
    assert not visible(broken[0], camera).any()


def test_result_does_not_depend_on_threads_or_bands(monkeypatch):
    gaussians, camera, values = scene(11, 300), orbit_camera(0.4, 0.3, 2.0, 0.7, 100, 90), torch.rand(300, 4)
    frame = splat(gaussians, values, camera, backend="cpu")
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        alone = splat(gaussians, values, camera, backend="cpu")
    finally:
        numba.set_num_threads(before)
    monkeypatch.setattr(cpu, "MAX_ENTRIES", 500)
    banded = splat(gaussians, values, camera, backend="cpu")
    for other in (alone, banded):
        assert torch.equal(other.channels, frame.channels) and torch.equal(other.depth, frame.depth)


def test_auto_keeps_gradients_and_speed_apart():
    gaussians, camera = scene(2, 10), orbit_camera(0, 0, 2, 0.7, 16, 16)
    values = torch.rand(10, 3, requires_grad=True)
    assert splat(gaussians, values, camera).channels.requires_grad
    with torch.no_grad():
        assert not splat(gaussians, values, camera).channels.requires_grad


def test_refusals():
    gaussians, camera = scene(2, 10), orbit_camera(0, 0, 2, 0.7, 16, 16)
    with pytest.raises(ValueError, match="channels"):
        splat(gaussians, torch.rand(9, 3), camera)
    with pytest.raises(ValueError, match="backend"):
        splat(gaussians, torch.rand(10, 3), camera, backend="opengl")
    with pytest.raises(ValueError, match="scales"):
        Gaussians(gaussians.means, gaussians.quats, gaussians.scales[:, :2], gaussians.opacities)
    with pytest.raises(ValueError, match="alpha_min"):
        SplatSettings(alpha_min=0.0)
    if not torch.cuda.is_available():
        with pytest.raises(NearError) as error:
            splat(gaussians, torch.rand(10, 3), camera, backend="gsplat")
        assert error.value.code == "gsplat-missing"


def test_fast_exponential():
    s = torch.linspace(0, math.log(255), 100_000)
    p = torch.zeros_like(s)
    for coefficient in EXP_COEFFICIENTS[::-1]:
        p = p * s + coefficient
    torch.testing.assert_close(p**8, torch.exp(-s), rtol=4e-6, atol=0)


@given(height=st.integers(1, 9), width=st.integers(1, 9), channels=st.integers(0, 5), kernel=st.sampled_from(KERNELS))
@settings(deadline=None, max_examples=20)
def test_compiled_filter_agrees_with_torch(height, width, channels, kernel):
    image = torch.rand(2 * height, 2 * width, channels)
    expected = downsample2_reference(image, kernel_taps(kernel, 0.3))
    torch.testing.assert_close(downsample2(image, kernel), expected, atol=1e-6, rtol=1e-5)


@given(height=st.integers(1, 9), width=st.integers(1, 9), channels=st.integers(0, 4), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=20)
def test_trimming_agrees_with_torch_and_never_adds(height, width, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    alpha = (torch.rand(height, width, generator=generator) * 2.5 - 0.5).clamp(0, 1)
    colour = torch.rand(height, width, channels, generator=generator) * alpha[..., None]
    trimmed = trim_coverage(colour, alpha)
    torch.testing.assert_close(trimmed, trim_coverage_reference(colour, alpha), atol=1e-6, rtol=1e-5)
    assert (trimmed >= 0).all() and (trimmed[..., -1] <= alpha + 1e-6).all()
    torch.testing.assert_close(trimmed[..., :-1] * alpha[..., None], colour * trimmed[..., -1:], atol=1e-6, rtol=1e-4)


def test_discs_cover_what_their_surface_covers():
    """A ball of discs: too large as splatted, nearer its own size once trimmed, and inside as before."""
    points = fibonacci_sphere(30000)
    coords, anchors, _ = build_anchors(points * 0.45, points, points, 32, spread=0.44)
    ball = decode_anchors(coords, anchors, 32).gaussians()
    camera = orbit_camera(0.3, 0.2, 2.0, math.radians(40), 128, 128)
    large = splat(ball, torch.ones(len(ball), 1), camera.scaled(2))
    trimmed = downsample2(trim_coverage(large.channels, large.alpha), "blackman_harris")[..., -1]
    plain = downsample2(large.alpha[..., None], "blackman_harris")[..., 0]
    true = math.pi * (float(camera.K[0, 0]) * math.tan(math.asin(0.45 / 2.0))) ** 2
    assert abs(float(trimmed.sum()) - true) < 0.5 * abs(float(plain.sum()) - true) and plain.sum() > 1.02 * true
    middle = slice(48, 80)
    torch.testing.assert_close(trimmed[middle, middle], plain[middle, middle])


def test_trimming_leaves_pinholes_and_cracks():
    alpha = torch.ones(40, 40)
    alpha[20, 20], alpha[10, :] = 0.2, 0.3
    trimmed = trim_coverage(torch.zeros(40, 40, 0), alpha)[..., 0]
    torch.testing.assert_close(trimmed, alpha)


def test_filters():
    image = torch.rand(12, 20, 3)
    torch.testing.assert_close(downsample2(image), image.view(6, 2, 10, 2, 3).mean((1, 3)))
    assert downsample2(image.clone().requires_grad_(), "blackman_harris").requires_grad
    ramp = torch.arange(40.0)[None, :, None].expand(16, 40, 2)
    for kernel in ("box", "blackman_harris"):
        torch.testing.assert_close(downsample2(torch.ones(8, 6, 2), kernel), torch.ones(4, 3, 2))
        torch.testing.assert_close(downsample2(ramp, kernel)[:, 2:-2, 0], (torch.arange(20.0) * 2 + 0.5)[2:-2].expand(8, 16))
    x = np.linspace(-1.5, 1.5, 3001)
    density = blackman_harris(x) / blackman_harris(x).sum()
    assert abs((density * x**2).sum() - 0.17) < 0.005  # what the reference renders were measured to have
    taps, places = np.array(blackman_harris_taps(0.3)), (np.arange(6) - 2.5) / 2
    assert abs((taps * places**2).sum() + 0.3 / 4 - 0.17) < 0.01  # filter and splat together blur as much
    assert min(taps) >= 0
    with pytest.raises(ValueError, match="kernel"):
        downsample2(image, "sinc")
    with pytest.raises(ValueError, match="half size"):
        downsample2(torch.ones(3, 4, 1))


@given(q=st.tuples(*[st.floats(-1, 1)] * 4).filter(lambda q: sum(v * v for v in q) > 1e-3))
def test_quaternions_and_rotations(q):
    rotation = rotation_from_quaternion(torch.tensor(q, dtype=torch.float64))
    back = rotation_from_quaternion(quaternion_from_rotation(rotation))
    torch.testing.assert_close(back, rotation, atol=1e-12, rtol=0)


@pytest.mark.gpu
def test_gsplat_agrees_with_reference():
    from near.splatting import gsplat_missing

    if reason := gsplat_missing():
        pytest.skip(reason)
    gaussians, camera, values = scene(4, 500), orbit_camera(0.4, 0.3, 2.0, 0.7, 90, 70), torch.rand(500, 5)
    for config in (SURFACE, PUBLISHED):
        frame = splat(gaussians.to("cuda"), values.cuda(), camera, config, "gsplat")
        ours = type(frame)(frame.channels.cpu(), frame.alpha.cpu(), frame.depth.cpu())
        assert_frames_agree(ours, reference64(gaussians, values, camera, config), tolerance=2e-3)
