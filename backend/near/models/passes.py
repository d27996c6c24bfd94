"""Both raster passes of the published renderer, with every channel it has (spec sections 7.2 to 7.5).

`near.pipeline.published_frame` draws the passes a user asks for; this is the whole set, as the published code returns it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from near.geometry.cameras import Camera
from near.models.basis import NeuralBasis
from near.models.gaussians import GaussianGeometry, activate_scales
from near.models.lad_config import SLatGaussianRendererConfig
from near.splatting import PUBLISHED, Gaussians, Splat, splat

# Names and widths of the rasterised channels, in order.
BASE_CHANNELS = {"base_color": 3, "metallic": 1, "roughness": 1, "pbr1": 1, "normal": 3}
VIEW_CHANNELS = {"color": 3, "shadow": 1, "brightness": 1, "nush1": 1, "hdri1": 1, "hdri2": 1, "normal_view": 3}
SMOOTHED = ("color", "base_color", "metallic", "roughness", "shadow", "alpha_view")  # the only ones reduced after supersampling


@dataclass(frozen=True)
class PassInput:
    """What one pass rasterises: Gaussians in the asset's frame and their channels [M, C]; normals in camera space (OpenCV)."""

    gaussians: Gaussians
    channels: Tensor


def base_input(raw: Mapping[str, Tensor], config: SLatGaussianRendererConfig, camera: Camera) -> PassInput:
    """Base pass of one object. Args: raw attributes [n, G, k] of the LAD. No light enters."""
    g = GaussianGeometry.from_raw(raw, config.representation)
    normals = camera_normals(g, g.scales, config, camera)
    channels = torch.cat([g.base_color_lin709, g.metallic[:, None], g.roughness[:, None], g.pbr1[:, None], normals[1]], -1)
    return PassInput(Gaussians(g.means, g.quats, g.scales, g.opacities), channels)


def view_input(raw: Mapping[str, Tensor], config: SLatGaussianRendererConfig, basis: NeuralBasis, camera: Camera) -> PassInput:
    """View pass of one object; the basis turns features and world normals into colour, brightness and "nush1"."""
    g = GaussianGeometry.from_raw(raw, config.representation)
    flat = {k: v.flatten(0, 1).float() for k, v in raw.items()}
    scales = activate_scales(flat["_scaling_view"], config.representation)
    world, seen = camera_normals(g, scales, config, camera)
    light = basis(flat["_rgb"], world)
    channels = torch.cat([light[:, :3], torch.sigmoid(flat["_shadow"]), light[:, 3:5], torch.sigmoid(flat["_hdri1"]),
                          torch.sigmoid(flat["_hdri2"]), seen], -1)
    return PassInput(Gaussians(g.means, g.quats, scales, g.opacities), channels)


def camera_normals(g: GaussianGeometry, scales: Tensor, config: SLatGaussianRendererConfig, camera: Camera) -> tuple[Tensor, Tensor]:
    """World and camera-space (OpenCV) normals [M, 3], both turned towards the camera."""
    world = g.normals(scales, camera.position.to(scales), config.view_origin)
    return world, world @ camera.cam_from_world[:3, :3].to(scales).T


def render_passes(raw: Mapping[str, Tensor], config: SLatGaussianRendererConfig, basis: NeuralBasis, camera: Camera,
                  backend: str = "auto") -> dict[str, Tensor]:
    """Every output of the published renderer for one object, each [C, H, W], linear, premultiplied, on zero.

    Depths are 0 where nothing is; normals are OpenGL camera space (x right, y up, z towards the viewer).
    """
    base, view = base_input(raw, config, camera), view_input(raw, config, basis, camera)
    out = _named(splat(base.gaussians, base.channels, camera, PUBLISHED, backend), BASE_CHANNELS, "", camera)
    return out | _named(splat(view.gaussians, view.channels, camera, PUBLISHED, backend), VIEW_CHANNELS, "_view", camera)


def reduce_supersampled(passes: Mapping[str, Tensor], factor: int) -> dict[str, Tensor]:
    """Passes of a frame rendered ``factor`` times too large -> its size, for the passes the published code reduces."""
    height, width = passes["alpha"].shape[-2:]
    size = (height // factor, width // factor)
    return {k: F.interpolate(v[None], size, mode="bilinear", align_corners=False, antialias=True)[0] if k in SMOOTHED else v
            for k, v in passes.items()}


def normal_from_depth(depth: Tensor, alpha: Tensor, camera: Camera) -> Tensor:
    """Normals of the depth map, from central differences; zero on the image's border.

    Args: depth, alpha [H, W]. Returns: [3, H, W] OpenGL camera space, times alpha. Pixels are unprojected at their
    integer coordinates, half a pixel off their centres, as published.
    """
    height, width = depth.shape
    v, u = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([u, v, torch.ones_like(u)], -1).to(depth)
    points = pixels @ torch.linalg.inv(camera.K.to(depth)).T * depth[..., None]  # camera space: a rotation changes no cross product
    down, right = points[2:, 1:-1] - points[:-2, 1:-1], points[1:-1, 2:] - points[1:-1, :-2]
    normals = torch.zeros_like(points)
    normals[1:-1, 1:-1] = F.normalize(torch.cross(down, right, dim=-1), dim=-1)
    return opengl((normals * alpha[..., None]).permute(2, 0, 1))


def opengl(normals: Tensor) -> Tensor:
    """OpenCV camera-space vectors [3, H, W] -> OpenGL."""
    return normals * normals.new_tensor([1.0, -1.0, -1.0])[:, None, None]


def _named(frame: Splat, names: Mapping[str, int], suffix: str, camera: Camera) -> dict[str, Tensor]:
    parts = frame.channels.permute(2, 0, 1).split(list(names.values()))
    out = {k: opengl(v) if k.startswith("normal") else v for k, v in zip(names, parts)}
    depth = torch.where(torch.isfinite(frame.depth), frame.depth, 0)
    out |= {"alpha" + suffix: frame.alpha[None], "depth" + suffix: depth[None],
            "normal_from_depth" + suffix: normal_from_depth(depth, frame.alpha, camera)}
    return out
