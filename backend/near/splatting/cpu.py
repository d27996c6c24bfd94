"""The splatter on the CPU: compiled, threaded, not differentiable."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from near.geometry.cameras import Camera
from near.splatting import binning, blending
from near.splatting.threads import run_shared
from near.splatting.types import Gaussians, Splat, SplatSettings

MAX_ENTRIES = 1 << 26  # of the tile lists held at once; a frame that needs more is done in bands of tile rows


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().to(device="cpu", dtype=torch.float32).numpy())


Band = tuple[int, np.ndarray, np.ndarray]  # first tile row, starts int64 [tiles + 1], entries int32


@dataclass(frozen=True, eq=False)
class Scene:
    """Projected Gaussians of one camera, sorted: packed [M, 8], rects [M, 4], order [count]."""

    packed: np.ndarray
    rects: np.ndarray
    order: np.ndarray
    tiles_x: int
    tiles_y: int


def prepare(gaussians: Gaussians, camera: Camera, settings: SplatSettings) -> Scene:
    """Project and sort."""
    count = len(gaussians)
    arrays = [_array(t) for t in gaussians.tensors()]
    K = camera.K.double().numpy()
    lens = np.array([K[0, 0], K[1, 1], K[0, 2], K[1, 2]])
    view = np.ascontiguousarray(camera.cam_from_world.double().numpy()[:3])
    packed = np.empty((count, binning.FIELDS), np.float32)
    rects, keys = np.empty((count, 4), np.int32), np.empty(count, np.uint32)

    def task(k: int, n: int) -> None:
        binning.project(count * k // n, count * (k + 1) // n, *arrays, view, lens, camera.width, camera.height, camera.near, camera.far,
                        camera.projection == "perspective", settings.eps2d, settings.antialiased, settings.alpha_min, packed, rects, keys)

    run_shared(task)
    order, spare = np.empty(count, np.int32), np.empty(count, np.int32)
    drawn = binning.sort_by_depth(rects, keys, order, spare)
    return Scene(packed, rects, order[:drawn], -(-camera.width // binning.TILE), -(-camera.height // binning.TILE))


def tile_bands(scene: Scene) -> Iterator[Band]:
    """Tile lists of bands that cover the frame; nearly always one band. entries[starts[t] : starts[t + 1]] are tile t's."""
    top = 0
    height = scene.tiles_y
    while top < scene.tiles_y:
        bottom = min(scene.tiles_y, top + height)
        starts = np.empty((bottom - top) * scene.tiles_x + 1, np.int64)
        binning.count_tiles(scene.order, len(scene.order), scene.rects, scene.tiles_x, top, bottom, starts)
        if starts[-1] > MAX_ENTRIES and bottom - top > 1:
            height = max(1, (bottom - top) // 2)
            continue
        entries = np.empty(starts[-1], np.int32)
        binning.fill_tiles(scene.order, len(scene.order), scene.rects, scene.tiles_x, top, bottom, starts, entries)
        yield top, starts, entries
        top = bottom


def splat_cpu(gaussians: Gaussians, channels: Tensor, camera: Camera, settings: SplatSettings, box: int = 1) -> Splat:
    """See :func:`near.splatting.splat`; ``camera`` is that of the rasterised frame, whose box x box pixels are averaged."""
    scene = prepare(gaussians, camera, settings)
    count = channels.shape[1]
    values = np.empty((len(gaussians), count + 2), np.float32)
    values[:, :count], values[:, count], values[:, count + 1] = _array(channels), 1, scene.packed[:, binning.DEPTH]
    size = camera.height // box, camera.width // box
    out, alpha, depth = np.empty((*size, count), np.float32), np.empty(size, np.float32), np.empty(size, np.float32)

    def task(k: int, n: int, band: Band) -> None:
        blending.blend(k, n, scene.tiles_x, *band, scene.packed, values.reshape(-1), count, settings.max_alpha,
                       settings.transmittance_stop, box, out, alpha, depth)

    for band in tile_bands(scene):
        run_shared(partial(task, band=band))
    return Splat(*map(torch.from_numpy, (out, alpha, depth)))


def seen_cpu(gaussians: Gaussians, camera: Camera, settings: SplatSettings, floor: float) -> Tensor:
    """See :func:`near.splatting.visible`."""
    scene = prepare(gaussians, camera, settings)
    seen = np.zeros(len(gaussians), np.bool_)

    def task(k: int, n: int, band: Band) -> None:
        blending.mark_seen(k, n, scene.tiles_x, *band, scene.packed, settings.max_alpha, settings.transmittance_stop,
                           camera.height, camera.width, floor, seen)

    for band in tile_bands(scene):
        run_shared(partial(task, band=band))
    return torch.from_numpy(seen)


def weights_cpu(gaussians: Gaussians, camera: Camera, settings: SplatSettings) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`near.splatting.splat_weights`."""
    scene = prepare(gaussians, camera, settings)
    counts = np.zeros(camera.width * camera.height, np.int64)
    indptr = np.zeros(len(counts) + 1, np.int64)

    def task(k: int, n: int, band: Band, *target: np.ndarray) -> None:
        blending.pixel_weights(k, n, scene.tiles_x, *band, scene.packed, settings.max_alpha, settings.transmittance_stop,
                               camera.height, camera.width, counts, *target)

    nowhere = np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.float32)
    for band in tile_bands(scene):
        run_shared(lambda k, n, band=band: task(k, n, band, *nowhere))
    np.cumsum(counts, out=indptr[1:])
    index, weights = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.float32)
    if len(index):
        target = indptr[:-1].copy(), index, weights
        for band in tile_bands(scene):
            run_shared(lambda k, n, band=band: task(k, n, band, *target))
    return torch.from_numpy(indptr), torch.from_numpy(index), torch.from_numpy(weights)
