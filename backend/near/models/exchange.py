"""Light that an object sends to itself: what the directions return that a disc's own visibility hides.

Discs are grouped into patches by the octant they face and by voxel. What a patch receives is a sum over the patches that face it, by
form factors without an occlusion test (what lies behind a wall mostly faces away), scaled so that on the whole as much is received as
is hidden. One matrix per asset serves every light, and a few rounds of it are the object's interreflection: the inside of a mug is lit
by the inside of the mug. Everything is linear in the light. Colours are linear Rec.709.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from near.models.anchors import AnchorCloud
from near.models.material import voxel_mean

PATCHES, SENDERS = 6144, 1024
BOUNCES = 3
NEAREST = 0.6   # voxels: form factors do not grow below this distance
EMPTY = 1e-12


@dataclass(frozen=True)
class Exchange:
    """patch [M] of every disc; sender [P] that a patch is part of; kernel [P, S] form factors from the senders; hidden [P] share of
    the cosine-weighted hemisphere that the object hides; weight [M] areas of the discs, up to a factor, and area [P]."""

    patch: Tensor
    sender: Tensor
    kernel: Tensor
    hidden: Tensor
    weight: Tensor
    area: Tensor

    def of_patches(self, values: Tensor) -> Tensor:
        """Means [P, C] of discs' values [M, C] by area."""
        return voxel_mean(values, self.patch, len(self.area), self.weight)

    def of_senders(self, values: Tensor) -> Tensor:
        """Means [S, C] of patches' values [P, C] by area."""
        return voxel_mean(values, self.sender, int(self.sender[-1]) + 1, self.area)

    def received(self, direct_lin709: Tensor, albedo: Tensor, elsewhere_lin709: Tensor) -> Tensor:
        """Mean radiance [M, C] that hidden directions return to every disc.

        Args: direct_lin709 [M, C] radiance that the discs send on of the light alone; albedo [M, C] or [M, 1]; elsewhere_lin709 [C]
            assumed of hidden directions in which no patch faces the disc.
        """
        direct, albedo, reached = self.of_patches(direct_lin709), self.of_patches(albedo), self.kernel.sum(1, keepdim=True)
        missing = (self.hidden[:, None] - reached).clamp_min(0)
        sent = direct
        for _ in range(BOUNCES):
            mean = (self.kernel @ self.of_senders(sent) + missing * elsewhere_lin709) / (reached + missing).clamp_min(EMPTY)
            sent = direct + albedo * self.hidden[:, None] * mean
        return mean[self.patch]


def build_exchange(cloud: AnchorCloud, resolution: int, senders: int = SENDERS) -> Exchange:
    """The exchange of an asset's discs; about a tenth of a second."""
    octant = (cloud.normals > 0).long() @ torch.tensor([1, 2, 4])
    voxels = int(cloud.voxel.max()) + 1
    _, group = torch.unique(octant * voxels + cloud.voxel, return_inverse=True)
    patch = _joined(group, PATCHES)   # neighbours in number face alike and mostly lie near each other
    weight, count = cloud.radii ** 2, int(patch.max()) + 1
    area = torch.zeros(count).index_add_(0, patch, weight)
    exchange = Exchange(patch, _joined(torch.arange(count), senders), torch.zeros(0), torch.zeros(0), weight, area)
    points, normals = exchange.of_patches(cloud.points), F.normalize(exchange.of_patches(cloud.normals), dim=-1)
    hidden = 1 - exchange.of_patches(cloud.openness[:, None])[:, 0]
    kernel = form_factors(points, normals, exchange.of_senders(points), F.normalize(exchange.of_senders(normals), dim=-1), NEAREST / resolution)
    kernel *= torch.zeros(kernel.shape[1]).index_add_(0, exchange.sender, area)
    reached = kernel.sum(1)
    kernel *= (hidden * area) @ reached / ((reached * area) @ reached).clamp_min(EMPTY)
    return replace(exchange, kernel=kernel, hidden=hidden)


def form_factors(points: Tensor, normals: Tensor, from_points: Tensor, from_normals: Tensor, nearest: float) -> Tensor:
    """[P, S] cosines at both ends over the squared distance, of unit areas without obstacles; ``nearest``: distance below which
    they do not grow."""
    leaving = (normals @ from_points.T - (normals * points).sum(-1, keepdim=True)).clamp_min(0)   # cosine times distance
    arriving = (points @ from_normals.T - (from_normals * from_points).sum(-1)).clamp_min(0)
    return leaving * arriving / (torch.cdist(points, from_points).square() + nearest ** 2).square()


def _joined(rows: Tensor, limit: int) -> Tensor:
    """Rows numbered anew so that at most ``limit`` are left: neighbours become one."""
    return rows // max(1, math.ceil((int(rows.max()) + 1) / limit))
