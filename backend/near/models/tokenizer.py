"""Lighting tokenizer, published as `Hdri_Encoder`: conditioned environment maps -> light tokens (spec section 8.5).

A ConvNeXt reads the light's colour; the direction of every pixel joins by gated fusion at three scales; a small rotary
transformer mixes the resulting token grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from near.models.args import check_width, pick_args, require
from near.models.convnext import build_stages
from near.nn import apply_rotary, cast_weights, rotary_tables, weight_dtype
from near.nn.kernels import dense_attention

DIRECTION_OCTAVES = 8


@dataclass(frozen=True)
class HdriEncoderConfig:
    """Sizes of the tokenizer; the defaults are the published ones.

    Attributes:
        output_dim: token width D. num_tokens: a square number; tokens are a row-major grid over the map.
        cnn_out: width of each fused scale (published argument ``cnn_out_channels``).
        num_heads, num_layers: of the transformer; all layers share one set of weights.
        backbone: a timm ConvNeXt, e.g. "convnext_tiny" (published) or "convnext_atto".
    """

    output_dim: int = 768
    num_tokens: int = 4096
    cnn_out: int = 256
    num_heads: int = 8
    num_layers: int = 2
    backbone: str = "convnext_tiny"

    def __post_init__(self) -> None:
        check_width("Hdri_Encoder", self.output_dim, self.num_heads)
        require("Hdri_Encoder", self.output_dim // self.num_heads % 2 == 0, "the rotary code needs an even width per head, not "
                f"{self.output_dim // self.num_heads}")
        require("Hdri_Encoder", math.isqrt(self.num_tokens) ** 2 == self.num_tokens, f"num_tokens {self.num_tokens} is no square")
        require("Hdri_Encoder", self.num_layers >= 1, f"num_layers is {self.num_layers}")

    @property
    def grid(self) -> int:
        """Tokens per side."""
        return math.isqrt(self.num_tokens)

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> "HdriEncoderConfig":
        """From the ``args`` of a published model JSON."""
        names = {"cnn_out_channels": "cnn_out", "n_heads": "num_heads", "n_layers": "num_layers"}
        renamed = {names.get(k, k): v for k, v in args.items()}
        picked = pick_args("Hdri_Encoder", renamed, set(cls.__dataclass_fields__) - {"backbone"}, ["dropout", "pretrained"])
        return cls(**picked)


class DirectionCode(nn.Module):
    """[xyz, then per channel sin(x_c pi 2^k), cos(x_c pi 2^k)] of a direction map [B, 3, H, W] -> [B, 51, H, W]."""

    def __init__(self, octaves: int = DIRECTION_OCTAVES) -> None:
        super().__init__()
        bands = 2.0 ** torch.arange(octaves, dtype=torch.float32) * math.pi
        self.freq_bands = nn.Parameter(bands, requires_grad=False)  # a constant, published as a parameter

    def forward(self, dirs: Tensor) -> Tensor:
        angles = dirs[:, :, None] * self.freq_bands[:, None, None]
        return torch.cat([dirs, torch.cat([angles.sin(), angles.cos()], 2).flatten(1, 2)], 1)


class DirectionFusion(nn.Module):
    """Gate visual features by what direction they come from, and merge both to ``out`` channels."""

    def __init__(self, visual: int, directions: int, out: int) -> None:
        super().__init__()
        hidden = max(16, visual // 8)
        self.dir_adapter = nn.Sequential(nn.Conv2d(directions, visual, 1), group_norm(visual, 8), nn.GELU())
        self.attention = nn.Sequential(nn.Conv2d(visual + directions, hidden, 1), group_norm(hidden, 4), nn.GELU(),
                                       nn.Conv2d(hidden, visual, 1), nn.Sigmoid())
        self.fusion = nn.Sequential(nn.Conv2d(2 * visual, out, 1), group_norm(out, 8), nn.GELU())
        self.residual_proj = nn.Conv2d(visual, out, 1) if visual != out else nn.Identity()

    def forward(self, visual: Tensor, directions: Tensor) -> Tensor:
        """visual [B, V, h, w], directions [B, 51, H, W] (resized here) -> [B, out, h, w]."""
        directions = F.interpolate(directions, visual.shape[-2:], mode="bilinear", align_corners=False).to(visual.dtype)
        gate = self.attention(torch.cat([visual, directions], 1))
        fused = self.fusion(torch.cat([visual * gate, self.dir_adapter(directions)], 1))
        return fused + self.residual_proj(visual)


def group_norm(channels: int, most: int) -> nn.GroupNorm:
    """At most ``most`` groups, at least four channels each."""
    return nn.GroupNorm(max(1, min(most, channels // 4)), channels)


class RotaryAttention(nn.Module):
    """Self attention with a 1-D rotary code over the token index."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(channels, channels, bias=False)
        self.k_proj = nn.Linear(channels, channels, bias=False)
        self.v_proj = nn.Linear(channels, channels, bias=False)
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, T, D]; tables of `rotary_tables` -> [B, T, D]."""
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        out = dense_attention(apply_rotary(q, tables), apply_rotary(k, tables), v)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class TokenLayer(nn.Module):
    """Pre-norm rotary attention and feed-forward."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.self_attn = RotaryAttention(channels, heads)
        self.linear1 = nn.Linear(channels, 4 * channels)
        self.linear2 = nn.Linear(4 * channels, channels)
        self.norm1 = nn.RMSNorm(channels, eps=1e-6)
        self.norm2 = nn.RMSNorm(channels, eps=1e-6)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, T, D] in the stream's type; linear layers run in their own."""
        dtype = self.linear1.weight.dtype
        x = x + self.self_attn(self.norm1(x).to(dtype), tables).to(x.dtype)
        return x + self.linear2(F.gelu(self.linear1(self.norm2(x).to(dtype)))).to(x.dtype)


class TokenTransformer(nn.Module):
    """One layer applied several times; the state dict names it once per application, as published."""

    def __init__(self, channels: int, heads: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([TokenLayer(channels, heads)] * num_layers)

    def forward(self, x: Tensor) -> Tensor:
        tables = rotary_tables(x.shape[1], x.shape[2] // self.layers[0].self_attn.heads, x.device)
        for layer in self.layers:
            x = layer(x, tables)
        return x


class HdriEncoder(nn.Module):
    """Condition maps [B, 9, H, W] ([ldr | log hdr | directions], spec section 8.4) -> tokens [B, T, D]."""

    def __init__(self, config: HdriEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.dir_encoder = DirectionCode()
        self.stage1, self.stage2, self.stage3, self.stage4 = stages = build_stages(config.backbone, in_channels=6)
        directions = 3 * (1 + 2 * DIRECTION_OCTAVES)
        for name, stage in zip(("fusion_c3", "fusion_c4", "fusion_c5"), stages[1:]):
            setattr(self, name, DirectionFusion(stage.channels, directions, config.cnn_out))
        self.projection_conv = nn.Conv2d(3 * config.cnn_out, config.output_dim, 1)
        self.transformer_encoder = TokenTransformer(config.output_dim, config.num_heads, config.num_layers)
        self.ln_final = nn.RMSNorm(config.output_dim, eps=1e-6)

    def cast_blocks(self, dtype: torch.dtype) -> "HdriEncoder":
        """Run the backbone and the transformer's linear layers in ``dtype``; fusion, the transformer's norms and its stream
        stay float32."""
        for part in (self.stage1, self.stage2, self.stage3, self.stage4):
            part.to(dtype)
        cast_weights(self.transformer_encoder, dtype)
        return self

    def backbone(self, color: Tensor) -> list[Tensor]:
        """color [B, 6, H, W] -> features at strides 8, 16 and 32."""
        x = self.stage1(color.to(weight_dtype(self.stage1)))
        features = []
        for stage in (self.stage2, self.stage3, self.stage4):
            x = stage(x)
            features.append(x.to(color.dtype))
        return features

    def fuse(self, features: list[Tensor], directions: Tensor) -> list[Tensor]:
        """Features of `backbone` with directions [B, 3, H, W] -> three maps of cnn_out channels."""
        code = self.dir_encoder(directions)
        return [fusion(x, code) for fusion, x in zip((self.fusion_c3, self.fusion_c4, self.fusion_c5), features)]

    def project(self, maps: list[Tensor]) -> Tensor:
        """Resize to the token grid, high to low resolution, and mix -> [B, D, grid, grid]."""
        side = (self.config.grid, self.config.grid)
        return self.projection_conv(torch.cat([F.interpolate(m, side, mode="bilinear", align_corners=False) for m in maps], 1))

    def forward(self, condition: Tensor) -> Tensor:
        """condition float32 [B, 9, H, W], H and W at least 32 -> tokens float32 [B, T, D]."""
        color, directions = condition[:, :6], condition[:, 6:9]
        tokens = self.project(self.fuse(self.backbone(color), directions)).flatten(2).transpose(1, 2)
        return self.ln_final(self.transformer_encoder(tokens))
