"""``near demo``: the main job on a sample."""

from __future__ import annotations

import argparse
from pathlib import Path

from near.commands import common


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("demo", help="the main job on a sample", description="Sample photo to asset, turntable, light sweep, passes and contact sheet. "
                                   "Opens nothing; prints where everything is.")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/demo"), metavar="DIR")
    parser.add_argument("--frames", type=int, default=36, metavar="N", help="of the turntable and of the light sweep")
    parser.add_argument("--size", type=int, default=512, metavar="N", help="pixels a side")
    common.add_engine_options(parser)
    common.add_report_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from near.atomic import check_writable
    from near.commands.render import check_range

    check_range("frames", args.frames, 1, 1000)
    common.check_size(args.size, args.size)
    check_writable(args.output / "asset.near")
    from near.demo import run_demo

    quiet = args.quiet or args.json
    with common.open_engine(args) as engine:
        result = run_demo(engine, args.output, lambda text: common.progress_bar(text, quiet), size=args.size, frames=args.frames)
    lines = ["", "Made:", *(f"  {name.replace('_', ' '):<14}{path}" for name, path in result["made"].items()),
             "", f"Look at {result['made']['contact_sheet']} first. Next: near create YOUR_PHOTO.png -o mine.near"]
    common.emit(args, result, lines)
    return 0
