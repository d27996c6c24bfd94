"""What a photo does not see of an object wears what the seen side wears at the same height, facing alike.

Bottles, statues, shoes and chairs repeat themselves around the vertical far more than they continue past an outline: on training
objects the seen voxels of a hidden one's height, distance from the axis and slope told its base colour better (off by 0.64 of
logarithms) than the homogeniser does, which hears of the nearest seen voxel and of two mirror images (0.73), and better than the
nearest voxels themselves (0.80).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from near.models.anchors import AnchorCloud
from near.models.material import voxel_mean

ALIKE = 0.035          # deviation of the weights, in heights of an object of size 1
AXIS_WEIGHT = 0.5      # of the distance to the vertical axis, beside height
SLOPE_WEIGHT = 0.2     # of a normal's parts, outwards and up
KNOWN_SHARE = 0.02     # of a voxel that the photo must see
HALF_TRUSTED = 0.5     # seen voxels at which what they wear counts as much as the guess
CHUNK = 1024


def likeness(points: Tensor, normals: Tensor) -> Tensor:
    """[L, 4]: what places [L, 3] around the vertical axis have in common; near each other where they are alike."""
    axis_distance = points[:, :2].norm(dim=-1, keepdim=True)
    outwards = (normals[:, :2] * points[:, :2]).sum(-1, keepdim=True) / axis_distance.clamp_min(1e-3)
    return torch.cat([points[:, 2:], AXIS_WEIGHT * axis_distance, SLOPE_WEIGHT * outwards, SLOPE_WEIGHT * normals[:, 2:]], -1)


def completed(cloud: AnchorCloud, guess: Tensor, worn: Tensor, seen: Tensor) -> Tensor:
    """Materials of all voxels: what the photo shows of the seen ones, and of the others what seen ones like them wear.

    Args:
        guess: [L, C] the homogeniser's, encoded; stands where nothing alike is seen.
        worn: [M, C] of the discs, with the photo's detail; seen: [M] weights 0..1.
    Returns:
        [L, C].
    """
    count = len(guess)
    share = voxel_mean(seen[:, None], cloud.voxel, count)[:, 0]
    known = share > KNOWN_SHARE
    worn_by = voxel_mean(worn, cloud.voxel, count, seen)
    shown = torch.lerp(guess, worn_by, (share.clamp(0, 1).sqrt() * known)[:, None])
    if known.all() or not known.any():
        return shown
    alike = likeness(voxel_mean(cloud.points, cloud.voxel, count), F.normalize(voxel_mean(cloud.normals, cloud.voxel, count), dim=-1))
    for rows in torch.nonzero(~known)[:, 0].split(CHUNK):
        weight = torch.exp(-0.5 * (torch.cdist(alike[rows], alike[known]) / ALIKE) ** 2) * share[known]
        mass = weight.sum(1, keepdim=True)
        shown[rows] = torch.lerp(guess[rows], weight @ worn_by[known] / mass.clamp_min(1e-9), mass / (mass + HALF_TRUSTED))
    return shown
