"""The splatter in plain torch: differentiable, any channel count, any device. The oracle of the other backends.

Follows gsplat 1.5.3 step by step (spec section 7.4): projection, screening, tile lists, front-to-back blending.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from near.geometry.cameras import Camera
from near.splatting.types import Gaussians, Splat, SplatSettings, rotation_from_quaternion

TILE = 16
FRUSTUM_MARGIN = 0.3  # of tan(half field of view): beyond it the Jacobian is evaluated at the margin
MAX_EXTENT = 3.33  # standard deviations
DEPTH_ALPHA = 1e-4  # below this alpha a pixel is empty


@dataclass(frozen=True, eq=False)
class Projected:
    """Gaussians on the image plane, [M] rows.

    means2d [M, 2] pixels; conics [M, 3] (A, B, C) of A dx^2 + 2 B dx dy + C dy^2; depths [M] camera z; opacities [M], compensated;
    compensations [M]; radii int64 [M, 2] pixels; valid bool [M].
    """

    means2d: Tensor
    conics: Tensor
    depths: Tensor
    opacities: Tensor
    compensations: Tensor
    radii: Tensor
    valid: Tensor


def project(gaussians: Gaussians, camera: Camera, settings: SplatSettings) -> Projected:
    """Perspective or orthographic projection with gsplat's screening."""
    means, quats, scales, opacities = gaussians.tensors()
    view, K = camera.cam_from_world.to(means), camera.K.to(means)
    rotation = view[:3, :3]
    cam = means @ rotation.T + view[:3, 3]
    z = cam[:, 2]
    valid = (z >= camera.near) & (z <= camera.far)
    cam = torch.where(valid[:, None], cam, cam.new_tensor([0.0, 0.0, camera.near or 1.0]))
    axes = rotation @ rotation_from_quaternion(quats) * scales[:, None, :]
    means2d, jacobian = _lens(cam, K, camera)
    flat = jacobian @ axes
    cov = flat @ flat.mT
    a, b, c = cov[:, 0, 0], cov[:, 0, 1], cov[:, 1, 1]
    # Sum of squared minors instead of a c - b^2: what is left of a thin disc seen edge-on survives rounding.
    before = torch.linalg.cross(flat[:, 0], flat[:, 1]).square().sum(-1)
    det = before + settings.eps2d * (a + c + settings.eps2d)
    a, c = a + settings.eps2d, c + settings.eps2d
    valid = valid & (det > 0)
    det = torch.where(det > 0, det, torch.ones_like(det))
    ratio = before / det
    compensation = torch.where(ratio > 0, ratio.clamp_min(1e-30).sqrt(), torch.zeros_like(ratio))
    opacities = opacities.clamp_max(1)
    opacities = opacities * compensation if settings.antialiased else opacities
    valid = valid & (opacities >= settings.alpha_min)
    with torch.no_grad():
        extent = (2 * (opacities.clamp_min(settings.alpha_min) / settings.alpha_min).log()).sqrt().clamp_max(MAX_EXTENT)
        radii = (extent[:, None] * torch.stack([a, c], -1).sqrt()).ceil()
        size = radii.new_tensor([camera.width, camera.height])
        valid = valid & ((means2d + radii > 0) & (means2d - radii < size)).all(-1)
    return Projected(means2d, torch.stack([c, -b, a], -1) / det[:, None], z, opacities, compensation, radii, valid)


def _lens(cam: Tensor, K: Tensor, camera: Camera) -> tuple[Tensor, Tensor]:
    """Pixel positions [M, 2] and Jacobians [M, 2, 3] of camera-space points [M, 3]."""
    f, centre = K.diagonal()[:2], K[:2, 2]
    zero, one = torch.zeros_like(cam[:, 0]), torch.ones_like(cam[:, 0])
    if camera.projection == "orthographic":
        jacobian = torch.stack([f[0] * one, zero, zero, zero, f[1] * one, zero], -1).unflatten(-1, (2, 3))
        return cam[:, :2] * f + centre, jacobian
    size = cam.new_tensor([camera.width, camera.height])
    margin = FRUSTUM_MARGIN * 0.5 * size / f
    over_z = 1 / cam[:, 2:]
    tangent = cam[:, :2] * over_z
    limited = torch.minimum(torch.maximum(tangent, -(centre / f + margin)), (size - centre) / f + margin)
    fx, fy = (f * over_z).unbind(-1)
    sx, sy = (-f * limited * over_z).unbind(-1)
    return tangent * f + centre, torch.stack([fx, zero, sx, zero, fy, sy], -1).unflatten(-1, (2, 3))


def splat_reference(gaussians: Gaussians, channels: Tensor, camera: Camera, settings: SplatSettings) -> Splat:
    """See :func:`near.splatting.splat`."""
    projected = project(gaussians, camera, settings)
    kept = torch.nonzero(projected.valid)[:, 0]
    kept = kept[torch.argsort(projected.depths[kept].detach(), stable=True)]
    values = torch.cat([channels[kept], channels.new_ones(len(kept), 1), projected.depths[kept, None].to(channels)], -1)
    flat = Projected(*(t[kept] for t in (projected.means2d, projected.conics, projected.depths, projected.opacities,
                                         projected.compensations, projected.radii, projected.valid)))
    low, high = ((flat.means2d.detach() + sign * flat.radii) / TILE for sign in (-1, 1))
    low, high = low.floor(), high.ceil()
    rows = []
    for top in range(0, camera.height, TILE):
        row = []
        for left in range(0, camera.width, TILE):
            tile = torch.tensor([left // TILE, top // TILE]).to(low)
            own = torch.nonzero(((low <= tile) & (tile < high)).all(-1))[:, 0]
            width, height = min(TILE, camera.width - left), min(TILE, camera.height - top)
            weights = _tile_weights(flat, own, left, top, width, height, settings)
            row.append((weights.to(values) @ values[own]).view(height, width, -1))
        rows.append(torch.cat(row, 1))
    image = torch.cat(rows)
    alpha = image[..., -2]
    depth = torch.where(alpha >= DEPTH_ALPHA, image[..., -1] / alpha.clamp_min(1e-10), torch.full_like(alpha, torch.inf))
    return Splat(image[..., :-2], alpha, depth)


def _tile_weights(flat: Projected, own: Tensor, left: int, top: int, width: int, height: int, settings: SplatSettings) -> Tensor:
    """Blending weights [height * width, n] of the Gaussians ``own`` [n], sorted front to back."""
    device, dtype = flat.means2d.device, flat.means2d.dtype
    y, x = torch.meshgrid(torch.arange(top, top + height, device=device), torch.arange(left, left + width, device=device), indexing="ij")
    pixels = torch.stack([x, y], -1).view(-1, 1, 2).to(dtype) + 0.5
    dx, dy = (flat.means2d[own] - pixels).unbind(-1)
    a, b, c = flat.conics[own].unbind(-1)
    sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
    alpha = (flat.opacities[own] * torch.exp(-sigma.clamp_min(0))).clamp_max(settings.max_alpha)
    alpha = torch.where((sigma >= 0) & (alpha >= settings.alpha_min), alpha, torch.zeros_like(alpha))
    after = torch.cumprod(1 - alpha, 1)
    before = torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], 1)
    # Once the transmittance would fall to the stop it stays below, so a mask on it is the sequential "stop".
    return torch.where(after > settings.transmittance_stop, before * alpha, torch.zeros_like(alpha))
