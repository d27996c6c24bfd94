"""*baked*: the habit to beat. The photo, shading and all, becomes the base colour of the true mesh (roughness 0.5, metallic 0);
Cycles renders that under the new light."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from near.evaluation.bench import PHOTO_TASKS, Bench, BenchModel
from near.evaluation.cycles import SCRIPT, CyclesFrame, ProjectedPhoto, render_with_cycles
from near.evaluation.report import score_targets
from near.weights.packs import weights_home

SAMPLES = 64


def baked_baseline(bench: Bench, tasks: Sequence[str], tell: Callable[[float, str], None]) -> dict:
    """Scores per photo task, as :func:`near.evaluation.report.score_targets`.

    Pictures are kept in the cache folder under a hash of all that decides them, so they are rendered once.

    Raises:
        NearError: as :func:`near.evaluation.cycles.render_with_cycles`.
    """
    tasks = [t for t in PHOTO_TASKS if t in tasks]
    folders = {}
    for index, model in enumerate(bench.models if tasks else ()):
        folders[model.name] = _render(bench, model, tasks, lambda text: tell(index / len(bench.models), text))  # noqa: B023
    return {task: score_targets(bench, [t for m in bench.models for t in m.targets[task]], lambda t: folders[t.model] / t.image)
            for task in tasks}


def _render(bench: Bench, model: BenchModel, tasks: Sequence[str], tell: Callable[[str], None]) -> Path:
    folder = weights_home().parent / "baked" / _fingerprint(bench, model)
    wanted = {t.image: t for task in tasks for t in model.targets[task] if not (folder / t.image).is_file()}
    if not wanted:
        return folder
    frames, parts = [], []
    for image, target in wanted.items():
        part = (folder / image).with_name(f".{os.getpid()}.{Path(image).name}")
        part.parent.mkdir(parents=True, exist_ok=True)
        parts.append((part, folder / image))
        frames.append(CyclesFrame(target.view.matrix_world, target.view.K, target.view.resolution,
                                  str(bench.root.absolute() / target.light.hdri), target.light.rotation_z_rad, str(part)))
    view = model.photo_view
    photo = ProjectedPhoto(str(bench.root.absolute() / model.photo), view.matrix_world, view.K, view.resolution)

    def done(count: int) -> None:
        os.replace(*parts[count - 1])  # what is finished stays, also when the rest is stopped
        tell(f"{model.name}: {count} of {len(frames)} pictures")

    try:
        render_with_cycles(bench.root.absolute() / model.mesh, frames, normalise=model.normalise, photo=photo, samples=SAMPLES, tell=done)
    finally:
        for part, _ in parts:
            part.unlink(missing_ok=True)
    return folder


def _fingerprint(bench: Bench, model: BenchModel) -> str:
    digest = hashlib.sha256(json.dumps([SAMPLES, model.normalise, model.photo_view.matrix_world]).encode())
    for path in (bench.root / model.mesh, bench.root / model.photo, bench.root / "index.json", SCRIPT):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:24]
