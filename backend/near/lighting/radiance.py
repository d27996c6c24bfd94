"""Radiance .hdr (RGBE) reader: flat, old and new run-length scanlines. Format: Ward, "Real Pixels", Graphics Gems II.

Our own, because the libraries at hand read .hdr only with a downloaded plug-in.
"""

from __future__ import annotations

import re

import numpy as np

from near.compiled import compiled
from near.errors import NearError

MAGIC = (b"#?RADIANCE", b"#?RGBE")
_SIZE = re.compile(rb"([-+])([XY]) (\d{1,6}) ([-+])([XY]) (\d{1,6})$")
_NEW_RLE_WIDTHS = range(8, 0x8000)


def decode_radiance(data: bytes, max_pixels: int) -> np.ndarray:
    """[H, W, 3] float32 in the file's own values (EXPOSURE and COLORCORR undone), top row first.

    Raises:
        NearError: ``light-unreadable`` (not Radiance, XYZE, cut short, corrupt), ``light-too-large``.
    """
    if not data.startswith(MAGIC):
        raise _broken("it does not start as a Radiance file does")
    head_end = data.find(b"\n\n")
    size_end = data.find(b"\n", head_end + 2) if head_end >= 0 else -1
    if size_end < 0:
        raise _broken("its header never ends")
    scale = _scale(data[:head_end].splitlines())
    match = _SIZE.match(data[head_end + 2 : size_end].strip())
    if match is None or match[2] == match[5]:
        raise _broken("it states no image size")
    outer, inner = int(match[3]), int(match[6])
    if outer * inner > max_pixels:
        raise NearError("light-too-large", f"The light has {outer * inner / 1e6:.0f} million pixels; the limit is {max_pixels / 1e6:.0f}.",
                        "Save it smaller; 4096 x 2048 is plenty for lighting.")
    body = np.frombuffer(data, np.uint8, offset=size_end + 1)
    # Every scanline costs at least a few bytes: a short file that claims a large picture fails before allocation.
    if outer < 1 or inner < 1 or len(body) < outer * 4 * max(1, inner // 256 // 127):
        raise _broken("the file is cut short")
    rgbe = np.empty((outer, inner, 4), np.uint8)
    rows = _decode(body, rgbe, inner in _NEW_RLE_WIDTHS)
    if rows < outer:
        raise _broken(f"it is cut short or corrupt after {rows} of {outer} scanlines")
    rgb = np.where(rgbe[..., 3:] > 0, np.ldexp(rgbe[..., :3].astype(np.float32), rgbe[..., 3:].astype(np.int32) - 136), np.float32(0))
    return np.ascontiguousarray(_upright(rgb, match) * scale)


def _scale(lines: list[bytes]) -> np.ndarray:
    scale = np.ones(3)
    for line in lines:
        key, _, value = line.partition(b"=")
        if key == b"FORMAT" and value.strip() != b"32-bit_rle_rgbe":
            raise _broken(f"its pixel format is {value.strip().decode(errors='replace')}, not RGBE")
        if key in (b"EXPOSURE", b"COLORCORR"):
            try:
                factor = np.array([float(v) for v in value.split()])
            except ValueError as error:
                raise _broken(f"its {key.decode()} line is not a number") from error
            if factor.size not in (1, 3) or not (np.isfinite(factor) & (factor > 0)).all():
                raise _broken(f"its {key.decode()} line is not usable")
            scale = scale / factor
    return scale.astype(np.float32)


def _upright(rgb: np.ndarray, match: re.Match) -> np.ndarray:
    """Rows from the top, columns from the left, for any of the eight stored orientations."""
    first_sign, first_axis, second_sign = match[1], match[2], match[4]
    y_sign, x_sign = (first_sign, second_sign) if first_axis == b"Y" else (second_sign, first_sign)
    rgb = rgb if first_axis == b"Y" else rgb.transpose(1, 0, 2)
    rgb = rgb if y_sign == b"-" else rgb[::-1]
    return rgb if x_sign == b"+" else rgb[:, ::-1]


def _broken(why: str) -> NearError:
    return NearError("light-unreadable", f"The .hdr file cannot be read: {why}.", "Export it again as Radiance HDR or EXR.")


@compiled()
def _decode(body, rgbe, may_be_new):
    """Fill rgbe [H, W, 4]; returns the number of whole scanlines."""
    height, width = rgbe.shape[0], rgbe.shape[1]
    at = 0
    for y in range(height):
        if at + 4 > len(body):
            return y
        if may_be_new and body[at] == 2 and body[at + 1] == 2 and (body[at + 2] << 8 | body[at + 3]) == width:
            at = _new_scanline(body, at + 4, rgbe[y])
        else:
            at = _old_scanline(body, at, rgbe[y])
        if at < 0:
            return y
    return height


@compiled()
def _new_scanline(body, at, line):
    """Four planes, each in runs (count > 128) and literals. Returns the next offset or -1."""
    width = line.shape[0]
    for c in range(4):
        x = 0
        while x < width:
            if at >= len(body):
                return -1
            count = int(body[at])
            at += 1
            run = count > 128
            if run:
                count -= 128
            if count == 0 or x + count > width or at + (1 if run else count) > len(body):
                return -1
            for k in range(count):
                line[x + k, c] = body[at] if run else body[at + k]
            at += 1 if run else count
            x += count
    return at


@compiled()
def _old_scanline(body, at, line):
    """Pixels; (1, 1, 1, n) repeats the previous one n times, consecutive repeats shift by 8 bits. Returns offset or -1."""
    width = line.shape[0]
    x = shift = 0
    while x < width:
        if at + 4 > len(body):
            return -1
        if body[at] == 1 and body[at + 1] == 1 and body[at + 2] == 1:
            count = int(body[at + 3]) << shift
            if x == 0 or shift > 16 or x + count > width:
                return -1
            for k in range(count):
                line[x + k] = line[x - 1]
            x += count
            shift += 8
        else:
            for c in range(4):
                line[x, c] = body[at + c]
            x += 1
            shift = 0
        at += 4
    return at
