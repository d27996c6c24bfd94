"""Transformer blocks of NeAR's models. Rows are packed voxels [N, D] (or flattened dense tokens); see `near.nn.groups`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from near.nn.attention import CrossAttention, KeyValue, SelfAttention, attend_groups
from near.nn.groups import RowGroups
from near.nn.norms import LayerNorm32
from near.nn.parallel import by_rows, piecewise
from near.nn.sparse import per_row


class FeedForward(nn.Module):
    """Linear, tanh-approximated GELU, Linear."""

    def __init__(self, channels: int, ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(channels * ratio)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        return by_rows(self.mlp, x)


class SelfBlock(nn.Module):
    """Pre-norm self attention and feed-forward (SLAT encoder, spec section 4)."""

    def __init__(self, channels: int, heads: int, mlp_ratio: float = 4.0, qk_rms_norm: bool = False) -> None:
        super().__init__()
        self.norm = LayerNorm32(channels)
        self.attn = SelfAttention(channels, heads, qk_rms_norm)
        self.mlp = FeedForward(channels, mlp_ratio)

    def forward(self, x: Tensor, groups: RowGroups) -> Tensor:
        """x [N, D] -> [N, D]."""
        with piecewise():
            qkv = by_rows(lambda r: self.attn.project(self.norm(r)), x)
            return by_rows(self.finish, x, attend_groups(qkv, groups).flatten(1))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """What follows the attention, row by row."""
        x = x + self.attn.to_out(attended)
        return x + self.mlp(self.norm(x))


class RegisterSelfBlock(nn.Module):
    """Attention to register tokens, then self attention, then feed-forward (IAD, spec section 3).

    The registers are those of the checkpoint: one set, shared by all objects.
    """

    def __init__(self, channels: int, register_channels: int, heads: int, mlp_ratio: float = 4.0, qk_rms_norm: bool = False) -> None:
        super().__init__()
        self.norm = LayerNorm32(channels)
        self.register_attn = CrossAttention(channels, register_channels, heads)
        self.attn = SelfAttention(channels, heads, qk_rms_norm)
        self.mlp = FeedForward(channels, mlp_ratio)

    def forward(self, x: Tensor, registers: KeyValue, groups: RowGroups) -> Tensor:
        """x [N, D], registers of B = 1 -> [N, D]."""
        with piecewise():
            x = by_rows(lambda r: r + self.register_attn(self.norm(r), registers, (len(r),)), x)
            qkv = by_rows(lambda r: self.attn.project(self.norm(r)), x)
            return by_rows(self.finish, x, attend_groups(qkv, groups).flatten(1))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """What follows the attention, row by row."""
        x = x + self.attn.to_out(attended)
        return x + self.mlp(self.norm(x))


class RegisterLightBlock(nn.Module):
    """Attention to register tokens, then to light tokens, then feed-forward (LAD, spec section 5.3). Rows never see each other."""

    def __init__(self, channels: int, context_channels: int, heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__()
        self.norm = LayerNorm32(channels)
        self.register_attn = CrossAttention(channels, context_channels, heads)
        self.cross_attn = CrossAttention(channels, context_channels, heads)
        self.mlp = FeedForward(channels, mlp_ratio)

    def forward(self, x: Tensor, registers: Tensor | KeyValue, light: Tensor | KeyValue, counts: Sequence[int]) -> Tensor:
        x = x + self.register_attn(self.norm(x), registers, counts)
        x = x + self.cross_attn(self.norm(x), light, counts)
        return x + self.mlp(self.norm(x))


class ModulatedCrossBlock(nn.Module):
    """Diffusion transformer block with a context (spec section 11.4).

    The embedding modulates self attention and feed-forward per object; the context attention is neither modulated nor gated.
    """

    def __init__(self, channels: int, context_channels: int, heads: int, mlp_ratio: float = 4.0, qk_rms_norm: bool = False) -> None:
        super().__init__()
        self.norm1 = LayerNorm32(channels)
        self.norm2 = LayerNorm32(channels, affine=True)
        self.norm3 = LayerNorm32(channels)
        self.self_attn = SelfAttention(channels, heads, qk_rms_norm)
        self.cross_attn = CrossAttention(channels, context_channels, heads)
        self.mlp = FeedForward(channels, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | KeyValue, groups: RowGroups, counts: Sequence[int]) -> Tensor:
        """x [N, D], embedding [B, D], context [B, T, Dc] (or its keys and values), groups = the objects -> [N, D]."""
        with piecewise():
            modulation = per_row(self.adaLN_modulation(embedding), counts)
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)
            x = x + gate1 * self.self_attn(modulate(self.norm1(x), shift1, scale1), groups)
            x = x + self.cross_attn(self.norm2(x), context, counts)
            return x + gate2 * self.mlp(modulate(self.norm3(x), shift2, scale2))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return torch.addcmul(shift, x, 1 + scale)


