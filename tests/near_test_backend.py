"""A light, deterministic stand-in for the engine: the worker under test loads it in a process of its own.

What it does is steered by the request: the camera's `far` is a time in seconds that a frame takes, its `near` (above 1)
a fault to commit; a job's `seed` does the same (see `_misbehave`).
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np

from near import wire
from near.errors import Cancelled, NearError

FAULTS = {2: "crash", 3: "hang", 4: "memory", 5: "error", 6: "stubborn", 7: "eat", 8: "deaf"}
SEED_STEPS = 1_000_000     # seed = steps * SEED_STEPS + milliseconds per step


def _misbehave(fault: str) -> None:
    if fault == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if fault == "hang":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "memory":
        raise MemoryError
    if fault == "error":
        raise ZeroDivisionError("a fault of the test")
    while fault == "stubborn":       # cannot even be interrupted
        try:
            time.sleep(600)
        except Cancelled:
            pass
    while fault == "deaf":           # never asks whether it should stop
        time.sleep(0.001)
    if fault == "eat":
        hoard = [np.ones(1 << 22) for _ in range(24)]      # 800 MB
        time.sleep(600 + len(hoard))


class TestBackend:
    """Frames that depend on every number of the scene, at a price that the camera names."""

    def __init__(self, setup) -> None:
        self.setup, self.unloaded, self.lights = setup, 0, 0

    def info(self) -> dict:
        return {"device": "test", "pack": self.setup.pack}

    def frame(self, scene: wire.Scene, quality: str, watch) -> dict:
        if scene.camera.near > 1:
            _misbehave(FAULTS[int(scene.camera.near)])
        seconds = scene.camera.far if scene.camera.far < 100 else 0.0
        self._work(seconds * (0.25 if quality == "draft" else 1.0), watch)
        return {entry["name"]: frame_values(scene, quality, entry["name"]) for entry in scene.layout()}

    def _work(self, seconds: float, watch) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if watch.cancelled():
                raise Cancelled()
            time.sleep(min(left, 0.005))

    def create(self, request: wire.Create, watch) -> dict:
        photo = next(self.setup.uploads.glob(f"{request.photo}.*"))
        return self._long(request.seed, photo.read_bytes(), watch)

    def matte(self, request: wire.Matte, watch) -> dict:
        watch.progress("cut out", 1.0, np.full((8, 8, 3), 7, np.uint8))
        return {"width": 8, "height": 8, "share": 0.5}

    def encode(self, request: wire.Encode, watch) -> dict:
        return self._long(request.seed, b"mesh", watch)

    def _long(self, seed: int, data: bytes, watch) -> dict:
        import hashlib

        if seed in FAULTS:
            _misbehave(FAULTS[seed])
        steps, milliseconds = divmod(seed, SEED_STEPS)
        for step in range(steps):
            watch.progress(f"step {step}", step / steps, np.full((8, 8, 3), step, np.uint8))
            self._work(milliseconds / 1e3, watch)
        content = b"asset of " + data + str(seed).encode()
        sha256 = hashlib.sha256(content).hexdigest()
        path = self.setup.assets / sha256[:2] / f"{sha256}.near"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{sha256}.{os.getpid()}.part.near")
        part.write_bytes(content)
        os.replace(part, path)
        return {"sha256": sha256}

    def export(self, request: wire.Export, watch) -> dict:
        raise NearError("export-unsupported", "The test backend exports nothing.", "Use the engine.")

    def light(self, request: wire.SetLight, watch) -> dict:
        self.lights += 1
        return {"lights": self.lights}

    def assets(self, request: wire.Assets, watch) -> dict:
        return {"assets": sorted(p.stem for p in Path(self.setup.assets).glob("*/*.near")), "unloaded": self.unloaded}

    def unload(self) -> None:
        self.unloaded += 1

    def memory(self) -> dict:
        return {"loaded": True}


def frame_values(scene: wire.Scene, quality: str, name: str) -> np.ndarray:
    """float32 [h, w, c]: a pattern seeded by the scene's key, so that any difference shows."""
    height, width = scene.size
    seed = int(scene.key()[:8], 16) + len(name) + (quality == "draft")
    ramp = np.arange(height * width * wire.PASS_CHANNELS[name], dtype=np.int64)
    values = ((ramp * 2654435761 + seed) % 65521 % 2048).astype(np.float32) / 1024
    return values.reshape(height, width, -1)


def make_backend(setup) -> TestBackend:
    if os.environ.get("NEAR_TEST_FAIL_START"):
        os._exit(9)
    return TestBackend(setup)
