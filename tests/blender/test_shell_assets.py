"""Create, encode, and what becomes of an asset: its place, its file, packing, relinking, undo, errors."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("bpy")
sys.path.insert(0, str(Path(__file__).parent))

import shell_stage as stage  # noqa: E402

pytestmark = [pytest.mark.bpy, pytest.mark.timeout(300), pytest.mark.skipif(sys.platform == "win32", reason="the stand-in backend is a shell script")]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shell")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("NEAR_HOME", "BLENDER_USER_RESOURCES", "NEAR_PYTHON"):
            patch.setenv(name, "")               # put back afterwards
        stage.prepare(folder)
        addon = stage.enable()
        session = stage.module("session")
        session.close()
        yield folder
        session.close()
        addon.unregister()


@pytest.fixture
def scene(home):
    import bpy

    bpy.ops.wm.read_factory_settings(use_empty=True)
    stage.enable()
    bpy.context.scene.near_relight.photo = str(stage.PHOTO)
    stage.module("session").get().clear_error()
    return bpy.context.scene


def create(scene, seed: int = 0):
    import bpy

    scene.near_relight.seed = seed
    assert bpy.ops.near.create() == {"FINISHED"}
    return bpy.context.object


def test_create_stands_on_the_cursor_and_shares_its_file(scene, tmp_path):
    import bpy

    scene.cursor.location = (1, 2, 3)
    obj = create(scene, seed=3)
    assert obj.near_relight.is_proxy and obj.name == "teapot" and len(obj.data.polygons) == 12
    lowest = min((obj.matrix_world @ v.co).z for v in obj.data.vertices)
    assert lowest == pytest.approx(3, abs=1e-6) and obj.location.x == 1
    copy = obj.copy()
    scene.collection.objects.link(copy)
    copy.location = (5, 0, 0)
    obj.scale = (2, 2, 2)
    placed = stage.module("scene.objects").placed_assets(bpy.context.evaluated_depsgraph_get())
    assert len(placed) == 2 and placed[0].sha256 == placed[1].sha256 and placed[0].path == placed[1].path
    scales = sorted(round(float(np.linalg.norm(np.array(p.world_from_asset)[:3, 0])), 5) for p in placed)
    assert scales == [1, 2]


def test_hidden_parented_and_collection_instances(scene):
    import bpy

    obj = create(scene)
    obj.matrix_world = obj.matrix_world.Identity(4)
    parent = bpy.data.objects.new("parent", None)
    scene.collection.objects.link(parent)
    parent.location, obj.parent = (0, 0, 7), parent
    other = bpy.data.collections.new("others")
    hidden = obj.copy()
    hidden.parent = None
    other.objects.link(hidden)
    instance = bpy.data.objects.new("instance", None)
    instance.instance_type, instance.instance_collection, instance.location = "COLLECTION", other, (3, 0, 0)
    scene.collection.objects.link(instance)
    placed = stage.module("scene.objects").placed_assets(bpy.context.evaluated_depsgraph_get())
    assert sorted(round(p.world_from_asset[2][3]) for p in placed) == [0, 7] and sorted(round(p.world_from_asset[0][3]) for p in placed) == [0, 3]
    obj.hide_set(True)
    instance.hide_set(True)
    assert stage.module("scene.objects").placed_assets(bpy.context.evaluated_depsgraph_get()) == []


def test_encode_takes_the_place_of_the_mesh(scene):
    import bpy

    bpy.ops.mesh.primitive_cube_add(location=(1, 2, 3), rotation=(0.3, -0.4, 0.5))
    mesh = bpy.context.object
    mesh.scale = (1, 2, 0.5)
    bpy.context.view_layer.update()
    corners = np.array([mesh.matrix_world @ v.co for v in mesh.data.vertices])
    rotation = np.array(mesh.matrix_world.to_quaternion().to_matrix())
    assert bpy.ops.near.encode() == {"FINISHED"}
    asset = bpy.context.object
    assert asset is not mesh and mesh.hide_render
    world_from_asset = np.array(asset.matrix_world)
    inside = (np.linalg.inv(world_from_asset) @ np.c_[corners, np.ones(8)].T)[:3]
    assert np.allclose(inside.max(1), [0.25, 0.5, 0.125], atol=1e-5) and np.allclose(inside.min(1), [-0.25, -0.5, -0.125], atol=1e-5)
    assert np.allclose(world_from_asset[:3, :3] / 4, rotation, atol=1e-5)
    assert not [s for s in bpy.data.scenes if s.name.startswith("near")] and not [m for m in bpy.data.meshes if m.users == 0]


def test_create_on_a_mesh_takes_its_place(scene):
    import bpy

    bpy.ops.mesh.primitive_uv_sphere_add(location=(4, 0, 0), radius=2)
    scene.near_relight.geometry, scene.near_relight.mesh = "MESH", bpy.context.object
    assert bpy.ops.near.create() == {"FINISHED"}
    assert np.allclose(np.array(bpy.context.object.matrix_world), [[4, 0, 0, 4], [0, 4, 0, 0], [0, 0, 4, 0], [0, 0, 0, 1]], atol=1e-4)


def test_ply_of_a_mesh_is_read_back_by_the_backend(scene, tmp_path):
    import bpy
    from near.geometry.mesh import load_mesh

    place = stage.module("scene.place")
    bpy.ops.mesh.primitive_monkey_add()
    mesh, world_from_asset = place.evaluated_mesh(bpy.context.object, bpy.context.evaluated_depsgraph_get())
    (tmp_path / "m.ply").write_bytes(place.ply_bytes(*place.mesh_arrays(mesh)))
    bpy.data.meshes.remove(mesh)
    loaded = load_mesh(tmp_path / "m.ply")
    assert len(loaded.faces) == 968
    assert np.allclose(loaded.source_from_asset.numpy(), np.array(world_from_asset), atol=1e-5)      # both sides centre and scale alike


def test_the_file_follows_the_blend(scene, tmp_path):
    import bpy

    obj = create(scene, seed=5)
    waiting = Path(bpy.path.abspath(obj.near_relight.asset_path))
    assert waiting.is_file() and "near_assets" not in waiting.parts
    first, second = tmp_path / "a" / "x.blend", tmp_path / "b" / "y.blend"
    for blend in (first, second):
        blend.parent.mkdir()
        bpy.ops.wm.save_as_mainfile(filepath=str(blend))
        assert (blend.parent / "near_assets" / waiting.name).is_file()
        assert bpy.context.object.near_relight.asset_path == f"//near_assets/{waiting.name}"
    assert not waiting.exists()
    shutil.rmtree(first.parent)
    shutil.move(second.parent, tmp_path / "moved")                    # a project folder that is moved whole
    bpy.ops.wm.open_mainfile(filepath=str(tmp_path / "moved" / "y.blend"))
    stage.enable()
    assert stage.module("session").get().last_error is None
    assert stage.module("scene.objects").asset_path(bpy.data.objects["teapot"]) == tmp_path / "moved" / "near_assets" / waiting.name


def test_append_pack_lose_and_relink(scene, tmp_path):
    import bpy

    objects = stage.module("scene.objects")
    create(scene, seed=6)
    blend = tmp_path / "a" / "x.blend"
    blend.parent.mkdir()
    bpy.ops.wm.save_as_mainfile(filepath=str(blend))
    file = next((blend.parent / "near_assets").iterdir())

    bpy.ops.wm.read_factory_settings(use_empty=True)                  # appended into another file: found where it was
    stage.enable()
    bpy.ops.wm.append(directory=f"{blend}/Object/", filename="teapot")
    assert objects.asset_path(bpy.data.objects["teapot"]) == file

    bpy.ops.wm.open_mainfile(filepath=str(blend))                     # lost: told at once, found again by its hash
    kept = shutil.move(file, tmp_path / file.name)
    bpy.ops.wm.open_mainfile(filepath=str(blend))
    told = stage.module("session").get().last_error
    assert told.code == "asset-file-missing" and "teapot" in told.what
    assert stage.module("errors").fix_of(told.code).operator == "near.asset_relink"
    with pytest.raises(stage.module("errors").NearError, match="is not there"):
        objects.placed_assets(bpy.context.evaluated_depsgraph_get())
    assert bpy.ops.near.asset_relink(filepath=str(kept)) == {"FINISHED"}
    assert objects.asset_path(bpy.data.objects["teapot"]) == Path(kept) and stage.module("session").get().last_error is None

    bpy.context.view_layer.objects.active = bpy.data.objects["teapot"]
    bpy.data.objects["teapot"].select_set(True)
    bpy.ops.near.asset_pack()                                         # packed: the .blend alone is enough
    content = Path(kept).read_bytes()
    bpy.ops.wm.save_mainfile()
    Path(kept).unlink()
    shutil.rmtree(blend.parent / "near_assets", ignore_errors=True)
    shutil.rmtree(stage.module("paths").asset_store(), ignore_errors=True)
    bpy.ops.wm.open_mainfile(filepath=str(blend))
    assert stage.module("session").get().last_error is None
    assert objects.asset_path(bpy.data.objects["teapot"]).read_bytes() == content
    bpy.context.view_layer.objects.active = bpy.data.objects["teapot"]
    assert bpy.ops.near.asset_unpack() == {"FINISHED"}
    assert (blend.parent / "near_assets" / file.name).read_bytes() == content and not bpy.data.texts


def test_several_photos_make_an_asset_each(scene, tmp_path):
    import bpy

    for name in ("a.png", "b.png", "c.png"):
        shutil.copyfile(stage.PHOTO, tmp_path / name)
    assert bpy.ops.near.photo_pick(directory=str(tmp_path), files=[{"name": name} for name in ("a.png", "b.png", "c.png")]) == {"FINISHED"}
    settings = scene.near_relight
    assert [Path(settings.photo).name, *(Path(entry.path).name for entry in settings.more_photos)] == ["a.png", "b.png", "c.png"]
    assert bpy.ops.near.create() == {"FINISHED"}
    made = [bpy.data.objects[name] for name in "abc"]
    assert all(obj.near_relight.is_proxy for obj in made) and [Path(obj.near_relight.photo).name for obj in made] == ["a.png", "b.png", "c.png"]
    assert np.allclose(np.diff([obj.location.x for obj in made]), 1.2), "side by side"

    session = stage.module("session").get()                           # from the button: one after the other, in the background
    jobs = [session.run(stage.module("operators.create").create_job(bpy.context, str(tmp_path / name), index)) for index, name in enumerate(("a.png", "b.png"))]
    stage.tick(lambda: not session.jobs)
    assert [job.state for job in jobs] == ["done", "done"] and len(stage.module("scene.objects").proxies(scene)) == 5
    assert bpy.ops.near.photos_clear() == {"FINISHED"} and not settings.more_photos


def test_a_glb_is_baked_onto_the_mesh_that_gave_the_shape(scene, monkeypatch):
    """It is sent as it stands to the asset; the backend's part is in test_export."""
    import bpy

    bpy.ops.mesh.primitive_cube_add(size=2, location=(1, 2, 3), rotation=(0.3, 0.2, 0.1))
    mesh = bpy.context.object
    mesh.scale = (1, 0.5, 0.25)
    bpy.context.view_layer.update()
    assert bpy.ops.near.encode() == {"FINISHED"}
    asset = bpy.context.object
    assert asset.near_relight.bake_onto == mesh
    export = stage.module("operators.export")
    data = export._mesh_in_asset_space(bpy.context, asset)
    before = set(bpy.data.objects)
    path = Path(bpy.app.tempdir or "/tmp") / "onto.glb"
    path.write_bytes(data)
    bpy.ops.import_scene.gltf(filepath=str(path))
    back = next(item for item in bpy.data.objects if item not in before and item.type == "MESH")
    bpy.context.view_layer.update()
    corners = np.array([back.matrix_world @ v.co for v in back.data.vertices])
    assert np.allclose(corners.max(0), (0.5, 0.25, 0.125), atol=1e-5) and np.allclose(corners.min(0), (-0.5, -0.25, -0.125), atol=1e-5)
    assert back.data.uv_layers
    while mesh.data.uv_layers:
        mesh.data.uv_layers.remove(mesh.data.uv_layers[0])
    mesh.data.update_tag()
    bpy.context.view_layer.update()
    with pytest.raises(stage.module("errors").NearError, match="no UVs"):
        export._mesh_in_asset_space(bpy.context, asset)
    assert not [s for s in bpy.data.scenes if s.name.startswith("near")]
    asset.near_relight.bake_onto = None
    assert export._mesh_in_asset_space(bpy.context, asset) is None, "the asset's own mesh"


def test_asset_browser_entry(scene):
    import bpy

    obj = create(scene)
    assert tuple(obj.preview_ensure().image_size) == (16, 16)         # the job's last picture
    assert bpy.ops.near.asset_mark() == {"FINISHED"}
    assert obj.asset_data is not None and "relightable" in {tag.name for tag in obj.asset_data.tags} and obj.near_relight.packed


def test_progress_by_the_timer_and_cancel(scene):
    import bpy

    session = stage.module("session").get()
    create_module = stage.module("operators.create")
    scene.near_relight.seed = 2
    job = session.run(create_module.create_job(bpy.context, scene.near_relight.photo))
    stages = []
    session.on_change(lambda: stages.append((job.stage, job.fraction)))
    stage.tick(lambda: job.state != "running")
    assert job.state == "done" and bpy.data.objects.get("teapot") and not session.jobs
    assert {"step 1", "step 4"} <= {s for s, _ in stages} and job.preview is not None
    assert all(a[1] <= b[1] + 1e-9 for a, b in zip(stages, stages[1:])), stages

    scene.near_relight.seed = 902
    job = session.run(create_module.create_job(bpy.context, scene.near_relight.photo))
    stage.tick(lambda: job.stage.startswith("step"))
    bpy.ops.near.cancel()
    assert job.state == "cancelled" and not session.jobs and session.last_error is None
    worker = session.beat.get("worker_pid")
    stage.tick(lambda: session.beat.get("job") is None)               # the work itself has stopped, the worker lives
    assert session.beat.get("worker_pid") == worker and len(bpy.data.objects) == 1


def test_a_load_cancels_the_job(scene):
    import bpy

    session = stage.module("session").get()
    scene.near_relight.seed = 902
    job = session.run(stage.module("operators.create").create_job(bpy.context, scene.near_relight.photo))
    stage.tick(lambda: job.stage.startswith("step"))
    bpy.ops.wm.read_homefile(use_empty=True)
    assert job.state == "cancelled" and not session.jobs


def refused(code: str, operator) -> None:
    """The operator fails; the panel has the sentence, the remedy and a button that exists."""
    import bpy

    with pytest.raises(RuntimeError):
        operator()
    error = stage.module("session").get().last_error
    assert error is not None and error.code == code, error
    assert error.what.endswith(".") and error.remedy
    fix = stage.module("errors").fix_of(code)
    assert fix is not None
    group, name = fix.operator.split(".")
    assert hasattr(getattr(bpy.ops, group), name) and getattr(getattr(bpy.ops, group), name).get_rna_type()


def test_errors_have_a_sentence_and_a_button(scene, tmp_path, monkeypatch):
    import bpy

    session = stage.module("session")
    settings = scene.near_relight
    settings.photo = ""
    refused("photo-not-set", bpy.ops.near.create)
    settings.photo = str(tmp_path / "none.png")
    refused("photo-missing", bpy.ops.near.create)
    (tmp_path / "no.png").write_bytes(b"this is not a picture")
    settings.photo = str(tmp_path / "no.png")
    refused("upload-refused", bpy.ops.near.create)
    settings.photo = str(stage.PHOTO)
    settings.seed = 903
    refused("photo-no-object", bpy.ops.near.create)
    settings.seed, settings.exposure = 0, -5.5      # the setting reaches the backend
    refused("photo-no-object", bpy.ops.near.create)
    settings.seed, settings.exposure = 901, 0
    refused("out-of-memory", bpy.ops.near.create)
    settings.seed = 0

    session.get().start()
    stage.tick(lambda: session.get().beat.get("worker") != "ready")   # the worker that ran out of memory is gone
    obj = create(scene)                                               # it goes on after all that
    obj.scale = (1, 1, 2)
    bpy.context.view_layer.update()
    with pytest.raises(stage.module("errors").NearError) as caught:
        stage.module("scene.objects").placed_assets(bpy.context.evaluated_depsgraph_get())
    assert caught.value.code == "scale-not-uniform" and obj.name in caught.value.what
    assert bpy.ops.near.make_scale_uniform() == {"FINISHED"}
    bpy.context.view_layer.update()
    assert tuple(obj.scale) == pytest.approx((2 ** (1 / 3),) * 3, rel=1e-4)
    obj.scale = (-1, 1, 1)
    bpy.context.view_layer.update()
    with pytest.raises(stage.module("errors").NearError, match="mirrored"):
        stage.module("scene.objects").placed_assets(bpy.context.evaluated_depsgraph_get())

    # the backend: none set up, one that cannot start, one of another version, one on another computer
    session.close()
    monkeypatch.setenv("NEAR_PYTHON", str(tmp_path / "nothing"))
    refused("backend-not-set-up", bpy.ops.near.create)
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'the disc is on fire' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("NEAR_PYTHON", str(broken))
    refused("backend-start", bpy.ops.near.create)
    assert "the disc is on fire" in session.get().last_error.what
    session.close()
    monkeypatch.setenv("NEAR_CONNECT", str(tmp_path / "none.json"))
    refused("connection-missing", bpy.ops.near.create)
    ticket = tmp_path / "far.json"
    keys = {name: "0" * 40 for name in ("server_key", "public_key", "secret_key")}
    ticket.write_text(stage.module("connection").json.dumps({"endpoints": {lane: "tcp://192.0.2.1:9" for lane in ("control", "view", "batch")}, **keys}))
    ticket.chmod(0o600)
    monkeypatch.setenv("NEAR_CONNECT", str(ticket))
    monkeypatch.setattr(stage.module("preferences"), "settings", _with(stage.module("preferences").settings, online=False))
    refused("offline", bpy.ops.near.create)
    monkeypatch.undo()


def _with(function, **values):
    import dataclasses

    return lambda: dataclasses.replace(function(), **values)


def test_unreachable_and_other_version(scene, tmp_path, monkeypatch):
    import bpy

    session, wirecodec = stage.module("session"), stage.module("wirecodec")
    session.close()
    monkeypatch.setattr(wirecodec, "PROTOCOL", 999)
    monkeypatch.setattr(stage.module("wire"), "PROTOCOL", 999)
    refused("protocol-mismatch", bpy.ops.near.create)
    assert "999" in session.get().last_error.what
    monkeypatch.undo()
    session.close()
    ticket = tmp_path / "far.json"
    import json

    from zmq import curve_keypair

    public, secret = (key.decode() for key in curve_keypair())
    ticket.write_text(json.dumps({"endpoints": {lane: "tcp://127.0.0.1:9" for lane in ("control", "view", "batch")},
                                  "server_key": curve_keypair()[0].decode(), "public_key": public, "secret_key": secret}))
    ticket.chmod(0o600)
    monkeypatch.setenv("NEAR_CONNECT", str(ticket))
    monkeypatch.setattr(stage.module("links"), "CONNECT_SECONDS", 0.5)
    refused("remote-unreachable", lambda: bpy.ops.near.create())
    session.close()


def test_report_names_versions_and_no_secret(scene):
    import bpy

    bpy.ops.near.backend_start()
    text = stage.module("operators.backend").report_text()
    client = stage.module("session").get().client
    assert bpy.app.version_string in text and client.info["version"] in text and "session:" in text
    assert client.connection.token not in text and str(Path.home()) not in text


def test_a_marked_asset_is_whole_in_another_file(scene, tmp_path):
    """What the asset browser does on a drop: append from a file whose folder may be out of reach."""
    import bpy

    create(scene, seed=4)
    assert bpy.ops.near.asset_mark() == {"FINISHED"}
    blend = tmp_path / "library" / "x.blend"
    blend.parent.mkdir()
    bpy.ops.wm.save_as_mainfile(filepath=str(blend))
    file = next((blend.parent / "near_assets").iterdir())
    content = file.read_bytes()
    shutil.rmtree(file.parent)
    shutil.rmtree(stage.module("paths").asset_store(), ignore_errors=True)
    bpy.ops.wm.read_factory_settings(use_empty=True)
    stage.enable()
    bpy.ops.wm.append(directory=f"{blend}/Object/", filename="teapot")
    assert stage.module("scene.objects").asset_path(bpy.data.objects["teapot"]).read_bytes() == content
