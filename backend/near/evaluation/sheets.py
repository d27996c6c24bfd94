"""Contact sheets of an evaluation: prediction, target, difference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from near.evaluation.bench import Bench, Target
from near.evaluation.metrics import mask_box, psnr, shown_on_black
from near.output import read_rgba
from near.sheets import contact_sheet

PER_ROW = 3  # targets of a model in its row
GAIN = 4  # of the difference


def task_sheet(bench: Bench, task: str, path_of: Callable[[Target], Path]) -> np.ndarray | None:
    """One row per model, ``PER_ROW`` targets each as prediction | target | difference x 4: uint8 [H, W, 3], None without pictures.

    Pictures are cropped to the object; the number below is the PSNR inside the mask.
    """
    rows, labels, titles = [], [], []
    for model in bench.models:
        chosen = [t for t in spread(model.targets[task]) if path_of(t).is_file()]
        if not chosen:
            continue
        cells, texts = [], []
        for target in chosen:
            truth, predicted = read_rgba(bench.root / target.image), read_rgba(path_of(target))
            a, b, mask = shown_on_black(predicted), shown_on_black(truth), truth[..., 3] > 0.5
            box = padded(mask_box(mask), mask.shape)
            difference = np.clip(np.abs(a.astype(np.int16) - b).astype(np.float32) * GAIN, 0, 255).astype(np.uint8)
            cells += [a[box], b[box], difference[box]]
            texts += [target.label, "target", f"x {GAIN}   {psnr(a[mask], b[mask]):.1f} dB"]
        rows.append(cells)
        labels.append(texts)
        titles.append(model.name)
    if not rows:
        return None
    heads = ["prediction", "target", "difference"] * max(len(r) // 3 for r in rows)
    return contact_sheet(rows, labels=labels, row_titles=titles, column_titles=heads, title=f"{task}: prediction / target / difference",
                         cell=(150, 150), background=(0, 0, 0))


def spread(targets: tuple[Target, ...], count: int = PER_ROW) -> list[Target]:
    """At most ``count`` targets with cameras and lights as different as possible: the diagonal of cameras x lights."""
    if len(targets) <= count:
        return list(targets)
    views: dict[str, list[Target]] = {}
    for target in targets:
        views.setdefault(target.label.split(",")[0], []).append(target)
    groups = list(views.values())
    return [groups[i % len(groups)][i % len(groups[i % len(groups)])] for i in range(count)]


def padded(box: tuple[slice, slice], shape: tuple[int, int], margin: int = 4) -> tuple[slice, slice]:
    """The box grown to a square with a margin, as far as the frame allows."""
    side = max(s.stop - s.start for s in box) + 2 * margin
    out = []
    for span, size in zip(box, shape):
        start = max(min((span.start + span.stop - side) // 2, size - side), 0)
        out.append(slice(start, min(start + side, size)))
    return out[0], out[1]
