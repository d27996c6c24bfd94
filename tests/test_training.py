"""The training loop: a killed run goes on exactly, several processes average, the budget ends, every stage leaves its files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numba
import numpy as np
import pytest
import scipy.sparse
import torch
from safetensors.torch import load_file

from near.cli import main
from near.errors import NearError
from near.lighting import Environment
from near.lighting.samples import sample_environment
from near.output import write_environment
from near.training import losses as losses_module
from near.training.lights import LightLibrary, mean_luminance
from near.training.flow_data import held_out_rows
from near.training.journal import Journal, Sheet
from near.training.loop import LoopConfig, Sampler, run
from near.training.renderer import SparseSplat, on_device
from near.training.starts import base_flow_from, homogenizer_from
from near.training.starter_write import ObjectArrays, write_starter
from near.weights.packs import compact_dir

# A trainer that is killed, not stopped, right after it logged a step.
KILLED = """
import os, signal, sys
from near.training import journal
log = journal.Journal.log
def fatal(self, step, numbers):
    log(self, step, numbers)
    if step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
journal.Journal.log = fatal
from near.cli import main
sys.exit(main(sys.argv[1:]))
"""
STEPS, SAVE, DEATH = 5, 2, 3


def ball(seed: int, views: int = 2, lights: int = 2, size: int = 24) -> ObjectArrays:
    """A matt ball with a painted half, seen from two sides; its pictures are flat shaded."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(900, 3))
    points /= np.linalg.norm(points, axis=-1, keepdims=True)
    paint = rng.uniform(0.1, 0.8, (2, 3))
    x, y = np.meshgrid(*[(np.arange(size) + 0.5) / size * 2 - 1] * 2)
    alpha = ((x ** 2 + y ** 2) < 0.45).astype(np.float64)
    base = np.where(x[..., None] > 0, paint[0], paint[1]) * alpha[..., None]
    slope = alpha * np.clip(0.6 - 0.5 * y, 0, 1)
    lit = np.stack([base * slope[..., None] * (1 + k) for k in range(lights)])
    matrices = np.tile(np.eye(4), (views, 1, 1))
    for k, yaw in enumerate((0.0, 2.1)[:views]):
        c, s = np.cos(yaw), np.sin(yaw)
        matrices[k, :3] = [[c, 0, s, 2 * s], [s, 0, -c, -2 * c], [0, 1, 0, 0]]
    image = lambda value: np.tile(value, (views, 1, 1))  # noqa: E731
    light = [{"hdri": "studio", "rotation_z": float(k), "strength": 1.0} for k in range(lights)]
    f = size / 2 / np.tan(np.radians(20))
    return ObjectArrays(
        light=np.tile(lit, (views, 1, 1, 1, 1)), ambient=np.tile(base, (views, 1, 1, 1)), alpha=image(alpha), base_lin709=np.tile(base, (views, 1, 1, 1)),
        roughness=image(alpha * 0.5), metallic=image(alpha * 0), normal=np.tile([0.0, 0, 1], (views, size, size, 1)), depth=image(alpha * 1.6),
        matrix_world=matrices, K=np.array([[f, 0, size / 2], [0, f, size / 2], [0, 0, 1]]), points=points * 0.45, point_normals=points,
        point_base_lin709=np.where(points[:, :1] > 0, paint[0], paint[1]), point_roughness=np.full(len(points), 0.5),
        point_metallic=np.zeros(len(points)), meta={"object": f"ball {seed}", "lights": [light] * views})


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """numba and torch share one OpenMP, and two threads that wait for each other on a busy machine are slow."""
    numba.set_num_threads(1)
    torch.set_num_threads(1)
    yield
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three precomputed balls and a light."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "objects").mkdir()
    (folder / "hdris").mkdir()
    for seed in range(3):
        write_starter(folder / "objects" / f"ball_{seed}.npz", ball(seed))
    write_environment(folder / "hdris" / "studio.exr", sample_environment("studio", 32))
    assert main(["train", "precompute", str(folder / "objects"), "--hdris", str(folder / "hdris"), "-o", str(folder / "cache")]) == 0
    return folder


def losses(run_folder: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: line["loss"] for line in lines}


def killed_and_resumed(command: list[str], unbroken: Path, broken: Path) -> None:
    """Run a stage in one go, and again with a kill between two saves; every loss must be the same."""
    options = ["--steps", str(STEPS), "--save-every", str(SAVE), "--sheet-every", "4", "--seed", "3", "--threads", "1"]
    assert main([*command, "-o", str(unbroken), *options]) == 0
    child = subprocess.run([sys.executable, "-c", KILLED.format(step=DEATH), *command, "-o", str(broken), *options], capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert max(losses(broken)) == DEATH and torch.load(broken / "state.pt", weights_only=True)["step"] == SAVE
    with (broken / "log.jsonl").open("a") as log:
        log.write('{"step": 4, "lo')  # a kill may leave half a line
    assert main([*command, "-o", str(broken), *options]) == 0
    expected, found = losses(unbroken), losses(broken)
    assert list(expected) == list(found) == list(range(1, STEPS + 1)) and len(set(expected.values())) == STEPS
    for step, loss in expected.items():
        assert abs(found[step] - loss) < 1e-6, (step, loss, found[step])
    first, second = (torch.load(folder / "state.pt", weights_only=True)["average"] for folder in (unbroken, broken))
    assert all(torch.allclose(first[k].float(), second[k].float(), atol=1e-6) for k in first)
    assert (unbroken / "held_out.jsonl").read_text() == (broken / "held_out.jsonl").read_text()
    assert list((broken / "sheets").glob("*.png")) and list((broken / "tensorboard").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_renderer_goes_on_exactly_after_a_kill(data, tmp_path):
    command = ["train", "renderer", str(data / "cache"), "--hdris", str(data / "hdris")]
    killed_and_resumed(command, tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "renderer.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_both_flows_go_on_exactly_after_a_kill(data, tmp_path):
    base = ["train", "flow", str(data / "cache"), "--batch", "2"]
    killed_and_resumed(base, tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "flow.safetensors").is_file()
    homogeniser = [*base, "--homogenizer", str(tmp_path / "a"), "--pointwise-minutes", "0", "--rank", "4"]
    killed_and_resumed(homogeniser, tmp_path / "c", tmp_path / "d")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_head_goes_on_exactly_after_a_kill(data, tmp_path):
    """The homogeniser's per-voxel head is a stage of its own before the flow's, in run folders of its own."""
    assert main(["train", "relit", str(data / "cache"), "--hdris", str(data / "hdris"), "-o", str(tmp_path / "relit")]) == 0
    options = ["--steps", "1", "--save-every", str(SAVE), "--sheet-every", "4", "--seed", "3", "--threads", "1", "--batch", "1"]
    assert main(["train", "flow", str(data / "cache"), "-o", str(tmp_path / "base"), *options]) == 0
    command = ["train", "flow", str(data / "cache"), *options, "--homogenizer", str(tmp_path / "base"), "--relit", str(tmp_path / "relit"), "--rank", "4",
               "--pointwise-minutes", "600", "--pointwise-steps", str(STEPS)]
    assert main([*command, "-o", str(tmp_path / "a")]) == 0
    child = subprocess.run([sys.executable, "-c", KILLED.format(step=DEATH), *command, "-o", str(tmp_path / "b")], capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert max(losses(tmp_path / "b" / "head_0")) == DEATH
    assert main([*command, "-o", str(tmp_path / "b")]) == 0
    for member in ("head_0", "head_1"):
        expected, found = losses(tmp_path / "a" / member), losses(tmp_path / "b" / member)
        assert list(expected) == list(found) == list(range(1, STEPS + 1)) and max(abs(found[k] - expected[k]) for k in expected) < 1e-6
    first, second = (load_file(tmp_path / name / "flow.safetensors") for name in "ab")
    heads = [k for k in first if k.startswith("pointwise.")]
    assert heads and all(torch.equal(first[k], second[k]) for k in heads)


def test_training_goes_on_from_the_shipped_pack_with_all_its_heads(tmp_path):
    shipped = compact_dir()
    for name, stored, wanted in (("renderer", "renderer", "renderer"), ("base", "base_flow", "flow"), ("theta", "homogenizer", "flow")):
        (tmp_path / name).mkdir()
        shutil.copy(shipped / f"{stored}.safetensors", tmp_path / name / f"{wanted}.safetensors")
    theta = homogenizer_from(tmp_path / "theta" / "flow.safetensors", base_flow_from(tmp_path / "base" / "flow.safetensors"), 4)
    config = json.loads((shipped / "manifest.json").read_text())["meta"]["config"]
    assert len(theta.pointwise.members) == config["homogenizer"]["head_count"]

    runs = [part for name, option in (("renderer", "--renderer"), ("base", "--base"), ("theta", "--homogenizer")) for part in (option, str(tmp_path / name))]
    assert main(["train", "pack", *runs, "-o", str(tmp_path / "pack")]) == 0
    made, kept = (json.loads((folder / "manifest.json").read_text()) for folder in (tmp_path / "pack", shipped))
    assert made["files"] == kept["files"] and made["meta"]["config"] == kept["meta"]["config"]  # nothing is lost on the way

    shutil.copy(shipped / "base_flow.safetensors", tmp_path / "theta" / "flow.safetensors")
    assert main(["train", "pack", *runs, "-o", str(tmp_path / "none")]) == 2 and not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_packs_brightness_is_set_by_rendered_photos(data, tmp_path):
    def calibrated(pack: str, out: str) -> dict:
        assert main(["train", "calibrate", str(data / "cache"), "--hdris", str(data / "hdris"), "--pack", pack, "--photos", "2",
                     "-o", str(tmp_path / out), "--report", str(tmp_path / f"{out}.json")]) == 0
        return json.loads((tmp_path / f"{out}.json").read_text())

    first = calibrated("compact", "once")
    again = calibrated(str(tmp_path / "once"), "twice")
    assert first["photos"] == again["photos"] == 6 and abs(first["mean"]) > 0.1  # the balls' light is painted on
    assert abs(again["mean"]) < 0.2 * abs(first["mean"])
    before, after = (load_file(folder / "homogenizer.safetensors") for folder in (compact_dir(), tmp_path / "once"))
    moved = [k for k in before if not torch.equal(before[k], after[k])]
    assert moved == ["residual_mean"]
    shift = (after["residual_mean"] - before["residual_mean"]).float()
    assert torch.allclose(shift[[0, 1, 2, 5, 6, 7]], torch.full((6,), first["mean"]), atol=2e-3) and not shift[3:5].any()

    (data / "dark").mkdir()
    write_environment(data / "dark" / "studio.exr", Environment(torch.full((16, 32, 3), 0.01)))
    assert main(["train", "calibrate", str(data / "cache"), "--hdris", str(data / "dark"), "--pack", "compact", "-o", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()


def test_photos_are_not_taken_in_the_dark(tmp_path):
    for name, strength in (("day", 1.0), ("night", 0.01)):
        write_environment(tmp_path / f"{name}.exr", Environment(torch.full((16, 32, 3), strength)))
    lights = LightLibrary(tmp_path)
    assert lights.brighter_than(0.3) == ["day"] and lights.brighter_than(0.001) == ["day", "night"]
    with pytest.raises(NearError, match="bright enough"):
        lights.brighter_than(2.0)


def test_invented_lights_are_new_natural_and_the_same_again(tmp_path):
    for name, strength in (("day", 1.0), ("room", 0.5), ("night", 0.01)):
        pixels = torch.full((16, 32, 3), strength)
        pixels[2:4, 5:9] *= 20  # a lamp
        write_environment(tmp_path / f"{name}.exr", Environment(pixels))
    libraries = [LightLibrary(tmp_path) for _ in range(2)]
    for library in libraries:
        library.invent(12, 0.3, seed=3)
        assert len(library.invented) == 12 and library.brighter_than(0.3) == ["day", "room"]
    maps = [[library.get(name, 0.0, 1.0)[0].rgb_lin709 for name in library.invented] for library in libraries]
    assert all(torch.equal(a, b) for a, b in zip(*maps))
    low, high = (mean_luminance(libraries[0].get(name, 0.0, 1.0)[0].rgb_lin709) for name in ("room", "day"))
    for k, made in enumerate(maps[0]):
        assert torch.isfinite(made).all() and made.min() >= 0 and 0.4 * low < mean_luminance(made) < 2.5 * high
        assert not any(torch.allclose(made, other) for other in maps[0][:k])


def test_the_perceptual_loss_is_lpips_where_it_is_installed(tmp_path, monkeypatch):
    class LPIPS(torch.nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()

        def forward(self, a, b):
            assert a.shape == b.shape == (1, 3, 32, 32) and float(a.min()) >= -1
            return ((a - b) ** 2).mean((1, 2, 3), keepdim=True)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    black, grey = torch.zeros(3, 32, 32), torch.full((3, 32, 32), 0.5, requires_grad=True)
    try:
        losses_module.perceptual_loss.cache_clear()
        name, substitute = losses_module.perceptual_loss()
        assert "substitute" in name and float(substitute(black, black)) == 0
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "vgg16-0.pth").touch()
        monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=LPIPS))
        losses_module.perceptual_loss.cache_clear()
        name, distance = losses_module.perceptual_loss()
        value = distance(grey, black)
        value.backward()
        assert name == "LPIPS (VGG)" and value.ndim == 0 and float(value.detach()) == pytest.approx(1.0) and float(grey.grad.sum()) > 0
    finally:
        losses_module.perceptual_loss.cache_clear()


def test_splatting_on_a_gpu_and_here_is_the_same_product():
    """The sparse product of the CUDA path, run where there is no GPU, against scipy's."""
    matrix = scipy.sparse.random(12, 7, 0.4, "csr", np.float32, np.random.default_rng(0))
    dense = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    SparseSplat.apply(dense, matrix).square().sum().backward()
    w = torch.from_numpy(matrix.toarray())
    assert torch.allclose(on_device(matrix, dense.detach()), w @ dense.detach(), atol=1e-6)
    assert torch.allclose(dense.grad, 2 * w.T @ (w @ dense.detach()), atol=1e-5)


# -- the loop ------------------------------------------------------------------------------------------------------------


TARGETS = torch.linspace(-1, 1, 8)


def line() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(1, 1)


def fit(model: torch.nn.Linear):
    """A step on one sample of TARGETS, with a little noise."""
    def step(sampler: Sampler):
        k = sampler.next()
        x = TARGETS[k : k + 1, None]
        return (model(x) - 2 * x + 0.1 * torch.rand(1, generator=sampler.generator)).square().mean(), {"sample": float(k)}

    return step


def test_the_sampler_deals_every_sample_once_to_one_process():
    alone, pair = Sampler(5, 1), [Sampler(5, 1, rank, 2) for rank in (0, 1)]
    order = [alone.next() for _ in range(20)]
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5)) and order[:5] != order[5:10]
    assert [s.next() for _ in range(10) for s in pair] == order
    later = Sampler(5, 1)
    later.position = 7
    assert [later.next() for _ in range(13)] == order[7:]


def test_schedule_and_budget(tmp_path):
    config = LoopConfig(steps=100, warmup=10, learning_rate=1.0, final_share=0.0, minutes=2)
    assert config.rate(0, 0) == pytest.approx(0.1) and config.rate(9, 0) == pytest.approx(config.rate(9, 0.1))
    assert config.rate(50, 0) == pytest.approx(0.5) == pytest.approx(config.rate(20, 1))
    assert config.rate(100, 0) is None is config.rate(3, 2)
    spent = LoopConfig(steps=10 ** 9, minutes=1 / 600, warmup=0)
    model = line()
    run(model, fit(model), 8, tmp_path, spent)
    steps = len((tmp_path / "log.jsonl").read_text().splitlines())
    assert 1 <= steps and torch.load(tmp_path / "state.pt", weights_only=True)["spent"] >= 0.1
    run(model, fit(model), 8, tmp_path, spent)  # nothing is left of it
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == steps
    with pytest.raises(ValueError, match="save_every 0"):
        LoopConfig(save_every=0)


def test_another_runs_state_is_refused(tmp_path):
    model = line()
    run(model, fit(model), 8, tmp_path, LoopConfig(steps=1))
    with pytest.raises(NearError, match="other models"):
        run(torch.nn.Linear(2, 1), fit(line()), 8, tmp_path, LoopConfig(steps=2))
    (tmp_path / "state.pt").write_bytes(b"PK cut short")
    with pytest.raises(NearError, match="damaged"):
        run(line(), fit(line()), 8, tmp_path, LoopConfig(steps=2))


def test_it_learns_and_the_average_follows(tmp_path):
    model = line()
    seen = []

    def sheet(average, step):
        seen.append((step, float(average.weight)))
        return Sheet({"weight": float(average.weight)}, np.zeros((4, 4, 3), np.uint8))

    average = run(model, fit(model), 8, tmp_path, LoopConfig(steps=300, learning_rate=0.05, warmup=5, ema=0.9, sheet_every=100), sheet_fn=sheet)
    ours, mean = float(model.weight.detach()), float(average.weight)
    assert abs(mean - 2) < 0.1 and abs(ours - mean) < 0.05
    assert [s for s, _ in seen] == [100, 200, 300] and (tmp_path / "sheets" / "0000300.png").is_file()
    assert [json.loads(x) for x in (tmp_path / "held_out.jsonl").read_text().splitlines()][1] == {"step": 200, "weight": pytest.approx(seen[1][1], abs=1e-8)}


def test_a_step_that_explodes_is_left_out_and_gradients_are_clipped(tmp_path):
    model = line()
    before = model.weight.detach().clone()
    numbers = iter([float("nan"), 1e12])

    def step(sampler: Sampler):
        sampler.next()
        return model(torch.ones(1, 1)).sum() * next(numbers), {}

    run(model, step, 8, tmp_path, LoopConfig(steps=2, learning_rate=0.5, warmup=0))
    assert torch.isfinite(model.weight).all() and 0 < (model.weight - before).abs() < 1


def test_a_journal_forgets_what_came_after(tmp_path):
    book = Journal(tmp_path, 0)
    for step in (1, 2, 3):
        book.log(step, {"loss": step / 7})
    book.close()
    (tmp_path / "log.jsonl").open("a").write("{")
    Journal(tmp_path, 2).close()
    assert [json.loads(x)["step"] for x in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2]


def test_held_out_objects_leave_some_to_train_on():
    assert held_out_rows(100, 8) == list(range(0, 96, 12)) and held_out_rows(2, 24) == [0] and len(held_out_rows(30, 24)) == 7
    with pytest.raises(NearError, match="too few"):
        held_out_rows(1, 8)


PAIR = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_training import fit, line
from near.training.loop import LoopConfig, processes, run
torch.manual_seed(processes().process_index)
model = torch.nn.Linear(1, 1) if processes().process_index else line()
run(model, fit(model), 8, Path(sys.argv[2]), LoopConfig(steps=6, learning_rate=0.05, warmup=0, save_every=3))
"""


@pytest.mark.slow
def test_two_processes_train_as_one_with_both_samples(tmp_path):
    """torchrun with two processes against one process that averages the two losses itself."""
    (tmp_path / "pair.py").write_text(PAIR)
    child = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "pair.py"),
                            str(Path(__file__).parent), str(tmp_path / "two")], capture_output=True, text=True, timeout=900,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert child.returncode == 0, child.stderr[-3000:]
    model = line()
    twins, step_of = [Sampler(8, 0, rank, 2) for rank in (0, 1)], fit(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0, betas=(0.9, 0.98))
    config = LoopConfig(steps=6, learning_rate=0.05, warmup=0)
    logged = losses(tmp_path / "two")
    for step in range(6):
        total = 0
        for twin in twins:
            twin.begin(step)
            total = total + step_of(twin)[0] / 2
        optimiser.param_groups[0]["lr"] = config.rate(step, 0)
        optimiser.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        assert abs(logged[step + 1] - float(total.detach())) < 1e-6
    state = torch.load(tmp_path / "two" / "state.pt", weights_only=True)
    assert torch.allclose(state["model"]["weight"], model.weight.detach(), atol=1e-6) and state["sampler"] == 12
