"""Sparse voxel tensors: a feature row and an integer position for every occupied voxel of every object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from near.errors import NearError
from near.nn.groups import RowGroups, object_groups, window_groups


def object_counts(coords: Tensor) -> tuple[int, ...]:
    """Voxels per object, from coords int [N, 4] of (batch, x, y, z) rows with objects contiguous and numbered 0, 1, ...

    Raises:
        NearError: ``sparse-coords`` when the table has another shape, is empty, or mixes the objects' rows.
    """
    if coords.ndim != 2 or coords.shape[1] != 4 or coords.shape[0] == 0 or coords.is_floating_point():
        raise NearError("sparse-coords", f"A voxel table must be integers [N, 4] with N > 0, not {coords.dtype} {tuple(coords.shape)}.",
                        "Check that the asset holds voxels and was saved by a supported version.")
    batch = coords[:, 0].long()
    objects, counts = torch.unique_consecutive(batch, return_counts=True)
    if not torch.equal(objects, torch.arange(len(objects), device=objects.device)):
        raise NearError("sparse-coords", "The voxels of a batch are not grouped by object.",
                        "Sort the voxel rows by their batch index, counted from 0 without gaps.")
    return tuple(counts.tolist())


@dataclass(frozen=True, eq=False)
class SparseTensor:
    """Features on occupied voxels.

    Attributes:
        feats: [N, C].
        coords: int32 [N, 4], rows (batch, x, y, z); the rows of one object are contiguous.
        counts: voxels per object, summing to N.

    Index structures (windows, convolution neighbours) are computed once per coordinate set and shared by every tensor
    made with `replace`. Build with `SparseTensor.create`, which checks the coordinates.
    """

    feats: Tensor
    coords: Tensor
    counts: tuple[int, ...]
    cache: dict = field(default_factory=dict, repr=False)

    @classmethod
    def create(cls, feats: Tensor, coords: Tensor) -> "SparseTensor":
        """Check and wrap; ``coords`` may also be [N, 3] (x, y, z) of a single object."""
        if coords.ndim == 2 and coords.shape[1] == 3:
            coords = torch.cat([torch.zeros_like(coords[:, :1]), coords], 1)
        counts = object_counts(coords)
        if feats.ndim != 2 or len(feats) != len(coords):
            raise NearError("sparse-feats", f"Features {tuple(feats.shape)} do not fit {len(coords)} voxels.",
                            "Check that the asset's features and voxels belong together.")
        return cls(feats, coords.int(), counts)

    def replace(self, feats: Tensor) -> "SparseTensor":
        """The same voxels with other features [N, C']."""
        return SparseTensor(feats, self.coords, self.counts, self.cache)

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def num_objects(self) -> int:
        return len(self.counts)

    def slices(self) -> list[slice]:
        """The rows of each object."""
        return row_slices(self.counts)

    def windows(self, window: int, shift: int = 0) -> RowGroups:
        """Voxels grouped by cubic window (`near.nn.groups.window_groups`), cached."""
        return self.cached(("windows", window, shift), lambda: window_groups(self.coords, window, shift))

    def objects(self) -> RowGroups:
        """Voxels grouped by object, cached."""
        return self.cached(("objects",), lambda: object_groups(self.counts, self.coords.device))

    def cached(self, key: tuple, make):
        """``make()`` once per coordinate set."""
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]


def row_slices(counts: Sequence[int]) -> list[slice]:
    """Contiguous row ranges of the given lengths."""
    slices, start = [], 0
    for n in counts:
        slices.append(slice(start, start + n))
        start += n
    return slices


def per_row(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Expand one row per object [B, ...] to one per voxel [N, ...] (or [1, ...], which broadcasts, for one object)."""
    if len(counts) == 1 or len(values) == 1:
        return values[:1]
    return values.repeat_interleave(torch.tensor(counts, device=values.device), 0, output_size=sum(counts))
