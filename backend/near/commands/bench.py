"""``near bench``: how fast this machine is."""

from __future__ import annotations

import argparse
from pathlib import Path

from near.commands import common


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser("bench", help="how fast this machine is", description="Medians of encode, create and frames, beside Cycles "
                                   "(same object, light and size) where Blender's module is installed.")
    parser.add_argument("--size", type=int, default=512, metavar="N", help="pixels a side")
    parser.add_argument("--frames", type=int, default=20, help="timed orbit frames")
    parser.add_argument("--lights", type=int, default=5, help="timed new lights")
    parser.add_argument("--repeats", type=int, default=1, help="timed runs of create and of encode")
    parser.add_argument("--cycles-samples", type=int, default=64, metavar="SPP", help="0 leaves Cycles out")
    parser.add_argument("--out", type=Path, metavar="REPORT.json")
    common.add_engine_options(parser)
    parser.epilog = "--pack official-random measures the published models at full size, with random weights."
    common.add_report_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import json

    from near.atomic import check_writable, write_bytes
    from near.bench import BenchSettings, run_bench
    from near.commands.render import check_range
    from near.demo import shipped_sample

    common.check_size(args.size, args.size)
    for name, low, high in (("frames", 1, 10_000), ("lights", 1, 1000), ("repeats", 1, 100), ("cycles_samples", 0, 65_536)):
        check_range(name.replace("_", "-"), getattr(args, name), low, high)
    if args.out is not None:
        check_writable(args.out)
    settings = BenchSettings(args.frames, args.lights, args.repeats, args.size, args.cycles_samples)
    with common.progress_bar("bench", args.quiet or args.json) as bar:
        if args.pack == "official-random":
            result, text = _published(args, bar)
        else:
            with common.open_engine(args) as engine:
                result = run_bench(engine, shipped_sample(), settings, bar.update)
            text = list(lines(result))
    if args.out is not None:
        write_bytes(args.out, (json.dumps(result, indent=1) + "\n").encode())
    common.emit(args, result, text)
    return 0


def _published(args: argparse.Namespace, bar) -> tuple[dict, list[str]]:
    """The published models at full size with random weights: how fast the arithmetic is, whatever the pictures."""
    from dataclasses import asdict

    from near.bench import machine
    from near.pipeline.engine import choose_device
    from near.pipeline.published_bench import bench_published, report

    device = str(choose_device(args.device))
    result = bench_published(size=args.size, frames=min(args.frames, 5), device=device, say=lambda text: bar.update(0.5, text))
    return {"machine": machine(), "device": device, "pack": args.pack, **asdict(result)}, report(result)


def lines(result: dict):
    """The result as text."""
    machine, medians = result["machine"], result["median_seconds"]
    yield f"{machine['cpu']}, {machine['cores']} cores ({result['torch_threads']} threads), {result['device']}, pack {result['pack']}"
    yield f"{result['sample']}: {result['voxels']} voxels, {result['gaussians']} Gaussians, {result['size'][0]} x {result['size'][1]} pixels"
    yield f"  encode (mesh to asset)          {medians['encode']:8.2f} s"
    yield f"  create (photo to asset)         {medians['create']:8.2f} s"
    yield f"  orbit frame, light unchanged    {medians['orbit_frame']:8.3f} s   {result['orbit_frames_per_second']:.1f} frames/s"
    yield f"  first frame after a new light   {medians['new_light']:8.3f} s"
    yield f"  frame after a turn of the light {medians['light_turn']:8.3f} s"
    processor = result["median_processor_seconds"]
    yield f"  processor time, all threads:    create {processor['create']:.1f} s, orbit frame {processor['orbit_frame']:.3f} s, new light {processor['new_light']:.3f} s"
    yield f"  peak memory                     {result['peak_memory_mb']:8} MB"
    cycles = result.get("cycles")
    if cycles and "absent" in cycles:
        yield f"  Cycles: {cycles['absent']}"
    elif cycles:
        yield (f"  Cycles {cycles['samples']} spp + OIDN          {cycles['median_seconds']:8.2f} s   "
               f"{cycles['times_slower_than_orbit_frame']:.1f} times an orbit frame")
