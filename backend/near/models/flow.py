"""The flow transformers: SLAT flow over sparse voxels, and the embedding both flows share (spec sections 4 and 11).

Published parameter names and shapes. The compact pack uses the same class at another size, with other input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from near.nn import (KeyValue, LayerNorm32, ModulatedCrossBlock, SparseTensor, SubmanifoldConv3, absolute_position_code,
                     cast_weights, downsample, layer_norm_5, modulate, per_row, timestep_embedding, upsample, weight_dtype)

TIME_CHANNELS = 256
# Keyword arguments of the published classes that change nothing at inference.
TRAINING_ARGS = ("use_checkpoint",)


@dataclass(frozen=True)
class SLatFlowConfig:
    """Published constructor arguments; the defaults are the published size (spec section 11).

    in_channels and out_channels may differ (conditions concatenated to the noise). num_heads None: from
    num_head_channels. use_fp16: run the blocks in half precision where that is fast.
    """

    resolution: int = 64
    in_channels: int = 8
    model_channels: int = 1024
    cond_channels: int = 1024
    out_channels: int = 8
    num_blocks: int = 24
    num_heads: int | None = None
    num_head_channels: int = 64
    mlp_ratio: float = 4
    patch_size: int = 2
    num_io_res_blocks: int = 2
    io_block_channels: tuple[int, ...] = (128,)
    pe_mode: str = "ape"
    use_fp16: bool = False
    use_skip_connection: bool = True
    share_mod: bool = False
    qk_rms_norm: bool = True
    qk_rms_norm_cross: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "io_block_channels", tuple(self.io_block_channels or ()))
        check_transformer(self)
        if 2 ** len(self.io_block_channels) != self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} needs {max(self.patch_size.bit_length() - 1, 0)} io_block_channels, "
                             f"not {self.io_block_channels}")
        if self.io_block_channels and self.num_io_res_blocks < 1:
            raise ValueError(f"num_io_res_blocks must be at least 1, not {self.num_io_res_blocks}")

    @property
    def heads(self) -> int:
        return self.num_heads or self.model_channels // self.num_head_channels

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> "SLatFlowConfig":
        """From the ``args`` of a published model JSON. Raises: ValueError for an unknown or unsupported argument."""
        return cls(**known_args(cls, args))


def check_transformer(config) -> None:
    """Checks shared by both flows. Raises: ValueError with the offending value."""
    if config.pe_mode != "ape":
        raise ValueError(f"pe_mode must be 'ape', not {config.pe_mode!r}")
    if getattr(config, "share_mod", False) or getattr(config, "qk_rms_norm_cross", False):
        raise ValueError("share_mod and qk_rms_norm_cross are not used by any published flow and are not supported")
    for name in ("resolution", "in_channels", "model_channels", "cond_channels", "out_channels"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be positive, not {getattr(config, name)}")
    if config.num_blocks < 0 or config.heads < 1 or config.model_channels % config.heads:
        raise ValueError(f"model_channels {config.model_channels} is not a multiple of {config.heads} heads")


def known_args(cls: type, args: Mapping[str, Any]) -> dict[str, Any]:
    """Drop training-only arguments; unknown ones are an error because they would change the result silently."""
    names = {f.name for f in fields(cls)}
    unknown = sorted(set(args) - names - set(TRAINING_ARGS))
    if unknown:
        raise ValueError(f"unknown argument {', '.join(unknown)}")
    return {k: v for k, v in args.items() if k in names}


class TimestepEmbedder(nn.Module):
    """t (times 1000) -> [cos, sin] code -> Linear, SiLU, Linear."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_CHANNELS, channels), nn.SiLU(), nn.Linear(channels, channels))

    def forward(self, t1000: Tensor) -> Tensor:
        """[B] -> [B, D]."""
        return self.mlp(timestep_embedding(t1000, TIME_CHANNELS).to(self.mlp[0].weight.dtype))


class SparseResBlock(nn.Module):
    """Modulated residual block of two submanifold convolutions, optionally resampling first (spec 11.3)."""

    def __init__(self, channels: int, embedding_channels: int, out_channels: int, resample: str | None = None) -> None:
        super().__init__()
        self.resample = resample
        self.norm1 = LayerNorm32(channels, affine=True)
        self.norm2 = LayerNorm32(out_channels)
        self.conv1 = SubmanifoldConv3(channels, out_channels)
        self.conv2 = SubmanifoldConv3(out_channels, out_channels)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding_channels, 2 * out_channels))
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Linear(channels, out_channels)
        zero_(self.conv2.conv.weight, self.conv2.conv.bias)

    def forward(self, x: SparseTensor, embedding: Tensor, fine: SparseTensor | None) -> SparseTensor:
        """``fine`` gives the voxels to go up to; embedding [B, D]."""
        if self.resample == "down":
            x = downsample(x)
        elif self.resample == "up":
            x = upsample(x, fine)
        scale, shift = per_row(self.emb_layers(embedding), x.counts).chunk(2, -1)
        h = self.conv1(x.replace(F.silu(self.norm1(x.feats))))
        h = self.conv2(h.replace(F.silu(modulate(self.norm2(h.feats), shift, scale))))
        return h.replace(h.feats + self.skip_connection(x.feats))


@dataclass(frozen=True)
class FlowContext:
    """Keys and values of the condition for every block: computed once per photo, used at every step."""

    blocks: tuple[KeyValue, ...]


class FlowTransformer(nn.Module):
    """What both flows have in common: embedding, blocks, precision."""

    def _build_blocks(self, config) -> None:
        self.config = config
        self.t_embedder = TimestepEmbedder(config.model_channels)
        self.blocks = nn.ModuleList([
            ModulatedCrossBlock(config.model_channels, config.cond_channels, config.heads, config.mlp_ratio, config.qk_rms_norm)
            for _ in range(config.num_blocks)])
        for block in self.blocks:
            zero_(block.adaLN_modulation[1].weight, block.adaLN_modulation[1].bias)

    def context(self, condition: Tensor | None) -> FlowContext:
        """Keys and values of condition tokens [B, T, cond_channels].

        None is the null condition: zero tokens. All of them have the same key and value, so one stands for any number.
        """
        if condition is None:
            condition = self.t_embedder.mlp[0].weight.new_zeros(1, 1, self.config.cond_channels)
        return FlowContext(tuple(block.cross_attn.project(condition) for block in self.blocks))

    def _context(self, condition: Tensor | FlowContext | None) -> FlowContext:
        return condition if isinstance(condition, FlowContext) else self.context(condition)

    def set_precision(self, dtype: torch.dtype) -> "FlowTransformer":
        """Run the heavy layers (those inside the blocks) in ``dtype``, as ``use_fp16`` does (spec section 2)."""
        for name in ("blocks", "input_blocks", "out_blocks"):
            if hasattr(self, name):
                cast_weights(getattr(self, name), dtype)
        return self

    @property
    def precision(self) -> torch.dtype:
        return weight_dtype(self.blocks) if len(self.blocks) else weight_dtype(self)


class SLatFlowModel(FlowTransformer):
    """Velocity (or clean-sample) prediction on sparse voxels."""

    def __init__(self, config: SLatFlowConfig) -> None:
        super().__init__()
        self._build_blocks(config)
        width, levels = config.model_channels, config.io_block_channels
        self.input_layer = nn.Linear(config.in_channels, levels[0] if levels else width)
        self.input_blocks, self.out_blocks = nn.ModuleList(), nn.ModuleList()
        for channels, wider in zip(levels, levels[1:] + (width,)):
            self.input_blocks.extend(SparseResBlock(channels, width, channels) for _ in range(config.num_io_res_blocks - 1))
            self.input_blocks.append(SparseResBlock(channels, width, wider, "down"))
        skip = 2 if config.use_skip_connection else 1
        for channels, wider in zip(reversed(levels), (width, *reversed(levels[1:]))):
            self.out_blocks.append(SparseResBlock(wider * skip, width, channels, "up"))
            self.out_blocks.extend(SparseResBlock(channels * skip, width, channels) for _ in range(config.num_io_res_blocks - 1))
        self.out_layer = nn.Linear(levels[0] if levels else width, config.out_channels)
        zero_(self.out_layer.weight, self.out_layer.bias)

    def forward(self, x: SparseTensor, t1000: Tensor, condition: Tensor | FlowContext | None) -> SparseTensor:
        """Predict.

        Args:
            x: feats [N, in_channels] of B objects. t1000: 1000 t, [B] or [1].
            condition: tokens [B, T, cond_channels] (or [1, ...] for all objects), their :meth:`context`, or None.
        Returns: feats [N, out_channels] in the type of ``x``, on the same voxels.
        """
        context, dtype = self._context(condition), self.precision
        embedding = self.t_embedder(t1000).to(dtype)
        h = x.replace(self.input_layer(x.feats).to(dtype))
        skips, levels = [], []
        for block in self.input_blocks:
            if block.resample == "down":
                levels.append(h)
            h = block(h, embedding, None)
            skips.append(h)
        h = h.replace(h.feats + self._position_code(h).to(dtype))
        for block, kv in zip(self.blocks, context.blocks):
            h = h.replace(block(h.feats, embedding, kv, h.objects(), h.counts))
        for block in self.out_blocks:
            skip = skips.pop()
            if self.config.use_skip_connection:
                h = h.replace(torch.cat([h.feats, skip.feats], -1))
            h = block(h, embedding, levels.pop() if block.resample == "up" else None)
        return x.replace(self.out_layer(layer_norm_5(h.feats.to(x.feats.dtype))))

    def on_voxels(self, voxels: SparseTensor, extra: Tensor | None = None) -> Callable[[Tensor, Tensor, Any], Tensor]:
        """A plain function of features, as :func:`near.models.samplers.sample` wants it.

        Args: voxels: whose coordinates are used. extra: [N, C] concatenated to the state at every call.
        """
        return lambda feats, t1000, condition: self(
            voxels.replace(feats if extra is None else torch.cat([feats, extra], -1)), t1000, condition).feats

    def _position_code(self, x: SparseTensor) -> Tensor:
        return x.cached(("position_code", self.config.model_channels),
                        lambda: absolute_position_code(x.coords[:, 1:], self.config.model_channels))


def zero_(*parameters: Tensor) -> None:
    """Set to zero: a block starts as the identity, a head predicts nothing."""
    for parameter in parameters:
        nn.init.zeros_(parameter)


__all__ = ["FlowContext", "FlowTransformer", "SLatFlowConfig", "SLatFlowModel", "SparseResBlock", "TimestepEmbedder", "check_transformer", "known_args", "zero_"]
