"""The commands behind tools/train_compact.sh."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "backend")]


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="tools/train_compact.sh", description="Train the compact pack in short slots on a borrowed machine.")
    commands = top.add_subparsers(dest="command", required=True)

    make = commands.add_parser("prepare", help="one package of data and code, at most 60 MB, and the weights to start from")
    make.add_argument("objects", type=Path, nargs="+", help="folders of training objects (.npz)")
    make.add_argument("--hdris", type=Path, required=True, help="folder of the lights they were rendered under")
    make.add_argument("--wheels", type=Path, help="folder of Python packages (.whl) that the other machine lacks, gsplat for one")
    make.add_argument("--pack", type=Path, help="pack to start from (default: the shipped one)")
    make.add_argument("--fresh", action="store_true", help="start from nothing")
    make.add_argument("--limit-mb", type=float, default=60.0)
    make.add_argument("--light-width", type=int, default=512, help="pixels around a light")
    make.add_argument("--most-objects", type=int, help="for rehearsals")
    make.add_argument("-o", "--out", type=Path, required=True, help="folder for slot.tar.gz and weights/")

    train = commands.add_parser("train", help="there: prepare caches, train, leave weights in pieces, curves and sheets")
    train.add_argument("package", type=Path, help="slot.tar.gz, or the folder it was unpacked into")
    train.add_argument("--minutes", type=float, required=True, help="of the whole call, preparing included")
    train.add_argument("--weights", type=Path, help="weights/ of prepare or of the last slot, or a pack; without it training starts from nothing")
    train.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    train.add_argument("--stages", default="renderer,base,homogenizer")
    train.add_argument("--work", type=Path, default=Path("slot-work"), help="caches; a later slot on the same machine finds them there")
    train.add_argument("--cores", type=int)
    train.add_argument("--steps", type=int, default=10 ** 8, help="most steps of a stage, for rehearsals")
    train.add_argument("-o", "--out", type=Path, required=True)

    join = commands.add_parser("join", help="pieces -> a pack, verified")
    join.add_argument("pieces", type=Path)
    join.add_argument("-o", "--out", type=Path, required=True)
    join.add_argument("--history", type=Path, help="JSON file that keeps what every slot did, for the weights card")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    from near.errors import NearError

    try:
        return {"prepare": _prepare, "train": _train, "join": _join}[args.command](args)
    except NearError as error:
        print(f"Error [{error.code}]: {error.what}\nWhat to do: {error.remedy}", file=sys.stderr)
        return 2


def _prepare(args: argparse.Namespace) -> int:
    from near.weights.packs import compact_dir
    from package import write_package
    from pieces import split_pack

    made = write_package(args.out / "slot.tar.gz", args.objects, args.hdris, wheels=args.wheels, limit_mb=args.limit_mb,
                         light_width=args.light_width, most_objects=args.most_objects)
    print(f"{args.out / 'slot.tar.gz'}: {made.bytes / 1e6:.1f} MB, {made.objects} objects ({made.left_out} had no room), {made.lights} lights, {made.wheels} wheels")
    if not args.fresh:
        index = split_pack(args.pack or compact_dir(), args.out / "weights", [])
        print(f"{args.out / 'weights'}: {sum(len(f['pieces']) for f in index['files'].values())} pieces")
    return 0


def _train(args: argparse.Namespace) -> int:
    from package import unpack
    from train import RUN_FILES, run_slot

    stages = tuple(s.strip() for s in args.stages.split(","))
    if unknown := [s for s in stages if s not in RUN_FILES]:
        sys.exit(f"There is no stage {', '.join(unknown)}; choose from {', '.join(RUN_FILES)}.")
    content = args.package if args.package.is_dir() else unpack(args.package, args.work)
    run_slot(content, args.out, args.work, minutes=args.minutes, device=args.device, weights=args.weights, stages=stages, cores=args.cores,
             steps=args.steps)
    return 0


def _join(args: argparse.Namespace) -> int:
    from pieces import join_pack

    index = join_pack(args.pieces, args.out)
    print(f"{args.out}: joined and verified, {len(index['history'])} slots so far")
    if args.history:
        known = json.loads(args.history.read_text(encoding="utf-8")) if args.history.is_file() else {"slots": []}
        known["slots"] = [*known.get("slots", []), *(r for r in index["history"] if r not in known.get("slots", []))]
        args.history.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
