"""What several commands share: options, progress bars, cameras from the command line."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from near.errors import NearError

if TYPE_CHECKING:
    from near.geometry.cameras import Camera

DEFAULT_CAMERA = (30.0, 20.0, 2.0, 40.0)
CAMERA_HELP = "degrees and object sizes: the camera looks at the object's centre; yaw 0 is its front"
CAMERAS_HELP = "JSON list of cameras, see the README"


def add_engine_options(parser: argparse.ArgumentParser, connect: bool = False) -> None:
    """``--pack``, ``--device`` and, where the command can use a backend that is already running, ``--connect``."""
    parser.add_argument("--pack", default="compact", help="compact (shipped), official, or a folder of weights")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    if connect:
        parser.add_argument("--connect", nargs="?", const="", metavar="WHERE", help="let a running backend (near serve) do the work: yours, "
                            "or the one of a name, a connection file or a key file; --pack and --device are then the backend's")


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """``--json``, ``--quiet``."""
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


@contextmanager
def open_engine(args: argparse.Namespace) -> Iterator:
    """The engine of the options above; models are loaded when first needed.

    Raises:
        NearError: ``device-missing``; with ``--connect`` what connecting raises.
    """
    if getattr(args, "connect", None) is not None:
        from near.server.remote import RemoteEngine

        with RemoteEngine(args.connect) as engine:
            yield engine
        return
    from near.pipeline.engine import Engine

    yield Engine(pack=args.pack, device=args.device)


# -- progress ----------------------------------------------------------------------------------------------------------


class Bar:
    """A progress bar on stderr: ``update(fraction, text)``; also a sink for the engine's ``progress``."""

    def __init__(self, bar, task) -> None:
        self._bar, self._task = bar, task

    def update(self, fraction: float, text: str | None = None) -> None:
        if self._bar is not None:
            fields = {} if text is None else {"description": text}
            self._bar.update(self._task, completed=max(0.0, min(fraction, 1.0)), **fields)

    def __call__(self, stage: str, fraction: float, preview=None) -> None:
        self.update(fraction, stage)


@contextmanager
def progress_bar(text: str, quiet: bool = False) -> Iterator[Bar]:
    """A bar that stays on the screen with its time when it is done. Where stderr is no terminal, one line says what runs."""
    if quiet:
        yield Bar(None, None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        start = time.monotonic()
        print(f"{text} ...", file=sys.stderr, flush=True)
        yield Bar(None, None)
        print(f"{text}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
        return
    columns = (TextColumn("{task.fields[what]:<26}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("left"),
               TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bar:
        yield Bar(bar, bar.add_task("", total=1.0, what=text))


def emit(args: argparse.Namespace, result: dict, lines: list[str]) -> None:
    """Print the result: JSON with ``--json``, else the lines."""
    print(json.dumps(result, default=str) if args.json else "\n".join(lines), flush=True)


# -- parsing -----------------------------------------------------------------------------------------------------------


def parse_size(text: str) -> tuple[int, int]:
    """``WxH`` -> (width, height).

    Raises:
        NearError: ``size-invalid``. Whether such a frame can be rendered is the camera's to say.
    """
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError as error:
        raise NearError("size-invalid", f"{text!r} is not a size.", "Write width x height in pixels, for example 512x512.") from error
    return width, height


def check_size(width: int, height: int) -> None:
    """Raise the camera's own error for a size that no frame may have, before anything heavy is loaded."""
    from near.geometry.cameras import orbit_camera

    orbit_camera(0.0, 0.0, 2.0, 1.0, max(width, 0), max(height, 0))


def parse_camera(text: str) -> tuple[float, float, float, float]:
    """``YAW,PITCH,RADIUS,FOV`` -> degrees, degrees, asset lengths, degrees.

    Raises:
        NearError: ``camera-invalid``.
    """
    try:
        yaw, pitch, radius, fov = (float(part) for part in text.split(","))
    except ValueError as error:
        raise NearError("camera-invalid", f"{text!r} is not a camera.",
                        "Write yaw,pitch,radius,fov in degrees and object sizes, for example 30,20,2,40.") from error
    if not (all(map(math.isfinite, (yaw, pitch, radius, fov))) and radius > 0 and 0 < fov < 180):
        raise NearError("camera-invalid", f"The camera {text} has a radius or a field of view that no camera can have.",
                        "Use a radius above 0 and a field of view between 0 and 180 degrees.")
    return yaw, pitch, radius, fov


def orbit(degrees: tuple[float, float, float, float], width: int, height: int) -> Camera:
    """Camera of (yaw, pitch, radius, fov) as :func:`parse_camera` gives them; fov spans the frame's width."""
    from near.geometry.cameras import orbit_camera

    yaw, pitch, radius, fov = degrees
    return orbit_camera(math.radians(yaw), math.radians(pitch), radius, math.radians(fov), width, height)


def read_cameras(path: Path | str, size: tuple[int, int] | None) -> list[Camera]:
    """Cameras of a JSON file: a list, or ``{"cameras": [...]}``. Each entry holds

    - ``matrix_world`` [4][4], camera to world with Blender's axes, or ``cam_from_world`` [4][4], OpenCV's axes;
    - ``K`` [3][3] pixels, or ``fov_deg`` over the width;
    - ``width`` and ``height`` (or ``resolution``) in pixels; ``size`` (width, height) takes their place where they are
      missing, and where both are given ``size`` wins (:func:`reframed`).

    Raises:
        NearError: ``cameras-unreadable``, ``cameras-invalid`` naming the entry, and what :class:`Camera` raises.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise NearError("cameras-unreadable", f"{path.name} is not a JSON file that can be read.", "Check its path and its syntax.") from error
    entries = data.get("cameras") if isinstance(data, dict) else data
    if not isinstance(entries, list) or not entries:
        raise NearError("cameras-invalid", f"{path.name} holds no list of cameras.", "Write [ {camera}, ... ]; the README shows one.")
    cameras = []
    for index, entry in enumerate(entries):
        try:
            cameras.append(_camera(entry, size))
        except (KeyError, TypeError, ValueError) as error:
            raise NearError("cameras-invalid", f"Camera {index} of {path.name} is incomplete ({error}).",
                            "It needs matrix_world or cam_from_world, K or fov_deg, and a size.") from error
    return cameras


def _camera(entry: dict, size: tuple[int, int] | None) -> Camera:
    import torch

    from near.geometry.cameras import Camera, camera_from_blender, pinhole_intrinsics

    width, height = entry["resolution"] if "resolution" in entry else (entry.get("width"), entry.get("height"))
    if width is None or height is None:
        if size is None:
            raise ValueError("no width and height")
        width, height = size
    width, height = int(width), int(height)
    if "K" in entry:
        K = torch.tensor(entry["K"], dtype=torch.float64)
    else:
        K = pinhole_intrinsics(math.radians(float(entry["fov_deg"])), width, height)
    if "matrix_world" in entry:
        camera = camera_from_blender(torch.tensor(entry["matrix_world"], dtype=torch.float64), K, width, height)
    else:
        camera = Camera(torch.tensor(entry["cam_from_world"], dtype=torch.float64), K, width, height)
    return camera if size is None else reframed(camera, *size)


def reframed(camera: Camera, width: int, height: int) -> Camera:
    """The same camera with another frame: the field of view over the width stays, and so does the shape of a pixel."""
    from dataclasses import replace

    scale = width / camera.width
    K = camera.K.clone()
    K[:2] *= scale
    K[1, 2] = 0.5 * height + (camera.K[1, 2] - 0.5 * camera.height) * scale
    return replace(camera, K=K, width=width, height=height)
