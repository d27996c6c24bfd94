"""The light as a network sees it: [9, H, W] = display-mapped radiance, log radiance, directions (NEAR-SPEC section 8)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from near.lighting.environment import Environment
from near.lighting.equirect import resample_equirect, texel_directions
from near.lighting.rotate import rotate_equirect

SOURCE_ROWS, SOURCE_COLUMNS = 512, 1024


def encode_radiance(rgb_lin709: Tensor) -> Tensor:
    """[3, H, W] linear radiance to [6, H, W]: (display-mapped in [-1, 1], logarithmic), spec section 8.4."""
    mapped = (rgb_lin709 * (1 + rgb_lin709 / 256) / (1 + rgb_lin709)).clamp(0, 1)
    srgb = torch.where(mapped <= 0.0031308, 12.92 * mapped, 1.055 * mapped.clamp_min(0.0031308) ** (1 / 2.4) - 0.055)
    return torch.cat([2 * srgb - 1, torch.log1p(10 * rgb_lin709) / math.log(1001) - 1])


def nearest_resize(image: Tensor, height: int, width: int) -> Tensor:
    """[H, W, C] -> [height, width, C], source index floor(i * scale) (spec section 8.1)."""
    rows = (torch.arange(height) * (image.shape[0] / height)).floor().long().clamp_max(image.shape[0] - 1)
    columns = (torch.arange(width) * (image.shape[1] / width)).floor().long().clamp_max(image.shape[1] - 1)
    return image[rows[:, None], columns[None]]


def condition_published(rgb_lin709: Tensor, rotation_rad: float = 0.0) -> Tensor:
    """The published preprocessing, quirks included: nearest resize, half-texel look-up without seam wrap.

    Args: rgb_lin709 [H, W, 3]; rotation_rad about +Z.
    Returns: [9, 512, 512] float32. Spec sections 8.1-8.4: rotation moves (direction, radiance) pairs over the grid, the pair
        itself never changes; of the 512 x 1024 grid every even column is kept.
    """
    source = nearest_resize(rgb_lin709.float(), SOURCE_ROWS, SOURCE_COLUMNS)
    row = (torch.arange(SOURCE_ROWS, dtype=torch.float64) + 0.5) / SOURCE_ROWS
    column = (torch.arange(0, SOURCE_COLUMNS, 2, dtype=torch.float64) + 0.5) / SOURCE_COLUMNS
    latitude = (math.pi / 2 - math.pi * row)[:, None]
    longitude = (math.pi - 2 * math.pi * column - rotation_rad - math.pi / 2)[None]
    directions = torch.stack([-longitude.cos() * latitude.cos(), -longitude.sin() * latitude.cos(),
                              latitude.sin().expand(-1, SOURCE_COLUMNS // 2)])
    x, y, z = directions
    u = 0.5 - torch.atan2(y, x) / (2 * math.pi)
    v = z.clamp(-1, 1).acos() / math.pi
    grid = torch.stack([u * 2 - 1, v * 2 - 1], -1).float()[None]
    radiance = F.grid_sample(source.permute(2, 0, 1)[None], grid, mode="bilinear", padding_mode="zeros", align_corners=True)[0]
    return torch.cat([encode_radiance(radiance), directions.float()])


def condition(env: Environment, height: int = 64, width: int = 128) -> Tensor:
    """Energy-preserving conditioning with the full rotation and the strength.

    Returns: [9, height, width] float32. A texel stands for the *world* direction of its place in an equirectangular grid
        (texel centres), which the last three channels repeat; the first six encode the radiance averaged over it.
    """
    turned = rotate_equirect(env.rgb_lin709.detach().float().cpu(), env.env_from_world, height, width)
    return torch.cat([encode_radiance(turned.permute(2, 0, 1) * env.strength), texel_directions(height, width).permute(2, 0, 1)])
