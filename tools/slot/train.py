"""A training slot: prepare the data, train every stage for the minutes there are, leave weights in pieces, curves and sheets.

On a GPU the three stages run side by side (each is small; the head of the homogeniser learns on the processor's cores
meanwhile); on the CPU one after the other, each for its share of the time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

SHARES = {"renderer": 0.45, "base": 0.15, "homogenizer": 0.4}  # of a CPU's time
REHEARSAL_STEPS = 1000  # a slot of fewer is one: the head, whose time is not counted in steps, gets seconds then
HEAD_SHARE = 0.5  # of the homogeniser's time goes to its per-voxel head
RESERVE_SECONDS, RESERVE_SHARE = 15.0, 0.04  # kept for packing and pictures
NEEDED = ("torch", "numpy", "numba", "scipy", "safetensors", "peft", "PIL", "tqdm", "accelerate")
PACK_FILES = {"renderer": "renderer.safetensors", "base": "base_flow.safetensors", "homogenizer": "homogenizer.safetensors"}
RUN_FILES = {"renderer": "renderer.safetensors", "base": "flow.safetensors", "homogenizer": "flow.safetensors"}


@dataclass(frozen=True)
class Slot:
    """Where things are: content of the package, work folder (kept between slots on one machine), results; the deadline on the
    monotonic clock; device ``cuda`` or ``cpu``; processes for preparing; weights to go on from (pieces, or a pack), or None;
    steps: most of a stage, for rehearsals."""

    content: Path
    work: Path
    out: Path
    deadline: float
    device: str
    cores: int
    weights: Path | None
    stages: tuple[str, ...]
    steps: int

    @property
    def left(self) -> float:
        """Seconds of training left."""
        return self.deadline - time.monotonic()

    def environment(self, threads: int, cuda: bool) -> dict[str, str]:
        path = os.pathsep.join([str(self.content / "code" / "backend"), str(self.work / "site"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        own = {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1",
               "NUMBA_CACHE_DIR": str(self.work / "numba")}
        if not cuda:
            own["CUDA_VISIBLE_DEVICES"] = ""
        return {**os.environ, **own}


def say(text: str) -> None:
    print(f"[slot {time.strftime('%H:%M:%S')}] {text}", flush=True)


def near(slot: Slot, log: Path, arguments: list, threads: int, cuda: bool = False) -> subprocess.Popen:
    """Start ``near`` with its output in a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        return subprocess.Popen([sys.executable, "-m", "near", *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                                env=slot.environment(threads, cuda))


def finish(running: dict[str, tuple[subprocess.Popen, Path]], patience: float) -> None:
    """Wait for processes. Whatever outlives its budget by ``patience`` seconds is stopped, and the slot fails loudly.

    Raises:
        SystemExit: a process failed; its last words are shown.
    """
    end = time.monotonic() + patience
    try:
        for name, (process, log) in running.items():
            try:
                status = process.wait(timeout=max(end - time.monotonic(), 1))
            except subprocess.TimeoutExpired:
                status = "too slow"
            if status != 0:
                tail = "\n".join(log.read_text(errors="replace").replace("\r", "\n").splitlines()[-12:])
                sys.exit(f"{name} failed ({status}):\n{tail}")
    finally:
        for process, _ in running.values():
            if process.poll() is None:
                process.kill()
                process.wait()


# -- preparing ---------------------------------------------------------------------------------------------------------


def install(slot: Slot) -> None:
    """The wheels that the package carries, beside the machine's own Python packages."""
    wheels = sorted((slot.content / "wheels").glob("*.whl"))
    if wheels and not (slot.work / "site").is_dir():
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", str(slot.work / "site"),
                        *map(str, wheels)], check=True)
    sys.path[:0] = [str(slot.content / "code" / "backend"), str(slot.work / "site")]
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"This machine lacks {', '.join(missing)}: carry them as wheels (prepare --wheels FOLDER).")


GSPLAT_CHECK = """
import os, sys, time, torch
major, minor = torch.cuda.get_device_capability()
os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{major}.{minor}")
os.environ.setdefault("FAST_COMPILE", "1")
for home in ("/usr/local/cuda", "/opt/cuda"):
    if os.path.isdir(home):
        os.environ.setdefault("CUDA_HOME", home)
start = time.monotonic()
from near.splatting import gsplat_missing
print(gsplat_missing() or f"gsplat loads ({time.monotonic() - start:.0f} s)")
"""


def build_gsplat(slot: Slot) -> tuple[subprocess.Popen, Path] | None:
    """Begin to compile gsplat's CUDA code while the data are prepared; None on the CPU."""
    if slot.device != "cuda":
        return None
    log = slot.work / "gsplat.log"
    with log.open("w") as file:
        return subprocess.Popen([sys.executable, "-c", GSPLAT_CHECK], stdout=file, stderr=subprocess.STDOUT, env=slot.environment(slot.cores, True)), log


def prepare(slot: Slot) -> None:
    """Caches of all objects, by all cores; what an earlier slot on this machine made is kept."""
    share = max(1, min(slot.cores, len(list((slot.content / "objects").glob("*.npz")))))
    for name, source, into in (("precompute", slot.content / "objects", "cache"), ("relit", slot.work / "cache", "relit")):
        if name == "relit" and "homogenizer" not in slot.stages:
            continue
        start, folder = time.monotonic(), slot.work / into
        running = {f"{name} {k}": (near(slot, slot.work / "logs" / f"{name}{k}.log", ["train", name, source, "--hdris", slot.content / "hdris", "-o", folder,
                                                                                   "--part", k, "--parts", share], 1), slot.work / "logs" / f"{name}{k}.log")
                   for k in range(share)}
        finish(running, max(slot.left, 1))
        say(f"{name}: {len(list(folder.glob('*.pt')))} objects in {time.monotonic() - start:.0f} s")


def start_pack(slot: Slot) -> Path | None:
    """The pack to go on from, joined and verified; None: everything starts anew."""
    if slot.weights is None:
        return None
    from near.weights.integrity import verify_manifest
    from pieces import join_pack

    if (slot.weights / "manifest.json").is_file():
        verify_manifest(slot.weights, "compact")
        return slot.weights

    join_pack(slot.weights, slot.work / "start")
    return slot.work / "start"


# -- training ----------------------------------------------------------------------------------------------------------


def stage_command(slot: Slot, stage: str, start: Path | None, minutes: float) -> list:
    """Arguments of ``near`` for a stage that trains for so long."""
    run = slot.work / "runs" / stage
    common = [slot.work / "cache", "-o", run, "--steps", slot.steps, "--sheet-every", 500 if slot.device == "cuda" else 50]
    common += [] if start is None else ["--from", start / PACK_FILES[stage]]
    if stage == "renderer":
        return ["train", "renderer", *common, "--hdris", slot.content / "hdris", "--minutes", minutes]
    if stage == "base":
        return ["train", "flow", *common, "--minutes", minutes]
    head = HEAD_SHARE * minutes if slot.steps > REHEARSAL_STEPS else 0.1
    return ["train", "flow", *common, "--homogenizer", slot.work / "runs" / "base_start", "--relit", slot.work / "relit", "--pointwise-minutes", head,
            "--minutes", minutes - head]


def train(slot: Slot, start: Path | None) -> dict[str, float]:
    """Run the stages; minutes given to each."""
    runs = slot.work / "runs"
    shutil.rmtree(runs, ignore_errors=True)  # weights go on from slot to slot, schedules do not
    if start is not None:
        (runs / "base_start").mkdir(parents=True)
        shutil.copy(start / PACK_FILES["base"], runs / "base_start" / "flow.safetensors")
    together = slot.device == "cuda" and start is not None  # a fresh homogeniser needs a base flow first
    total = sum(SHARES[s] for s in slot.stages)
    budget = slot.left / 60
    minutes = {s: budget if together else budget * SHARES[s] / total for s in slot.stages}
    running: dict[str, tuple[subprocess.Popen, Path]] = {}
    order = ("base", "homogenizer", "renderer")  # a fresh homogeniser needs a base flow first
    for stage in sorted(slot.stages, key=order.index):
        log = slot.work / "logs" / f"{stage}.log"
        threads = max(1, slot.cores // len(slot.stages)) if together else slot.cores
        process = near(slot, log, stage_command(slot, stage, start, round(minutes[stage], 3)), threads, slot.device == "cuda")
        say(f"{stage}: {minutes[stage]:.1f} minutes on {slot.device}")
        running[stage] = process, log
        if not together:
            finish({stage: running.pop(stage)}, 60 * minutes[stage] + 600)
            if stage == "base" and start is None:
                shutil.copytree(runs / "base", runs / "base_start")
    finish(running, slot.left + 600)
    return minutes


def steps_of(slot: Slot, stage: str) -> dict:
    """What a stage did: steps, the running mean of its loss at the beginning and the end, held-out numbers first and last."""
    from curves import read_lines

    run = slot.work / "runs" / stage
    log, held = read_lines(run / "log.jsonl"), read_lines(run / "held_out.jsonl")
    mean = lambda lines: round(sum(e["loss"] for e in lines) / max(len(lines), 1), 5)  # noqa: E731
    found = {"steps": log[-1]["step"] if log else 0, "loss": [mean(log[:50]), mean(log[-50:])] if log else None,
             "held_out": [held[0], held[-1]] if held else None}
    heads = [lines[-1]["step"] for path in sorted(run.glob("head_*/log.jsonl")) if (lines := read_lines(path))]
    return found | ({"head_steps": sum(heads)} if heads else {})


# -- results -----------------------------------------------------------------------------------------------------------


def leave(slot: Slot, start: Path | None, minutes: dict[str, float], device_name: str) -> None:
    """Pack what was trained, in pieces; curves, sheets and a record."""
    from curves import curves, last_sheets
    from pieces import INDEX, read_index, split_pack
    from PIL import Image

    runs, arguments = slot.work / "runs", []
    for stage, option in (("renderer", "--renderer"), ("base", "--base"), ("homogenizer", "--homogenizer")):
        folder = runs / stage
        if stage not in slot.stages:
            if start is None:
                sys.exit(f"There are no weights of the stage {stage}: train it, or name weights to go on from (--weights).")
            folder = slot.work / "kept" / stage
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(start / PACK_FILES[stage], folder / RUN_FILES[stage])
        arguments += [option, folder]
    log = slot.work / "logs" / "pack.log"
    finish({"pack": (near(slot, log, ["train", "pack", *arguments, "-o", slot.work / "pack"], slot.cores), log)}, 120)
    history = read_index(slot.weights)["history"] if slot.weights is not None and (slot.weights / INDEX).is_file() else []
    record = {"date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()), "device": device_name, "objects": json.loads((slot.content / "contents.json").read_text())["objects"],
              "stages": {s: {"minutes": round(minutes[s], 2), **steps_of(slot, s)} for s in slot.stages}}
    index = split_pack(slot.work / "pack", slot.out / "weights", [*history, record])
    trained = {s: runs / s for s in slot.stages}
    Image.fromarray(curves(trained)).save(slot.out / "curves.png")
    if (sheets := last_sheets(trained)) is not None:
        Image.fromarray(sheets).save(slot.out / "sheets.png")
    (slot.out / "slot.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    say(f"{sum(f['bytes'] for f in index['files'].values()) / 1e6:.1f} MB of weights in {sum(len(f['pieces']) for f in index['files'].values())} pieces: {slot.out}")


def run_slot(content: Path, out: Path, work: Path, *, minutes: float, device: str, weights: Path | None, stages: tuple[str, ...],
             cores: int | None = None, steps: int = 10 ** 8, tell: Callable[[str], None] = say) -> None:
    """Everything above; returns before ``minutes`` have passed, but for the last step of each stage."""
    began = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    deadline = began + 60 * minutes * (1 - RESERVE_SHARE) - RESERVE_SECONDS
    slot = Slot(content.resolve(), work.resolve(), out.resolve(), deadline, device, cores or os.cpu_count() or 1, weights, stages, steps)
    install(slot)
    import torch

    if slot.device == "auto":
        slot = replace(slot, device="cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if slot.device == "cuda" else f"CPU, {slot.cores} cores"
    tell(f"{minutes:g} minutes on {name}")
    compiling = build_gsplat(slot)
    start = start_pack(slot)
    tell("goes on from the last weights" if start else "starts from nothing")
    prepare(slot)
    if compiling is not None:
        finish({"gsplat": compiling}, max(slot.left / 2, 1))
        tell(compiling[1].read_text().strip().splitlines()[-1])
    if slot.left < 20:
        sys.exit(f"Preparing took all of the {minutes:g} minutes; give more.")
    given = train(slot, start)
    leave(slot, start, given, name)
    tell(f"done in {(time.monotonic() - began) / 60:.1f} minutes")
