"""Runs inside the journey's Blender: the user's way through the add-on, step by step, driven by a timer."""

from __future__ import annotations

import math
import subprocess
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bpy  # noqa: E402
from journey import driver, hard_use, integrated, measure  # noqa: E402
from journey.driver import FOLDER, PACKAGE, PLAN, QUICK, PHOTOS, begun, here, in_view, look, module, shot, told, until, view  # noqa: E402

stalls = None


def install():
    bpy.ops.extensions.package_install_files(filepath=str(FOLDER / PLAN["archive"]), repo="user_default", enable_on_install=True)
    yield 1.0
    assert PACKAGE in bpy.context.preferences.addons
    global stalls
    stalls = measure.watch(module)
    bpy.data.objects.remove(bpy.data.objects["Cube"])
    yield from driver.open_sidebar()
    yield from shot("installed")


def pick_a_photo():
    """In the file browser, as a user does."""
    in_view(bpy.ops.near.photo_pick, "INVOKE_DEFAULT")
    browsers = lambda: [(w, a) for w in bpy.context.window_manager.windows for a in w.screen.areas if a.type == "FILE_BROWSER"]  # noqa: E731
    yield from until(lambda: browsers() and browsers()[0][1].spaces[0].params is not None, 30, "the file browser")
    window, area = browsers()[0]
    parameters = area.spaces[0].params
    parameters.directory, parameters.display_type = str(PHOTOS).encode(), "THUMBNAIL"
    yield 2.0
    parameters.filename = "teapot.png"
    yield from shot("photo-picked")
    with bpy.context.temp_override(window=window, area=area, region=next(r for r in area.regions if r.type == "WINDOW")):
        bpy.ops.file.execute()
    yield from until(lambda: bpy.context.scene.near_relight.photo, 10, "the photo")
    assert Path(bpy.path.abspath(bpy.context.scene.near_relight.photo)) == PHOTOS / "teapot.png"
    yield 0.5


def no_backend_yet():
    """What a fresh user sees who presses Create at once: the sentence and the button."""
    in_view(bpy.ops.near.create, "INVOKE_DEFAULT")
    yield from until(lambda: here().last_error is not None, 30, "the error")
    assert here().last_error.code == "backend-not-set-up", here().last_error
    yield from shot("no-backend")


def start_backend():
    """Set up as a user does where the plan says so (it downloads PyTorch), else the environment that runs this tool."""
    preferences = bpy.context.preferences.addons[PACKAGE].preferences
    if PLAN["setup"]:
        bpy.context.preferences.system.use_online_access = True
        started = time.monotonic()
        in_view(bpy.ops.near.backend_setup, "EXEC_DEFAULT")
        setup = here().setup
        yield from until(lambda: setup.fraction > 0.1 or setup.done, 300, "progress of the setup")
        yield from shot("setting-up")
        yield from until(lambda: setup.done, 1500, "the setup")
        assert setup.error is None, setup.error
        told["setup_s"] = round(time.monotonic() - started, 1)
    else:
        preferences.python = PLAN["python"]
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
    bpy.context.preferences.view.smooth_view = 0
    in_view(bpy.ops.view3d.view_selected)
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


def light_the_world():
    """An environment texture through a Mapping node: a warm lamp to one side, a cool sky."""
    scene = bpy.context.scene
    scene.world.use_nodes = True
    tree = scene.world.node_tree
    background = next(n for n in tree.nodes if n.type == "BACKGROUND")
    environment, mapping, coordinates = (tree.nodes.new(f"ShaderNode{kind}") for kind in ("TexEnvironment", "Mapping", "TexCoord"))
    mapping.name = "turn"
    image = bpy.data.images.new("light", 256, 128, float_buffer=True)
    image.pixels.foreach_set(_light(256, 128))
    image.update()
    image.pack()
    environment.image = image
    tree.links.new(coordinates.outputs["Generated"], mapping.inputs["Vector"])
    tree.links.new(mapping.outputs["Vector"], environment.inputs["Vector"])
    tree.links.new(environment.outputs["Color"], background.inputs["Color"])
    yield 0.2


def _light(width: int, height: int):
    """Float RGBA, bottom row first."""
    import numpy as np

    v, u = (np.mgrid[0:height, 0:width] + 0.5) / np.array([height, width])[:, None, None]
    sky = np.stack([0.25 + 0.2 * v, 0.3 + 0.3 * v, 0.45 + 0.6 * v], -1) * np.where(v < 0.5, 0.3, 1.0)[..., None]
    lamp = np.exp(-((u - 0.62) ** 2 + (v - 0.7) ** 2) / 0.004)
    rgba = np.ones((height, width, 4), np.float32)
    rgba[..., :3] = sky + lamp[..., None] * np.array([20.0, 14.0, 8.0])
    return rgba.ravel()


def overlay_orbit():
    """The asset over Blender's own viewports, solid and material preview, while the user orbits."""
    view()[1].spaces[0].region_3d.view_perspective = "PERSP"
    driver.shading("SOLID")
    yield from driver.drawn(driver.overlays, "the overlay")
    yield from shot("overlay")
    seen = set()
    for index in range(10 if QUICK else 30):
        look(20 - 4 * index)
        yield 0.1
        seen |= {v._viewport.shown for v in driver.overlays() if v._viewport is not None}
    told["pictures_while_orbiting"] = len(seen)
    yield from driver.drawn(driver.overlays, "the overlay after orbiting")
    yield from shot("overlay-orbit")
    assert here().last_error is None, here().last_error
    driver.shading("MATERIAL")
    yield 5.0
    yield from driver.drawn(driver.overlays, "the overlay in material preview")
    yield from shot("overlay-material", 2)
    driver.shading("SOLID")


def world():
    """The engine's own viewport, and the World turned; then one of its data passes."""
    scene = bpy.context.scene
    scene.render.engine = "NEAR_RELIGHT"
    driver.shading("RENDERED", overlays=False)
    yield from driver.drawn(driver.engine_views, "the engine's picture")
    yield from shot("world")
    turn = scene.world.node_tree.nodes["turn"].inputs["Rotation"]
    for index in range(6 if QUICK else 12):
        turn.default_value[2] = math.radians(20 * (index + 1))
        yield 0.15
    yield from driver.drawn(driver.engine_views, "the picture under the turned World")
    yield from shot("world-turned")
    turn.default_value[2] = 0
    scene.near_render.shown = "normal"
    yield from driver.drawn(driver.overlays, "the normals")
    yield from shot("normals")
    scene.near_render.shown = "color"
    assert here().last_error is None, here().last_error


def render():
    scene = bpy.context.scene
    scene.render.resolution_x, scene.render.resolution_y = (320, 240) if QUICK else (640, 480)
    scene.render.film_transparent = False
    from mathutils import Euler, Vector

    camera = scene.camera
    camera.rotation_euler, camera.data.lens = Euler((math.radians(75), 0, math.radians(-20))), 50
    camera.location = bpy.data.objects["teapot"].location + camera.rotation_euler.to_matrix() @ Vector((0, 0, 2.6))
    done = []
    bpy.app.handlers.render_complete.append(lambda *_: done.append(True))
    bpy.app.handlers.render_cancel.append(lambda *_: done.append(False))
    started = time.monotonic()
    in_view(bpy.ops.render.render, "INVOKE_DEFAULT")
    yield from until(lambda: done, 300, "the render")
    assert done == [True], "the render was cancelled"
    told["render_s"] = round(time.monotonic() - started, 2)
    yield from driver.rendered()
    yield from shot("render", 1.5)
    driver.key("Escape")
    yield 1.0
    done.clear()                                      # the same again, larger, and Esc
    scene.render.resolution_percentage = 1000
    in_view(bpy.ops.render.render, "INVOKE_DEFAULT")
    yield 0.3
    pressed = time.monotonic()
    driver.key("Escape")
    yield from until(lambda: done, 120, "the cancelled render")
    told["escape"] = {"cancelled": done == [False], "s": round(time.monotonic() - pressed, 2)}
    yield from driver.rendered()
    scene.render.resolution_percentage = 100
    yield from shot("render-escaped")
    driver.close_other_windows()
    bpy.app.handlers.render_complete.clear()
    bpy.app.handlers.render_cancel.clear()
    yield 0.5


def undo():
    """Undo takes the move back, redo makes it again; the object stays an asset."""
    obj = bpy.data.objects["teapot"]
    before = obj.location.x
    in_view(bpy.ops.ed.undo_push, message="before")
    bpy.data.objects["teapot"].location.x = before + 0.5
    in_view(bpy.ops.ed.undo_push, message="move")
    for _ in range(5 if QUICK else 50):
        in_view(bpy.ops.ed.undo)
        assert abs(bpy.data.objects["teapot"].location.x - before) < 1e-6
        in_view(bpy.ops.ed.redo)
        yield 0.02
    assert abs(bpy.data.objects["teapot"].location.x - before - 0.5) < 1e-6 and bpy.data.objects["teapot"].near_relight.is_proxy
    in_view(bpy.ops.ed.undo)
    yield 0.3


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
    yield from driver.open_sidebar()
    assert here().last_error is None, here().last_error
    driver.shading("RENDERED")                        # Blender itself opens files in solid shading
    yield from driver.drawn(driver.engine_views, "the picture of the reopened file")
    yield from shot("reopened")


def lost_asset():
    """The asset's file is taken away: the panel tells, with its button. Then it is found again."""
    folder = FOLDER / "project" / "near_assets"
    for path in folder.iterdir():
        path.rename(FOLDER / path.name)
    bpy.ops.wm.open_mainfile(filepath=str(FOLDER / "project" / "scene.blend"), load_ui=True)
    yield 1.0
    yield from driver.open_sidebar()
    assert here().last_error is not None and here().last_error.code == "asset-file-missing"
    yield from shot("lost-asset", 1.5)
    for path in FOLDER.glob("*.near"):
        path.rename(folder / path.name)
    bpy.ops.wm.open_mainfile(filepath=str(FOLDER / "project" / "scene.blend"), load_ui=True)
    yield 1.0
    assert here().last_error is None, here().last_error


STEPS = (install, pick_a_photo, no_backend_yet, start_backend, mask, create, cancel, light_the_world, overlay_orbit, world, render, undo,
         save_and_reopen, lost_asset, integrated.integrate, hard_use.leave_nothing)


def walk():
    for step in [step for step in STEPS if not PLAN["steps"] or step.__name__ in PLAN["steps"]]:
        told["step"] = step.__name__
        print(f"JOURNEY {time.monotonic() - begun:7.1f} {step.__name__}", flush=True)
        yield from step()
        if step is lost_asset:
            told["stalls"], told["log"] = stalls.told(), list(here().lines)      # what comes after is not a user's day
    told["step"] = "done"


_walk = walk()


def tick() -> float | None:
    import json

    try:
        return next(_walk)
    except StopIteration:
        pass
    except BaseException:
        told["error"] = traceback.format_exc()
        subprocess.run(["import", "-window", "root", str(FOLDER / "99-failed.png")], check=False, timeout=30)
    (FOLDER / "journey.json").write_text(json.dumps(told))
    try:
        bpy.ops.wm.quit_blender()
    except RuntimeError:            # a render that still runs holds it; the walk has ended, so the next tick comes here again
        return 0.5
    return None


bpy.context.preferences.view.show_splash = False
bpy.app.timers.register(tick, first_interval=2.0, persistent=True)
