"""The weights card and the sheet of photos: written from what was measured."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
import torch


@pytest.fixture(scope="module")
def tool(repository):
    def load(name: str):
        spec = importlib.util.spec_from_file_location(name, repository / "tools" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def report() -> dict:
    target = lambda model, image, db: {"model": model, "image": image, "light": "a_light", "psnr_mask": db}  # noqa: E731
    mean = {"psnr_mask": 21.0, "psnr_frame": 28.0, "ssim": 0.8, "perceptual": 0.2}
    tasks = {"relighting": {"mean": mean, "models": {"one": {"psnr_mask": 15.0}, "two": {"psnr_mask": 27.0}},
                            "targets": [target("one", "x", 16.0), target("one", "y", 14.0), target("two", "z", 27.0)]}}
    return {"bench": "dev", "perceptual": "p", "tasks": tasks,
            "consistency": {"mean": {"spread_ratio": 0.5, "exposure_share": 0.7}, "limits": {"spread_ratio": 0.3333}}}


def test_the_card_says_what_the_reports_say(tool):
    cards = tool("weights_card")
    models = cards.credits("# x\n\n| file | title | author | licence | source |\n|---|---|---|---|---|\n| a.glb | A | B | CC-BY-4.0 | https://c |\n")
    assert models == [{"file": "a.glb", "title": "A", "author": "B", "licence": "CC-BY-4.0", "source": "https://c"}]
    data = {"objects": 3, "of_meshes": 2, "of_models": 1, "photos": 36, "pixels": 128, "materials": {"me, CC0": 4}, "lights": {}, "meshes": {}, "models": models}
    training = {"stages": [{"stage": "h", "what": "a head", "device": "a CPU", "steps": 6500, "minutes": 90}],
                "slots": [{"device": "a GPU", "stages": {"renderer": {"steps": 1000, "minutes": 30.0}, "homogenizer": {"steps": 5, "head_steps": 20, "minutes": 30.0}}}]}
    manifest = {"files": {"f": {"bytes": 12_300_000}}, "meta": {"config": {"resolution": 32}}}
    text = cards.card(data, training, report(), manifest, {"mean": math.log(1.25), "deviation": math.log(1.5), "photos": 1200})
    for wanted in ("12.3 MB", "| a head | a CPU | 6,500 | 1.5 |", "| slot 1, homogenizer | a GPU | 25 | 0.50 |", "| 21.0 | 0.800 | 0.200 | one, 15.0 |",
                   "0.50 of what the shaded ones differ by (wanted: 0.33), 70%", "one under a light, 14.0 dB", "A, B, CC-BY-4.0, https://c", "1.25 times as bright", "over 1,200 path-traced"):
        assert wanted in text, wanted
    assert "times as bright" not in cards.card(data, training, report(), manifest, {})
    assert [t["image"] for _, t in cards.worst_targets(report())] == ["y", "z"]  # of different models


def test_stages_are_read_from_logs(tool, tmp_path, monkeypatch):
    cards = tool("weights_card")
    monkeypatch.setattr(cards, "REPORTS", tmp_path)
    (tmp_path / "run.jsonl").write_text('{"step": 20, "loss": 1}\n{"step": 140, "loss": 1}\n')
    (tmp_path / "head.log").write_text('{"step": 500, "loss": 0.1}\n{"step": 6500, "loss": 0.1}\n')
    for name, log in (("renderer", "run.jsonl"), ("head", "head.log"), ("renderer", "run.jsonl")):
        assert cards.main(["stage", name, str(tmp_path / log), "--minutes", "3", "--what", name]) == 0
    found = json.loads((tmp_path / "training.json").read_text())["stages"]
    assert [(s["stage"], s["steps"]) for s in found] == [("head", 6500), ("renderer", 140)]
    (tmp_path / "head.log").write_text("nothing\n")
    with pytest.raises(SystemExit):
        cards.main(["stage", "head", str(tmp_path / "head.log"), "--minutes", "3", "--what", "x"])


def test_the_shipped_card_is_up_to_date(tool):
    cards = tool("weights_card")
    assert cards.main(["write", "--check"]) == 0
    assert cards.FAILURES.is_file()


def test_the_sheets_cameras(tool):
    from near.geometry.cameras import orbit_camera
    from near.pipeline.compact_assets import camera_record

    sheet = tool("photo_sheet")
    camera = orbit_camera(0.0, 0.2, 2.0, 0.7, 640, 480)
    asset = type("Asset", (), {"meta": {"photo_camera": camera_record(camera)}})
    small = sheet.photo_camera(asset, 160)
    assert (small.width, small.height) == (160, 120) and torch.allclose(small.K[0], camera.K[0] / 4)
    moved = sheet.turned(small, math.radians(40))
    assert float(moved.position.norm()) == pytest.approx(2.0, abs=1e-5) and float(moved.position[2]) == pytest.approx(float(small.position[2]), abs=1e-5)
    cosine = float((moved.position[:2] * small.position[:2]).sum() / small.position[:2].norm() ** 2)
    assert cosine == pytest.approx(math.cos(math.radians(40)), abs=1e-4)
