"""The data engine: the file format both ways, jobs and seeds, workers that crash, and small jobs with a real Blender."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from near.errors import NearError
from near.training.starter import read_starter
from near.training.starter_write import ObjectArrays, PhotoFile, write_starter

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

from dataset import pool  # noqa: E402
from dataset.environments import KINDS, make_environment  # noqa: E402
from dataset.job import Item, JobConfig, JobError, claim, list_items  # noqa: E402
from dataset.pool import Machine, run_local  # noqa: E402
from dataset.report import write_reports  # noqa: E402
from dataset.run import Quarantine, _Progress  # noqa: E402

# -- the file ------------------------------------------------------------------------------------------------------------


def arrays(views: int = 2, lights: int = 3, size: int = 16, count: int = 500, **more) -> ObjectArrays:
    rng = np.random.default_rng(3)
    unit = lambda *shape: (lambda v: v / np.linalg.norm(v, axis=-1, keepdims=True))(rng.normal(size=(*shape, 3)))  # noqa: E731
    image = lambda *shape: rng.random((*shape, size, size))  # noqa: E731
    matrices = np.tile(np.eye(4), (views, 1, 1))
    matrices[:, 2, 3] = 2.0
    light = {"hdri": "a", "rotation_z": 0.5, "strength": 1.5}
    return ObjectArrays(
        light=rng.random((views, lights, size, size, 3)) * 4, ambient=rng.random((views, size, size, 3)), alpha=np.ones((views, size, size)),
        base_lin709=rng.random((views, size, size, 3)), roughness=image(views), metallic=image(views), normal=unit(views, size, size),
        depth=image(views) * 3, matrix_world=matrices, K=np.array([[20.0, 0, 8], [0, 20, 8], [0, 0, 1]]), points=rng.uniform(-0.5, 0.5, (count, 3)),
        point_normals=unit(count), point_base_lin709=rng.random((count, 3)), point_roughness=rng.random(count), point_metallic=rng.random(count),
        meta={"object": "thing", "lights": [[light] * lights] * views}, **more)


def photo() -> PhotoFile:
    buffer = io.BytesIO()
    Image.fromarray(np.full((24, 24, 3), 90, np.uint8)).save(buffer, "JPEG")
    facts = {"matrix_world": np.eye(4).tolist(), "K": [[30, 0, 11], [0, 30, 13], [0, 0, 1]], "capture": {"view": "AgX"},
             "light": {"hdri": "b", "rotation_z": 1.0, "strength": 1.0}}
    return PhotoFile(buffer.getvalue(), np.full((24, 24), 200, np.uint8), facts)


def test_what_is_written_is_read(tmp_path):
    source = arrays(shadow=np.random.default_rng(1).random((2, 3, 16, 16)), photos=(photo(), photo()))
    write_starter(tmp_path / "a.npz", source)
    found = read_starter(tmp_path / "a.npz")
    for name, step in (("alpha", 1 / 255), ("roughness", 1 / 255), ("metallic", 1 / 255), ("depth", 1 / 8192), ("shadow", 1 / 255),
                       ("base_lin709", 0.02), ("normal", 0.02)):
        assert np.abs(getattr(found, name).numpy() - getattr(source, name)).max() <= step, name
    assert (found.light.numpy() / source.light.clip(0.2) - source.light / source.light.clip(0.2)).__abs__().max() < 0.02
    # Points come back in another order.
    order = lambda p: np.lexsort(np.round((p + 0.5) * 1024).T)  # noqa: E731
    mine, theirs = order(source.points), order(found.points.numpy())
    assert np.abs(source.points[mine] - found.points.numpy()[theirs]).max() <= 0.5 / 1024 + 1e-6
    assert np.abs(source.point_roughness[mine] - found.point_roughness.numpy()[theirs]).max() <= 1 / 255
    assert np.abs(source.point_base_lin709[mine] - found.point_base_lin709.numpy()[theirs]).max() < 0.02
    assert np.einsum("nc,nc->n", source.point_normals[mine], found.point_normals.numpy()[theirs]).min() > 0.99
    shot = found.photos[1]
    assert shot.srgb.shape == (24, 24, 3) and abs(int(shot.srgb[3, 3, 0]) - 90) < 4 and int(shot.alpha[0, 0]) == 200
    assert shot.light.hdri == "b" and shot.capture == {"view": "AgX"} and float(shot.camera.K[1, 2]) == 13
    assert found.lights[1][2].strength == 1.5 and len(found.cameras) == 2


def test_the_same_content_gives_the_same_bytes(tmp_path):
    for name in "ab":
        write_starter(tmp_path / name, arrays(photos=(photo(),)))
        time.sleep(0.01)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_options_of_the_format_may_be_missing(tmp_path):
    from dataclasses import replace

    write_starter(tmp_path / "a.npz", arrays())
    found = read_starter(tmp_path / "a.npz")
    assert found.shadow is None and found.photos == []
    per_view = np.stack([np.array([[f, 0, 8], [0, f, 8], [0, 0, 1.0]]) for f in (20, 40)])
    write_starter(tmp_path / "b.npz", replace(arrays(), K=per_view))
    assert [float(c.K[0, 0]) for c in read_starter(tmp_path / "b.npz").cameras] == [20, 40]


def test_the_starter_set_survives_a_round_trip(shared_dir, tmp_path):
    files = sorted((shared_dir / "data" / "starter" / "objects").glob("*.npz"))
    if not files:
        pytest.skip("no starter set")
    first = read_starter(files[0])
    with np.load(files[0], allow_pickle=False) as f:
        matrices, K, meta = f["cam_matrix_world"], f["cam_K"], json.loads(bytes(f["meta"]))
    names = [n for n in ObjectArrays.__dataclass_fields__ if n not in ("matrix_world", "K", "meta", "shadow", "photos")]
    write_starter(tmp_path / "a.npz", ObjectArrays(**{n: getattr(first, n).numpy() for n in names}, matrix_world=matrices, K=K, meta=meta))
    again = read_starter(tmp_path / "a.npz")
    for name in names:
        assert torch.allclose(getattr(first, name), getattr(again, name), atol=0.01 if "normal" in name else 1e-6), name


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"nothing")
    with pytest.raises(NearError) as error:
        read_starter(tmp_path / "a.npz")
    assert error.value.code == "training-data-broken" and "a.npz" in error.value.what


# -- lights and jobs -----------------------------------------------------------------------------------------------------


def test_environments_are_functions_of_their_seed():
    kinds = set()
    for seed in range(24):
        rgb, kind = make_environment(seed, 32)
        kinds.add(kind)
        assert rgb.shape == (32, 64, 3) and np.isfinite(rgb).all() and rgb.min() >= 0
        weight = np.sin((np.arange(32) + 0.5) * np.pi / 32)[:, None]
        assert 0.2 < (rgb.mean(-1) * weight).sum() / (weight.sum() * 64) < 1.6
    assert kinds == set(KINDS)
    assert np.array_equal(make_environment(5, 32)[0], make_environment(5, 32)[0])
    assert not np.array_equal(make_environment(5, 32)[0], make_environment(6, 32)[0])


def test_objects_do_not_depend_on_each_other(tmp_path):
    for name in ("b.glb", "sub/a.OBJ", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    few, many = list_items(JobConfig(own=1), tmp_path), list_items(JobConfig(own=3, repeats=2), tmp_path)
    assert len(few) == 3 and len(many) == 7 and {i.key for i in few} < {i.key for i in many}
    assert len({i.key for i in many}) == 7 and {i.asset for i in many} == {None, "b.glb", "sub/a.OBJ"}
    one, two = few[0].seed(1, "shape"), few[0].seed(1, "views")
    assert one != two and one == Item("own_000000", "own").seed(1, "shape") != many[1].seed(1, "shape") and one != few[0].seed(2, "shape")
    for config, folder in ((JobConfig(), None), (JobConfig(), tmp_path / "absent"), (JobConfig(), tmp_path / "sub" / "none")):
        with pytest.raises(JobError):
            list_items(config, folder)
    with pytest.raises(JobError, match="--size is 3"):
        JobConfig(size=3)


def test_a_folder_belongs_to_one_job(tmp_path):
    claim(tmp_path, JobConfig(own=2), {"white": "0"})
    claim(tmp_path, JobConfig(own=9, repeats=2), {"white": "0"})
    for config, lights in ((JobConfig(seed=2), {"white": "0"}), (JobConfig(), {"white": "1"})):
        with pytest.raises(JobError, match="other settings"):
            claim(tmp_path, config, lights)


# -- workers that fail ---------------------------------------------------------------------------------------------------

FAKE_WORKER = '''
import json, os, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    order = json.loads(line)
    key, out = order["item"]["key"], order["output"]
    tries = out + ".tries"
    open(tries, "a").write("x")
    if key == "crash" or (key == "once" and len(open(tries).read()) == 1):
        print("out of luck", file=sys.stderr, flush=True)
        os._exit(11)
    if key == "hang":
        time.sleep(600)
    if key != "refuse":
        open(out, "w").write(key)
    print(json.dumps({"ok": key != "refuse", "reason": "not mine" if key == "refuse" else None, "cpu_seconds": 0.0}), flush=True)
'''


def test_a_crash_a_hang_and_a_refusal_cost_one_object_each(tmp_path, monkeypatch):
    (tmp_path / "fake.py").write_text(FAKE_WORKER)
    monkeypatch.setattr(pool, "COMMAND", (sys.executable, str(tmp_path / "fake.py")))
    keys = ["good", "crash", "once", "refuse", "hang", "good2", "good3"]
    quarantine = Quarantine(tmp_path / "quarantine.json")
    said: list[str] = []
    progress = _Progress(tmp_path / "log.jsonl", quarantine, len(keys), said.append)
    machine = Machine(JobConfig(own=1), tmp_path, None, 1, 5.0)
    run_local([Item(k, "own") for k in keys], machine, 2, lambda item: tmp_path / item.key, progress)
    made = {k for k in keys if (tmp_path / k).is_file()}
    assert made == {"good", "once", "good2", "good3"} and progress.session()["made"] == 4
    entries = json.loads((tmp_path / "quarantine.json").read_text())
    assert {k: e["status"] for k, e in entries.items()} == {"crash": "crashed", "hang": "slow", "refuse": "refused"}
    assert "out of luck" in entries["crash"]["reason"] and entries["refuse"]["reason"] == "not mine"
    assert len((tmp_path / "crash.tries").read_text()) == 2 and len((tmp_path / "refuse.tries").read_text()) == 1
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == len(said) == len(keys)
    again = Quarantine(tmp_path / "quarantine.json")
    assert "hang" in again and len(again) == 3


def test_blender_that_does_not_start_ends_the_job(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "COMMAND", (sys.executable, "-c", "import sys; sys.exit('no module')"))
    with pytest.raises(JobError, match="no module"):
        run_local([Item("a", "own")], Machine(JobConfig(own=1), tmp_path, None, 1, 5.0), 1, lambda item: tmp_path / item.key, lambda result: None)


def test_reports_count_and_show(tmp_path):
    config = JobConfig(own=3)
    items = list_items(config, None)
    for item in items[:2]:
        view = {**photo().facts, "view": {"cut_by_frame": True}, "capture": {"view": "AgX", "look": "", "background": "none", "jpeg_quality": 80}}
        content = arrays(shadow=np.ones((2, 3, 16, 16)), photos=(PhotoFile(photo().jpeg, photo().alpha, view),))
        content.meta.update(object=item.key, kind="own", source="generator", spp=4, triangles=10, material_count=1)
        write_starter(tmp_path / item.file(config.shards), content)
    session = {"made": 2, "wall_seconds": 60.0, "objects_per_hour": 120.0, "core_seconds_per_object": 30.0}
    report = write_reports(tmp_path, items, config, {"own_000002": {"source": "own", "status": "refused", "reason": "dull"}}, session)
    assert report["objects"] == 2 and report["views"] == 4 and report["lit_images"] == 12 and report["photos"] == report["photos_cut_by_frame"] == 2
    text = (tmp_path / "report.md").read_text()
    assert "2 of 3 objects" in text and "120.0 objects an hour" in text and "own_000002 (own): refused; dull" in text
    assert np.asarray(Image.open(tmp_path / "contact_sheet.png")).std() > 10
    assert [e["object"] for e in json.loads((tmp_path / "index.json").read_text())] == ["own_000000", "own_000001"]


# -- with Blender --------------------------------------------------------------------------------------------------------

SMALL = ["--size", "32", "--samples", "4", "--cameras", "1", "--lights", "1", "--photos", "1", "--photo-size", "40", "--points", "400",
         "--own-lights", "2", "--shards", "2", "--threads", "1"]


def start(out: Path, *extra: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, str(TOOLS / "render_dataset.py"), str(out), *SMALL, *extra], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env={**os.environ, "PYTHONPATH": str(TOOLS.parent / "backend")}, start_new_session=True)


def user_assets(folder: Path) -> Path:
    """A painted cube that serves; a file that is no GLB."""
    folder.mkdir()
    corners = [(x, y, z) for x in (0, 2) for y in (0, 1) for z in (0, 1)]
    faces = [(1, 2, 4, 3), (5, 7, 8, 6), (1, 5, 6, 2), (3, 4, 8, 7), (1, 3, 7, 5), (2, 6, 8, 4)]
    (folder / "cube.mtl").write_text("newmtl red\nKd 0.8 0.1 0.05\nPr 0.25\nPm 0.0\n")
    (folder / "cube.obj").write_text("mtllib cube.mtl\n" + "".join(f"v {x} {y} {z}\n" for x, y, z in corners) + "usemtl red\n"
                                     + "".join("f " + " ".join(map(str, f)) + "\n" for f in faces))
    (folder / "broken.glb").write_bytes(b"glTF and nothing more")
    return folder


@pytest.mark.bpy
@pytest.mark.slow
def test_a_job_is_killed_resumed_and_comes_out_the_same(tmp_path):
    out, assets = tmp_path / "killed", user_assets(tmp_path / "assets")
    job = ["--own", "2", "--assets", str(assets)]
    first = start(out, *job)
    deadline = time.monotonic() + 400
    while not list(out.glob("objects/*/[!.]*.npz")) and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("objects/*/[!.]*.npz")}
    assert before
    half = next(out.glob("objects/*/[!.]*.npz")).with_name(".own_000001.1.part.npz")
    half.write_bytes(b"cut short")
    second = start(out, *job)
    text = second.communicate(timeout=400)[0]
    assert second.returncode == 0, text
    files = {p.name: p for p in out.glob("objects/*/*.npz")}
    assert len(files) == 3 and all(files[n].stat().st_mtime_ns == t for n, t in before.items()), text
    assert not half.exists()
    # The broken asset is set aside with its reason; the painted cube knows its paint.
    quarantine = json.loads((out / "quarantine.json").read_text())
    assert len(quarantine) == 1 and next(iter(quarantine.values()))["source"] == "broken.glb"
    cube = read_starter(next(p for n, p in files.items() if n.startswith("cube")))
    assert abs(float(cube.point_roughness.mean()) - 0.25) < 0.02 and float(cube.point_metallic.max()) == 0
    assert torch.allclose(cube.point_base_lin709.median(0).values, torch.tensor([0.8, 0.1, 0.05]), atol=0.02)
    side = cube.points.amax(0) - cube.points.amin(0)
    assert abs(float(side.max()) - 1) < 0.05 and abs(float(side.min()) - 0.5) < 0.03
    inside = cube.alpha[0] > 0.99
    assert torch.allclose(cube.base_lin709[0][inside].median(0).values, torch.tensor([0.8, 0.1, 0.05]), atol=0.02)
    assert 0.2 < float(inside.float().mean()) * 4 and cube.shadow is not None and float(cube.shadow[0, 0][inside].mean()) > 0.5
    own = read_starter(next(p for n, p in files.items() if n.startswith("own_000000")))
    assert len(own.points) == 400 and len(own.photos) == 1 and tuple(own.photos[0].srgb.shape) == (40, 40, 3)
    assert own.photos[0].light.hdri != own.lights[0][0].hdri and (own.photos[0].alpha > 128).float().mean() > 0.02
    assert "objects an hour" in (out / "report.md").read_text() and (out / "contact_sheet.png").is_file()
    # Alone in another folder, the same object has the same bytes.
    alone = start(tmp_path / "alone", "--own", "1")
    text = alone.communicate(timeout=400)[0]
    assert alone.returncode == 0, text
    twin = next((tmp_path / "alone").glob("objects/*/own_000000.npz"))
    assert twin.read_bytes() == files["own_000000.npz"].read_bytes()


@pytest.fixture
def two_nodes():
    """Address of a Ray cluster of two nodes with one core each."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed (near-relight[ray])")
    node = {"num_cpus": 1, "object_store_memory": 100_000_000}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        yield cluster.address
    finally:
        cluster.shutdown()


@pytest.mark.bpy
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_cluster_makes_the_same_files(tmp_path, two_nodes):
    """Two nodes, each with its own Blender, against one process on this machine."""
    job = ["--own", "3", "--assets", str(user_assets(tmp_path / "assets"))]
    for name, extra in (("here", ()), ("there", ("--ray", two_nodes))):
        process = start(tmp_path / name, *job, *extra)
        text = process.communicate(timeout=1500)[0]
        assert process.returncode == 0, text
    here, there = ({p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.suffix in (".npz", ".exr")} for name in ("here", "there"))
    assert len([p for p in here if p.suffix == ".npz"]) == 4 and here.keys() == there.keys()
    assert [str(p) for p in here if here[p] != there[p]] == []
    for name in ("job.json", "index.json", "quarantine.json"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name
    log = [json.loads(line) for line in (tmp_path / "there" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 5 and len({line["node"] for line in log}) == 2


def test_a_wrong_command_is_a_sentence(tmp_path):
    for extra, expected in (((), "Error: There is nothing to make"), (("--own", "1", "--hdris", str(tmp_path / "dark")), "Error: There is no folder")):
        process = start(tmp_path / "x", *extra)
        text = process.communicate(timeout=120)[0]
        assert process.returncode == 2 and text.startswith(expected) and "Traceback" not in text
