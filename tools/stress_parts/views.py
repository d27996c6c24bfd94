"""Viewports under load: age of what is shown, fairness; and what a frame costs to move."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time

from near import wire
from near.connection import load_connection
from near.client import Client

from stress_parts.stand import REPOSITORY, TESTS, Stand, scene

_VIEWER = "import sys, json; from stress_parts.views import view_for; print(json.dumps(view_for(*json.loads(sys.argv[1]))))"


def view_for(path: str, number: int, seconds: float, rate_hz: float, frame_s: float, size: list[int]) -> dict:
    """One client with one viewport whose camera moves for `seconds`, or until it has seen three frames (busy machines need
    longer); run in a process of its own."""
    from pathlib import Path

    ages, stale_shown, shown = [], 0, (0, False)
    sent: dict[int, float] = {}
    with Client.connect(load_connection(Path(path)), name=f"viewer {number}") as client:
        viewport = client.viewport("main")
        begun = time.monotonic()
        due, last_shown_at, gaps = begun, begun, []
        while (now := time.monotonic()) - begun < seconds or (len(ages) < 3 and now - begun < 10 * seconds):
            if now >= due:
                due = max(due + 1 / rate_hz, now - 1)
                seq = viewport.submit(scene(now, *size, seconds=frame_s, quality="progressive"))
                sent[seq] = now
            client.poll(max(0.0, min(0.01, due - time.monotonic())))
            frame = viewport.take()
            if frame is not None:
                with frame:
                    stale_shown += frame.order <= shown
                    shown = frame.order
                    now = time.monotonic()
                    ages.append(now - sent[frame.message.seq])
                    gaps.append(now - last_shown_at)
                    last_shown_at = now
        client.poll(0.1)
        ages.sort()
        return {"viewer": number, "submitted": viewport.seq, "shown": len(ages), "superseded": viewport.superseded,
                "dropped_stale": viewport.stale, "unseen": viewport.unseen, "stale_shown": stale_shown,
                "error": str(viewport.error or client.error or ""),
                "age_p50_ms": round(_quantile(ages, 0.5) * 1e3, 1), "age_p95_ms": round(_quantile(ages, 0.95) * 1e3, 1),
                "longest_gap_ms": round(max(gaps, default=math.inf) * 1e3, 1)}


def _quantile(values: list[float], q: float) -> float:
    return values[min(len(values) - 1, int(q * len(values)))] if values else math.inf


def moving_viewports(clients: int, seconds: float, rate_hz: float = 30.0, frame_s: float = 0.04, batch_s: float = 0.1,
                     size: tuple[int, int] = (160, 120)) -> dict:
    """Four (or so) clients with moving cameras and a batch behind them. Draft frames cost a quarter of `frame_s`.

    -> {"viewers": [...], "fairness": least/most frames shown, "batch_frames", "frame_ms": of the worker}
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "backend"), str(TESTS), str(REPOSITORY / "tools")])}
    with Stand() as stand:
        client = stand.client(name="batch")
        client.call(wire.BatchFrame(id=client.new_id(), scene=scene(0, 8, 8))).frame.release()     # the worker is up
        path = str(stand.home / "run" / "default.json")
        orders = [json.dumps([path, i, seconds, rate_hz, frame_s, list(size)]) for i in range(clients)]
        viewers = [subprocess.Popen([sys.executable, "-c", _VIEWER, order], stdout=subprocess.PIPE, env=environment) for order in orders]
        begun, done = time.monotonic(), 0
        endless = ((f"b{i}", scene(i, *size, seconds=batch_s)) for i in range(1_000_000))
        work = client.batch(endless, window=4)
        while any(v.poll() is None for v in viewers):
            _, frame = next(work)
            frame.release()
            done += 1
        took = time.monotonic() - begun
        work.close()
        reports = [json.loads(v.stdout.read()) for v in viewers]
        for viewer in viewers:
            viewer.stdout.close()
        status = client.status()
    shown = [r["shown"] for r in reports]
    return {"viewers": reports, "fairness": round(min(shown) / max(max(shown), 1), 3), "batch_frames": done,
            "seconds": round(took, 1), "served": status["done"], "frame_draft_ms": frame_s * 250, "batch_ms": batch_s * 1e3}


def transport(rounds: int = 30, width: int = 1920, height: int = 1080) -> dict:
    """Milliseconds (median) for a float16 RGBA frame to arrive and be read, beyond its rendering, and for a small request."""
    found: dict[str, float] = {}
    nbytes = width * height * 8
    source, target = bytearray(os.urandom(1 << 20) * (nbytes // (1 << 20) + 1))[:nbytes], bytearray(nbytes)
    found["copy_ms"] = _median(rounds, lambda: _copy(target, source))
    with Stand() as stand:
        for name, shared in (("tcp", False), ("shared_memory", True)):
            client = stand.client(shared_memory=shared)
            client.wait(lambda: client.shared_memory == shared, 5)
            times, copies = [], []
            for i in range(rounds + 3):
                request = wire.BatchFrame(id=client.new_id(), scene=scene(i, width, height))
                begun = time.perf_counter()
                with client.call(request).frame as frame:
                    moved = (time.perf_counter() - begun) * 1e3 - frame.message.render_ms
                    view = frame.layers["color"].data
                    begun = time.perf_counter()
                    target[:] = view
                    copies.append((time.perf_counter() - begun) * 1e3)
                    times.append(moved)
            found[f"{name}_ms"] = round(statistics.median(times[3:]), 2)
            found[f"{name}_read_ms"] = round(statistics.median(copies[3:]), 2)
        found["ping_ms"] = _median(500, lambda: client.call(wire.Ping(id=client.new_id())))
        small = [_render_overhead(client, i) for i in range(200)]
        found["small_frame_ms"] = round(statistics.median(small), 3)
    return {"bytes": nbytes, "rounds": rounds, **found}


def _render_overhead(client: Client, number: int) -> float:
    begun = time.perf_counter()
    with client.call(wire.BatchFrame(id=client.new_id(), scene=scene(number, 16, 16))).frame as frame:
        return (time.perf_counter() - begun) * 1e3 - frame.message.render_ms


def _copy(target: bytearray, source: bytearray) -> None:
    target[:] = source


def _median(rounds: int, work) -> float:
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        work()
        times.append((time.perf_counter() - begun) * 1e3)
    return round(statistics.median(times), 3)
