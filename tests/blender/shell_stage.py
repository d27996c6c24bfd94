"""What the shell's tests share: a folder of their own, a light backend behind the add-on, a way to let the timer run.

In background mode no timer fires, so `tick` does its work. A module of the installed add-on is reached by `module`, since its
package is named differently when it was installed as an extension.
"""

from __future__ import annotations

import importlib
import os
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
PHOTO = REPOSITORY / "backend" / "near" / "samples" / "teapot.png"
BACKEND_PYTHON = Path(os.environ.get("NEAR_TEST_PYTHON") or sys.executable)


def prepare(folder: Path) -> None:
    """Environment for this process: everything that is written goes into `folder`; to be called before bpy is imported."""
    os.environ["NEAR_HOME"] = str(folder / "home")
    os.environ["BLENDER_USER_RESOURCES"] = str(folder / "user")
    os.environ["NEAR_PYTHON"] = str(light_python(folder))


def light_python(folder: Path) -> Path:
    """A Python command whose `near serve` has the stand-in of `near_test_shell_backend` as its engine."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nNEAR_TEST_BACKEND=near_test_shell_backend PYTHONPATH="{HERE}:{REPOSITORY / "backend"}" exec "{BACKEND_PYTHON}" "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def enable(package: str = "blender_addon"):
    """Registers the add-on from the checkout; -> its package."""
    if str(REPOSITORY) not in sys.path:
        sys.path.insert(0, str(REPOSITORY))
    addon = importlib.import_module(package)
    if not addon._registered:
        addon.register()
    return addon


def module(name: str, package: str = "blender_addon"):
    return importlib.import_module(f"{package}.{name}")


def tick(until: Callable[[], bool], timeout_s: float = 60.0, package: str = "blender_addon") -> None:
    """Lets the session's timer work until `until()`."""
    end = time.monotonic() + timeout_s
    while not until():
        assert time.monotonic() < end, f"waited {timeout_s} s; {list(module('session', package).get().lines)[-5:]}"
        module("session", package).get().poll()
        time.sleep(0.005)
