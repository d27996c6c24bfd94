"""Convolution and resampling on sparse voxels (spec section 11.3)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from near.nn.sparse import SparseTensor, object_counts

OFFSETS = tuple(itertools.product((-1, 0, 1), repeat=3))  # kernel order: x, y, z slowest to fastest
CENTRE = 13


def linear_keys(coords: Tensor, extent: int) -> Tensor:
    """One int64 per (batch, x, y, z) row, ordered lexicographically; 0 <= x, y, z < extent."""
    b, x, y, z = coords.long().unbind(1)
    return ((b * extent + x) * extent + y) * extent + z


def neighbour_pairs(coords: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each of the 27 offsets, the rows that have an occupied neighbour there and that neighbour's row.

    Args: coords int [N, 4]. Returns: 27 pairs (rows, neighbours) of int64 index vectors.
    """
    shifted = coords.long().clone()
    shifted[:, 1:] += 1  # a border of one voxel keeps every neighbour's key inside the grid
    extent = int(shifted[:, 1:].max()) + 2
    keys, order = torch.sort(linear_keys(shifted, extent))
    own = linear_keys(shifted, extent)
    pairs = []
    for dx, dy, dz in OFFSETS:
        wanted = own + (dx * extent + dy) * extent + dz
        at = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
        rows = (keys[at] == wanted).nonzero().squeeze(1)
        pairs.append((rows, order[at[rows]]))
    return pairs


class KernelConv(nn.Module):
    """Holds the weight [out, 3, 3, 3, in] and bias under the published name `conv`."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels_out, 3, 3, 3, channels_in))
        self.bias = nn.Parameter(torch.zeros(channels_out))
        nn.init.kaiming_uniform_(self.weight.view(channels_out, -1), a=5**0.5)


class SubmanifoldConv3(nn.Module):
    """3^3 convolution whose output lives on the input's voxels: out[p] = b + sum_k W[:, k] in[p + k - 1], no flip."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv = KernelConv(channels_in, channels_out)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """feats [N, in] -> [N, out]; only neighbours that exist are multiplied."""
        pairs = x.cached(("neighbours",), lambda: neighbour_pairs(x.coords))
        kernel = self.conv.weight.flatten(1, 3)
        feats = x.feats.to(kernel.dtype)
        out = torch.addmm(self.conv.bias, feats, kernel[:, CENTRE].T)
        for k, (rows, neighbours) in enumerate(pairs):
            if k != CENTRE and len(rows):
                out = out.index_add(0, rows, feats[neighbours] @ kernel[:, k].T) if torch.is_grad_enabled() else \
                    out.index_add_(0, rows, feats[neighbours] @ kernel[:, k].T)
        return x.replace(out)


@dataclass(frozen=True)
class Coarsening:
    """How fine voxels map to coarse ones: parent int64 [N] is the coarse row, coords int32 [M, 4], counts per object,
    children [M] fine voxels per coarse one. ``cache`` is shared by all tensors on the coarse voxels."""

    parent: Tensor
    coords: Tensor
    counts: tuple[int, ...]
    children: Tensor
    cache: dict


def coarsen(x: SparseTensor, factor: int = 2) -> Coarsening:
    """Coarse voxels c // factor in lexicographic (batch, x, y, z) order, cached."""

    def make() -> Coarsening:
        coords = x.coords.clone()
        coords[:, 1:] = torch.div(coords[:, 1:], factor, rounding_mode="floor")
        extent = int(coords[:, 1:].max()) + 1
        keys, parent, children = torch.unique(linear_keys(coords, extent), return_inverse=True, return_counts=True)
        cells = torch.stack([keys // extent**3, keys // extent**2 % extent, keys // extent % extent, keys % extent], 1).int()
        return Coarsening(parent, cells, object_counts(cells), children, {})

    return x.cached(("coarsen", factor), make)


def downsample(x: SparseTensor, factor: int = 2, include_zero: bool = True) -> SparseTensor:
    """Pool features onto coarse voxels.

    Args:
        include_zero: divide by the number of children + 1, as the published models do (spec section 0, trap 4);
            False gives the plain mean.
    """
    to = coarsen(x, factor)
    total = x.feats.new_zeros(len(to.coords), x.feats.shape[1]).index_add(0, to.parent, x.feats)
    pooled = total / (to.children + int(include_zero))[:, None].to(total.dtype)
    return SparseTensor(pooled, to.coords, to.counts, to.cache)


def upsample(coarse: SparseTensor, fine: SparseTensor, factor: int = 2) -> SparseTensor:
    """Copy each coarse feature to its children; voxels and order are those of ``fine``."""
    return fine.replace(coarse.feats[coarsen(fine, factor).parent])
