"""Partitions of rows into groups that attend among themselves: whole objects, or cubic windows of voxels.

Groups have very different lengths. Instead of a loop over them, groups of similar length are padded to one length and
attended in one call; where a variable-length kernel exists (CUDA, 16-bit) no padding is needed at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BUCKET_GROWTH = 1.25  # groups whose lengths differ by less than this share one padded batch


@dataclass(frozen=True)
class Bucket:
    """Groups of similar length, padded to L rows each.

    index: int64 [W, L] row of every slot (an arbitrary valid row where padded); mask: bool [W, L], or None when nothing
    is padded; slots: int64 positions of the real rows in the flattened [W * L] grid.
    """

    index: Tensor
    mask: Tensor | None
    slots: Tensor


@dataclass(frozen=True)
class RowGroups:
    """A partition of N rows.

    Attributes:
        lengths: rows per group.
        order: int64 [N], rows sorted by group, or None when they already are.
        inverse: int64 [N], the inverse permutation, or None.
        boundaries: int32 [W + 1], cumulative lengths in sorted order.
        buckets: the padded batches; their concatenated ``slots`` are in the order of ``bucket_inverse``.
        bucket_inverse: int64 [N], position of each row in the concatenation over buckets.
    """

    lengths: tuple[int, ...]
    order: Tensor | None
    inverse: Tensor | None
    boundaries: Tensor
    buckets: tuple[Bucket, ...]
    bucket_inverse: Tensor | None

    @property
    def uniform(self) -> bool:
        """All groups are equally long and contiguous: a plain reshape batches them."""
        return self.order is None and len(set(self.lengths)) == 1


def group_rows(labels: Tensor) -> RowGroups:
    """Partition by label.

    Args:
        labels: int64 [N]; rows with equal labels form a group. Order inside a group is the row order.
    """
    values, order = torch.sort(labels, stable=True)
    _, counts = torch.unique_consecutive(values, return_counts=True)
    return _build(counts, order)


def object_groups(counts: Sequence[int], device: torch.device | str = "cpu") -> RowGroups:
    """One group per object, for contiguous objects of the given lengths."""
    return _build(torch.tensor(list(counts), device=device), None)


def window_labels(coords: Tensor, window: int, shift: int = 0) -> Tensor:
    """Window id of each voxel (spec section 2): floor((c + shift) / window) per axis and object, no cyclic wrap.

    Args:
        coords: int [N, 4] rows (batch, x, y, z).
        window: edge of a window in voxels. shift: added to every coordinate first.

    Returns:
        int64 [N] labels, equal exactly within a window.
    """
    cell = torch.div(coords[:, 1:].long() + shift, window, rounding_mode="floor")
    cell = cell - cell.amin(0)
    span = cell.amax(0) + 1
    return ((coords[:, 0].long() * span[0] + cell[:, 0]) * span[1] + cell[:, 1]) * span[2] + cell[:, 2]


def window_groups(coords: Tensor, window: int, shift: int = 0) -> RowGroups:
    """Partition voxels into windows; see `window_labels`."""
    return group_rows(window_labels(coords, window, shift))


def _build(counts: Tensor, order: Tensor | None) -> RowGroups:
    lengths = counts.tolist()
    total, device = sum(lengths), counts.device
    ends = counts.cumsum(0)
    starts = ends - counts
    boundaries = torch.cat([starts, ends[-1:]]).int()
    inverse = None
    if order is not None:
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(total, device=device)
    if order is None and len(set(lengths)) == 1:
        return RowGroups(tuple(lengths), None, None, boundaries, (), None)
    buckets, rows = [], []
    for members in _similar_lengths(lengths):
        longest = lengths[members[-1]]
        chosen = torch.tensor(members, device=device)
        slot = torch.arange(longest, device=device)
        mask = slot < counts[chosen, None]
        index = torch.where(mask, starts[chosen, None] + slot, starts[chosen, None])
        if order is not None:
            index = order[index]
        padded = lengths[members[0]] != longest
        slots = mask.flatten().nonzero().squeeze(1) if padded else torch.arange(mask.numel(), device=device)
        buckets.append(Bucket(index, mask if padded else None, slots))
        rows.append(index.flatten()[slots])
    rows = torch.cat(rows)
    bucket_inverse = torch.empty_like(rows)
    bucket_inverse[rows] = torch.arange(total, device=device)
    return RowGroups(tuple(lengths), order, inverse, boundaries, tuple(buckets), bucket_inverse)


def _similar_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Group indices with similar lengths, ascending; each list is sorted by length."""
    batches: list[list[int]] = []
    limit = -1.0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if lengths[i] > limit:
            batches.append([])
            limit = max(lengths[i] * BUCKET_GROWTH, lengths[i] + 4)
        batches[-1].append(i)
    return batches
