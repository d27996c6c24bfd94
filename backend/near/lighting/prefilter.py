"""An environment prepared for shading: GGX-prefiltered levels, directional samples, mean.

Everything is of the *unrotated* map at strength 1; rotation and strength enter at look-up, so a light sweep costs nothing
here. ANALYTIC.md section 6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from near.compiled import FINITE_OR_NOT, compiled
from near.lighting.clusters import directional_samples
from near.lighting.environment import Environment
from near.lighting.equirect import bilinear, fractions, pad_for_lookup, resample_equirect, row_solid_angles
from near.lighting.ggx import BlurSource

MIRROR_ROWS = 512
SHARPEST = 0.1  # roughness of the first blurred level; the next ones grow geometrically to 1
# Rows per blurred level: fine enough that neither the look-up nor the position of a one-texel sun shows in the lobe.
LEVEL_ROWS = (384, 256, 192, 128, 128, 128, 96, 96, 96, 96, 96)
ROUGHNESS_LEVELS = (0.0, *(SHARPEST ** (1 - k / (len(LEVEL_ROWS) - 1)) for k in range(len(LEVEL_ROWS))))


@dataclass(frozen=True, eq=False)
class PrefilteredLight:
    """See the module.

    packed: [T, 3] all levels, each padded by one texel and row-major; layout: per level (offset, rows, columns) unpadded.
    roughness_levels: perceptual roughness of each level (alpha = roughness^2).
    directions, flux: [n, 3] samples in the map's frame; flux = radiance * steradians, its sum is the map's integral.
    mean_lin709: [3] mean radiance over the sphere.
    """

    packed: Tensor
    layout: tuple[tuple[int, int, int], ...]
    roughness_levels: tuple[float, ...]
    directions: Tensor
    flux: Tensor
    mean_lin709: Tensor

    @property
    def mean(self) -> Tensor:
        """[3] mean radiance over the sphere."""
        return self.mean_lin709

    def level(self, index: int) -> Tensor:
        """[rows + 2, columns + 2, 3] one padded level."""
        offset, rows, columns = self.layout[index]
        return self.packed[offset : offset + (rows + 2) * (columns + 2)].view(rows + 2, columns + 2, 3)

    def to(self, device: torch.device | str) -> "PrefilteredLight":
        """A copy on a device."""
        return PrefilteredLight(self.packed.to(device), self.layout, self.roughness_levels, self.directions.to(device),
                                self.flux.to(device), self.mean_lin709.to(device))

    def specular(self, dirs_world: Tensor, roughness: Tensor, env: Environment) -> Tensor:
        """GGX-prefiltered radiance around world directions.

        Args: dirs_world [N, 3] unit; roughness [N] perceptual, clipped to [0, 1]; env: gives rotation and strength.
        Returns: [N, 3]. Bilinear on the sphere, blended between levels (:func:`level_blend`). Differentiable (then the torch twin runs).
        """
        graph = torch.is_grad_enabled() and (dirs_world.requires_grad or roughness.requires_grad)
        if graph or dirs_world.device.type != "cpu" or dirs_world.dtype != torch.float32:
            return self.specular_torch(dirs_world, roughness, env)
        out = torch.empty(len(dirs_world), 3)
        _specular(dirs_world.detach().contiguous().numpy(), roughness.detach().float().contiguous().numpy(),
                  env.env_from_world.detach().float().cpu().contiguous().numpy(), np.float32(env.strength), self.packed.numpy(),
                  np.array(self.layout, np.int64), out.numpy())
        return out

    def specular_torch(self, dirs_world: Tensor, roughness: Tensor, env: Environment) -> Tensor:
        """Plain torch twin of the numba kernel."""
        packed = self.packed.to(dirs_world)
        u, v = fractions(dirs_world @ env.env_from_world.to(dirs_world).T)
        first, blend = level_blend(roughness.to(dirs_world))
        out = torch.zeros_like(dirs_world)
        for index, (offset, rows, columns) in enumerate(self.layout):
            weight = torch.where(first == index, 1 - blend, torch.where(first + 1 == index, blend, 0))
            hit = torch.nonzero(weight > 0)[:, 0]
            if len(hit):
                level = packed[offset : offset + (rows + 2) * (columns + 2)].view(rows + 2, columns + 2, 3)
                out = out.index_add(0, hit, bilinear(level, u[hit], v[hit]) * weight[hit, None])
        return out * env.strength


def level_blend(roughness: Tensor) -> tuple[Tensor, Tensor]:
    """(lower level [N], share of the next one [N]) for perceptual roughness [N], clipped to [0, 1].

    Linear in roughness up to the first blurred level, then linear in 1 / roughness: between the choice that is best for a
    lobe's peak (1 / alpha) and that for its tails (log alpha).
    """
    r = roughness.clamp(0, 1)
    steps = len(ROUGHNESS_LEVELS) - 2
    inverse = 1 / r.clamp_min(SHARPEST)
    position = 1 + steps * (1 + inverse.log() / math.log(SHARPEST))
    first = torch.where(r < SHARPEST, 0, position.detach().floor().clamp(1, steps).long())
    at = torch.tensor(_INVERSE_LEVELS).to(r)
    return first, torch.where(r < SHARPEST, r / SHARPEST, (inverse - at[first]) / (at[first + 1] - at[first]))


def prefilter(env: Environment, samples: int = 256) -> PrefilteredLight:
    """Prepare a map for shading (rotation and strength of ``env`` are left out).

    Args: samples: number of directional samples.
    """
    rgb = env.rgb_lin709.detach().float().cpu()
    rows = min(MIRROR_ROWS, rgb.shape[0])
    mirror = resample_equirect(rgb, rows, 2 * rows)
    levels, source = [mirror], BlurSource(mirror)
    for roughness, height in zip(ROUGHNESS_LEVELS[1:], LEVEL_ROWS):
        # The lobes are positive; only the FFT's rounding can dip below zero.
        levels.append(source.blur(roughness, height).clamp_min(0))
    layout, packed, offset = [], [], 0
    for level in levels:
        layout.append((offset, level.shape[0], level.shape[1]))
        packed.append(pad_for_lookup(level).reshape(-1, 3))
        offset += len(packed[-1])
    directions, flux = directional_samples(mirror, samples)
    mean = (mirror.double().mean(1) * row_solid_angles(rows, 1)[:, None]).sum(0) / (4 * math.pi)
    return PrefilteredLight(torch.cat(packed).contiguous(), tuple(layout), ROUGHNESS_LEVELS, directions, flux, mean.float())


_INVERSE_LEVELS = np.array([0.0, *(1 / r for r in ROUGHNESS_LEVELS[1:])], np.float32)  # the mirror level's is not used
_STEPS = np.float32(len(ROUGHNESS_LEVELS) - 2)
_PER_LOG = np.float32(1 / math.log(SHARPEST))
_SHARP = np.float32(SHARPEST)


@compiled(fastmath=FINITE_OR_NOT)
def _specular(dirs, roughness, env_from_world, strength, packed, layout, out):
    levels = layout.shape[0]
    m = env_from_world
    for n in range(dirs.shape[0]):
        dx, dy, dz = dirs[n, 0], dirs[n, 1], dirs[n, 2]
        x = m[0, 0] * dx + m[0, 1] * dy + m[0, 2] * dz
        y = m[1, 0] * dx + m[1, 1] * dy + m[1, 2] * dz
        z = m[2, 0] * dx + m[2, 1] * dy + m[2, 2] * dz
        u = np.float32(0.5) - math.atan2(y, x) * np.float32(0.15915494309189535)
        v = math.atan2(math.sqrt(x * x + y * y), z) * np.float32(0.3183098861837907)
        r = min(max(roughness[n], np.float32(0)), np.float32(1))
        if r < _SHARP:
            first, blend = 0, r / _SHARP
        else:
            first = min(max(int(1 + _STEPS * (1 - math.log(r) * _PER_LOG)), 1), levels - 2)
            blend = (1 / r - _INVERSE_LEVELS[first]) / (_INVERSE_LEVELS[first + 1] - _INVERSE_LEVELS[first])
        red = green = blue = np.float32(0)
        for k in range(2):
            offset, rows, columns = layout[first + k, 0], layout[first + k, 1], layout[first + k, 2]
            weight = np.float32(strength * (blend if k else 1 - blend))
            px, py = u * columns + np.float32(0.5), v * rows + np.float32(0.5)
            c, w = min(max(int(px), 0), columns), min(max(int(py), 0), rows)
            fx, fy = np.float32(px - c), np.float32(py - w)
            a = offset + w * (columns + 2) + c
            b = a + columns + 2
            wa, wb = weight * (1 - fx) * (1 - fy), weight * fx * (1 - fy)
            wc, wd = weight * (1 - fx) * fy, weight * fx * fy
            red += wa * packed[a, 0] + wb * packed[a + 1, 0] + wc * packed[b, 0] + wd * packed[b + 1, 0]
            green += wa * packed[a, 1] + wb * packed[a + 1, 1] + wc * packed[b, 1] + wd * packed[b + 1, 1]
            blue += wa * packed[a, 2] + wb * packed[a + 1, 2] + wc * packed[b, 2] + wd * packed[b + 1, 2]
        out[n, 0] = red
        out[n, 1] = green
        out[n, 2] = blue
