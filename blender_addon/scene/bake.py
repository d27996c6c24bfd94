"""Light that only Cycles can work out, rendered by a second Blender (`bake_child.py`): nothing waits for it that must not.

A render inside a render is not to be relied on, and a render in the user's own Blender would hold it up; a second process
is safe in the viewport, during F12 and in `-b` alike. It gets a .blend with the world (or scene) alone, and stays for the next
job until it is closed with this Blender.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..errors import NearError
from ..process import quiet

PATIENCE_S = 600.0


@dataclass(frozen=True)
class Job:
    """What is to be baked into `out`, in the working space `space`: the file `image`; or what the display shows of all colours of
    a `table` (arguments of `bake_child.display_table`); or of the .blend the scene around `where` if `probe`, else its world alone."""
    out: str
    space: str
    blend: str = ""
    image: str = ""
    scene: str = ""
    world: str = ""
    probe: bool = False
    where: tuple[float, float, float] = (0.0, 0.0, 0.0)
    hidden: tuple[str, ...] = ()
    frame: int = 1
    subframe: float = 0.0
    rows: int = 512
    samples: int = 32
    view: tuple = ()
    table: tuple = ()


def child_command() -> list[str]:
    """How another Blender like this one is started; as a module Blender has no program of its own."""
    import bpy

    script = str(Path(__file__).with_name("bake_child.py"))
    if not bpy.app.binary_path:
        return [sys.executable, script]
    return [bpy.app.binary_path, "-b", "--factory-startup", "--python", script]


class Baker:
    """One child and at most one job of it under way. Used by one thread."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._folder: tempfile.TemporaryDirectory | None = None
        self._out: Path | None = None
        self._since = 0.0
        self._count = 0

    @property
    def busy(self) -> bool:
        return self._out is not None

    def folder(self) -> Path:
        """Where jobs and results lie; gone with the baker."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="near-light-", ignore_cleanup_errors=True)
        return Path(self._folder.name)

    def paths(self) -> tuple[str, str]:
        """(.blend to write, result) of the next job."""
        self._count += 1
        return str(self.folder() / f"{self._count}.blend"), str(self.folder() / f"{self._count}.npy")

    def begin(self, job: Job) -> None:
        """Starts the job, and the child where there is none. Never waits.

        Raises:
            NearError: `light-bake` when no Blender can be started.
        """
        if self._process is None or self._process.poll() is not None:
            self._forget()
            with open(self.folder() / "child.log", "wb") as log:
                try:
                    self._process = subprocess.Popen(child_command(), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log, **quiet())
                except OSError as error:
                    raise NearError("light-bake", f"The light could not be baked: Blender did not start ({error.strerror}).",
                                    "Use an environment texture as the world, or a light file.") from None
        self._process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
        self._process.stdin.flush()
        self._out, self._since = Path(job.out), time.monotonic()

    def poll(self) -> np.ndarray | None:
        """The map once it is there. Never waits.

        Raises:
            NearError: `light-bake`.
        """
        if self._out is None:
            return None
        failure = Path(f"{self._out}.err")
        if self._out.is_file():
            out, self._out = self._out, None
            pixels = np.load(out, allow_pickle=False)
            out.unlink()
            return pixels
        if failure.is_file():
            self._out = None
            self._fail(failure.read_text(encoding="utf-8"))
        if self._process.poll() is not None:
            self._out = None
            self._fail(f"Blender ended with status {self._process.returncode}")
        if time.monotonic() - self._since > PATIENCE_S:
            self.close()
            self._fail(f"it took more than {PATIENCE_S / 60:.0f} minutes")
        return None

    def _fail(self, why: str) -> None:
        raise NearError("light-bake", f"The light could not be baked: {why}.",
                        "Use an environment texture as the world, or a light file; the World's nodes must render in Cycles.")

    def abandon(self) -> None:
        """The job is no longer wanted; a new child takes the next one."""
        if self._out is not None:
            self._kill()

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.stdin.close()
            process.kill()
            process.wait(5)
        self._out = None

    def _forget(self) -> None:
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait(5)
            self._process = None

    def close(self) -> None:
        """Ends the child; the baker can be used again."""
        self._kill()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


__all__ = ["Baker", "Job", "child_command"]
