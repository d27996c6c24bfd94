"""The compact pack's image conditioner: tokens of the cropped photo, one per patch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SQUARE_SIDE = 128
MARGIN = 1.2  # of the matte's longer side, as the published image preprocessing (spec section 9)


def photo_square(srgb: Tensor, alpha: Tensor, side: int = SQUARE_SIDE) -> Tensor:
    """Crop a photo to its object and resize.

    Args: srgb [H, W, 3] display colours; alpha [H, W].
    Returns: [4, side, side] premultiplied colour and alpha, 0..1.
    """
    rows, columns = torch.nonzero(alpha > 0.5, as_tuple=True)
    if len(rows) == 0:
        return torch.zeros(4, side, side)
    top, bottom, left, right = int(rows.min()), int(rows.max()), int(columns.min()), int(columns.max())
    half = MARGIN * max(bottom - top + 1, right - left + 1) / 2
    cy, cx = (top + bottom + 1) / 2, (left + right + 1) / 2
    stack = torch.cat([srgb.clamp(0, 1) * alpha[..., None], alpha[..., None]], -1).permute(2, 0, 1)
    height, width = alpha.shape
    # Reduce first (area), then place: bilinear sampling alone would alias a large photo.
    factor = max(1, int(2 * half / side))
    if factor > 1:
        stack = F.avg_pool2d(stack[None], factor, ceil_mode=True, count_include_pad=False)[0]
        height, width, cy, cx, half = stack.shape[1], stack.shape[2], cy / factor, cx / factor, half / factor
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid((cy + axis * half) / height * 2 - 1, (cx + axis * half) / width * 2 - 1, indexing="ij")
    return F.grid_sample(stack[None], torch.stack([x, y], -1)[None], align_corners=False, padding_mode="zeros")[0]


class PatchConditioner(nn.Module):
    """[B, 4, S, S] -> tokens [B, (S / patch)**2, width]: convolutional patches with learned positions."""

    def __init__(self, width: int, patch: int = 16, side: int = SQUARE_SIDE) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, width // 4, 4, 4), nn.GELU(), nn.Conv2d(width // 4, width // 2, 3, 2, 1), nn.GELU(),
                                  nn.Conv2d(width // 2, width, 3, patch // 8, 1))
        self.position = nn.Parameter(torch.randn(1, (side // patch) ** 2, width) * 0.02)
        self.norm = nn.LayerNorm(width)

    def forward(self, square: Tensor) -> Tensor:
        return self.norm(self.stem(square * 2 - 1).flatten(2).transpose(1, 2) + self.position)
