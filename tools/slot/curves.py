"""Loss curves of a slot as one picture, drawn without a plotting library; and its sample sheets in one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

SIZE, MARGIN = (520, 260), 46
PAPER, INK, GRID, LINE, SMOOTH = (24, 25, 28), (235, 235, 238), (58, 60, 66), (70, 104, 150), (255, 176, 64)


def read_lines(path: Path) -> list[dict]:
    """The whole lines of a .jsonl file; none where there is no file."""
    if not path.is_file():
        return []
    out = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            out.append(json.loads(line))
        except ValueError:
            continue  # cut short by a kill
    return out


def curve(title: str, steps: list[float], values: list[float]) -> np.ndarray:
    """One curve with its running mean: uint8 [H, W, 3]."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", SIZE, PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=12)
    draw.text((MARGIN, 8), title, INK, ImageFont.load_default(size=14))
    x, y = np.asarray(steps, float), np.asarray(values, float)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if len(x) == 0:
        draw.text((MARGIN, SIZE[1] // 2), "nothing logged", INK, font)
        return np.asarray(image)
    low, high = np.quantile(y, [0.0, 0.99]) if len(y) > 20 else (y.min(), y.max())
    high = high if high > low else low + max(abs(low), 1e-6) * 0.1
    place_x = lambda v: MARGIN + (v - x[0]) / max(x[-1] - x[0], 1) * (SIZE[0] - MARGIN - 14)  # noqa: E731
    place_y = lambda v: SIZE[1] - 28 - (np.clip(v, low, high) - low) / (high - low) * (SIZE[1] - 66)  # noqa: E731
    for level in np.linspace(low, high, 4):
        draw.line([(MARGIN, place_y(level)), (SIZE[0] - 14, place_y(level))], GRID)
        draw.text((4, place_y(level) - 7), f"{level:.3g}", INK, font)
    draw.text((MARGIN, SIZE[1] - 20), f"{x[0]:.0f}", INK, font)
    draw.text((SIZE[0] - 70, SIZE[1] - 20), f"step {x[-1]:.0f}", INK, font)
    width = max(len(y) // 40, 1)
    smooth = np.convolve(np.pad(y, (width // 2, (width - 1) // 2), mode="edge"), np.ones(width) / width, mode="valid")
    for series, colour in ((y, LINE), (smooth, SMOOTH)):
        points = list(zip(place_x(x), place_y(series)))
        draw.line(points if len(points) > 1 else points * 2, colour, 1 if colour == LINE else 2)
    return np.asarray(image)


def curves(runs: dict[str, Path]) -> np.ndarray:
    """A row per stage: its loss, and each of its held-out numbers that has a name worth a curve (at most three)."""
    rows = []
    for stage, folder in runs.items():
        log, held = read_lines(folder / "log.jsonl"), read_lines(folder / "held_out.jsonl")
        cells = [curve(f"{stage}: loss", [e["step"] for e in log], [e["loss"] for e in log])]
        names = [n for n in (held[0] if held else {}) if n != "step" and not n.endswith("_prior")][:3]
        cells += [curve(f"{stage}: held-out {n}", [e["step"] for e in held], [e[n] for e in held]) for n in names]
        rows.append(cells)
    widest = max(len(r) for r in rows)
    blank = np.full((SIZE[1], SIZE[0], 3), PAPER, np.uint8)
    return np.concatenate([np.concatenate(r + [blank] * (widest - len(r)), 1) for r in rows], 0)


def last_sheets(runs: dict[str, Path]) -> np.ndarray | None:
    """The newest sample sheet of every stage, one under the other; None where there is none."""
    from PIL import Image

    found = [sorted((folder / "sheets").glob("*.png"))[-1:] for folder in runs.values()]
    pictures = [np.asarray(Image.open(p).convert("RGB")) for group in found for p in group]
    if not pictures:
        return None
    width = max(p.shape[1] for p in pictures)
    return np.concatenate([np.pad(p, ((0, 0), (0, width - p.shape[1]), (0, 0))) for p in pictures], 0)
