"""Tetrahedral interpolation in a 3-D table, as OpenColorIO does it: a numba kernel and its torch twin."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from near.compiled import compiled


def interpolate(table: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Look up ``codes`` [N, 3] in [0, 1] (clipped) in ``table`` [n, n, n, 3] float32; returns [N, 3] float32."""
    out = np.empty_like(codes, np.float32)
    _kernel(table.reshape(-1, 3), table.shape[0], np.ascontiguousarray(codes, np.float32), out)
    return out


def interpolate_torch(table: Tensor, codes: Tensor) -> Tensor:
    """Torch twin of :func:`interpolate`; differentiable in ``codes`` and ``table`` (zero slope where clipped).

    The unit cell is cut into six tetrahedra by the order of the three fractions: walk from the cell's lowest corner to
    its highest along the axes in falling order of their fraction.
    """
    size = table.shape[0]
    position = codes.clamp(0, 1) * (size - 1)
    cell = position.detach().floor().clamp_(0, size - 2)
    falling, axes = (position - cell).sort(dim=-1, descending=True)
    stride = torch.tensor([size * size, size, 1], device=codes.device)
    corner = (cell.long() * stride).sum(-1)
    flat = table.reshape(-1, 3)
    steps = stride[axes]
    i1 = corner + steps[:, 0]
    i2 = i1 + steps[:, 1]
    i3 = i2 + steps[:, 2]
    a, b, c = falling[:, 0:1], falling[:, 1:2], falling[:, 2:3]
    return flat[corner] * (1 - a) + flat[i1] * (a - b) + flat[i2] * (b - c) + flat[i3] * c


@compiled()
def _kernel(flat, size, codes, out):
    top = np.float32(size - 1)
    for n in range(codes.shape[0]):
        x = min(max(codes[n, 0], np.float32(0)), np.float32(1)) * top
        y = min(max(codes[n, 1], np.float32(0)), np.float32(1)) * top
        z = min(max(codes[n, 2], np.float32(0)), np.float32(1)) * top
        i, j, k = min(int(x), size - 2), min(int(y), size - 2), min(int(z), size - 2)
        x -= i
        y -= j
        z -= k
        si, sj, sk = size * size, size, 1
        # Sort (fraction, stride) pairs, largest first.
        if x < y:
            x, y, si, sj = y, x, sj, si
        if y < z:
            y, z, sj, sk = z, y, sk, sj
            if x < y:
                x, y, si, sj = y, x, sj, si
        c0 = i * size * size + j * size + k
        c1 = c0 + si
        c2 = c1 + sj
        c3 = c2 + sk
        for c in range(3):
            out[n, c] = flat[c0, c] * (1 - x) + flat[c1, c] * (x - y) + flat[c2, c] * (y - z) + flat[c3, c] * z
