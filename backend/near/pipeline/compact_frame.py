"""Compact assets + light + camera -> frame, with the caches of DESIGN section 5.

  light changed   -> prefilter, light tokens, per-block keys and values
  asset changed   -> anchors, intrinsic features, materials, exchange
  asset x light   -> irradiance through the visibility, what the asset sends itself
  camera changed  -> visible discs -> decoder corrections -> shade -> splat at twice the size -> filter down
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from near.geometry.cameras import Camera
from near.lighting import Environment
from near.models.anchors import AnchorCloud, decode_anchors, front_facing, view_directions
from near.models.compact import CompactModels, IntrinsicFeatures, PreparedLight
from near.models.exchange import Exchange, build_exchange
from near.models.shading import IncidentLight, Surface, irradiance, light_surface, shade_terms
from near.pipeline.types import CancelCheck, Frame, PlacedAsset, check
from near.splatting import SURFACE, downsample2, splat, trim_coverage, visible

SUPERSAMPLE_LIMIT = 4096  # a side above which a frame is splatted at its own size


@dataclass
class _AssetState:
    asset: object  # keeps the identity that the caches are keyed by alive
    cloud: AnchorCloud
    surface: Surface
    material: Tensor
    intrinsic: IntrinsicFeatures
    gaussians: object
    exchange: Exchange


class _Cache(OrderedDict):
    """Least recently used first out; a farm that sweeps lights must not grow without bound."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def fetch(self, key, make):
        if key in self:
            self.move_to_end(key)
        else:
            self[key] = make()
            while len(self) > self.size:
                self.popitem(last=False)
        return self[key]


class CompactRenderer:
    """Renders placed compact assets; keeps what does not change between frames."""

    def __init__(self, models: CompactModels) -> None:
        self.models = models
        self._assets, self._lights, self._incident = _Cache(16), _Cache(8), _Cache(32)
        self.shaded_share = 0.0  # of the last asset's voxels, in the last frame

    def clear(self) -> None:
        """Drop every cached quantity."""
        for cache in (self._assets, self._lights, self._incident):
            cache.clear()

    def render(self, placed: Sequence[PlacedAsset], light: Environment, camera: Camera, *, passes: Sequence[str],
               quality: str = "full", corrected: bool = True, visible_first: bool = True,
               cancelled: CancelCheck | None = None) -> Frame:
        """One frame; see :class:`near.pipeline.types.Frame`. ``corrected=False`` leaves the decoder out;
        ``visible_first=False`` shades what the camera does not see, too (the same picture, to check and to time against)."""
        fine = quality == "full" and max(camera.width, camera.height) * 2 <= SUPERSAMPLE_LIMIT * 2
        target = camera.scaled(2) if fine else camera
        parts, channels = [], []
        for item in placed:
            check(cancelled)
            gaussians, values = self._shade(item, light, target, passes, corrected and quality == "full", visible_first, cancelled)
            parts.append(gaussians)
            channels.append(values)
        check(cancelled)
        result = splat(_concat(parts), torch.cat(channels), target, SURFACE)
        return Frame(camera, _layers(result, passes, fine))

    def _shade(self, item: PlacedAsset, light: Environment, camera: Camera, passes, corrected: bool, visible_first: bool,
               cancelled):
        state = self.discs(item.asset)
        local_camera = camera.moved(item.world_from_asset)
        rotation = item.world_from_asset[:3, :3] / item.scale
        env = Environment(light.rgb_lin709, light.env_from_world @ rotation, light.strength)
        rows = front_facing(state.cloud, local_camera)
        gaussians = state.gaussians[rows]
        gaussians = replace(gaussians, scales=gaussians.scales * _close_up(gaussians, local_camera, self.models.config.close_up_scale))
        rows_seen = visible(gaussians, local_camera, SURFACE)
        rows, gaussians = rows[rows_seen], gaussians[rows_seen]
        drawn = slice(None)
        if not visible_first:
            drawn, rows = rows, torch.arange(len(state.cloud))
        self.shaded_share = len(torch.unique(state.cloud.voxel[rows])) / max(len(item.asset), 1)
        surface, view = state.surface[rows], view_directions(state.cloud.points[rows], local_camera)
        wanted = [p for p in passes if p not in ("alpha", "depth")]
        columns = []
        if "color" in wanted or "shadow" in wanted:
            lit = self._light(light)
            incident = self._incident_light(item.asset, state, lit, env)
            incident = incident[rows]
        for name in wanted:
            if name == "color":
                terms = shade_terms(surface, incident, lit.prefiltered, env, view)
                corrections = None
                if corrected:
                    tokens = self.models.light_tokens(lit, env)
                    corrections = self.models.corrections(state.intrinsic, tokens, local_camera, state.cloud.voxel[rows], surface.normals)
                    check(cancelled)
                columns.append(terms.combine(corrections))
            elif name == "base_color":
                columns.append(state.material[rows, 0:3])
            elif name == "roughness":
                columns.append(state.material[rows, 3:4])
            elif name == "metallic":
                columns.append(state.material[rows, 4:5])
            elif name == "normal":
                columns.append(surface.normals @ rotation.T)
            elif name == "shadow":
                directions = lit.prefiltered.directions @ env.env_from_world
                free = irradiance(surface.normals, None, directions, lit.prefiltered.flux * env.strength)
                columns.append((incident.irradiance.sum(-1) / free.sum(-1).clamp_min(1e-6)).clamp(0, 1)[:, None])
        values = torch.cat(columns, -1) if columns else torch.zeros(len(rows), 1)
        return gaussians.transformed(item.world_from_asset), values[drawn]

    def discs(self, asset) -> _AssetState:
        """An asset's surface discs, asset space: `gaussians`, `surface` (normals, materials), `cloud`."""
        return self._assets.fetch(id(asset), lambda: self._prepare(asset))

    def radiance(self, asset, light: Environment, camera: Camera) -> Tensor:
        """Linear radiance [M, 3] of every disc, seen or not, towards a camera in asset space."""
        state, lit = self.discs(asset), self._light(light)
        incident = self._incident_light(asset, state, lit, light)
        terms = shade_terms(state.surface, incident, lit.prefiltered, light, view_directions(state.cloud.points, camera))
        return terms.combine(self.models.corrections(state.intrinsic, self.models.light_tokens(lit, light), camera, state.cloud.voxel,
                                                     state.surface.normals))

    def _incident_light(self, asset, state: _AssetState, lit: PreparedLight, env: Environment) -> IncidentLight:
        """What a light, turned into the asset's space, does to all its discs; the cache keeps the asset alive that its key names."""
        key = (id(asset), lit.environment.digest(), tuple(env.env_from_world.flatten().tolist()), env.strength)
        return self._incident.fetch(key, lambda: (asset, light_surface(state.surface, lit.prefiltered, env, state.exchange)))[1]

    def _prepare(self, asset) -> _AssetState:
        cloud = decode_anchors(asset.coords, asset.anchors, asset.resolution)
        intrinsic = self.models.intrinsic(asset.coords, asset.feats.float(), cloud)
        material = self.models.anchor_material(intrinsic, cloud)
        return _AssetState(asset, cloud, cloud.surface(material), material, intrinsic, cloud.gaussians(), build_exchange(cloud, asset.resolution))

    def _light(self, light: Environment) -> PreparedLight:
        return self._lights.fetch(light.digest(), lambda: self.models.prepare_light(light))


def _close_up(gaussians, camera: Camera, scale: float) -> float:
    """Factor on the discs: 1 where they are about a pixel, ``scale`` where they are wider than two. Small discs are
    widened by the pixel itself and bleed over silhouettes; large ones would leave gaps."""
    if len(gaussians) == 0:
        return 1.0
    pixels = gaussians.scales[:, 0].median() * camera.K[0, 0]
    if camera.projection == "perspective":
        pixels = pixels / (camera.position - gaussians.means.mean(0)).norm().clamp_min(1e-3)
    return 1 + (scale - 1) * float(((pixels - 0.9) / 1.3).clamp(0, 1))


def _concat(parts):
    return parts[0] if len(parts) == 1 else type(parts[0]).concat(parts)


def _layers(result, passes, fine: bool) -> dict[str, Tensor]:
    """Split the splatted channels into named layers, filtering down where the splat was twice the size."""
    wanted = [p for p in passes if p not in ("alpha", "depth")]
    stack = trim_coverage(result.channels, result.alpha) if fine else torch.cat([result.channels, result.alpha[..., None]], -1)
    covered = stack[..., -1]
    stack = downsample2(stack, "blackman_harris") if fine else stack
    alpha = stack[..., -1:].clamp(0, 1)
    straight = alpha.clamp_min(1e-4)
    layers, start = {}, 0
    widths = {"color": 3, "base_color": 3, "normal": 3}
    for name in passes:
        if name == "alpha":
            layers[name] = alpha
        elif name == "depth":
            depth = result.depth.masked_fill(covered <= 0, torch.inf)
            if fine:  # the nearest of the four: an average across a silhouette lies on neither surface
                depth = -F.max_pool2d(-depth[None, None], 2)[0, 0]
            layers[name] = depth[..., None]
    for name in wanted:
        width = widths.get(name, 1)
        block = stack[..., start:start + width]
        start += width
        if name == "color":
            layers[name] = torch.cat([block.clamp_min(0), alpha], -1)
        else:
            value = torch.where(alpha > 1e-3, block / straight, torch.zeros(()))
            layers[name] = F.normalize(value, dim=-1) if name == "normal" else value.clamp_min(0)
    return {name: layers[name] for name in passes}
