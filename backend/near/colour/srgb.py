"""The sRGB transfer curve (Blender's "Standard" view) and 8-bit quantisation, for numpy and torch alike.

Colours are [..., 3] (any shape works: the curve acts per value). Source: IEC 61966-2-1; NEAR-SPEC section 8.4 uses the
same curve.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Colour = np.ndarray | Tensor
LUMINANCE = torch.tensor([0.2126, 0.7152, 0.0722])  # of linear Rec.709


def srgb_encode(linear: Colour) -> Colour:
    """Linear to sRGB code values, clipped to [0, 1]. Same type and shape as the input; differentiable in torch."""
    if isinstance(linear, Tensor):
        x = linear.clamp(0, 1)
        # The power's slope at 0 is infinite; keep its argument away from 0 where the other branch is taken.
        return torch.where(x <= 0.0031308, 12.92 * x, 1.055 * x.clamp_min(0.0031308) ** (1 / 2.4) - 0.055)
    x = np.clip(linear, 0, 1)
    return np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055).astype(x.dtype)


def srgb_decode(encoded: Colour) -> Colour:
    """sRGB code values in [0, 1] to linear; the inverse of :func:`srgb_encode`."""
    if isinstance(encoded, Tensor):
        x = encoded.clamp(0, 1)
        return torch.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    x = np.clip(encoded, 0, 1)
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4).astype(x.dtype)


def to_uint8(display: Colour) -> Colour:
    """[0, 1] display values to uint8, rounded to nearest as Blender saves them (dither 0); NaN becomes 0."""
    if isinstance(display, Tensor):
        return (display.nan_to_num(0.0).clamp(0, 1) * 255 + 0.5).to(torch.uint8)
    return (np.clip(np.nan_to_num(display), 0, 1) * 255 + 0.5).astype(np.uint8)
