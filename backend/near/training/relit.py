"""Photos without a renderer: cached objects shaded analytically under further lights and in further paints.

A few hundred objects under three lights each are soon known by heart. Shading them disc by disc with the pipeline's own
analytic light (28 dB of Cycles) costs a fraction of a second, so the homogeniser's per-voxel head meets every object under
many lights, at the exposure a camera would meet them, and in other objects' colours.

A photo is a picture: what the discs show is splatted into pixels and lifted from them again. A head that learned from the discs' own
colours, which differ inside a voxel twice as much as pixels show it, answered 0.9 dB worse to path-traced photos than to its own.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from torch import Tensor

from near.assets import Anchors
from near.colour import LUMINANCE, agx_srgb
from near.geometry.cameras import Camera
from near.lighting import Environment, PrefilteredLight
from near.models.anchors import AnchorCloud, decode_anchors, front_facing, view_directions
from near.models.evidence import VoxelView, voxel_view
from near.models.exchange import build_exchange
from near.models.lifting import lift_photo
from near.models.material import decode_material, encode_colour, encode_material, voxel_mean
from near.models.pointwise import prior_features
from near.models.shading import HIDDEN_SHARE, irradiance, light_surface, lobe_albedo, reflection, shade_terms, total_albedo
from near.splatting import SURFACE, downsample2, splat, trim_coverage
from near.training.lights import LightLibrary, uniform

NOISE = 0.004  # of display colours, deviation
ROUGHNESS_KNOTS = (0.05, 0.2, 0.4, 0.65, 1.0)
PERMUTATIONS = tuple(itertools.permutations(range(3)))


@dataclass(frozen=True)
class RelitConfig:
    """dressings: paints an object is shown in (the first is its own); repainted: share of the others that take over another
    object's paints one by one, where the rest are shifted as a whole; views: cameras that see such another paint (all see its
    own), few because paints are known by heart long before photos are; lights: synthetic photos per dressing and camera;
    pixels: of an object of size 1, a photo is taken in one of these sizes; exposure_stops: deviation of a photo's exposure around its
    light's natural strength; darkest: mean radiance of the dimmest light that photos are taken in; invented: lights made of the
    library's for photos, and unfamiliar the share of photos under them; mixed: share of photos under two lights at once; warmth:
    deviation of the logarithm of red (and, the other way, of blue) that a photo's light is warmer than the library has it, for a
    library is small; conditions: new lights per camera that the answer is judged under, and light_stops the deviation of their
    strength; voxels: drawn of every photo."""

    dressings: int = 25
    repainted: float = 0.7
    views: int = 1
    lights: int = 1
    pixels: tuple[int, ...] = (88, 176)
    exposure_stops: float = 0.15
    darkest: float = 0.3
    invented: int = 120
    unfamiliar: float = 0.5
    mixed: float = 0.3
    warmth: float = 0.1
    conditions: int = 2
    light_stops: float = 0.35
    voxels: int = 256
    resolution: int = 32


def _random_light(lights: LightLibrary, names: list[str], generator: torch.Generator, stops: float) -> tuple[Environment, PrefilteredLight]:
    name = names[int(torch.randint(len(names), (), generator=generator))]
    strength = 2 ** (stops * float(torch.randn((), generator=generator)))
    return lights.get(name, uniform(generator, 0, 2 * math.pi), strength)


def _warmth(generator: torch.Generator, deviation: float) -> Tensor:
    """[3] what a light a little warmer or colder multiplies radiance by; the exposure stays."""
    warmer = deviation * float(torch.randn((), generator=generator))
    tint = torch.tensor([warmer, 0.0, -warmer]).exp()
    return tint / (tint @ LUMINANCE)


def paints(material: Tensor, generator: torch.Generator, count: int = 4) -> tuple[Tensor, Tensor]:
    """The paints of an object: their linear means [k, 5], and which one every disc of ``material`` [M, 5] wears [M]."""
    encoded = encode_material(material[:, :3], material[:, 3], material[:, 4])
    some = encoded[torch.randint(len(encoded), (2000,), generator=generator)].double().numpy()
    means = np.unique(some.round(2), axis=0)
    if len(means) > count:
        with warnings.catch_warnings():  # a paint that loses all its discs is dropped below
            warnings.simplefilter("ignore")
            means, _ = kmeans2(some, count, minit="++", seed=int(torch.randint(2 ** 31, (), generator=generator)))
    label = torch.cdist(encoded, torch.from_numpy(means).float()).argmin(-1)
    used, label = torch.unique(label, return_inverse=True)
    return torch.stack([material[label == k].mean(0) for k in range(len(used))]), label


def repaint(material: Tensor, other: Tensor, order: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Every paint of an object [M, 5] exchanged for one of another object's [N, 5]; texture within a paint stays."""
    (_, label), (palette, _) = paints(material, generator), paints(other, generator)
    pick = torch.randperm(int(label.max()) + 1, generator=generator) % len(palette)
    out = material.clone()
    for k, wanted in enumerate(pick.tolist()):
        out[label == k] = redress(material[label == k], palette[wanted][None], order)
    return out


def redress(material: Tensor, other: Tensor, order: tuple[int, int, int]) -> Tensor:
    """Discs' linear material [M, 5] shifted to another object's mean (ratio of base colours, difference of roughness,
    metallic where the two differ), and with colour channels swapped."""
    colour = material[:, :3].clamp_min(2e-3)
    ratio = (other[:, :3].clamp_min(2e-3).log().mean(0) - colour.log().mean(0)).exp()
    base = (colour * ratio).clamp(0, 0.95)[:, list(order)]
    rough = (material[:, 3] + other[:, 3].mean() - material[:, 3].mean()).clamp(0.03, 1)
    metal, wanted = material[:, 4], other[:, 4].mean()
    if (metal.mean() > 0.5) != (wanted > 0.5):
        metal = torch.full_like(metal, float(wanted > 0.5))
    return torch.cat([base, rough[:, None], metal[:, None]], -1)


def build_relit(raw: dict, others: list[dict], lights: LightLibrary, config: RelitConfig, seed: int) -> dict:
    """Everything the head's trainer reads of one object.

    Args: raw: a cache entry (:mod:`near.training.cache`); others: entries whose paints may be borrowed.
    """
    generator = torch.Generator().manual_seed(seed)
    coords = raw["coords"]
    cloud = decode_anchors(coords, Anchors(**raw["anchors"]), config.resolution)
    count = len(coords)
    own = decode_material(raw["material"].float())
    dressings = [own]
    for _ in range(config.dressings - 1):
        other = others[int(torch.randint(len(others), (), generator=generator))]
        order = PERMUTATIONS[int(torch.randint(6, (), generator=generator))] if uniform(generator) < 0.3 else (0, 1, 2)
        change = repaint if uniform(generator) < config.repainted else lambda a, b, o, _: redress(a, b, o)
        dressings.append(change(own, decode_material(other["material"].float()), order, generator))
    sights = [[_sight(raw, cloud, coords, v, pixels, config.resolution) for pixels in config.pixels] for v in range(len(raw["cam_from_world"]))]
    photos, bright = [], lights.brighter_than(config.darkest)
    exchange = build_exchange(cloud, config.resolution)
    for d, material in enumerate(dressings):
        surface = cloud.surface(material)
        for v in range(len(sights)) if d == 0 else torch.randperm(len(sights), generator=generator)[:config.views].tolist():
            def shaded(eye: Tensor = sights[v][0].eye) -> Tensor:
                names = lights.invented if lights.invented and uniform(generator) < config.unfamiliar else bright
                env, light = _random_light(lights, names, generator, config.exposure_stops)
                return shade_terms(surface, light_surface(surface, light, env, exchange), light, env, eye).combine()

            for _ in range(config.lights):
                shade = shaded()
                if uniform(generator) < config.mixed:
                    shade = torch.lerp(shade, shaded(), uniform(generator, 0, 0.6))
                sight = sights[v][int(torch.randint(len(config.pixels), (), generator=generator))]
                srgb, alpha = _picture(cloud, shade * _warmth(generator, config.warmth), sight.camera, generator)
                photos.append({"dressing": d, "view": v} | _photo(cloud, coords, srgb, alpha, sight, config, generator))
    real = _rendered(raw, cloud, coords, bright, generator, config) if "lit" in raw else []
    targets = []
    for d, material in enumerate(dressings):
        mean = voxel_mean(encode_material(material[:, :3], material[:, 3], material[:, 4]), cloud.voxel, count)
        white = material[:, :3] * (0.5 + 0.5 * cloud.openness[:, None])
        look = raw["slat"][:, 5:].float() if d == 0 and "slat" in raw else encode_colour(voxel_mean(white, cloud.voxel, count))
        targets.append(torch.cat([mean, look], -1).half())
    return {"name": raw["name"], "photos": photos + real, "targets": torch.stack(targets),
            "conditions": _conditions(cloud, count, [s[0] for s in sights], lights, generator, config)}


@dataclass(frozen=True)
class Sight:
    """A camera at ``pixels`` per object size, and what it says of the geometry: its direction from the discs [M, 3], which voxels it
    knows [L], how they answer light."""

    pixels: float
    camera: Camera
    eye: Tensor
    known: Tensor
    response: VoxelView


def _sight(raw: dict, cloud: AnchorCloud, coords: Tensor, index: int, pixels: float, resolution: int) -> Sight:
    """Camera ``index`` of a cache entry, at ``pixels`` per object size."""
    cam = raw["cam_from_world"][index]
    factor = pixels * float(cam[:3, 3].norm()) / float(raw["K"][0, 0])
    size = round(2 * float(raw["K"][0, 2]) * factor)
    camera = Camera(K=torch.cat([raw["K"][:2] * (size / (2 * raw["K"][0, 2])), raw["K"][2:]]), cam_from_world=cam, width=size, height=size)
    alpha = splat(cloud.gaussians(), torch.zeros(len(cloud), 1), camera).alpha.clamp(0, 1)
    lift = lift_photo(cloud, coords, resolution, torch.zeros(size, size, 3), alpha, camera).features
    eye = view_directions(cloud.points, camera)
    return Sight(pixels, camera, eye, lift[:, 8] > 0.5, voxel_view(cloud, lift, eye))


def _picture(cloud: AnchorCloud, radiance_lin709: Tensor, camera: Camera, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Display colours [H, W, 3] and coverage [H, W] of discs [M, 3], filtered as the renderer filters, with a camera's noise and steps."""
    rows = front_facing(cloud, camera)
    fine = splat(cloud.gaussians()[rows], radiance_lin709[rows], camera.scaled(2), SURFACE)
    picture = downsample2(trim_coverage(fine.channels, fine.alpha), "blackman_harris")
    alpha = picture[..., 3].clamp(0, 1)
    display = agx_srgb(picture[..., :3] / alpha.clamp_min(1e-3)[..., None])
    noise = torch.randn(alpha.shape, generator=generator)[..., None] * NOISE
    return ((display + noise).clamp(0, 1) * 255).round() / 255, alpha


def _photo(cloud: AnchorCloud, coords: Tensor, srgb: Tensor, alpha: Tensor, sight: Sight, config: RelitConfig, generator: torch.Generator) -> dict:
    """The rows [V] of some voxels, and what the head reads of the photo there [V, C]."""
    lift = lift_photo(cloud, coords, config.resolution, srgb, alpha, sight.camera).features
    rows = torch.randint(len(coords), (config.voxels,), generator=generator)
    return {"rows": rows, "features": prior_features(lift, sight.response, config.resolution)[rows].half(),
            "pixels": sight.pixels}


def _rendered(raw: dict, cloud: AnchorCloud, coords: Tensor, bright: list[str], generator: torch.Generator, config: RelitConfig) -> list[dict]:
    """The rendered pictures as photos, at an exposure near their light's own strength; none of a light that is too dim for one."""
    photos = []
    for v, cam in enumerate(raw["cam_from_world"]):
        alpha = raw["alpha"][v].float()
        sight = _sight(raw, cloud, coords, v, float(raw["K"][0, 0] / cam[:3, 3].norm()), config.resolution)
        for i, (name, _, strength) in enumerate(raw["lights"][v]):
            if name not in bright:
                continue
            gain = 2 ** (config.exposure_stops * float(torch.randn((), generator=generator))) / strength
            straight = raw["lit"][v, i].float() / alpha.clamp_min(1e-3)[..., None] * gain * _warmth(generator, config.warmth)
            srgb = (agx_srgb(straight) * 255).round() / 255
            photos.append({"dressing": 0, "view": v, "light": i} | _photo(cloud, coords, srgb, alpha, sight, config, generator))
    return photos


def _conditions(cloud: AnchorCloud, count: int, views: list[Sight], lights: LightLibrary, generator: torch.Generator,
                config: RelitConfig) -> list[dict]:
    """New lights on voxels: irradiance, and what mirrors of several roughness would show; materials come later."""
    normals = F.normalize(voxel_mean(cloud.normals, cloud.voxel, count), dim=-1)
    visibility = voxel_mean(cloud.visibility, cloud.voxel, count)
    openness = voxel_mean(cloud.openness[:, None], cloud.voxel, count)[:, 0]
    area = voxel_mean((cloud.radii ** 2)[:, None], cloud.voxel, count)[:, 0]
    out = []
    for v, view in enumerate(views):
        eye = F.normalize(voxel_mean(view.eye, cloud.voxel, count), dim=-1)
        n_dot_v = (normals * eye).sum(-1)
        for _ in range(config.conditions):
            env, light = _random_light(lights, sorted(lights.paths), generator, config.light_stops)
            e = irradiance(normals, visibility, light.directions @ env.env_from_world, light.flux * env.strength)
            knots = [reflection(normals, eye, rough, visibility, lobe_albedo(n_dot_v, rough), light, env)
                     for rough in (torch.full((count,), r) for r in ROUGHNESS_KNOTS)]
            white, grazing, open_to = (torch.stack(parts, 1).clamp_max(6e4).half() for parts in zip(*knots))
            out.append({"view": v, "irradiance": e.clamp_max(6e4).half(), "n_dot_v": n_dot_v.abs().clamp_min(1e-3).half(), "openness": openness.half(),
                        "white": white, "grazing": grazing, "open_to": open_to, "area": area.half(),
                        "weight": (view.known & (n_dot_v > 0.05)).half()})
    return out


def hidden_radiance(conditions: list[dict[str, Tensor]], materials: Tensor) -> Tensor:
    """[D, K, 3] what hidden directions return by the object's mean (:func:`near.models.shading.light_surface` without an exchange),
    of D linear materials [D, L, 5] of an object's voxels under each of K conditions."""
    area = conditions[0]["area"].float()
    albedo = total_albedo(materials[..., :3], materials[..., 4:5]) * (area / area.sum())[:, None]
    irradiance = torch.stack([c["irradiance"].float() for c in conditions])
    return HIDDEN_SHARE / math.pi * torch.einsum("dlc,klc->dkc", albedo, irradiance)


def relit_folder(files: list[Path], hdri_folder: Path, out: Path, part: int, parts: int, config: RelitConfig = RelitConfig(),
                 progress: Callable[[], object] = lambda: None) -> None:
    """Relit caches of this part's share of ``files`` (cache entries), each once."""
    lights = LightLibrary(hdri_folder)
    lights.invent(config.invented, config.darkest, seed=part)
    others = [{"material": torch.load(p, weights_only=True, mmap=True)["material"]} for p in files]
    out.mkdir(parents=True, exist_ok=True)
    for k, path in list(enumerate(files))[part::parts]:
        target = out / path.name
        if not target.exists():
            with torch.no_grad():
                made = build_relit(torch.load(path, weights_only=True), others, lights, config, seed=1000 + k)
            torch.save(made, target.with_suffix(".part"))
            target.with_suffix(".part").replace(target)
        progress()
