"""What the journey's steps are made of; runs inside its Blender.

A step is a generator: each `yield n` waits n seconds, during which Blender lives as for a user; `yield from until(...)` waits
for something. Screenshots are taken by another program (Blender's own come out black on a screen in memory).
"""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import time
from pathlib import Path

import bpy

PLAN = json.loads(os.environ["NEAR_JOURNEY"])
FOLDER, PHOTOS, QUICK = Path(PLAN["folder"]), Path(PLAN["photos"]), PLAN["quick"]
PACKAGE = "bl_ext.user_default.near_relight"
told: dict = {"steps": {}, "blender": bpy.app.version_string}
begun = time.monotonic()


def module(name: str):
    """A module of the installed add-on."""
    return importlib.import_module(f"{PACKAGE}.{name}")


def here():
    """The add-on's session."""
    return module("session").get()


def until(ready, timeout_s: float = 300.0, what: str = ""):
    end = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > end:
            raise RuntimeError(f"waited {timeout_s} s for {what}; session {here().state}, {here().last_error}, {list(here().lines)[-3:]}; views {_views()}")
        yield 0.05


def _views() -> list:
    return [(v.name, v.status, v.changed, str(v.error), v.texture is not None, len(v._placed), v._asked_full) for v in module("viewport")._views.values()]


def shot(name: str, settle_s: float = 0.7):
    """A picture of the screen, once everything is drawn."""
    yield settle_s
    path = FOLDER / f"{len(told['steps']):02}-{name}.png"
    process = subprocess.Popen(["import", "-window", "root", str(path)])
    while process.poll() is None:
        yield 0.05
    told["steps"][name] = round(time.monotonic() - begun, 2)


def view():
    """-> (window, area, region) of the 3D view."""
    window = bpy.context.window_manager.windows[0]
    area = max((a for a in window.screen.areas if a.type == "VIEW_3D"), key=lambda a: a.width * a.height)
    return window, area, next(r for r in area.regions if r.type == "WINDOW")


def in_view(operator, *arguments, **options):
    """Calls an operator as from the 3D view."""
    window, area, region = view()
    with bpy.context.temp_override(window=window, area=area, region=region):
        return operator(*arguments, **options)


def look(yaw_deg: float, pitch_deg: float = 75.0) -> None:
    """The view from the photo's side, `yaw_deg` to the right and a little from above."""
    from mathutils import Euler

    _, area, _ = view()
    area.spaces[0].region_3d.view_rotation = Euler((math.radians(pitch_deg), 0, math.radians(yaw_deg))).to_quaternion()
    area.tag_redraw()


def shading(kind: str, overlays: bool = True) -> None:
    """Solid, material or rendered."""
    _, area, _ = view()
    area.spaces[0].shading.type, area.spaces[0].overlay.show_overlays = kind, overlays
    area.tag_redraw()


def key(name: str) -> None:
    """A key press, by the window system."""
    subprocess.run(["xdotool", "key", name], check=False, timeout=10)


def open_sidebar():
    """The NeAR tab; the region has tabs only once it was drawn."""
    for _ in range(100):
        _, area, _ = view()
        area.spaces[0].show_region_ui = True
        region = next(r for r in area.regions if r.type == "UI")
        try:
            region.active_panel_category = "NeAR"
            if region.active_panel_category == "NeAR":
                return
        except (AttributeError, TypeError):
            pass
        area.tag_redraw()
        yield 0.1


def rendered():
    """Waits until Blender's render job is gone: its last handler is called while it still holds the data."""
    yield from until(lambda: not bpy.app.is_job_running("RENDER"), 60, "the render job's end")
    yield 0.5


def close_other_windows() -> None:
    for window in bpy.context.window_manager.windows[1:]:
        with bpy.context.temp_override(window=window):
            bpy.ops.wm.window_close()


def drawn(views, what: str, timeout_s: float = 120.0):
    """Waits until one of the live views has its full picture. `views`: called each time, gives them."""
    def ready() -> bool:
        view()[1].tag_redraw()
        return any(v.settled and v.texture is not None and v._viewport is not None and v._viewport.shown[0] == v._viewport.seq for v in views())

    yield from until(ready, timeout_s, what)
    yield 0.3


def overlays():
    return module("overlay")._live.values()


def engine_views():
    return module("viewport")._of_engines.values()
