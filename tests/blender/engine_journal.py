"""Run by a Blender module of any version (never collected by pytest): renders with the installed extension in every way there is,
and prints one line of JSON with what it saw. Leaves by os._exit: some versions hang when the interpreter ends.

    python engine_journal.py ZIP FOLDER [search path...]
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

archive, folder = Path(sys.argv[1]), Path(sys.argv[2])
sys.path += sys.argv[3:]
sys.path.insert(0, str(Path(__file__).resolve().parent))

import shell_stage  # noqa: E402

shell_stage.prepare(folder)
import bpy  # noqa: E402
import engine_stage as stage  # noqa: E402

os.environ["NEAR_PYTHON"] = str(stage.light_python(folder))
import numpy as np  # noqa: E402

PACKAGE = "bl_ext.user_default.near_relight"
told: dict = {"blender": bpy.app.version_string}


def part(name: str):
    return shell_stage.module(name, PACKAGE)


def empty_scene(width: int = 32, height: int = 24):
    """A scene with an asset in an otherwise empty file; the add-on stays enabled."""
    for items in (bpy.data.objects, bpy.data.worlds, bpy.data.meshes):
        for item in list(items):
            items.remove(item)
    return stage.fill_scene(bpy.context.scene, width, height)


def with_asset():
    scene = empty_scene()
    asset = folder / "thing.near"
    asset.write_bytes(b"any content will do for this backend")
    stage.add_proxy(scene, asset)
    stage.set_world(scene, stage.hdri_pixels(16), (0, 0, 0.4))
    return scene


def passes_and_animation() -> None:
    scene = with_asset()
    layer = bpy.context.view_layer
    layer.use_pass_z = layer.use_pass_normal = True
    for name in ("base_color", "roughness", "metallic", "shadow"):
        setattr(layer.near_passes, f"use_{name}", True)
    stage.set_exr(scene, multilayer=True)
    scene.frame_start, scene.frame_end = 1, 3
    scene.camera.keyframe_insert("location", frame=1)
    scene.camera.location.x += 1
    scene.camera.keyframe_insert("location", frame=3)
    stage.render(scene, folder / "frames" / "####", animation=True)
    told["frames"] = sorted(path.name for path in (folder / "frames").iterdir())
    layer.use_pass_z = layer.use_pass_normal = False


def an_error() -> None:
    scene = with_asset()
    scene.camera.data.type = "PANO"
    stage.set_exr(scene, multilayer=True)
    try:
        stage.render(scene, folder / "never.exr")
    except RuntimeError as error:
        told["error_text"] = str(error)
    told["error_file"] = (folder / "never.exr").exists()
    scene.camera.data.type = "PERSP"
    stage.set_exr(scene)
    told["after_error"] = stage.render(scene, folder / "after.exr").exists()


def a_baked_world() -> None:
    scene = empty_scene()
    world = scene.world = bpy.data.worlds.new("world")
    world.use_nodes = True
    nodes, links = world.node_tree.nodes, world.node_tree.links
    gradient = nodes.new("ShaderNodeTexGradient")
    links.new(nodes.new("ShaderNodeTexCoord").outputs["Generated"], gradient.inputs["Vector"])
    links.new(gradient.outputs[0], nodes["Background"].inputs["Color"])
    scene.near_light.rows, scene.near_light.samples = 64, 16
    light = part("scene.lighting").capture(bpy.context.evaluated_depsgraph_get())
    rgb = light.rgb_lin709
    # The gradient is x, cut at 0: brightest at +X, which is the middle of the map.
    told["bake"] = [light.how, list(rgb.shape), float(rgb[32, 64, 0]), float(rgb[32, 0, 0]), float(rgb[32, 96, 0])]


def integration() -> None:
    scene = with_asset()
    scene.render.engine, scene.cycles.samples, scene.cycles.use_denoising = "CYCLES", 4, False
    scene.render.film_transparent = False
    module = part("integration")
    plain = pixels(stage.render(scene, folder / "plain.exr"))
    module.enable(scene)
    joined = pixels(stage.render(scene, folder / "joined.exr"))
    module.disable(scene)
    told["integration"] = [float(np.abs(joined - plain).max()), len(bpy.data.scenes), bool(np.isfinite(joined).all())]


def pixels(path: Path) -> np.ndarray:
    image = bpy.data.images.load(str(path))
    flat = np.array(image.pixels[:], np.float32)
    bpy.data.images.remove(image)
    return flat


def display_table() -> None:
    scene = empty_scene()
    overlay = part("overlay")
    overlay.table.measure(scene)
    told["table"] = [float(overlay.table.values.min()), float(overlay.table.values.max()), float(overlay.table.values[16, 16, 16, 0])]


def overlay_shader() -> None:
    """Compiles and draws, where there is a GPU context without a window."""
    import gpu

    scene = empty_scene(16, 16)
    if hasattr(gpu, "init"):
        gpu.init()
    else:
        scene.render.engine = "BLENDER_WORKBENCH"
        bpy.ops.render.render()
    overlay, viewport = part("overlay"), part("viewport")
    from types import SimpleNamespace

    graph = bpy.context.evaluated_depsgraph_get()
    window = scene.camera.calc_matrix_camera(graph, x=16, y=16)
    camera = part("scene.camera").ViewCamera(part("scene.camera").camera_spec(scene.camera, scene, graph, width=16, height=16), 0.0)
    picture, depth = np.ones((16, 16, 4), np.float32), np.full((16, 16, 1), 2.0, np.float32)
    view = SimpleNamespace(camera=camera, texture=viewport._texture(picture, "RGBA16F"), depth_texture=viewport._texture(depth, "R32F"), tone_mapped=True)
    target = gpu.types.GPUOffScreen(16, 16, format="RGBA32F")
    with target.bind():
        buffer = gpu.state.active_framebuffer_get()
        buffer.clear(color=(0, 0, 0, 0), depth=1.0)
        overlay.paint(view, window)
        told["painted"] = list(buffer.read_color(8, 8, 1, 1, 4, 0, "FLOAT").to_list()[0][0])
    target.free()


def main() -> None:
    bpy.ops.extensions.package_install_files(filepath=str(archive), repo="user_default", enable_on_install=True, overwrite=True)
    for step in (passes_and_animation, an_error, a_baked_world, integration, display_table, overlay_shader):
        told["step"] = step.__name__
        try:
            step()
        except Exception:
            told.setdefault("errors", {})[step.__name__] = traceback.format_exc()[-1500:]
    part("session").get().stop(10)
    bpy.ops.preferences.addon_disable(module=PACKAGE)
    told["step"] = "done"


try:
    main()
except BaseException:
    told["error"] = traceback.format_exc()
print("JOURNAL " + json.dumps(told), flush=True)
os._exit(0)
