"""Predictions of the four tasks: one asset per model and kind of input, one picture per target."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from near.errors import Cancelled, NearError
from near.evaluation.bench import PHOTO_TASKS, Bench, BenchModel, Target
from near.output import write_exr

Tell = Callable[[float, str], None]


@dataclass
class Predictions:
    """What was made: files by (task, target image), seconds by stage, errors and skipped tasks in words."""

    root: Path
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    errors: list[dict[str, str]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def path(self, task: str, target: Target) -> Path:
        return self.root / task / target.image

    def medians(self) -> dict[str, float]:
        return {stage: round(statistics.median(values), 3) for stage, values in self.seconds.items()}


def predict(engine, bench: Bench, tasks: Sequence[str], save: Path, tell: Tell) -> Predictions:
    """Predict every target of ``tasks`` into ``save/<task>/<target's relative path>``, half-float premultiplied linear RGBA.

    A model that fails is recorded and the others go on; a task that the pack cannot do is recorded as skipped.

    Args:
        engine: has ``encode``, ``create``, ``render`` of :class:`near.pipeline.engine.Engine`.
        tell: called with the fraction done and what is being done.
    Raises:
        NearError: what writing raises; ``Cancelled``.
    """
    done = Predictions(save)
    total = sum(len(m.targets[t]) for m in bench.models for t in tasks)
    count = 0
    for model in bench.models:
        for name, group in _groups(tasks, done.skipped):
            tell(count / total, f"{model.name}: {name}")
            try:
                asset = _asset(engine, bench, model, name, done, lambda text: tell(count / total, text))  # noqa: B023
            except Cancelled:
                raise
            except NearError as error:
                if error.code == "encode-unsupported":
                    done.skipped.update(dict.fromkeys(group, f"{error.what} {error.remedy}"))
                else:
                    done.errors.append({"model": model.name, "tasks": ", ".join(group), **error.as_dict()})
                count += sum(len(model.targets[t]) for t in group)
                continue
            for task in group:
                for target in model.targets[task]:
                    tell(count / total, f"{model.name}: {task}, {target.label}")
                    _picture(engine, bench, asset, target, done.path(task, target), done)
                    count += 1
    return done


def _groups(tasks: Sequence[str], skipped: dict[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Tasks that share an asset."""
    for name, members in (("encode", ("forward",)), ("create", PHOTO_TASKS)):
        group = [t for t in members if t in tasks and t not in skipped]
        if group:
            yield name, group


def _asset(engine, bench: Bench, model: BenchModel, kind: str, done: Predictions, tell: Callable[[str], None]):
    start = time.perf_counter()

    def progress(stage: str, fraction: float, preview=None) -> None:
        tell(f"{model.name}: {stage}")

    if kind == "encode":
        asset = engine.encode(bench.root / model.mesh, progress=progress)
    else:
        asset = engine.create(bench.root / model.photo, mesh=bench.root / model.mesh, camera=model.photo_view.camera(), progress=progress)
    done.seconds[kind].append(time.perf_counter() - start)
    return asset


def _picture(engine, bench: Bench, asset, target: Target, path: Path, done: Predictions) -> None:
    from near.pipeline.types import PlacedAsset

    light, camera = target.light.environment(bench.root), target.view.camera()
    start = time.perf_counter()
    frame = engine.render([PlacedAsset(asset)], light, camera, passes=("color",))
    done.seconds["render"].append(time.perf_counter() - start)
    write_exr(path, {"color": frame.layers["color"]})
