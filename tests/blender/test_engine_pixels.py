"""F12 gives the pixels of `near render`: camera, placement and light mean the same on both sides."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("bpy")
sys.path.insert(0, str(Path(__file__).parent))

import engine_stage as stage  # noqa: E402

pytestmark = [pytest.mark.bpy, pytest.mark.slow, pytest.mark.timeout(900)]


# ---------------------------------------------------------------- our own formula of Blender's camera, from its manual
def intrinsics(data, render, width: int, height: int) -> np.ndarray:
    """K of the lens settings, in double precision, without asking Blender for its matrix."""
    aspect_x, aspect_y = render.pixel_aspect_x, render.pixel_aspect_y
    fit = data.sensor_fit
    horizontal = fit == "HORIZONTAL" or (fit == "AUTO" and width * aspect_x >= height * aspect_y)
    sensor = data.sensor_height if fit == "VERTICAL" else data.sensor_width
    side = width if horizontal else height * aspect_y / aspect_x
    f = side * (data.lens / sensor if data.type == "PERSP" else 1 / data.ortho_scale)
    stretch = aspect_x / aspect_y
    return np.array([[f, 0, width / 2 - data.shift_x * side], [0, f * stretch, height / 2 + data.shift_y * side * stretch], [0, 0, 1]])


def cv_matrix(world_from_camera) -> np.ndarray:
    m = np.array(world_from_camera, np.float64)
    m[:3, :3] /= np.linalg.norm(m[:3, :3], axis=0)
    return np.diag([1.0, -1.0, -1.0, 1.0]) @ np.linalg.inv(m)


# ---------------------------------------------------------------- the setups; each changes a scene, some return the frame to render
def plain(s): pass
def long_lens(s): s.scene.camera.data.lens = 85
def wide_and_close(s): s.scene.camera.data.lens, s.scene.camera.location = 18, (0.3, -1.15, 0.35)
def portrait_auto(s): s.size(64, 90)
def sensor_vertical(s): s.scene.camera.data.sensor_fit, s.scene.camera.data.sensor_height = "VERTICAL", 20
def sensor_horizontal_portrait(s): s.size(60, 88), setattr(s.scene.camera.data, "sensor_fit", "HORIZONTAL")
def shift(s): s.scene.camera.data.shift_x, s.scene.camera.data.shift_y = 0.13, -0.08
def pixel_aspect(s): s.scene.render.pixel_aspect_x, s.scene.camera.data.shift_y = 1.8, 0.05
def pixel_aspect_tall(s): s.scene.render.pixel_aspect_y, s.scene.camera.data.shift_x = 1.5, 0.07
def percentage(s): s.size(131, 97), setattr(s.scene.render, "resolution_percentage", 67)
def square(s): s.size(71, 71)
def orthographic(s): s.scene.camera.data.type, s.scene.camera.data.ortho_scale = "ORTHO", 1.7


def border(s):
    r = s.scene.render
    r.use_border, r.use_crop_to_border = True, True
    r.border_min_x, r.border_max_x, r.border_min_y, r.border_max_y = 0.21, 0.83, 0.32, 0.93


def border_in_whole_frame(s):
    border(s)
    s.scene.render.use_crop_to_border = False


def placed_asset(s):
    s.proxy.location, s.proxy.rotation_euler, s.proxy.scale = (0.2, 0.3, -0.1), (0.4, -0.7, 1.9), (0.6,) * 3


def parented_asset(s):
    import bpy

    parent = bpy.data.objects.new("parent", None)
    s.scene.collection.objects.link(parent)
    parent.location, parent.rotation_euler, parent.scale = (0.1, 0.2, 0.1), (0.3, 0.2, 0.5), (1.3,) * 3
    s.proxy.parent, s.proxy.location, s.proxy.scale = parent, (-0.1, 0.1, 0), (0.5,) * 3


def animated_parented_camera(s):
    import bpy

    arm = bpy.data.objects.new("arm", None)
    s.scene.collection.objects.link(arm)
    arm.scale = (1.5,) * 3
    s.scene.camera.parent = arm
    s.scene.camera.location = (0.4, -1.6, 0.45)
    for frame, turn in ((1, 0.0), (11, 1.0)):
        arm.rotation_euler = (0, 0, turn)
        arm.keyframe_insert("rotation_euler", frame=frame)
    s.scene.frame_set(7)


def turned_world(s):
    s.mapping.inputs["Rotation"].default_value = (0.5, -0.3, 1.1)
    s.scene.world.node_tree.nodes["Background"].inputs["Strength"].default_value = 1.6


SETUPS = [plain, long_lens, wide_and_close, portrait_auto, sensor_vertical, sensor_horizontal_portrait, shift, pixel_aspect, pixel_aspect_tall,
          percentage, square, orthographic, border, border_in_whole_frame, placed_asset, parented_asset, animated_parented_camera, turned_world]
# What `near render` can say on its command line: the asset at the origin, the light turned about Z alone.
OF_THE_COMMAND = [plain, portrait_auto, shift, pixel_aspect, percentage, square]


class Set:
    """A scene to be changed by a setup."""

    def __init__(self, asset: Path) -> None:
        self.scene = stage.new_scene()
        self.proxy = stage.add_proxy(self.scene, asset)
        self.mapping = stage.set_world(self.scene, stage.hdri_pixels(), (0, 0, 0.6))

    def size(self, width: int, height: int) -> None:
        self.scene.render.resolution_x, self.scene.render.resolution_y = width, height


@pytest.fixture(scope="module")
def home():
    """The connection file of a running backend, which this Blender uses too."""
    with stage.backend() as connection_file:
        yield connection_file


@pytest.fixture(scope="module")
def backend(home):
    from near.server.remote import RemoteEngine

    with RemoteEngine(str(home)) as engine:
        yield engine


@pytest.fixture(scope="module")
def asset(backend, tmp_path_factory):
    return stage.teapot(backend, tmp_path_factory.mktemp("asset"))


def reference(backend, s: Set, asset: Path) -> tuple[np.ndarray, np.ndarray]:
    """(colour, depth) of the engine itself, told in its own words."""
    import torch

    from near.assets import load_asset
    from near.geometry.cameras import Camera
    from near.lighting import Environment
    from near.pipeline.types import PlacedAsset

    import bpy
    from mathutils import Euler

    graph = bpy.context.evaluated_depsgraph_get()
    camera, proxy = s.scene.camera.evaluated_get(graph), s.proxy.evaluated_get(graph)
    render = s.scene.render
    width = render.resolution_x * render.resolution_percentage // 100
    height = render.resolution_y * render.resolution_percentage // 100
    seen = Camera(torch.tensor(cv_matrix(camera.matrix_world)), torch.tensor(intrinsics(camera.data, render, width, height)), width, height,
                  camera.data.clip_start, camera.data.clip_end, {"PERSP": "perspective", "ORTHO": "orthographic"}[camera.data.type])
    turn = np.array(Euler(tuple(s.mapping.inputs["Rotation"].default_value)).to_matrix())
    strength = s.scene.world.node_tree.nodes["Background"].inputs["Strength"].default_value
    light = Environment(torch.from_numpy(stage.hdri_pixels()), torch.tensor(turn, dtype=torch.float32), strength)
    frame = backend.render([PlacedAsset(load_asset(asset), torch.tensor(np.array(proxy.matrix_world), dtype=torch.float32))], light, seen,
                           passes=("color", "depth"))
    return frame.layers["color"].numpy(), frame.layers["depth"].numpy()[..., 0]


def exr(path: Path) -> dict[str, np.ndarray]:
    from near.output import read_exr

    return read_exr(path)


def rgba(channels: dict[str, np.ndarray]) -> np.ndarray:
    return np.stack([channels[c] for c in "RGBA"], -1)


@pytest.mark.parametrize("setup", SETUPS, ids=lambda f: f.__name__)
def test_f12_is_the_engines_own_picture(backend, asset, tmp_path, setup):
    s = Set(asset)
    setup(s)
    whole, _ = reference(backend, s, asset)
    got = rgba(exr(stage.render(s.scene, tmp_path / "f12.exr")))
    assert whole[..., 3].max() > 0.99 and 0.03 < (whole[..., 3] > 0.5).mean() < 0.9
    if setup in (border, border_in_whole_frame):
        height, width = whole.shape[:2]
        x0, x1, y0, y1 = int(0.21 * width), int(0.83 * width), height - int(0.93 * height), height - int(0.32 * height)
        inside = np.zeros(whole.shape[:2], bool)
        inside[y0:y1, x0:x1] = True
        if setup is border_in_whole_frame:
            assert not got[~inside].any(), "outside of the border nothing is drawn"
            got = got[y0:y1, x0:x1]
        whole = whole[y0:y1, x0:x1]
        got, whole = got[2:-2, 2:-2], whole[2:-2, 2:-2]      # a pixel's filter reaches over the border's edge
    assert got.shape == whole.shape
    assert np.abs(got - whole).max() <= 1e-3


def test_f12_is_what_the_command_writes(home, backend, asset, tmp_path):
    """`near render` itself, with files in and files out: EXR (half floats) within 1e-3, PNG through AgX within one step of 255."""
    import bpy
    from near.cli import main
    from near.lighting import environment_from_array
    from near.output import write_environment
    from PIL import Image

    shots, pictures = [], []
    for setup in OF_THE_COMMAND:
        s = Set(asset)
        s.mapping.inputs["Rotation"].default_value = (0, 0, 0.6)
        setup(s)
        bpy.context.view_layer.update()
        got = rgba(exr(stage.render(s.scene, tmp_path / f"{setup.__name__}.exr")))
        s.scene.render.image_settings.file_format = "PNG"
        s.scene.render.image_settings.color_depth = "8"
        s.scene.view_settings.view_transform = "AgX"
        png = np.asarray(Image.open(stage.render(s.scene, tmp_path / f"{setup.__name__}.png")))
        height, width = got.shape[:2]
        shots.append({"cam_from_world": cv_matrix(s.scene.camera.matrix_world).tolist(), "resolution": [width, height],
                      "K": intrinsics(s.scene.camera.data, s.scene.render, width, height).tolist()})
        pictures.append((got, png))
    (tmp_path / "shots.json").write_text(json.dumps(shots))
    write_environment(tmp_path / "light.exr", environment_from_array(stage.hdri_pixels()))
    common = ["render", str(asset), "--hdri", str(tmp_path / "light.exr"), "--rotation", str(math.degrees(0.6)), "--cameras",
              str(tmp_path / "shots.json"), "--connect", str(home), "--quiet"]
    assert main([*common, "--passes", "color", "--format", "exr", "-o", str(tmp_path / "exr")]) == 0
    assert main([*common, "--format", "png", "-o", str(tmp_path / "png")]) == 0
    for index, (got, png) in enumerate(pictures):
        theirs = rgba(exr(tmp_path / "exr" / f"frame_{index:04d}.exr"))
        assert np.abs(got - theirs).max() <= 1e-3, OF_THE_COMMAND[index].__name__
        other = np.asarray(Image.open(tmp_path / "png" / f"frame_{index:04d}.png"))
        assert np.abs(png[..., 3].astype(int) - other[..., 3]).max() <= 1
        assert (png[..., 3] == 0).any()
        assert np.abs(png.astype(int) - other).max() <= 1, OF_THE_COMMAND[index].__name__      # where nothing covers, too


def test_a_png_has_blenders_colours_at_every_alpha(tmp_path):
    """Colours are divided by any coverage at all, also one too small for 8 bits; light without coverage stays as it is."""
    import bpy
    import torch
    from near.output import display_straight
    from PIL import Image

    alpha = np.array([0, 1e-8, 1e-5, 1e-4, 1e-3, 0.002, 0.01, 0.5, 0.99, 1], np.float32)
    straight = np.array([[0.18, 0.18, 0.18], [1, 0.2, 0.05], [8, 4, 2], [0.02, 0.5, 0.9]], np.float32)
    rgba = np.concatenate([straight[:, None] * alpha[:, None], np.broadcast_to(alpha[:, None], (4, len(alpha), 1))], -1)
    rgba[1, 0, :3] = (0.3, 0.2, 0.1)
    scene = stage.new_scene()
    image = stage.float_image("picture", rgba[..., :3])
    image.alpha_mode = "PREMUL"
    image.pixels.foreach_set(np.ascontiguousarray(rgba[::-1], np.float32).ravel())
    scene.view_settings.view_transform, settings = "AgX", scene.render.image_settings
    settings.file_format, settings.color_mode, settings.color_depth = "PNG", "RGBA", "8"
    image.save_render(str(tmp_path / "blender.png"), scene=scene)
    theirs = np.asarray(Image.open(tmp_path / "blender.png")).astype(int)
    bpy.data.images.remove(image)
    assert (theirs[:, :4, 3] == 0).all() and theirs[1, 0, :3].all() and not theirs[0, 0].any()
    assert np.abs(theirs - display_straight(torch.from_numpy(rgba.astype(np.float32)))).max() <= 1
