"""Scores of a prediction against its target: AgX, composited on black, 8-bit range (bench README)."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from near.colour import agx_srgb, to_uint8
from near.errors import NearError

PSNR_CAP = 100.0  # of equal pictures, so that reports hold numbers
MIN_CROP = 16  # pixels; a smaller box is grown: SSIM's window needs room


@dataclass(frozen=True)
class Scores:
    """psnr_frame, psnr_mask in dB; ssim 0..1, higher is better; perceptual: a distance, lower is better."""

    psnr_frame: float
    psnr_mask: float
    ssim: float
    perceptual: float

    def as_dict(self) -> dict[str, float]:
        return {k: round(v, 4) for k, v in asdict(self).items()}


def shown_on_black(rgba_lin709: np.ndarray) -> np.ndarray:
    """Premultiplied linear RGBA [H, W, 4] -> uint8 [H, W, 3]: on black, then AgX, rounded to 8 bits.

    Compositing comes first, in linear light: the published baselines of the bench are scored so.
    """
    rgb = np.ascontiguousarray(np.nan_to_num(rgba_lin709[..., :3], nan=0.0, posinf=65504.0, neginf=0.0).clip(0))
    return to_uint8(agx_srgb(rgb.astype(np.float32)))


def score(predicted: np.ndarray, target: np.ndarray) -> Scores:
    """Scores of premultiplied linear RGBA [H, W, 4] against the target of the same size.

    Raises:
        NearError: ``score-size``, ``score-empty`` (the target shows nothing).
    """
    if predicted.shape != target.shape:
        raise NearError("score-size", f"The prediction is {predicted.shape[1]} x {predicted.shape[0]}, the target {target.shape[1]} x {target.shape[0]}.",
                        "Render it at the target's size.")
    mask = target[..., 3] > 0.5
    if not mask.any():
        raise NearError("score-empty", "The target shows nothing.", "Check the bench.")
    a, b = shown_on_black(predicted), shown_on_black(target)
    rows, columns = mask_box(mask)
    x, y = (torch.from_numpy(i[rows, columns].astype(np.float32) / 255).permute(2, 0, 1) for i in (a, b))
    return Scores(psnr(a, b), psnr(a[mask], b[mask]), ssim(x, y), perceptual_metric()[1](x, y))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of uint8 arrays of one shape."""
    error = float(((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean())
    return PSNR_CAP if error == 0 else min(10 * math.log10(255.0 ** 2 / error), PSNR_CAP)


def mask_box(mask: np.ndarray) -> tuple[slice, slice]:
    """Bounding box of a mask as (rows, columns), grown to :data:`MIN_CROP` where it is smaller and the frame allows."""
    spans = []
    for axis in (1, 0):
        hits = np.flatnonzero(mask.any(axis))
        low, high = int(hits[0]), int(hits[-1]) + 1
        size, grow = mask.shape[1 - axis], max(MIN_CROP - (high - low), 0)
        low = max(min(low - grow // 2, size - (high - low) - grow), 0)
        spans.append(slice(low, min(max(high, low + MIN_CROP), size)))
    return spans[0], spans[1]


def ssim(a: Tensor, b: Tensor) -> float:
    """Mean structural similarity of [C, H, W] in 0..1: Wang et al. 2004, Gaussian window of 11 pixels, sigma 1.5, valid area only."""
    size = min(11, a.shape[1], a.shape[2])
    x = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    w = torch.exp(-x ** 2 / (2 * 1.5 ** 2))
    w = w / w.sum()
    stack = torch.stack([a, b, a * a, b * b, a * b])
    stack = F.conv2d(stack.flatten(0, 1)[:, None], w.view(1, 1, -1, 1))
    ma, mb, aa, bb, ab = F.conv2d(stack, w.view(1, 1, 1, -1))[:, 0].unflatten(0, (5, -1))
    va, vb, cov = aa - ma * ma, bb - mb * mb, ab - ma * mb
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    return float((((2 * ma * mb + c1) * (2 * cov + c2)) / ((ma * ma + mb * mb + c1) * (va + vb + c2))).mean())


# -- perceptual distance -----------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def perceptual_metric() -> tuple[str, object]:
    """(name, function of two [3, H, W] in 0..1 -> float): LPIPS where package and weights are on this machine, else the substitute.

    Nothing is downloaded.
    """
    weights = Path(os.environ.get("TORCH_HOME") or Path.home() / ".cache" / "torch") / "hub" / "checkpoints"
    if list(weights.glob("alexnet-*.pth")):
        try:
            import lpips

            network = lpips.LPIPS(net="alex", verbose=False).eval()
            return "LPIPS (AlexNet)", lambda a, b: _lpips(network, a, b)
        except ImportError:
            pass
    return "contrast pyramid (substitute: the LPIPS weights are not on this machine)", contrast_pyramid_distance


def _lpips(network, a: Tensor, b: Tensor) -> float:
    grow = max(0, 64 - min(a.shape[1:]))  # AlexNet's strides need room
    a, b = (F.pad(x[None] * 2 - 1, (0, grow, 0, grow)) for x in (a, b))
    with torch.inference_mode():
        return float(network(a, b))


def contrast_pyramid_distance(a: Tensor, b: Tensor, scales: int = 4) -> float:
    """Stated substitute for LPIPS; 0 for equal pictures, about 1 for unrelated ones.

    Both pictures are split into opponent colours and band-passed over ``scales`` octaves; each band is divided by its
    local energy (of both pictures, plus a visibility floor), as early vision does, so blur, lost texture, ghost edges and
    wrong local colour count, and a small global shift of brightness hardly does. The root mean squared difference per
    band, averaged over bands.

    Args: a, b: [3, H, W] display values 0..1.
    """
    opponent = torch.tensor([[0.2126, 0.7152, 0.0722], [0.5, -0.5, 0.0], [0.25, 0.25, -0.5]])
    x, y = (torch.einsum("oc,chw->ohw", opponent, i)[None] for i in (a, b))
    floor, distances = 0.02, []
    for _ in range(scales):
        if min(x.shape[2:]) < 4:
            break
        fine = (x, y)
        x, y = (F.avg_pool2d(i, 2, ceil_mode=True, count_include_pad=False) for i in fine)
        bands = [i - F.interpolate(s, size=i.shape[2:], mode="bilinear", align_corners=False) for i, s in zip(fine, (x, y))]
        energy = sum(F.avg_pool2d(band ** 2, 5, 1, 2, count_include_pad=False) for band in bands)
        distances.append((((bands[0] - bands[1]) ** 2) / (energy + floor ** 2)).mean().sqrt())
    return float(torch.stack(distances).mean()) if distances else 0.0
