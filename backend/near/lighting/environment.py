"""Light as data: an equirectangular map, a rotation and a strength."""

from __future__ import annotations

import hashlib
import math
import weakref
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from near.errors import NearError
from near.lighting.equirect import bilinear, fractions, pad_for_lookup

_digests: dict[int, tuple[weakref.ref, int, str]] = {}


@dataclass(frozen=True, eq=False)
class Environment:
    """Light from far away: radiance from world direction d = strength * map(env_from_world @ d).

    rgb_lin709: [H, W, 3] float32 linear Rec.709, top row +Z (see :mod:`near.lighting.equirect`).
    env_from_world: [3, 3] orthogonal (a mirrored object gives a mirrored light).
    strength: factor >= 0.

    Raises:
        NearError: ``light-shape``, ``light-rotation``, ``light-strength``.
    """

    rgb_lin709: Tensor
    env_from_world: Tensor = field(default_factory=lambda: torch.eye(3))
    strength: float = 1.0

    def __post_init__(self) -> None:
        shape = tuple(self.rgb_lin709.shape)
        if len(shape) != 3 or shape[2] != 3 or shape[0] < 1 or shape[1] < 2:
            raise NearError("light-shape", f"An environment must be [height, width, 3]; this one is {list(shape)}.",
                            "Give an equirectangular RGB image.")
        m = self.env_from_world
        if tuple(m.shape) != (3, 3) or not (m.double() @ m.double().T - torch.eye(3, dtype=torch.float64, device=m.device)).abs().max() < 1e-3:
            raise NearError("light-rotation", "The light's rotation is not an orthogonal 3x3 matrix.",
                            "Remove scale and shear from the light's and the object's transform.")
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise NearError("light-strength", f"The light's strength is {self.strength}.", "Set a finite strength of 0 or more.")

    def rotated(self, rotation_world: Tensor) -> "Environment":
        """The light turned in the world: what came from d now comes from ``rotation_world @ d``."""
        return Environment(self.rgb_lin709, self.env_from_world @ rotation_world.to(self.env_from_world).T, self.strength)

    def scaled(self, factor: float) -> "Environment":
        """The light made ``factor`` times stronger."""
        return Environment(self.rgb_lin709, self.env_from_world, self.strength * factor)

    def lookup(self, dirs_world: Tensor) -> Tensor:
        """Radiance [..., 3] arriving from world directions [..., 3]: bilinear, continuous over seam and poles."""
        flat = dirs_world.reshape(-1, 3) @ self.env_from_world.to(dirs_world).T
        padded = pad_for_lookup(self.rgb_lin709).to(dirs_world)
        return (bilinear(padded, *fractions(flat)) * self.strength).reshape(dirs_world.shape)

    def digest(self) -> str:
        """sha256 of size and pixels; rotation and strength stay out, so a light sweep keeps one digest."""
        key, version = id(self.rgb_lin709), _version(self.rgb_lin709)
        known = _digests.get(key)
        if known and known[0]() is self.rgb_lin709 and known[1] == version and version >= 0:
            return known[2]
        pixels = np.ascontiguousarray(self.rgb_lin709.detach().cpu().numpy(), np.float32)
        value = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()
        _digests[key] = (weakref.ref(self.rgb_lin709, lambda _: _digests.pop(key, None)), version, value)
        return value


def _version(tensor: Tensor) -> int:
    """Counter of in-place changes; -1 where torch keeps none (tensors made in inference mode)."""
    return -1 if tensor.is_inference() else tensor._version


def rotation_z(angle_rad: float) -> Tensor:
    """[3, 3] rotation about +Z: [[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]."""
    c, s = math.cos(angle_rad), math.sin(angle_rad)
    return torch.tensor([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])


def uniform_environment(rgb: float | tuple[float, float, float] = 1.0) -> Environment:
    """The same radiance from everywhere (the paper's homogeneous light)."""
    return environment_from_array(np.broadcast_to(np.asarray(rgb, np.float32), (8, 16, 3)))


def environment_from_array(pixels: np.ndarray | Tensor, allow_repair: bool = False) -> Environment:
    """Checked environment from [H, W, 3 or 4 or 1] (or [H, W]) linear Rec.709 values of any float type.

    Args:
        allow_repair: replace NaN and negative values by 0 and cap infinities at the largest finite value instead of refusing.
    Raises:
        NearError: ``light-shape`` (not 2:1 or empty), ``light-not-finite``, ``light-negative``.
    """
    array = pixels.detach().cpu().numpy() if isinstance(pixels, Tensor) else np.asarray(pixels)
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or min(array.shape) < 1:
        raise NearError("light-shape", f"The light has the shape {list(array.shape)}.", "Give an RGB image that is twice as wide as it is high.")
    height, width = array.shape[:2]
    # Half-texel tolerance: 2:1 maps with an odd or cropped row exist (e.g. 1025 x 513).
    if height < 2 or abs(width - 2 * height) > 1:
        raise NearError("light-shape", f"The light is {width} x {height} pixels; an equirectangular map is twice as wide as it is high.",
                        "Choose a 360-degree equirectangular HDRI, or convert this picture to one.")
    array = array[..., :3] if array.shape[2] > 1 else np.repeat(array, 3, -1)
    return Environment(torch.from_numpy(_clean(np.array(array, np.float32, order="C"), allow_repair)))


def _clean(rgb: np.ndarray, allow_repair: bool) -> np.ndarray:
    """Refuse or repair what is not light. Changes ``rgb`` in place."""
    low, high = rgb.min(), rgb.max()  # NaN shows in both
    if low >= 0 and np.isfinite(high):
        return rgb
    nan, infinite, negative = int(np.isnan(rgb).sum()), int(np.isinf(rgb).sum()), int((rgb < 0).sum())
    if not allow_repair:
        if nan or infinite:
            raise NearError("light-not-finite", f"The light holds {nan} NaN and {infinite} infinite values (half-float files overflow above 65504).",
                            "Save it again with a lower exposure or as 32-bit float, or allow repair.")
        raise NearError("light-negative", f"The light holds {negative} negative values (lowest {low:.3g}).",
                        "Save it again without negative values, or allow repair.")
    finite = rgb[np.isfinite(rgb)]
    cap = float(finite.max()) if finite.size else 0.0
    return np.clip(np.nan_to_num(rgb, nan=0.0, posinf=cap, neginf=0.0), 0, None)
