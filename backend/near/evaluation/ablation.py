"""Ablations of the compact pack: what the renderer is given of a photo, and how deep its decoder is.

Inputs (the paper's table), all from the same flows, geometry, photo and renderer:

    shaded           the base flow's SLAT as it is: the photo's light stays baked in, rough and not metallic
    base_colour      the homogenised base colour alone, on a plain material
    lh               the lighting-homogenised look (and roughness, metallic); base colour is what that look implies
    lh_base_colour   all of it: what the product ships

The discs' own detail is made anew for every input: of ``shaded`` it is the photo itself.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from near.assets import Asset
from near.colour import agx_srgb
from near.errors import NearError
from near.evaluation.bench import PHOTO_TASKS, Bench
from near.evaluation.predict import Tell, predict
from near.evaluation.report import score_targets
from near.geometry.cameras import Camera
from near.geometry.photo import Photo
from near.models.anchors import AnchorCloud, decode_anchors, stored_detail
from near.models.compact import CompactModels
from near.models.compact_renderer import CompactRendererModel, homogeneous_guess
from near.models.material import HOMOGENEOUS, MATERIAL, decode_colour, encode_colour, voxel_mean
from near.pipeline.compact_assets import photo_detail, photo_on_discs
from near.pipeline.engine import Engine
from near.training.starts import load_into

INPUTS = {"shaded": "shaded SLAT: the photo's light baked in", "base_colour": "base colour alone, plain material",
          "lh": "lighting-homogenised (LH)", "lh_base_colour": "LH + base colour (shipped)"}
PLAIN = (0.0, -1.0)  # roughness 0.5, metallic 0, encoded; as the baseline *baked* has them


def input_slat(name: str, slat: Tensor, shaded: Tensor, cloud: AnchorCloud) -> Tensor:
    """The SLAT [L, 8] that an input of :data:`INPUTS` leaves of a homogenised and a shaded SLAT [L, 8]."""
    if name == "lh_base_colour":
        return slat
    if name == "shaded":
        return shaded
    count = len(slat)
    if name == "base_colour":
        material = torch.cat([slat[:, :3], torch.tensor(PLAIN).expand(count, 2)], -1)
        return torch.cat([material, encode_colour(homogeneous_guess(cloud, material[cloud.voxel], count))], -1)
    if name != "lh":
        raise ValueError(f"the input is {name!r}, must be one of {', '.join(INPUTS)}")
    # Under white light a surface returns its base colour where it sees the sky, and about half of it where it does not.
    lit = voxel_mean(0.5 + 0.5 * cloud.openness[:, None], cloud.voxel, count).clamp_min(0.25)
    return torch.cat([encode_colour(decode_colour(slat[:, HOMOGENEOUS]) / lit), slat[:, 3:]], -1)


def with_input(name: str, asset: Asset, photo: Photo, camera: Camera) -> Asset:
    """The asset of a photo as it would be from another input.

    Args: camera: the photo's, of its size.
    """
    cloud = decode_anchors(asset.coords, asset.anchors, asset.resolution)
    slat = input_slat(name, asset.feats.float(), asset.color_feats.float(), cloud).half()
    material = slat[:, MATERIAL].float()
    radiance, seen = photo_on_discs(cloud, asset.coords, asset.resolution, photo, camera)
    if name == "shaded":
        colour = (agx_srgb(radiance) * 2 - 1 - material[cloud.voxel, :3]) * (seen > 0)[:, None]
        detail = torch.cat([colour, torch.zeros(len(colour), 2)], -1)
    else:
        detail = photo_detail(cloud, radiance, seen, material, camera, asset.resolution, guessed_normals=asset.meta.get("geometry") == "silhouette")
    return replace(asset, feats=slat, anchors=replace(asset.anchors, detail=stored_detail(detail)))


class InputEngine:
    """An engine whose photos become assets of one input; the flows run once per photo, whatever the input."""

    def __init__(self, engine: Engine, name: str, made: dict) -> None:
        self.engine, self.name, self.made = engine, name, made
        self.render, self.encode = engine.render, engine.encode

    def create(self, photo: Path, *, mesh, camera: Camera, progress=None) -> Asset:
        from near.geometry.matting import matte
        from near.geometry.photo import load_photo

        if photo not in self.made:
            picture = matte(load_photo(Path(photo)))
            self.made[photo] = picture, self.engine.create(picture, mesh=mesh, camera=camera, progress=progress)
        picture, asset = self.made[photo]
        height, width = picture.alpha.shape
        return with_input(self.name, asset, picture, camera.resized(width, height))


def truncated(models: CompactModels, layers: int, folder: Path | None = None) -> CompactModels:
    """The models with the first ``layers`` blocks of the decoder; those of ``folder/lad<layers>`` where a renderer was trained at
    that depth (``near train renderer --lad-layers``).

    Raises:
        NearError: ``lad-layers`` when there are not so many.
    """
    trained = None if folder is None else folder / f"lad{layers}" / "renderer.safetensors"
    if trained is not None and trained.is_file():
        renderer = load_into(CompactRendererModel(replace(models.config.renderer, lad_blocks=layers)), trained)
    else:
        if not 0 <= layers <= models.config.renderer.lad_blocks:
            raise NearError("lad-layers", f"The decoder has {models.config.renderer.lad_blocks} layers, not {layers}.",
                            f"Train one: near train renderer CACHE --lad-layers {layers} -o RUNS/lad{layers}, and name RUNS with --renderers.")
        renderer = CompactRendererModel(replace(models.config.renderer, lad_blocks=layers))
        kept = {k: v for k, v in models.renderer.state_dict().items() if not k.startswith("lad.blocks.") or int(k.split(".")[2]) < layers}
        renderer.load_state_dict(kept)
    config = replace(models.config, renderer=renderer.config)
    return CompactModels(config, renderer, models.base_flow, models.homogenizer, models.pack_id, models.pack_sha256)


def ablate_input(engine: Engine, bench: Bench, name: str, made: dict, save: Path, tell: Tell) -> dict:
    """Report of the photo tasks with one input, as ``near eval`` writes it."""
    return _report(InputEngine(engine, name, made), bench, PHOTO_TASKS, save, tell) | {"variant": INPUTS[name]}


def ablate_layers(engine: Engine, bench: Bench, layers: int, renderers: Path | None, save: Path, tell: Tell, frames: int = 12) -> dict:
    """Report of the task forward with ``layers`` decoder layers, and how fast the sample's frames are at 512 pixels."""
    shallow = Engine.of(truncated(engine.compact_models(), layers, renderers), engine)
    report = _report(shallow, bench, ("forward",), save, tell)
    own = renderers is not None and (renderers / f"lad{layers}" / "renderer.safetensors").is_file()
    return report | {"variant": f"{layers} LAD layers" + (", trained so" if own else ""), "layers": layers, **orbit_speed(shallow, frames)}


def _report(engine, bench: Bench, tasks: tuple[str, ...], save: Path, tell: Tell) -> dict:
    done = predict(engine, bench, tasks, save, tell)
    results = {task: score_targets(bench, [t for m in bench.models for t in m.targets[task]], lambda t: done.path(task, t))  # noqa: B023
               for task in tasks}
    return {"bench": bench.split, "tasks": results, "baselines": {}, "skipped": done.skipped, "errors": done.errors}


def orbit_speed(engine: Engine, frames: int, size: int = 512) -> dict:
    """Medians over an orbit around the shipped sample under one light; processor time counts all threads."""
    from near.bench import ORBIT_STEP_DEG, bench_light, machine
    from near.commands.common import orbit
    from near.demo import shipped_sample
    from near.pipeline.types import PlacedAsset

    sample, light = shipped_sample(), bench_light(0)
    yaw, pitch, radius, fov = sample.camera_deg
    placed, wall, processor = [PlacedAsset(engine.encode(sample.mesh))], [], []
    for index in range(frames + 2):  # the first two are not counted
        camera = orbit((yaw + ORBIT_STEP_DEG * index, pitch, radius, fov), size, size)
        start = time.perf_counter(), time.process_time()
        engine.render(placed, light, camera)
        wall.append(time.perf_counter() - start[0])
        processor.append(time.process_time() - start[1])
    seconds = statistics.median(wall[2:])
    return {"machine": machine(), "device": str(engine.device), "size": [size, size], "frame_seconds": round(seconds, 4),
            "frame_processor_seconds": round(statistics.median(processor[2:]), 4), "frames_per_second": round(1 / seconds, 2)}
