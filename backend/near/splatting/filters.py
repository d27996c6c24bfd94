"""From a frame rasterised at twice the size to the frame."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from near.splatting.threads import compiled, run_shared

KERNELS = ("box", "blackman_harris")
CYCLES_WIDTH = 3.0  # pixels: Blender's default filter size 1.5 is a radius (ANALYTIC.md section 7)
TAPS = 6
BEFORE = (TAPS - 2) // 2  # taps left of the two half-pixels that make up a pixel


def blackman_harris(x: np.ndarray) -> np.ndarray:
    """Cycles' pixel filter at x pixels from the pixel's centre; peak 1."""
    t = 2 * np.pi * (x / CYCLES_WIDTH + 0.5)
    value = 0.35875 - 0.48829 * np.cos(t) + 0.14128 * np.cos(2 * t) - 0.01168 * np.cos(3 * t)
    return np.where(np.abs(x) <= CYCLES_WIDTH / 2, value, 0.0)


@cache
def blackman_harris_taps(eps2d: float) -> tuple[float, ...]:
    """Weights of the six half-pixels around a pixel's centre, nearest to Cycles' filter; they sum to 1.

    A splat is already blurred: by a Gaussian of variance ``eps2d`` half-pixels^2. The taps are the least-squares fit of
    taps * that Gaussian to the filter, so that the blur is not counted twice; none is negative, so that no highlight darkens
    its neighbours.
    """
    x = np.linspace(-3, 3, 1201)
    sigma = max(0.5 * eps2d**0.5, 0.05)
    places = (np.arange(TAPS) - (TAPS - 1) / 2) / 2
    bumps = np.exp(-0.5 * ((x[:, None] - places) / sigma) ** 2)
    bumps /= bumps.sum(0)
    target = blackman_harris(x)
    taps, _ = nnls(bumps, target / target.sum())
    return tuple((taps / taps.sum()).tolist())


def kernel_taps(name: str, eps2d: float) -> tuple[float, ...]:
    """The six taps of a kernel.

    Raises:
        ValueError: no such kernel.
    """
    if name == "box":
        return (0.0, 0.0, 0.5, 0.5, 0.0, 0.0)
    if name != "blackman_harris":
        raise ValueError(f"kernel is {name!r}, must be one of {', '.join(KERNELS)}")
    return blackman_harris_taps(eps2d)


def downsample2(image: Tensor, kernel: str = "box", eps2d: float = 0.3) -> Tensor:
    """Half the size.

    Args:
        image: [2H, 2W, C], additive quantities (premultiplied colours, alpha), not depth.
        kernel: "box", the mean of 2 x 2, or "blackman_harris", Cycles' pixel filter, which reaches into the next pixels.
        eps2d: of the settings the image was splatted with (see :func:`blackman_harris_taps`).
    Returns:
        [H, W, C]; beyond the border the image repeats its edge.
    """
    height, width, channels = image.shape
    if height % 2 or width % 2:
        raise ValueError(f"an image of {width} x {height} pixels has no half size")
    taps = kernel_taps(kernel, eps2d)
    if image.is_cuda or image.dtype != torch.float32 or (image.requires_grad and torch.is_grad_enabled()):
        return downsample2_reference(image, taps)
    source = np.ascontiguousarray(image.detach().numpy())
    out = np.empty((height // 2, width // 2, channels), np.float32)
    run_shared(lambda k, n: _halve_rows(k, n, source, np.array(taps, np.float32), out))
    return torch.from_numpy(out)


def downsample2_reference(image: Tensor, taps: tuple[float, ...]) -> Tensor:
    """:func:`downsample2` in plain torch: differentiable, any device."""
    for _ in range(2):  # halve the columns, then, transposed, the rows
        first, last = image[:, :1].expand(-1, BEFORE, -1), image[:, -1:].expand(-1, BEFORE, -1)
        padded = torch.cat([first, image, last], 1)
        image = sum(padded[:, k : k + image.shape[1] : 2] * taps[k] for k in range(TAPS) if taps[k]).transpose(0, 1)
    return image.contiguous()


@compiled
def _halve_rows(share, shares, image, taps, out):
    """Output rows of one share: image float32 [2H, 2W, C], taps [6], out [H, W, C]."""
    height, width, channels = out.shape
    flat, target = image.reshape(2 * height, -1), out.reshape(height, -1)
    room = np.empty((2 * width + 2 * BEFORE) * channels, np.float32)
    line = room[BEFORE * channels : (BEFORE + 2 * width) * channels]
    for y in range(height * share // shares, height * (share + 1) // shares):
        line[:] = 0
        for k in range(TAPS):
            if taps[k] != 0:
                source, tap = flat[min(max(2 * y + k - BEFORE, 0), 2 * height - 1)], taps[k]
                for i in range(len(line)):
                    line[i] += tap * source[i]
        for i in range(BEFORE * channels):
            room[i] = line[i % channels]
            room[len(room) - 1 - i] = line[len(line) - 1 - i % channels]
        row = target[y]
        row[:] = 0
        for k in range(TAPS):
            if taps[k] != 0:
                tap = taps[k]
                for x in range(width):
                    for c in range(channels):
                        row[x * channels + c] += tap * room[(2 * x + k) * channels + c]
