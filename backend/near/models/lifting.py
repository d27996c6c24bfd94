"""Photo -> voxels: what a picture says about each voxel it sees, and what the nearest seen voxel says of the rest.

The flows read these features as input channels beside the noise, pixel-aligned, so that the photo's colours need not
pass through image tokens (ANALYTIC.md section 6, issue of hidden sides: nearest visible colour as a prior).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from torch import Tensor

from near.geometry.cameras import Camera
from near.models.anchors import AnchorCloud
from near.models.material import voxel_mean
from near.splatting import splat

LIFT_CHANNELS = 23


@dataclass(frozen=True)
class LiftedPhoto:
    """features [L, LIFT_CHANNELS] per voxel; colour [M, 3] display sRGB per anchor and seen [M] its weight 0..1;
    voxel_colour [L, 3] mean display colour of seen anchors, else of the nearest seen voxel."""

    features: Tensor
    colour: Tensor
    seen: Tensor
    voxel_colour: Tensor


def lift_photo(cloud: AnchorCloud, coords: Tensor, resolution: int, srgb: Tensor, alpha: Tensor, camera: Camera) -> LiftedPhoto:
    """Project the anchors into the photo.

    Args:
        srgb: [H, W, 3] display colours 0..1; alpha: [H, W]; camera: the photo's, in asset space, of that size.
    """
    depth = splat(cloud.gaussians(), torch.zeros(len(cloud), 1), camera).depth
    p_cam = cloud.points @ camera.cam_from_world[:3, :3].T + camera.cam_from_world[:3, 3]
    z = p_cam[:, 2].clamp_min(1e-4)
    pixel = (p_cam[:, :2] / z[:, None]) @ camera.K[:2, :2].T + camera.K[:2, 2]
    if camera.projection == "orthographic":
        pixel = p_cam[:, :2] @ camera.K[:2, :2].T + camera.K[:2, 2]
    grid = (pixel / torch.tensor([camera.width, camera.height]) * 2 - 1)[None, None]
    # Colours at the matte's rim mix with the background: take them un-premultiplied and trust them by coverage.
    stack = torch.cat([srgb * alpha[..., None], alpha[..., None]], -1).permute(2, 0, 1)[None]
    sample = F.grid_sample(stack, grid, align_corners=False, padding_mode="zeros")[0, :, 0].T
    surface_z = F.grid_sample(depth.nan_to_num(posinf=1e4)[None, None], grid, mode="nearest", align_corners=False)[0, 0, 0]
    to_eye = F.normalize(camera.position - cloud.points, dim=-1)
    facing = (cloud.disc_normals * to_eye).sum(-1)
    pixel_size = z / camera.K[0, 0]
    margin = 2.0 * cloud.radii + 2.0 * pixel_size / facing.clamp_min(0.15)
    seen = ((p_cam[:, 2] < surface_z + margin) & (facing > 0.05) & (sample[:, 3] > 0.5)).float()
    seen = seen * sample[:, 3] * facing.clamp(0, 1).sqrt()
    colour = sample[:, :3] / sample[:, 3:].clamp_min(1e-3)

    count = len(coords)
    share = voxel_mean(seen[:, None], cloud.voxel, count)
    mean = voxel_mean(colour, cloud.voxel, count, seen)
    spread = (voxel_mean(colour ** 2, cloud.voxel, count, seen) - mean ** 2).clamp_min(0).sqrt()
    centres = (coords.float() + 0.5) / resolution - 0.5
    known = share[:, 0] > 0.02
    distance = torch.zeros(count, 1)
    if known.any() and not known.all():
        gap, nearest = cKDTree(centres[known].numpy()).query(centres[~known].numpy())
        mean[~known] = mean[known][torch.from_numpy(nearest)]
        distance[~known, 0] = torch.from_numpy(gap).float()
    normal = voxel_mean(cloud.normals, cloud.voxel, count)
    view = F.normalize(camera.position - centres, dim=-1)
    object_mean = (mean * share).sum(0) / share.sum().clamp_min(1e-6)
    features = torch.cat([
        mean * 2 - 1, spread * 4, share, distance * 4, known.float()[:, None],
        voxel_mean(facing[:, None], cloud.voxel, count), normal, voxel_mean(cloud.openness[:, None], cloud.voxel, count) * 2 - 1,
        view, centres * 2, (object_mean * 2 - 1).expand(count, 3),
    ], -1)
    return LiftedPhoto(features, colour, seen, mean)
