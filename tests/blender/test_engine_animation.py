"""An animation without a window: every frame is the frame rendered alone, whatever happens to the backend; and it can be resumed.

The backend is the one of the server's tests: its pictures depend on every number of a scene, so equal frames mean equal requests.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("bpy")
sys.path.insert(0, str(Path(__file__).parent))

import bpy  # noqa: E402
import engine_stage as stage  # noqa: E402

pytestmark = [pytest.mark.bpy, pytest.mark.timeout(900), pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")]

FRAMES = 48
LAYERS = {"Combined": "RGBA", "Depth": None, "Normal": "XYZ", "NeAR BaseColor": "RGB", "NeAR Metallic": "X", "NeAR Roughness": "X",
          "NeAR Shadow": "X"}


@pytest.fixture()
def home(tmp_path, monkeypatch):
    """A folder for a backend that the add-on itself starts when it is needed."""
    monkeypatch.setenv("NEAR_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NEAR_PYTHON", str(stage.light_python(tmp_path)))
    (tmp_path / "home").mkdir()
    yield tmp_path / "home"
    from blender_addon import session

    session.get().stop(10)


@pytest.fixture()
def scene(tmp_path, home):
    """Camera path, turning light, a moving asset; all passes."""
    asset = tmp_path / "thing.near"
    asset.write_bytes(b"any content will do for this backend")
    scene = stage.new_scene(24, 16)
    stage.set_exr(scene, multilayer=True)
    proxy = stage.add_proxy(scene, asset)
    turn = stage.set_world(scene, stage.hdri_pixels(16)).inputs["Rotation"]
    scene.frame_start, scene.frame_end = 1, FRAMES
    for frame in (1, FRAMES):
        part = frame / FRAMES
        scene.camera.location.x = 2 * part - 1
        scene.camera.keyframe_insert("location", frame=frame)
        proxy.rotation_euler.z, proxy.location.z, proxy.scale = part, 0.2 * part, (0.5 + part,) * 3
        for path in ("rotation_euler", "location", "scale"):
            proxy.keyframe_insert(path, frame=frame)
        turn.default_value = (0, 0, 2 * math.pi * part)
        turn.keyframe_insert("default_value", frame=frame)
    layer = bpy.context.view_layer
    layer.use_pass_z = layer.use_pass_normal = True
    for name in ("base_color", "roughness", "metallic", "shadow"):
        setattr(layer.near_passes, f"use_{name}", True)
    return scene


def channels(path: Path) -> dict[str, np.ndarray]:
    from near.output import read_exr

    return read_exr(path)


def test_forty_eight_frames_survive_two_deaths_of_the_backend(scene, home, tmp_path):
    killed = []

    def kill(scene, *_):
        if scene.frame_current in (10, 30):
            pid = json.loads((home / "run" / "default.json").read_text())["pid"]
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    bpy.app.handlers.render_post.append(kill)
    try:
        stage.render(scene, tmp_path / "all" / "####", animation=True)
    finally:
        bpy.app.handlers.render_post.remove(kill)
    assert len(set(killed)) == 2, "two backends, one after the other, were killed"
    together = {frame: tmp_path / "all" / f"{frame:04d}.exr" for frame in range(1, FRAMES + 1)}
    assert all(path.is_file() for path in together.values())

    seen = set()
    for frame, path in together.items():
        scene.frame_set(frame)
        first, alone = channels(path), channels(stage.render(scene, tmp_path / "alone.exr"))
        assert set(first) == set(alone)
        assert all(np.array_equal(first[name], alone[name]) for name in first), frame
        seen.add(next(value for name, value in first.items() if name.endswith("Combined.R")).tobytes())
    assert len(seen) == FRAMES, "every frame differs from the others"

    names = {name.split(".", 1)[1] for name in first}
    for name, letters in LAYERS.items():
        found = {n for n in names if n.rsplit(".", 1)[0] == name}
        assert len(found) == len(letters or "Z"), (name, names)

    # Resuming: what is on disc stays, what is missing comes back as it was.
    kept = {frame: path.stat().st_mtime_ns for frame, path in together.items()}
    lost = {frame: channels(together[frame]) for frame in (5, 20, 47)}
    for frame in lost:
        together[frame].unlink()
    scene.render.use_overwrite = False
    stage.render(scene, tmp_path / "all" / "####", animation=True)
    for frame, path in together.items():
        if frame in lost:
            again = channels(path)
            assert all(np.array_equal(again[name], value) for name, value in lost[frame].items())
        else:
            assert path.stat().st_mtime_ns == kept[frame]


def test_an_error_stops_the_render_and_leaves_no_file(scene, tmp_path):
    from blender_addon import session

    scene.camera.data.type = "PANO"
    with pytest.raises(RuntimeError, match="panoramic"):
        stage.render(scene, tmp_path / "never.exr")
    assert not (tmp_path / "never.exr").exists()
    assert session.get().last_error.code == "camera-panoramic"
    scene.camera.data.type = "PERSP"
    stage.render(scene, tmp_path / "then.exr")
    assert (tmp_path / "then.exr").is_file(), "the next render works"


def test_view_layers_and_an_empty_scene(scene, tmp_path):
    """Each view layer has its own objects and passes; one without assets is empty, not an error."""
    other = scene.view_layers.new("Empty")
    for layer in other.layer_collection.children:
        layer.exclude = True
    collection = bpy.data.collections.new("assets")
    scene.collection.children.link(collection)
    proxy = next(o for o in scene.objects if o.type == "MESH")
    scene.collection.objects.unlink(proxy)
    collection.objects.link(proxy)
    other.layer_collection.children["assets"].exclude = True
    found = channels(stage.render(scene, tmp_path / "layers.exr"))
    first, second = scene.view_layers[0].name, "Empty"
    assert found[f"{first}.Combined.R"].any() and not found[f"{second}.Combined.A"].any()
    assert f"{first}.NeAR Roughness.X" in found and f"{second}.NeAR Roughness.X" not in found
