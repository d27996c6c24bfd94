"""Turning an equirectangular map by any rotation without losing or making energy."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from near.lighting.equirect import fractions, resample_equirect, row_solid_angles, texel_directions

FINER = 4  # rows of the source grid per output row


def rotate_equirect(rgb: Tensor, env_from_world: Tensor, height: int, width: int) -> Tensor:
    """Map [H, W, 3] seen from the world: texel of world direction d holds the mean around ``env_from_world @ d``.

    Returns: [height, width, 3] float32. The integral over the sphere is kept to rounding; a constant stays constant.
    A turn about +Z (the common case) only shifts rows; any other scatters a finer copy into cells of nearly equal area.
    """
    m = env_from_world.detach().double().cpu()
    if _is_turn_about_z(m):
        return _turn_about_z(rgb, math.atan2(m[1, 0], m[0, 0]), height, width)
    fine_rows, fine_columns = FINER * height, FINER * width
    scatter, received, expand = _scatter(tuple(np.round(m.flatten().tolist(), 7)), height, width)
    omega = row_solid_angles(fine_rows, fine_columns)[:, None, None]
    flux = (resample_equirect(rgb, fine_rows, fine_columns).double() * omega).reshape(-1, 3).numpy()
    out = (expand @ ((scatter @ flux) / received[:, None])).reshape(height, width, 3)
    # Cells receive their own solid angle to within a percent; what that costs in energy is given back.
    kept = (out * row_solid_angles(height, width).numpy()[:, None, None]).sum((0, 1))
    total = flux.sum(0)
    return torch.from_numpy(out * np.divide(total, kept, out=np.ones(3), where=kept > 0)).float()


def _is_turn_about_z(m: Tensor) -> bool:
    off_axis = torch.stack([m[0, 2], m[1, 2], m[2, 0], m[2, 1]]).abs().max()
    return bool(off_axis < 1e-6 and m[2, 2] > 0 and torch.linalg.det(m) > 0)


def _turn_about_z(rgb: Tensor, angle_rad: float, height: int, width: int) -> Tensor:
    """The content of world column u is found at u(env) = u - angle / 2 pi."""
    # Shift at the source's own width, so that a whole-texel turn of the source is exact.
    fine_width = max(rgb.shape[1], width)
    fine = resample_equirect(rgb, height, fine_width)
    shift = angle_rad / (2 * math.pi) * fine_width
    whole = math.floor(shift)
    moved = torch.lerp(fine.roll(whole, 1), fine.roll(whole + 1, 1), shift - whole)
    return resample_equirect(moved, height, width)


@lru_cache(maxsize=4)
def _scatter(matrix: tuple[float, ...], height: int, width: int) -> tuple[sparse.csr_matrix, np.ndarray, sparse.csr_matrix]:
    """(cells from source texels, solid angle each cell receives, output texels from cells)."""
    rows, columns = FINER * height, FINER * width
    env_from_world = torch.tensor(matrix, dtype=torch.float64).view(3, 3)
    world = texel_directions(rows, columns).reshape(-1, 3).double() @ env_from_world  # rows: m^T d
    counts, first, expand = _cells(height, width)
    u, v = (f.numpy() for f in fractions(world))
    y = v * height - 0.5
    top = np.floor(y).astype(np.int64)
    cell, share = [], []
    for dy, row_share in ((0, 1 - (y - top)), (1, y - top)):
        row = top + dy
        over = (row < 0) | (row >= height)  # through a pole: same row, opposite meridian
        row = np.clip(row, 0, height - 1)
        n = counts[row]
        x = (u + 0.5 * over) * n - 0.5
        left = np.floor(x).astype(np.int64)
        for dx, column_share in ((0, 1 - (x - left)), (1, x - left)):
            cell.append(first[row] + (left + dx) % n)
            share.append(row_share * column_share)
    source = np.tile(np.arange(rows * columns), 4)
    scatter = sparse.csr_matrix((np.concatenate(share), (np.concatenate(cell), source)), shape=(int(counts.sum()), rows * columns))
    received = scatter @ np.repeat(row_solid_angles(rows, columns).numpy(), columns)
    return scatter, received, expand


@lru_cache(maxsize=4)
def _cells(height: int, width: int) -> tuple[np.ndarray, np.ndarray, sparse.csr_matrix]:
    """Cells of nearly equal area: a row at polar angle t is cut into about width * sin(t) of them (at least 4).

    Returns: cells per row [height], index of each row's first cell, and [height * width, cells] shares of each output texel.
    """
    polar = (np.arange(height) + 0.5) * math.pi / height
    counts = np.clip(np.round(width * np.sin(polar)).astype(np.int64), 4, None)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    blocks = []
    for n in counts:
        low = np.maximum(np.arange(width)[:, None] / width, np.arange(n)[None] / n)
        high = np.minimum((np.arange(width)[:, None] + 1) / width, (np.arange(n)[None] + 1) / n)
        blocks.append(sparse.csr_matrix(np.maximum(high - low, 0) * width))
    return counts, first, sparse.block_diag(blocks, format="csr")
