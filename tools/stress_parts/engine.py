"""The same questions with the real engine: how soon it stops, how old its viewport frames are."""

from __future__ import annotations

import math
import random
import time

import torch

from near import wire
from near.geometry.cameras import orbit_camera
from near.lighting import environment_from_array
from near.server.remote import RemoteEngine, spec_of_camera

from stress_parts.stand import REPOSITORY, Stand

SAMPLES = REPOSITORY / "backend" / "near" / "samples"


def engine_scene(asset: str, light: str, yaw_rad: float, size: int, quality: str) -> wire.Scene:
    """An orbit around the asset."""
    camera = spec_of_camera(orbit_camera(yaw_rad, 0.3, 2.0, 0.7, size, size))
    return wire.Scene(assets=(wire.PlacedSpec(asset),), light=wire.LightSpec(light), camera=camera, quality=quality)


def with_engine(cancels: int = 8, seconds: float = 20.0, size: int = 256, seed: int = 3) -> dict:
    """Cancels creations and frames of the engine at random moments; then orbits in one viewport beside a batch.

    -> ms until each had stopped (median, worst), age of the shown frames, frames a second, workers used (1: none was killed)
    """
    rng = random.Random(seed)
    with Stand(engine=True, environment={"OMP_NUM_THREADS": ""}) as stand, RemoteEngine(str(stand.home / "run" / "default.json")) as engine:
        client = engine._client
        made = engine.encode(SAMPLES / "teapot.glb")
        asset = engine._asset(made)
        light = engine._light(environment_from_array(torch.rand(128, 256, 3, generator=torch.Generator().manual_seed(1)) * 2))
        photo = client.upload((SAMPLES / "teapot.png").read_bytes(), "photo")
        begun = time.perf_counter()
        client.call(wire.Create(id=client.new_id(), photo=photo), timeout_s=3600)
        create_s = time.perf_counter() - begun
        begun = time.perf_counter()
        client.call(wire.BatchFrame(id=client.new_id(), scene=engine_scene(asset, light, 0, 2 * size, "full")), timeout_s=600).frame.release()
        found: dict[str, list[float]] = {"create": [], "frame": []}
        for number in range(cancels):
            for what in found:
                request = wire.Create(id=client.new_id(), photo=photo, seed=number) if what == "create" else \
                    wire.BatchFrame(id=client.new_id(), scene=engine_scene(asset, light, 0.1 + number, 4 * size, "full"))
                pending = client.send(request)
                end = time.monotonic() + rng.random() * (create_s if what == "create" else 0.3)
                while time.monotonic() < end and not pending.done:
                    client.poll(0.005)
                if pending.done:
                    if pending.frame is not None:
                        pending.frame.release()
                    continue
                begun = time.perf_counter()
                answer = client.cancel(request.id)
                client.wait(lambda: answer.done and pending.done, 60)
                found[what].append((time.perf_counter() - begun) * 1e3)
                if pending.frame is not None:
                    pending.frame.release()
        report = _orbit(client, asset, light, seconds, size)
        status = client.status()
    stops = {name: sorted(values) for name, values in found.items()}
    return {"create_s": round(create_s, 2), "size": size, "workers": status["starts"], "device": status["device"], **report,
            **{f"{name}_stop_{label}_ms": round(values[index], 1) for name, values in stops.items() if values
               for label, index in (("p50", len(values) // 2), ("worst", -1))},
            "cancelled": {name: len(values) for name, values in stops.items()}}


def _orbit(client, asset: str, light: str, seconds: float, size: int) -> dict:
    viewport = client.viewport("orbit")
    batch = [client.send(wire.BatchFrame(id=client.new_id(), scene=engine_scene(asset, light, i * 0.1, size, "full"))) for i in range(200)]
    ages, sent, stale, shown = [], {}, 0, (0, False)
    begun = due = time.monotonic()
    while (now := time.monotonic()) - begun < seconds:
        if now >= due:
            due = now + 1 / 30
            sent[viewport.submit(engine_scene(asset, light, now, size, "progressive"))] = now
        client.poll(max(0.0, due - time.monotonic()))
        frame = viewport.take()
        if frame is not None:
            with frame:
                stale += frame.order <= shown
                shown = frame.order
                ages.append(time.monotonic() - sent[frame.message.seq])
    done = sum(p.done and p.error is None for p in batch)
    for pending in batch:
        if pending.frame is not None:
            pending.frame.release()
        elif not pending.done:
            client.cancel(pending.request.id)
    ages.sort()
    age = {label: round(ages[min(len(ages) - 1, int(q * len(ages)))] * 1e3, 1) if ages else math.inf
           for label, q in (("view_age_p50_ms", 0.5), ("view_age_p95_ms", 0.95))}
    return {**age, "frames_per_s": round(len(ages) / seconds, 1), "stale_shown": stale, "batch_beside": done}
