"""``near encode``: mesh with PBR materials -> asset."""

from __future__ import annotations

import argparse
from pathlib import Path

from near.commands import common
from near.commands.create import check_asset_name, describe


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("encode", help="mesh -> relightable asset",
                                   description="Make a relightable asset from a mesh and its PBR materials.")
    parser.add_argument("mesh", type=Path, help="GLB, glTF, OBJ or PLY")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="A.near")
    parser.add_argument("--seed", type=int, default=0)
    common.add_engine_options(parser, connect=True)
    common.add_report_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from near.atomic import check_writable, write_bytes

    check_asset_name(args.output)
    check_writable(args.output)
    from near.assets import encode_asset

    with common.progress_bar("encode", args.quiet or args.json) as bar, common.open_engine(args) as engine:
        asset = engine.encode(args.mesh, seed=args.seed, progress=bar)
        write_bytes(args.output, encode_asset(asset))
        bar.update(1.0, "done")
    common.emit(args, describe(args.output, asset), [f"{args.output}: {len(asset)} voxels, {args.output.stat().st_size / 1e6:.1f} MB"])
    return 0
