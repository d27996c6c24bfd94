"""Files that clients sent, named by their own sha256: each crosses the wire once, and no client names a path here."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path

from near import wire
from near.connection import private_folder
from near.errors import NearError

_SIGNATURES = ((b"\x89PNG", ".png"), (b"\xff\xd8\xff", ".jpg"), (b"II*\0", ".tif"), (b"MM\0*", ".tif"), (b"BM", ".bmp"),
               (b"\x76\x2f\x31\x01", ".exr"), (b"#?RADIANCE", ".hdr"), (b"#?RGBE", ".hdr"), (b"\x93NUMPY", ".npy"),
               (b"glTF", ".glb"), (b"ply\n", ".ply"), (b"ply\r", ".ply"))


@dataclass
class Partial:
    """An upload under way: chunks come in order, the hash grows with them."""
    path: Path
    size: int
    received: int = 0
    digest: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    touched: float = field(default_factory=time.monotonic)


class UploadStore:
    """Content-addressed folder with a quota; the least recently used files go first."""

    def __init__(self, folder: Path, quota: int, roots: tuple[Path, ...] = ()) -> None:
        self._folder, self._quota = private_folder(folder), quota
        self._roots = tuple(root.resolve() for root in roots)
        self._partial: dict[tuple[bytes, str], Partial] = {}
        self._known: dict[str, tuple[Path, float]] = {}      # where it is, when its use was last noted on disc
        for path in self._folder.iterdir():
            if path.name.startswith("."):
                path.unlink(missing_ok=True)
            else:
                self._known[path.stem] = path, 0.0

    def find(self, sha256: str) -> Path | None:
        """The file, marked as used, or None."""
        # An index, not a look into the folder: a pattern for every name that a client makes up would be cached for ever.
        found, used = self._known.get(sha256, (None, 0.0))
        if found is None:
            return None
        if time.monotonic() - used > 60:
            try:
                os.utime(found)
            except OSError:
                del self._known[sha256]
                return None
            self._known[sha256] = found, time.monotonic()
        return found

    def chunk(self, peer: bytes, request: wire.Upload, data: memoryview) -> dict:
        """One piece of an upload of client `peer`; -> {"offset": next wanted byte, "complete": bool}.

        Raises:
            NearError: `upload-damaged`, `upload-order`, `upload-refused`, `disc-full`.
        """
        if self.find(request.sha256) is not None:
            return {"offset": request.size, "complete": True}
        key = (peer, request.sha256)
        partial = self._partial.get(key)
        if partial is None or request.offset == 0:
            self._forget(key)
            partial = self._begin(key, request)
        if request.offset != partial.received or request.size != partial.size or not 0 < len(data) <= wire.MAX_CHUNK_BYTES \
                or partial.received + len(data) > partial.size:
            if request.offset < partial.received:  # a repeated chunk: say where we are
                return {"offset": partial.received, "complete": False}
            self._forget(key)
            raise NearError("upload-order", "The pieces of an upload did not fit together.", "Send the file again.")
        try:
            with open(partial.path, "ab") as file:
                file.write(data)
        except OSError as error:
            self._forget(key)
            raise NearError("disc-full", f"The backend could not store an upload ({error.strerror}).",
                            "Free some space on the backend's disc.") from None
        partial.digest.update(data)
        partial.received += len(data)
        partial.touched = time.monotonic()
        if partial.received < partial.size:
            return {"offset": partial.received, "complete": False}
        del self._partial[key]
        self._finish(partial.path, request.sha256, request.type, partial.digest.hexdigest())
        return {"offset": partial.received, "complete": True}

    def take_file(self, kind: str, name: str) -> str:
        """Takes in a copy of a file of this machine; -> sha256.

        Raises:
            NearError: `path-refused` unless it lies, links resolved, in a folder that the owner allowed.
        """
        refused = NearError("path-refused", "The backend does not read files at paths that clients name.",
                            "Upload the file, or start the backend with --allow-root FOLDER.")
        try:
            real = os.path.realpath(name, strict=True)    # no Path before it is known to be ours: its parts are kept for ever
        except (OSError, ValueError):
            raise refused from None
        if not any(os.path.commonpath([real, root]) == str(root) for root in self._roots):
            raise refused
        path = Path(real)
        if not any(path.is_relative_to(root) for root in self._roots) or not path.is_file() \
                or not 0 < path.stat().st_size <= wire.MAX_UPLOAD_BYTES:
            raise refused
        digest, part = hashlib.sha256(), self._folder / f".{os.urandom(8).hex()}.part"
        try:
            with open(path, "rb") as source, open(part, "wb") as target:
                while block := source.read(1 << 20):
                    digest.update(block)
                    target.write(block)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise NearError("file-unreadable", f"{path.name} could not be copied ({error.strerror}).",
                            "Check its permissions and the free space.") from None
        self._finish(part, digest.hexdigest(), kind, digest.hexdigest())
        return digest.hexdigest()

    def forget(self, peer: bytes) -> None:
        """Drops unfinished uploads of a client that left."""
        for key in [key for key in self._partial if key[0] == peer]:
            self._forget(key)

    def _begin(self, key: tuple[bytes, str], request: wire.Upload) -> Partial:
        if request.offset != 0:
            raise NearError("upload-order", "An upload did not start with its first piece.", "Send the file again.")
        mine = [k for k in self._partial if k[0] == key[0]]
        if len(mine) >= 4:
            self._forget(min(mine, key=lambda k: self._partial[k].touched))
        if request.size > self._quota:
            raise NearError("upload-refused", "The file is larger than the backend's whole store.", "Use a smaller file.")
        self._make_room(request.size)
        path = self._folder / f".{os.urandom(8).hex()}.part"
        path.touch(mode=0o600)
        self._partial[key] = Partial(path, request.size)
        return self._partial[key]

    def _forget(self, key: tuple[bytes, str]) -> None:
        partial = self._partial.pop(key, None)
        if partial is not None:
            partial.path.unlink(missing_ok=True)

    def _make_room(self, needed: int) -> None:
        files = []
        for path in self._folder.iterdir():
            info = path.stat()
            files.append((info.st_mtime, info.st_size, path))
        used = sum(size for _, size, _ in files) + sum(p.size - p.received for p in self._partial.values())
        for _, size, path in sorted(files):
            if used + needed <= self._quota:
                return
            if not path.name.startswith("."):
                path.unlink(missing_ok=True)
                self._known.pop(path.stem, None)
                used -= size

    def _finish(self, part: Path, sha256: str, kind: str, digest: str) -> None:
        try:
            if digest != sha256:
                raise NearError("upload-damaged", "An uploaded file is not the one its sha256 names.", "Send the file again.")
            suffix = sniff(part, kind)
            if kind == "mesh":
                refuse_references(part, suffix)
            target = self._folder / f"{sha256}{suffix}"
            os.replace(part, target)
            self._known[sha256] = target, 0.0
        finally:
            part.unlink(missing_ok=True)


def sniff(path: Path, kind: str) -> str:
    """The suffix that the content deserves, whatever the client called it.

    Raises:
        NearError: `upload-refused` when it is nothing that `kind` may be.
    """
    with open(path, "rb") as file:
        start = file.read(16)
    suffix = next((end for mark, end in _SIGNATURES if start.startswith(mark)), "")
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        suffix = ".webp"
    if start[4:12] in (b"ftypavif", b"ftypheic"):
        suffix = "." + start[8:12].decode()
    if kind == "mesh" and not suffix:
        suffix = ".obj"
    if kind == "asset":
        suffix = ".near"
    good = {"photo": (".png", ".jpg", ".tif", ".bmp", ".webp", ".avif", ".heic", ".exr"), "mesh": (".glb", ".ply", ".obj"),
            "hdri": (".exr", ".hdr", ".npy", ".png", ".jpg", ".tif"), "asset": (".near",)}[kind]
    if suffix not in good:
        raise NearError("upload-refused", f"The file is not a {kind} of a kind that is known here.",
                        f"Known are: {', '.join(good)}.")
    return suffix


def refuse_references(path: Path, suffix: str) -> None:
    """A mesh must bring everything itself: a file that names other files could be made to show those of the backend.

    Raises:
        NearError: `mesh-references`.
    """
    outside = False
    if suffix == ".obj":
        with open(path, "rb") as file:
            outside = any(line.lstrip()[:6] in (b"mtllib", b"maplib") for line in file)
    elif suffix == ".glb":
        with open(path, "rb") as file:
            head = file.read(20)
            try:
                length = struct.unpack("<I", head[12:16])[0]
                tree = json.loads(file.read(min(length, 64 << 20)))
                entries = [*tree.get("buffers", []), *tree.get("images", [])]
                outside = any("uri" in e and not str(e["uri"]).startswith("data:") for e in entries)
            except (ValueError, struct.error, AttributeError, TypeError, RecursionError):
                raise NearError("mesh-damaged", "The GLB file is damaged.", "Export it again.") from None
    if outside:
        raise NearError("mesh-references", "The mesh file refers to other files, which the backend cannot see.",
                        "Export it as GLB, with its textures inside.")
