"""Surface discs reach past the edges of the surface they stand for; what they cover there is taken back.

A disc at an edge sticks out over it by about its own deviation, and the splatter's blur adds to that: a pixel on the
silhouette is covered by a quarter too much. In a frame of twice the size that is about one pixel all around, which the share of
a pixel's neighbourhood that is covered tells.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from near.splatting.threads import compiled, run_shared

EMPTY, FULL = 0.6, 0.9  # covered share of the 3 x 3 neighbourhood at which a pixel counts as empty, as covered
# A silhouette has open space on one side: three of eight pixels around, or more. A pinhole has none and a crack two; neither
# must grow.
RING = ((0, 3), (0, -3), (3, 0), (-3, 0), (2, 2), (2, -2), (-2, 2), (-2, -2))
REACH = 3
OPEN_BELOW, OPEN_WIDTH = 0.75, 0.5  # alpha under which a pixel of the ring begins to count as open, and how fast
CRACK = 2


def trim_coverage(channels: Tensor, alpha: Tensor) -> Tensor:
    """Take back what surface discs cover beyond their surface.

    Args:
        channels: [H, W, C] premultiplied with alpha, of a frame splatted at twice its size.
        alpha: [H, W].
    Returns:
        [H, W, C + 1]: channels and alpha, both times the same factor in 0..1, which is 1 away from silhouettes.
    """
    if alpha.is_cuda or channels.dtype != torch.float32 or (channels.requires_grad and torch.is_grad_enabled()):
        return trim_coverage_reference(channels, alpha)
    source, covered = channels.detach().contiguous().numpy(), alpha.detach().contiguous().numpy()
    out = np.empty((*covered.shape, source.shape[2] + 1), np.float32)
    run_shared(lambda k, n: _trim_rows(k, n, source, covered, out))
    return torch.from_numpy(out)


def trim_coverage_reference(channels: Tensor, alpha: Tensor) -> Tensor:
    """:func:`trim_coverage` in plain torch: differentiable, any device."""
    height, width = alpha.shape
    around = F.avg_pool2d(F.pad(alpha[None, None], (1, 1, 1, 1), mode="replicate"), 3, 1)[0, 0]
    wide = F.pad(alpha[None, None], (REACH,) * 4, mode="replicate")[0, 0]
    ring = [wide[REACH + y:REACH + y + height, REACH + x:REACH + x + width] for y, x in RING]
    outside = (sum(((OPEN_BELOW - a) / OPEN_WIDTH).clamp(0, 1) for a in ring) - CRACK).clamp(0, 1)
    kept = ((around - EMPTY) / (FULL - EMPTY)).clamp(0, 1)
    factor = torch.where(kept < alpha, 1 + (kept / alpha.clamp_min(1e-6) - 1) * outside, torch.ones(()).to(alpha))
    return torch.cat([channels, alpha[..., None]], -1) * factor[..., None]


@compiled
def _trim_rows(share, shares, channels, alpha, out):
    """Output rows of one share: channels float32 [H, W, C], alpha [H, W], out [H, W, C + 1]."""
    height, width, count = channels.shape
    for y in range(height * share // shares, height * (share + 1) // shares):
        for x in range(width):
            own, factor = alpha[y, x], 1.0
            if own > 0:
                around = 0.0
                for dy in range(-1, 2):
                    for dx in range(-1, 2):
                        around += alpha[min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)]
                kept = min(max((around / 9 - EMPTY) / (FULL - EMPTY), 0.0), 1.0)
                if kept < own:
                    outside = 0.0
                    for dy, dx in RING:
                        there = alpha[min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)]
                        outside += min(max((OPEN_BELOW - there) / OPEN_WIDTH, 0.0), 1.0)
                    factor = 1 + (kept / max(own, 1e-6) - 1) * min(max(outside - CRACK, 0.0), 1.0)
            for c in range(count):
                out[y, x, c] = channels[y, x, c] * factor
            out[y, x, count] = own * factor
