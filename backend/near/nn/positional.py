"""Positional codes: voxel coordinates, NeRF directions, timesteps, rotary token positions. None has parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def absolute_position_code(coords_xyz: Tensor, channels: int) -> Tensor:
    """Sinusoidal code of integer voxel positions (spec section 2).

    Args:
        coords_xyz: [N, 3] integer coordinates.
        channels: output width; zero-padded when not a multiple of 6.

    Returns:
        float32 [N, channels]: for x, y, z in turn [sin(c f_j), cos(c f_j)], f_j = 10000^(-j / (channels // 6)).
    """
    count = channels // 6
    freqs = 10000 ** (-torch.arange(count, dtype=torch.float32, device=coords_xyz.device) / count)
    angles = coords_xyz.float()[:, :, None] * freqs
    code = torch.cat([angles.sin(), angles.cos()], -1).flatten(1)
    return torch.nn.functional.pad(code, (0, channels - code.shape[1]))


def nerf_encoding(x: Tensor, num_freqs: int) -> Tensor:
    """[x, sin(s), sin(s + pi/2)] with s = x_d * 2^f flattened dimension-major (spec section 5.2).

    The cosine is literally a shifted sine in float32, at arguments up to 2^(num_freqs - 1) |x|: trained weights expect
    its rounding.

    Args: x [N, d] float32. Returns: [N, d * (1 + 2 num_freqs)].
    """
    freqs = 2.0 ** torch.arange(num_freqs, dtype=x.dtype, device=x.device)
    scaled = (x[..., None] * freqs).flatten(-2)
    return torch.cat([x, torch.sin(torch.cat([scaled, scaled + math.pi / 2], -1))], -1)


def timestep_embedding(t: Tensor, channels: int, max_period: float = 10000.0) -> Tensor:
    """[cos(t f_j), sin(t f_j)], f_j = max_period^(-j / (channels / 2)) (spec section 11).

    Args: t [B] (already times 1000). Returns: float32 [B, channels].
    """
    half = channels // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * freqs
    code = torch.cat([angles.cos(), angles.sin()], -1)
    return torch.nn.functional.pad(code, (0, channels - code.shape[1]))


def rotary_tables(length: int, head_channels: int, device: torch.device | str = "cpu", base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables, float32 [length, head_channels], of a 1-D rotary code over the token index."""
    inv_freq = base ** (-torch.arange(0, head_channels, 2, dtype=torch.float32, device=device) / head_channels)
    angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * inv_freq
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x [..., length, head_channels], rotate-half convention."""
    cos, sin = (t.to(x.dtype) for t in tables)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
