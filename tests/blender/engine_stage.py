"""What the engine's tests share: the add-on registered in this Blender, a backend of its own, a scene with an asset."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLES = REPOSITORY / "backend" / "near" / "samples"
for folder in (REPOSITORY, REPOSITORY / "tools"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def register() -> None:
    """The add-on, as from a checkout."""
    import bpy

    if not hasattr(bpy.types.Scene, "near_light"):
        importlib.import_module("blender_addon").register()


def teapot(engine, folder: Path) -> Path:
    """The sample object encoded by a backend; -> its file."""
    from near.assets import save_asset

    path = folder / "teapot.near"
    if not path.is_file():
        save_asset(path, engine.encode(SAMPLES / "teapot.glb"))
    return path


def hdri_pixels(rows: int = 64) -> np.ndarray:
    """float32 [rows, 2 rows, 3]: every direction has a colour of its own, with a small bright lamp; no symmetry."""
    v, u = (np.mgrid[0:rows, 0:2 * rows] + 0.5) / np.array([rows, 2 * rows])[:, None, None]
    rgb = np.stack([0.3 + 0.3 * np.sin(2 * math.pi * u), 0.2 + 0.6 * (1 - v), 0.35 + 0.3 * np.cos(2 * math.pi * u + 1)], -1)
    rgb[rows // 4:rows // 4 + 4, rows // 2:rows // 2 + 4] = (6.0, 5.0, 3.5)
    return rgb.astype(np.float16).astype(np.float32)


def new_scene(width: int = 96, height: int = 64):
    """An empty file with our engine, a transparent film, a camera in front of the origin and 32-bit EXR output."""
    import bpy

    bpy.ops.wm.read_factory_settings(use_empty=True)
    register()
    return fill_scene(bpy.context.scene, width, height)


def fill_scene(scene, width: int, height: int):
    """The same for a scene that is empty already."""
    import bpy

    scene.render.engine = "NEAR_RELIGHT"
    scene.render.resolution_x, scene.render.resolution_y, scene.render.resolution_percentage = width, height, 100
    scene.render.film_transparent = True
    scene.render.dither_intensity = 0.0
    scene.camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
    scene.collection.objects.link(scene.camera)
    scene.camera.location, scene.camera.rotation_euler = (0.6, -2.4, 0.7), (math.radians(75), 0, math.radians(14))
    set_exr(scene)
    return scene


def set_exr(scene, multilayer: bool = False) -> None:
    """32-bit EXR output."""
    settings = scene.render.image_settings
    if hasattr(settings, "media_type"):
        settings.media_type = "MULTI_LAYER_IMAGE" if multilayer else "IMAGE"
    settings.file_format = "OPEN_EXR_MULTILAYER" if multilayer else "OPEN_EXR"
    settings.color_depth = "32"
    if not multilayer:
        settings.color_mode = "RGBA"


def add_proxy(scene, path: Path, name: str = "asset"):
    """An object that stands for the asset: a cube of the asset's unit box."""
    import bpy

    mesh = bpy.data.meshes.new(name)
    corners = [(x, y, z) for x in (-.5, .5) for y in (-.5, .5) for z in (-.5, .5)]
    mesh.from_pydata(corners, [], [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)])
    proxy = bpy.data.objects.new(name, mesh)
    scene.collection.objects.link(proxy)
    proxy.near_relight.is_proxy = True
    proxy.near_relight.asset_path = str(path)
    return proxy


def set_world(scene, pixels: np.ndarray, rotation=(0.0, 0.0, 0.0), strength: float = 1.0, vector_type: str = "POINT"):
    """A World of an environment texture through a Mapping node; -> the Mapping node."""
    import bpy

    world = scene.world = bpy.data.worlds.new("world")
    world.use_nodes = True
    nodes, links = world.node_tree.nodes, world.node_tree.links
    texture, mapping = nodes.new("ShaderNodeTexEnvironment"), nodes.new("ShaderNodeMapping")
    texture.image = float_image("light", pixels)
    mapping.vector_type = vector_type
    mapping.inputs["Rotation"].default_value = rotation
    nodes["Background"].inputs["Strength"].default_value = strength
    links.new(nodes.new("ShaderNodeTexCoord").outputs["Generated"], mapping.inputs["Vector"])
    links.new(mapping.outputs["Vector"], texture.inputs["Vector"])
    links.new(texture.outputs["Color"], nodes["Background"].inputs["Color"])
    return mapping


def float_image(name: str, pixels: np.ndarray):
    """An image of the scene-linear values [H, W, 3], top row first, packed into the file."""
    import bpy

    height, width = pixels.shape[:2]
    image = bpy.data.images.new(name, width, height, float_buffer=True, is_data=False)
    image.colorspace_settings.name = "Linear Rec.709"
    rgba = np.concatenate([pixels, np.ones_like(pixels[..., :1])], -1)[::-1]
    image.pixels.foreach_set(np.ascontiguousarray(rgba, np.float32).ravel())
    image.update()
    image.pack()
    return image


def render(scene, path: Path, animation: bool = False) -> Path:
    """F12 (or Ctrl-F12) into a file."""
    import bpy

    scene.render.filepath = str(path)
    bpy.ops.render.render(write_still=not animation, animation=animation)
    return path


def light_python(folder: Path) -> Path:
    """A Python command whose `near serve` has the server tests' engine: pictures that depend on every number of a scene.

    A command of its own because the add-on starts the backend with a clean PYTHONPATH. `$NEAR_TEST_PYTHON`: the Python that has
    the backend, where this one has not.
    """
    path = folder / "light-python"
    folders = os.pathsep.join(str(REPOSITORY / part) for part in ("backend", "tests"))
    python = os.environ.get("NEAR_TEST_PYTHON") or sys.executable
    path.write_text(f'#!/bin/sh\nNEAR_TEST_BACKEND=near_test_backend PYTHONPATH="{folders}" exec "{python}" "$@"\n')
    path.chmod(0o755)
    return path


@contextmanager
def backend() -> Iterator[Path]:
    """A backend with the real engine, which this Blender's session uses too; gives its connection file. `$NEAR_TEST_HOME` names
    the folder of one that runs already, to save its start while a test is being written."""
    from stress_parts.stand import Stand

    with ExitStack() as stack:
        given = os.environ.get("NEAR_TEST_HOME")
        folder = Path(given) if given else stack.enter_context(Stand(engine=True)).home
        os.environ["NEAR_HOME"], os.environ["NEAR_PYTHON"] = str(folder), sys.executable
        yield folder / "run" / "default.json"
        from blender_addon import session

        session.get().disconnect()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Of display-range pictures, in dB."""
    return float(-10 * np.log10(np.mean((a.astype(np.float64) - b) ** 2) + 1e-20))
