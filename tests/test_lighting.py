"""Environments, resampling, prefilter, directional samples, conditioning."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from near.errors import NearError
from near.lighting import (
    Environment,
    condition,
    directional_samples,
    environment_from_array,
    load_environment,
    prefilter,
    resample_equirect,
    rotation_z,
    row_solid_angles,
    texel_directions,
    uniform_environment,
)
from near.lighting.equirect import bilinear, fractions, pad_for_lookup, resample_equirect_torch
from near.lighting.rotate import rotate_equirect
from near.lighting.samples import SAMPLES, sample_environment

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))


def integral(rgb: Tensor) -> Tensor:
    """[3] radiance * steradians."""
    return (rgb.double() * row_solid_angles(*rgb.shape[:2])[:, None, None]).sum((0, 1))


def random_directions(count: int, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)), dim=-1)


def random_rotation(seed: int) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)))
    q = q * r.diagonal().sign()
    return q if torch.linalg.det(q) > 0 else q[:, [1, 0, 2]]


@pytest.fixture(scope="module")
def sunny() -> Environment:
    """A sky with a one-texel sun of three quarters of the energy."""
    d = texel_directions(192, 384)
    rgb = (0.4 + 0.3 * d[..., 2:3]) * torch.tensor([0.7, 0.9, 1.2]) + 0.1 * torch.sin(5 * d[..., 0:1])
    rgb = rgb.clamp_min(0.01).contiguous()
    rgb[61, 117] = torch.tensor([30000.0, 27000.0, 21000.0])
    return Environment(rgb)


@pytest.fixture(scope="module")
def prepared(sunny: Environment):
    return prefilter(sunny)


# -- maps ----------------------------------------------------------------------------------------------------------------


def test_convention_is_blenders() -> None:
    """BLENDER.md: u = 0.5 - atan2(y, x) / 2 pi; +X in the middle, +Y a quarter from the left, +Z on top."""
    u, v = fractions(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]]))
    assert torch.allclose(u[:3], torch.tensor([0.5, 0.25, 0.75]))
    assert torch.allclose(v, torch.tensor([0.5, 0.5, 0.5, 0.0, 1.0]))
    d = texel_directions(16, 32)
    u, v = fractions(d)
    assert torch.allclose(u[3] * 32, torch.arange(32) + 0.5, atol=1e-4) and torch.allclose(v[:, 3] * 16, torch.arange(16) + 0.5, atol=1e-4)


def test_bench_rotation_convention() -> None:
    """bench/index.json: radiance from d is map(Rz(a) d)."""
    rgb = texel_directions(64, 128) + 1.0  # radiance tells the direction it is stored under
    out = Environment(rgb, rotation_z(0.6)).lookup(torch.tensor([[0.8, 0.0, 0.6]]))
    assert torch.allclose(out - 1, torch.tensor([[0.8 * math.cos(0.6), 0.8 * math.sin(0.6), 0.6]]), atol=2e-3)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 40), st.integers(2, 60), st.integers(1, 30), st.integers(2, 50), st.integers(0, 99))
def test_resampling_twins_and_energy(rows: int, columns: int, new_rows: int, new_columns: int, seed: int) -> None:
    rgb = torch.rand(rows, columns, 3, generator=torch.Generator().manual_seed(seed))
    rgb[seed % rows, seed % columns] = 1e4
    out = resample_equirect(rgb, new_rows, new_columns)
    assert torch.allclose(out, resample_equirect_torch(rgb, new_rows, new_columns), rtol=1e-4, atol=1e-4)
    assert torch.allclose(integral(out), integral(rgb), rtol=1e-5)


def test_resampling_keeps_constants() -> None:
    assert torch.allclose(resample_equirect(torch.full((97, 191, 3), 2.5), 32, 64), torch.tensor(2.5), rtol=1e-6)


def test_lookup_is_continuous_over_seam_and_poles() -> None:
    rgb = torch.rand(32, 64, 3, generator=torch.Generator().manual_seed(0))
    env = Environment(rgb)
    angle = torch.linspace(0, 2 * math.pi, 50)
    for z in (-0.7, 0.0, 0.5):
        r = math.sqrt(1 - z * z)
        left, right = (env.lookup(torch.tensor([[-r, e, z]])) for e in (1e-5, -1e-5))
        assert (left - right).abs().max() < 1e-3
    for z in (1.0, -1.0):  # opposite meridians meet at the pole
        a = env.lookup(torch.stack([1e-4 * angle.cos(), 1e-4 * angle.sin(), torch.full_like(angle, z)], -1))
        b = env.lookup(torch.stack([-1e-4 * angle.cos(), -1e-4 * angle.sin(), torch.full_like(angle, z)], -1))
        assert (a - b).abs().max() < 5e-3


def test_environment_checks() -> None:
    rgb = torch.ones(4, 8, 3)
    for bad in (lambda: Environment(torch.ones(4, 8)), lambda: Environment(rgb, 2 * torch.eye(3)), lambda: Environment(rgb, strength=-1.0),
                lambda: Environment(rgb, strength=float("nan")), lambda: Environment(rgb, torch.full((3, 3), float("nan")))):
        with pytest.raises(NearError):
            bad()
    assert torch.equal(uniform_environment(0.5).lookup(random_directions(5)), torch.full((5, 3), 0.5))
    assert torch.allclose(uniform_environment((1, 2, 3)).scaled(2).lookup(random_directions(2)), torch.tensor([2.0, 4, 6]))


def test_digest_sees_pixels_only() -> None:
    rgb = torch.rand(8, 16, 3)
    env = Environment(rgb)
    digest = env.digest()
    assert env.rotated(rotation_z(1.0)).scaled(3).digest() == digest == Environment(rgb.clone()).digest()
    assert Environment(rgb.flip(0)).digest() != digest
    rgb[0, 0] += 1
    assert env.digest() != digest
    with torch.inference_mode():
        assert len(Environment(torch.rand(8, 16, 3)).digest()) == 64


# -- prefilter -----------------------------------------------------------------------------------------------------------


def brute_force_lobe(env: Environment, directions: Tensor, roughness: float) -> Tensor:
    """The split-sum kernel summed over every texel of the map."""
    rgb = env.rgb_lin709.double()
    omega = row_solid_angles(*rgb.shape[:2]).repeat_interleave(rgb.shape[1])
    s = (1 - directions.double() @ texel_directions(*rgb.shape[:2]).reshape(-1, 3).double().T) / 2
    alpha = roughness ** 2
    kernel = (1 - 2 * s).clamp_min(0) / (alpha ** 2 + s * (1 - alpha ** 2)) ** 2 * omega
    return ((kernel @ rgb.reshape(-1, 3)) / kernel.sum(-1, keepdim=True)).float()


def test_prefilter_equals_brute_force(sunny: Environment, prepared) -> None:
    """On the levels' own roughness: away from and near a one-texel sun."""
    sun = texel_directions(192, 384)[61, 117]
    far = random_directions(30, 1)
    near = F.normalize(sun + 0.15 * random_directions(20, 2), dim=-1)
    for level in (3, 4, 5, 6, 8, 11):
        roughness = prepared.roughness_levels[level]
        for directions, mean_limit in ((far, 0.01), (near, 0.05)):
            ours = prepared.specular(directions, torch.full((len(directions),), roughness), sunny)
            theirs = brute_force_lobe(sunny, directions, roughness)
            assert ((ours - theirs).abs().sum(-1) / theirs.sum(-1)).mean() < mean_limit, roughness


def test_prefilter_between_levels(sunny: Environment, prepared) -> None:
    directions = random_directions(30, 3)
    for roughness in (0.18, 0.36, 0.7):
        ours = prepared.specular(directions, torch.full((30,), roughness), sunny)
        theirs = brute_force_lobe(sunny, directions, roughness)
        assert ((ours - theirs).abs().sum(-1) / theirs.sum(-1)).mean() < 0.05, roughness


def test_every_level_keeps_the_energy(sunny: Environment, prepared) -> None:
    mean = integral(sunny.rgb_lin709) / (4 * math.pi)
    assert torch.allclose(prepared.mean.double(), mean, rtol=1e-5)
    assert torch.allclose(prepared.flux.double().sum(0) / (4 * math.pi), mean, rtol=1e-5)
    for level in range(len(prepared.layout)):
        inner = prepared.level(level)[1:-1, 1:-1]
        assert torch.allclose(integral(inner) / (4 * math.pi), mean, rtol=1e-4), level


def test_uniform_light_stays_uniform() -> None:
    env = uniform_environment((0.5, 1.0, 2.0))
    out = prefilter(env).specular(random_directions(500), torch.rand(500), env)
    assert torch.allclose(out, torch.tensor([0.5, 1.0, 2.0]).expand(500, 3), rtol=1e-4)


def test_specular_twins(sunny: Environment, prepared) -> None:
    env = Environment(sunny.rgb_lin709, random_rotation(4), 1.7)
    directions, roughness = random_directions(4000, 5), torch.rand(4000) * 1.2 - 0.1
    axes = torch.cat([torch.eye(3), -torch.eye(3), torch.tensor([[-1.0, -0.0, 0.0]])])
    directions = torch.cat([directions, axes])
    roughness = torch.cat([roughness, torch.tensor([0.0, 0.1, 1.0, 0.5, 0.05, 0.3, 0.0])])
    fast, plain = prepared.specular(directions, roughness, env), prepared.specular_torch(directions, roughness, env)
    assert ((fast - plain).abs() / (plain.abs() + 0.1)).max() < 5e-3
    precise = prepared.specular(directions.double(), roughness.double(), env)
    assert ((fast - precise).abs() / (precise.abs() + 0.1)).max() < 5e-3


def test_specular_is_differentiable(sunny: Environment, prepared) -> None:
    directions, roughness = random_directions(50).requires_grad_(), torch.linspace(0, 1, 50).requires_grad_()
    prepared.specular(directions, roughness, sunny).sum().backward()
    assert directions.grad.isfinite().all() and roughness.grad.isfinite().all() and roughness.grad.abs().sum() > 0


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 10_000), st.floats(0.01, 8))
def test_turning_light_and_direction_together_changes_nothing(seed: int, other: int, factor: float) -> None:
    env, light = _small_light()
    env = Environment(env.rgb_lin709, random_rotation(other))
    turn = random_rotation(seed)
    directions, roughness = random_directions(64, seed), torch.rand(64, generator=torch.Generator().manual_seed(other))
    before = light.specular(directions, roughness, env)
    after = light.specular(directions @ turn.T, roughness, env.rotated(turn))
    assert torch.allclose(before, after, rtol=1e-2, atol=2e-3)
    assert torch.allclose(env.lookup(directions), env.rotated(turn).lookup(directions @ turn.T), rtol=1e-2, atol=2e-3)
    assert torch.allclose(light.specular(directions, roughness, env.scaled(factor)), factor * before, rtol=1e-4, atol=1e-6)


_cache: dict[str, tuple] = {}


def _small_light():
    if not _cache:
        d = texel_directions(32, 64)
        env = Environment(1 + 0.8 * torch.sin(3 * d) * d.roll(1, -1))
        _cache["light"] = (env, prefilter(env))
    return _cache["light"]


def test_prefiltering_is_linear() -> None:
    env, light = _small_light()
    double = prefilter(Environment(2 * env.rgb_lin709))
    assert torch.allclose(double.packed, 2 * light.packed, rtol=1e-4, atol=1e-5)
    assert torch.allclose(double.directions, light.directions, atol=1e-5) and torch.allclose(double.flux, 2 * light.flux, rtol=1e-4)


def test_prefiltering_a_turned_map_is_turning_the_prefiltered_one() -> None:
    env, light = _small_light()
    rolled = Environment(env.rgb_lin709.roll(16, 1))  # a quarter turn of the pixels
    turned = Environment(env.rgb_lin709, rotation_z(math.pi / 2))
    directions, roughness = random_directions(300, 6), torch.rand(300)
    assert torch.allclose(rolled.lookup(directions), turned.lookup(directions), atol=1e-4)
    assert torch.allclose(prefilter(rolled).specular(directions, roughness, rolled), light.specular(directions, roughness, turned), atol=2e-3)


def test_levels_are_continuous_over_the_seam(sunny: Environment, prepared) -> None:
    for roughness in (0.0, 0.15, 0.5, 1.0):
        r = torch.full((1,), roughness)
        for z in (-0.9, 0.0, 0.95):
            x = -math.sqrt(1 - z * z)
            a, b = (prepared.specular(torch.tensor([[x, e, z]]), r, sunny) for e in (1e-6, -1e-6))
            assert torch.allclose(a, b, rtol=1e-3)


def test_black_and_tiny_maps() -> None:
    for rows in (2, 8):
        env = environment_from_array(np.zeros((rows, 2 * rows, 3), np.float32))
        light = prefilter(env)
        assert light.flux.shape == (256, 3) and light.flux.sum() == 0 and light.directions.isfinite().all()
        assert (light.specular(random_directions(10), torch.rand(10), env) == 0).all()


def test_directions_that_are_not_numbers_do_no_harm(sunny: Environment, prepared) -> None:
    bad = torch.tensor([[float("nan")] * 3, [float("inf"), 0, 0], [0.0, 0, 0], [1, 0, 0]])
    out = prepared.specular(bad, torch.tensor([0.5, 0.5, 0.5, float("nan")]), sunny)
    assert out.shape == (4, 3) and out[2].isfinite().all()


def test_speed() -> None:
    """On a free core 0.15 s and 5 ms; the bounds allow for a machine busy with other work."""
    env = Environment(torch.rand(1024, 2048, 3, generator=torch.Generator().manual_seed(0)))
    light = prefilter(env)
    directions, roughness = random_directions(60_000), torch.rand(60_000)

    def best(work) -> float:
        times = []
        for _ in range(4):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
        return min(times)

    assert best(lambda: prefilter(env)) < 2.0
    assert best(lambda: light.specular(directions, roughness, env)) < 0.06


# -- directional samples -------------------------------------------------------------------------------------------------


def irradiance_error(rgb: Tensor, count: int = 128) -> float:
    normals = random_directions(60, 9).double()
    flux = (rgb.double() * row_solid_angles(*rgb.shape[:2])[:, None, None]).reshape(-1, 3)
    exact = (normals @ texel_directions(*rgb.shape[:2]).reshape(-1, 3).double().T).clamp_min(0) @ flux
    directions, samples = directional_samples(rgb, count)
    ours = (normals @ directions.double().T).clamp_min(0) @ samples.double()
    return float(((ours - exact).abs().sum(-1) / exact.sum(-1)).mean())


def test_directional_samples(sunny: Environment) -> None:
    directions, flux = directional_samples(sunny.rgb_lin709, 128)
    assert torch.allclose(directions.norm(dim=-1), torch.ones(128), atol=1e-5)
    assert torch.allclose(flux.double().sum(0), integral(sunny.rgb_lin709), rtol=1e-5)
    brightest = directions[flux.sum(-1).argmax()]
    assert brightest @ texel_directions(192, 384)[61, 117] > math.cos(math.radians(1.5))
    assert irradiance_error(sunny.rgb_lin709) < 0.01
    assert irradiance_error(torch.ones(64, 128, 3)) < 0.01


def test_irradiance_of_real_maps(shared_dir: Path) -> None:
    files = sorted((shared_dir / "data/pack/hdris").glob("*.exr"))[::12]
    if not files:
        pytest.skip("no training HDRIs in the shared data")
    errors = [irradiance_error(load_environment(f, allow_repair=True).rgb_lin709) for f in files]
    assert max(errors) < 0.01, errors


# -- conditioning --------------------------------------------------------------------------------------------------------


def test_published_conditioning(shared_dir: Path) -> None:
    from parity_checks.light import check_hdri_preprocess

    rows = check_hdri_preprocess(shared_dir / "fixtures")
    assert len(rows) == 9 and all(r.ok for r in rows), rows


@pytest.mark.parametrize("rotation", [torch.eye(3), rotation_z(0.7), rotation_z(-2.9), random_rotation(1), random_rotation(2), torch.diag(torch.tensor([1.0, -1.0, 1.0]))])
def test_turned_maps_keep_energy_and_place(rotation: Tensor) -> None:
    sun = torch.full((256, 512, 3), 0.01)
    sun[50, 130] = torch.tensor([1e5, 8e4, 6e4])
    out = rotate_equirect(sun, rotation, 64, 128)
    assert torch.allclose(integral(out), integral(sun), rtol=1e-4)
    weight = out[..., 0] * row_solid_angles(64, 128)[:, None]
    centre = F.normalize((weight[..., None] * texel_directions(64, 128)).sum((0, 1)), dim=0).float()
    assert centre @ (rotation.T @ texel_directions(256, 512)[50, 130]) > math.cos(math.radians(1.5))
    constant = rotate_equirect(torch.full((256, 512, 3), 3.0), rotation, 64, 128)
    assert torch.allclose(constant, torch.tensor(3.0), rtol=1e-4)
    smooth = 1 + 0.5 * torch.sin(2 * texel_directions(256, 512))
    expected = Environment(smooth, rotation).lookup(texel_directions(64, 128))
    error = (rotate_equirect(smooth, rotation, 64, 128) - expected).abs()
    assert error.max() < 0.04 and error.mean() < 0.004  # the largest at the poles, where texels share cells


def test_condition() -> None:
    env = Environment(sample_environment("sunset", 128).rgb_lin709, random_rotation(3), 2.0)
    out = condition(env)
    assert out.shape == (9, 64, 128) and out.isfinite().all()
    assert out[:3].min() >= -1 and out[:3].max() <= 1
    assert torch.allclose(out[6:].norm(dim=0), torch.ones(64, 128), atol=1e-4)
    radiance = torch.expm1((out[3:6] + 1) * math.log(1001)) / 10
    assert torch.allclose(integral(radiance.permute(1, 2, 0)), 2 * integral(env.rgb_lin709), rtol=1e-3)


# -- samples -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLES)
def test_sample_lights(name: str) -> None:
    env = sample_environment(name, 64)
    assert env.rgb_lin709.shape == (64, 128, 3) and env.rgb_lin709.min() >= 0
    mean = integral(env.rgb_lin709).mean() / (4 * math.pi)
    assert 0.1 < mean < 2.5
    seam = (env.rgb_lin709[:, 0] - env.rgb_lin709[:, -1]).abs().mean()
    assert seam < 4 * (env.rgb_lin709[:, 1:] - env.rgb_lin709[:, :-1]).abs().mean() + 1e-3


def test_unknown_sample() -> None:
    with pytest.raises(NearError, match="sunset"):
        sample_environment("moonbase")


def test_bilinear_reads_texel_centres() -> None:
    rgb = torch.rand(6, 12, 3)
    v, u = torch.meshgrid((torch.arange(6) + 0.5) / 6, (torch.arange(12) + 0.5) / 12, indexing="ij")
    assert torch.allclose(bilinear(pad_for_lookup(rgb), u.reshape(-1), v.reshape(-1)).reshape(6, 12, 3), rgb, atol=1e-5)
