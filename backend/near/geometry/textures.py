"""Images on a mesh: decoding within bounds, mip levels, filtered look-up."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, field

import numpy as np
from numba import njit
from PIL import Image

from near.errors import NearError

MAX_TEXTURE_SIDE = 4096  # kept; larger images are reduced while decoding
MAX_TEXTURE_PIXELS = 170 * 2**20  # just below what Pillow itself refuses
WRAP_REPEAT, WRAP_MIRROR, WRAP_CLAMP = 0, 1, 2
SRGB_TO_LINEAR = np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.arange(256) / 255], np.float32)
LINEAR = (np.arange(256) / 255).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Texture:
    """pixels: uint8 [H, W, C], C = 1 to 4, top row first; wrap: how u and v continue outside [0, 1]."""

    pixels: np.ndarray
    wrap: tuple[int, int] = (WRAP_REPEAT, WRAP_REPEAT)


@dataclass(frozen=True, eq=False)
class TextureSlot:
    """A texture as a material uses it: ``uv_image = uv_transform @ (u, v, 1)`` of UV set ``texcoord``, v = 0 at the top
    row (glTF's convention)."""

    texture: Texture
    texcoord: int = 0
    uv_transform: np.ndarray = field(default_factory=lambda: np.eye(2, 3))


def decode_texture(data: bytes, name: str) -> np.ndarray:
    """Image file -> uint8 [H, W, C].

    Raises:
        NearError: ``texture-unreadable`` or ``texture-too-big``.
    """
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            warnings.simplefilter("ignore")  # Pillow warns about damage and size; both are judged here
            if image.width * image.height > MAX_TEXTURE_PIXELS:
                raise _too_big(name)
            image.draft(None, (MAX_TEXTURE_SIDE, MAX_TEXTURE_SIDE))  # JPEG decoders can skip what is not wanted
            if image.mode.startswith("I") or image.mode == "F":
                array = np.asarray(image, dtype=np.float64)
                image = Image.fromarray((array / (65535 if array.max() > 255 else 255) * 255).round().clip(0, 255).astype(np.uint8))
            elif image.mode not in ("L", "LA", "RGB", "RGBA"):
                image = image.convert("RGBA" if "transparency" in image.info or image.mode in ("PA", "RGBa", "La") else "RGB")
            factor = -(-max(image.size) // MAX_TEXTURE_SIDE)
            image = image.reduce(factor) if factor > 1 else image
            pixels = np.array(image)
    except NearError:
        raise
    except Image.DecompressionBombError as error:
        raise _too_big(name) from error
    except Exception as error:  # Pillow's decoders raise many kinds on damaged data
        raise NearError("texture-unreadable", f"The texture {name} cannot be read.", "Export the mesh again with PNG or JPEG textures.") from error
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _too_big(name: str) -> NearError:
    return NearError("texture-too-big", f"The texture {name} has more than {MAX_TEXTURE_PIXELS >> 20} megapixels.", "Reduce it, for example to 4096 x 4096.")


class MipPyramid:
    """Box-filtered levels of a texture in linear values, each half the size of the one before."""

    def __init__(self, texture: Texture, srgb: bool) -> None:
        self.texture = texture
        table = SRGB_TO_LINEAR if srgb else LINEAR
        self.decode = np.stack([table] * 3 + [LINEAR])  # alpha is never gamma-encoded
        self.levels: list[np.ndarray] = []
        level = _halve_bytes(texture.pixels, self.decode)
        while True:
            self.levels.append(level)
            if max(level.shape[:2]) == 1:
                break
            level = _halve(level)

    def fetch(self, uv: np.ndarray, texels: np.ndarray) -> np.ndarray:
        """Trilinear look-up.

        Args: uv [N, 2] in image space (v = 0 top); texels [N] area of the footprint in texels of the full image.
        Returns: float32 [N, C].
        """
        level = np.clip(0.5 * np.log2(np.maximum(texels, 1e-12)), 0, len(self.levels)).astype(np.float32)
        uv = np.nan_to_num(np.asarray(uv, np.float64), posinf=0.0, neginf=0.0)
        out = np.zeros((len(uv), self.texture.pixels.shape[2]), np.float32)
        coarse = np.floor(level).astype(np.int64)
        for k in range(len(self.levels) + 1):
            for rows, weight in ((np.nonzero(coarse == k)[0], 1 - (level - coarse)), (np.nonzero(coarse == k - 1)[0], level - coarse)):
                if not len(rows):
                    continue
                if k == 0:
                    _bilinear_bytes(self.texture.pixels, self.decode, uv, rows, weight, *self.texture.wrap, out)
                else:
                    _bilinear(self.levels[k - 1], uv, rows, weight, *self.texture.wrap, out)
        return out


@njit(cache=True)
def _halve_bytes(pixels, decode):
    h, w, c = pixels.shape
    out = np.empty((max(h // 2, 1), max(w // 2, 1), c), np.float32)
    for y in range(out.shape[0]):
        y1 = min(2 * y + 1, h - 1)
        for x in range(out.shape[1]):
            x1 = min(2 * x + 1, w - 1)
            for k in range(c):
                # The last channel of a grey+alpha or RGBA image is alpha.
                t = 3 if (c == 2 and k == 1) else k
                out[y, x, k] = 0.25 * (decode[t, pixels[2 * y, 2 * x, k]] + decode[t, pixels[2 * y, x1, k]]
                                       + decode[t, pixels[y1, 2 * x, k]] + decode[t, pixels[y1, x1, k]])
    return out


@njit(cache=True)
def _halve(level):
    h, w, c = level.shape
    out = np.empty((max(h // 2, 1), max(w // 2, 1), c), np.float32)
    for y in range(out.shape[0]):
        y1 = min(2 * y + 1, h - 1)
        for x in range(out.shape[1]):
            x1 = min(2 * x + 1, w - 1)
            for k in range(c):
                out[y, x, k] = 0.25 * (level[2 * y, 2 * x, k] + level[2 * y, x1, k] + level[y1, 2 * x, k] + level[y1, x1, k])
    return out


@njit(cache=True)
def _wrap(i, n, mode):
    if mode == 2:
        return min(max(i, 0), n - 1)
    if mode == 1:
        i = i % (2 * n)
        return i if i < n else 2 * n - 1 - i
    return i % n


@njit(cache=True)
def _corner(u, n, mode):
    # Wrapping before scaling keeps huge coordinates exact enough and inside the integer range.
    u = min(max(u, -1.0), 2.0) if mode == 2 else u - 2 * np.floor(u / 2)
    f = u * n - 0.5
    i = int(np.floor(f))
    return _wrap(i, n, mode), _wrap(i + 1, n, mode), f - i


@njit(cache=True)
def _bilinear_bytes(pixels, decode, uv, rows, weight, wrap_u, wrap_v, out):
    h, w, c = pixels.shape
    for r in rows:
        x0, x1, fx = _corner(uv[r, 0], w, wrap_u)
        y0, y1, fy = _corner(uv[r, 1], h, wrap_v)
        for k in range(c):
            t = 3 if (c == 2 and k == 1) else k
            top = decode[t, pixels[y0, x0, k]] * (1 - fx) + decode[t, pixels[y0, x1, k]] * fx
            low = decode[t, pixels[y1, x0, k]] * (1 - fx) + decode[t, pixels[y1, x1, k]] * fx
            out[r, k] += weight[r] * (top * (1 - fy) + low * fy)


@njit(cache=True)
def _bilinear(level, uv, rows, weight, wrap_u, wrap_v, out):
    h, w, c = level.shape
    for r in rows:
        x0, x1, fx = _corner(uv[r, 0], w, wrap_u)
        y0, y1, fy = _corner(uv[r, 1], h, wrap_v)
        for k in range(c):
            top = level[y0, x0, k] * (1 - fx) + level[y0, x1, k] * fx
            low = level[y1, x0, k] * (1 - fx) + level[y1, x1, k] * fx
            out[r, k] += weight[r] * (top * (1 - fy) + low * fy)
