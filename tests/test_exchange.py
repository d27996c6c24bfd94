"""Light between the parts of one object: form factors, colour that bleeds, linearity, bounds."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from near.lighting import Environment, prefilter
from near.lighting.samples import sample_environment
from near.models.anchors import build_anchors, decode_anchors
from near.models.evidence import unexplained
from near.models.exchange import PATCHES, SENDERS, build_exchange, form_factors
from near.models.harmonics import fibonacci_sphere
from near.models.shading import light_surface, shade_terms

RESOLUTION = 16


@pytest.fixture(scope="module")
def corner():
    """A floor and a wall that meet, of 60 x 60 samples each, one-sided in the test's eyes; and which discs are floor and see the corner."""
    a, b = (t.flatten() for t in torch.meshgrid(torch.linspace(-0.4, 0.4, 60), torch.linspace(-0.4, 0.4, 60), indexing="ij"))
    floor = torch.stack([a, b, torch.full_like(a, -0.4)], -1)
    wall = torch.stack([torch.full_like(a, -0.41), b, a], -1)
    normals = torch.tensor([[0.0, 0, 1], [1.0, 0, 0]]).repeat_interleave(len(a), 0)
    coords, anchors, _ = build_anchors(torch.cat([floor, wall]), normals, normals, RESOLUTION, spread=0.5)
    cloud = decode_anchors(coords, anchors, RESOLUTION)
    return cloud, build_exchange(cloud, RESOLUTION), cloud.normals[:, 2] > 0.9, cloud.normals[:, 0] > 0.9


def test_form_factors_of_a_disc_overhead():
    """A disc of radius R at height h fills R^2 / (R^2 + h^2) of a cosine-weighted hemisphere."""
    radius, height = 0.5, 0.4
    r, angle = ((torch.arange(40000) + 0.5) / 40000).sqrt() * radius, torch.arange(40000) * 2.399963
    points = torch.stack([r * angle.cos(), r * angle.sin(), torch.full_like(r, height)], -1)
    up = torch.tensor([[0.0, 0, 1]])
    kernel = form_factors(torch.zeros(1, 3), up, points, -up.expand_as(points), 0.0)
    assert float(kernel.sum()) * radius ** 2 / 40000 == pytest.approx(radius ** 2 / (radius ** 2 + height ** 2), rel=1e-3)
    assert float(form_factors(torch.zeros(1, 3), -up, points, -up.expand_as(points), 0.0).sum()) == 0


def test_colour_bleeds_from_what_faces_a_disc(corner):
    """A red wall and a green floor of no albedo: the floor receives red, the wall green; their backs receive neither."""
    cloud, exchange, floor, wall = corner
    direct = torch.zeros(len(cloud), 3)
    direct[wall, 0], direct[floor, 1] = 1, 1
    got = exchange.received(direct, torch.zeros_like(direct), torch.zeros(3))
    near = floor & (cloud.points[:, 0] < 0)
    assert float(got[near, 0].mean()) > 0.8 and float(got[near, 1].max()) < 1e-3
    assert float(got[wall & (cloud.points[:, 2] < 0), 1].mean()) > 0.8 and float(got[wall, 0].max()) < 1e-3
    back = ~floor & ~wall
    assert float((got * exchange.hidden[exchange.patch][:, None])[back].mean()) < 0.02
    # Near the corner the wall hides more of the floor's sky than far from it.
    assert float(exchange.hidden[exchange.patch[near]].mean()) > float(exchange.hidden[exchange.patch[floor & ~near]].mean())


def test_bounces_add_light_where_there_is_albedo(corner):
    cloud, exchange, floor, wall = corner
    direct = torch.ones(len(cloud), 3) * wall[:, None]
    dark, bright = (exchange.received(direct, torch.full((len(cloud), 3), a), torch.zeros(3)) for a in (0.0, 0.9))
    assert bool((bright >= dark - 1e-6).all()) and float(bright[wall].mean()) > float(dark[wall].mean()) + 0.05


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 1))
def test_received_light_is_linear_and_within_what_is_sent(corner, seed, albedo):
    cloud, exchange, _, _ = corner
    g = torch.Generator().manual_seed(seed)
    one, two = torch.rand(2, len(cloud), 3, generator=g)
    around = torch.rand(2, 3, generator=g)
    gray = torch.full_like(one, albedo)
    both = exchange.received(one + two, gray, around.sum(0))
    torch.testing.assert_close(both, exchange.received(one, gray, around[0]) + exchange.received(two, gray, around[1]), atol=1e-4, rtol=1e-4)
    plain = exchange.received(one, torch.zeros_like(one), around[0])
    assert float(plain.min()) >= 0 and float(plain.max()) <= 1 + 1e-5


def test_an_asset_of_any_size_has_a_bounded_matrix(corner):
    cloud, exchange, _, _ = corner
    assert exchange.kernel.shape[0] <= PATCHES and exchange.kernel.shape[1] <= SENDERS
    few = build_exchange(cloud, RESOLUTION, senders=50)
    assert few.kernel.shape[1] <= 50 and len(few.patch) == len(cloud)
    reached = exchange.kernel.sum(1)
    assert float(((exchange.hidden - reached) * reached * exchange.area).sum() / (reached ** 2 * exchange.area).sum()) == pytest.approx(0, abs=1e-3)


def test_a_convex_object_hides_nothing_from_itself():
    normals = fibonacci_sphere(3000)
    coords, anchors, _ = build_anchors(normals * 0.45, normals, normals, RESOLUTION, spread=0.6)
    cloud = decode_anchors(coords, anchors, RESOLUTION)
    exchange = build_exchange(cloud, RESOLUTION)
    assert float(exchange.hidden.mean()) < 0.05
    env = sample_environment("studio")
    surface = cloud.surface(torch.tensor([0.8, 0.8, 0.8, 0.5, 0.0]).expand(len(cloud), 5))
    lit, plain = (light_surface(surface, prefilter(env), env, e) for e in (exchange, None))
    torch.testing.assert_close(lit.irradiance, plain.irradiance)
    assert lit.hidden_lin709.shape == plain.hidden_lin709.shape == (len(cloud), 3) and math.isfinite(float(lit.hidden_lin709.sum()))


def test_bleeding_colour_is_not_taken_for_paint(corner):
    """A white floor beside a red wall shows some red near it; told of the exchange, the fitted light explains it."""
    cloud, exchange, floor, wall = corner
    env = Environment(torch.ones(16, 32, 3))
    material = torch.tensor([0.85, 0.85, 0.85, 1.0, 0.0]).repeat(len(cloud), 1)
    material[wall, 1:3] = 0.05
    surface, light = cloud.surface(material), prefilter(env)
    view = F.normalize(torch.tensor([2.0, 0.3, 1.5]) - cloud.points, dim=-1)
    radiance = shade_terms(surface, light_surface(surface, light, env, exchange), light, env, view).combine()
    seen = (floor | wall).float()
    told, untold = (unexplained(cloud, e, material, radiance, seen, view)[floor] @ torch.tensor([1.0, -0.5, -0.5])
                    for e in (exchange, replace(exchange, kernel=torch.zeros_like(exchange.kernel))))
    assert told.std() < 0.7 * untold.std(), (told.std(), untold.std())
