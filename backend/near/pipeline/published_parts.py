"""What a published frame is made of: models, cached states, the assets of one frame and what its stages cost."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from near.assets import Asset
from near.geometry.cameras import Camera
from near.models.basis import NeuralBasis
from near.models.gaussians import GaussianGeometry
from near.models.iad import SLatGaussianDecoder
from near.models.lad import GeometryHeads, Intrinsic, SLatGaussianRenderer
from near.models.tokenizer import HdriEncoder
from near.pipeline.types import PlacedAsset
from near.splatting import PUBLISHED, Gaussians, gsplat_missing, splat, visible

ORTHOGRAPHIC_DISTANCE = 2.0  # asset units; the distance the published models were trained at stands in for infinity


class LruCache(OrderedDict):
    """The ``size`` most recently used results."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def fetch(self, key: Hashable, make: Callable):
        """The cached value, made if it is not there."""
        if key not in self:
            self[key] = make()
            while len(self) > self.size:
                self.popitem(last=False)
        self.move_to_end(key)
        return self[key]


@dataclass(frozen=True)
class PublishedModels:
    """The four models a frame needs."""

    decoder: SLatGaussianDecoder
    renderer: SLatGaussianRenderer
    encoder: HdriEncoder
    basis: NeuralBasis

    def to(self, device: torch.device, dtype: torch.dtype) -> "PublishedModels":
        """Move to a device; blocks and backbone run in ``dtype``, everything else in float32. In place."""
        for model in (self.decoder, self.renderer, self.encoder, self.basis):
            model.to(device).eval().requires_grad_(False)
        if dtype != torch.float32:
            for model in (self.decoder, self.renderer, self.encoder):
                model.cast_blocks(dtype)
        return self


@dataclass(frozen=True)
class AssetState:
    coords: Tensor  # [N, 4]
    intrinsic: Intrinsic


@dataclass(frozen=True)
class ViewState:
    """What a camera makes of an asset before any light: N voxels, N G Gaussians."""

    view: Tensor
    heads: GeometryHeads
    geometry: GaussianGeometry
    base_scales: Tensor
    view_scales: Tensor | None  # None: light-dependent (sequential column map)
    camera_position: Tensor


@dataclass
class FrameStats:
    """Of the last frame: seconds per stage, voxels in all and shaded, Gaussians in all and seen."""

    seconds: dict[str, float] = field(default_factory=dict)
    voxels: int = 0
    shaded: int = 0
    gaussians: int = 0
    seen: int = 0

    def timed(self, stage: str, start: float, device: torch.device) -> float:
        """Add the time since ``start`` to a stage; returns now."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - start
        return now


@dataclass(frozen=True)
class Shading:
    """Outputs of the light-dependent heads: slot [N] is a voxel's row in scale and rgb, or -1."""

    slot: Tensor
    scale: Tensor
    rgb: Tensor


@dataclass
class Cloud:
    """One placed asset on its way through a frame."""

    item: PlacedAsset
    key: Hashable
    asset: AssetState
    state: ViewState
    seen: Tensor | None = None
    shaded: Tensor | None = None

    @property
    def rotation(self) -> Tensor:
        return self.item.world_from_asset[:3, :3] / self.item.scale

    def gaussians(self, scales: Tensor, rows: Tensor | None = None) -> Gaussians:
        """In world space; ``scales`` belong to ``rows`` already."""
        g = self.state.geometry
        pick = (lambda t: t) if rows is None else (lambda t: t[rows])
        cloud = Gaussians(pick(g.means), pick(g.quats), scales, pick(g.opacities))
        identity = torch.equal(self.item.world_from_asset, torch.eye(4))
        return cloud if identity else cloud.transformed(self.item.world_from_asset)

    def subset(self, rows: Tensor) -> GaussianGeometry:
        g = self.state.geometry
        return GaussianGeometry(*(getattr(g, name)[rows] for name in g.__dataclass_fields__))


def lit_slots(renderer: SLatGaussianRenderer, with_shadow: bool) -> Tensor:
    """bool [G]: the Gaussians of a voxel whose colour reads outputs of the LAD's blocks.

    Under the overlapped map the first ones read their features from the geometry heads alone (spec section 5.5).
    """
    gaussians = renderer.config.representation.num_gaussians
    columns = renderer.columns.columns["_rgb"]
    before = renderer.columns.head_widths["gs"] + renderer.columns.head_widths["pbr"]
    if with_shadow or renderer.config.rgb_per == "voxel":
        return torch.ones(gaussians, dtype=torch.bool)
    return columns.start + (torch.arange(gaussians) + 1) * columns.width > before


def seen_by_gradient(gaussians: Gaussians, camera: Camera, backend: str) -> Tensor:
    """bool [M]: the Gaussians that contribute to any pixel, for differentiable splatters.

    The gradient of a frame's sum with respect to a Gaussian's colour is the sum of its weights: one backward pass tells
    what :func:`near.splatting.visible` finds by walking the tiles, without leaving the GPU.
    """
    with torch.enable_grad():
        ones = torch.ones(len(gaussians), 1, device=gaussians.means.device, requires_grad=True)
        splat(gaussians, ones, camera, PUBLISHED, backend=backend).channels.sum().backward()
    return ones.grad[:, 0] > 0


def seen_gaussians(gaussians: Gaussians, camera: Camera) -> Tensor:
    """bool [M]: the Gaussians that contribute to any pixel of the view pass, however little: exact, not a threshold."""
    if gaussians.means.is_cuda and not gsplat_missing(PUBLISHED):
        return seen_by_gradient(gaussians, camera, "gsplat")
    return visible(gaussians, camera, PUBLISHED, floor=0.0)


def asset_key(asset: Asset) -> str:
    """Digest of what the models read of an asset."""
    digest = hashlib.sha256(asset.coords.contiguous().numpy().tobytes())
    digest.update(asset.feats.contiguous().numpy().tobytes())
    return digest.hexdigest()


def embedding_pose(local: Camera) -> Tensor:
    """cam_from_asset [4, 4] that the view embedding sees; an orthographic camera becomes one at the training distance."""
    if local.projection == "perspective":
        return local.cam_from_world
    pose = local.cam_from_world.clone()
    pose[2, 3] = ORTHOGRAPHIC_DISTANCE
    return pose
