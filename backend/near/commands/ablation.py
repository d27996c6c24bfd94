"""``near ablation``: the four input SLATs and the depth of the decoder, one report each."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from near.commands import common
from near.errors import NearError


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("ablation", help="what the renderer is given, and how deep it is, against the scores",
                                   description="Score the photo tasks of a bench folder with four input SLATs (shaded, base colour, LH, LH + base colour), and "
                                   "forward with fewer LAD layers, with frames per second. Writes FOLDER/ablation-*.json.")
    parser.add_argument("bench", type=Path, metavar="BENCH")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--inputs", default="all", help="comma-separated from shaded, base_colour, lh, lh_base_colour; all; none")
    parser.add_argument("--lad-layers", default="all", metavar="N,N", help="comma-separated depths; all: 0 to the pack's own; none")
    parser.add_argument("--renderers", type=Path, metavar="RUNS", help="take RUNS/lad<N>/renderer.safetensors, trained at that depth, where it is there")
    parser.add_argument("--models", help="comma-separated names, default all")
    parser.add_argument("--frames", type=int, default=12, help="timed frames of each depth")
    common.add_engine_options(parser)
    common.add_report_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from near.atomic import check_writable
    from near.commands.eval import _names
    from near.commands.render import check_range
    from near.evaluation.ablation import INPUTS, ablate_input, ablate_layers
    from near.evaluation.bench import load_bench
    from near.evaluation.report import table_lines

    check_range("frames", args.frames, 1, 1000)
    inputs = {"all": list(INPUTS), "none": []}.get(args.inputs, _names(args.inputs))
    if unknown := [n for n in inputs if n not in INPUTS]:
        raise NearError("input-unknown", f"There is no input {', '.join(unknown)}.", f"Choose from {', '.join(INPUTS)}.")
    bench = load_bench(args.bench, _names(args.models))
    check_writable(args.out / "ablation")
    lines, failed, made = [], False, {}
    with common.open_engine(args) as engine, common.progress_bar("ablation", args.quiet or args.json) as bar, \
            tempfile.TemporaryDirectory(prefix="near-ablation-") as scratch:
        if not engine.is_compact:
            raise NearError("ablation-unsupported", "The published checkpoint cannot be taken apart so.", "Use --pack compact.")
        depths = _depths(args.lad_layers, engine.compact_models().config.renderer.lad_blocks)
        total = len(inputs) + len(depths)
        for index, what in enumerate([*inputs, *depths]):
            def tell(fraction: float, text: str, index: int = index, what=what) -> None:
                bar.update((index + fraction) / total, f"{what}: {text}")

            save = Path(scratch) / str(what)
            if isinstance(what, str):
                name, report = what.replace("_", "-"), ablate_input(engine, bench, what, made, save, tell)
            else:
                name, report = f"lad-{what}", ablate_layers(engine, bench, what, args.renderers, save, tell, args.frames)
            _write(args.out / f"ablation-{name}.json", report)
            failed |= bool(report["errors"])
            lines += [f"{report['variant']}:", *table_lines({"perceptual": "", **report})[1:-1]]
    common.emit(args, {"reports": str(args.out)}, [*lines, f"Reports: {args.out}"])
    return 2 if failed else 0


def _depths(text: str, own: int) -> list[int]:
    if text in ("all", "none"):
        return list(range(own + 1)) if text == "all" else []
    try:
        depths = [int(part) for part in text.split(",")]
        if min(depths) < 0:
            raise ValueError
    except ValueError as error:
        raise NearError("lad-layers", f"{text!r} is not a list of depths.", "Write numbers with commas, for example 0,1,3.") from error
    return depths


def _write(path: Path, report: dict) -> None:
    import json

    from near import __version__
    from near.atomic import write_bytes
    from near.evaluation.metrics import perceptual_metric

    write_bytes(path, (json.dumps({"near": __version__, "perceptual": perceptual_metric()[0], **report}, indent=1) + "\n").encode())
