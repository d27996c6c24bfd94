"""The asset file `.near`: one safetensors file with a JSON record (DESIGN section 4).

The header is read by us, not by a library, so that every size is checked against the file before memory is taken.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from near.assets.types import Anchors, Asset
from near.errors import NearError

FORMAT, VERSION = "near-asset", 1
MAX_HEADER_BYTES, MAX_FILE_BYTES = 16 << 20, 4 << 30
_DTYPES = {"U8": np.uint8, "I8": np.int8, "I32": np.int32, "F16": np.float16, "F32": np.float32}
_NAMES = {np.dtype(v): k for k, v in _DTYPES.items()}
_ANCHOR_FIELDS = tuple(f.name for f in fields(Anchors))
_PLAIN = ("coords", "feats", "color_feats", "brm_feats", "proxy_vertices", "proxy_faces")


def encode_asset(asset: Asset) -> bytes:
    """The file's bytes; equal assets give equal bytes (sorted names, sorted JSON keys).

    Raises:
        NearError: ``asset-meta`` when the metadata is not JSON.
    """
    try:
        record = json.dumps({**asset.meta, "format": FORMAT, "version": VERSION, "resolution": asset.resolution},
                            sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise NearError("asset-meta", f"The asset's record cannot be written as JSON ({error}).",
                        "Keep only text, numbers, lists and objects in it.") from error
    header: dict[str, Any] = {"__metadata__": {"near": record}}
    chunks, offset = [], 0
    # Wide types first keeps every tensor aligned to its own size.
    arrays = {name: np.ascontiguousarray(t.detach().cpu().numpy()) for name, t in asset.tensors().items()}
    for name in sorted(arrays, key=lambda n: (-arrays[n].itemsize, n)):
        array = arrays[name]
        header[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [offset, offset + array.nbytes]}
        chunks.append(array.tobytes())
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *chunks])


def save_asset(path: str | os.PathLike, asset: Asset) -> None:
    """Write ``asset``; the file appears whole or not at all.

    Raises:
        NearError: ``disk-full``, ``no-permission``, ``cannot-write``, ``asset-meta``.
    """
    write_atomic(Path(path), encode_asset(asset))


def load_asset(path: str | os.PathLike) -> Asset:
    """Read an asset file of this or an older format version; memory is bounded by the file's size.

    Raises:
        NearError: ``asset-missing``, ``cannot-read``, ``asset-damaged``, ``asset-not-ours``, ``asset-too-new``,
            ``asset-invalid``.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                raise _damaged(path.name, "it is larger than any asset")
            data = file.read()
    except FileNotFoundError as error:
        raise NearError("asset-missing", f"There is no asset file {path.name}.", "Check the path, or create the asset again.") from error
    except OSError as error:
        raise NearError("cannot-read", f"{path.name} cannot be read ({error.strerror}).", "Check that it is a file you may read.") from error
    return decode_asset(data, path.name)


def decode_asset(data: bytes, name: str = "The asset") -> Asset:
    """Inverse of :func:`encode_asset`; ``name`` is used in messages. Raises as :func:`load_asset`."""
    tensors, metadata = _read_container(data, name)
    record = _read_record(metadata, name)
    unknown = set(tensors) - set(_PLAIN) - {f"anchors.{f}" for f in _ANCHOR_FIELDS}
    if unknown:
        raise _damaged(name, f"it holds an unknown part, {sorted(unknown)[0]}")
    if "coords" not in tensors or "feats" not in tensors:
        raise _damaged(name, "its voxels are missing")
    present = [f for f in _ANCHOR_FIELDS if f"anchors.{f}" in tensors]
    if present and len(present) != len(_ANCHOR_FIELDS):
        raise _damaged(name, "some of its surface discs' parts are missing")
    anchors = Anchors(**{f: tensors[f"anchors.{f}"] for f in present}) if present else None
    resolution = record.pop("resolution")
    meta = {k: v for k, v in record.items() if k not in ("format", "version")}
    return Asset(resolution=resolution, anchors=anchors, meta=meta, **{k: tensors.get(k) for k in _PLAIN})


def file_sha256(path: str | os.PathLike) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(name: str, why: str) -> NearError:
    return NearError("asset-damaged", f"{name} is not a complete asset file: {why}.", "Copy it again from the original, or create the asset again.")


def _read_container(data: bytes, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    if len(data) < 8:
        raise _damaged(name, "it is too short")
    length = int.from_bytes(data[:8], "little")
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise _damaged(name, "its header is cut off or it is another kind of file")
    try:
        header = json.loads(data[8:8 + length])
    except (ValueError, RecursionError) as error:
        raise _damaged(name, "its header cannot be read") from error
    if not isinstance(header, dict):
        raise _damaged(name, "its header is not a table")
    metadata = header.pop("__metadata__", {})
    body = memoryview(data)[8 + length:]
    spans, tensors = [], {}
    for key, entry in header.items():
        begin, end, array = _tensor(key, entry, body, name)
        spans.append((begin, end))
        tensors[key] = array
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise _damaged(name, "its parts overlap or leave gaps")
        position = end
    if position != len(body):
        raise _damaged(name, f"{len(body) - position} bytes too many")
    return tensors, metadata if isinstance(metadata, dict) else {}


def _tensor(key: str, entry: Any, body: memoryview, name: str) -> tuple[int, int, Tensor]:
    try:
        dtype = np.dtype(_DTYPES[entry["dtype"]])
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(name, f"its table of parts is wrong at {key!r}") from error
    if not all(type(n) is int and 0 <= n <= MAX_FILE_BYTES for n in numbers) or len(shape) > 4:
        raise _damaged(name, f"its table of parts is wrong at {key!r}")
    if end > len(body):
        raise _damaged(name, f"it ends inside {key!r}")
    if begin + prod(shape) * dtype.itemsize != end:
        raise _damaged(name, f"the size of {key!r} does not fit its shape")
    array = np.frombuffer(body[begin:end], dtype=dtype.newbyteorder("<")).reshape(shape)
    return begin, end, torch.from_numpy(array.copy())


def _read_record(metadata: dict, name: str) -> dict[str, Any]:
    if not isinstance(metadata.get("near"), str):
        raise NearError("asset-not-ours", f"{name} is a safetensors file, but not an asset.", "Choose a file written by this program (.near).")
    try:
        record = json.loads(metadata["near"])
    except (ValueError, RecursionError) as error:
        raise _damaged(name, "its record cannot be read") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT or type(record.get("version")) is not int:
        raise _damaged(name, "its record is incomplete")
    if record["version"] > VERSION:
        raise NearError("asset-too-new", f"{name} has format version {record['version']}; this program reads up to {VERSION}.",
                        "Update the program.")
    record = migrate_record(record, name)
    if type(record.get("resolution")) is not int:
        raise _damaged(name, "its record does not give the resolution")
    return record


# version -> function that lifts a record of that version to the next one
MIGRATIONS: dict[int, Any] = {}


def migrate_record(record: dict[str, Any], name: str = "The asset", migrations: dict[int, Any] | None = None,
                   target: int = VERSION) -> dict[str, Any]:
    """Lift a record written by an older program, one version at a time."""
    migrations = MIGRATIONS if migrations is None else migrations
    while record["version"] < target:
        step = migrations.get(record["version"])
        if step is None:
            raise _damaged(name, f"format version {record['version']} was never written")
        record = {**step(dict(record)), "version": record["version"] + 1}
    return record


def write_atomic(path: Path, data: bytes) -> None:
    """Write through a temporary file beside ``path``, flushed to disk, then renamed over it.

    Raises:
        NearError: ``disk-full``, ``no-permission``, ``cannot-write``; the temporary file is removed and an older file
            at ``path`` is left as it was.
    """
    # Not mkstemp: its mode 0600 would hide shared assets from a farm; here the user's umask decides.
    temporary = path.parent / f".{path.name[:80]}.{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        _remove(temporary)
        raise _write_error(path, error) from error
    except BaseException:
        _remove(temporary)
        raise
    _sync_folder(path.parent)


def _remove(temporary: Path) -> None:
    try:
        temporary.unlink()
    except OSError:
        pass


def _sync_folder(folder: Path) -> None:
    """The rename itself reaches the disk; not every system can open a folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def _write_error(path: Path, error: OSError) -> NearError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NearError("disk-full", f"There is no room to write {path.name}.", "Free some space or choose another folder.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return NearError("no-permission", f"{path.name} may not be written in {path.parent}.", "Choose a folder you may write to.")
    if error.errno == errno.ENOENT:
        return NearError("cannot-write", f"The folder {path.parent} does not exist.", "Create it or choose another folder.")
    return NearError("cannot-write", f"{path.name} could not be written ({error.strerror}).", "Choose another place to write to.")
