"""The card of the shipped weights, written from reports: what they learned from, how long, what they score, where they fail.

    python tools/weights_card.py data STARTER PACK                     training data and credits -> reports/training-data.json
    python tools/weights_card.py stage NAME LOG --minutes M ...        a stage's steps from its log -> reports/training.json
    python tools/weights_card.py failures BENCH PREDICTIONS            the worst pictures of reports/eval-dev.json -> media/weights-failures.png
    python tools/weights_card.py write [--check]                       all of it -> backend/near/weights/COMPACT.md

PREDICTIONS is the folder of `near eval BENCH --save PREDICTIONS --out reports/eval-dev.json`. Slots of tools/train_compact.sh are
recorded by its `join --history reports/training.json`. With --check nothing is written; the exit status tells whether the card is old.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REPORTS, CARD, FAILURES = ROOT / "reports", ROOT / "backend" / "near" / "weights" / "COMPACT.md", ROOT / "media" / "weights-failures.png"
WEIGHTS = ROOT / "backend" / "near" / "weights" / "compact"
TASKS = {"forward": "mesh with its materials", "reconstruction": "photo, same view and light", "relighting": "photo, new lights",
         "novel_view": "photo, new cameras and lights"}
FAILURE_ROWS = 2  # worst pictures of each task, of different models


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# -- what is recorded --------------------------------------------------------------------------------------------------


def credits(attribution: str) -> list[dict[str, str]]:
    """Rows of a Markdown table with title, author, licence and source of models."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in attribution.splitlines() if line.lstrip().startswith("|")]
    head, *rest = rows
    return [dict(zip(head, row)) for row in rest if not set("".join(row)) <= set("-: ")]


def record_data(starter: Path, pack: Path) -> dict:
    """What the weights learned from, counted, with the credits that the licences ask for."""
    objects = read(starter / "index.json")
    kinds = Counter(o["kind"] for o in objects)
    materials, lights = read(pack / "materials" / "materials.json")["materials"], read(pack / "hdris" / "hdris.json")
    meshes = read(pack / "meshes" / "meshes.json")["meshes"]
    authors = lambda things: dict(Counter(f"{t['author']}, {t['license']}" for t in things))  # noqa: E731
    return {"objects": len(objects), "of_meshes": kinds["mesh"], "of_models": kinds["pbr_model"], "photos": len(objects) * 12, "pixels": 128,
            "materials": authors(materials), "lights": authors(lights), "meshes": authors(meshes),
            "models": credits((starter / "ATTRIBUTION.md").read_text(encoding="utf-8"))}


def record_stage(args: argparse.Namespace) -> dict:
    """A stage's steps, as its run's log.jsonl says them."""
    text = args.log.read_text(encoding="utf-8", errors="replace")
    steps = [int(n) for n in re.findall(r'"step": (\d+)', text)]
    if not steps:
        sys.exit(f"{args.log.name} names no step.")
    known = read(REPORTS / "training.json") or {"slots": []}
    stage = {"stage": args.name, "steps": max(steps), "minutes": args.minutes, "device": args.device, "what": args.what}
    known["stages"] = [*(s for s in known.get("stages", []) if s["stage"] != args.name), stage]
    return known


# -- failures ----------------------------------------------------------------------------------------------------------


def worst_targets(report: dict, count: int = FAILURE_ROWS) -> list[tuple[str, dict]]:
    """(task, target) with the lowest PSNR in the mask: of each task ``count``, each of another model."""
    found = []
    for task, result in report["tasks"].items():
        seen: set[str] = set()
        for target in sorted(result["targets"], key=lambda t: t["psnr_mask"]):
            if target["model"] not in seen and len(seen) < count:
                seen.add(target["model"])
                found.append((task, target))
    return found


def failure_sheet(report: dict, bench: Path, predictions: Path):
    """The worst pictures beside the truth: uint8 [H, W, 3]."""
    import numpy as np

    sys.path.insert(0, str(ROOT / "backend"))
    from near.evaluation.metrics import mask_box, shown_on_black
    from near.evaluation.sheets import GAIN, padded
    from near.output import read_rgba
    from near.sheets import contact_sheet

    rows, labels, titles = [], [], []
    for task, target in worst_targets(report):
        truth, predicted = read_rgba(bench / target["image"]), read_rgba(predictions / task / target["image"])
        a, b = shown_on_black(predicted), shown_on_black(truth)
        box = padded(mask_box(truth[..., 3] > 0.5), truth.shape[:2])
        difference = np.clip(np.abs(a.astype(np.int16) - b).astype(np.float32) * GAIN, 0, 255).astype(np.uint8)
        rows.append([a[box], b[box], difference[box]])
        labels.append([target["light"].replace("_", " "), "Cycles", f"x {GAIN}   {target['psnr_mask']:.1f} dB"])
        titles.append(f"{task.replace('_', ' ')}: {target['model'].replace('_', ' ')}")
    half = (len(rows) + 1) // 2  # two columns of rows
    paired = [rows[k] + (rows[k + half] if k + half < len(rows) else []) for k in range(half)]
    texts = [[f"{titles[i]}, {labels[i][0]}", *labels[i][1:]] for i in range(len(rows))]
    lines = [texts[k] + (texts[k + half] if k + half < len(rows) else []) for k in range(half)]
    return contact_sheet(paired, labels=lines, cell=(190, 190), background=(0, 0, 0), title="Worst pictures of each task: prediction / truth / difference")


# -- the card ----------------------------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[object]]) -> list[str]:
    line = lambda cells: "| " + " | ".join(str(c) for c in cells) + " |"  # noqa: E731
    return [line(head), line(["---", *["---:"] * (len(head) - 1)]), *map(line, rows)]


def training_rows(training: dict) -> list[list[object]]:
    """A row per recorded stage, and per stage of every slot."""
    rows = [[s["what"], s["device"], f"{s['steps']:,}", f"{s['minutes'] / 60:.1f}"] for s in training.get("stages", [])]
    for number, slot in enumerate(training.get("slots", []), 1):
        for stage, done in slot["stages"].items():
            rows.append([f"slot {number}, {stage}", slot["device"], f"{done['steps'] + done.get('head_steps', 0):,}", f"{done['minutes'] / 60:.2f}"])
    return rows


def calibration_lines(bias: dict) -> list[str]:
    """What `near train calibrate` measured and took into the weights."""
    if not bias:
        return []
    return [f"Afterwards the homogeniser's answers were made {math.exp(bias['mean']):.2f} times as bright: by so much objects were brighter than answered, over"
            f" {bias['photos']:,} path-traced", f"training photos (deviation of a single photo: {math.exp(bias['deviation']):.2f} times).", ""]


def card(data: dict, training: dict, report: dict, manifest: dict, bias: dict) -> str:
    """The card's text; bias: of the homogeniser's brightness before it was calibrated, or nothing."""
    files, config = manifest["files"], manifest["meta"]["config"]
    megabytes = sum(f["bytes"] for f in files.values()) / 1e6
    counted = lambda things: "; ".join(f"{n} ({who})" for who, n in things.items())  # noqa: E731
    lines = [
        "# The shipped weights", "",
        "Written by `tools/weights_card.py` from the files in `reports/`; not by hand.", "",
        f"The pack `compact`: {megabytes:.1f} MB in {len(files)} files, half precision; voxels of {config['resolution']} a side. Trained by this project from nothing;",
        "under the project's licence (Apache-2.0).", "",
        "**For** making relightable assets of objects from a photo (best with a mesh) or from a mesh with materials, and for rendering them under",
        "distant light. **Not for** measuring materials: where a photo does not tell, the weights guess.", "",
        "## Learned from", "",
        f"{data['objects']} objects rendered with Cycles at {data['pixels']} pixels ({data['of_meshes']} meshes in random materials, {data['of_models']} renders of textured models),",
        f"4 cameras each, {data['photos']} lit pictures; and the same kinds of objects lit by this project's own analytic renderer, in other objects' paints",
        "and under further lights. No object, photo or light of the bench is among them.", "",
        f"- Meshes: {counted(data['meshes'])}", f"- Materials: {counted(data['materials'])}", f"- Lights: {counted(data['lights'])}",
        f"- Textured models: {len(data['models'])}, credited below", "",
        "## Training", "",
        *table(["stage", "on", "steps", "hours"], training_rows(training)), "", *calibration_lines(bias),
        "The shipped decoder (LAD) and encoder start from no correction: what lights an asset is the analytic model. The homogeniser's LoRA flow is at its",
        "zero start as well; its per-voxel heads answer. Steps of the base flow were not recorded.", "",
        "## Scores", "",
        f"On the bench `{report['bench']}`, six real objects against Cycles; mean PSNR in the mask, and the worst object.", "",
        *table(["task", "PSNR in the mask, dB", "SSIM", "perceptual", "worst object"], [_score_row(task, report) for task in report["tasks"]]), "",
        f"Perceptual: {report['perceptual']}; lower is better.", "", *_consistency_lines(report), "## Known failures", "",
        "The worst pictures of each task, picked by score:", "", "![Worst pictures](../../../media/weights-failures.png)", "",
        *[f"- {task.replace('_', ' ')}: {t['model'].replace('_', ' ')} under {t['light'].replace('_', ' ')}, {t['psnr_mask']:.1f} dB" for task, t in worst_targets(report)], "",
        "Why they fail, as far as is known:", "",
        *[f"- {reason}" for reason in REASONS], "",
        "## Credits", "",
        "Textured models used in training (changed: smaller textures, no animation, no emission; rendered):", "",
        *[f"- {m['title']}, {m['author']}, {m['licence']}, {m['source']}" for m in data["models"]], "",
        "Objects of the bench in this project's pictures:", "",
        *[f"- {m['title']}, {m['author']}, {m['license']}, {m['source_url']}" for m in data.get("bench", [])], ""]
    return "\n".join(lines)


REASONS = (
    "Brightness: a white object in dim light and a grey one in bright light give the same photo. The guess follows the photo's brightness.",
    "Colour cast: warm light on grey paint and white light on warm paint likewise.",
    "Metal that mirrors its surroundings: the photo shows them instead of the metal, and polished metal that mirrors itself is approximate.",
    "Sides that the photo does not see wear what it shows at the same height, facing alike; what is on the back alone is missed.",
    "Two paints inside one voxel, one of them unseen, are told apart only where the photo shows both.",
    "Baked highlights that are as large as a part of the object are taken for paint.")


def _score_row(task: str, report: dict) -> list[object]:
    result = report["tasks"][task]
    mean = result["mean"]
    name, worst = min(result["models"].items(), key=lambda item: item[1]["psnr_mask"])
    return [f"{task.replace('_', ' ')} ({TASKS.get(task, task)})", f"{mean['psnr_mask']:.1f}", f"{mean['ssim']:.3f}", f"{mean['perceptual']:.3f}",
            f"{name.replace('_', ' ')}, {worst['psnr_mask']:.1f}"]


def _consistency_lines(report: dict) -> list[str]:
    mean = report.get("consistency", {}).get("mean", {})
    if "spread_ratio" not in mean:
        return []
    share = f", {mean['exposure_share']:.0%} of it the brightness of the object as a whole" if "exposure_share" in mean else ""
    return [f"Photos of one object under three lights give assets that differ by {mean['spread_ratio']:.2f} of what the shaded ones differ by"
            f" (wanted: {report['consistency']['limits']['spread_ratio']:.2f}){share}.", ""]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data")
    data.add_argument("starter", type=Path)
    data.add_argument("pack", type=Path)
    data.add_argument("--bench", type=Path, help="bench whose objects the pictures show: credits")
    stage = commands.add_parser("stage")
    stage.add_argument("name")
    stage.add_argument("log", type=Path)
    stage.add_argument("--minutes", type=float, required=True)
    stage.add_argument("--device", default="2 CPU cores")
    stage.add_argument("--what", required=True, help="what was trained, in words")
    failures = commands.add_parser("failures")
    failures.add_argument("bench", type=Path)
    failures.add_argument("predictions", type=Path)
    commands.add_parser("write").add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    if args.command == "data":
        bench = [m["source"] for m in read(args.bench / "index.json")["models"]] if args.bench else []
        keys = ("title", "author", "license", "source_url")
        write(REPORTS / "training-data.json", record_data(args.starter, args.pack) | {"bench": [{k: m[k] for k in keys} for m in bench]})
        return 0
    if args.command == "stage":
        write(REPORTS / "training.json", record_stage(args))
        return 0
    report = read(REPORTS / "eval-dev.json")
    if args.command == "failures":
        sheet = failure_sheet(report, args.bench, args.predictions)
        from near.output import write_png

        write_png(FAILURES, sheet)
        return 0
    text = card(read(REPORTS / "training-data.json"), read(REPORTS / "training.json"), report, read(WEIGHTS / "manifest.json"),
                read(REPORTS / "calibration.json"))
    old = CARD.read_text(encoding="utf-8") if CARD.is_file() else ""
    if args.check:
        print("The weights card is " + ("up to date." if text == old else "out of date: run tools/weights_card.py write."))
        return int(text != old)
    CARD.write_text(text, encoding="utf-8")
    print(f"Wrote {CARD.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
