"""Write the README's tables from the reports in reports/: python tools/results_table.py [--check]

Every `<!-- table:NAME -->` ... `<!-- /table -->` block of README.md is replaced by the table NAME. With --check nothing is
written; the exit status is 1 when a block is out of date.

    eval    reports/eval-dev.json, from: near eval BENCH --baselines --out reports/eval-dev.json
    models  the same report, per model
    speed   reports/bench-cpu.json, from: near bench --out reports/bench-cpu.json
    gpu     reports/bench-cuda.json, from: near bench --out reports/bench-cuda.json on a GPU
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README, REPORTS = ROOT / "README.md", ROOT / "reports"
BLOCK = re.compile(r"(<!-- table:([\w-]+) -->\n).*?(<!-- /table -->)", re.S)
TASK_NAMES = {"forward": "forward: mesh with its materials, new cameras and lights", "reconstruction": "reconstruction: photo, same view and light",
              "relighting": "relighting: photo, same view, new lights", "novel_view": "novel view: photo, new cameras, new lights"}


def row(*cells: object) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def head(*cells: str) -> list[str]:
    return [row(*cells), row(*("---" if i == 0 else "---:" for i in range(len(cells))))]


def scores(mean: dict | None, missing: str = "") -> tuple[str, ...]:
    """The four scores as text."""
    if mean is None:
        return (missing,) * 4
    return f"{mean['psnr_mask']:.1f}", f"{mean['psnr_frame']:.1f}", f"{mean['ssim']:.3f}", f"{mean['perceptual']:.3f}"


def eval_table(report: dict) -> list[str]:
    """Every task beside its baselines."""
    lines = head("task", "PSNR in the mask, dB", "PSNR over the frame, dB", "SSIM", "perceptual, lower is better")
    for task, result in report["tasks"].items():
        lines.append(row(f"**{TASK_NAMES.get(task, task)}**", *scores(result["mean"])))
        lines += [row(f"baseline *{name}*", *scores(tasks[task]["mean"])) for name, tasks in report["baselines"].items() if task in tasks]
    return [*lines, "", f"Perceptual: {report['perceptual']}."]


def models_table(report: dict) -> list[str]:
    """PSNR in the mask, model by task."""
    tasks = list(report["tasks"])
    names = list(dict.fromkeys(n for t in tasks for n in report["tasks"][t]["models"]))
    lines = head("PSNR in the mask, dB", *(t.replace("_", " ") for t in tasks))
    for name in names:
        found = [report["tasks"][t]["models"].get(name) for t in tasks]
        lines.append(row(name.replace("_", " "), *(f"{m['psnr_mask']:.1f}" if m else "" for m in found)))
    return lines


def speed_table(report: dict) -> list[str]:
    """Medians of near bench; of published models (--pack official-random) as well."""
    machine = report["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores" if report["device"] == "cpu" else report["device"]
    medians, cycles = report["median_seconds"], report.get("cycles", {})
    lines = head(f"{where}, {report['size'][0]} x {report['size'][1]}, {report['gaussians']} Gaussians", "median")
    lines += [row("frame of an orbit, light unchanged", f"{medians['orbit_frame'] * 1000:.0f} ms ({report['orbit_frames_per_second']:.1f} frames/s)"),
              row("first frame after a new light", f"{medians['new_light']:.2f} s"), row("frame after a turn of the light", f"{medians['light_turn']:.2f} s"),
              row("create (photo to asset)", f"{medians['create']:.1f} s"), row("encode (mesh to asset)", f"{medians['encode']:.1f} s"),
              row("peak memory", f"{report['peak_memory_mb']} MB")]
    if "median_seconds" in cycles:
        lines.append(row(f"Cycles, {cycles['samples']} samples + OIDN, same object and light",
                         f"{cycles['median_seconds']:.2f} s ({cycles['times_slower_than_orbit_frame']:.0f} times an orbit frame)"))
    return lines


TABLES: dict[str, tuple[str, Callable[[dict], list[str]]]] = {
    "eval": ("eval-dev.json", eval_table), "models": ("eval-dev.json", models_table), "speed": ("bench-cpu.json", speed_table),
    "gpu": ("bench-cuda.json", speed_table)}


def filled(text: str, reports: Path) -> str:
    """The text with every block whose report exists replaced."""
    def replace(match: re.Match) -> str:
        name = match[2]
        if name not in TABLES:
            sys.exit(f"README.md asks for the table {name!r}; there are {', '.join(TABLES)}.")
        file, make = TABLES[name]
        if not (reports / file).is_file():
            return f"{match[1]}Not measured yet.\n{match[3]}"
        return match[1] + "\n".join(make(json.loads((reports / file).read_text(encoding="utf-8")))) + "\n" + match[3]

    return BLOCK.sub(replace, text)


def main() -> int:
    old = README.read_text(encoding="utf-8")
    new = filled(old, REPORTS)
    if "--check" in sys.argv[1:]:
        print("The README's tables are " + ("up to date." if new == old else "out of date: run tools/results_table.py."))
        return int(new != old)
    README.write_text(new, encoding="utf-8")
    print(f"{len(BLOCK.findall(new))} tables written.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
