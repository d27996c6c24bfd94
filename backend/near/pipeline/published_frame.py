"""Published assets + light + camera -> frame, with visible-first shading (DESIGN section 5, spec sections 5 to 8 and 12).

  light changed   -> conditioning, light tokens, keys and values of every LAD block
  asset changed   -> IAD, LAD input layer
  camera changed  -> view embedding, geometry and material heads, which Gaussians the view pass shows
  all three       -> LAD blocks for the voxels whose colour can be seen, neural basis, raster passes

Voxels never attend to each other in the LAD, so shading fewer of them changes nothing in the picture.
"""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from near.assets import Asset
from near.errors import NearError
from near.geometry.cameras import Camera
from near.lighting import Environment, condition_published, resample_equirect, texel_directions
from near.lighting.conditioning import SOURCE_COLUMNS, SOURCE_ROWS
from near.models.gaussians import GaussianGeometry, activate_scales
from near.nn import KeyValue, SparseTensor
from near.pipeline.published_parts import (AssetState, Cloud, FrameStats, LruCache, PublishedModels, Shading, ViewState, asset_key,
                                           embedding_pose, lit_slots, seen_gaussians)
from near.pipeline.types import CancelCheck, Frame, PlacedAsset, check
from near.splatting import PUBLISHED, Gaussians, Splat, splat

VIEW_PASSES, BASE_PASSES = ("color", "shadow"), ("base_color", "roughness", "metallic", "normal")
PASS_WIDTH = {"color": 3, "shadow": 1, "base_color": 3, "roughness": 1, "metallic": 1, "normal": 3}
CONDITIONING = ("energy", "published")
UPRIGHT_TOLERANCE = 1e-5  # of the third axis, below which a light's rotation counts as one about +Z
SHADE_CACHE = 2  # assets whose last shading a draft may reuse


class PublishedRenderer:
    """Renders published assets; keeps what does not change between frames.

    Args:
        models: moved to ``device`` with the precision wanted (:meth:`PublishedModels.to`).
        conditioning: ``published`` resizes light maps by nearest neighbour as the released code does; ``energy``
            averages larger maps down first, so that a small sun is not lost. Equal for maps of 1024 x 512.
    """

    def __init__(self, models: PublishedModels, device: torch.device | str = "cpu", conditioning: str = "energy") -> None:
        if conditioning not in CONDITIONING:
            raise ValueError(f"conditioning must be one of {CONDITIONING}, not {conditioning!r}")
        self.models, self.device, self.conditioning = models, torch.device(device), conditioning
        self.stats = FrameStats()
        self._assets, self._lights, self._views, self._shading = LruCache(8), LruCache(3), LruCache(2), LruCache(SHADE_CACHE)
        self._registers: list[KeyValue] | None = None

    def clear(self) -> None:
        """Drop every cached quantity."""
        for cache in (self._assets, self._lights, self._views, self._shading):
            cache.clear()
        self._registers = None

    @torch.no_grad()
    def render(self, placed: Sequence[PlacedAsset], light: Environment, camera: Camera, *, passes: Sequence[str] = ("color",),
               quality: str = "full", visible_first: bool = True, cancelled: CancelCheck | None = None) -> Frame:
        """One frame; linear, not tone-mapped. See :class:`near.pipeline.types.Frame`.

        Args:
            quality: ``draft`` reuses the last shading of voxels that had one under this light, from whatever view.
            visible_first: False shades every voxel: the reference that visible-first shading is tested against.
        """
        self.stats = stats = FrameStats()
        start = time.perf_counter()
        clouds = []
        for item in placed:
            check(cancelled)
            clouds.append(self._cloud(item, camera))
            start = stats.timed("geometry", start, self.device)
        self._find_seen(clouds, camera, passes, visible_first)
        stats.timed("visibility", start, self.device)
        view_pass = any(p not in BASE_PASSES for p in passes)
        view = self._view_pass(clouds, light, camera, passes, quality, cancelled) if view_pass else None
        check(cancelled)
        base = self._base_pass(clouds, camera, passes) if any(p in BASE_PASSES for p in passes) else None
        return Frame(camera, {name: _layer(name, passes, view, base).float().cpu() for name in passes})

    # -- before any light -----------------------------------------------------------------------------------------

    def _cloud(self, item: PlacedAsset, camera: Camera) -> Cloud:
        key = asset_key(item.asset)
        asset = self._assets.fetch(key, lambda: self._prepare_asset(item.asset))
        local = camera.moved(item.world_from_asset)
        pose = embedding_pose(local).to(self.device)
        state = self._views.fetch((key, tuple(pose.flatten().tolist())), lambda: self._prepare_view(asset, pose))
        return Cloud(item, key, asset, state)

    def _prepare_asset(self, asset: Asset) -> AssetState:
        config = self.models.decoder.config
        if asset.resolution != config.resolution or asset.feats.shape[1] != config.latent_channels:
            raise NearError("asset-pack", f"This asset has {asset.resolution}^3 voxels with {asset.feats.shape[1]} channels; these weights "
                            f"take {config.resolution}^3 with {config.latent_channels}.", "Create the asset again with this weight pack.")
        coords = F.pad(asset.coords.int(), (1, 0)).to(self.device)
        h, _ = self.models.decoder(SparseTensor.create(asset.feats.float().to(self.device), coords))
        return AssetState(coords, self.models.renderer.intrinsic(h.feats))

    def _prepare_view(self, asset: AssetState, pose: Tensor) -> ViewState:
        renderer = self.models.renderer
        rep = renderer.config.representation
        view = renderer.view_embedding(asset.coords, pose[None])
        heads = renderer.geometry(asset.intrinsic, view)
        raw = renderer.geometry_attributes(heads, asset.coords)
        geometry = GaussianGeometry.from_raw(raw, rep)
        scales = activate_scales(raw["_scaling_view"].flatten(0, 1).float(), rep) if "_scaling_view" in raw else None
        position = -(pose[:3, :3].T @ pose[:3, 3])
        return ViewState(view, heads, geometry, geometry.scales, scales, position)

    def _find_seen(self, clouds: list[Cloud], camera: Camera, passes: Sequence[str], visible_first: bool) -> None:
        """Which Gaussians the view pass shows, and which voxels their colour needs shaded."""
        renderer = self.models.renderer
        count = renderer.config.representation.num_gaussians
        known = all(c.state.view_scales is not None for c in clouds)
        if visible_first and known:
            world = Gaussians.concat([c.gaussians(c.state.view_scales) for c in clouds])
            seen = seen_gaussians(world, camera).to(self.device).split([len(c.state.view_scales) for c in clouds])
        else:
            seen = [torch.ones(len(c.asset.coords) * count, dtype=torch.bool, device=self.device) for c in clouds]
        lit = lit_slots(renderer, "shadow" in passes).to(self.device)
        for cloud, mask in zip(clouds, seen):
            cloud.seen = mask.nonzero()[:, 0]
            by_voxel = mask.view(-1, count)
            needs = (by_voxel & lit).any(1) if visible_first else torch.ones(len(by_voxel), dtype=torch.bool, device=self.device)
            cloud.shaded = needs.nonzero()[:, 0]
            self.stats.voxels += len(by_voxel)
            self.stats.shaded += len(cloud.shaded)
            self.stats.gaussians += len(mask)
            self.stats.seen += len(cloud.seen)

    # -- with light -----------------------------------------------------------------------------------------------

    def _view_pass(self, clouds: list[Cloud], light: Environment, camera: Camera, passes: Sequence[str], quality: str,
                   cancelled: CancelCheck | None) -> Splat:
        parts, channels = [], []
        colour = any(p in VIEW_PASSES for p in passes)
        for cloud in clouds:
            if colour or cloud.state.view_scales is None:
                values, scales = self._shade(cloud, light, passes, quality, cancelled)
            else:
                values, scales = cloud.state.view_scales.new_zeros(len(cloud.seen), 1), cloud.state.view_scales[cloud.seen]
            parts.append(cloud.gaussians(scales, cloud.seen))
            channels.append(values)
        start = time.perf_counter()
        result = splat(Gaussians.concat(parts), torch.cat(channels), camera, PUBLISHED)
        self.stats.timed("splat", start, self.device)
        return result

    def _shade(self, cloud: Cloud, light: Environment, passes: Sequence[str], quality: str,
               cancelled: CancelCheck | None) -> tuple[Tensor, Tensor]:
        """Channels of the view pass and scales, for the seen Gaussians."""
        renderer, rep = self.models.renderer, self.models.renderer.config.representation
        start = time.perf_counter()
        light_key, kv = self._light(light, cloud.item)
        start = self.stats.timed("light", start, self.device)
        shading = self._lad(cloud, light_key, kv, quality, cancelled)
        start = self.stats.timed("blocks", start, self.device)
        raw = self._light_columns(cloud, shading)
        scales = cloud.state.view_scales[cloud.seen] if cloud.state.view_scales is not None else activate_scales(raw["_scaling_view"], rep)
        columns = []
        if "color" in passes:
            geometry = cloud.subset(cloud.seen)
            normals = geometry.normals(scales, cloud.state.camera_position, renderer.config.view_origin)
            columns.append(self.models.basis(raw["_rgb"], normals)[:, :3])
        if "shadow" in passes:
            columns.append(torch.sigmoid(raw["_shadow"]))
        self.stats.timed("basis", start, self.device)
        return torch.cat(columns, -1) if columns else scales.new_zeros(len(scales), 1), scales

    def _light_columns(self, cloud: Cloud, shading: Shading) -> dict[str, Tensor]:
        """Light-dependent attributes of the seen Gaussians, [m, k].

        A voxel that was not shaded borrows another's row: its seen Gaussians read only the geometry heads' columns.
        """
        count = self.models.renderer.config.representation.num_gaussians
        voxel = cloud.seen // count
        rows, position = torch.unique_consecutive(voxel, return_inverse=True)
        slot = shading.slot[rows].clamp_min(0)
        raw = self.models.renderer.light_attributes(cloud.state.heads[rows], shading.scale[slot], shading.rgb[slot])
        picked = position * count + cloud.seen % count
        return {name: value.flatten(0, 1)[picked].float() for name, value in raw.items()}

    def _lad(self, cloud: Cloud, light_key: Hashable, kv: list[KeyValue], quality: str, cancelled: CancelCheck | None) -> Shading:
        """Light-dependent heads for the voxels that need them; a draft keeps what an earlier frame left."""
        renderer, key = self.models.renderer, (cloud.key, light_key)
        if self._registers is None:
            self._registers = renderer.register_kv(self.models.decoder.reg_tokens)
        old = self._shading.get(key) if quality == "draft" else None
        rows = cloud.shaded if old is None else cloud.shaded[old.slot[cloud.shaded] < 0]
        scale, rgb = renderer.shade(cloud.asset.intrinsic[rows], cloud.state.view[rows], self._registers, kv, poll=lambda: check(cancelled))
        slot = old.slot.clone() if old is not None else torch.full((len(cloud.asset.coords),), -1, device=self.device)
        first = len(old.rgb) if old is not None else 0
        slot[rows] = torch.arange(first, first + len(rows), device=self.device)
        if old is not None:
            scale, rgb = torch.cat([old.scale, scale]), torch.cat([old.rgb, rgb])
        elif len(rows) == 0:  # nothing needs light: one row of zeros to borrow
            scale, rgb = scale.new_zeros(1, scale.shape[1]), rgb.new_zeros(1, rgb.shape[1])
        shading = Shading(slot, scale, rgb)
        self._shading.fetch(key, lambda: shading)
        self._shading[key] = shading
        return shading

    def _light(self, light: Environment, item: PlacedAsset) -> tuple[Hashable, list[KeyValue]]:
        rotation = item.world_from_asset[:3, :3].double() / item.scale
        turned = light.env_from_world.double() @ rotation
        key = (light.digest(), light.strength, tuple((turned * 1e6).round().long().flatten().tolist()))
        return key, self._lights.fetch(key, lambda: self._prepare_light(light, turned))

    def _prepare_light(self, light: Environment, env_from_asset: Tensor) -> list[KeyValue]:
        tokens = self.models.encoder(self.light_condition(light, env_from_asset)[None].to(self.device))
        return self.models.renderer.light_kv(tokens)

    def light_condition(self, light: Environment, env_from_asset: Tensor) -> Tensor:
        """[9, 512, 512] condition of a light seen from the asset's frame.

        A turn about +Z goes through the published rotation (spec 8.3: pairs move over the grid); the published models
        know no other, so any other turn is first baked into the map.
        """
        rgb = light.rgb_lin709.float() * light.strength
        if self.conditioning == "energy" and rgb.shape[0] > SOURCE_ROWS:
            rgb = resample_equirect(rgb, SOURCE_ROWS, SOURCE_COLUMNS).float()
        if abs(float(env_from_asset[2, 2]) - 1) < UPRIGHT_TOLERANCE and float(torch.linalg.det(env_from_asset)) > 0:
            return condition_published(rgb, -math.atan2(float(env_from_asset[1, 0]), float(env_from_asset[0, 0])))
        turned = Environment(rgb, env_from_asset.float()).lookup(texel_directions(SOURCE_ROWS, SOURCE_COLUMNS))
        return condition_published(turned, 0.0)

    # -- materials ------------------------------------------------------------------------------------------------

    def _base_pass(self, clouds: list[Cloud], camera: Camera, passes: Sequence[str]) -> Splat:
        parts, channels = [], []
        start = time.perf_counter()
        for cloud in clouds:
            geometry, config = cloud.state.geometry, self.models.renderer.config
            turn = cloud.rotation.to(geometry.means)
            values = {"base_color": lambda: geometry.base_color_lin709, "roughness": lambda: geometry.roughness[:, None],
                      "metallic": lambda: geometry.metallic[:, None],
                      "normal": lambda: geometry.normals(geometry.scales, cloud.state.camera_position, config.view_origin) @ turn.T}
            channels.append(torch.cat([values[p]() for p in passes if p in BASE_PASSES], -1))
            parts.append(cloud.gaussians(cloud.state.base_scales))
        result = splat(Gaussians.concat(parts), torch.cat(channels), camera, PUBLISHED)
        self.stats.timed("base pass", start, self.device)
        return result


def _layer(name: str, passes: Sequence[str], view: Splat | None, base: Splat | None) -> Tensor:
    """One named layer [H, W, C] out of the two raster passes."""
    if name == "alpha":
        return view.alpha[..., None]
    if name == "depth":
        return view.depth[..., None]
    group, result = (VIEW_PASSES, view) if name in VIEW_PASSES else (BASE_PASSES, base)
    order = [p for p in passes if p in group] if group is BASE_PASSES else [p for p in VIEW_PASSES if p in passes]
    first = sum(PASS_WIDTH[p] for p in order[: order.index(name)])
    block = result.channels[..., first : first + PASS_WIDTH[name]]
    if name == "color":
        return torch.cat([block.clamp_min(0), result.alpha[..., None]], -1)
    straight = torch.where(result.alpha[..., None] > 1e-3, block / result.alpha[..., None].clamp_min(1e-4), torch.zeros_like(block))
    return F.normalize(straight, dim=-1) if name == "normal" else straight
