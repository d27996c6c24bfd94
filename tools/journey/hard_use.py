"""The extension used harder than a user would, where there is a window: nothing of it may be left on the GPU, in Blender or in the system.

Inside the journey's Blender. The backend is one that runs already, so that switching the add-on off and on does not wait for its start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import bpy

from . import driver, measure
from .driver import FOLDER, PACKAGE, PLAN, here, module, told, until

TIMES = {"enable": 20, "load": 10, "engine": 20}
_counted: list[int] = []


def leave_nothing():
    """Enables, loads, engine switches; each with pictures on the screen in between."""
    server = yield from _other_backend()
    handle = bpy.types.SpaceView3D.draw_handler_add(lambda: _counted.append(measure.gl_textures()) if not _counted else None, (), "WINDOW", "POST_PIXEL")
    try:
        yield from _enabling()
        yield from _loading()
        yield from _switching()
    finally:
        bpy.types.SpaceView3D.draw_handler_remove(handle, "WINDOW")
        server.terminate()
    told["server_exit"] = server.wait(30)
    _enable(False)
    yield 1.0
    told["left_over"] = left_over()
    yield from driver.shot("disabled")


def _other_backend():
    here().stop(10)
    server = subprocess.Popen([PLAN["python"], "-m", "near.server.cli", "serve", "--device", "cpu"], stdin=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    running = Path(os.environ["NEAR_HOME"]) / "run" / "default.json"

    def serving() -> bool:
        try:
            return json.loads(running.read_text())["pid"] == server.pid
        except (OSError, ValueError, KeyError):
            return False

    yield from until(serving, 120, "a backend of its own")
    return server


def _count():
    """Textures in the window's context, counted in the next draw."""
    _counted.clear()
    driver.view()[1].tag_redraw()
    yield from until(lambda: _counted, 30, "a draw")
    return _counted[0]


def _enable(on: bool) -> None:
    (bpy.ops.preferences.addon_enable if on else bpy.ops.preferences.addon_disable)(module=PACKAGE)


def _shown(views):
    """Waits until one of the live views has a picture."""
    def ready() -> bool:
        driver.view()[1].tag_redraw()
        return any(view.texture is not None for view in views())

    yield from until(ready, 400, "a picture")


def _enabling():
    """Off and on, each time with the overlay drawn in between."""
    bpy.context.scene.render.engine = "BLENDER_WORKBENCH"
    driver.shading("SOLID")
    bpy.context.scene.near_light.source = "WORLD"
    counts, lasting = [], []
    for _ in range(TIMES["enable"]):
        yield from _shown(driver.overlays)
        _enable(False)
        counts.append((yield from _count()))
        print("textures", counts, flush=True)
        lasting.append(left_over())
        _enable(True)
        yield 0.1
    told["textures_after_enables"], told["left_after_enables"] = counts, [lasting[0], lasting[-1]]


def _loading():
    counts = []
    for _ in range(TIMES["load"]):
        bpy.ops.wm.open_mainfile(filepath=str(FOLDER / "project" / "scene.blend"), load_ui=True)
        yield 0.2
        bpy.context.scene.render.engine = "NEAR_RELIGHT"
        driver.shading("RENDERED")
        yield from _shown(driver.engine_views)
        counts.append((yield from _count()))
    told["textures_after_loads"] = counts


def _switching():
    """Our engine, then another one: with the picture of each on the screen."""
    counts = []
    for _ in range(TIMES["engine"]):
        bpy.context.scene.render.engine = "NEAR_RELIGHT"
        yield from _shown(driver.engine_views)
        bpy.context.scene.render.engine = "BLENDER_WORKBENCH"
        yield 0.1
        counts.append((yield from _count()))
    told["textures_after_switches"], told["views_left"] = counts, [len(driver.engine_views()), len(module("viewport")._views)]


def left_over() -> dict:
    """What an add-on that is off might have left behind."""
    ours = [f"{name}:{function.__module__}" for name in dir(bpy.app.handlers) if isinstance(getattr(bpy.app.handlers, name), list)
            for function in getattr(bpy.app.handlers, name) if "near_relight" in getattr(function, "__module__", "")]
    sockets = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            sockets += os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
        except OSError:
            pass
    timers = [name for module_name, name in (("handlers", "_tick"), ("viewport", "_tick"), ("display", "_measure"))
              if bpy.app.timers.is_registered(getattr(sys.modules[f"{PACKAGE}.{module_name}"], name))]
    classes = [name for name in dir(bpy.types) if name.startswith(("NEAR_OT", "NEAR_PT", "NEAR_RE", "NEAR_PG", "NEAR_AP"))]
    return {"handlers": ours, "sockets": sockets, "timers": timers, "classes": classes}
