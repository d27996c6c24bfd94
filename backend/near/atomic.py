"""Files that appear whole or not at all, and the operating system's refusals in plain words."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from near.errors import NearError

_NO_SPACE = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def output_error(error: OSError, path: Path) -> NearError:
    """The error to show for an ``OSError`` met while writing ``path``: ``disk-full``, ``no-permission``, ``cannot-write``."""
    if error.errno in _NO_SPACE:
        return NearError("disk-full", f"There is no room to write {path.name}.",
                         "Free some space or choose another folder; nothing was left behind.")
    if error.errno in _FORBIDDEN:
        return NearError("no-permission", f"{path.name} may not be written in {path.absolute().parent}.", "Choose a folder you may write to.")
    return NearError("cannot-write", f"{path.name} could not be written ({error.strerror or type(error).__name__}).",
                     "Choose another place to write to.")


def _staging(path: Path) -> Path:
    # The suffix stays: encoders choose their format by it. The name starts with a dot: viewers pass it over.
    return path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; it takes the place of ``path`` when the block ends well.

    Whatever ends the block early (an error, Ctrl-C) removes the half-written file and leaves an older ``path`` as it was.

    Raises:
        NearError: ``disk-full``, ``no-permission`` or ``cannot-write`` for any ``OSError`` inside the block.
    """
    path = Path(path)
    part = _staging(path)
    made = _make_parents(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
        yield part
        os.replace(part, path)
    except BaseException as error:
        _remove(part)
        _unmake(made)
        if isinstance(error, OSError):
            raise output_error(error, path) from error
        raise


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yield a folder beside ``path`` to fill; its files move into ``path`` when the block ends well.

    A ``path`` that exists keeps its other files. Errors as :func:`atomic_file`.
    """
    path = Path(path)
    part = path / f".{os.getpid()}.part" if path.is_dir() else _staging(path)
    made = _make_parents(path)
    try:
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file", str(path))
        part.mkdir()
        yield part
        if path.exists():
            for source in sorted(p for p in part.rglob("*") if p.is_file()):
                target = path / source.relative_to(part)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(source, target)
            _remove(part)
        else:
            os.replace(part, path)
    except BaseException as error:
        _remove(part)
        _unmake(made)
        if isinstance(error, OSError):
            raise output_error(error, path) from error
        raise


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write a whole file; errors as :func:`atomic_file`. It has reached the disc when it takes its name."""
    with atomic_file(path) as part, part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def check_writable(path: Path | str) -> None:
    """Raise now what writing ``path`` would raise later: long work should not end at a folder that refuses.

    Raises:
        NearError: as :func:`output_error`.
    """
    path = Path(path)
    part = _staging(path)
    made = _make_parents(path)
    try:
        with part.open("wb") as file:
            file.write(b"\0")
    except OSError as error:
        raise output_error(error, path) from error
    finally:
        try:
            part.unlink(missing_ok=True)
        except OSError:
            pass
        _unmake(made)


def _make_parents(path: Path) -> list[Path]:
    """Make the missing folders above ``path``; returns them, outermost first."""
    missing = []
    folder = path.absolute().parent
    while not folder.exists() and folder != folder.parent:
        missing.insert(0, folder)
        folder = folder.parent
    made: list[Path] = []
    try:
        for folder in missing:
            folder.mkdir()
            made.append(folder)
    except FileExistsError:
        pass  # another process made it meanwhile
    except OSError as error:
        _unmake(made)
        raise output_error(error, path) from error
    return made


def _unmake(folders: list[Path]) -> None:
    for folder in reversed(folders):
        try:
            folder.rmdir()
        except OSError:
            return
