"""A batch whose worker is killed again and again; cancellation; a parent that dies."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from near import wire
from near.connection import process_alive
from near.errors import NearError

from stress_parts.stand import REPOSITORY, TESTS, Stand, children, scene


def _digest(frame) -> str:
    return hashlib.sha256(b"".join(bytes(layer.data) for layer in frame.layers.values())).hexdigest()


def batch_under_fire(frames: int, kills: int, frame_s: float = 0.05, size: tuple[int, int] = (96, 64), shared_memory: bool = True) -> dict:
    """Renders a batch twice: undisturbed, then with the worker killed `kills` times.

    -> {"frames", "kills", "identical", "duplicates", "missing", "longest_silence_s", "seconds", "leftovers"}
    """
    items = [(f"frame{i:04d}", scene(i, *size, seconds=frame_s if i % 3 else frame_s / 2, passes=("color", "depth"))) for i in range(frames)]
    with Stand() as stand:
        client = stand.client()
        expected = {}
        for key, frame in client.batch(items):
            with frame:
                expected[key] = _digest(frame)
    with Stand() as stand:
        client = stand.client(shared_memory=shared_memory)
        client.poll(0.2)
        received: dict[str, list[str]] = {}
        killed, silence, news, started = 0, 0.0, time.monotonic(), time.monotonic()
        victim = 0
        sent_at = client._last_news

        def watch() -> bool:
            # The batch asks this while it waits: kill the worker now and then, and note how long there was no news.
            nonlocal killed, silence, news, sent_at, victim
            now = time.monotonic()
            if client._last_news != sent_at:
                sent_at = news = client._last_news
            silence = max(silence, now - news)
            if killed < kills and len(received) >= (killed + 1) * frames // (kills + 1):
                worker = next((pid for pid in children(stand.process.pid) if pid != victim), 0)
                if worker:
                    os.kill(worker, signal.SIGKILL)
                    killed, victim = killed + 1, worker
            return False

        work = client.batch(items, stop=watch)
        for key, frame in work:
            with frame:
                received.setdefault(key, []).append(_digest(frame))
            watch()
        seconds = time.monotonic() - started
        status = client.status()
        leftovers = [str(p) for p in stand.home.rglob("*") if ".part" in p.name or p.suffix == ".shm"]
        log = stand.log()
    return {"frames": frames, "kills": killed, "workers": status["starts"], "seconds": round(seconds, 1),
            "identical": sum(expected[k] == v[0] for k, v in received.items()), "missing": frames - len(received),
            "duplicates": sum(len(v) - 1 for v in received.values()), "longest_silence_s": round(silence, 2),
            "leftovers": leftovers, "lost_noticed": log.count("ended (signal")}


def cancel_times(rounds: int = 5) -> dict:
    """Cancels a long job between and inside its steps, and a frame. -> ms until it had stopped, and until the next frame came."""
    found: dict[str, list[float]] = {"create": [], "step": [], "frame": [], "queued": [], "next_frame": []}
    with Stand() as stand:
        client = stand.client()
        photo = client.upload(b"\x89PNG" + bytes(100), "photo")
        for _ in range(rounds):
            for what, request in (("create", wire.Create(id=client.new_id(), photo=photo, seed=1000 * 1_000_000 + 10)),
                                  ("step", wire.Create(id=client.new_id(), photo=photo, seed=10 * 1_000_000 + 60_000)),
                                  ("frame", wire.BatchFrame(id=client.new_id(), scene=scene(seconds=60)))):
                pending = client.send(request)
                time.sleep(0.05)
                client.wait(lambda: (client.poll(), client.status()["job"] is not None)[1], 10)
                queued = client.send(wire.BatchFrame(id=client.new_id(), scene=scene(7, seconds=30)))
                found["queued"].append(_cancel(client, queued))
                found[what].append(_cancel(client, pending))
                begun = time.perf_counter()
                client.call(wire.BatchFrame(id=client.new_id(), scene=scene(1, 16, 16))).frame.release()
                found["next_frame"].append((time.perf_counter() - begun) * 1e3)
        starts = client.status()["starts"]
    return {name: round(max(values), 1) for name, values in found.items()} | {"workers": starts, "rounds": rounds}


def _cancel(client, pending) -> float:
    begun = time.perf_counter()
    answer = client.cancel(pending.request.id)
    client.wait(lambda: pending.done and answer.done, 10)
    milliseconds = (time.perf_counter() - begun) * 1e3
    if pending.error is None or pending.error.code != "cancelled":
        raise NearError("cancel-failed", f"The request ended with {pending.error}.", "")
    return milliseconds


_PARENT = """
import json, os, sys, time
from pathlib import Path
from near.client import Client
from near.server.config import ServeConfig
from near.server.launch import start
from stress_parts.stand import scene
from near import wire
home, way = Path(sys.argv[1]), sys.argv[2]
config = ServeConfig(home=home, parent_pid=os.getpid() if way == "pid" else 0, parent_pipe=way == "pipe")
connection, process = start(config)
client = Client.connect(connection)
client.call(wire.BatchFrame(id=client.new_id(), scene=scene(1, 640, 480))).frame
client.send(wire.BatchFrame(id=client.new_id(), scene=scene(2, seconds=50)))
client.wait(lambda: bool(client.beat.get("worker_pid")), 10)
print(json.dumps({"broker": process.pid, "worker": client.beat["worker_pid"], "shared": client.shared_memory}), flush=True)
time.sleep(600)
"""


def parent_dies(home: Path, way: str = "pid") -> dict:
    """Kills the process that started a backend. -> seconds until everything of it was gone, and what was left after 5 s."""
    def segments() -> set[str]:
        return {str(p) for folder in ("/dev/shm", "/tmp", str(home / "run")) if Path(folder).is_dir()
                for p in Path(folder).iterdir() if "near" in p.name.lower() and (p.is_socket() or p.suffix == ".shm")}

    before = segments()
    environment = {**os.environ, "NEAR_TEST_BACKEND": "near_test_backend",
                   "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "backend"), str(TESTS), str(REPOSITORY / "tools")])}
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, str(home), way], stdout=subprocess.PIPE, env=environment)
    told = json.loads(parent.stdout.readline())
    parent.kill()
    begun = time.monotonic()
    left = [told["broker"], told["worker"]]
    while left and time.monotonic() - begun < 5:
        left = [pid for pid in left if process_alive(pid)]
        time.sleep(0.02)
    seconds = time.monotonic() - begun
    parent.wait()
    parent.stdout.close()
    return {"seconds": round(seconds, 2), "processes_left": left, "shared_memory_used": told["shared"],
            "segments_left": sorted(segments() - before), "connection_file_left": (home / "run" / "default.json").exists()}
