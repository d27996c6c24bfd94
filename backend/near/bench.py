"""How fast this machine is: medians over repeated runs, and Cycles on the same object and light in the same run."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from near.demo import Sample

ORBIT_STEP_DEG = 7.0
Tell = Callable[[float, str], None]


@dataclass(frozen=True)
class BenchSettings:
    """frames: timed orbit frames; lights: timed new lights; repeats: timed runs of create and of encode; size: pixels a side;
    cycles_samples per pixel, 0 to leave Cycles out; cycles_frames: timed, after one that is not."""

    frames: int = 20
    lights: int = 5
    repeats: int = 1
    size: int = 512
    cycles_samples: int = 64
    cycles_frames: int = 3


def run_bench(engine, sample: Sample, settings: BenchSettings, tell: Tell) -> dict:
    """Median seconds of encode, create, first frame, orbit frame, first frame after a new light, frame after a turn of the
    light; peak memory; Cycles, or why it is absent."""
    import torch

    from near.commands import common
    from near.evaluation.cycles import why_unavailable
    from near.lighting import Environment, rotation_z
    from near.pipeline.types import PlacedAsset

    yaw, pitch, radius, fov = sample.camera_deg
    width, height = _photo_size(sample)
    photo_camera = common.orbit(sample.camera_deg, width, height)
    timings: dict[str, list[Timing]] = {"encode": [], "create": [], "orbit_frame": [], "new_light": [], "light_turn": []}

    def camera(i: int):
        return common.orbit((yaw + ORBIT_STEP_DEG * i, pitch, radius, fov), settings.size, settings.size)

    def frame(asset_placed, light, i: int) -> Timing:
        return _timed(lambda: engine.render(asset_placed, light, camera(i)))

    # Models are loaded and kernels compiled before the clock runs: once per process, and once per installation.
    tell(0.0, "warm up")
    start = time.perf_counter()
    placed = [PlacedAsset(engine.encode(sample.mesh))]
    light = bench_light(0)
    frame(placed, light, 0)
    cold = time.perf_counter() - start
    for index in range(settings.repeats):
        tell(0.1 + 0.3 * index / settings.repeats, "encode")
        timings["encode"].append(_timed(lambda: engine.encode(sample.mesh)))
        tell(0.1 + 0.3 * (index + 0.5) / settings.repeats, "create")
        timings["create"].append(_timed(lambda: engine.create(sample.photo, mesh=sample.mesh, camera=photo_camera)))
    for index in range(settings.frames):
        tell(0.4 + 0.1 * index / settings.frames, "orbit")
        timings["orbit_frame"].append(frame(placed, light, index + 1))
    for index in range(settings.lights):
        tell(0.5 + 0.1 * index / settings.lights, "new light")
        timings["new_light"].append(frame(placed, bench_light(index + 1), 0))
    for index in range(settings.lights):
        turned = Environment(light.rgb_lin709, rotation_z(0.3 * (index + 1)), light.strength)
        timings["light_turn"].append(frame(placed, turned, 0))
    medians = {name: round(statistics.median(t.wall for t in values), 4) for name, values in timings.items()}
    processor = {name: round(statistics.median(t.processor for t in values), 4) for name, values in timings.items()}
    asset = placed[0].asset
    result = {"machine": machine(), "torch_threads": torch.get_num_threads(), "device": str(engine.device), "pack": engine.pack,
              "size": [settings.size, settings.size], "sample": sample.name, "voxels": len(asset),
              "gaussians": None if asset.anchors is None else len(asset.anchors), "median_seconds": medians, "median_processor_seconds": processor,
              "cold_start_seconds": round(cold, 2),
              "orbit_frames_per_second": round(1 / medians["orbit_frame"], 2), "peak_memory_mb": peak_memory_mb()}
    if settings.cycles_samples:
        why = why_unavailable()
        result["cycles"] = {"absent": why} if why else _cycles(sample, settings, light, tell)
        if not why:
            result["cycles"]["times_slower_than_orbit_frame"] = round(result["cycles"]["median_seconds"] / medians["orbit_frame"], 1)
    tell(1.0, "done")
    return result


@dataclass(frozen=True)
class Timing:
    """Seconds on the wall, and of processor time over all threads: on a busy machine only the second one means something."""

    wall: float
    processor: float


def _timed(run: Callable[[], object]) -> Timing:
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return Timing(time.perf_counter() - wall, time.process_time() - processor)


def _photo_size(sample: Sample) -> tuple[int, int]:
    from PIL import Image

    with Image.open(sample.photo) as picture:
        return picture.size


def bench_light(index: int):
    """A light of 1024 x 512 pixels that no cache has seen: bright patches on a gradient, different for every index."""
    import numpy as np

    from near.lighting import environment_from_array

    rng = np.random.default_rng(index)
    height, width = 512, 1024
    v, u = np.mgrid[0:height, 0:width].astype(np.float32)
    v, u = v / height, u / width
    rgb = (0.15 + 0.5 * (1 - v))[..., None] * np.array([0.9, 1.0, 1.15], np.float32)
    for _ in range(5):
        cu, cv, radius = rng.random(), 0.15 + 0.5 * rng.random(), 0.02 + 0.05 * rng.random()
        inside = (((u - cu + 0.5) % 1 - 0.5) * 2) ** 2 + (v - cv) ** 2 < radius ** 2
        rgb[inside] += rng.uniform(4, 20) * rng.uniform(0.7, 1, 3).astype(np.float32)
    return environment_from_array(rgb)


def _cycles(sample: Sample, settings: BenchSettings, light, tell: Tell) -> dict:
    """The same mesh, light, cameras and size in Cycles: CPU, OIDN, adaptive sampling, data kept between frames."""
    import torch

    from near.commands import common
    from near.evaluation.cycles import CyclesFrame, render_with_cycles
    from near.output import write_environment

    yaw, pitch, radius, fov = sample.camera_deg
    cv_from_blender = torch.diag(torch.tensor([1.0, -1, -1, 1], dtype=torch.float64))
    with tempfile.TemporaryDirectory(prefix="near-bench-") as folder:
        hdri = Path(folder) / "light.exr"
        write_environment(hdri, light)
        frames = []
        for index in range(settings.cycles_frames + 1):
            camera = common.orbit((yaw + ORBIT_STEP_DEG * index, pitch, radius, fov), settings.size, settings.size)
            matrix = (camera.world_from_cam.double() @ cv_from_blender).tolist()
            frames.append(CyclesFrame(matrix, camera.K.tolist(), (settings.size, settings.size), str(hdri), 0.0))
        count = len(frames)
        seconds = render_with_cycles(sample.mesh, frames, samples=settings.cycles_samples,
                                     tell=lambda n: tell(0.6 + 0.4 * n / count, f"Cycles, frame {n} of {count}"))
    return {"samples": settings.cycles_samples, "denoiser": "OpenImageDenoise", "first_seconds": round(seconds[0], 2),
            "median_seconds": round(statistics.median(seconds[1:] or seconds), 3)}


def machine() -> dict:
    """What the numbers were measured on; no names of hosts or users."""
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return {"cpu": cpu, "cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}


def peak_memory_mb() -> float | None:
    """Largest resident memory of this process so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return round(getattr(psutil.Process().memory_info(), "peak_wset", 0) / 1e6) or None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6)
