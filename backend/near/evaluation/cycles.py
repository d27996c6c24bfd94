"""Cycles as a yardstick: renders in a process of its own, where Blender's Python module is installed."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from near.errors import NearError

# Code that imports Blender stays outside the package: it runs under Blender's licence, in its own process.
SCRIPT = Path(__file__).resolve().parents[3] / "tools" / "cycles_render.py"
Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class CyclesFrame:
    """matrix_world: Blender camera-to-world. K: pixels. output: EXR to write, None to time only."""

    matrix_world: Matrix
    K: Matrix
    resolution: tuple[int, int]
    hdri: str
    rotation_z: float
    output: str | None = None


@dataclass(frozen=True)
class ProjectedPhoto:
    """A photo to project from its camera as base colour."""

    image: str
    matrix_world: Matrix
    K: Matrix
    resolution: tuple[int, int]


def why_unavailable() -> str | None:
    """Why Cycles cannot run here, in words; None when it can."""
    if find_spec("bpy") is None:
        return "Blender's Python module is not installed (pip install 'near-relight[blender]', Python 3.11)"
    if not SCRIPT.is_file():
        return "the project's tools folder is not beside the package (run from a checkout)"
    return None


def render_with_cycles(mesh: Path, frames: list[CyclesFrame], *, normalise: Matrix | None = None, photo: ProjectedPhoto | None = None,
                       samples: int = 64, threads: int = 0, tell: Callable[[int], None] | None = None) -> list[float]:
    """Render ``frames`` of a mesh; returns seconds per frame. ``tell``: called with the number of frames done.

    Raises:
        NearError: ``cycles-missing``, ``cycles-failed``.
    """
    if why := why_unavailable():
        raise NearError("cycles-missing", f"Cycles cannot run here: {why}.", "Install it, or leave out what needs Cycles.")
    job = {"mesh": str(mesh), "normalise": normalise, "photo": None if photo is None else asdict(photo), "samples": samples,
           "threads": threads, "frames": [asdict(f) for f in frames]}
    seconds: list[float] = []
    with tempfile.TemporaryDirectory(prefix="near-cycles-") as folder:
        file = Path(folder) / "job.json"
        file.write_text(json.dumps(job))
        with (Path(folder) / "stderr").open("w+") as errors:
            process = subprocess.Popen([sys.executable, str(SCRIPT), str(file)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                       stderr=errors, text=True)
            try:
                for line in process.stdout:
                    seconds.append(json.loads(line)["seconds"])
                    if tell is not None:
                        tell(len(seconds))
                status = process.wait()
            finally:  # Ctrl-C, or a report that cannot be read
                if process.poll() is None:
                    process.kill()
                    process.wait()
                process.stdout.close()
            if status or len(seconds) != len(frames):
                errors.seek(0)
                said = [line for line in errors.read().splitlines() if line.strip()]
                raise NearError("cycles-failed", f"Cycles stopped after {len(seconds)} of {len(frames)} frames"
                                f" ({said[-1][:200] if said else f'status {status}'}).",
                                "near doctor tests Blender's module; leave out what needs Cycles to go on without it.")
    return seconds
