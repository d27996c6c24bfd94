"""The backend at full size, as issue 4 asks; prints a table and writes reports/stress.json.

    python tools/stress.py [--quick] [--only NAME ...] [--engine] [--out FILE]

Everything runs on loopback, in temporary folders, with the light test engine (`--engine` adds the real one).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "backend"), str(REPOSITORY / "tools"), str(REPOSITORY / "tests")]

from stress_parts.flood import flood  # noqa: E402
from stress_parts.kills import batch_under_fire, cancel_times, parent_dies  # noqa: E402
from stress_parts.views import moving_viewports, transport  # noqa: E402

Rows = list[dict]


def row(what: str, measured: str, wanted: str, ok: bool) -> dict:
    return {"what": what, "measured": measured, "wanted": wanted, "ok": bool(ok)}


def messages(quick: bool) -> tuple[dict, Rows]:
    r = flood(5_000 if quick else 100_000)
    return r, [row(f"{r['sent']:,} malformed, mutated and replayed messages in {r['seconds']:.0f} s: memory of the broker", f"{r['growth']:+.1%}",
                   "at most +5 %", r["alive"] and r["growth"] <= 0.05 and not r["internal_errors"]),
               row("well-formed requests beside them answered", f"{r['answered']} of {r['asked']}, slowest {r['worst_ms']:.0f} ms", "all",
                   r["answered"] == r["asked"])]


def kills(quick: bool) -> tuple[dict, Rows]:
    r = batch_under_fire(40, 4) if quick else batch_under_fire(200, 20)
    return r, [row(f"worker killed {r['kills']} times during {r['frames']} frames: identical, missing, twice",
                   f"{r['identical']}, {r['missing']}, {r['duplicates']}", f"{r['frames']}, 0, 0",
                   (r["identical"], r["missing"], r["duplicates"]) == (r["frames"], 0, 0) and not r["leftovers"]),
               row("longest time without news", f"{r['longest_silence_s']:.1f} s", "at most 10 s", r["longest_silence_s"] <= 10)]


def viewports(quick: bool) -> tuple[dict, Rows]:
    r = moving_viewports(4, 6.0 if quick else 60.0)
    viewers = r["viewers"]
    stale = sum(v["stale_shown"] for v in viewers)
    shown, submitted = sum(v["shown"] for v in viewers), sum(v["submitted"] for v in viewers)
    ages = ", ".join(f"{v['age_p50_ms']:.0f}/{v['age_p95_ms']:.0f}" for v in viewers)
    return r, [row(f"four viewports at 30 Hz, {r['frame_draft_ms']:.0f} ms frames, and a batch: age of the shown frame, p50/p95 of each", f"{ages} ms",
                   "p95 below 250 ms", max(v["age_p95_ms"] for v in viewers) < 250),
               row("frames shown of requested (the others replaced by newer ones); least to most served", f"{shown} of {submitted}; {r['fairness']:.2f}",
                   "fair: above 0.8", r["fairness"] > 0.8),
               row("older frame shown after a newer one", str(stale), "never", stale == 0),
               row(f"batch frames of {r['batch_ms']:.0f} ms beside them", f"{r['batch_frames']} in {r['seconds']:.0f} s", "goes on",
                   r["batch_frames"] > r["seconds"] / 10)]


def cancel(quick: bool) -> tuple[dict, Rows]:
    r = cancel_times(1 if quick else 10)
    return r, [row("cancel of a job between steps, inside a step, of a frame, of queued work: slowest",
                   ", ".join(f"{r[k]:.0f}" for k in ("create", "step", "frame", "queued")) + " ms", "at most 200 ms",
                   max(r[k] for k in ("create", "step", "frame", "queued")) <= 200),
               row("next frame after it, same worker", f"{r['next_frame']:.0f} ms, {r['workers']} worker", "at once", r["workers"] == 1)]


def moving_pixels(quick: bool) -> tuple[dict, Rows]:
    r = transport(10 if quick else 60)
    return r, [row("1920 x 1080 float16 RGBA frame (16.6 MB): by TCP; by shared memory; plain memory copy", f"{r['tcp_ms']:.1f}; "
                   f"{r['shared_memory_ms']:.1f}; {r['copy_ms']:.1f} ms", "measured", True),
               row("small request through the broker, median", f"{r['ping_ms']:.2f} ms", "below 1 ms", r["ping_ms"] < 1)]


def orphans(quick: bool) -> tuple[dict, Rows]:
    results = {}
    for way in ("pid", "pipe"):
        with tempfile.TemporaryDirectory() as folder:
            results[way] = parent_dies(Path(folder), way)
    left = [thing for r in results.values() for thing in (*r["processes_left"], *r["segments_left"])]
    worst = max(r["seconds"] for r in results.values())
    return results, [row("parent killed: processes and shared memory left after 5 s", f"{len(left)} (all gone after {worst:.1f} s)", "none",
                         not left and not any(r["connection_file_left"] for r in results.values()))]


def real_engine(quick: bool) -> tuple[dict, Rows]:
    from stress_parts.engine import with_engine

    r = with_engine(2, 5.0) if quick else with_engine(12, 30.0)
    return r, [row(f"engine ({r['device']}): cancel of a creation; of a 1024 x 1024 frame: slowest",
                   f"{r.get('create_stop_worst_ms', 0):.0f}; {r.get('frame_stop_worst_ms', 0):.0f} ms", "at most 200 ms",
                   max(r.get("create_stop_worst_ms", 0), r.get("frame_stop_worst_ms", 0)) <= 200 and r["workers"] == 1),
               row(f"engine: orbit at {r['size']} x {r['size']} beside a batch: age p50/p95; shown", f"{r['view_age_p50_ms']:.0f}/{r['view_age_p95_ms']:.0f} ms; "
                   f"{r['frames_per_s']:.0f} a second", "never stale", r["stale_shown"] == 0)]


PARTS: dict[str, Callable[[bool], tuple[dict, Rows]]] = {
    "messages": messages, "kills": kills, "viewports": viewports, "cancel": cancel, "transport": moving_pixels, "orphans": orphans}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--only", nargs="+", choices=[*PARTS, "engine"], help="these parts; the others keep their last result")
    parser.add_argument("--engine", action="store_true", help="the real engine as well")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "reports" / "stress.json")
    args = parser.parse_args()
    parts = {**PARTS, **({"engine": real_engine} if args.engine or "engine" in (args.only or ()) else {})}
    report = json.loads(args.out.read_text()) if args.only and args.out.is_file() else {"parts": {}}
    report.update(machine={"cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}, quick=args.quick)
    for name, part in parts.items():
        if args.only and name not in args.only:
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        before, load = time.monotonic(), os.getloadavg()[0] if hasattr(os, "getloadavg") else -1.0
        measured, rows = part(args.quick)
        report["parts"][name] = {"measured": measured, "rows": rows, "seconds": round(time.monotonic() - before, 1),
                                 "load_before": round(load, 1)}
    rows = [r for entry in report["parts"].values() for r in entry["rows"]]
    width = max(len(r["what"]) for r in rows)
    for r in rows:
        print(f"{'ok ' if r['ok'] else 'NO '} {r['what']:<{width}}  {r['measured']:<36}  {r['wanted']}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if all(r["ok"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
