"""Frames in memory that processes of one host share; standard library only.

A segment has no name in any file system where the system allows that (an anonymous memory file on Linux, a tagged
section on Windows), so nothing can be left behind however the processes end. Elsewhere it is a file in a private folder,
removed by its owner and swept at the next start. `multiprocessing.shared_memory` is not used: before Python 3.13 its
tracker removes segments that belong to others.

A segment begins with a page that holds a random tag. Its name carries the tag's hash, so a stale name (a recycled
process id) is noticed; the tag itself proves that a peer really could map it.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import secrets
import sys
from collections import OrderedDict
from pathlib import Path

DATA_START = 4096
_MAGIC = b"NEARSHM1"
_TAG_BYTES = 24


class Segment:
    """`size` bytes of data shared with whoever maps `name`; created by the owner, mapped by the others."""

    def __init__(self, name: str, size: int, memory: mmap.mmap, fd: int = -1, path: Path | None = None) -> None:
        self.name, self.size = name, size
        self._memory, self._fd, self._path = memory, fd, path

    @property
    def data(self) -> memoryview:
        """The data bytes, writable."""
        return memoryview(self._memory)[DATA_START:DATA_START + self.size]

    @property
    def proof(self) -> str:
        """Hex of the secret tag in the segment."""
        return bytes(self._memory[len(_MAGIC):len(_MAGIC) + _TAG_BYTES]).hex()

    def close(self) -> None:
        """Unmaps (as soon as no view is left) and, for the owner, frees the segment. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        self._fd, self._path = -1, None
        try:
            self._memory.close()
        except BufferError:  # somebody still reads a frame; the map goes with the last view
            pass


def create(size: int, folder: Path) -> Segment:
    """A new segment of at least `size` bytes; `folder` (private to the user) is used only where files are needed.

    Raises:
        OSError: no memory left, or the system has no way to share it.
    """
    total = DATA_START + max(size, 1)
    tag = secrets.token_bytes(_TAG_BYTES)
    check = _check_of(tag)
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("near-frame", os.MFD_CLOEXEC)
        try:
            _reserve(fd, total)
            memory = mmap.mmap(fd, total)
        except BaseException:
            os.close(fd)
            raise
        segment = Segment(f"memfd:{os.getpid()}.{fd}:{size}:{check}", size, memory, fd)
    elif sys.platform == "win32":
        label = secrets.token_hex(12)
        segment = Segment(f"tag:{label}:{size}:{check}", size, mmap.mmap(-1, total, tagname=f"near-{label}"))
    else:
        path = folder / f"frame-{os.getpid()}-{secrets.token_hex(8)}.shm"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            _reserve(fd, total)
            memory = mmap.mmap(fd, total)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        segment = Segment(f"file:{path}:{size}:{check}", size, memory, path=path)
    segment._memory[:len(_MAGIC) + _TAG_BYTES] = _MAGIC + tag
    return segment


def attach(name: str) -> Segment:
    """Maps a segment by the name its owner gave.

    Raises:
        OSError: it cannot be reached (another host, another container) or is no longer what the name says.
    """
    try:
        kind, rest = name.split(":", 1)
        where, size_text, check = rest.rsplit(":", 2)
        size, path = int(size_text), where
        if kind == "memfd":
            pid, fd_text = where.split(".")
            path = f"/proc/{int(pid)}/fd/{int(fd_text)}"
    except ValueError:
        raise OSError(f"not the name of a shared segment: {name!r}") from None
    total = DATA_START + max(size, 1)
    if kind == "tag" and sys.platform == "win32":
        memory = mmap.mmap(-1, total, tagname=f"near-{where}")
    elif kind in ("memfd", "file"):
        fd = os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
        try:
            if os.fstat(fd).st_size < total:  # mapping past the end would be a bus error later
                raise OSError(f"the shared segment {name!r} is smaller than it says")
            memory = mmap.mmap(fd, total)
        finally:
            os.close(fd)
    else:
        raise OSError(f"this system cannot map the shared segment {name!r}")
    tag = bytes(memory[len(_MAGIC):len(_MAGIC) + _TAG_BYTES])
    if memory[:len(_MAGIC)] != _MAGIC or _check_of(tag) != check:
        memory.close()
        raise OSError(f"the shared segment {name!r} has been replaced")
    return Segment(name, size, memory)


def _check_of(tag: bytes) -> str:
    return hashlib.sha256(tag).hexdigest()[:16]


def _reserve(fd: int, total: int) -> None:
    """Takes the memory now: a full system must fail here, with an error, not later with a bus error."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, total)
    else:
        os.ftruncate(fd, total)


def sweep(folder: Path) -> int:
    """Removes segment files whose owner is dead; -> how many. Only needed where segments are files."""
    removed = 0
    for path in folder.glob("frame-*.shm"):
        try:
            os.kill(int(path.name.split("-")[1]), 0)
        except ProcessLookupError:
            path.unlink(missing_ok=True)
            removed += 1
        except (ValueError, OSError):
            continue
    return removed


class Attachments:
    """Mapped segments by name: mapping 16 MB anew for every frame would cost as much as copying it."""

    def __init__(self, most: int = 24) -> None:
        self._most, self._open = most, OrderedDict()

    def get(self, name: str) -> Segment:
        """Maps `name`, or returns the map made before. Raises OSError as `attach` does."""
        segment = self._open.get(name)
        if segment is None:
            segment = self._open[name] = attach(name)
            while len(self._open) > self._most:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(name)
        return segment

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


class Pool:
    """The owner's segments for one client: taken for a frame, given back when the client has read it."""

    def __init__(self, folder: Path, most_bytes: int, most: int = 12) -> None:
        self._folder, self._most_bytes, self._most = folder, most_bytes, most
        self._free: dict[int, Segment] = {}
        self._taken: dict[int, Segment] = {}
        self._next = 0

    @property
    def bytes(self) -> int:
        return sum(s.size for s in (*self._free.values(), *self._taken.values()))

    def take(self, size: int) -> tuple[int, Segment] | None:
        """-> (slot, segment of at least `size` bytes), or None: the client holds too much, use the socket."""
        fitting = [slot for slot, s in self._free.items() if size <= s.size <= 4 * size + 65_536]
        if fitting:
            slot = min(fitting, key=lambda s: self._free[s].size)
            self._taken[slot] = self._free.pop(slot)
            return slot, self._taken[slot]
        while self._free and (self.bytes + size > self._most_bytes or len(self) >= self._most):
            self._free.pop(next(iter(self._free))).close()
        if self.bytes + size > self._most_bytes or len(self) >= self._most:
            return None
        try:
            segment = create(size, self._folder)
        except OSError:
            return None
        slot, self._next = self._next, self._next + 1
        self._taken[slot] = segment
        return slot, segment

    def segment(self, slot: int) -> Segment | None:
        """The segment of a slot that is taken."""
        return self._taken.get(slot)

    def give(self, slot: int) -> None:
        """The slot may be used again; unknown slots are ignored (a replayed message)."""
        segment = self._taken.pop(slot, None)
        if segment is not None:
            self._free[slot] = segment

    def __len__(self) -> int:
        return len(self._free) + len(self._taken)

    def close(self) -> None:
        for segment in (*self._free.values(), *self._taken.values()):
            segment.close()
        self._free, self._taken = {}, {}
