"""Equirectangular maps: directions, solid angles, bilinear look-up, energy-preserving resampling.

Convention (DESIGN section 4, BLENDER.md "World"): top row = +Z, column fraction u = 0.5 - atan2(y, x) / 2 pi, row fraction
v = acos(z) / pi from the top, texel centres at half-integers. Maps are [H, W, C]; they wrap at the seam and, through the
poles, onto the opposite meridian.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from near.compiled import compiled


@lru_cache(maxsize=16)
def row_solid_angles(height: int, width: int) -> Tensor:
    """[H] float64: solid angle in steradians of one texel of each row; times W they sum to 4 pi."""
    edge = torch.cos(torch.linspace(0, math.pi, height + 1, dtype=torch.float64))
    return (edge[:-1] - edge[1:]) * (2 * math.pi / width)


@lru_cache(maxsize=8)
def texel_directions(height: int, width: int) -> Tensor:
    """[H, W, 3] unit directions of the texel centres (do not modify: shared)."""
    polar = (torch.arange(height, dtype=torch.float64) + 0.5) * (math.pi / height)
    azimuth = math.pi - (torch.arange(width, dtype=torch.float64) + 0.5) * (2 * math.pi / width)
    sin = polar.sin()[:, None]
    return torch.stack([sin * azimuth.cos(), sin * azimuth.sin(), polar.cos()[:, None].expand(-1, width)], -1).float()


def fractions(directions: Tensor) -> tuple[Tensor, Tensor]:
    """(u, v) in [0, 1] of directions [..., 3] of any length > 0."""
    x, y, z = directions.unbind(-1)
    u = 0.5 - torch.atan2(y, x) / (2 * math.pi)
    v = torch.atan2(torch.hypot(x, y), z) / math.pi  # unlike acos, exact near the poles
    return u, v


def pad_for_lookup(rgb: Tensor) -> Tensor:
    """[H + 2, W + 2, C]: one texel of border, so that a bilinear look-up needs no case at seam or pole."""
    width = rgb.shape[1]
    # An odd width has no texel opposite to a texel's centre; rolling by floor(W / 2) is half a texel off, at the pole only.
    over = torch.cat([rgb[:1].roll(width // 2, 1), rgb, rgb[-1:].roll(width // 2, 1)])
    return torch.cat([over[:, -1:], over, over[:, :1]], 1)


def bilinear(padded: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Bilinear look-up in a padded map at fractions u, v [N]; returns [N, C]. Differentiable."""
    height, width = padded.shape[0] - 2, padded.shape[1] - 2
    x, y = u * width + 0.5, v * height + 0.5
    column, row = x.detach().floor().clamp(0, width), y.detach().floor().clamp(0, height)
    fx, fy = (x - column)[:, None], (y - row)[:, None]
    flat = padded.reshape(-1, padded.shape[-1])
    corner = row.long() * (width + 2) + column.long()
    top = torch.lerp(flat[corner], flat[corner + 1], fx)
    bottom = torch.lerp(flat[corner + width + 2], flat[corner + width + 3], fx)
    return torch.lerp(top, bottom, fy)


def resample_equirect(rgb: Tensor, height: int, width: int) -> Tensor:
    """Resample [H, W, C] to [height, width, C] float32 by exact area overlap on the sphere.

    The integral over the sphere is kept (a small sun keeps its energy), and a constant map stays constant. Enlarging gives
    blocks. Same input as output size returns the input itself.
    """
    if tuple(rgb.shape[:2]) == (height, width):
        return rgb
    out = np.empty((height, width, rgb.shape[2]), np.float32)
    source = np.ascontiguousarray(rgb.detach().cpu().numpy(), np.float32)
    _resample(source, _row_edges(rgb.shape[0]), _row_edges(height), out)
    return torch.from_numpy(out).to(rgb.device)


def resample_equirect_torch(rgb: Tensor, height: int, width: int) -> Tensor:
    """Dense torch twin of :func:`resample_equirect` (its test oracle; differentiable)."""
    rows = _overlap(_row_edges(rgb.shape[0]), _row_edges(height)).to(rgb.device)
    columns = _overlap(np.linspace(0, 1, rgb.shape[1] + 1), np.linspace(0, 1, width + 1)).to(rgb.device)
    return torch.einsum("or,rci,pc->opi", rows, rgb.double(), columns).float()


def _row_edges(height: int) -> np.ndarray:
    """[H + 1] rising from 0 to 1: share of the sphere above each row edge."""
    return np.sin(np.linspace(0, math.pi / 2, height + 1)) ** 2  # (1 - cos) / 2 without cancellation


def _overlap(source: np.ndarray, target: np.ndarray) -> Tensor:
    """[len(target) - 1, len(source) - 1]: share of each target interval that each source interval covers."""
    low = np.maximum(target[:-1, None], source[None, :-1])
    high = np.minimum(target[1:, None], source[None, 1:])
    return torch.from_numpy(np.maximum(high - low, 0) / np.diff(target)[:, None])


@compiled()
def _resample(source, source_edges, target_edges, out):
    rows_in, columns_in, channels = source.shape
    rows_out, columns_out = out.shape[0], out.shape[1]
    ratio = columns_in / columns_out
    for o in range(rows_out):
        line = np.zeros((columns_in, channels), np.float64)
        top, bottom = target_edges[o], target_edges[o + 1]
        i = min(max(np.searchsorted(source_edges, top, side="right") - 1, 0), rows_in - 1)
        while i < rows_in and source_edges[i] < bottom:
            weight = (min(bottom, source_edges[i + 1]) - max(top, source_edges[i])) / (bottom - top)
            if weight > 0:
                for c in range(columns_in):
                    for k in range(channels):
                        line[c, k] += weight * source[i, c, k]
            i += 1
        for p in range(columns_out):
            left, right = p * ratio, (p + 1) * ratio
            for k in range(channels):
                out[o, p, k] = 0
            c = int(left)
            total = np.zeros(channels, np.float64)
            while c < columns_in and c < right:
                weight = (min(right, c + 1.0) - max(left, float(c))) / ratio
                if weight > 0:
                    for k in range(channels):
                        total[k] += weight * line[c, k]
                c += 1
            for k in range(channels):
                out[o, p, k] = total[k]
