"""A map as a few directional lights: greedy splitting of the sphere where a split helps the most."""

from __future__ import annotations

import heapq
import math

import numpy as np
import torch
from torch import Tensor

from near.colour import LUMINANCE
from near.lighting.equirect import resample_equirect, row_solid_angles, texel_directions

ROWS = 128
REFINEMENTS = 3


def directional_samples(rgb: Tensor, count: int = 128) -> tuple[Tensor, Tensor]:
    """Cluster [H, W, 3] into ``count`` directions.

    Returns:
        directions [count, 3] unit, in the map's frame, each the flux-weighted mean of its cluster; flux [count, 3] =
        radiance * steradians. The flux sums to the map's integral. Deterministic.

    A cluster's error is its luminous flux times its angular variance: the cluster with the largest is split across its
    longest axis at the weighted median-variance cut, so bright regions get many small clusters, but a sun of one texel only
    one. A few rounds of nearest-centre reassignment tidy the borders.
    """
    rows = min(ROWS, rgb.shape[0])
    small = resample_equirect(rgb, rows, 2 * rows)
    flux = (small.double() * row_solid_angles(rows, 2 * rows)[:, None, None]).reshape(-1, 3).numpy()
    points = texel_directions(rows, 2 * rows).reshape(-1, 3).double().numpy()
    weight = flux @ LUMINANCE.numpy()
    # A floor keeps black regions covered: without it they would share one meaningless direction.
    floor = max(weight.sum(), 1e-12) * 1e-4 / (4 * math.pi)
    weight = weight + floor * np.repeat(row_solid_angles(rows, 2 * rows).numpy(), 2 * rows)
    label = _split(points, weight, count)
    for _ in range(REFINEMENTS):
        label = _nearest(points, _centres(points, weight, label, count))
    directions = _centres(points, weight, label, count)
    total = np.stack([np.bincount(label, flux[:, c], count) for c in range(3)], -1)
    return torch.from_numpy(directions).float(), torch.from_numpy(total).float()


def _split(points: np.ndarray, weight: np.ndarray, count: int) -> np.ndarray:
    """Greedy splitting; returns a label per point."""
    label = np.zeros(len(points), np.int64)
    parts = {0: np.arange(len(points))}
    heap = [(-_spread(points, weight)[0], 0)]
    while len(parts) < min(count, len(points)):
        _, worst = heapq.heappop(heap)
        index = parts[worst]
        _, axis = _spread(points[index], weight[index])
        order = index[np.argsort(points[index] @ axis, kind="stable")]
        cut = _best_cut(points[order] @ axis, weight[order])
        new = len(parts)
        for key, members in ((worst, order[:cut]), (new, order[cut:])):
            parts[key] = members
            label[members] = key
            # A single texel has no spread and sinks to the bottom of the heap.
            heapq.heappush(heap, (-_spread(points[members], weight[members])[0] if len(members) > 1 else 0.0, key))
    return label


def _spread(points: np.ndarray, weight: np.ndarray) -> tuple[float, np.ndarray]:
    """(weighted sum of squared distances to the mean, longest axis)."""
    total = weight.sum()
    centred = points - (weight @ points) / total
    covariance = (centred * weight[:, None]).T @ centred
    values, axes = np.linalg.eigh(covariance)
    return float(values.sum()), axes[:, -1]


def _best_cut(position: np.ndarray, weight: np.ndarray) -> int:
    """Where to cut sorted points so that the two halves' weighted variances sum to the least."""
    mass, moment = np.cumsum(weight), np.cumsum(weight * position)
    left, right = mass[:-1], mass[-1] - mass[:-1]
    gain = moment[:-1] ** 2 / left + (moment[-1] - moment[:-1]) ** 2 / np.maximum(right, 1e-300)
    return int(np.argmax(gain)) + 1


def _centres(points: np.ndarray, weight: np.ndarray, label: np.ndarray, count: int) -> np.ndarray:
    """[count, 3] unit weighted means."""
    total = np.stack([np.bincount(label, weight * points[:, c], count) for c in range(3)], -1)
    length = np.linalg.norm(total, axis=1, keepdims=True)
    return np.where(length > 0, total / np.maximum(length, 1e-300), [0.0, 0.0, 1.0])


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return (torch.from_numpy(points).float() @ torch.from_numpy(centres).float().T).argmax(1).numpy()
