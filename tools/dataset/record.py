"""One object, from nothing to its file: build or import, render, sample, take photos. Runs inside a worker's Blender."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import bpy
import numpy as np

from dataset import assets, capture
from dataset.job import ASSET, WHITE, Item, JobConfig
from dataset.objects import build_own
from dataset.samples import sample_materials
from dataset.scene import Stage, framed, intrinsics, orbit
from near.lighting import load_environment
from near.lighting.equirect import bilinear, fractions, pad_for_lookup, resample_equirect, row_solid_angles, texel_directions
from near.training.starter_write import ObjectArrays, PhotoFile, write_starter

RADIUS, FOV_RAD = 2.0, np.radians(40.0)
CLAY_SHARE, PHOTO_SHARE = 0.25, 0.5  # of the samples: direct light on white is easy, and photos get noise of their own
MIN_COVERAGE = 0.002  # of a frame; less means that nothing is to be seen


@dataclass(frozen=True)
class Places:
    """Folders of this machine: the lights, and the assets (or None)."""

    lights: Path
    assets: Path | None


def make_object(item: Item, config: JobConfig, places: Places, threads: int, output: Path) -> None:
    """Make the object's file.

    Raises:
        AssetError: an asset that cannot serve. RuntimeError, ValueError: what Blender or a generator says.
    """
    rng = lambda purpose: np.random.default_rng(item.seed(config.seed, purpose))  # noqa: E731
    if item.kind == ASSET:
        assets.import_asset(places.assets / item.asset)
        facts = {"source": item.asset}
    else:
        bpy.ops.wm.read_factory_settings(use_empty=True)
        facts = {"source": "generator", **build_own(rng("shape"))}
    vertices = assets.normalise()
    materials = assets.prepare_materials()
    stage = Stage(materials, config.samples, threads, places.lights / f"{WHITE}.exr")
    # Sampling edits materials and puts them back, so it comes before the renders.
    surface = sample_materials(rng("points"), config.points, materials)
    lights = sorted(p.stem for p in places.lights.glob("*.exr") if p.stem != WHITE)
    views, used = _views(rng("views"), stage, config, places, lights)
    photos = _photos(rng("photos"), stage, config, places, lights, used, vertices)
    triangles = sum(len(o.data.loop_triangles) for o in bpy.context.scene.objects if o.type == "MESH")
    meta = {"object": item.key, "kind": item.kind, "spp": config.samples, "triangles": triangles, "area": round(surface.area, 5),
            "material_count": len(materials), **facts, "cameras": views.pop("cameras"), "lights": views.pop("lights")}
    write_starter(output, ObjectArrays(**views, points=surface.points, point_normals=surface.normals, point_base_lin709=surface.base_lin709,
                                       point_roughness=surface.roughness, point_metallic=surface.metallic, meta=meta, photos=photos))


def _views(rng: np.random.Generator, stage: Stage, config: JobConfig, places: Places, lights: list[str]) -> tuple[dict, set[str]]:
    """Random orbits: the homogeneous light with all buffers, then random lights."""
    K = intrinsics(FOV_RAD, config.size)
    names = ("light", "ambient", "shadow", "alpha", "base_lin709", "roughness", "metallic", "normal", "depth", "matrix_world", "cameras", "lights")
    found: dict[str, list] = {name: [] for name in names}
    used: set[str] = set()
    for _ in range(config.cameras):
        yaw, pitch = float(rng.uniform(0, 2 * np.pi)), float(np.radians(rng.uniform(-20, 70)))
        matrix = orbit(yaw, pitch, RADIUS)
        stage.camera(matrix, K, config.size)
        stage.light(None)
        buffers = stage.buffers(int(rng.integers(2 ** 31)))
        if float(buffers["alpha"].mean()) < MIN_COVERAGE:
            raise assets.AssetError("a camera sees nothing of it")
        found["ambient"].append(buffers.pop("color")[..., :3])
        for name, value in buffers.items():
            found[name].append(value)
        found["matrix_world"].append(matrix)
        found["cameras"].append({"yaw": yaw, "pitch": pitch})
        lit, shadows, facts = [], [], []
        for _ in range(config.lights):
            fact = _random_light(rng, lights, float(2 ** rng.uniform(-1, 1)))
            used.add(fact["hdri"])
            file = places.lights / f"{fact['hdri']}.exr"
            stage.light(file, fact["rotation_z"], fact["strength"])
            lit.append(stage.picture(int(rng.integers(2 ** 31)))[..., :3])
            if config.shadow:
                shadows.append(_shadow(stage, file, fact, int(rng.integers(2 ** 31))))
            facts.append(fact)
        found["light"].append(lit)
        found["shadow"].append(shadows)
        found["lights"].append(facts)
    arrays = {k: v if k in ("cameras", "lights") else np.array(v) for k, v in found.items()}
    return {**arrays, "K": K, "shadow": arrays["shadow"] if config.shadow else None}, used


def _random_light(rng: np.random.Generator, names: list[str], strength: float) -> dict:
    return {"hdri": names[int(rng.integers(len(names)))], "rotation_z": float(rng.uniform(0, 2 * np.pi)), "strength": strength}


def _shadow(stage: Stage, file: Path, light: dict, seed: int) -> np.ndarray:
    """[S, S] share of the irradiance that would arrive at the smooth surface were nothing in its way."""
    clay, normals = stage.clay_picture(seed, CLAY_SHARE)
    seen = np.linalg.norm(normals, axis=-1) > 0.5
    free = _free_irradiance(file, light["rotation_z"], normals[seen]) * light["strength"]
    shadow = np.zeros(seen.shape, np.float32)
    shadow[seen] = (clay[seen].sum(-1) * np.pi / np.maximum(free, 1e-6)).clip(0, 1)
    return shadow


def _free_irradiance(file: Path, rotation_z_rad: float, normals: np.ndarray, rows: int = 48) -> np.ndarray:
    """Irradiance [N], summed over R, G, B, of an environment of strength 1."""
    import torch

    rgb = resample_equirect(load_environment(file).rgb_lin709, rows, 2 * rows)
    flux = (rgb.sum(-1).double() * row_solid_angles(rows, 2 * rows)[:, None]).reshape(-1).float()
    c, s = np.cos(rotation_z_rad), np.sin(rotation_z_rad)
    # Radiance from world direction d is map(Rz d): texel direction t comes from Rz^T t.
    world = texel_directions(rows, 2 * rows).reshape(-1, 3) @ torch.tensor([[c, -s, 0], [s, c, 0], [0, 0, 1]], dtype=torch.float32)
    n = torch.from_numpy(np.ascontiguousarray(normals, np.float32))
    return torch.cat([(part @ world.T).clamp_min(0) @ flux for part in n.split(4096)]).numpy() if len(n) else np.zeros(0)


def _photos(rng: np.random.Generator, stage: Stage, config: JobConfig, places: Places, lights: list[str], used: set[str],
            vertices: np.ndarray) -> tuple[PhotoFile, ...]:
    """Photos under lights that no view of this object has, where there are enough lights."""
    colours = Path(bpy.utils.system_resource("DATAFILES", path="colormanagement"))
    fresh = [n for n in lights if n not in used] or lights
    made = []
    for _ in range(config.photos):
        light = _random_light(rng, fresh, 1.0)
        matrix, K, facts = framed(rng, vertices, config.photo_size)
        stage.camera(matrix, K, config.photo_size)
        file = places.lights / f"{light['hdri']}.exr"
        stage.light(file, light["rotation_z"])
        rgba = stage.picture(int(rng.integers(2 ** 31)), PHOTO_SHARE)
        how = capture.random_capture(rng)
        jpeg, exposure_ev = capture.take(rng, rgba, _surroundings(file, light["rotation_z"], matrix, K, config.photo_size), how, colours)
        alpha = np.round(rgba[..., 3].clip(0, 1) * 255).astype(np.uint8)
        made.append(PhotoFile(jpeg, alpha, {"matrix_world": matrix.tolist(), "K": K.tolist(), "light": light, "view": facts,
                                            "capture": {**asdict(how), "exposure_ev": exposure_ev}}))
    return tuple(made)


def _surroundings(file: Path, rotation_z_rad: float, matrix_world: np.ndarray, K: np.ndarray, size: int) -> np.ndarray:
    """What the camera sees of the environment: linear [S, S, 3]."""
    import torch

    y, x = np.mgrid[0:size, 0:size] + 0.5
    local = np.stack([(x - K[0, 2]) / K[0, 0], -(y - K[1, 2]) / K[1, 1], -np.ones_like(x)], -1)
    c, s = np.cos(rotation_z_rad), np.sin(rotation_z_rad)
    d = local.reshape(-1, 3) @ matrix_world[:3, :3].T @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]).T
    u, v = fractions(torch.from_numpy(d.astype(np.float32)))
    return bilinear(pad_for_lookup(load_environment(file).rgb_lin709), u, v).reshape(size, size, 3).numpy().astype(np.float64)
