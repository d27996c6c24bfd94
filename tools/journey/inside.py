"""Runs inside the journey's Blender: a generator of steps, driven by a timer, so that Blender lives between them as for a user.

Each `yield n` waits n seconds; `yield from until(...)` waits for something. Screenshots are taken by another program (Blender's
own come out black on a screen in memory).
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
import traceback
from pathlib import Path

import bpy

PLAN = json.loads(os.environ["NEAR_JOURNEY"])
FOLDER, SAMPLES, QUICK = Path(PLAN["folder"]), Path(PLAN["samples"]), PLAN["quick"]
PACKAGE = "bl_ext.user_default.near_relight"
told: dict = {"steps": {}, "blender": bpy.app.version_string}
begun = time.monotonic()


def module(name: str):
    import importlib

    return importlib.import_module(f"{PACKAGE}.{name}")


def here():
    return module("session").get()


def until(ready, timeout_s: float = 300.0, what: str = ""):
    end = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > end:
            raise RuntimeError(f"waited {timeout_s} s for {what}; session {here().state}, {here().last_error}, {list(here().lines)[-3:]}")
        yield 0.05


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
    window, area, region = view()
    with bpy.context.temp_override(window=window, area=area, region=region):
        return operator(*arguments, **options)


def look(yaw_deg: float) -> None:
    """The view from the photo's side, `yaw_deg` to the right and a little from above."""
    from mathutils import Euler

    _, area, _ = view()
    area.spaces[0].region_3d.view_rotation = Euler((math.radians(75), 0, math.radians(yaw_deg))).to_quaternion()
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


# ---------------------------------------------------------------- the journey
def install():
    bpy.ops.extensions.package_install_files(filepath=str(FOLDER / PLAN["archive"]), repo="user_default", enable_on_install=True)
    yield 1.0
    assert PACKAGE in bpy.context.preferences.addons
    bpy.data.objects.remove(bpy.data.objects["Cube"])
    yield from open_sidebar()
    yield from shot("installed")


def no_backend_yet():
    """What a fresh user sees who presses Create at once: the sentence and the button."""
    bpy.context.scene.near_relight.photo = str(SAMPLES / "teapot.png")
    in_view(bpy.ops.near.create, "INVOKE_DEFAULT")
    yield from until(lambda: here().last_error is not None, 30, "the error")
    assert here().last_error.code == "backend-not-set-up", here().last_error
    yield from shot("no-backend")


def start_backend():
    bpy.context.preferences.addons[PACKAGE].preferences.python = PLAN["python"]
    in_view(bpy.ops.near.backend_start)
    yield from until(lambda: here().state == "ready", 120, "the backend")
    told["backend_pid"] = here().local.pid
    yield from shot("backend-ready")


def mask():
    in_view(bpy.ops.near.photo_mask, "INVOKE_DEFAULT")
    yield from until(lambda: not here().jobs, 300, "the mask")
    assert here().last_error is None, here().last_error
    yield from shot("photo-and-mask", 1.5)


def create():
    here().ticks_ms.clear()
    started = time.monotonic()
    in_view(bpy.ops.near.create, "INVOKE_DEFAULT")
    assert here().jobs, "create runs in the background"
    job = here().jobs[0]
    yield from until(lambda: job.fraction > 0 and job.preview is not None or job.state != "running", 300, "progress")
    yield from shot("create-progress", 0.1)
    told["create_stages"] = []
    while job.state == "running":
        if job.stage not in told["create_stages"]:
            told["create_stages"].append(job.stage)
        yield 0.02
    assert job.state == "done", job.error
    told["create_s"] = round(time.monotonic() - started, 2)
    window, area, region = view()
    with bpy.context.temp_override(window=window, area=area, region=region):
        bpy.ops.view3d.view_selected()
    look(20)
    yield from shot("created")


def cancel():
    """A second creation, cancelled at once: nothing is added."""
    count = len(bpy.data.objects)
    in_view(bpy.ops.near.create, "INVOKE_DEFAULT")
    job = here().jobs[0]
    yield from until(lambda: job.fraction > 0.05 or job.state != "running", 300, "progress")
    in_view(bpy.ops.near.cancel)
    yield from until(lambda: not here().jobs, 30, "the end of the job")
    assert job.state == "cancelled" and len(bpy.data.objects) == count
    yield 0.5


def overlay_orbit():
    """The asset over Blender's own viewport, while the user orbits."""
    _, area, region = view()
    area.spaces[0].shading.type = "SOLID"
    rv3d = area.spaces[0].region_3d
    rv3d.view_perspective = "PERSP"
    yield from shot("overlay", 12)
    for index in range(8 if QUICK else 30):
        look(20 - 2 * index)
        yield 0.08
    yield from shot("overlay-orbit", 6)
    assert here().last_error is None, here().last_error


def world():
    """The engine's own viewport, and the World turned."""
    scene = bpy.context.scene
    scene.render.engine = "NEAR_RELIGHT"
    tree = scene.world.node_tree if scene.world.use_nodes else None
    if tree is None:
        scene.world.use_nodes = True
        tree = scene.world.node_tree
    background = next(n for n in tree.nodes if n.type == "BACKGROUND")
    environment, mapping, coordinates = (tree.nodes.new(f"ShaderNode{kind}") for kind in ("TexEnvironment", "Mapping", "TexCoord"))
    image = bpy.data.images.new("light", 256, 128, float_buffer=True)
    image.pixels.foreach_set(_light(256, 128))
    image.update()
    environment.image = image
    tree.links.new(coordinates.outputs["Generated"], mapping.inputs["Vector"])
    tree.links.new(mapping.outputs["Vector"], environment.inputs["Vector"])
    tree.links.new(environment.outputs["Color"], background.inputs["Color"])
    _, area, _ = view()
    area.spaces[0].shading.type = "RENDERED"
    area.spaces[0].overlay.show_overlays = False
    yield from shot("world", 15)
    for index in range(4 if QUICK else 12):
        mapping.inputs["Rotation"].default_value[2] = math.radians(15 * (index + 1))
        yield 0.15
    yield from shot("world-turned", 12)


def _light(width: int, height: int):
    """A warm lamp to one side, a cool sky, a dark ground: float RGBA, bottom row first."""
    import numpy as np

    v, u = (np.mgrid[0:height, 0:width] + 0.5) / np.array([height, width])[:, None, None]
    sky = np.stack([0.12 + 0.1 * v, 0.16 + 0.16 * v, 0.25 + 0.35 * v], -1) * np.where(v < 0.5, 0.3, 1.0)[..., None]
    lamp = np.exp(-((u - 0.3) ** 2 + (v - 0.68) ** 2) / 0.004)
    rgba = np.ones((height, width, 4), np.float32)
    rgba[..., :3] = sky + lamp[..., None] * np.array([14.0, 9.0, 5.0])
    return rgba.ravel()


def render():
    scene = bpy.context.scene
    scene.render.resolution_x, scene.render.resolution_y = (320, 240) if QUICK else (640, 480)
    scene.render.film_transparent = False
    obj = bpy.data.objects["teapot"]
    camera = scene.camera
    camera.location, camera.data.lens = obj.location, 50
    direction = camera.rotation_euler.to_matrix() @ __import__("mathutils").Vector((0, 0, 1))
    camera.location = obj.location + direction * 2.6
    done = []
    bpy.app.handlers.render_complete.append(lambda *_: done.append(True))
    bpy.app.handlers.render_cancel.append(lambda *_: done.append(False))
    started = time.monotonic()
    in_view(bpy.ops.render.render, "INVOKE_DEFAULT")
    yield from until(lambda: done, 300, "the render")
    assert done == [True], "the render was cancelled"
    told["render_s"] = round(time.monotonic() - started, 2)
    yield from shot("render", 1.5)
    key("Escape")
    yield 1.0
    done.clear()                                      # the same again, larger, and Esc
    scene.render.resolution_percentage = 400
    in_view(bpy.ops.render.render, "INVOKE_DEFAULT")
    yield 1.5
    pressed = time.monotonic()
    key("Escape")
    yield from until(lambda: done, 120, "the cancelled render")
    told["escape"] = {"cancelled": done == [False], "s": round(time.monotonic() - pressed, 2)}
    scene.render.resolution_percentage = 100
    yield from shot("render-escaped")
    for window in bpy.context.window_manager.windows[1:]:
        with bpy.context.temp_override(window=window):
            bpy.ops.wm.window_close()
    bpy.app.handlers.render_complete.clear()
    bpy.app.handlers.render_cancel.clear()
    yield 0.5


def undo():
    """Undo takes the asset away, redo brings it back. The move before is one step, too."""
    obj = bpy.data.objects["teapot"]
    obj.location.x += 0.5
    window, area, region = view()
    with bpy.context.temp_override(window=window, area=area, region=region):
        bpy.ops.ed.undo_push(message="move")
        for _ in range(3):
            bpy.ops.ed.undo()
            bpy.ops.ed.redo()
    yield 0.5
    assert bpy.data.objects["teapot"].near_relight.is_proxy


def save_and_reopen():
    blend = FOLDER / "project" / "scene.blend"
    blend.parent.mkdir()
    bpy.ops.wm.save_as_mainfile(filepath=str(blend))
    obj = bpy.data.objects["teapot"]
    assert obj.near_relight.asset_path.startswith("//near_assets/"), obj.near_relight.asset_path
    told["asset_beside_blend"] = [p.name for p in (blend.parent / "near_assets").iterdir()]
    yield 0.5
    bpy.ops.wm.open_mainfile(filepath=str(blend), load_ui=True)
    yield 1.5
    yield from open_sidebar()
    assert here().last_error is None, here().last_error
    yield from shot("reopened", 12)


def lost_asset():
    """The asset's file is taken away: the panel tells, with its button."""
    for path in (FOLDER / "project" / "near_assets").iterdir():
        path.rename(FOLDER / path.name)
    bpy.ops.wm.open_mainfile(filepath=str(FOLDER / "project" / "scene.blend"), load_ui=True)
    yield 1.0
    yield from open_sidebar()
    assert here().last_error is not None and here().last_error.code == "asset-file-missing"
    yield from shot("lost-asset", 1.5)


def measured() -> None:
    ticks = sorted(here().ticks_ms)
    told["ticks"] = {"above_50_ms": sum(tick > 50 for tick in ticks), "count": len(ticks), "p50_ms": round(ticks[len(ticks) // 2], 3), "p99_ms": round(ticks[int(len(ticks) * 0.99)], 3),
                     "max_ms": round(ticks[-1], 3), "slow": list(here().slow_ticks)}
    told["log"] = list(here().lines)


def walk():
    for step in (install, no_backend_yet, start_backend, mask, create, cancel, overlay_orbit, world, render, undo, save_and_reopen, lost_asset):
        told["step"] = step.__name__
        print(f"JOURNEY {time.monotonic() - begun:7.1f} {step.__name__}", flush=True)
        yield from step()
    measured()
    told["step"] = "done"


_walk = walk()


def tick() -> float | None:
    try:
        return next(_walk)
    except StopIteration:
        pass
    except BaseException:
        told["error"] = traceback.format_exc()
        subprocess.run(["import", "-window", "root", str(FOLDER / "99-failed.png")], check=False, timeout=30)
    (FOLDER / "journey.json").write_text(json.dumps(told))
    bpy.ops.wm.quit_blender()
    return None


bpy.context.preferences.view.show_splash = False
bpy.app.timers.register(tick, first_interval=2.0, persistent=True)
