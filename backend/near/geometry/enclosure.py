"""Is a point inside an object known by its occupied voxels?"""

from __future__ import annotations

import torch
from torch import Tensor

_DIRECTIONS = torch.tensor([(x, y, z) for x in (-1, 0, 1) for y in (-1, 0, 1) for z in (-1, 0, 1) if (x, y, z) != (0, 0, 0)])


def encloses(coords: Tensor, resolution: int, point: Tensor) -> bool:
    """Whether ``point`` lies in an occupied voxel or is shut in by occupied voxels on all sides.

    Looked at along 26 directions: under a table or in an open box something stays open; in a solid, of which only the
    surface is occupied, nothing does.

    Args:
        coords: int [L, 3] occupied voxels. point: float [3], asset space (the grid spans [-0.5, 0.5]^3).
    """
    cell = torch.floor((point.double() + 0.5) * resolution).long()
    if bool((cell < 0).any()) or bool((cell >= resolution).any()):
        return False
    occupied = torch.zeros((resolution,) * 3, dtype=torch.bool)
    occupied[tuple(coords.long().T)] = True
    if bool(occupied[tuple(cell)]):
        return True
    for direction in _DIRECTIONS:
        steps = cell + direction * torch.arange(1, resolution)[:, None]
        steps = steps[((steps >= 0) & (steps < resolution)).all(-1)]
        # Diagonal steps slip between voxels that touch at an edge; the three beside each step close that gap.
        if not bool(_near(occupied, steps, direction).any()):
            return False
    return True


def _near(occupied: Tensor, cells: Tensor, direction: Tensor) -> Tensor:
    hit = occupied[tuple(cells.T)]
    if int(direction.abs().sum()) > 1:
        for axis in range(3):
            if direction[axis]:
                beside = cells.clone()
                beside[:, axis] -= direction[axis]
                hit = hit | occupied[tuple(beside.T)]
    return hit
