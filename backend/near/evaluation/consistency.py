"""Does light behave as light, and is the homogenised asset free of it? Checks that need no ground truth.

rotation    light, camera and asset turned together: the picture stays (PSNR in the mask, dB)
doubling    twice the light gives twice the linear output (share of the output that is off)
sum         two lights together give the sum of both (likewise)
flicker     a turntable in steps of one degree: what a fixed surface point does from frame to frame besides changing
            steadily, as the deviation of an equal noise in 8-bit levels (AgX): rms of (c[k-1] - 2 c[k] + c[k+1]) / sqrt(6)
spread      assets made from photos of one object under three lights: rms deviation from their mean over voxels, in the
            SLAT's perceptual colours (-1..1), homogenised (base colour, white-light look) over shaded; the same for
            pictures: assets under white light over the photos (8-bit levels); which part of the homogenised variance is
            the whole object's brightness, its colour cast, or local; and the ratio of the local parts alone: how much of
            what light does from place to place is left
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from near.assets import Asset
from near.errors import Cancelled, NearError
from near.evaluation.bench import Bench, BenchModel, Target
from near.evaluation.metrics import psnr, shown_on_black
from near.geometry.cameras import Camera, orbit_camera
from near.geometry.photo import Photo
from near.lighting import Environment
from near.output import display_straight, read_rgba

Tell = Callable[[float, str], None]
# name -> (what a good value is, whether it is a floor)
LIMITS = {"rotation_psnr": (38.0, True), "doubling_error": (0.03, False), "sum_error": (0.05, False), "spread_ratio": (1 / 3, False)}
STEP_RAD, TURNS = math.radians(1.0), (0.3, 1.9, 4.0)
PHOTOS = 3
MAP_HEIGHT = 128  # of the joint map of two lights
COLOURS = [0, 1, 2, 5, 6, 7]  # of a compact SLAT: base colour and look; of a shaded one: the photo's colours


def check_consistency(engine, bench: Bench, tell: Tell) -> dict:
    """All checks on every model of the bench.

    Returns:
        ``{"mean", "worst", "limits", "met", "models", "errors"}``; a value that the pack cannot give is missing.
    """
    models, errors = {}, []
    for index, model in enumerate(bench.models):
        here = lambda text, done=index, name=model.name: tell(done / len(bench.models), f"{name}: {text}")  # noqa: E731
        try:
            models[model.name] = {k: round(v, 5) for k, v in _model(engine, bench, model, here).items()}
        except Cancelled:
            raise
        except NearError as error:
            errors.append({"model": model.name, "tasks": "consistency", **error.as_dict()})
    names = list(dict.fromkeys(n for values in models.values() for n in values))
    columns = {n: [m[n] for m in models.values() if n in m] for n in names}
    worst = {n: (min if n in LIMITS and LIMITS[n][1] else max)(v) for n, v in columns.items()}
    mean = {n: round(statistics.fmean(v), 5) for n, v in columns.items()}
    met = {n: (worst[n] >= limit if floor else worst[n] <= limit) for n, (limit, floor) in LIMITS.items() if n in worst}
    return {"mean": mean, "worst": worst, "limits": {n: round(v, 4) for n, (v, _) in LIMITS.items()}, "met": met, "models": models, "errors": errors}


def _model(engine, bench: Bench, model: BenchModel, tell: Callable[[str], None]) -> dict[str, float]:
    tell("asset")
    try:
        asset = engine.encode(bench.root / model.mesh)
    except NearError as error:
        if error.code != "encode-unsupported":
            raise
        asset = engine.create(bench.root / model.photo, mesh=bench.root / model.mesh, camera=model.photo_view.camera())
    first = model.targets["forward"][0]
    other = next((t for t in model.targets["forward"] if t.light.name != first.light.name), first)
    camera = first.view.camera()
    a, b = (t.light.environment(bench.root) for t in (first, other))
    tell("light")
    found = {"rotation_psnr": rotation_psnr(engine, asset, a, camera), "doubling_error": doubling_error(engine, asset, a, camera),
             "sum_error": sum_error(engine, asset, a, b, camera)}
    tell("turntable")
    found["flicker_levels"] = flicker(engine, asset, a, camera)
    tell("photos under three lights")
    return found | homogenised_spread(engine, bench, model)


# -- light -------------------------------------------------------------------------------------------------------------


def _frame(engine, asset: Asset, light: Environment, camera: Camera, world_from_asset: Tensor | None = None, passes: Sequence[str] = ("color",)):
    from near.pipeline.types import PlacedAsset

    return engine.render([PlacedAsset(asset, torch.eye(4) if world_from_asset is None else world_from_asset)], light, camera, passes=passes)


def _color(*args) -> np.ndarray:
    return np.asarray(_frame(*args).layers["color"])


def turn(axis: Sequence[float], angle_rad: float) -> Tensor:
    """[4, 4] rotation about an axis through the origin."""
    x, y, z = torch.nn.functional.normalize(torch.tensor(axis, dtype=torch.float64), dim=0).tolist()
    skew = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    out = torch.eye(4, dtype=torch.float64)
    out[:3, :3] += math.sin(angle_rad) * skew + (1 - math.cos(angle_rad)) * skew @ skew
    return out


def rotation_psnr(engine, asset: Asset, light: Environment, camera: Camera) -> float:
    """PSNR in the mask between the picture and the one with everything turned."""
    R = turn((1.0, 2.0, 3.0), 1.1)
    still = _color(engine, asset, light, camera)
    moved_light = Environment(light.rgb_lin709, (light.env_from_world.double() @ R[:3, :3].T).float(), light.strength)
    moved_camera = replace(camera, cam_from_world=(camera.cam_from_world.double() @ R.T).float())
    moved = _color(engine, asset, moved_light, moved_camera, R.float())
    mask = still[..., 3] > 0.5
    return psnr(shown_on_black(still)[mask], shown_on_black(moved)[mask])


def doubling_error(engine, asset: Asset, light: Environment, camera: Camera) -> float:
    once = _color(engine, asset, light, camera)
    twice = _color(engine, asset, replace(light, strength=2 * light.strength), camera)
    return _off(twice, 2 * once, once[..., 3] > 0.5)


def sum_error(engine, asset: Asset, a: Environment, b: Environment, camera: Camera) -> float:
    """Both lights are first brought to one orientation and size: the check is of the renderer, not of resampling."""
    from near.lighting.rotate import rotate_equirect

    maps = [rotate_equirect(e.rgb_lin709, e.env_from_world, MAP_HEIGHT, 2 * MAP_HEIGHT) * e.strength for e in (a, b)]
    alone = [_color(engine, asset, Environment(m), camera) for m in maps]
    return _off(_color(engine, asset, Environment(maps[0] + maps[1]), camera), alone[0] + alone[1], alone[0][..., 3] > 0.5)


def _off(found: np.ndarray, expected: np.ndarray, mask: np.ndarray) -> float:
    """Sum of absolute differences over the sum of what is expected, in linear light."""
    a, b = found[mask][:, :3].astype(np.float64), expected[mask][:, :3].astype(np.float64)
    return float(np.abs(a - b).sum() / max(np.abs(b).sum(), 1e-12))


# -- turntable ---------------------------------------------------------------------------------------------------------


def flicker(engine, asset: Asset, light: Environment, camera: Camera) -> float:
    """See the module's text; points are followed by the depth pass and left out where another surface hides them."""
    differences = []
    for start in TURNS:
        poses = [turn((0, 0, 1), start + k * STEP_RAD) for k in (-1, 0, 1)]
        frames = [_frame(engine, asset, light, camera, p.float(), ("color", "depth")) for p in poses]
        points = _surface(camera, frames[1].layers, poses[1])
        looks, seen = zip(*(_look_up(camera, f.layers, p, points) for f, p in zip(frames, poses)))
        ok = seen[0] & seen[1] & seen[2]
        differences.append(((looks[0] - 2 * looks[1] + looks[2])[ok] / math.sqrt(6)).flatten())
    joined = torch.cat(differences)
    return float(joined.square().mean().sqrt()) if len(joined) else 0.0


def _surface(camera: Camera, layers: dict[str, Tensor], world_from_asset: Tensor) -> Tensor:
    """Points [N, 3] in asset space under the opaque pixels, away from silhouettes."""
    depth = torch.as_tensor(layers["depth"])[..., 0]
    near = torch.nn.functional.max_pool2d(torch.where(depth.isfinite(), depth, torch.tensor(1e6))[None, None], 3, 1, 1)[0, 0]
    inner = depth.isfinite() & (near - depth < 0.03) & (torch.as_tensor(layers["color"])[..., 3] > 0.99)
    rows, columns = torch.nonzero(inner, as_tuple=True)
    z, K = depth[rows, columns].double(), camera.K.double()
    local = torch.stack([(columns + 0.5 - K[0, 2]) / K[0, 0] * z, (rows + 0.5 - K[1, 2]) / K[1, 1] * z, z, torch.ones_like(z)], -1)
    return (local @ (torch.linalg.inv(camera.cam_from_world.double() @ world_from_asset)).T)[:, :3]


def _look_up(camera: Camera, layers: dict[str, Tensor], world_from_asset: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """AgX colours in 8-bit levels [N, 3] where the points are now, bilinear, and whether they are seen [N]."""
    from near.colour import agx_srgb

    world = points @ world_from_asset[:3, :3].T
    pixel, z = camera.project(world.float())
    grid = (pixel / torch.tensor([camera.width, camera.height]) * 2 - 1)[None, None]
    shown = agx_srgb(torch.as_tensor(layers["color"])[..., :3].float().clamp_min(0)) * 255
    colour = torch.nn.functional.grid_sample(shown.permute(2, 0, 1)[None], grid, mode="bilinear", padding_mode="border", align_corners=False)
    column, row = pixel.floor().long().unbind(-1)
    inside = (column >= 0) & (row >= 0) & (column < camera.width) & (row < camera.height)
    depth = torch.as_tensor(layers["depth"])[..., 0][row.clamp(0, camera.height - 1), column.clamp(0, camera.width - 1)]
    return colour[0, :, 0].T, inside & ((depth - z).abs() < 0.02)


# -- three lights ------------------------------------------------------------------------------------------------------


def homogenised_spread(engine, bench: Bench, model: BenchModel) -> dict[str, float]:
    """Assets from photos under different lights against the photos themselves. Empty where the bench has fewer than two."""
    targets = model.targets["relighting"][:PHOTOS]
    if len(targets) < 2:
        return {}
    view = targets[0].view.camera()
    with recorded_shaded(engine) as shaded:
        assets = [engine.create(_photo(bench, t), mesh=bench.root / model.mesh, camera=view) for t in targets]
    white = Environment(torch.ones(16, 32, 3))
    pictures = [_color(engine, a, white, view) for a in assets]
    truth = [read_rgba(bench.root / t.image) for t in targets]
    mask = truth[0][..., 3] > 0.5
    found = {"picture_spread": spread([shown_on_black(p)[mask].astype(np.float32) for p in pictures]),
             "photo_spread": spread([shown_on_black(p)[mask].astype(np.float32) for p in truth])}
    found["picture_ratio"] = found["picture_spread"] / max(found["photo_spread"], 1e-9)
    if len(shaded) == len(assets) and all(torch.equal(a.coords, assets[0].coords) for a in assets):
        homogenised, baked = (np.stack([f.float()[:, COLOURS].numpy() for f in feats]) for feats in ([a.feats for a in assets], shaded))
        found["homogenised_spread"], found["shaded_spread"] = spread(homogenised), spread(baked)
        found["spread_ratio"] = found["homogenised_spread"] / max(found["shaded_spread"], 1e-9)
        found["local_ratio"] = local_spread(homogenised) / max(local_spread(baked), 1e-9)
        found |= spread_parts(homogenised)
    return found


def spread_parts(stack: np.ndarray) -> dict[str, float]:
    """Whose fault the spread of [assets, voxels, channels] is, as shares of its variance: the object's brightness as a whole
    (a photo does not tell bright paint from bright light), its colour cast as a whole, and what differs from voxel to voxel."""
    off = stack - stack.mean(0)
    whole = off.mean(1, keepdims=True)
    grey = whole.mean(2, keepdims=True)
    total = max(float((off ** 2).mean()), 1e-12)
    return {"exposure_share": float((grey ** 2).mean()) / total, "cast_share": float(((whole - grey) ** 2).mean()) / total,
            "local_share": local_spread(stack) ** 2 / total}


def local_spread(stack: np.ndarray) -> float:
    """Of [assets, voxels, channels], root mean square deviation from their mean once each asset has the mean's brightness and cast."""
    off = stack - stack.mean(0)
    return float(np.sqrt(((off - off.mean(1, keepdims=True)) ** 2).mean()))


def spread(values: Sequence[np.ndarray]) -> float:
    """Root mean square deviation of arrays of one shape from their mean."""
    stack = np.stack(values)
    return float(np.sqrt(((stack - stack.mean(0)) ** 2).mean()))


def _photo(bench: Bench, target: Target) -> Photo:
    """A bench picture as the photo that a camera would save."""
    shown = torch.from_numpy(display_straight(torch.from_numpy(read_rgba(bench.root / target.image)))).float() / 255
    return Photo(shown[..., :3].contiguous(), shown[..., 3].contiguous(), target.image)


@contextmanager
def recorded_shaded(engine) -> Iterator[list[Tensor]]:
    """Collects the shaded SLAT of every asset that a compact engine creates inside the block; stays empty for other packs."""
    kept: list[Tensor] = []
    if not getattr(engine, "is_compact", False):
        yield kept
        return
    models = engine._compact()
    original = models.sample_shaded

    def sample(*args, **options):
        kept.append(original(*args, **options))
        return kept[-1]

    models.sample_shaded = sample
    try:
        yield kept
    finally:
        del models.sample_shaded

