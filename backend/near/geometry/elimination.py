"""Even thinning of random surface samples."""

from __future__ import annotations

import numpy as np
from numba import njit

_MAX_CELLS_A_SIDE = 192
PIECE = 16_384  # points a compiled call works on: between the calls the work can be cancelled


def eliminate_samples(points: np.ndarray, normals: np.ndarray, count: int, area: float) -> np.ndarray:
    """Rows of ``count`` evenly spread points out of many: weighted sample elimination (Yuksel 2015), which removes the most
    crowded point until ``count`` are left. Points whose normals face apart belong to different skins and do not crowd
    each other.

    Args: points, normals [M, 3]; area: of the surface they were drawn from.
    Returns: int64 [count], ascending.
    """
    if count >= len(points):
        return np.arange(len(points))
    reach = 2 * np.sqrt(area / (2 * np.sqrt(3) * count))
    low, extent = points.min(0), float(np.ptp(points, axis=0).max())
    side = int(np.clip(extent / reach, 1, _MAX_CELLS_A_SIDE))
    width = max(extent / side * (1 + 1e-6), reach)
    cell = np.minimum(((points - low) / width).astype(np.int64), side - 1)
    key = (cell[:, 0] * side + cell[:, 1]) * side + cell[:, 2]
    order = np.argsort(key, kind="stable")
    start = np.searchsorted(key[order], np.arange(side ** 3 + 1)).astype(np.int32)
    # Sorted by cell, neighbours lie near each other in memory.
    pairs = _neighbours(np.ascontiguousarray(points[order], np.float32), np.ascontiguousarray(normals[order], np.float32),
                        cell[order].astype(np.int32), start, side, np.float32(reach))
    alive = _eliminate(*pairs, count)
    return np.sort(order[alive])


@njit(cache=True)
def _near(points, normals, i, j, reach2):
    dx, dy, dz = points[i, 0] - points[j, 0], points[i, 1] - points[j, 1], points[i, 2] - points[j, 2]
    d2 = dx * dx + dy * dy + dz * dz
    if d2 >= reach2:
        return np.float32(-1)
    if normals[i, 0] * normals[j, 0] + normals[i, 1] * normals[j, 1] + normals[i, 2] * normals[j, 2] <= 0:
        return np.float32(-1)
    return d2


def _neighbours(points, normals, cell, start, side, reach):
    """CSR of crowding weights (1 - d / reach)^8; i's row holds every j != i within reach."""
    m = len(points)
    indptr = np.zeros(m + 1, np.int64)
    nothing = np.empty(0, np.int32), np.empty(0, np.float32)
    for first in range(0, m, PIECE):
        _gather(points, normals, cell, start, side, reach, first, min(first + PIECE, m), indptr, *nothing)
    np.cumsum(indptr, out=indptr)
    indices, weights = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.float32)
    for first in range(0, m, PIECE):
        _gather(points, normals, cell, start, side, reach, first, min(first + PIECE, m), indptr, indices, weights)
    return indptr, indices, weights


@njit(cache=True)
def _gather(points, normals, cell, start, side, reach, first, last, indptr, indices, weights):
    """Rows first to last: counts them into indptr[i + 1] while ``indices`` is empty, else fills them."""
    fill = len(indices) > 0
    for i in range(first, last):
        n = indptr[i]
        found = 0
        for x in range(max(cell[i, 0] - 1, 0), min(cell[i, 0] + 2, side)):
            for y in range(max(cell[i, 1] - 1, 0), min(cell[i, 1] + 2, side)):
                row = (x * side + y) * side
                for j in range(start[row + max(cell[i, 2] - 1, 0)], start[row + min(cell[i, 2] + 1, side - 1) + 1]):
                    if j == i:
                        continue
                    d2 = _near(points, normals, i, j, reach * reach)
                    if d2 >= 0:
                        if fill:
                            w = 1 - np.sqrt(d2) / reach
                            w *= w
                            w *= w
                            indices[n + found] = j
                            weights[n + found] = w * w
                        found += 1
        if not fill:
            indptr[i + 1] = found


@njit(cache=True)
def _sift_down(heap, place, crowd, k, size):
    item = heap[k]
    while True:
        child = 2 * k + 1
        if child >= size:
            break
        if child + 1 < size and crowd[heap[child + 1]] > crowd[heap[child]]:
            child += 1
        if crowd[heap[child]] <= crowd[item]:
            break
        heap[k] = heap[child]
        place[heap[k]] = k
        k = child
    heap[k] = item
    place[item] = k


def _eliminate(indptr, indices, weights, count):
    """Rows that remain."""
    m = len(indptr) - 1
    crowd, heap, place, alive = np.zeros(m, np.float32), np.arange(m, dtype=np.int32), np.arange(m, dtype=np.int32), np.ones(m, np.bool_)
    _crowding(indptr, weights, crowd, heap, place)
    for size in range(m, count, -PIECE):
        _remove(indptr, indices, weights, crowd, heap, place, alive, size, max(size - PIECE, count))
    return np.nonzero(alive)[0]


@njit(cache=True)
def _crowding(indptr, weights, crowd, heap, place):
    m = len(crowd)
    for i in range(m):
        total = np.float32(0)
        for k in range(indptr[i], indptr[i + 1]):
            total += weights[k]
        crowd[i] = total
    for k in range(m // 2 - 1, -1, -1):
        _sift_down(heap, place, crowd, k, m)


@njit(cache=True)
def _remove(indptr, indices, weights, crowd, heap, place, alive, size, least):
    for end in range(size - 1, least - 1, -1):
        worst = heap[0]
        alive[worst] = False
        heap[0] = heap[end]
        place[heap[0]] = 0
        _sift_down(heap, place, crowd, 0, end)
        for k in range(indptr[worst], indptr[worst + 1]):
            j = indices[k]
            if alive[j]:
                crowd[j] -= weights[k]
                _sift_down(heap, place, crowd, place[j], end)
