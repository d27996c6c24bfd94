"""Live views, the overlay's drawing and display transform, cancelling, the batch queue, the photo's camera."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("bpy")
sys.path.insert(0, str(Path(__file__).parent))

import bpy  # noqa: E402
import engine_stage as stage  # noqa: E402

pytestmark = [pytest.mark.bpy, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def home():
    """A backend with the server tests' engine."""
    from stress_parts.stand import Stand

    before = {name: os.environ.get(name) for name in ("NEAR_HOME", "NEAR_PYTHON")}
    with Stand() as stand:
        os.environ["NEAR_HOME"], os.environ["NEAR_PYTHON"] = str(stand.home), sys.executable
        yield stand.home
        from blender_addon import session

        session.get().disconnect()
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@pytest.fixture()
def scene(tmp_path):
    asset = tmp_path / "thing.near"
    asset.write_bytes(b"any content will do for this backend")
    scene = stage.new_scene(32, 24)
    stage.add_proxy(scene, asset)
    stage.set_world(scene, stage.hdri_pixels(16))
    return scene


@pytest.fixture(scope="module")
def gpu():
    """Blender's GPU module without a window, where this machine lets it."""
    scene = stage.new_scene(16, 16)
    scene.render.engine = "BLENDER_WORKBENCH"
    try:
        bpy.ops.render.render()
        import gpu

        gpu.types.GPUOffScreen(4, 4).free()
    except Exception as error:
        pytest.skip(f"no GPU context without a window here ({error})")
    return gpu


# ---------------------------------------------------------------- the overlay
def test_the_display_table_is_blenders_transform():
    from blender_addon import display, overlay
    from near.colour import agx_srgb, srgb_encode

    scene = stage.new_scene()
    n = display.SIZE
    axis = np.exp2(np.arange(n) / (n - 1) * display.LOG2_RANGE + display.LOG2_LOW) - 2.0 ** display.LOG2_LOW
    blue, green, red = np.meshgrid(axis, axis, axis, indexing="ij")
    colours = np.stack([red, green, blue], -1).astype(np.float32)
    images, scenes = set(bpy.data.images), set(bpy.data.scenes)
    for view, expected in (("AgX", agx_srgb(colours)), ("Standard", srgb_encode(colours))):
        scene.view_settings.view_transform = view
        overlay.table.measure(scene)
        assert np.abs(overlay.table.values - expected).max() < 0.5 / 255, view
        assert overlay.table.key == display.DisplayTable.key_of(scene)
    scene.view_settings.exposure = 1.0
    assert overlay.table.key != display.DisplayTable.key_of(scene), "it is measured again when a setting changes"
    assert set(bpy.data.images) == images and set(bpy.data.scenes) == scenes, "nothing is left behind"

    here = display.table.values.copy()                  # with the old exposure; then a second Blender measures, while nothing waits
    end, longest = time.monotonic() + 120, 0.0
    while display.table.key != display.DisplayTable.key_of(scene):
        assert time.monotonic() < end
        begun = time.thread_time()
        assert display.table.advance(scene)
        longest = max(longest, time.thread_time() - begun)
        time.sleep(0.02)
    assert longest < 0.05 and (display.table.values > here + 0.01).any()
    elsewhere = display.table.values.copy()
    display.table.measure(scene)
    assert np.array_equal(elsewhere, display.table.values)
    display.table.close()


@pytest.mark.parametrize("kind", ["PERSP", "ORTHO"])
def test_the_overlay_is_drawn_with_colour_and_depth(gpu, kind):
    from blender_addon import overlay, viewport
    from blender_addon.scene.camera import view_camera_spec
    from near.colour import agx_srgb

    scene = stage.new_scene(96, 64)
    scene.camera.data.type, scene.camera.data.ortho_scale = kind, 4.0
    overlay.table.measure(scene)
    graph = bpy.context.evaluated_depsgraph_get()
    window = scene.camera.calc_matrix_camera(graph, x=96, y=64)
    view_data = SimpleNamespace(window_matrix=window, view_matrix=scene.camera.matrix_world.inverted(), is_perspective=kind == "PERSP")
    camera = view_camera_spec(SimpleNamespace(width=96, height=64), view_data)
    picture, depth = np.zeros((64, 96, 4), np.float32), np.full((64, 96, 1), -1, np.float32)
    picture[16:48, 24:72], picture[16:48, 72:80] = (0.5, 0.2, 0.1, 1), (0.25, 0.1, 0.05, 0.5)
    depth[16:48, 24:80] = 2.0 + camera.pushed_back_m
    view = SimpleNamespace(camera=camera, texture=viewport._texture(picture, "RGBA16F"), depth_texture=viewport._texture(depth, "R32F"), tone_mapped=True)
    target = gpu.types.GPUOffScreen(96, 64, format="RGBA32F")
    with target.bind():
        buffer = gpu.state.active_framebuffer_get()
        buffer.clear(color=(0, 0, 0, 0), depth=1.0)
        overlay.paint(view, window)
        colour = np.array(buffer.read_color(0, 0, 96, 64, 4, 0, "FLOAT").to_list()).reshape(64, 96, 4)
        drawn = np.array(buffer.read_depth(0, 0, 96, 64).to_list()).reshape(64, 96)
        # Something nearer is there already: the overlay stays behind it.
        buffer.clear(color=(0, 0, 1, 1), depth=1e-4)
        overlay.paint(view, window)
        behind = np.array(buffer.read_color(0, 0, 96, 64, 4, 0, "FLOAT").to_list()).reshape(64, 96, 4)
    target.free()
    shown = agx_srgb(np.array([0.5, 0.2, 0.1], np.float32))
    assert np.abs(colour[32, 48, :3] - shown).max() < 1.5 / 255 and colour[32, 48, 3] == 1
    assert np.abs(colour[32, 76] - np.append(shown, 1) / 2).max() < 1.5 / 255, "premultiplied at a soft edge"
    z = -2.0
    ndc = (window[2][2] * z + window[2][3]) / (-z if kind == "PERSP" else 1)
    assert drawn[32, 48] == pytest.approx(ndc * 0.5 + 0.5, abs=1e-5)
    assert not colour[2, 2].any() and drawn[2, 2] == 1
    assert (behind[..., :3] == (0, 0, 1)).all()


def drawn_over(gpu, scene, distances, picture_distance: float, **values) -> np.ndarray:
    """The overlay's colour [64, 96, 4] over cubes of a colour of their own at `distances`: the first is its proxy, drawn already."""
    from blender_addon import overlay, proxydepth, viewport
    from blender_addon.scene.camera import view_camera_spec

    graph = bpy.context.evaluated_depsgraph_get()
    window, view_matrix = scene.camera.calc_matrix_camera(graph, x=96, y=64), scene.camera.matrix_world.inverted()
    camera = view_camera_spec(SimpleNamespace(width=96, height=64), SimpleNamespace(window_matrix=window, view_matrix=view_matrix, is_perspective=True))
    view = SimpleNamespace(camera=camera, texture=viewport._texture(np.full((64, 96, 4), (0.5, 0.2, 0.1, 1), np.float32), "RGBA16F"), tone_mapped=True,
                           depth_texture=viewport._texture(np.full((64, 96, 1), picture_distance, np.float32), "R32F"))
    vars(view).update(values)
    from mathutils import Matrix

    def at(distance: float) -> Matrix:
        return scene.camera.matrix_world @ Matrix.Translation((0, 0, -distance - 0.5))       # its front is that far away

    target, depth_of = gpu.types.GPUOffScreen(96, 64, format="RGBA32F"), proxydepth.ProxyDepth()
    found = proxydepth.seen(graph)
    assert len(found) == 1
    depth_of.draw([(found[0][0], at(distances[0]))], 96, 64, view_matrix, window)
    with target.bind():
        buffer = gpu.state.active_framebuffer_get()
        ndc = min((window[2][2] * -d + window[2][3]) / d for d in distances) * 0.5 + 0.5
        buffer.clear(color=(0, 0, 1, 1), depth=ndc)
        overlay.paint(view, window, depth_of.texture)
        colour = np.array(buffer.read_color(0, 0, 96, 64, 4, 0, "FLOAT").to_list()).reshape(64, 96, 4)
    target.free()
    return colour


def test_its_own_proxy_does_not_hide_the_overlay_and_other_objects_do(gpu, tmp_path):
    from blender_addon import overlay, proxydepth
    from near.colour import agx_srgb

    scene = stage.new_scene(96, 64)
    (tmp_path / "thing.near").write_bytes(b"-")
    proxy = stage.add_proxy(scene, tmp_path / "thing.near")
    bpy.context.view_layer.update()
    overlay.table.measure(scene)
    shown = agx_srgb(np.array([0.5, 0.2, 0.1], np.float32))
    for proxy_distance in (1.9, 2.0, 2.1):              # before the picture, at it, behind it
        colour = drawn_over(gpu, scene, [proxy_distance], 2.0)
        assert np.abs(colour[32, 48, :3] - shown).max() < 1.5 / 255, proxy_distance
    assert (drawn_over(gpu, scene, [1.9, 1.5], 2.0)[32, 48, :3] == (0, 0, 1)).all(), "what stands before both hides it"
    proxy.data.vertices.add(1)
    proxydepth.forget(proxy.data.name_full)
    assert not proxydepth._batches
    proxydepth.clear()


def test_data_is_shown_as_it_is(gpu, tmp_path):
    """Normals and the like are numbers: 0.5 is 0.5 on the screen, whatever the view transform."""
    from blender_addon import overlay, viewport

    scene = stage.new_scene(96, 64)
    (tmp_path / "thing.near").write_bytes(b"-")
    stage.add_proxy(scene, tmp_path / "thing.near")
    bpy.context.view_layer.update()
    overlay.table.measure(scene)
    normal, alpha = np.full((64, 96, 3), (0.0, 0.6, -0.8), np.float32), np.ones((64, 96, 1), np.float32)
    texture = viewport._texture(viewport.display_pixels({"normal": normal, "alpha": alpha}), "RGBA16F")
    colour = drawn_over(gpu, scene, [2.0], 2.0, texture=texture, tone_mapped=False)
    assert np.abs(colour[32, 48, :3] - (0.5, 0.8, 0.1)).max() < 1e-3
    base = viewport.display_pixels({"base_color": np.full((1, 1, 3), 0.214, np.float32), "alpha": np.ones((1, 1, 1), np.float32)})
    assert np.abs(base[0, 0, :3] - 0.5).max() < 1e-3, "a colour without light: sRGB"


# ---------------------------------------------------------------- live views
class Window:
    """A viewport's region and its view, without a window."""

    def __init__(self, scene, width: int = 64, height: int = 48) -> None:
        self.region = SimpleNamespace(width=width, height=height)
        self._scene = scene

    @property
    def data(self):
        camera, graph = self._scene.camera, bpy.context.evaluated_depsgraph_get()
        window = camera.calc_matrix_camera(graph, x=self.region.width, y=self.region.height)
        return SimpleNamespace(window_matrix=window, view_matrix=camera.matrix_world.inverted(), is_perspective=True)

    def draw(self, view) -> None:
        from blender_addon import session

        session.get().poll()
        view.update(bpy.context.evaluated_depsgraph_get(), self.region, self.data)

    def draw_until(self, view, ready, timeout_s: float = 60.0) -> None:
        end = time.monotonic() + timeout_s
        while not ready():
            assert view.error is None, view.error
            assert time.monotonic() < end, "no picture came"
            self.draw(view)
            time.sleep(0.005)


def test_a_view_is_a_draft_while_it_moves_and_full_when_still(home, gpu, scene, monkeypatch):
    from blender_addon import viewport

    monkeypatch.setattr(viewport, "STILL_S", 1e9)       # it never looks still
    view, window = viewport.LiveView(depth=True), Window(scene)
    window.draw_until(view, lambda: view.texture is not None)
    assert (view.texture.width, view.texture.height) == (32, 24) and not view.settled, "half the pixels"
    monkeypatch.setattr(viewport, "STILL_S", 0.0)
    window.draw_until(view, lambda: view.texture.width == 64)
    assert view.settled and view.depth_texture.width == 64
    requests = view._viewport.seq
    for _ in range(5):
        window.draw(view)
    assert view._viewport.seq == requests, "nothing is asked for while nothing changes"

    monkeypatch.setattr(viewport, "STILL_S", 1e9)
    for step in range(6):
        scene.camera.location.x = 0.1 * step
        bpy.context.view_layer.update()
        window.draw(view)
    window.draw_until(view, lambda: view.texture.width == 32 and view._viewport.shown[0] == view._viewport.seq)
    newest = viewport.camera.view_camera_spec(window.region, window.data).spec
    assert view.camera.spec.cam_from_world == newest.cam_from_world, "the newest wins"
    view.close()
    assert view.name not in viewport._views


def test_other_passes_and_two_views_at_once(home, gpu, scene):
    from blender_addon import viewport

    first, second = viewport.LiveView(), viewport.LiveView()
    first.changed = second.changed = False
    small, large = Window(scene, 40, 30), Window(scene, 80, 60)
    scene.near_light.strength = 2.0
    assert first.changed and second.changed, "a setting reaches every view"
    for shown in ("normal", "depth", "roughness"):
        scene.near_render.shown = shown
        small.draw_until(first, lambda: first.settled and first.texture is not None and first.texture.width == 40)
        large.draw_until(second, lambda: second.settled and second.texture is not None and second.texture.width == 80)
    first.close()
    second.close()


def test_views_after_the_add_on_was_off_and_on_again(home, gpu, scene):
    import importlib

    from blender_addon import viewport

    addon = importlib.import_module("blender_addon")
    for _ in range(3):
        view, window = viewport.LiveView(depth=True), Window(scene)
        window.draw_until(view, lambda: view.settled and view.texture is not None and view.texture.width == 64)
        addon.unregister()
        assert view.texture is None and not viewport._views
        addon.register()


def test_a_view_of_a_file_without_assets_is_empty(home, gpu):
    from blender_addon import viewport

    scene = stage.new_scene()
    view, window = viewport.LiveView(), Window(scene)
    for _ in range(20):
        window.draw(view)
    assert view.texture is None and view.error is None
    view.close()


# ---------------------------------------------------------------- cancelling
def test_esc_ends_a_long_frame_at_once(home, scene):
    from blender_addon import rendering, session
    from blender_addon.errors import Cancelled
    from blender_addon.scene import lighting

    scene.camera.data.clip_end = 60          # this backend takes so many seconds for a frame
    graph = bpy.context.evaluated_depsgraph_get()
    shot, light = rendering.shot_of(graph, 32, 24), lighting.capture(graph)
    begun = time.monotonic()
    with pytest.raises(Cancelled):
        rendering.render_shot(shot, light, lambda: time.monotonic() - begun > 1)
    assert time.monotonic() - begun < 30
    scene.camera.data.clip_end = 1000
    bpy.context.view_layer.update()
    layers = rendering.render_shot(rendering.shot_of(bpy.context.evaluated_depsgraph_get(), 32, 24), light)
    assert layers["color"].shape == (24, 32, 4), "the backend goes on"
    assert session.get().client is not None


# ---------------------------------------------------------------- what goes wrong
class Layout:
    """Stands in for a panel's layout: remembers what it shows."""

    def __init__(self) -> None:
        self.words, self.operators = [], []

    def box(self): return self
    def row(self, **_): return self
    def column(self, **_): return self
    def label(self, text="", **_): self.words.append(text)
    def operator(self, name, **_): self.operators.append(name)


def uneven(scene, proxy): proxy.scale = (1, 1, 2)
def mirrored(scene, proxy): proxy.scale = (-1, 1, 1)
def panoramic(scene, proxy): scene.camera.data.type = "PANO"
def file_missing(scene, proxy): Path(proxy.near_relight.asset_path).unlink()


@pytest.mark.parametrize("spoil, code, operator", [
    (uneven, "scale-not-uniform", "near.make_scale_uniform"), (mirrored, "transform-mirrored", "near.make_scale_uniform"),
    (panoramic, "camera-panoramic", "near.make_camera_perspective"), (file_missing, "asset-file-missing", "near.asset_relink")])
def test_what_stops_a_render_is_in_the_panel_with_its_button(home, scene, tmp_path, spoil, code, operator):
    from blender_addon import session
    from blender_addon.panels.main import draw_error

    proxy = next(o for o in scene.objects if o.type == "MESH")
    spoil(scene, proxy)
    bpy.context.view_layer.update()
    with pytest.raises(RuntimeError):
        stage.render(scene, tmp_path / "never.exr")
    error, layout = session.get().last_error, Layout()
    assert error.code == code and not (tmp_path / "never.exr").exists()
    draw_error(layout, error, 400)
    assert "".join(layout.words).replace(" ", "") == f"{error.what}{error.remedy}".replace(" ", "")
    assert layout.operators == [operator, "near.error_dismiss"]
    if operator == "near.asset_relink":
        Path(proxy.near_relight.asset_path).write_bytes(b"any content will do for this backend")
        session.get().clear_error()
    else:
        group, name = operator.split(".")
        assert getattr(getattr(bpy.ops, group), name)() == {"FINISHED"}
    bpy.context.view_layer.update()
    assert session.get().last_error is None and stage.render(scene, tmp_path / "then.exr").is_file()


def test_every_button_of_an_error_exists():
    from blender_addon.errors import FIXES

    stage.register()
    for code, fix in FIXES.items():
        group, name = fix.operator.split(".")
        assert getattr(getattr(bpy.ops, group), name).get_rna_type(), code


# ---------------------------------------------------------------- the film
def test_opaque_film_shows_the_world_as_cycles_does(tmp_path):
    from near.colour import agx_srgb
    from near.output import read_rgba

    scene = stage.new_scene(72, 48)
    stage.set_world(scene, stage.hdri_pixels(64), (0.3, -0.4, 1.0), 1.2)
    scene.camera.data.lens, scene.camera.data.shift_x = 20, 0.1
    scene.render.film_transparent = False
    ours = read_rgba(stage.render(scene, tmp_path / "ours.exr"))      # no asset: no backend is asked
    scene.render.engine, scene.cycles.samples = "CYCLES", 32
    theirs = read_rgba(stage.render(scene, tmp_path / "theirs.exr"))
    assert (ours[..., 3] == 1).all()
    assert stage.psnr(agx_srgb(ours[..., :3]), agx_srgb(theirs[..., :3])) > 38


# ---------------------------------------------------------------- batch and match
def test_the_batch_renders_cameras_times_lights_times_frames_and_keeps_what_is_there(home, scene, tmp_path):
    from blender_addon import batch
    from near.lighting import environment_from_array
    from near.output import write_environment

    second = scene.camera.copy()
    second.name = "second"
    scene.collection.objects.link(second)
    for index in range(2):
        write_environment(tmp_path / "lights" / f"l{index}.exr", environment_from_array(stage.hdri_pixels(8) * np.float32(1 + index)))
    settings = scene.near_batch
    settings.cameras, settings.lights, settings.use_range, settings.output = "ALL", str(tmp_path / "lights"), True, str(tmp_path / "out")
    scene.frame_start, scene.frame_end = 1, 2
    first_camera, path = scene.camera, scene.render.filepath
    items = batch.plan(bpy.context)
    assert len(items) == 2 * 2 * 2 and len({item.output for item in items}) == 8
    assert bpy.ops.near.batch_render() == {"FINISHED"}
    assert all(item.output.is_file() for item in items)
    assert scene.camera == first_camera and scene.render.filepath == path and scene.near_light.source == "WORLD", "as before"
    kept = {item.output: item.output.stat().st_mtime_ns for item in items}
    items[3].output.unlink()
    assert [item.output for item in batch.plan(bpy.context)] == [items[3].output]
    assert bpy.ops.near.batch_render() == {"FINISHED"}
    assert sum(item.output.stat().st_mtime_ns != kept[item.output] for item in items) == 1
    assert bpy.ops.near.batch_render() == {"CANCELLED"}, "nothing is left to do"


def asset_file(path: Path, **record) -> Path:
    """A file with an asset's record and nothing else."""
    import json

    text = json.dumps({"__metadata__": {"near": json.dumps({"format": "near-asset", "version": 1, "resolution": 32, **record})}}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    return path


def test_looking_through_the_photo(scene, tmp_path):
    from blender_addon import match
    from blender_addon.errors import NearError

    proxy = next(o for o in scene.objects if o.type == "MESH")
    proxy.near_relight.asset_path = str(asset_file(tmp_path / "plain.near"))
    with pytest.raises(NearError) as caught:
        match.camera_at_photo(scene, proxy)
    assert caught.value.code == "photo-missing"
    proxy.near_relight.photo = str(stage.SAMPLES / "teapot.png")
    proxy.location, proxy.rotation_euler, proxy.scale = (1, 2, 3), (0, 0, 1.0), (2,) * 3
    camera = match.camera_at_photo(scene, proxy)
    bpy.context.view_layer.update()
    assert match.camera_at_photo(scene, proxy) == camera == scene.camera and match.is_matched(scene)
    # In the asset's space it stands in front, at the distance that creation takes for granted, and looks at the centre.
    seen = camera.matrix_world.normalized().inverted() @ proxy.matrix_world.translation
    assert np.allclose(seen, (0, 0, -match.RADIUS * 2), atol=1e-5)
    assert math.isclose(camera.data.angle_x, match.FOV_RAD, rel_tol=1e-5)
    size = tuple(camera.data.background_images[0].image.size)
    assert (scene.render.resolution_x, scene.render.resolution_y) == size


def test_looking_through_the_photo_with_the_camera_it_was_made_with(scene, tmp_path):
    from blender_addon import match
    from blender_addon.scene.camera import camera_spec
    from near.geometry.cameras import orbit_camera

    known = orbit_camera(0.7, 0.3, 2.5, 0.9, 300, 200)
    K = known.K.clone()
    K[0, 2], K[1, 2] = 140, 115
    record = {"cam_from_asset": known.cam_from_world.tolist(), "K": K.tolist(), "width": 300, "height": 200}
    proxy = next(o for o in scene.objects if o.type == "MESH")
    proxy.near_relight.asset_path = str(asset_file(tmp_path / "known.near", photo_camera=record))
    proxy.near_relight.photo = str(stage.SAMPLES / "teapot.png")
    camera = match.camera_at_photo(scene, proxy)
    bpy.context.view_layer.update()
    spec = camera_spec(camera, scene, width=300, height=200)
    assert np.allclose(spec.cam_from_world, known.cam_from_world.flatten(), atol=1e-5)
    assert np.allclose(spec.K, K.flatten(), rtol=1e-5, atol=1e-3)


# ---------------------------------------------------------------- other Blenders
@pytest.mark.slow
@pytest.mark.parametrize("version", ["4.2.23", "5.2.3"])
def test_all_of_it_in_other_blenders(tmp_path, version):
    """`engine_journal.py` with the built extension: render, passes, error, bake, integration, overlay."""
    import json
    import subprocess

    sys.path.insert(0, str(stage.REPOSITORY / "tools"))
    import blender_pythons
    import build_extension

    python = blender_pythons.environment(version)
    if python is None:
        pytest.skip(f"no environment with bpy {version} here; make one with: python tools/blender_pythons.py {version}")
    try:
        archive = build_extension.build(tmp_path / "repository", tmp_path / "work", ["linux-x64"], with_backend=False,
                                        program=build_extension.find_blender_ext())
    except SystemExit as stopped:
        pytest.skip(f"the extension cannot be built here: {stopped}")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "NEAR_", "BLENDER_"))}
    done = subprocess.run([str(python), str(Path(__file__).with_name("engine_journal.py")), str(archive), str(tmp_path)], cwd=tmp_path,
                          env={**clean, "NEAR_TEST_PYTHON": sys.executable}, capture_output=True, text=True, timeout=500)
    line = next((line for line in done.stdout.splitlines() if line.startswith("JOURNAL ")), None)
    assert line is not None, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    told = json.loads(line.removeprefix("JOURNAL "))
    errors = told.get("errors", {})
    assert "error" not in told and set(errors) <= {"overlay_shader"}, told      # the last needs a GPU context without a window
    assert told["blender"].startswith(version) and told["step"] == "done"
    assert told["frames"] == ["0001.exr", "0002.exr", "0003.exr"]
    assert "panoramic" in told["error_text"] and not told["error_file"] and told["after_error"]
    assert told["bake"][:2] == ["baked", [64, 128, 3]] and np.allclose(told["bake"][2:], (1, 0, 0), atol=0.01)
    change, scenes, finite = told["integration"]
    assert change > 0.1 and scenes == 1 and finite
    assert told["table"][0] == 0 and told["table"][1] > 0.99
    if not errors:
        assert np.allclose(told["painted"][:3], told["painted"][0], atol=0.01) and 0.7 < told["painted"][0] < 0.85
