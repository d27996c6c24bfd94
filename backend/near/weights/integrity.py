"""Checksums, manifests and the lock file.

A manifest or lock entry lists every file of a part with its sha256. A file that differs is refused by name. Hashing
gigabytes takes seconds, so a file that was verified once is re-hashed only when its size or time stamp changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from near.errors import NearError

FORMAT = 1
STAMPS = ".verified.json"
CHUNK = 1 << 20


@dataclass(frozen=True)
class FileRecord:
    """Expected content of one file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class LockEntry:
    """What was installed for one part. ``trust``: ``published`` (checksum known in advance or told by the hub) or
    ``first-use``; ``accepted``: UTC date on which the licence was accepted."""

    repo: str
    revision: str
    source: str
    licence: str
    accepted: str
    trust: str
    files: dict[str, FileRecord] = field(default_factory=dict)


def sha256_file(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def safe_relative(name: str) -> PurePosixPath:
    """A file name from a listing, checked to stay inside its folder.

    Raises: NearError ``weights-path``.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in name or ":" in name:
        raise NearError("weights-path", f"The weights list a file outside their folder: {name!r}.", "Do not use this source.")
    return path


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(data, stream, indent=1, sort_keys=True)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(path: Path, code: str) -> Any:
    """Parse a JSON file. Raises: NearError ``code`` when it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NearError(code, f"{path.name} cannot be read: {error}.", "Remove the weights and pull them again.") from error


def read_lock(home: Path) -> dict[str, LockEntry]:
    """Entries of ``home/lock.json`` by part name; empty if there is none."""
    path = home / "lock.json"
    if not path.exists():
        return {}
    data = read_json(path, "weights-lock")
    try:
        return {name: LockEntry(**{**entry, "files": {f: FileRecord(**r) for f, r in entry["files"].items()}})
                for name, entry in data["parts"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise NearError("weights-lock", f"The lock file {path} is damaged.", "Delete it and pull the weights again.") from error


def write_lock(home: Path, entries: dict[str, LockEntry]) -> None:
    """Replace the lock file atomically."""
    write_json(home / "lock.json", {"format": FORMAT, "parts": {name: asdict(entry) for name, entry in entries.items()}})


def check_files(folder: Path, files: dict[str, FileRecord], what: str, *, use_stamps: bool = False) -> None:
    """Compare a folder with its records.

    Args: what: name of the part, for the message. use_stamps: skip files whose size and time are those last verified.
    Raises: NearError ``weights-missing`` or ``weights-tampered``, naming the file.
    """
    stamp_path = folder / STAMPS
    stamps: dict[str, list] = {}
    if use_stamps and stamp_path.exists():
        try:
            stamps = json.loads(stamp_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            stamps = {}  # only a cache: hash everything again
    fresh: dict[str, list] = {}
    for name, record in files.items():
        path = folder / safe_relative(name)
        try:
            status = path.stat()
        except OSError:
            raise NearError("weights-missing", f"{what}: the file {name} is missing.",
                            f"Run `near weights pull {what}`.") from None
        stamp = [record.sha256, status.st_size, status.st_mtime_ns]
        if stamps.get(name) != stamp and (status.st_size != record.bytes or sha256_file(path) != record.sha256):
            raise NearError("weights-tampered", f"{what}: the file {name} is not the one that was published or first pulled.",
                            f"Run `near weights remove {what}` and `near weights pull {what}`.")
        fresh[name] = stamp
    if fresh != stamps:
        try:
            write_json(stamp_path, fresh)
        except OSError:
            pass  # a read-only installation just hashes again next time


def record_folder(folder: Path, names: list[str]) -> dict[str, FileRecord]:
    """Hash files of a folder."""
    return {name: FileRecord(sha256_file(folder / name), (folder / name).stat().st_size) for name in sorted(names)}


def write_manifest(folder: Path, pack: str, meta: dict[str, Any]) -> dict[str, Any]:
    """Write ``manifest.json`` of a shipped pack: every file under ``folder`` with its sha256, and ``meta``."""
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*")
             if p.is_file() and p.name not in ("manifest.json", STAMPS) and "__pycache__" not in p.parts and p.suffix != ".py"]
    manifest = {"format": FORMAT, "pack": pack, "meta": meta,
                "files": {name: asdict(record) for name, record in record_folder(folder, names).items()}}
    write_json(folder / "manifest.json", manifest)
    return manifest


def verify_manifest(folder: Path, pack: str) -> dict[str, Any]:
    """Check a shipped pack against its manifest and return the manifest.

    Raises: NearError ``weights-missing``, ``weights-manifest``, ``weights-tampered``.
    """
    path = folder / "manifest.json"
    if not path.exists():
        raise NearError("weights-missing", f"The {pack} weights are not part of this installation.", "Reinstall near-relight.")
    manifest = read_json(path, "weights-manifest")
    try:
        records = {name: FileRecord(**record) for name, record in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise NearError("weights-manifest", f"The manifest of {pack} is damaged.", "Reinstall near-relight.") from error
    for name, record in records.items():
        file = folder / safe_relative(name)
        if not file.is_file() or file.stat().st_size != record.bytes or sha256_file(file) != record.sha256:
            raise NearError("weights-tampered", f"{pack}: the file {name} is not the one that was shipped.",
                            "Reinstall near-relight.")
    return manifest


def manifest_digest(folder: Path) -> str:
    """sha256 that stands for a shipped pack's weights: of its sorted file checksums."""
    manifest = read_json(folder / "manifest.json", "weights-manifest")
    lines = "".join(f"{record['sha256']}  {name}\n" for name, record in sorted(manifest["files"].items()))
    return hashlib.sha256(lines.encode()).hexdigest()
