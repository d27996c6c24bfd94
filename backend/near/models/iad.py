"""Intrinsic-aware decoder (IAD), published as `SLatGaussianDecoder` (spec section 3).

Turns a lighting-homogenised SLAT into intrinsic voxel features, once per asset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from near.models.args import check_width, one_of, pick_args, require, resolve_heads
from near.nn import KeyValue, RegisterSelfBlock, SparseTensor, absolute_position_code, cast_weights, piecewise, weight_dtype
from near.nn.groups import RowGroups


@dataclass(frozen=True)
class SLatGaussianDecoderConfig:
    """Sizes of the IAD; the defaults are the published ones.

    Attributes:
        resolution: voxels per axis of the unit cube.
        model_channels: width D of the features it returns. cond_channels: width of the registers, equal to D.
        latent_channels: width of the SLAT it reads; any.
        num_blocks, num_heads, mlp_ratio: the transformer.
        num_register_tokens: learned tokens that every voxel attends to.
        attn_mode: "swin" (windows of ``window_size`` voxels, shifted in odd blocks) or "full".
        pe_mode: "ape" adds the absolute position code, "null" none.
        qk_rms_norm: normalise queries and keys of the self attention.
    """

    resolution: int = 64
    model_channels: int = 768
    latent_channels: int = 8
    cond_channels: int = 768
    num_blocks: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    num_register_tokens: int = 16
    window_size: int = 8
    attn_mode: str = "swin"
    pe_mode: str = "ape"
    qk_rms_norm: bool = False

    def __post_init__(self) -> None:
        check_width("IAD", self.model_channels, self.num_heads)
        one_of("IAD", "attn_mode", self.attn_mode, ("swin", "full"))
        one_of("IAD", "pe_mode", self.pe_mode, ("ape", "null"))
        require("IAD", self.cond_channels == self.model_channels,
                f"cond_channels {self.cond_channels} differs from model_channels {self.model_channels}")

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> "SLatGaussianDecoderConfig":
        """From the ``args`` of a published model JSON."""
        picked = resolve_heads(pick_args("IAD", args, [*cls.__dataclass_fields__, "num_head_channels"], ["representation_config"]))
        picked.setdefault("cond_channels", picked.get("model_channels", cls.model_channels))
        return cls(**picked)


class SLatGaussianDecoder(nn.Module):
    """SLAT [N, latent_channels] -> intrinsic features h [N, D] and register tokens [B, R, D].

    The registers that it hands to the LAD are its learned constants; the asset does not change them.
    """

    def __init__(self, config: SLatGaussianDecoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.model_channels
        self.reg_tokens = nn.Parameter(torch.randn(1, config.num_register_tokens, config.cond_channels) * config.cond_channels**-0.5)
        self.input_layer = nn.Linear(config.latent_channels, width)
        self.blocks = nn.ModuleList(
            RegisterSelfBlock(width, config.cond_channels, config.num_heads, config.mlp_ratio, config.qk_rms_norm)
            for _ in range(config.num_blocks))

    def cast_blocks(self, dtype: torch.dtype) -> "SLatGaussianDecoder":
        """Run the blocks' linear layers in ``dtype``; everything outside stays float32."""
        cast_weights(self.blocks, dtype)
        return self

    def embed(self, slat: SparseTensor) -> Tensor:
        """Input layer and position code, [N, D]."""
        h = self.input_layer(slat.feats)
        if self.config.pe_mode == "ape":
            h = h + absolute_position_code(slat.coords[:, 1:], self.config.model_channels)
        return h

    def groups(self, slat: SparseTensor, block: int) -> RowGroups:
        """Which voxels attend among themselves in a block."""
        return swin_groups(slat, block, self.config.attn_mode, self.config.window_size)

    def register_kv(self) -> list[KeyValue]:
        """Keys and values of the registers in every block: constants of the checkpoint."""
        return [block.register_attn.project(self.reg_tokens) for block in self.blocks]

    def forward(self, slat: SparseTensor) -> tuple[SparseTensor, Tensor]:
        """slat: de-normalised SLAT. Returns h on the same voxels and the registers [B, R, D]."""
        with piecewise():
            stream = h = self.embed(slat)
            if len(self.blocks):
                h = h.to(weight_dtype(self.blocks))
            for i, (block, registers) in enumerate(zip(self.blocks, self.register_kv())):
                h = block(h, registers, self.groups(slat, i))
            return slat.replace(h.to(stream.dtype)), self.reg_tokens.expand(slat.num_objects, -1, -1)


def swin_groups(voxels: SparseTensor, block: int, attn_mode: str, window: int) -> RowGroups:
    """Whole objects ("full"), or windows shifted by half their size in odd blocks ("swin")."""
    if attn_mode == "full":
        return voxels.objects()
    return voxels.windows(window, window // 2 * (block % 2))
