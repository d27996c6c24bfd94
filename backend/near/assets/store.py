"""A folder of assets named by their content."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

from near.assets.format import decode_asset, encode_asset, write_atomic
from near.assets.types import Asset
from near.errors import NearError

_SHA = re.compile(r"[0-9a-f]{64}")
_STALE_SECONDS = 3600  # a temporary file this old belongs to a writer that died


class AssetStore:
    """Content-addressed assets: ``<root>/<first two digits>/<sha256>.near``.

    Any number of processes may write at once: a file appears whole by rename, and two writers of one asset write the same
    bytes. A file that does not match its name is refused, never returned.
    """

    def __init__(self, root: str | os.PathLike) -> None:
        """Raises: NearError ``no-permission`` or ``cannot-write`` when the folder cannot be made."""
        self.root = Path(root)
        _make_folder(self.root)

    def path(self, sha256: str) -> Path:
        """Where an asset of that hash is or would be.

        Raises:
            NearError: ``asset-id-invalid`` for anything but 64 hexadecimal digits.
        """
        if not isinstance(sha256, str) or not _SHA.fullmatch(sha256):
            raise NearError("asset-id-invalid", f"{str(sha256)[:80]!r} is not an asset's id.", "Use the 64 hexadecimal digits the store gave.")
        return self.root / sha256[:2] / f"{sha256}.near"

    def put(self, asset: Asset) -> str:
        """Store an asset; returns its sha256. Raises as `save_asset`."""
        data = encode_asset(asset)
        sha256 = hashlib.sha256(data).hexdigest()
        target = self.path(sha256)
        # A damaged file of that name is written anew.
        if not (target.is_file() and target.stat().st_size == len(data) and _digest(target) == sha256):
            _make_folder(target.parent)
            write_atomic(target, data)
        return sha256

    def get(self, sha256: str) -> Asset:
        """Read an asset.

        Raises:
            NearError: ``asset-missing``, ``asset-damaged`` and those of `load_asset`.
        """
        target = self.path(sha256)
        try:
            data = target.read_bytes()
        except FileNotFoundError as error:
            raise NearError("asset-missing", f"The asset {sha256[:12]} is not in the store.", "Create it again, or copy it here.") from error
        except OSError as error:
            raise NearError("cannot-read", f"The asset {sha256[:12]} cannot be read ({error.strerror}).", "Check the store's folder.") from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise NearError("asset-damaged", f"The stored asset {sha256[:12]} has been damaged.", "Remove it and create it again.")
        return decode_asset(data, target.name)

    def __contains__(self, sha256: object) -> bool:
        return isinstance(sha256, str) and bool(_SHA.fullmatch(sha256)) and self.path(sha256).is_file()

    def list(self) -> list[str]:
        """Hashes of all assets, oldest first."""
        found = []
        for file in self.root.glob("??/*.near"):
            if _SHA.fullmatch(file.stem) and file.parent.name == file.stem[:2]:
                try:
                    found.append((file.stat().st_mtime_ns, file.stem))
                except FileNotFoundError:  # removed by another process meanwhile
                    continue
        return [stem for _, stem in sorted(found)]

    def size(self) -> int:
        """Bytes of all assets."""
        return sum(_size(self.path(sha)) for sha in self.list())

    def remove(self, sha256: str) -> bool:
        """Delete an asset; False when it was not there."""
        try:
            self.path(sha256).unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise NearError("no-permission", f"The asset {sha256[:12]} cannot be removed ({error.strerror}).", "Check the store's folder.") from error
        return True

    def gc(self, keep: Iterable[str], max_bytes: int = 0) -> list[str]:
        """Remove assets that are not in ``keep``, oldest first, until the others take no more than ``max_bytes``, and temporary
        files of writers that died. Returns the removed hashes."""
        kept = set(keep)
        loose = [sha for sha in self.list() if sha not in kept]
        total = sum(_size(self.path(sha)) for sha in loose)
        removed = []
        for sha in loose:
            if total <= max_bytes:
                break
            total -= _size(self.path(sha))
            if self.remove(sha):
                removed.append(sha)
        for file in self.root.glob("??/.*.tmp"):
            try:
                if time.time() - file.stat().st_mtime > _STALE_SECONDS:
                    file.unlink()
            except OSError:
                continue
        return removed


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except PermissionError as error:
        raise NearError("no-permission", f"The folder {folder} may not be created.", "Choose a folder you may write to.") from error
    except OSError as error:
        raise NearError("cannot-write", f"The folder {folder} could not be created ({error.strerror}).", "Choose another folder.") from error


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
