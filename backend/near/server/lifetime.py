"""A process that ends when its parent does, however the parent ends; and one backend per name."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from near.connection import process_alive, process_start


def die_with_parent(expected_parent: int, sign: int) -> None:
    """Linux: the kernel sends `sign` when the parent dies. Elsewhere nothing: the pipe and the pid are watched too."""
    if not sys.platform.startswith("linux"):
        return
    try:
        import ctypes

        ctypes.CDLL(None, use_errno=True).prctl(1, sign, 0, 0, 0)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        return
    if os.getppid() != expected_parent:  # it died before the call
        os.kill(os.getpid(), sign)


def prefer_as_victim() -> None:
    """When memory runs out on Linux, the kernel should end the worker, not Blender."""
    try:
        Path("/proc/self/oom_score_adj").write_text("600")
    except OSError:
        pass


class ParentWatch:
    """Tells whether the parent is gone, by its process id and by the pipe it holds (standard input)."""

    def __init__(self, pid: int = 0, pipe: bool = False, poll_s: float = 0.5) -> None:
        self._pid, self._started = pid, process_start(pid) if pid else ""
        self._gone = threading.Event()
        self.poll_s = poll_s
        if pipe:
            threading.Thread(target=self._read, name="parent-pipe", daemon=True).start()

    def _read(self) -> None:
        # A blocking read on a duplicate of the descriptor: no buffer lock is held when the interpreter ends.
        fd = os.dup(0)
        try:
            while os.read(fd, 4096):
                pass
        except OSError:
            pass
        self._gone.set()

    def gone(self) -> bool:
        """True once the parent has ended."""
        if not self._gone.is_set() and self._pid and not process_alive(self._pid, self._started):
            self._gone.set()
        return self._gone.is_set()


class InstanceLock:
    """Held while a backend lives; the system frees it even after SIGKILL."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, None

    def acquire(self) -> bool:
        """False when another process holds it."""
        file = open(self._path, "a+b")
        try:
            if sys.platform == "win32":
                import msvcrt

                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return False
        self._file = file
        return True

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def end_process(process, patience_s: float) -> None:
    """Asks a `subprocess.Popen` to end, then makes it; returns when it has ended."""
    if process.poll() is None:
        try:
            process.wait(patience_s)
        except Exception:
            process.kill()
    process.wait()


def block_interrupts() -> None:
    """Ctrl-C in a terminal reaches the whole group; only the broker should act on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
