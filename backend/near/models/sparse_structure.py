"""TRELLIS's sparse structure: photo -> occupied voxels, without a mesh (spec section 4).

A flow over a dense latent grid, a decoder from the latent to occupancy, and the encoder the other way. Published names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from near.errors import NearError
from near.models.flow import FlowContext, FlowTransformer, check_transformer, known_args, zero_
from near.models.samplers import Progress, SamplerConfig, initial_noise, sample
from near.nn import absolute_position_code, layer_norm_5, object_groups

NORM_EPS = 1e-5


@dataclass(frozen=True)
class StructureFlowConfig:
    """Published constructor arguments; the defaults are the published size."""

    resolution: int = 16
    in_channels: int = 8
    model_channels: int = 1024
    cond_channels: int = 1024
    out_channels: int = 8
    num_blocks: int = 24
    num_heads: int | None = None
    num_head_channels: int = 64
    mlp_ratio: float = 4
    patch_size: int = 1
    pe_mode: str = "ape"
    use_fp16: bool = False
    share_mod: bool = False
    qk_rms_norm: bool = True
    qk_rms_norm_cross: bool = False

    def __post_init__(self) -> None:
        check_transformer(self)
        if self.patch_size < 1 or self.resolution % self.patch_size:
            raise ValueError(f"resolution {self.resolution} is not a multiple of patch_size {self.patch_size}")

    @property
    def heads(self) -> int:
        return self.num_heads or self.model_channels // self.num_head_channels

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> "StructureFlowConfig":
        """From the ``args`` of a published model JSON."""
        return cls(**known_args(cls, args))


class SparseStructureFlowModel(FlowTransformer):
    """Velocity prediction on a dense latent grid [B, C, R, R, R]."""

    def __init__(self, config: StructureFlowConfig) -> None:
        super().__init__()
        self._build_blocks(config)
        side = config.resolution // config.patch_size
        cells = torch.stack(torch.meshgrid(*[torch.arange(side)] * 3, indexing="ij"), -1).reshape(-1, 3)
        self.register_buffer("pos_emb", absolute_position_code(cells, config.model_channels))
        self.input_layer = nn.Linear(config.in_channels * config.patch_size ** 3, config.model_channels)
        self.out_layer = nn.Linear(config.model_channels, config.out_channels * config.patch_size ** 3)
        zero_(self.out_layer.weight, self.out_layer.bias)

    def forward(self, x: Tensor, t1000: Tensor, condition: Tensor | FlowContext | None) -> Tensor:
        """x [B, in_channels, R, R, R], t1000 [B] or [1], condition [B, T, cond_channels] -> [B, out_channels, R, R, R]."""
        context, dtype = self._context(condition), self.precision
        size, side, patch = x.shape[0], self.config.resolution // self.config.patch_size, self.config.patch_size
        tokens = patchify(x, patch).flatten(2).transpose(1, 2)
        counts = (tokens.shape[1],) * size
        groups = object_groups(counts, x.device)
        embedding = self.t_embedder(t1000).to(dtype)
        h = (self.input_layer(tokens) + self.pos_emb).to(dtype).flatten(0, 1)
        for block, kv in zip(self.blocks, context.blocks):
            h = block(h, embedding, kv, groups, counts)
        h = self.out_layer(layer_norm_5(h.to(x.dtype)))
        return unpatchify(h.unflatten(0, (size, -1)).transpose(1, 2).unflatten(-1, (side, side, side)), patch)


def patchify(x: Tensor, size: int) -> Tensor:
    """[B, C, R, R, R] -> [B, C size^3, R/size, ...]; channel-major, then the offset inside the patch."""
    if size == 1:
        return x
    b, c, r = x.shape[:3]
    x = x.reshape(b, c, r // size, size, r // size, size, r // size, size)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, c * size ** 3, *[r // size] * 3)


def unpatchify(x: Tensor, size: int) -> Tensor:
    """Inverse of :func:`patchify`; with a factor of 2 also the 3-D pixel shuffle of the decoder."""
    if size == 1:
        return x
    b, c, r = x.shape[:3]
    x = x.reshape(b, c // size ** 3, size, size, size, r, r, r)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, c // size ** 3, *[r * size] * 3)


class ChannelLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, C, ...], statistics in float32."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1).to(self.weight.dtype)).to(x.dtype).movedim(-1, 1)


class ResBlock3d(nn.Module):
    """Norm, SiLU, conv, twice, plus the input."""

    def __init__(self, channels: int, out_channels: int | None = None) -> None:
        super().__init__()
        out_channels = out_channels or channels
        self.norm1, self.norm2 = ChannelLayerNorm(channels), ChannelLayerNorm(out_channels)
        self.conv1 = nn.Conv3d(channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=1)
        self.skip_connection = nn.Identity() if channels == out_channels else nn.Conv3d(channels, out_channels, 1)
        zero_(self.conv2.weight, self.conv2.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(h))) + self.skip_connection(x)


class Upsample3d(nn.Module):
    """Convolution to 8 times the channels, then a 3-D pixel shuffle."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, out_channels * 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return unpatchify(self.conv(x), 2)


class Downsample3d(nn.Module):
    """Convolution with stride 2."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, out_channels, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def _head(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(ChannelLayerNorm(channels), nn.SiLU(), nn.Conv3d(channels, out_channels, 3, padding=1))


@dataclass(frozen=True)
class StructureVaeConfig:
    """Arguments of the decoder (``channels`` widest first) or the encoder (narrowest first); image_channels is the
    occupancy grid's channel count."""

    latent_channels: int = 8
    num_res_blocks: int = 2
    num_res_blocks_middle: int = 2
    channels: tuple[int, ...] = (512, 128, 32)
    image_channels: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        if not self.channels or min(self.channels) < 1 or self.num_res_blocks < 0:
            raise ValueError(f"channels must be positive widths, not {self.channels}")

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> "StructureVaeConfig":
        """From the ``args`` of a published decoder or encoder JSON."""
        args = dict(args)
        args.pop("use_fp16", None)
        if args.pop("norm_type", "layer") != "layer":
            raise ValueError("only norm_type 'layer' is supported")
        image = args.pop("out_channels", None) or args.pop("in_channels", None) or 1
        return cls(**known_args(cls, {**args, "image_channels": image}))


class SparseStructureDecoder(nn.Module):
    """Latent [B, C, R, R, R] -> occupancy logits [B, 1, 4R, 4R, 4R] (for three levels)."""

    def __init__(self, config: StructureVaeConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.channels
        self.input_layer = nn.Conv3d(config.latent_channels, widths[0], 3, padding=1)
        self.middle_block = nn.Sequential(*[ResBlock3d(widths[0]) for _ in range(config.num_res_blocks_middle)])
        self.blocks = nn.ModuleList()
        for width, narrower in zip(widths, (*widths[1:], None)):
            self.blocks.extend(ResBlock3d(width) for _ in range(config.num_res_blocks))
            if narrower is not None:
                self.blocks.append(Upsample3d(width, narrower))
        self.out_layer = _head(widths[-1], config.image_channels)

    def forward(self, latent: Tensor) -> Tensor:
        h = self.middle_block(self.input_layer(latent))
        for block in self.blocks:
            h = block(h)
        return self.out_layer(h)


class SparseStructureEncoder(nn.Module):
    """Occupancy [B, 1, 4R, 4R, 4R] -> (mean, log variance) of the latent, each [B, C, R, R, R]."""

    def __init__(self, config: StructureVaeConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.channels
        self.input_layer = nn.Conv3d(config.image_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, wider in zip(widths, (*widths[1:], None)):
            self.blocks.extend(ResBlock3d(width) for _ in range(config.num_res_blocks))
            if wider is not None:
                self.blocks.append(Downsample3d(width, wider))
        self.middle_block = nn.Sequential(*[ResBlock3d(widths[-1]) for _ in range(config.num_res_blocks_middle)])
        self.out_layer = _head(widths[-1], config.latent_channels * 2)

    def forward(self, occupancy: Tensor) -> tuple[Tensor, Tensor]:
        h = self.input_layer(occupancy)
        for block in self.blocks:
            h = block(h)
        mean, log_variance = self.out_layer(self.middle_block(h)).chunk(2, 1)
        return mean, log_variance


def occupied_voxels(logits: Tensor) -> Tensor:
    """Voxels with a positive logit, uint8 [L, 3] in lexicographic order, for logits [1, 1, R, R, R].

    Raises: NearError ``empty-structure``.
    """
    coords = (logits[0, 0] > 0).nonzero()
    if len(coords) == 0:
        raise NearError("empty-structure", "No voxel came out of this photo.", "Try another seed, a tighter crop, or give a mesh.")
    return coords.to(torch.uint8).cpu()


@torch.no_grad()
def photo_to_voxels(flow: SparseStructureFlowModel, decoder: SparseStructureDecoder, conditions: list, config: SamplerConfig, *,
                    seed: int = 0, progress: Progress | None = None, cancelled: Callable[[], bool] | None = None) -> Tensor:
    """Occupied voxels of the object in the photo(s).

    Args: conditions: DINOv2 tokens [1, T, C], one per photo. Returns: uint8 [L, 3].
    """
    c = flow.config
    device = flow.pos_emb.device
    noise = initial_noise((1, c.in_channels, *[c.resolution] * 3), seed).to(device)
    contexts = [flow.context(condition.to(device)) for condition in conditions]
    latent = sample(flow, noise, contexts, flow.context(None), config, progress=progress, cancelled=cancelled, stage="structure").samples
    return occupied_voxels(decoder(latent.to(next(decoder.parameters()).dtype)).float())
