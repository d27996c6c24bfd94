"""A Debian system in a folder, with a Blender that can open windows on a screen in memory; needs root and Linux.

Nothing of the host's own package sources is touched. The repository and the backend's Python are bound into it read and write,
so what the journey's Blender starts is this checkout's backend.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

SUITE = "trixie"
PACKAGES = ("blender xvfb libgl1-mesa-dri libegl1 libegl-mesa0 libgl1 libglx-mesa0 xdotool imagemagick x11-apps python3-numpy "
            "python3-requests python3-zstandard python3-venv").split()
_READY = ".near-journey-ready"
CLONE_NEWNS = 0x00020000


def missing() -> str:
    """Why a stage cannot be made here; empty when it can."""
    if not sys.platform.startswith("linux"):
        return "it needs Linux"
    if os.geteuid() != 0:
        return "it needs root, for chroot and mounts"
    if shutil.which("debootstrap") is None:
        return "debootstrap is not installed"
    with tempfile.TemporaryDirectory() as folder:
        if subprocess.run(["mount", "-t", "proc", "proc", folder], capture_output=True).returncode != 0:
            return "nothing may be mounted"
        subprocess.run(["umount", "-l", folder], check=False)
    return ""


def make(root: Path) -> None:
    """The system in `root`, about 2 GB and a few minutes; at once where it is there already. Raises CalledProcessError."""
    if (root / _READY).is_file():
        return
    if not (root / "usr" / "bin" / "apt-get").exists():
        subprocess.run(["debootstrap", "--variant=minbase", SUITE, str(root)], check=True, stdout=subprocess.DEVNULL)
    with mounted(root, []):
        run(root, ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES], check=True, stdout=subprocess.DEVNULL,
            env={"DEBIAN_FRONTEND": "noninteractive"})
    (root / _READY).touch()


@contextlib.contextmanager
def mounted(root: Path, bound: list[Path]) -> Iterator[None]:
    """/proc, /dev and the folders `bound` (at the same paths) inside `root`; all are unmounted on leaving."""
    done: list[Path] = []
    _keep_mounts_to_ourselves()

    def mount(*words: str, target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        if not os.path.ismount(target):
            subprocess.run(["mount", *words, str(target)], check=True)
            done.append(target)

    try:
        mount("-t", "proc", "proc", target=root / "proc")
        mount("--rbind", "/dev", target=root / "dev")
        subprocess.run(["mount", "--make-rslave", str(root / "dev")], check=True)
        for folder in bound:
            mount("--bind", str(folder), target=root / str(folder).lstrip("/"))
        yield
    finally:
        for target in reversed(done):
            subprocess.run(["umount", "-l", str(target)], check=False)


def _keep_mounts_to_ourselves() -> None:
    """A mount namespace for this process and its children, where the system grants one: whatever ends it takes the mounts along."""
    if ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0:
        subprocess.run(["mount", "--make-rprivate", "/"], check=False)


def run(root: Path, command: list[str], env: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess:
    return subprocess.run(entered(root, command, env), **options)


def entered(root: Path, command: list[str], env: dict[str, str] | None = None) -> list[str]:
    """The command line that runs `command` inside `root`, with a plain environment and `env`."""
    plain = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8", **(env or {})}
    return ["chroot", str(root), "/usr/bin/env", "-i", *(f"{key}={value}" for key, value in plain.items()), *command]


@contextlib.contextmanager
def screen(root: Path, size: str) -> Iterator[str]:
    """A screen in memory, of a number that is free; -> its DISPLAY."""
    reading, writing = os.pipe()
    command = ["Xvfb", "-displayfd", str(writing), "-screen", "0", f"{size}x24", "+extension", "GLX", "-nolisten", "tcp"]
    server = subprocess.Popen(entered(root, command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(writing,))
    os.close(writing)
    try:
        with open(reading, "rb") as told:
            number = told.readline().decode().strip()          # empty when it has ended
        if not number:
            raise RuntimeError("Xvfb did not start")
        yield f":{number}"
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(10)
