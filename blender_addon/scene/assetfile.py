"""Reads what Blender needs of a `.near` file (one safetensors file, DESIGN section 4): its record and its proxy mesh."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from ..errors import NearError

_MAX_HEADER = 16 << 20
_shas: dict[str, str] = {}             # path, size, mtime -> sha256


def state_of(path: Path) -> str:
    """Names the file's content without reading it. Raises NearError `asset-file-missing`."""
    try:
        info = os.stat(path)
    except OSError as error:
        raise _missing(path, error) from None
    return f"{path} {info.st_size} {info.st_mtime_ns}"


def sha256_of(path: Path) -> str:
    """The file's hash, computed once per state of the file. Raises OSError."""
    info = os.stat(path)
    key = f"{path} {info.st_size} {info.st_mtime_ns}"
    if key not in _shas:
        if len(_shas) > 500:
            _shas.clear()
        _shas[key] = hashlib.sha256(path.read_bytes()).hexdigest()
    return _shas[key]


def read_record(path: Path) -> dict:
    """The asset's record: pack, seed, provenance, `photo_camera` {"cam_from_asset", "K", "width", "height"} if it has one.

    Raises:
        NearError: `asset-file-missing`, `asset-damaged`.
    """
    return _header(path)[0]


def read_proxy(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """-> vertices float32 [V, 3] in asset space, faces int32 [F, 3]. Without a proxy in the file: a unit cube.

    Raises:
        NearError: as `read_record`.
    """
    _, header, start = _header(path)
    if "proxy_vertices" not in header or "proxy_faces" not in header:
        return _cube()
    try:
        vertices = _tensor(path, header["proxy_vertices"], start, "F32", np.float32)
        faces = _tensor(path, header["proxy_faces"], start, "I32", np.int32)
    except (KeyError, TypeError, ValueError, OSError):
        raise _damaged(path) from None
    if len(faces) and not 0 <= faces.min() <= faces.max() < len(vertices):
        raise _damaged(path)
    return vertices, faces


def _header(path: Path) -> tuple[dict, dict, int]:
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= _MAX_HEADER:
                raise _damaged(path)
            header = json.loads(file.read(size))
            return json.loads(header["__metadata__"]["near"]), header, 8 + size
    except OSError as error:
        raise _missing(path, error) from None
    except (ValueError, KeyError, TypeError):
        raise _damaged(path) from None


def _tensor(path: Path, entry: dict, start: int, dtype: str, kind: type) -> np.ndarray:
    begin, end = entry["data_offsets"]
    rows, columns = entry["shape"]
    if entry["dtype"] != dtype or columns != 3 or end - begin != rows * 12 or rows > 10_000_000:
        raise ValueError
    with open(path, "rb") as file:
        file.seek(start + begin)
        return np.frombuffer(file.read(end - begin), kind).reshape(rows, 3)


def _missing(path: Path, error: OSError) -> NearError:
    return NearError("asset-file-missing", f"The asset file {path.name} cannot be read ({error.strerror}).",
                     "Find the file, or create the asset again.")


def _damaged(path: Path) -> NearError:
    return NearError("asset-damaged", f"{path.name} is not a NeAR asset, or it is damaged.", "Find an undamaged copy, or create it again.")


def _cube() -> tuple[np.ndarray, np.ndarray]:
    corners = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)], np.float32)
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    return corners, np.array([t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))], np.int32)
