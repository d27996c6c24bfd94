"""The scorer against published baselines, the four tasks on a made-up bench, the yardstick Cycles."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_engine import FakeEngine

from near.errors import NearError
from near.evaluation.bench import TASKS, load_bench
from near.evaluation.metrics import (MIN_CROP, contrast_pyramid_distance, mask_box, psnr, score, shown_on_black, ssim)
from near.evaluation.predict import predict
from near.evaluation.report import copy_baseline, report_page, score_targets, table_lines
from near.evaluation.sheets import spread, task_sheet
from near.output import read_rgba, write_exr, write_png


# -- a bench small enough to make ----------------------------------------------------------------------------------------

def disc(size: int, value: float) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    alpha = (torch.hypot(x - size / 2, y - size / 2) < size * 0.3).float()[..., None]
    return torch.cat([(alpha * value).expand(-1, -1, 3), alpha], -1)


def camera_entry(size: int) -> dict:
    matrix = [[1, 0, 0, 0], [0, 0, -1, -2], [0, 1, 0, 0], [0, 0, 0, 1]]
    f = size / 2 / math.tan(math.radians(20))
    return {"matrix_world": matrix, "K": [[f, 0, size / 2], [0, f, size / 2], [0, 0, 1]], "resolution": [size, size]}


@pytest.fixture
def small_bench(tmp_path) -> Path:
    root, size = tmp_path / "bench", 32
    (root / "hdris").mkdir(parents=True)
    (root / "models").mkdir()
    for name, value in (("a", 0.4), ("b", 0.8)):
        write_exr(root / "hdris" / f"{name}.exr", {"color": torch.full((8, 16, 4), value)})
    models = []
    for name in ("one", "two"):
        vertices = "v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 3 2\nf 1 2 4\nf 1 4 3\nf 2 3 4\n"
        (root / "models" / f"{name}.obj").write_text(vertices)
        write_png(root / name / "input_photo.png", np.full((64, 64, 4), 255, np.uint8))
        lights = [{"hdri": f"hdris/{h}.exr", "rotation_z": 0.5, "image": f"{name}/light/cam0_{h}.exr"} for h in "ab"]
        at_photo = [{"hdri": f"hdris/{h}.exr", "rotation_z": 0.1, "image": f"{name}/light/photo_{h}.exr", "kind": k} for h, k in (("a", "own"), ("b", "new"))]
        for light in lights + at_photo:
            write_exr(root / light["image"], {"color": disc(size, 0.4 if light["hdri"].endswith("a.exr") else 0.8)})
        models.append({"model": name, "model_file": f"models/{name}.obj", "info": {"normalise_matrix": np.eye(4).tolist()},
                       "photo": {"image": f"{name}/input_photo.png", "camera": camera_entry(64), "hdri": "hdris/a.exr", "rotation_z": 0.1},
                       "views": [{"camera_id": 0, "camera": camera_entry(size), "lights": lights}],
                       "photo_view": {"camera": camera_entry(size), "lights": at_photo}})
    (root / "index.json").write_text(json.dumps({"split": "tiny", "models": models}))
    return root


def test_four_tasks(small_bench, tmp_path):
    bench, engine = load_bench(small_bench), FakeEngine()
    done = predict(engine, bench, TASKS, tmp_path / "save", lambda fraction, text: None)
    assert done.errors == [] and done.skipped == {}
    expected = {f"{task}/{t.image}" for m in bench.models for task in TASKS for t in m.targets[task]}
    assert {str(p.relative_to(tmp_path / "save")) for p in (tmp_path / "save").rglob("*.exr")} == expected
    kinds = [c[0] for c in engine.calls]
    assert kinds.count("encode") == kinds.count("create") == 2 and kinds.count("render") == 12
    for call in engine.calls:
        if call[0] == "create":  # photo tasks know the photo's camera
            assert call[3].width == 64 and torch.allclose(call[3].position, torch.tensor([0.0, -2.0, 0.0]), atol=1e-6)
        if call[0] == "render":
            angle = math.atan2(call[4][1, 0], call[4][0, 0])
            assert min(abs(angle - 0.5), abs(angle - 0.1)) < 1e-6
    result = score_targets(bench, [t for m in bench.models for t in m.targets["forward"]], lambda t: done.path("forward", t))
    assert result["missing"] == 0 and set(result["models"]) == {"one", "two"} and set(result["lights"]) == {"a", "b"}
    assert result["mean"]["psnr_mask"] > 18  # the fake disc has its light's mean, and a softer outline than the target
    report = {"near": "0", "bench": "tiny", "pack": "compact", "perceptual": "p", "tasks": {"forward": result},
              "baselines": {"copy": copy_baseline(bench)}, "skipped": {}, "errors": []}
    assert any("forward" in line for line in table_lines(report))
    sheet = task_sheet(bench, "forward", lambda t: done.path("forward", t))
    page = report_page(report, {"forward": sheet})
    assert sheet.ndim == 3 and "<img" in page and "forward" in page


def test_a_model_that_fails_is_reported_and_the_rest_goes_on(small_bench, tmp_path):
    bench, engine = load_bench(small_bench), FakeEngine()
    (small_bench / "models" / "one.obj").write_text("# nothing\n")
    engine.fail["create"] = NearError("encode-unsupported", "No.", "Never.")
    done = predict(engine, bench, TASKS, tmp_path / "save", lambda fraction, text: None)
    assert [e["model"] for e in done.errors] == ["one"] and done.errors[0]["code"].startswith("mesh-")
    assert set(done.skipped) == {"reconstruction", "relighting", "novel_view"}
    assert (tmp_path / "save" / "forward" / "two" / "light" / "cam0_a.exr").is_file()
    rest = score_targets(bench, [t for m in bench.models for t in m.targets["forward"]], lambda t: done.path("forward", t))
    assert rest["missing"] == 2


def test_eval_command(small_bench, tmp_path, monkeypatch, capsys):
    from near.cli import main

    monkeypatch.setattr("near.pipeline.engine.Engine", FakeEngine)
    status = main(["eval", str(small_bench), "--save", str(tmp_path / "s"), "--out", str(tmp_path / "r.json"), "--html", "--tasks", "forward,relighting", "--quiet"])
    report = json.loads((tmp_path / "r.json").read_text())
    assert status == 0 and set(report["tasks"]) == {"forward", "relighting"} and "copy" in report["baselines"]
    assert (tmp_path / "r.html").is_file() and (tmp_path / "s" / "sheets" / "forward.png").is_file()
    assert str(tmp_path) not in (tmp_path / "r.json").read_text()
    assert "relighting" in capsys.readouterr().out
    for extra, code in ((["--tasks", "all"], "task-unknown"), (["--models", "three"], "model-unknown")):
        assert main(["eval", str(small_bench), "--out", str(tmp_path / "x.json"), "--quiet", *extra]) == 2
        assert f"[{code}]" in capsys.readouterr().err
    (small_bench / "hdris" / "b.exr").unlink()
    assert main(["eval", str(small_bench), "--out", str(tmp_path / "x.json"), "--quiet"]) == 2
    assert "[bench-incomplete]" in capsys.readouterr().err and not (tmp_path / "x.json").exists()


# -- metrics -------------------------------------------------------------------------------------------------------------

def test_copy_baseline_has_its_published_score(shared_dir):
    if not (shared_dir / "bench" / "dev").is_dir():
        pytest.skip("no bench")
    mean = copy_baseline(load_bench(shared_dir / "bench" / "dev"))["relighting"]["mean"]
    assert round(mean["psnr_frame"], 1) == 24.9 and round(mean["psnr_mask"], 1) == 16.4


def test_equal_pictures():
    picture = disc(40, 0.5).numpy()
    scores = score(picture, picture)
    assert scores.psnr_frame == scores.psnr_mask == 100 and scores.ssim == pytest.approx(1) and scores.perceptual == 0


def test_psnr_by_hand():
    a = np.zeros((4, 4, 3), np.uint8)
    assert psnr(a, a + 16) == pytest.approx(20 * math.log10(255 / 16))


def test_empty_target_and_other_size_are_refused():
    picture = disc(40, 0.5).numpy()
    for prediction, target, code in ((picture, np.zeros_like(picture), "score-empty"), (picture[:20], picture, "score-size")):
        with pytest.raises(NearError) as error:
            score(prediction, target)
        assert error.value.code == code


def test_black_stays_black_and_nan_does_not_spread():
    picture = np.zeros((2, 2, 4), np.float32)
    picture[0, 0, :3] = np.nan
    assert shown_on_black(picture).max() <= 1


def test_mask_box_is_never_too_small():
    mask = np.zeros((64, 48), bool)
    mask[0, 47] = True
    rows, columns = mask_box(mask)
    assert rows == slice(0, MIN_CROP) and columns == slice(48 - MIN_CROP, 48)
    mask[10:60, 5:40] = True
    assert mask_box(mask) == (slice(0, 60), slice(5, 48))


def test_ssim_and_perceptual_order_degradations():
    generator = torch.Generator().manual_seed(0)
    clean = torch.nn.functional.interpolate(torch.rand(1, 3, 12, 12, generator=generator), size=96, mode="bicubic")[0].clamp(0, 1)
    clean = (clean + 0.1 * torch.rand(3, 96, 96, generator=generator)).clamp(0, 1)
    soft = torch.nn.functional.avg_pool2d(clean[None], 3, 1, 1)[0]
    softer = torch.nn.functional.avg_pool2d(clean[None], 9, 1, 4)[0]
    other = torch.rand(3, 96, 96, generator=generator)
    brighter = (clean * 1.03).clamp(0, 1)
    for metric, sign in ((contrast_pyramid_distance, 1), (lambda a, b: -ssim(a, b), 1)):
        values = [sign * metric(clean, x) for x in (brighter, soft, softer, other)]
        assert values == sorted(values)
    assert contrast_pyramid_distance(clean, soft) == pytest.approx(contrast_pyramid_distance(soft, clean), abs=1e-6)
    assert contrast_pyramid_distance(clean, other) > 0.5


def test_spread_takes_different_views_and_lights(shared_dir):
    bench = load_bench(shared_dir / "bench" / "dev", ["mixer"])
    chosen = spread(bench.models[0].targets["forward"])
    assert len({t.label.split(",")[0] for t in chosen}) == len({t.light.name for t in chosen}) == 3


# -- Cycles --------------------------------------------------------------------------------------------------------------

@pytest.mark.bpy
@pytest.mark.slow
def test_cycles_reproduces_the_bench(shared_dir, tmp_path):
    """The script's camera, light and settings are the bench's: its pictures agree with the targets."""
    from near.evaluation.cycles import CyclesFrame, render_with_cycles, why_unavailable

    if why_unavailable():
        pytest.skip(why_unavailable())
    bench = load_bench(shared_dir / "bench" / "dev", ["chess_king_black"])
    model = bench.models[0]
    target = model.targets["novel_view"][0]
    out = tmp_path / "c.exr"
    frame = CyclesFrame(target.view.matrix_world, target.view.K, target.view.resolution, str((bench.root / target.light.hdri).absolute()),
                        target.light.rotation_z_rad, str(out))
    seconds = render_with_cycles((bench.root / model.mesh).absolute(), [frame], normalise=model.normalise, samples=16)
    assert len(seconds) == 1
    assert score(read_rgba(out), read_rgba(bench.root / target.image)).psnr_mask > 32


@pytest.mark.bpy
@pytest.mark.slow
def test_baked_is_rendered_once_and_kept(small_bench, tmp_path, monkeypatch):
    from near.evaluation import baked
    from near.evaluation.cycles import why_unavailable

    if why_unavailable():
        pytest.skip(why_unavailable())
    monkeypatch.setattr(baked, "weights_home", lambda: tmp_path / "home" / "weights")
    monkeypatch.setattr(baked, "SAMPLES", 4)
    bench, said = load_bench(small_bench, ["one"]), []
    first = baked.baked_baseline(bench, TASKS, lambda fraction, text: said.append(text))
    assert set(first) == {"reconstruction", "relighting", "novel_view"} and said
    assert all(r["missing"] == 0 and math.isfinite(r["mean"]["psnr_mask"]) for r in first.values())
    pictures = sorted((tmp_path / "home" / "baked").rglob("*.exr"))
    assert len(pictures) == 4 and not [p for p in pictures if p.name.startswith(".")]
    # The photo is white, so the mesh comes out in its light's colour: grey, brighter under the brighter light.
    shown = {p.stem: read_rgba(p) for p in pictures}
    means = {name: x[x[..., 3] > 0.9][:, :3].mean() for name, x in shown.items()}
    assert means["photo_b"] == pytest.approx(2 * means["photo_a"], rel=0.1) and 0.2 < means["photo_a"] < 0.5
    monkeypatch.setattr(baked, "render_with_cycles", lambda *a, **k: pytest.fail("rendered again"))
    assert baked.baked_baseline(bench, TASKS, lambda fraction, text: None) == first


@pytest.mark.bpy
def test_cycles_that_fails_says_so(tmp_path):
    from near.evaluation.cycles import render_with_cycles, why_unavailable

    if why_unavailable():
        pytest.skip(why_unavailable())
    with pytest.raises(NearError) as error:
        render_with_cycles(tmp_path / "absent.glb", [])
    assert error.value.code == "cycles-failed"


# -- consistency ---------------------------------------------------------------------------------------------------------

class LitBall:
    """A white ball of radius 0.4 with a stripe, shaded by the light's mean plus a lobe: linear in the light and rigid.
    ``exponent`` and ``fixed`` break that."""

    def __init__(self, exponent: float = 1.0, fixed: float = 0.0, noise: float = 0.0) -> None:
        self.exponent, self.fixed, self.noise = exponent, fixed, noise
        self.generator = torch.Generator().manual_seed(0)

    def render(self, placed, light, camera, *, passes=("color",)):
        from near.lighting.equirect import texel_directions
        from near.pipeline.types import Frame

        world_from_asset = placed[0].world_from_asset
        y, x = torch.meshgrid(torch.arange(camera.height) + 0.5, torch.arange(camera.width) + 0.5, indexing="ij")
        K = camera.K
        ray = torch.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], torch.ones_like(x)], -1)
        world_from_cam = camera.world_from_cam
        d = torch.nn.functional.normalize(ray @ world_from_cam[:3, :3].T, dim=-1)
        o = world_from_cam[:3, 3]
        b = d @ o
        root = b ** 2 - (o @ o - 0.16)
        hit = root > 0
        t = torch.where(hit, -b - root.clamp_min(0).sqrt(), torch.zeros(()))
        p = o + t[..., None] * d
        n = p / 0.4
        height, width = light.rgb_lin709.shape[:2]
        towards = texel_directions(height, width).reshape(-1, 3) @ light.env_from_world
        radiance = (light.rgb_lin709.reshape(-1, 3) * light.strength) / len(towards)
        lit = ((n.reshape(-1, 3) @ towards.T).clamp_min(0) @ radiance).reshape(*n.shape)
        stripe = ((p @ world_from_asset[:3, :3])[..., :1] * 12).sin() * 0.3 + 0.7
        colour = (lit * stripe) ** self.exponent + self.fixed * (p[..., 2:] > 0)
        colour = colour * (1 + self.noise * torch.randn(colour.shape[:2], generator=self.generator)[..., None])
        alpha = hit.float()[..., None]
        depth = (torch.cat([p, torch.ones_like(t[..., None])], -1) @ camera.cam_from_world.T)[..., 2:3]
        layers = {"color": torch.cat([colour.clamp_min(0) * alpha, alpha], -1), "depth": torch.where(hit[..., None], depth, torch.tensor(float("inf")))}
        return Frame(camera, {name: layers[name] for name in passes})


@pytest.fixture
def lit_scene():
    from near.geometry.cameras import orbit_camera
    from near.lighting import Environment

    generator = torch.Generator().manual_seed(2)
    maps = [torch.rand(16, 32, 3, generator=generator) ** 4 * 3 for _ in range(2)]
    return orbit_camera(0.4, 0.3, 2.0, 0.6, 96, 96), *(Environment(m) for m in maps)


def test_light_that_behaves_passes_the_checks(lit_scene):
    from near.evaluation.consistency import doubling_error, flicker, rotation_psnr, sum_error

    camera, a, b = lit_scene
    ball, asset = LitBall(), None
    assert rotation_psnr(ball, asset, a, camera) > 45 and doubling_error(ball, asset, a, camera) < 1e-5
    assert sum_error(ball, asset, a, b, camera) < 1e-5 and flicker(ball, asset, a, camera) < 1.5


def test_light_that_does_not_behave_is_found(lit_scene):
    from near.evaluation.consistency import doubling_error, flicker, rotation_psnr, sum_error

    camera, a, b = lit_scene
    bent, glued, noisy = LitBall(exponent=0.8), LitBall(fixed=0.3), LitBall(noise=0.1)
    assert doubling_error(bent, None, a, camera) == pytest.approx(1 - 2 ** -0.2, abs=0.01)  # 2 x, bent, is 2^0.8 of 2
    assert sum_error(bent, None, a, b, camera) > 0.05
    assert rotation_psnr(glued, None, a, camera) < 30
    # Noise of a known size in 8-bit levels comes out as such.
    from near.evaluation.metrics import shown_on_black
    from near.pipeline.types import PlacedAsset

    still = [np.asarray(e.render([PlacedAsset(None)], a, camera).layers["color"]) for e in (LitBall(), noisy)]
    mask = still[0][..., 3] > 0.5
    size = float((shown_on_black(still[0])[mask].astype(float) - shown_on_black(still[1])[mask]).std())
    assert 0.5 * size < flicker(noisy, None, a, camera) < 1.2 * size


def test_spread_by_hand():
    from near.evaluation.consistency import spread

    assert spread([np.zeros(4), np.zeros(4)]) == 0
    assert spread([np.full(4, 1.0), np.full(4, 3.0)]) == pytest.approx(1.0)


def test_parts_of_a_spread():
    from near.evaluation.consistency import local_spread, spread_parts

    still, names = np.random.default_rng(0).random((50, 6)), ("exposure_share", "cast_share", "local_share")
    noise = np.random.default_rng(1).normal(size=(50, 6))
    for k, change in enumerate((np.ones((50, 6)), np.tile([1.0, 0, -1], 2) * np.ones((50, 1)), noise - noise.mean(0))):
        parts = spread_parts(np.stack([still, still + 0.1 * change]))
        assert parts[names[k]] == pytest.approx(1.0) and sum(parts.values()) == pytest.approx(1.0)
        local = local_spread(np.stack([still - change, still + change]))
        assert local == pytest.approx(np.sqrt((change ** 2).mean()) if k == 2 else 0.0, abs=1e-9)


def test_consistency_command(small_bench, tmp_path, monkeypatch, capsys):
    from near.cli import main

    monkeypatch.setattr("near.pipeline.engine.Engine", FakeEngine)
    status = main(["eval", str(small_bench), "--tasks", "none", "--consistency", "--out", str(tmp_path / "r.json"), "--html", "--quiet"])
    report = json.loads((tmp_path / "r.json").read_text())
    found = report["consistency"]
    assert status == 0 and report["tasks"] == {} and set(found["models"]) == {"one", "two"}
    # The fake disc is the light's mean: linear, the same from everywhere.
    assert found["met"] == {"rotation_psnr": True, "doubling_error": True, "sum_error": True} and found["worst"]["sum_error"] < 1e-5
    text = capsys.readouterr().out
    assert "doubling_error" in text and "0.03 ok" in text and "consistency" in (tmp_path / "r.html").read_text()


# -- the README's tables -------------------------------------------------------------------------------------------------

def test_tables_are_written_from_reports(repository, tmp_path):
    import importlib.util

    spec = importlib.util.spec_from_file_location("results_table", repository / "tools" / "results_table.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    mean = {"psnr_mask": 22.04, "psnr_frame": 30.0, "ssim": 0.9, "perceptual": 0.1}
    text = "".join(f"<!-- table:{name} -->\nold\n<!-- /table -->\n" for name in ("eval", "consistency", "paper", "ablation", "layers"))
    assert tables.filled(text, tmp_path).count("Not measured yet.") == 5
    report = {"perceptual": "p", "tasks": {"forward": {"mean": mean, "models": {}}, "relighting": {"mean": mean, "models": {}}},
              "baselines": {"baked": {"relighting": {"mean": {**mean, "psnr_mask": 20.0}}}}, "median_seconds": {"render": 0.1},
              "consistency": {"mean": {"doubling_error": 0.001}, "worst": {"doubling_error": 0.002}, "limits": {"doubling_error": 0.03}, "met": {"doubling_error": True}}}
    other = json.loads(json.dumps(report))
    other["tasks"]["relighting"]["mean"]["psnr_mask"] = 20.54
    shallow = {**report, "variant": "1 LAD layers", "layers": 1, "machine": {"cpu": "c", "cores": 2}, "size": [8, 8], "frames_per_second": 10.0,
               "frame_processor_seconds": 0.15}
    for name, data in (("eval-dev", report), ("ablation-lh-base-colour", {**report, "variant": "all"}), ("ablation-shaded", {**other, "variant": "lit"}),
                       ("ablation-lad-1", shallow)):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    found = tables.filled(text, tmp_path)
    assert "old" not in found and "Not measured yet." not in found
    assert "| baseline *baked* | 20.0 |" in found and "| 0.10% | 0.20% | 3.00% |" in found
    assert "| relighting, homogenised over shaded input, dB | 1.5 | about 3 |" in found and "different data" in found
    assert "| lit | 20.5 |" in found and "| 1 LAD layers | 22.04 | 10.0 | 150 ms |" in found
    assert tables.filled(found, tmp_path) == found
    with pytest.raises(SystemExit):
        tables.filled("<!-- table:nonsense -->\n<!-- /table -->", tmp_path)
