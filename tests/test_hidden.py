"""What the photo does not see wears what is seen of places like it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from near.models.anchors import build_anchors, decode_anchors
from near.models.harmonics import fibonacci_sphere
from near.models.hidden import completed, likeness
from near.models.material import voxel_mean

RESOLUTION = 16


@pytest.fixture(scope="module")
def ball():
    """A ball with a red belt, and which of its discs a camera at +x sees."""
    normals = fibonacci_sphere(6000)
    coords, anchors, _ = build_anchors(normals * 0.45, normals, normals, RESOLUTION, spread=0.6)
    cloud = decode_anchors(coords, anchors, RESOLUTION)
    belt = cloud.points[:, 2].abs() < 0.1
    worn = torch.where(belt[:, None], torch.tensor([0.6, -0.6, -0.6, 0.5, 1.0]), torch.tensor([-0.2, -0.2, 0.1, -0.5, -1.0]))
    return cloud, len(coords), worn, (cloud.points[:, 0] > 0.05).float()


def test_a_belt_goes_all_around(ball):
    cloud, count, worn, seen = ball
    guess = torch.zeros(count, 5)
    answer, truth = completed(cloud, guess, worn, seen), voxel_mean(worn, cloud.voxel, count)
    hidden = voxel_mean(seen[:, None], cloud.voxel, count)[:, 0] == 0
    assert hidden.sum() > count / 4
    assert (answer - truth)[hidden].abs().mean() < 0.15 < 0.4 < (guess - truth)[hidden].abs().mean()
    assert (answer - truth)[~hidden].abs().mean() < 0.15


def test_nothing_alike_leaves_the_guess(ball):
    """A photo that sees the lower half only says nothing of the top."""
    cloud, count, worn, _ = ball
    seen = (cloud.points[:, 2] < -0.2).float()
    guess = torch.rand(count, 5, generator=torch.Generator().manual_seed(0))
    top = voxel_mean(cloud.points, cloud.voxel, count)[:, 2] > 0.2
    assert torch.allclose(completed(cloud, guess, worn, seen)[top], guess[top], atol=1e-3)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_photo_of_nothing_and_one_of_all(ball, share):
    cloud, count, worn, _ = ball
    guess = torch.full((count, 5), 0.3)
    answer = completed(cloud, guess, worn, torch.full((len(worn),), share))
    assert torch.allclose(answer, guess if share == 0 else voxel_mean(worn, cloud.voxel, count), atol=1e-5)


@given(st.floats(-math.pi, math.pi), st.integers(0, 1000))
def test_places_are_alike_around_the_vertical(turn, seed):
    generator = torch.Generator().manual_seed(seed)
    points, normals = torch.rand(20, 3, generator=generator) - 0.5, torch.nn.functional.normalize(torch.randn(20, 3, generator=generator), dim=-1)
    points[:, :2] += 0.05 * torch.sign(points[:, :2])  # at the axis there is no outwards
    rotation = torch.tensor([[math.cos(turn), -math.sin(turn), 0], [math.sin(turn), math.cos(turn), 0], [0, 0, 1]])
    assert torch.allclose(likeness(points @ rotation.T, normals @ rotation.T), likeness(points, normals), atol=1e-4)
