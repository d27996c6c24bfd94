"""Surface anchors: the discs that carry a compact asset's shape, detail and visibility.

`spec/ANALYTIC.md` sections 4 to 6: the number of Gaussians decides, not the number of voxels; position, disc and
normal come from the surface without learning. The SLAT holds one material per voxel; an anchor holds only what
differs from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from torch import Tensor

from near.assets import Anchors
from near.geometry.cameras import Camera
from near.geometry.neighbours import nearest
from near.models.shading import Surface
from near.models.visibility import bake_visibility, evaluate_visibility
from near.splatting import Gaussians

NORMAL_STEP, DETAIL_STEP = 1 / 127, 2 / 127
VISIBILITY_STEP = 4.0 / 127  # the first coefficient of a free disc is sqrt(4 pi) = 3.54
HIDDEN_OPENNESS = 0.02  # surface that nothing can see is dropped (ANALYTIC.md section 3)
SHEET_OPENNESS = 0.15  # the back of a disc that sees more than this is a side of its own
FLATNESS = 0.05  # thickness of a disc, relative to its radius


@dataclass(frozen=True)
class AnchorCloud:
    """Decoded anchors, asset space.

    voxel [M] row of the anchor's voxel; points, normals (shading), disc_normals (geometric) [M, 3]; radii [M] standard
    deviation of the disc; detail [M, 5]; visibility [M, K]; openness [M].
    """

    voxel: Tensor
    points: Tensor
    normals: Tensor
    disc_normals: Tensor
    radii: Tensor
    detail: Tensor
    visibility: Tensor
    openness: Tensor

    def __len__(self) -> int:
        return len(self.voxel)

    def gaussians(self, opacity: float = 0.99, scale: float = 1.0) -> Gaussians:
        """The discs as flat Gaussians."""
        quats = quaternion_from_z(self.disc_normals)
        s = self.radii * scale
        return Gaussians(self.points, quats, torch.stack([s, s, s * FLATNESS], -1), torch.full_like(s, opacity))

    def surface(self, material: Tensor) -> Surface:
        """Attributes for shading; ``material`` [M, 5] is base colour (linear), roughness, metallic."""
        return Surface(self.normals, material[:, :3], material[:, 3], material[:, 4], self.visibility, self.openness,
                       self.radii ** 2)


def quaternion_from_z(normals: Tensor) -> Tensor:
    """Shortest rotation that takes +Z to each unit normal: [M, 4] (w, x, y, z)."""
    x, y, z = normals.unbind(-1)
    # At -Z the shortest rotation is undefined; half a turn about X serves.
    q = torch.stack([1 + z, -y, x, torch.zeros_like(z)], -1)
    q = torch.where((z < -0.9999)[:, None], torch.tensor([0.0, 1.0, 0.0, 0.0], device=q.device), q)
    return F.normalize(q, dim=-1)


def view_directions(points: Tensor, camera: Camera) -> Tensor:
    """Unit vectors [M, 3] from points to the camera (its frame is the points')."""
    if camera.projection == "orthographic":
        return (-camera.cam_from_world[2, :3]).expand_as(points)
    return F.normalize(camera.position - points, dim=-1)


def front_facing(cloud: AnchorCloud, camera: Camera) -> Tensor:
    """Rows of the discs that face the camera; the others are another side's back."""
    return torch.nonzero((cloud.disc_normals * view_directions(cloud.points, camera)).sum(-1) > 0)[:, 0]


def disc_radii(points: Tensor, neighbours: int = 6) -> Tensor:
    """Mean distance to the nearest neighbours, [M]: follows uneven sampling."""
    distance, _ = nearest(cKDTree(points.numpy()), points.numpy(), min(neighbours + 1, len(points)))
    return torch.from_numpy(distance[:, 1:].mean(1).astype(np.float32)).clamp(1e-4, 0.1)


def build_anchors(points: Tensor, normals: Tensor, disc_normals: Tensor, resolution: int, *,
                  spread: float) -> tuple[Tensor, Anchors, Tensor]:
    """Sort surface samples into voxels and bake their visibility.

    Args:
        points: [N, 3] in [-0.5, 0.5]; normals: shading normals [N, 3]; disc_normals: geometric normals [N, 3].
        resolution: voxels per side. spread: disc radius (standard deviation) over the mean neighbour distance.
    Returns:
        coords uint8 [L, 3] in lexicographic order, the quantised anchors (detail zero), and the row of ``points`` each
        anchor came from, int64 [M].
    """
    spacing = disc_radii(points)
    (front, front_openness), (back, back_openness) = bake_visibility(points, disc_normals, spacing)
    # A thin sheet gets a second disc for its other side, so that discs can be one-sided everywhere.
    source = torch.arange(len(points)).repeat(2)
    openness = torch.cat([front_openness, torch.where(back_openness > SHEET_OPENNESS, back_openness, 0.0)])
    coefficients = torch.cat([front, back])
    points, spacing = points[source], spacing[source]
    normals, disc_normals = torch.cat([normals, -normals]), torch.cat([disc_normals, -disc_normals])
    cell = ((points + 0.5) * resolution).floor().clamp(0, resolution - 1).long()
    keep = torch.nonzero(openness > HIDDEN_OPENNESS)[:, 0]
    key = (cell[:, 0] * resolution + cell[:, 1]) * resolution + cell[:, 2]
    order = keep[torch.argsort(key[keep], stable=True)]
    unique, counts = torch.unique_consecutive(key[order], return_counts=True)
    coords = torch.stack([unique // (resolution * resolution), unique // resolution % resolution, unique % resolution], -1)
    inside = (points[order] + 0.5) * resolution - cell[order]
    anchors = Anchors(
        counts=counts.int(),
        offsets=(inside * 256).floor().clamp(0, 255).to(torch.uint8),
        normals=_quantise(normals[order], NORMAL_STEP),
        disc_normals=_quantise(disc_normals[order], NORMAL_STEP),
        radii=(spacing[order] * spread).half(),
        detail=torch.zeros(len(order), 5, dtype=torch.int8),
        visibility=_quantise(coefficients[order], VISIBILITY_STEP))
    return coords.to(torch.uint8), anchors, source[order]


def stored_detail(detail: Tensor) -> Tensor:
    """Discs' encoded residuals [M, 5] to their voxels' materials as an asset stores them; :func:`decode_anchors` reads them back."""
    return _quantise(detail, DETAIL_STEP)


def decode_anchors(coords: Tensor, anchors: Anchors, resolution: int) -> AnchorCloud:
    """Positions, normals and visibility in floating point (inverse of :func:`build_anchors`)."""
    voxel = torch.repeat_interleave(torch.arange(len(coords)), anchors.counts.long())
    points = (coords[voxel].float() + (anchors.offsets.float() + 0.5) / 256) / resolution - 0.5
    normals = F.normalize(anchors.normals.float(), dim=-1)
    visibility = anchors.visibility.float() * VISIBILITY_STEP
    return AnchorCloud(voxel, points, normals, F.normalize(anchors.disc_normals.float(), dim=-1), anchors.radii.float(),
                       anchors.detail.float() * DETAIL_STEP, visibility, openness(visibility, normals))


def openness(visibility: Tensor, normals: Tensor) -> Tensor:
    """Cosine-weighted mean visibility of the upper hemisphere, [M], from the harmonics' own clamped-cosine integral."""
    # Projection of max(cos, 0) / pi onto zonal bands 0..4: it turns the mean into one evaluation along the normal.
    bands = torch.tensor([1.0, 2 / 3, 1 / 4, 0.0, -1 / 24])
    order = int(visibility.shape[1] ** 0.5) - 1
    zonal = torch.repeat_interleave(bands[: order + 1], torch.tensor([2 * b + 1 for b in range(order + 1)]))
    return evaluate_visibility(visibility * zonal.to(visibility), normals)


def _quantise(values: Tensor, step: float) -> Tensor:
    return (values / step).round().clamp(-127, 127).to(torch.int8)
