"""The asset among ordinary objects, joined with a picture of EEVEE, which needs a window's GPU context; inside the journey's Blender."""

from __future__ import annotations

import math
import time

import bpy
import numpy as np

from . import driver
from .driver import FOLDER, told, until

WIDTH, HEIGHT = 360, 240


def eevee() -> str:
    """Its name in this version."""
    return "BLENDER_EEVEE_NEXT" if (4, 2, 0) <= bpy.app.version < (5, 0, 0) else "BLENDER_EEVEE"


def _box(name: str, colour, size, where) -> bpy.types.Object:
    bpy.ops.mesh.primitive_cube_add(size=1, location=where)
    item = bpy.context.object
    item.name, item.scale = name, size
    material = bpy.data.materials.new(name)
    material.use_nodes = True
    shader = material.node_tree.nodes["Principled BSDF"]
    shader.inputs["Base Color"].default_value, shader.inputs["Roughness"].default_value = (*colour, 1), 0.8
    item.data.materials.append(material)
    return item


def _render(name: str):
    """F12 by EEVEE; leaves the picture in FOLDER as an EXR; -> float32 [h, w, 4], bottom row first, as the step's value."""
    scene, done = bpy.context.scene, []
    settings = scene.render.image_settings
    if hasattr(settings, "media_type"):
        settings.media_type = "IMAGE"
    settings.file_format, settings.color_depth, settings.color_mode = "OPEN_EXR", "32", "RGBA"
    scene.render.filepath = str(FOLDER / f"{name}.exr")
    handlers = bpy.app.handlers
    ended = {"render_complete": lambda *_: done.append(True), "render_cancel": lambda *_: done.append(False)}
    for moment, handler in ended.items():
        getattr(handlers, moment).append(handler)
    driver.in_view(bpy.ops.render.render, "INVOKE_DEFAULT", write_still=True)
    yield from until(lambda: done, 400, f"the render {name}")
    for moment, handler in ended.items():
        getattr(handlers, moment).remove(handler)
    assert done == [True], f"{name} was cancelled"
    yield from driver.rendered()
    image = bpy.data.images.load(scene.render.filepath)
    flat = np.empty(WIDTH * HEIGHT * 4, np.float32)
    image.pixels.foreach_get(flat)
    bpy.data.images.remove(image)
    return flat.reshape(HEIGHT, WIDTH, 4)


def _pixel(where) -> tuple[int, int]:
    """(row from the bottom, column) at which the camera sees a point of the world."""
    from bpy_extras.object_utils import world_to_camera_view
    from mathutils import Vector

    x, y, _ = world_to_camera_view(bpy.context.scene, bpy.context.scene.camera, Vector(where))
    return int(y * HEIGHT), int(x * WIDTH)


def integrate():
    """Two boxes and a floor around the asset, under a sun: occlusion on both sides, a shadow, nothing changed elsewhere."""
    scene = bpy.context.scene
    driver.shading("SOLID")
    teapot = bpy.data.objects["teapot"]
    teapot.location, teapot.rotation_euler = (0, 0, 0), (0, 0, 0)
    bpy.context.view_layer.update()
    lowest = min((teapot.matrix_world @ v.co).z for v in teapot.data.vertices)
    _box("floor", (0.55, 0.5, 0.45), (8, 8, 0.1), (0, 0, lowest - 0.05))
    _box("behind", (0.2, 0.35, 0.6), (0.5, 0.2, 0.9), (0.35, 0.75, lowest + 0.45))
    before = _box("before", (0.6, 0.25, 0.15), (0.16, 0.16, 0.5), (-0.25, -0.7, lowest + 0.25))
    for item in [item for item in scene.objects if item.type == "LIGHT"]:
        bpy.data.objects.remove(item)
    sun = bpy.data.objects.new("sun", bpy.data.lights.new("sun", "SUN"))
    sun.data.energy, sun.rotation_euler = 1.5, (math.radians(40), math.radians(-35), 0)
    scene.collection.objects.link(sun)
    scene.camera.location, scene.camera.rotation_euler, scene.camera.data.lens = (0.2, -2.9, 0.9), (math.radians(74), 0, math.radians(4)), 50
    scene.render.resolution_x, scene.render.resolution_y, scene.render.film_transparent = WIDTH, HEIGHT, False
    scene.render.engine = eevee()
    scene.eevee.taa_render_samples = 8
    light = scene.near_light
    light.source, light.rows, light.samples = "PROBE", 128, 16
    view = driver.view()[1].spaces[0].region_3d
    view.view_perspective = "CAMERA"
    yield 3.0
    yield from driver.drawn(driver.overlays, "the overlay among other objects", 300)
    yield from driver.shot("among-objects", 2)
    assert driver.here().last_error is None, driver.here().last_error

    started = time.monotonic()
    driver.in_view(bpy.ops.near.integration_enable)
    joined = yield from _render("joined")
    told["integrated_s"] = round(time.monotonic() - started, 1)
    yield from driver.shot("integrated", 1)
    driver.close_other_windows()
    assert driver.here().last_error is None, driver.here().last_error
    driver.in_view(bpy.ops.near.integration_disable)
    teapot.hide_render = True
    without = yield from _render("without")
    driver.close_other_windows()
    teapot.hide_render = False
    scene.render.engine, scene.render.film_transparent = "NEAR_RELIGHT", True
    alone = yield from _render("alone")
    driver.close_other_windows()
    _judge(joined[..., :3], without[..., :3], alone, _pixel((before.location.x, before.location.y - 0.08, before.location.z)))


def _judge(joined: np.ndarray, without: np.ndarray, alone: np.ndarray, on_the_box: tuple[int, int]) -> None:
    """Linear pictures: with the asset, without it, and the asset alone (RGBA)."""
    change = np.abs(joined - without).max(-1)
    on_asset = alone[..., 3] > 0.99
    far = ~_grown(alone[..., 3] > 0.0, 3)
    own = np.abs(joined - alone[..., :3]).max(-1) < 0.02
    ratio = joined.mean(-1) / np.maximum(without.mean(-1), 1e-6)
    seen = {"asset_pixels": int(on_asset.sum()), "asset_shown": float(own[on_asset].mean()), "neither": float((~own & (change > 0.02))[on_asset].mean()),
            "box_change": float(change[on_the_box]),
            "elsewhere_unchanged": float((change[far] < 0.02).mean()), "shadow_pixels": int((far & (ratio < 0.8)).sum()),
            "brightened": float((far & (ratio > 1.1)).mean())}
    told["eevee"] = {key: round(value, 4) for key, value in seen.items()}


def _grown(mask: np.ndarray, by: int) -> np.ndarray:
    out = mask.copy()
    for axis in (0, 1):
        for step in range(-by, by + 1):
            out |= np.roll(mask, step, axis)
    return out
