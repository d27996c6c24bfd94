"""What a training run leaves beside its weights: log.jsonl, held_out.jsonl, sample sheets, TensorBoard events."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from near.output import write_png


@dataclass(frozen=True)
class Sheet:
    """How a model does on held-out objects: numbers by name, and a picture uint8 [H, W, 3]."""

    numbers: dict[str, float] = field(default_factory=dict)
    picture: np.ndarray | None = None


class Journal:
    """The files of a run in ``out``. A run that goes on from ``step`` first forgets what a killed one wrote after it."""

    def __init__(self, out: Path, step: int) -> None:
        self.out, self.files = out, {}
        for name in ("log", "held_out"):
            path = out / f"{name}.jsonl"
            _forget_after(path, step)
            self.files[name] = path.open("a", buffering=1, encoding="utf-8")
        self.board = _tensorboard(out / "tensorboard", step)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """One step of training."""
        self._line("log", step, numbers)
        if self.board:
            for name, value in numbers.items():
                self.board.add_scalar(f"train/{name}", value, step)

    def held_out(self, step: int, sheet: Sheet) -> None:
        """Held-out numbers, and the picture as ``sheets/<step>.png``."""
        self._line("held_out", step, sheet.numbers)
        if self.board:
            for name, value in sheet.numbers.items():
                self.board.add_scalar(f"held_out/{name}", value, step)
        if sheet.picture is not None:
            (self.out / "sheets").mkdir(exist_ok=True)
            write_png(self.out / "sheets" / f"{step:07d}.png", sheet.picture)
            if self.board:
                self.board.add_image("held_out", sheet.picture, step, dataformats="HWC")

    def _line(self, name: str, step: int, numbers: dict[str, float]) -> None:
        self.files[name].write(json.dumps({"step": step, **{k: round(v, 9) for k, v in numbers.items()}}) + "\n")

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        if self.board:
            self.board.close()


def _forget_after(path: Path, step: int) -> None:
    """Keep the whole lines up to ``step``."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # cut short by the kill
    path.write_text("".join(kept), encoding="utf-8")


def _tensorboard(folder: Path, step: int):
    """A writer of TensorBoard events, or None where it is not installed (near-relight[train])."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
