"""Published SLATs: `.npz` files of the NeAR repository (NEAR-SPEC section 10)."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy

from near.assets.types import Asset
from near.errors import NearError

RESOLUTION = 64
MAX_VOXELS = RESOLUTION ** 3
_MAX_BYTES = 1 << 30
_MAX_CHANNELS = 256


def import_npz(path: str | os.PathLike) -> Asset:
    """Read a published SLAT: ``coords`` [N, 3] (or [N, 4] with a leading batch column), ``feats`` [N, C], and ``color_feats`` and
    ``brm_feats`` where they are. Rows are put in lexicographic order. Values are de-normalised already and stay so.

    Raises:
        NearError: ``slat-missing``, ``cannot-read``, ``slat-damaged``, ``slat-invalid``.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise _damaged(path.name, "it is larger than any SLAT")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise NearError("slat-missing", f"There is no file {path.name}.", "Check the path.") from error
    except OSError as error:
        raise NearError("cannot-read", f"{path.name} cannot be read ({error.strerror}).", "Check that it is a file you may read.") from error
    arrays = _read_arrays(data, path.name)
    if "coords" not in arrays or "feats" not in arrays:
        raise _damaged(path.name, "coords or feats are missing")
    coords = _coords(arrays["coords"], path.name)
    order = np.lexsort(coords.T[::-1])
    coords = coords[order]
    if len(coords) > 1 and (np.diff(coords.astype(np.int64) @ (65536, 256, 1)) == 0).any():
        raise _invalid(path.name, "a voxel is named twice")
    feats = {name: _feats(arrays[name], order, name, path.name) for name in ("feats", "color_feats", "brm_feats") if name in arrays}
    return Asset(coords=torch.from_numpy(coords), resolution=RESOLUTION, **feats,
                 meta={"kind": "import", "source": path.name[:255], "slat_sha256": hashlib.sha256(data).hexdigest()})


def _damaged(name: str, why: str) -> NearError:
    return NearError("slat-damaged", f"{name} is not a complete SLAT file: {why}.", "Download or copy it again.")


def _invalid(name: str, why: str) -> NearError:
    return NearError("slat-invalid", f"{name} is not a SLAT this program can use: {why}.", "Choose a SLAT written by the published NeAR code.")


def _read_arrays(data: bytes, name: str) -> dict[str, np.ndarray]:
    """Arrays of the archive; each one's header is checked before its data is unpacked, and pickled ones are refused."""
    arrays = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for wanted in ("coords", "feats", "color_feats", "brm_feats"):
                if f"{wanted}.npy" not in archive.namelist():
                    continue
                with archive.open(f"{wanted}.npy") as member:
                    version = npy.read_magic(member)
                    reader = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
                    if reader is None:
                        raise ValueError("unknown array version")
                    shape, fortran, dtype = reader(member)
                    if dtype.hasobject or dtype.kind not in "uif" or len(shape) != 2 or not 0 <= shape[0] <= MAX_VOXELS or not 1 <= shape[1] <= _MAX_CHANNELS:
                        raise ValueError(f"{wanted} has an unusable type or shape")
                    size = shape[0] * shape[1] * dtype.itemsize
                    raw = member.read(size + 1)
                    if len(raw) != size:
                        raise ValueError(f"{wanted} is cut off")
                    arrays[wanted] = np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran else "C")
    except Exception as error:  # zip, zlib and header parsers raise many kinds on damaged data
        raise _damaged(name, str(error)[:100] or type(error).__name__) from error
    return arrays


def _coords(coords: np.ndarray, name: str) -> np.ndarray:
    if coords.dtype.kind not in "ui" or coords.shape[1] not in (3, 4):
        raise _invalid(name, "its coords are not three integers each")
    if not len(coords):
        raise _invalid(name, "it has no voxels")
    if coords.shape[1] == 4:
        if (coords[:, 0] != coords[0, 0]).any():
            raise _invalid(name, "it holds more than one object")
        coords = coords[:, 1:]
    if int(coords.min()) < 0 or int(coords.max()) >= RESOLUTION:
        raise _invalid(name, f"a voxel lies outside the grid of {RESOLUTION}")
    return np.ascontiguousarray(coords, np.uint8)


def _feats(values: np.ndarray, order: np.ndarray, part: str, name: str) -> torch.Tensor:
    if values.dtype.kind != "f" or len(values) != len(order):
        raise _invalid(name, f"{part} does not fit its voxels")
    with np.errstate(over="ignore"):
        half = values[order].astype(np.float16)
    if not np.isfinite(half).all():
        raise _invalid(name, f"{part} holds values that are not finite")
    return torch.from_numpy(half)
