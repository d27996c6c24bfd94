"""A stand-in for the engine, without torch: real asset files (a turned box), progress with pictures, faults by the seed.

The worker loads it through `NEAR_TEST_BACKEND`. Seeds from 900: 901 runs out of memory, 902 takes 60 s, 903 finds no object.
"""

from __future__ import annotations

import hashlib
import json
import os
import time

import numpy as np

from near import wire
from near.errors import Cancelled, NearError

STEPS = 5


def asset_bytes(seed: int) -> bytes:
    """A `.near` file: a box whose height depends on the seed."""
    corners = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)], "<f4") * (1, 1, 1 / (1 + seed % 7))
    corners = corners.astype("<f4")
    quads = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    faces = np.array([t for a, b, c, d in quads for t in ((a, b, c), (a, c, d))], "<i4")
    record = json.dumps({"format": "near-asset", "version": 1, "resolution": 32, "seed": seed})
    header = {"__metadata__": {"near": record},
              "proxy_vertices": {"dtype": "F32", "shape": [8, 3], "data_offsets": [0, corners.nbytes]},
              "proxy_faces": {"dtype": "I32", "shape": [12, 3], "data_offsets": [corners.nbytes, corners.nbytes + faces.nbytes]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + corners.tobytes() + faces.tobytes()


class ShellBackend:
    """`near.server.backend.Backend`."""

    def __init__(self, setup) -> None:
        self._setup = setup

    def info(self) -> dict:
        return {"device": "test", "pack": self._setup.pack}

    def create(self, request: wire.Create, watch) -> dict:
        if request.exposure_stops < -5:
            raise NearError("photo-no-object", f"At {request.exposure_stops:g} stops the photo is black.", "Raise the exposure.")
        return self._make(request.seed, watch)

    def encode(self, request: wire.Encode, watch) -> dict:
        return self._make(request.seed, watch)

    def matte(self, request: wire.Matte, watch) -> dict:
        watch.progress("cut out", 1.0, np.full((8, 12, 3), 90, np.uint8))
        return {"width": 12, "height": 8, "share": 0.5}

    def _make(self, seed: int, watch) -> dict:
        if seed == 901:
            raise MemoryError
        if seed == 903:
            raise NearError("photo-no-object", "No object was found in the photo.", "Choose a photo with a plain background.")
        for step in range(STEPS):
            watch.progress(f"step {step}", step / STEPS, np.full((16, 16, 3), 40 * step, np.uint8))
            end = time.monotonic() + (60 if seed == 902 else 0.02)
            while time.monotonic() < end:
                if watch.cancelled():
                    raise Cancelled()
                time.sleep(0.005)
        data = asset_bytes(seed)
        sha256 = hashlib.sha256(data).hexdigest()
        path = self._setup.assets / sha256[:2] / f"{sha256}.near"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{os.getpid()}.part")
        part.write_bytes(data)
        os.replace(part, path)
        return {"sha256": sha256, "size": len(data)}

    def export(self, request: wire.Export, watch) -> dict:
        raise NearError("export-unsupported", "The test backend exports nothing.", "Use the engine.")

    def frame(self, scene: wire.Scene, quality: str, watch) -> dict:
        return {entry["name"]: np.zeros(entry["shape"], np.float32) for entry in scene.layout()}

    def light(self, request: wire.SetLight, watch) -> dict:
        return {}

    def assets(self, request: wire.Assets, watch) -> dict:
        return {"assets": []}

    def unload(self) -> None:
        pass

    def memory(self) -> dict:
        return {"loaded": True}


def make_backend(setup) -> ShellBackend:
    return ShellBackend(setup)
