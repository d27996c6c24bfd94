"""SLAT encoder: features on voxels -> structured latent (spec section 4, TRELLIS layout)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from near.models.args import check_width, one_of, pick_args, resolve_heads
from near.models.iad import swin_groups
from near.nn import SelfBlock, SparseTensor, absolute_position_code, cast_weights, layer_norm_5, weight_dtype


@dataclass(frozen=True)
class SLatEncoderConfig:
    """Sizes of the encoder; the defaults are TRELLIS's.

    Attributes:
        in_channels: width of the voxel features. latent_channels: width of the latent; the output layer is twice as wide
            (mean and log variance). The rest as in `near.models.iad.SLatGaussianDecoderConfig`.
    """

    resolution: int = 64
    in_channels: int = 1024
    model_channels: int = 768
    latent_channels: int = 8
    num_blocks: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    window_size: int = 8
    attn_mode: str = "swin"
    pe_mode: str = "ape"
    qk_rms_norm: bool = False

    def __post_init__(self) -> None:
        check_width("SLatEncoder", self.model_channels, self.num_heads)
        one_of("SLatEncoder", "attn_mode", self.attn_mode, ("swin", "full"))
        one_of("SLatEncoder", "pe_mode", self.pe_mode, ("ape", "null"))

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> "SLatEncoderConfig":
        """From the ``args`` of a published model JSON."""
        return cls(**resolve_heads(pick_args("SLatEncoder", args, [*cls.__dataclass_fields__, "num_head_channels"])))


class SLatEncoder(nn.Module):
    """Voxel features [N, in_channels] -> latent [N, latent_channels]."""

    def __init__(self, config: SLatEncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.model_channels
        self.input_layer = nn.Linear(config.in_channels, width)
        self.blocks = nn.ModuleList(SelfBlock(width, config.num_heads, config.mlp_ratio, config.qk_rms_norm)
                                    for _ in range(config.num_blocks))
        self.out_layer = nn.Linear(width, 2 * config.latent_channels)

    def cast_blocks(self, dtype: torch.dtype) -> "SLatEncoder":
        """Run the blocks' linear layers in ``dtype``; everything outside stays float32."""
        cast_weights(self.blocks, dtype)
        return self

    def moments(self, x: SparseTensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the posterior, each [N, latent_channels]."""
        c = self.config
        h = self.input_layer(x.feats)
        if c.pe_mode == "ape":
            h = h + absolute_position_code(x.coords[:, 1:], c.model_channels)
        stream = h.dtype
        if len(self.blocks):
            h = h.to(weight_dtype(self.blocks))
        for i, block in enumerate(self.blocks):
            h = block(h, swin_groups(x, i, c.attn_mode, c.window_size))
        mean, log_variance = self.out_layer(layer_norm_5(h.to(stream))).chunk(2, -1)
        return mean, log_variance

    def forward(self, x: SparseTensor) -> Tensor:
        """The posterior's mean, [N, latent_channels]: the deterministic latent."""
        return self.moments(x)[0]
