"""Training in slots: the package, weights in pieces, curves, and a rehearsal on the CPU."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from near.errors import NearError
from near.lighting import load_environment
from near.lighting.samples import sample_environment
from near.output import write_environment


@pytest.fixture(scope="module")
def slot(repository):
    """The modules of tools/slot by name."""
    sys.path.insert(0, str(repository / "tools" / "slot"))
    yield lambda name: importlib.import_module(name)
    sys.path.remove(str(repository / "tools" / "slot"))


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> Path:
    """Three training objects and a light."""
    from near.training.starter_write import write_starter
    from test_training import ball

    folder = tmp_path_factory.mktemp("data")
    (folder / "set" / "objects").mkdir(parents=True)
    (folder / "hdris").mkdir()
    for seed in range(3):
        write_starter(folder / "set" / "objects" / f"ball_{seed}.npz", ball(seed))
    write_environment(folder / "hdris" / "studio.exr", sample_environment("studio", 32))
    return folder


def small_pack(folder: Path) -> Path:
    from near.weights.integrity import write_manifest

    folder.mkdir()
    for name, size in (("renderer", 2500), ("base_flow", 900), ("homogenizer", 1000)):
        (folder / f"{name}.safetensors").write_bytes(np.random.default_rng(size).bytes(size))
    write_manifest(folder, "compact", {"config": {"resolution": 32}})
    return folder


def test_pieces_come_together_and_damage_is_found(slot, tmp_path):
    pieces, pack = slot("pieces"), small_pack(tmp_path / "pack")
    index = pieces.split_pack(pack, tmp_path / "p", [{"date": "d"}], piece_bytes=1000)
    assert [len(f["pieces"]) for f in index["files"].values()] == [1, 1, 3]
    assert max(p.stat().st_size for p in (tmp_path / "p").iterdir() if ".piece" in p.name) <= 1000
    assert pieces.join_pack(tmp_path / "p", tmp_path / "joined")["history"] == [{"date": "d"}]
    for file in pack.iterdir():
        assert (tmp_path / "joined" / file.name).read_bytes() == file.read_bytes()
    last = tmp_path / "p" / "renderer.safetensors.piece2"
    kept = last.read_bytes()
    last.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(NearError) as error:
        pieces.join_pack(tmp_path / "p", tmp_path / "not")
    assert error.value.code == "pieces-damaged" and not (tmp_path / "not").exists()
    last.unlink()
    with pytest.raises(NearError) as error:
        pieces.join_pack(tmp_path / "p", tmp_path / "not")
    assert error.value.code == "pieces-missing"
    # Fewer, larger pieces leave none of the old behind.
    pieces.split_pack(pack, tmp_path / "p", [])
    assert len(list((tmp_path / "p").glob("*.piece*"))) == 3


def test_a_light_survives_travel(slot, tmp_path):
    rgb = sample_environment("night-street", 64).rgb_lin709
    (tmp_path / "a.hdr").write_bytes(slot("package").rgbe_bytes(rgb.numpy()))
    back = load_environment(tmp_path / "a.hdr").rgb_lin709
    assert back.shape == rgb.shape
    peak = rgb.amax(-1, keepdim=True)
    assert float(((back - rgb).abs() / peak.clamp_min(1e-6)).max()) < 0.01


def test_the_package_keeps_to_its_size(slot, objects, tmp_path):
    package = slot("package")
    everything = package.write_package(tmp_path / "a.tar.gz", [objects / "set" / "objects"], objects / "hdris", light_width=32)
    assert everything.objects == 3 and everything.left_out == 0 and (tmp_path / "a.tar.gz").stat().st_size == everything.bytes
    content = package.unpack(tmp_path / "a.tar.gz", tmp_path / "u")
    names = {p.relative_to(content).as_posix() for p in content.rglob("*") if p.is_file()}
    assert {"hdris/studio.hdr", "code/backend/near/training/cli.py", "code/tools/slot/__main__.py", "contents.json"} <= names
    assert not [n for n in names if n.endswith(".safetensors") or "__pycache__" in n]
    package.write_package(tmp_path / "b.tar.gz", [objects / "set" / "objects"], objects / "hdris", light_width=32)
    assert (tmp_path / "a.tar.gz").read_bytes() == (tmp_path / "b.tar.gz").read_bytes()
    one = (objects / "set" / "objects" / "ball_0.npz").stat().st_size
    limit = (everything.bytes - 3 * one + 2.5 * (one + 1200) + package.SPARE) / 1e6  # room for two
    fewer = package.write_package(tmp_path / "c.tar.gz", [objects / "set" / "objects"], objects / "hdris", light_width=32, limit_mb=limit)
    assert 1 <= fewer.objects < 3 and fewer.objects + fewer.left_out == 3 and fewer.bytes <= limit * 1e6
    assert package.write_package(tmp_path / "e.tar.gz", [objects / "set"], objects / "hdris", light_width=32).objects == 3  # searched through
    for limit, folder, lights, code in ((0.1, "set/objects", "hdris", "slot-too-big"), (60, "hdris", "hdris", "training-data-missing"),
                                        (60, "set", "set", "training-lights-missing"), (60, "set", "nowhere", "training-lights-missing")):
        with pytest.raises(NearError) as error:
            package.write_package(tmp_path / "d.tar.gz", [objects / folder], objects / lights, light_width=32, limit_mb=limit)
        assert error.value.code == code and not (tmp_path / "d.tar.gz").exists()


def test_a_package_that_is_none(slot, tmp_path):
    (tmp_path / "torn.tar.gz").write_bytes(b"\x1f\x8b\x08 torn")
    for name in ("missing.tar.gz", "torn.tar.gz"):
        with pytest.raises(NearError) as error:
            slot("package").unpack(tmp_path / name, tmp_path / "u")
        assert error.value.code == "slot-unreadable"


def test_curves_of_whole_and_of_broken_logs(slot, tmp_path):
    curves = slot("curves")
    (tmp_path / "a").mkdir()
    lines = [json.dumps({"step": k, "loss": 1 / k}) for k in range(1, 200)]
    (tmp_path / "a" / "log.jsonl").write_text("\n".join(lines) + '\n{"step": 200, "lo')
    (tmp_path / "a" / "held_out.jsonl").write_text('{"step": 100, "psnr": 20.0, "psnr_prior": 1.0}\n')
    assert len(curves.read_lines(tmp_path / "a" / "log.jsonl")) == 199
    picture = curves.curves({"renderer": tmp_path / "a", "base": tmp_path / "none"})
    width, height = curves.SIZE
    assert picture.shape == (2 * height, 2 * width, 3)
    assert (picture[:height, :width] == curves.SMOOTH).all(-1).sum() > 300  # the curve is there
    assert curves.last_sheets({"a": tmp_path / "a"}) is None


def test_training_through_the_rasteriser_is_the_same(objects):
    """The matrices that a CPU trains with, against a differentiable splatter (gsplat's place on a GPU), gradients too."""
    import torch
    from near.assets import Anchors
    from near.models.anchors import decode_anchors
    from near.training.cache import CacheConfig, build_cache, unpack_matrix
    from near.training.lights import LightLibrary
    from near.training.rasterised import rasterised
    from near.training.renderer import SparseSplat
    from near.training.starter import read_starter

    raw = build_cache(read_starter(objects / "set" / "objects" / "ball_0.npz"), LightLibrary(objects / "hdris"), CacheConfig())
    cloud = decode_anchors(raw["coords"], Anchors(**raw["anchors"]), 32)
    matrix, wanted = unpack_matrix(raw["matrices"][0]), torch.linspace(0, 1, len(cloud) * 3).view(-1, 3)
    a, b = wanted.clone().requires_grad_(), wanted.clone().requires_grad_()
    side = int(matrix.shape[0] ** 0.5)
    prepared = SparseSplat.apply(a, matrix).view(side, side, 3)
    direct = rasterised(cloud, raw["cam_from_world"][0], raw["K"], (side, side), b, "reference")
    assert float((prepared - direct).detach().abs().max()) < 2e-3 and float(prepared.detach().max()) > 0.5
    for picture in (prepared, direct):
        (picture * torch.arange(side)[:, None, None]).sum().backward()
    assert float((a.grad - b.grad).abs().max()) < 2e-3 * float(a.grad.abs().max())


@pytest.mark.slow
def test_two_slots_in_a_row(slot, repository, objects, tmp_path):
    """Rehearsal: the second slot goes on from the first one's pieces; both leave everything, and the pack loads."""
    from near.models.compact import CompactModels
    from near.weights.packs import compact_dir

    def run(*arguments) -> str:
        made = subprocess.run(["sh", str(repository / "tools" / "train_compact.sh"), *map(str, arguments)], capture_output=True, text=True,
                              env={**os.environ, "PYTHON": sys.executable})
        assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
        return made.stdout

    run("prepare", objects / "set" / "objects", "--hdris", objects / "hdris", "--light-width", 32, "--fresh", "-o", tmp_path / "box")
    common = ["--minutes", 30, "--device", "cpu", "--steps", 2, "--cores", 1, "--work", tmp_path / "work"]
    first = run("train", tmp_path / "box" / "slot.tar.gz", *common, "--stages", "renderer", "--weights", compact_dir(), "-o", tmp_path / "one")
    assert "goes on from the last weights" in first
    run("train", tmp_path / "work" / "slot", *common, "--stages", "base", "--weights", tmp_path / "one" / "weights", "-o", tmp_path / "two")
    assert {"curves.png", "slot.json", "weights"} <= {p.name for p in (tmp_path / "two").iterdir()}
    run("join", tmp_path / "two" / "weights", "-o", tmp_path / "pack", "--history", tmp_path / "h.json")
    slots = json.loads((tmp_path / "h.json").read_text())["slots"]
    assert [list(s["stages"]) for s in slots] == [["renderer"], ["base"]] and all(next(iter(s["stages"].values()))["steps"] == 2 for s in slots)
    old, new = CompactModels.load(), CompactModels.load(str(tmp_path / "pack"))
    changed = {name: any((a != b).any() for a, b in zip(getattr(old, name).state_dict().values(), getattr(new, name).state_dict().values()))
               for name in ("renderer", "base_flow", "homogenizer")}
    assert changed == {"renderer": True, "base_flow": True, "homogenizer": False}
