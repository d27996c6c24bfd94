"""Voxels a triangle mesh touches (NEAR-SPEC section 9)."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from near.errors import NearError

_CLIP = 0.5 - 1e-6


def voxelize(vertices: Tensor | np.ndarray, faces: Tensor | np.ndarray, resolution: int) -> Tensor:
    """Voxels of the grid over [-0.5, 0.5]^3 whose closed box meets a triangle (exact separating-axis test).

    Args: vertices [V, 3] in asset space (clipped to the grid); faces [F, 3].
    Returns: uint8 [L, 3], lexicographic order.
    Raises:
        NearError: ``resolution-invalid`` unless 1 to 256.
    """
    if not 1 <= resolution <= 256:
        raise NearError("resolution-invalid", f"A grid of {resolution} voxels a side was asked for.", "Ask for 1 to 256.")
    points = np.clip(np.asarray(vertices, np.float64), -_CLIP, _CLIP)
    occupied = np.zeros((resolution,) * 3, np.uint8)
    # In voxel units a box is [i, i + 1]^3.
    _mark((points + 0.5) * resolution, np.ascontiguousarray(faces, np.int64), occupied)
    return torch.from_numpy(np.argwhere(occupied).astype(np.uint8))


def published_voxels(vertices: Tensor | np.ndarray, faces: Tensor | np.ndarray, resolution: int = 64) -> Tensor:
    """The published pipeline's front end: a Y-up mesh in [-1, 1] is turned Z-up and halved, then voxelized."""
    p = np.asarray(vertices, np.float64)
    return voxelize(np.stack([p[:, 0], -p[:, 2], p[:, 1]], -1) * 0.5, faces, resolution)


@njit(cache=True)
def _mark(points, faces, occupied):
    n = occupied.shape[0]
    for f in range(len(faces)):
        a, b, c = points[faces[f, 0]], points[faces[f, 1]], points[faces[f, 2]]
        low = np.empty(3, np.int64)
        high = np.empty(3, np.int64)
        for k in range(3):
            # Closed boxes: a coordinate on a grid plane belongs to both sides.
            low[k] = max(int(np.ceil(min(a[k], b[k], c[k]))) - 1, 0)
            high[k] = min(int(np.floor(max(a[k], b[k], c[k]))), n - 1)
        single = low[0] == high[0] and low[1] == high[1] and low[2] == high[2]
        for x in range(low[0], high[0] + 1):
            for y in range(low[1], high[1] + 1):
                for z in range(low[2], high[2] + 1):
                    if not occupied[x, y, z] and (single or _overlap(a, b, c, x + 0.5, y + 0.5, z + 0.5)):
                        occupied[x, y, z] = 1


@njit(cache=True)
def _overlap(a, b, c, x, y, z):
    """Triangle against the closed unit box around (x, y, z): the box's axes are already known to overlap."""
    v = np.empty((3, 3))
    for k, p in enumerate((a, b, c)):
        v[k, 0], v[k, 1], v[k, 2] = p[0] - x, p[1] - y, p[2] - z
    e0 = v[1] - v[0]
    e1 = v[2] - v[1]
    e2 = v[0] - v[2]
    for e in (e0, e1, e2):
        # Cross products of the edge with the three axes.
        for axis in range(3):
            i, j = (axis + 1) % 3, (axis + 2) % 3
            lo = np.inf
            hi = -np.inf
            for k in range(3):
                d = v[k, j] * e[i] - v[k, i] * e[j]
                lo = min(lo, d)
                hi = max(hi, d)
            r = 0.5 * (abs(e[i]) + abs(e[j]))
            if lo > r or hi < -r:
                return False
    nx, ny, nz = e0[1] * e1[2] - e0[2] * e1[1], e0[2] * e1[0] - e0[0] * e1[2], e0[0] * e1[1] - e0[1] * e1[0]
    d = nx * v[0, 0] + ny * v[0, 1] + nz * v[0, 2]
    return abs(d) <= 0.5 * (abs(nx) + abs(ny) + abs(nz))
