"""Write the README's tables from the reports in reports/: python tools/results_table.py [--check]

Every `<!-- table:NAME -->` ... `<!-- /table -->` block of README.md is replaced by the table NAME. With --check nothing is
written; the exit status is 1 when a block is out of date.

    eval         reports/eval-dev.json, from: near eval BENCH --baselines --consistency --out reports/eval-dev.json
    models       the same report, per model
    consistency  the same report, the checks that need no ground truth
    paper        the same report and those below, beside what the paper says of its own data
    ablation     reports/ablation-{shaded,base-colour,lh,lh-base-colour}.json, from: near ablation BENCH --out reports
    layers       reports/ablation-lad-*.json, from the same command
    speed        reports/bench-cpu.json, from: near bench --out reports/bench-cpu.json
    gpu          reports/bench-cuda.json, from: near bench --out reports/bench-cuda.json on a GPU
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
    return [*lines, "", f"Perceptual: {report['perceptual']}.{_beside_baked(report)}"]


def _beside_baked(report: dict) -> str:
    """Where the pictures are perceptually better than the baseline, in words."""
    gains = report.get("against", {}).get("baked", {})
    better, worse = ([t.replace("_", " ") for t, g in gains.items() if (g["perceptual"] > 0) == want] for want in (True, False))
    return (f" Better than *baked* in {', '.join(better)}." if better else "") + (f" Not better than *baked* in {', '.join(worse)}." if worse else "")


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


def official_table(report: dict) -> list[str]:
    """The published models at full size (near bench --pack official-random)."""
    machine, seconds = report["machine"], report["frame_seconds"]
    where = f"{machine['cpu']}, {machine['cores']} cores" if report["device"] == "cpu" else report["device"]
    return head(f"published models, random weights, {report['voxels']} voxels, {report['size']} x {report['size']}, {report['precision']}, {where}", "") + [
        row("frame, camera moving, light fixed", f"{seconds:.2f} s"),
        row("the same with every voxel shaded", f"{report['full_seconds']:.2f} s ({report['full_seconds'] / seconds:.1f} times slower, "
            f"at most {report['agx_error']:.0e} apart after AgX)"),
        row("voxels shaded", f"{report['shaded_share']:.0%}"),
        row("arithmetic of the models", f"{report['floor_flop'] / 1e12:.2f} TFLOP, {report['floor_flop'] / seconds / 1e9:.0f} GFLOP/s reached"),
        row("first frame (asset, light, frame)", f"{report['first']['first frame']:.1f} s")]


def stress_table(report: dict) -> list[str]:
    """What the backend was put through (tools/stress.py)."""
    return head("the backend under stress", "measured", "wanted") + [
        row(r["what"], r["measured"] + ("" if r["ok"] else " (missed)"), r["wanted"]) for part in report["parts"].values() for r in part["rows"]]


CHECKS = {"rotation_psnr": ("light, camera and asset turned together: PSNR in the mask, dB", "{:.1f}"), "doubling_error": ("twice the light: what is off, %", "{:.2%}"),
          "sum_error": ("two lights against the sum of both: what is off, %", "{:.2%}"),
          "flicker_levels": ("turntable, steps of 1 degree: unsteadiness of a surface point, 8-bit levels", "{:.2f}"),
          "spread_ratio": ("assets from photos under three lights: homogenised spread over shaded spread", "{:.2f}"),
          "picture_ratio": ("the same in pictures: under white light over the photos", "{:.2f}"),
          "exposure_share": ("of the homogenised variance, the brightness of the object as a whole", "{:.0%}"),
          "cast_share": ("and its colour cast as a whole", "{:.0%}"),
          "local_ratio": ("homogenised over shaded spread without both: what is left of light that differs from place to place", "{:.2f}")}


def consistency_table(report: dict) -> list[str] | None:
    """Mean and worst over the models beside the limit."""
    found = report.get("consistency")
    if found is None:
        return None
    lines = head("check", "mean", "worst model", "limit")
    for name, (text, form) in CHECKS.items():
        if name in found["mean"]:
            # A third of the spread and a hundred dB of equal pictures read best without more digits.
            limit = form.format(found["limits"][name]) if name in found["limits"] else ""
            lines.append(row(text.replace(", %", ""), form.format(found["mean"][name]), form.format(found["worst"][name]), limit))
    return lines


INPUTS = ("shaded", "base_colour", "lh", "lh_base_colour")
# What the paper (arXiv 2511.18600) reports, on its data and hardware: no more of it is quoted than is needed for orientation.
PAPER = {"forward": "32.2", "lh": "3", "speed": "30"}


def paper_table(report: dict, gpu: dict | None = None, cpu: dict | None = None, **variants: dict | None) -> list[str]:
    """Ours beside the paper's. The data differ: the rows say what was measured on what."""
    lines = head("", "here, on the bench `dev`", "the paper, on its own data")
    lines.append(row("forward, PSNR over the frame, dB", f"{report['tasks']['forward']['mean']['psnr_frame']:.1f}" if "forward" in report["tasks"] else "", f"{PAPER['forward']} (Objaverse)"))
    pair = [variants.get(n) for n in ("lh_base_colour", "shaded")]
    gain = f"{_relit(pair[0]) - _relit(pair[1]):.1f}" if all(pair) else "not measured yet"
    lines.append(row("relighting, homogenised over shaded input, dB", gain, f"about {PAPER['lh']}"))
    speeds = [f"{r['orbit_frames_per_second']:.0f} ({'one GPU' if r['device'] != 'cpu' else str(r['machine']['cores']) + ' CPU cores'}, {r['size'][0]} pixels)" for r in (gpu, cpu) if r]
    lines.append(row("frames a second", "; ".join(speeds) or "not measured yet", f"{PAPER['speed']} (GPU, 6 LAD layers)"))
    return [*lines, "", "Measured on different data with different models: for orientation, not a comparison."]


def _relit(report: dict) -> float:
    return report["tasks"]["relighting"]["mean"]["psnr_mask"]


def ablation_table(**variants: dict | None) -> list[str] | None:
    """A row for each input SLAT, in the order of the paper's table."""
    made = [variants[name] for name in INPUTS if variants.get(name)]
    if not made:
        return None
    tasks = [t for t in ("reconstruction", "relighting", "novel_view") if any(t in r["tasks"] for r in made)]
    lines = head("the renderer is given: PSNR in the mask, dB", *(t.replace("_", " ") for t in tasks), *(f"perceptual, {t.replace('_', ' ')}" for t in tasks[1:2]))
    for report in made:
        means = {t: report["tasks"][t]["mean"] for t in tasks if t in report["tasks"] and report["tasks"][t]["mean"]}
        lines.append(row(report["variant"], *(f"{means[t]['psnr_mask']:.1f}" if t in means else "" for t in tasks),
                         *(f"{means[t]['perceptual']:.3f}" if t in means else "" for t in tasks[1:2])))
    return lines


def layers_table(**variants: dict | None) -> list[str] | None:
    """A row for each depth of the lighting-aware decoder."""
    made = sorted((r for name, r in variants.items() if name.startswith("lad_") and r), key=lambda r: r["layers"])
    if not made:
        return None
    lines = head("depth of the decoder", "forward: PSNR in the mask, dB", "frames/s", "processor time of a frame")
    lines += [row(r["variant"], f"{r['tasks']['forward']['mean']['psnr_mask']:.2f}", f"{r['frames_per_second']:.1f}",
                  f"{r['frame_processor_seconds'] * 1000:.0f} ms") for r in made]
    first = made[0]
    scores_found = [r["tasks"]["forward"]["mean"]["psnr_mask"] for r in made]
    idle = "The shipped decoder starts from no correction: its depth costs time and changes nothing yet. " if len(made) > 1 and max(scores_found) - min(scores_found) < 0.005 else ""
    return [*lines, "", f"{idle}{first['machine']['cpu']}, {first['machine']['cores']} cores, {first['size'][0]} x {first['size'][1]}, orbit under one light."]


def reports_of(folder: Path) -> dict[str, dict]:
    """All reports by file name."""
    return {p.name: json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))}


def variants_of(reports: dict[str, dict]) -> dict[str, dict]:
    """Ablation reports by variant: ``ablation-lh.json`` is ``lh``."""
    return {name[len("ablation-"):-len(".json")].replace("-", "_"): r for name, r in reports.items() if name.startswith("ablation-")}


def _one(name: str, make: Callable[[dict], list[str] | None]) -> Callable[[dict[str, dict]], list[str] | None]:
    return lambda reports: make(reports[name]) if name in reports else None


TABLES: dict[str, Callable[[dict[str, dict]], list[str] | None]] = {
    "eval": _one("eval-dev.json", eval_table), "models": _one("eval-dev.json", models_table), "consistency": _one("eval-dev.json", consistency_table),
    "paper": lambda reports: paper_table(reports["eval-dev.json"], reports.get("bench-cuda.json"), reports.get("bench-cpu.json"), **variants_of(reports))
    if "eval-dev.json" in reports else None,
    "ablation": lambda reports: ablation_table(**variants_of(reports)), "layers": lambda reports: layers_table(**variants_of(reports)), "speed": _one("bench-cpu.json", speed_table), "gpu": _one("bench-cuda.json", speed_table),
    "official": _one("bench-official-cpu.json", official_table), "stress": _one("stress.json", stress_table)}


def filled(text: str, reports: Path) -> str:
    """The text with every block replaced; one without a report says so."""
    found = reports_of(reports)

    def replace(match: re.Match) -> str:
        name = match[2]
        if name not in TABLES:
            sys.exit(f"README.md asks for the table {name!r}; there are {', '.join(TABLES)}.")
        lines = TABLES[name](found) or ["Not measured yet."]
        return match[1] + "\n".join(lines) + "\n" + match[3]

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
