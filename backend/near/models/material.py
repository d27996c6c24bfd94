"""The explicit part of a compact SLAT: five material numbers and the look under homogeneous light, per voxel.

Channels of a lighting-homogenised SLAT (all in -1..1):
  0-2 base colour, 3 roughness, 4 metallic, 5-7 radiance under a white environment of strength 1 (the paper's
  homogeneous light, section 3.1). A shaded SLAT holds the photo's display colours in 0-2 and 5-7 and a neutral
  material in 3-4: the SLAT of an object that had the photo's light painted on.
"""

from __future__ import annotations

import torch
from torch import Tensor

SLAT_CHANNELS = 8
MATERIAL = slice(0, 5)
HOMOGENEOUS = slice(5, 8)
GAMMA = 2.2
NEUTRAL_ROUGHNESS, NEUTRAL_METALLIC = 1.0, -1.0


def encode_colour(rgb_lin709: Tensor) -> Tensor:
    """Linear 0..1 to the SLAT's perceptual -1..1."""
    return rgb_lin709.clamp(0, 1) ** (1 / GAMMA) * 2 - 1


def decode_colour(encoded: Tensor) -> Tensor:
    """Inverse of :func:`encode_colour`."""
    return (encoded.clamp(-1, 1) * 0.5 + 0.5) ** GAMMA


def within_white(rgb_lin709: Tensor) -> Tensor:
    """Colours [.., 3] none of whose channels exceeds 1: what is brighter is dimmed as a whole. Cut off channel by channel, a red guessed
    too bright would turn yellow."""
    return rgb_lin709 / rgb_lin709.amax(-1, keepdim=True).clamp_min(1)


def encode_material(base_lin709: Tensor, roughness: Tensor, metallic: Tensor) -> Tensor:
    """[N, 3], [N], [N] -> [N, 5]."""
    return torch.cat([encode_colour(base_lin709), torch.stack([roughness, metallic], -1).clamp(0, 1) * 2 - 1], -1)


def decode_material(encoded: Tensor) -> Tensor:
    """[..., 5] encoded -> [..., 5] linear base colour, roughness, metallic, each in 0..1."""
    return torch.cat([decode_colour(encoded[..., :3]), encoded[..., 3:5].clamp(-1, 1) * 0.5 + 0.5], -1)


def shaded_slat(display_srgb: Tensor) -> Tensor:
    """A shaded SLAT [L, 8] from display colours [L, 3] in 0..1."""
    colour = display_srgb.clamp(0, 1) * 2 - 1
    neutral = torch.tensor([NEUTRAL_ROUGHNESS, NEUTRAL_METALLIC], device=colour.device).expand(len(colour), 2)
    return torch.cat([colour, neutral, colour], -1)


def voxel_mean(values: Tensor, voxel: Tensor, count: int, weight: Tensor | None = None) -> Tensor:
    """Weighted mean of anchor ``values`` [M, C] per voxel, [count, C]; zero where the weights sum to zero."""
    weight = torch.ones(len(values), device=values.device) if weight is None else weight
    total = torch.zeros(count, device=values.device).index_add_(0, voxel, weight)
    summed = torch.zeros(count, values.shape[1], device=values.device).index_add_(0, voxel, values * weight[:, None])
    return summed / total.clamp_min(1e-9)[:, None]
