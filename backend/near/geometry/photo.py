"""Photos of objects: loading within bounds, and the published pipeline's crop (NEAR-SPEC section 9)."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from near.colour import agx_inverse, agx_srgb
from near.errors import NearError
from near.wire import MAX_STOPS

MIN_SIDE, MAX_SIDE = 32, 2048  # larger photos are reduced: nothing downstream resolves more
MAX_PIXELS = 170 * 2**20  # just below what Pillow itself refuses
MAX_FILE_BYTES = 512 << 20
SOLID = 0.8  # of full opacity: what counts as the object for its bounding box


@dataclass(frozen=True, eq=False)
class Photo:
    """srgb: float32 [H, W, 3], display colours 0..1, not premultiplied; alpha: float32 [H, W] 0..1 (all 1: no matte yet); sha256: of
    the file."""

    srgb: Tensor
    alpha: Tensor
    sha256: str = ""

    def __post_init__(self) -> None:
        if self.srgb.ndim != 3 or self.srgb.shape[2] != 3 or self.alpha.shape != self.srgb.shape[:2]:
            raise NearError("photo-shape", f"The photo has shapes {tuple(self.srgb.shape)} and {tuple(self.alpha.shape)}.",
                            "Give colours [H, W, 3] and alpha [H, W].")

    @property
    def has_matte(self) -> bool:
        """Whether any pixel is not fully opaque (spec: alpha < 255)."""
        return bool((self.alpha < 254.5 / 255).any())


def check_stops(stops: float) -> None:
    """Raises ``exposure-invalid`` beyond ``MAX_STOPS`` either way."""
    if not -MAX_STOPS <= stops <= MAX_STOPS:
        raise NearError("exposure-invalid", f"An exposure of {stops:g} stops was asked for.", f"Use between -{MAX_STOPS:g} and {MAX_STOPS:g} stops.")


def exposed(photo: Photo, stops: float) -> Photo:
    """The photo as an exposure longer by ``stops`` would have shown it through AgX. What is burnt out stays so.

    Raises:
        NearError: ``exposure-invalid``.
    """
    check_stops(stops)
    return photo if stops == 0 else replace(photo, srgb=agx_srgb(agx_inverse(photo.srgb) * 2.0 ** stops))


def load_photo(source: str | Path | bytes) -> Photo:
    """Read a photo from a file or from its bytes; the camera's orientation and colour profile are applied.

    Raises:
        NearError: ``photo-missing``, ``cannot-read``, ``photo-not-an-image``, ``photo-damaged``, ``photo-too-small``,
            ``photo-too-big``, ``photo-transparent``.
    """
    data, name = _read(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about damage and size; both are judged here
        rgba = _decode(data, name)
    if max(rgba.size) > MAX_SIDE:
        scale = MAX_SIDE / max(rgba.size)
        rgba = rgba.resize((max(round(rgba.width * scale), 1), max(round(rgba.height * scale), 1)), Image.Resampling.LANCZOS, reducing_gap=3.0)
    pixels = torch.from_numpy(np.array(rgba)).float() / 255
    if not bool((pixels[..., 3] > 0).any()):
        raise NearError("photo-transparent", f"{name} is fully transparent.", "Export it with the object visible.")
    return Photo(pixels[..., :3].contiguous(), pixels[..., 3].contiguous(), hashlib.sha256(data).hexdigest())


def _decode(data: bytes, name: str) -> Image.Image:
    """RGBA image in sRGB, upright."""
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise _too_big(name, "more pixels than can be handled") from error
    except Exception as error:
        raise NearError("photo-not-an-image", f"{name} is not an image this program can read.", "Save it as PNG, JPEG, WebP or TIFF.") from error
    with image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise _too_big(name, f"{width} x {height} pixels")
        if min(width, height) < MIN_SIDE:
            raise NearError("photo-too-small", f"{name} has only {width} x {height} pixels.", f"Use a photo of at least {MIN_SIDE} pixels a side.")
        image.draft(None, (MAX_SIDE, MAX_SIDE))  # a JPEG decoder need not decode what is thrown away
        try:
            image.load()
            return _to_rgba(_to_srgb(ImageOps.exif_transpose(image)))
        except MemoryError as error:
            raise _too_big(name, f"{width} x {height} pixels") from error
        except Exception as error:
            raise NearError("photo-damaged", f"{name} is cut off or damaged.", "Copy or export the photo again.") from error


def _read(source: str | Path | bytes) -> tuple[bytes, str]:
    if isinstance(source, (bytes, bytearray, memoryview)):
        data, name = bytes(source), "The photo"
    else:
        path = Path(source)
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                raise _too_big(path.name, f"{path.stat().st_size >> 20} MB")
            data, name = path.read_bytes(), path.name
        except FileNotFoundError as error:
            raise NearError("photo-missing", f"There is no file {path.name}.", "Check the path of the photo.") from error
        except OSError as error:
            raise NearError("cannot-read", f"{path.name} cannot be read ({error.strerror}).", "Check that it is a file you may read.") from error
    if len(data) > MAX_FILE_BYTES:
        raise _too_big(name, f"{len(data) >> 20} MB")
    return data, name


def _too_big(name: str, what: str) -> NearError:
    return NearError("photo-too-big", f"{name} is too big: {what}.", "Reduce it, for example to 4096 pixels on the longer side.")


def _to_srgb(image: Image.Image) -> Image.Image:
    """Apply an embedded colour profile; a broken or grey one is ignored."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    try:
        target = ImageCms.createProfile("sRGB")
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        return ImageCms.profileToProfile(image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), target, outputMode=mode) or image
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image


def _to_rgba(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.asarray(image, np.float64)
        full = 1.0 if image.mode == "F" and np.nanmax(grey) <= 1.0 else 65535.0 if np.nanmax(grey) > 255 else 255.0
        image = Image.fromarray((np.nan_to_num(grey) / full * 255).round().clip(0, 255).astype(np.uint8))
    return image.convert("RGBA")


def square_crop(photo: Photo, size: int, ratio: float = 1.2) -> Tensor:
    """The published image preprocessing: a square of ``ratio`` times the object's longer side around it, resized.

    Returns: float32 [size, size, 4], multiples of 1/255, colours not premultiplied; outside the photo it is transparent.
    Raises:
        NearError: ``photo-no-object`` when alpha shows nothing solid.
    """
    rgba = np.concatenate([photo.srgb.numpy(), photo.alpha.numpy()[..., None]], -1)
    rgba = (rgba * 255).round().clip(0, 255).astype(np.uint8)
    rows, columns = np.nonzero(rgba[..., 3] > SOLID * 255)
    if not len(rows):
        raise no_object()
    left, top, right, bottom = columns.min(), rows.min(), columns.max(), rows.max()
    middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
    half = int(max(right - left, bottom - top) * ratio) // 2
    half = max(half, 1)
    image = Image.fromarray(rgba).crop((middle_x - half, middle_y - half, middle_x + half, middle_y + half))
    image = image.resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).float() / 255


def no_object() -> NearError:
    """Nothing solid in the photo."""
    return NearError("photo-no-object", "No object was found in the photo.", "Give a photo whose background is transparent, or plain and different from the object.")
