"""Zonal GGX convolution of an equirectangular map: exact in longitude by FFT, whole lobe in latitude.

The kernel is that of split-sum prefiltering with n = v = mirror direction: k(theta) ~ D_ggx(theta / 2) cos(theta). Along a
row of latitude it is a circular convolution, so a level costs one small matrix product per frequency. For narrow lobes on
fine grids the kernel is cut smoothly into a near part (a band of rows on the fine grid) and a far part (the lobe's long
tail, on a coarse grid): a sun's tail lights half the sphere and is kept. Rows and columns are balanced (Sinkhorn), so that a
constant map stays constant and the sphere's mean is kept, both to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from near.compiled import FINITE_OR_NOT, compiled
from near.lighting.equirect import bilinear, pad_for_lookup, resample_equirect, row_solid_angles

FAR_ROWS = 96  # grid of the tail
FULL_ROWS = 128  # up to this height the whole lobe fits on the level's own grid
NEAR_RAD = math.radians(10)
BLOCK = 32  # rows per matrix product of a banded level


@dataclass(frozen=True)
class ZonalKernel:
    """Spectra of one lobe on one grid: per block of output rows, weights [F, rows_out, rows_in] (solid angle included).

    The blocks cover the northern half; the southern one is its mirror image.
    """

    blocks: tuple[tuple[slice, Tensor], ...]

    def apply(self, spectrum: Tensor) -> Tensor:
        """Convolve the map of ``spectrum`` [F, H, 12] (see :meth:`BlurSource.spectrum`); returns [H, 2H, 3]."""
        height = spectrum.shape[1]
        half = torch.cat([torch.bmm(weights, spectrum[:, rows_in]) for rows_in, weights in self.blocks], 1)
        rows = torch.view_as_complex(half.reshape(-1, height // 2, 6, 2)).permute(1, 2, 0)
        out = torch.fft.irfft(rows, n=2 * height, dim=-1).permute(0, 2, 1)
        return torch.cat([out[..., :3], out[..., 3:].flip(0)])


class BlurSource:
    """A map to be blurred by several lobes; grids and their spectra are shared between them."""

    def __init__(self, rgb: Tensor) -> None:
        self.rgb = rgb
        self._spectra: dict[int, Tensor] = {}

    def spectrum(self, height: int) -> Tensor:
        """[F, height, 12] real and imaginary parts of the rows' spectra: northern view, then southern (rows reversed)."""
        if height not in self._spectra:
            grid = gather_centred(self.rgb, height).permute(0, 2, 1).contiguous()
            both = torch.fft.rfft(torch.cat([grid, grid.flip(0)], 1), dim=-1)  # [H, 6, F]
            self._spectra[height] = torch.view_as_real(both.permute(2, 0, 1)).reshape(height + 1, height, 12)
        return self._spectra[height]

    def blur(self, roughness: float, height: int, near_rad: float = NEAR_RAD) -> Tensor:
        """Radiance [height, 2 * height, 3] seen through the GGX lobe of ``roughness`` (> 0) around each direction; height even."""
        if height <= FULL_ROWS:
            return zonal_kernel(height, roughness, None, False).apply(self.spectrum(height))
        near = zonal_kernel(height, roughness, near_rad, False).apply(self.spectrum(height))
        coarse = zonal_kernel(FAR_ROWS, roughness, near_rad, True).apply(self.spectrum(FAR_ROWS))
        return near + enlarge(coarse, height)


def enlarge(rgb: Tensor, height: int) -> Tensor:
    """Bilinear enlargement of [H, 2H, 3] to [height, 2 * height, 3]."""
    v, u = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(2 * height) + 0.5) / (2 * height), indexing="ij")
    return bilinear(pad_for_lookup(rgb), u.reshape(-1), v.reshape(-1)).reshape(height, 2 * height, 3)


def gather_centred(rgb: Tensor, height: int) -> Tensor:
    """Downsample to [height, 2 * height, 3] giving each texel's energy to the nearest targets in proportion (hat weights).

    Unlike box averaging this keeps where a one-texel sun stands, at the price of a slight spread. Energy is kept exactly;
    a constant map stays constant because received energy is divided by received solid angle (:func:`gathered_omega`).
    """
    flux = resample_equirect(rgb, 2 * height, 4 * height) * row_solid_angles(2 * height, 4 * height)[:, None, None].float()
    return _hat_sum(flux) / gathered_omega(height)[:, None, None].float()


@lru_cache(maxsize=16)
def gathered_omega(height: int) -> Tensor:
    """[height] float64: solid angle that a texel of each row stands for after :func:`gather_centred`."""
    fine = row_solid_angles(2 * height, 4 * height)[:, None, None]
    return _hat_sum(fine.expand(-1, 8, 1))[:, 0, 0]


def _hat_sum(flux: Tensor) -> Tensor:
    """Halve both sides of [2H, W, C]: weights (1, 3, 3, 1) / 4 along each, through the poles and around the seam."""
    width = flux.shape[1]
    over = torch.cat([flux[:1].roll(width // 2, 1), flux, flux[-1:].roll(width // 2, 1)])
    rows = (over[:-2:2] + over[3::2]) / 4 + (over[1:-1:2] + over[2::2]) * 0.75
    columns = torch.cat([rows[:, -1:], rows, rows[:, :1]], 1)
    return (columns[:, :-2:2] + columns[:, 3::2]) / 4 + (columns[:, 1:-1:2] + columns[:, 2::2]) * 0.75


def lobe(s: np.ndarray, alpha: float) -> np.ndarray:
    """Unnormalised kernel by s = sin^2(theta / 2) (a form without cancellation at small angles)."""
    return np.maximum(1 - 2 * s, 0) / (alpha ** 2 + s * (1 - alpha ** 2)) ** 2


def lobe_integral(alpha: float, near_rad: float | None = None, far: bool = False) -> float:
    """Integral over the sphere of the kernel, or of its near or far part."""
    s = np.concatenate([[0.0], np.geomspace(1e-9 * alpha ** 2, 0.5, 200_001)])
    value = lobe(s, alpha)
    if near_rad is not None:
        share = _near_share(s, math.sin(near_rad / 2) ** 2)
        value = value * ((1 - share) if far else share)
    return float(4 * math.pi * np.trapezoid(value, s)) if hasattr(np, "trapezoid") else float(4 * math.pi * np.trapz(value, s))


def _near_share(s: np.ndarray, cut: float) -> np.ndarray:
    t = np.clip(s / cut, 0, 1)
    return 1 - t * t * (3 - 2 * t)


@lru_cache(maxsize=32)
def zonal_kernel(height: int, roughness: float, near_rad: float | None, far: bool) -> ZonalKernel:
    """Build (once per process) the lobe's spectra on a [height, 2 * height] grid."""
    width, alpha = 2 * height, roughness ** 2
    cut = math.sin(near_rad / 2) ** 2 if near_rad else 0.0
    banded = near_rad is not None and not far
    reach = math.ceil(near_rad / math.pi * height) + 1 if banded else height
    step = BLOCK if banded else height
    omega = gathered_omega(height)
    raw, blocks = np.zeros((height, height)), []
    for start in range(0, height // 2, step):
        out_rows = slice(start, min(start + step, height // 2))
        in_rows = slice(max(0, start - reach), min(height, out_rows.stop + reach))
        values = np.empty((out_rows.stop - start, in_rows.stop - in_rows.start, width), np.float32)
        _kernel_rows(values, start, in_rows.start, height, alpha, cut, 0 if cut == 0 else (2 if far else 1))
        spectrum = torch.fft.rfft(torch.from_numpy(values), dim=-1).real.permute(2, 0, 1).contiguous()
        raw[out_rows, in_rows] = spectrum[0].double().numpy()
        blocks.append((out_rows, in_rows, spectrum))
    raw[height // 2 :] = raw[: height // 2][::-1, ::-1]
    mass = lobe_integral(alpha, near_rad, far) / lobe_integral(alpha)
    out_gain, in_gain = _balance(raw, omega.numpy(), mass)
    in_weight = torch.from_numpy(in_gain * omega.numpy())
    gain = torch.from_numpy(out_gain)
    return ZonalKernel(tuple((i, w.mul_((gain[o, None] * in_weight[i]).float())) for o, i, w in blocks))


def _balance(raw: np.ndarray, omega: np.ndarray, mass: float) -> tuple[np.ndarray, np.ndarray]:
    """Gains per output and input row with sum_i g_o K g_i omega_i = mass and sum_o omega_o g_o K g_i = mass."""
    rows, columns = np.ones(len(raw)), np.ones(len(raw))
    for _ in range(50):
        columns = mass / np.maximum((omega * rows) @ raw, 1e-300)
        rows = mass / np.maximum(raw @ (columns * omega), 1e-300)
    return rows, columns


@compiled(fastmath=FINITE_OR_NOT)
def _kernel_rows(values, out_start, in_start, height, alpha, cut, part):
    """values[o, i, x]: kernel between the centre of output row o and input row i, x texels apart, averaged over the input
    texel (2 x 2 Gauss points). part: 0 whole, 1 near, 2 far."""
    width = values.shape[2]
    a2, b2 = np.float32(alpha * alpha), np.float32(1 - alpha * alpha)
    texel = math.pi / height
    gauss = 0.5 / math.sqrt(3.0)
    half = width // 2
    sines = np.empty((half + 1, 2), np.float32)
    for x in range(half + 1):
        sines[x, 0] = math.sin(0.5 * texel * (x - gauss)) ** 2
        sines[x, 1] = math.sin(0.5 * texel * (x + gauss)) ** 2
    inverse_cut = np.float32(1 / cut) if cut > 0 else np.float32(0)
    for o in range(values.shape[0]):
        polar_out = (out_start + o + 0.5) * texel
        for i in range(values.shape[1]):
            for x in range(half + 1):
                values[o, i, x] = 0
            for g in range(2):
                polar_in = (in_start + i + 0.5 + (gauss if g else -gauss)) * texel
                base = np.float32(math.sin(0.5 * (polar_out - polar_in)) ** 2)
                cross = np.float32(math.sin(polar_out) * math.sin(polar_in))
                for x in range(half + 1):
                    for h in range(2):
                        s = base + cross * sines[x, h]
                        bottom = a2 + b2 * s
                        k = max(np.float32(1) - 2 * s, np.float32(0)) / (bottom * bottom)
                        if part > 0:
                            t = min(s * inverse_cut, np.float32(1))
                            smooth = t * t * (3 - 2 * t)
                            k *= smooth if part == 2 else 1 - smooth
                        values[o, i, x] += np.float32(0.25) * k
            for x in range(half + 1, width):
                values[o, i, x] = values[o, i, width - x]
