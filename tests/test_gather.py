"""Light gathered by the discs: compiled kernels against their torch twins, and against the integral itself."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from near.lighting import brdf_table
from near.models.gather import irradiance, irradiance_torch, rough_reflection, rough_reflection_torch
from near.models.harmonics import fibonacci_sphere
from near.models.shading import lobe_albedo


def scene(seed: int, count: int, lamps: int, order: int):
    g = torch.Generator().manual_seed(seed)
    unit = lambda n: F.normalize(torch.randn(n, 3, generator=g), dim=-1)  # noqa: E731
    normals = unit(count)
    views = F.normalize(normals + 0.7 * unit(count), dim=-1)
    visibility = torch.randn(count, (order + 1) ** 2, generator=g) * 0.3
    visibility[:, 0] = 2.5
    return normals, views, 0.2 + 0.8 * torch.rand(count, generator=g), visibility, unit(lamps), torch.rand(lamps, 3, generator=g)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 300), st.integers(1, 40), st.integers(0, 4), st.booleans())
def test_the_kernels_agree_with_plain_torch(seed, count, lamps, order, hidden):
    normals, views, roughness, visibility, directions, flux = scene(seed, count, lamps, order)
    visibility = visibility if hidden else None
    torch.testing.assert_close(irradiance(normals, visibility, directions, flux), irradiance_torch(normals, visibility, directions, flux),
                               rtol=1e-4, atol=1e-4)
    for fast, plain in zip(rough_reflection(normals, views, roughness, visibility, directions, flux),
                           rough_reflection_torch(normals, views, roughness, visibility, directions, flux)):
        torch.testing.assert_close(fast, plain, rtol=2e-3, atol=1e-3)


def test_no_discs_gather_nothing():
    normals, views, roughness, visibility, directions, flux = scene(0, 0, 8, 2)
    assert irradiance(normals, visibility, directions, flux).shape == (0, 3)
    assert [len(x) for x in rough_reflection(normals, views, roughness, visibility, directions, flux)] == [0, 0]
    assert [len(x) for x in rough_reflection_torch(normals, views, roughness, visibility, directions, flux)] == [0, 0]


@pytest.mark.parametrize("roughness", [0.4, 0.6, 1.0])
def test_under_white_light_the_lobe_returns_its_albedo(roughness):
    """Many directions of radiance 1: what a mirror of F0 = 1 shows is the tabulated directional albedo."""
    directions = fibonacci_sphere(20000)
    flux = torch.full((len(directions), 3), 4 * math.pi / len(directions))
    tilt = torch.linspace(0, 1.3, 14)
    views = torch.stack([tilt.sin(), torch.zeros_like(tilt), tilt.cos()], -1)
    normals = torch.tensor([[0.0, 0.0, 1.0]]).expand(len(tilt), 3)
    white, grazing = rough_reflection(normals, views, torch.full((len(tilt),), roughness), None, directions, flux)
    scale, bias = lobe_albedo(tilt.cos(), torch.full((len(tilt),), roughness))
    torch.testing.assert_close(white[:, 0], scale + bias, atol=0.01, rtol=0)
    torch.testing.assert_close(grazing[:, 0], bias, atol=0.01, rtol=0)
    assert brdf_table().shape[-1] == 2


def test_gradients_go_through_the_twin():
    normals, views, roughness, visibility, directions, flux = scene(1, 20, 8, 2)
    roughness.requires_grad_(True)
    white, _ = rough_reflection(normals, views, roughness, visibility, directions, flux)
    white.sum().backward()
    assert roughness.grad.abs().sum() > 0
