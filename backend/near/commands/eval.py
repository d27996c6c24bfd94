"""``near eval``: the four tasks of a bench folder."""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path

from near.commands import common
from near.errors import NearError


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("eval", help="the four tasks of a bench folder",
                                   description="Predict and score the four tasks (forward, reconstruction, relighting, novel_view) of a bench folder.")
    parser.add_argument("bench", type=Path, metavar="BENCH")
    parser.add_argument("--save", type=Path, metavar="DIR", help="keep predictions as DIR/<task>/<target's relative path>, sheets in DIR/sheets")
    parser.add_argument("--out", type=Path, required=True, metavar="REPORT.json")
    parser.add_argument("--html", action="store_true", help="also write REPORT.html with tables and sheets")
    parser.add_argument("--tasks", help="comma-separated, default all four; none: only what else is asked for")
    parser.add_argument("--models", help="comma-separated names, default all")
    parser.add_argument("--baselines", action="store_true", help="also render the baseline 'baked' with Cycles (needs Blender's module; kept for later runs)")
    parser.add_argument("--consistency", action="store_true", help="also check that light behaves as light: joint rotation, doubling, sums, a turntable's "
                        "flicker, and how far the homogenised assets of photos under three lights lie apart")
    common.add_engine_options(parser)
    common.add_report_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from near.atomic import check_writable
    from near.evaluation.bench import TASKS, load_bench

    tasks = [] if args.tasks == "none" else _names(args.tasks) or list(TASKS)
    unknown = [t for t in tasks if t not in TASKS]
    if unknown:
        raise NearError("task-unknown", f"There is no task {', '.join(unknown)}.", f"Choose from {', '.join(TASKS)}, or none.")
    bench = load_bench(args.bench, _names(args.models))
    check_writable(args.out)
    with ExitStack() as stack:
        save = args.save or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="near-eval-")))
        check_writable(save / "prediction")
        report, sheets = _evaluate(args, bench, tasks, save)
    _write(args, report, sheets)
    from near.evaluation.report import table_lines

    common.emit(args, report, [*table_lines(report), f"Report: {args.out}"])
    return 2 if report["errors"] else 0


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _evaluate(args: argparse.Namespace, bench, tasks: list[str], save: Path) -> tuple[dict, dict]:
    from near import __version__
    from near.evaluation.metrics import perceptual_metric
    from near.evaluation.predict import predict
    from near.evaluation.report import against_baselines, copy_baseline, score_targets
    from near.evaluation.sheets import task_sheet

    quiet = args.quiet or args.json
    with common.open_engine(args) as engine:
        with common.progress_bar("predict", quiet) as bar:
            done = predict(engine, bench, tasks, save, bar.update)
        consistency = _consistency(args, engine, bench, quiet)
    baselines = {"copy": copy_baseline(bench)} if "relighting" in tasks else {}
    if args.baselines:
        from near.evaluation.baked import baked_baseline

        with common.progress_bar("baseline: baked", quiet) as bar:
            baselines["baked"] = baked_baseline(bench, tasks, bar.update)
    results, sheets = {}, {}
    with common.progress_bar("score", quiet) as bar:
        for index, task in enumerate(t for t in tasks if t not in done.skipped):
            bar.update(index / len(tasks), task)
            targets = [t for m in bench.models for t in m.targets[task]]
            results[task] = score_targets(bench, targets, lambda t: done.path(task, t))  # noqa: B023
            sheet = task_sheet(bench, task, lambda t: done.path(task, t))  # noqa: B023
            if sheet is not None:
                sheets[task] = sheet
    report = {"near": __version__, "bench": bench.split, "pack": args.pack, "device": str(getattr(engine, "device", "")),
              "perceptual": perceptual_metric()[0], "tasks": results, "baselines": baselines, "median_seconds": done.medians(),
              "against": against_baselines(results, baselines), "skipped": done.skipped, "errors": done.errors}
    if consistency is not None:
        report["errors"] = [*done.errors, *consistency.pop("errors")]
        report["consistency"] = consistency
    return report, sheets


def _consistency(args: argparse.Namespace, engine, bench, quiet: bool) -> dict | None:
    if not args.consistency:
        return None
    from near.evaluation.consistency import check_consistency

    with common.progress_bar("consistency", quiet) as bar:
        return check_consistency(engine, bench, bar.update)


def _write(args: argparse.Namespace, report: dict, sheets: dict) -> None:
    import json

    from near.evaluation.report import report_page
    from near.atomic import write_bytes
    from near.output import write_png

    folder = args.save / "sheets" if args.save else args.out.with_name(f"{args.out.stem}_sheets")
    for task, sheet in sheets.items():
        write_png(folder / f"{task}.png", sheet)
    if args.html:
        write_bytes(args.out.with_suffix(".html"), report_page(report, sheets).encode())
    write_bytes(args.out, (json.dumps(report, indent=1) + "\n").encode())
