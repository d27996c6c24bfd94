"""Normalisations; statistics are always taken in float32 (spec section 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOAT32_EPS = torch.finfo(torch.float32).eps  # what torch's RMSNorm uses when no epsilon is given


def layer_norm_5(x: Tensor) -> Tensor:
    """``ln5``: layer norm over the last axis, epsilon 1e-5, no parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-5)


class LayerNorm32(nn.LayerNorm):
    """``LN6``: epsilon 1e-6, float32 statistics, output in the input's type; without parameters unless ``affine``."""

    def __init__(self, channels: int, affine: bool = False, eps: float = 1e-6) -> None:
        super().__init__(channels, eps=eps, elementwise_affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None or self.weight.dtype == x.dtype:
            return super().forward(x)  # torch's kernels keep 16-bit statistics in float32
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class HeadRMSNorm(nn.Module):
    """Per-head normalisation of queries or keys: normalize(x) * gamma * sqrt(d), for x [..., heads, d]."""

    def __init__(self, heads: int, head_channels: int) -> None:
        super().__init__()
        self.scale = head_channels**0.5
        self.gamma = nn.Parameter(torch.ones(heads, head_channels))

    def forward(self, x: Tensor) -> Tensor:
        return (F.normalize(x.float(), dim=-1) * self.gamma * self.scale).to(x.dtype)
