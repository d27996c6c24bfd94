"""The light of a photo, in directions: its twins, what it recovers, what it keeps from being taken for paint."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from near.errors import Cancelled
from near.geometry.cameras import orbit_camera
from near.models.anchors import build_anchors, decode_anchors, view_directions
from near.models.evidence import diffuse_response, fit_light, mirror_response, painted, shown_by, unexplained
from near.models.exchange import build_exchange
from near.models.harmonics import fibonacci_sphere
from near.models.photo_light import fit_directions, light_directions, responses, shown_under, smooth_start

RESOLUTION = 16


def discs(seed: int, count: int):
    """Normals, views, visibility, materials and roughly how the pipeline has them."""
    g = torch.Generator().manual_seed(seed)
    normals = F.normalize(torch.randn(count, 3, generator=g), dim=-1)
    views = F.normalize(normals + 0.7 * F.normalize(torch.randn(count, 3, generator=g), dim=-1), dim=-1)
    visibility = torch.randn(count, 25, generator=g) * 0.2
    visibility[:, 0] = 3.0
    material = torch.rand(count, 5, generator=g)
    return normals, views, visibility, material


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 200))
def test_the_compiled_sum_is_the_response_times_the_flux(seed, count):
    directions, solid_angle = light_directions()
    flux = torch.rand(len(directions), 3, generator=torch.Generator().manual_seed(seed)) * solid_angle
    plain = torch.einsum("cmn,nc->mc", responses(*discs(seed, count), directions), flux)
    torch.testing.assert_close(shown_under(*discs(seed, count), directions, flux), plain, rtol=3e-3, atol=1e-3)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 10))
def test_a_light_explains_what_it_made(seed, strength):
    """Radiance made by a lamp in a dim room, and a known part: found again up to what 40 rounds leave; never negative; the known part stays out."""
    directions, solid_angle = light_directions()
    made = discs(seed, 800)
    flux = torch.full((len(directions), 3), 0.3 * solid_angle * strength)
    flux[seed % len(directions)] *= 60
    response = responses(*made, directions)
    radiance = torch.einsum("cmn,nc->mc", response, flux)
    known = 0.1 * radiance.mean() * torch.ones_like(radiance)
    found = fit_directions(response, radiance + known, known, torch.ones(len(radiance)), torch.full_like(flux, 0.5 * solid_angle * strength))
    assert (found >= 0).all()
    error = ((torch.einsum("cmn,nc->mc", response, found) + 0.02) / (radiance + 0.02)).log().abs()
    assert error.median() < 0.05 and error.mean() < 0.1


@pytest.fixture(scope="module")
def ball():
    """A glossy ball of one paint under a lamp in a dim room, as a camera sees it: discs, exchange, material, radiance, seen, views."""
    normals = fibonacci_sphere(20_000)
    coords, anchors, _ = build_anchors(normals * 0.45, normals, normals, RESOLUTION, spread=0.5)
    cloud = decode_anchors(coords, anchors, RESOLUTION)
    camera = orbit_camera(0.3, 0.2, 2.0, math.radians(40), 64, 64)
    views = view_directions(cloud.points, camera)
    material = torch.tensor([0.3, 0.2, 0.1, 0.35, 0.0]).repeat(len(cloud), 1)
    directions = F.normalize(torch.tensor([[0.6, -0.5, 0.6]]) + 0.15 * fibonacci_sphere(40), dim=-1)  # between the fitted ones
    lamp = shown_under(cloud.normals, views, cloud.visibility, material, directions, torch.full((40, 3), 2.0 / 40))
    around = shown_under(cloud.normals, views, cloud.visibility, material, fibonacci_sphere(2000), torch.full((2000, 3), 0.3 * 4 * math.pi / 2000))
    seen = ((cloud.disc_normals * views).sum(-1) > 0.1).float()
    return cloud, build_exchange(cloud, RESOLUTION), material, lamp + around, seen, views


def test_a_highlight_is_not_taken_for_paint(ball):
    """The paint is known, so all that is left unexplained is wrong: little on the whole, and in the highlight less than smooth light leaves."""
    cloud, exchange, material, radiance, seen, views = ball
    rest = unexplained(cloud, exchange, material, radiance, seen, views)
    assert (rest[seen == 0] == 0).all()
    assert rest[seen > 0].abs().mean() < 0.05
    bright = (seen > 0) & (radiance[:, 0] > 1.6 * radiance[seen > 0][:, 0].median())
    discs = cloud.normals, cloud.visibility
    smooth = painted(material, diffuse_response(*discs), mirror_response(*discs, views, material[:, 3]))
    rows = seen > 0
    left = (radiance / shown_by(smooth, fit_light(smooth[:, rows], radiance[rows], seen[rows]))).log()
    assert bright.sum() > 50 and rest[bright].abs().mean() < 0.8 * left[bright].abs().mean(), (rest[bright].abs().mean(), left[bright].abs().mean())


def test_it_stops_when_told(ball):
    cloud, exchange, material, radiance, seen, views = ball

    def stop():
        raise Cancelled()

    with pytest.raises(Cancelled):
        unexplained(cloud, exchange, material, radiance, seen, views, stop)


def test_a_light_of_one_colour_leaves_hues_to_the_paint(ball):
    """Sides of different hues, guessed alike: a light of many colours explains some of it, one of a single colour nothing."""
    cloud, exchange, material, radiance, seen, views = ball
    right = cloud.normals[:, 0] > 0
    paint = torch.where(right[:, None], torch.tensor([1.3, 0.9, 0.6]), torch.tensor([0.6, 0.9, 1.3]))

    def hue_told(one_colour: bool) -> float:
        rest = unexplained(cloud, exchange, material, radiance * paint, seen, views, one_colour=one_colour)
        hue = (rest - paint.log()) @ torch.tensor([1.0, 0.0, -1.0])
        return float((hue[(seen > 0) & right].mean() - hue[(seen > 0) & ~right].mean()).abs())

    difference = 2 * math.log(1.3 / 0.6)
    assert hue_told(True) < 0.1 * difference < 0.3 * difference < hue_told(False)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_directions_of_a_light_of_one_colour_differ_in_strength_alone(seed):
    directions, solid_angle = light_directions()
    start = smooth_start(torch.randn(len(directions), 3, generator=torch.Generator().manual_seed(seed)) + torch.tensor([1.0, 1.5, 2.0]), solid_angle, True)
    made = discs(seed, 300)
    radiance = torch.rand(300, 3, generator=torch.Generator().manual_seed(seed + 1))
    found = fit_directions(responses(*made, directions), radiance, torch.zeros(300, 3), torch.ones(300), start, one_colour=True)
    assert (start > 0).all()
    for flux in (start, found):
        colour = flux / flux.sum(1, keepdim=True)
        torch.testing.assert_close(colour, colour[:1].expand_as(colour), rtol=1e-3, atol=1e-4)
