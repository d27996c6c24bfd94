"""AgX for an sRGB display, equal to Blender 4.5's view transform, and its approximate inverse for photos.

The transform is: a 3x3 matrix to the LUT's working primaries, log2 over 25 stops, a 3-D table interpolated over
tetrahedra, a power of 2.4, the sRGB curve. `tools/make_agx_lut.py` measures the table by running Blender's own
OpenColorIO configuration at the table's nodes, so nothing is lost by resampling. The published NeAR code's
`simple_ocio` view "AgX" is the same transform (NEAR-SPEC section 7.5; fixture `tonemap` agrees to 1e-4), so both packs use this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from near.colour.srgb import Colour
from near.colour.tetrahedral import interpolate, interpolate_torch
from near.errors import NearError

DATA = Path(__file__).parent / "data" / "agx_srgb.npz"
_TINY, _HUGE = float(np.finfo(np.float32).tiny), 1e30


@dataclass(frozen=True)
class AgxTables:
    """What `tools/make_agx_lut.py` measured.

    working_from_lin709 [3, 3]; log2_scale, log2_offset: code = scale * log2(x) + offset; lut [n, n, n, 3] indexed by the
    codes of R, G, B, values before the power ``exponent``; inverse [m, m, m, 3]: log2 of linear Rec.709, indexed by each display channel's grey code.
    """

    working_from_lin709: np.ndarray
    log2_scale: float
    log2_offset: float
    exponent: float
    lut: np.ndarray
    inverse: np.ndarray
    inverse_range: tuple[float, float]


@lru_cache(maxsize=1)
def tables() -> AgxTables:
    """The shipped tables.

    Raises:
        NearError: ``agx-table-missing`` when the package was installed without its data.
    """
    try:
        with np.load(DATA, allow_pickle=False) as data:
            low, high = (float(v) for v in data["inverse_range"])
            return AgxTables(
                data["working_from_lin709"].astype(np.float32), float(data["log2_scale"]), float(data["log2_offset"]),
                float(data["exponent"]), np.ascontiguousarray(data["lut"], np.float32) / 65535,
                np.ascontiguousarray(data["inverse"], np.float32) * ((high - low) / 65535) + low, (low, high))
    except (OSError, KeyError, ValueError) as error:
        raise NearError("agx-table-missing", f"The AgX table of this installation cannot be read ({error}).",
                        "Install near-relight again.") from error


@lru_cache(maxsize=4)
def _torch_tables(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    t = tables()
    return tuple(torch.from_numpy(a).to(device, dtype) for a in (t.working_from_lin709, t.lut, t.inverse))


def agx_srgb(rgb_lin709: Colour) -> Colour:
    """Linear Rec.709 [..., 3] to sRGB display values in [0, 1] through AgX (exposure 0, no look).

    numpy in, numpy out (float32); torch in, torch out, differentiable. Negative parts are handled as Blender does
    (after the matrix); NaN counts as 0, infinities as very large.
    """
    if isinstance(rgb_lin709, Tensor):
        return _agx_torch(rgb_lin709)
    flat = np.ascontiguousarray(rgb_lin709, np.float32).reshape(-1, 3)
    t = tables()
    codes = np.nan_to_num(flat, nan=0.0, posinf=_HUGE, neginf=-_HUGE) @ t.working_from_lin709.T
    np.maximum(codes, _TINY, out=codes)
    np.log2(codes, out=codes)
    codes *= t.log2_scale
    codes += t.log2_offset
    power = np.maximum(interpolate(t.lut, codes), 0)
    return _display_from_power(power, t.exponent).reshape(np.shape(rgb_lin709))


def _display_from_power(power: np.ndarray, exponent: float) -> np.ndarray:
    """Table values to sRGB code values: with an exponent of 2.4 the curve's own power cancels."""
    linear = power ** np.float32(exponent)
    curved = 1.055 * (power if exponent == 2.4 else linear ** np.float32(1 / 2.4)) - 0.055
    return np.clip(np.where(linear <= 0.0031308, 12.92 * linear, curved), 0, 1).astype(np.float32)


def _agx_torch(rgb_lin709: Tensor) -> Tensor:
    t = tables()
    dtype = rgb_lin709.dtype if rgb_lin709.dtype in (torch.float32, torch.float64) else torch.float32
    matrix, lut, _ = _torch_tables(rgb_lin709.device, dtype)
    flat = rgb_lin709.to(dtype).reshape(-1, 3).nan_to_num(0.0, _HUGE, -_HUGE)
    codes = (flat @ matrix.T).clamp_min(_TINY).log2() * t.log2_scale + t.log2_offset
    power = interpolate_torch(lut, codes).clamp_min(0)
    linear = power ** t.exponent
    curved = 1.055 * (power if t.exponent == 2.4 else linear.clamp_min(1e-12) ** (1 / 2.4)) - 0.055
    display = torch.where(linear <= 0.0031308, 12.92 * linear, curved).clamp(0, 1)
    return display.reshape(rgb_lin709.shape).to(rgb_lin709.dtype)


def grey_curve(low: float, high: float, count: int = 4096) -> tuple[np.ndarray, np.ndarray]:
    """(log2 of linear grey, its display value), both [count] and rising, for greys of 2^low to 2^high."""
    log2_grey = np.linspace(low, high, count)
    grey = torch.from_numpy(log2_grey).exp2()[:, None].expand(-1, 3)
    return log2_grey, np.maximum.accumulate(agx_srgb(grey).mean(-1).numpy())


@lru_cache(maxsize=4)
def _inverse_curve(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[4097] code in [0, 1] of each display value i / 4096: where a grey of that value lies in the inverse table."""
    log2_grey, display = grey_curve(*tables().inverse_range)
    rising = np.concatenate([[True], np.diff(display) > 0])
    code = np.interp(np.arange(4097) / 4096, display[rising], np.linspace(0, 1, len(display))[rising])
    return torch.from_numpy(code).to(device, dtype)


def agx_inverse(srgb: Colour) -> Colour:
    """sRGB display values in [0, 1] of an AgX picture to linear Rec.709 [..., 3], approximately.

    The darkest and brightest display values stand for a range of light; the answer is bounded to the table's range
    (about 2^-10 to 12), and display colours that AgX never produces go to the nearest one that it does. Greys are
    exact and never fall. numpy in, numpy out (float32); torch in, torch out.
    """
    if not isinstance(srgb, Tensor):
        return agx_inverse(torch.from_numpy(np.ascontiguousarray(srgb, np.float32))).numpy()
    dtype = srgb.dtype if srgb.dtype in (torch.float32, torch.float64) else torch.float32
    curve, table = _inverse_curve(srgb.device, dtype), _torch_tables(srgb.device, dtype)[2]
    position = srgb.to(dtype).reshape(-1, 3).nan_to_num(0.0).clamp(0, 1) * 4096
    cell = position.detach().floor().clamp(0, 4095).long()
    codes = torch.lerp(curve[cell], curve[cell + 1], position - cell)
    return interpolate_torch(table, codes).exp2().reshape(srgb.shape).to(srgb.dtype)
