"""Reading lights from files: OpenEXR and Radiance .hdr, checked."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np

from near.errors import NearError
from near.lighting.environment import Environment, environment_from_array
from near.lighting.radiance import MAGIC, decode_radiance

MAX_PIXELS = 16384 * 8192
_EXR_MAGIC = b"\x76\x2f\x31\x01"


def load_environment(path: str | Path, allow_repair: bool = False) -> Environment:
    """Environment from an equirectangular EXR or .hdr file (told apart by content, not by name), unrotated, strength 1.

    Args:
        allow_repair: replace NaN and negative values by 0 and cap infinities instead of refusing.
    Raises:
        NearError: ``light-missing``, ``light-unreadable``, ``light-format``, ``light-too-large``, ``light-shape``,
            ``light-not-finite``, ``light-negative``.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(16)
            if head.startswith(_EXR_MAGIC):
                pixels = _read_exr(path)
            elif head.startswith(MAGIC):
                file.seek(0)
                pixels = decode_radiance(file.read(), MAX_PIXELS)
            elif not head:
                raise NearError("light-unreadable", "The file is empty.", "Download or export it again.")
            else:
                raise NearError("light-format", "It is neither an OpenEXR nor a Radiance .hdr file.",
                                "Choose an HDRI in one of these formats; 8-bit pictures do not hold the brightness of lights.")
        return environment_from_array(pixels, allow_repair)
    except NearError as error:
        raise NearError(error.code, f"{path.name}: {error.what[0].lower() if error.what.startswith(('The ', 'It ')) else error.what[0]}{error.what[1:]}",
                        error.remedy) from error
    except FileNotFoundError as error:
        raise NearError("light-missing", f"There is no light file {path}.", "Check the path.") from error
    except IsADirectoryError as error:
        raise NearError("light-missing", f"{path} is a folder, not a light file.", "Name an .exr or .hdr file.") from error
    except OSError as error:
        raise NearError("light-unreadable", f"The light file {path} cannot be opened ({error.strerror}).",
                        "Check the file and its permissions.") from error


def _read_exr(path: Path) -> np.ndarray:
    """[H, W, 3 or 1] float32 of the first part that holds a picture."""
    import OpenEXR

    try:
        with OpenEXR.File(str(path), header_only=True) as file:
            for part in file.parts:
                _check_size(part.header["dataWindow"])
            promised = any(_rgb({c.name: c for c in part.header["channels"]}, names_only=True) for part in file.parts)
        # The binding prints a warning and returns no channels where pixels cannot be decoded.
        with contextlib.redirect_stdout(io.StringIO()), OpenEXR.File(str(path), separate_channels=True) as file:
            for part in file.parts:
                pixels = _rgb(part.channels)
                if pixels is not None:
                    return pixels
    except NearError:
        raise
    except Exception as error:  # the binding raises RuntimeError, ValueError, UnicodeDecodeError or its own types
        raise NearError("light-unreadable", "The EXR file is damaged or cut short.", "Download or export it again.") from error
    if promised:
        raise NearError("light-unreadable", "The EXR file is damaged or cut short.", "Download or export it again.")
    raise NearError("light-format", "The EXR file holds no R, G, B (or Y) channels.", "Export the environment as an RGB EXR.")


def _check_size(data_window) -> None:
    low, high = (np.asarray(v, np.int64) for v in data_window)
    width, height = (int(v) for v in high - low + 1)
    if width * height > MAX_PIXELS:
        raise NearError("light-too-large", f"The light has {width * height / 1e6:.0f} million pixels; the limit is {MAX_PIXELS / 1e6:.0f}.",
                        "Save it smaller; 4096 x 2048 is plenty for lighting.")


def _rgb(channels: dict, names_only: bool = False):
    """R, G, B of the picture or of its first layer, else Y as grey; None where there is neither."""
    for name in ["R", *(n for n in channels if n.endswith(".R"))]:
        trio = [name[:-1] + c for c in "RGB"]
        if all(t in channels for t in trio):
            if names_only:
                return trio
            planes = [np.asarray(channels[t].pixels) for t in trio]
            if len({p.shape for p in planes}) == 1:
                return np.stack(planes, -1).astype(np.float32)
    if "Y" in channels:
        return ["Y"] if names_only else np.asarray(channels["Y"].pixels, np.float32)[..., None]
    return None
