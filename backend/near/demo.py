"""The main job on a sample of our own: photo -> asset -> turntable, light sweep, passes, contact sheet."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SAMPLES = Path(__file__).parent / "samples"
SHEET_PASSES = ("base_color", "roughness", "metallic", "shadow", "normal")
BACKGROUND = (48, 50, 54)
LIGHT_HEIGHT = 256
OpenBar = Callable[[str], AbstractContextManager]


@dataclass(frozen=True)
class Sample:
    """A photo with its mesh and camera (yaw, pitch, radius, field of view in degrees)."""

    name: str
    photo: Path
    mesh: Path
    camera_deg: tuple[float, float, float, float]


def shipped_sample(name: str = "teapot") -> Sample:
    """A sample that travels inside the package (made by tools/make_samples.py)."""
    record = json.loads((SAMPLES / f"{name}.json").read_text(encoding="utf-8"))
    return Sample(name, SAMPLES / record["photo"], SAMPLES / record["mesh"], tuple(record["camera_deg"]))


def run_demo(engine, folder: Path, bar: OpenBar, *, size: int = 512, frames: int = 36) -> dict:
    """Make everything in ``folder``; returns what was made and how long each step took.

    Args:
        bar: ``bar(text)`` gives a context manager with a progress bar as :func:`near.commands.common.progress_bar` does.
    """
    from near.assets import encode_asset
    from near.atomic import write_bytes
    from near.commands import common
    from near.commands.render import Shot, render_shots, video_picture
    from near.geometry.photo import load_photo
    from near.lighting import samples
    from near.output import OutputPlan, write_environment, write_picture, write_png, write_video
    from near.pipeline.types import PASSES

    sample = shipped_sample()
    seconds: dict[str, float] = {}
    made: dict[str, Path] = {}

    class Step:
        """A bar that also keeps the time."""

        def __init__(self, name: str, text: str) -> None:
            self.name, self.context = name, bar(text)

        def __enter__(self):
            self.start = time.perf_counter()
            return self.context.__enter__()

        def __exit__(self, *error):
            seconds[self.name] = round(time.perf_counter() - self.start, 2)
            return self.context.__exit__(*error)

    with Step("create", "photo to asset") as progress:
        photo = load_photo(sample.photo)
        height, width = photo.alpha.shape
        asset = engine.create(photo, mesh=sample.mesh, camera=common.orbit(sample.camera_deg, width, height), progress=progress)
        made["asset"] = folder / f"{sample.name}.near"
        write_bytes(made["asset"], encode_asset(asset))
    with Step("lights", "sample lights") as progress:
        lights = {}
        for index, name in enumerate(samples.SAMPLES):
            progress.update(index / len(samples.SAMPLES), name)
            lights[name] = samples.sample_environment(name, LIGHT_HEIGHT)
            write_environment(folder / "lights" / f"{name}.exr", lights[name])
        made["lights"] = folder / "lights"
    first = next(iter(lights.values()))
    yaw, pitch, radius, fov = sample.camera_deg

    def video(name: str, text: str, shots: list[Shot]) -> None:
        with Step(name, text) as progress:
            made[name] = folder / f"{name}.mp4"
            rendered = render_shots(engine, asset, first, shots, ("color",), "full", progress)
            write_video(OutputPlan(made[name], "mp4"), (video_picture(f.layers, BACKGROUND) for f in rendered), 18)

    video("turntable", "turntable", [Shot(common.orbit((yaw + 360 * i / frames, pitch, radius, fov), size, size), 0.0) for i in range(frames)])
    still = common.orbit(sample.camera_deg, size, size)
    video("light_sweep", "light sweep", [Shot(still, 2 * math.pi * i / frames) for i in range(frames)])
    with Step("passes", "passes") as progress:
        frame = next(render_shots(engine, asset, first, [Shot(still, 0.0)], tuple(PASSES), "full", progress))
        made["exr"], made["passes"] = folder / f"{sample.name}.exr", folder / "passes"
        write_picture(OutputPlan(made["exr"], "exr"), frame.layers)
        write_picture(OutputPlan(made["passes"] / f"{sample.name}.png", "png"), frame.layers)
    with Step("contact_sheet", "contact sheet") as progress:
        made["contact_sheet"] = folder / "contact_sheet.png"
        write_png(made["contact_sheet"], sheet(engine, asset, photo, lights, still, frame.layers, progress))
    return {"made": {k: str(v) for k, v in made.items()}, "seconds": seconds, "frames": frames, "size": [size, size]}


def sheet(engine, asset, photo, lights: dict, camera, layers: dict, progress) -> np.ndarray:
    """Photo, homogenised asset (under light that is the same from everywhere), materials, and the object under each light."""
    from near.commands.render import Shot, render_shots
    from near.lighting import uniform_environment
    from near.output import display_layer, display_straight
    from near.sheets import contact_sheet

    def lit(light) -> np.ndarray:
        return display_straight(next(render_shots(engine, asset, light, [Shot(camera, 0.0)], ("color",), "full", progress)).layers["color"])

    picture = np.concatenate([np.asarray(photo.srgb, np.float32), np.asarray(photo.alpha, np.float32)[..., None]], -1)
    top = [np.round(picture * 255).astype(np.uint8), lit(uniform_environment(0.8)), *(display_layer(name, layers) for name in SHEET_PASSES[:2])]
    middle = [display_layer(name, layers) for name in SHEET_PASSES[2:]] + [display_layer("depth", layers)]
    bottom = [lit(light) for light in list(lights.values())[:4]]
    labels = [["photo", "homogenised asset", "base colour", "roughness"], ["metallic", "shadow", "normal", "depth"],
              [f"relit: {name.replace('-', ' ')}" for name in list(lights)[:4]]]
    return contact_sheet([top, middle, bottom], labels=labels, cell=(300, 300), background=BACKGROUND, title="NeAR Relight")
