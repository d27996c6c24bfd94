"""A closed mesh from a photo's matte alone: the silhouette, inflated.

The half thickness solves a Poisson equation inside the matte (laplacian = -4, zero on the contour; its square root is
exactly a sphere over a disc, and a rounded bar over a strip). Front and back are moved along the rays of the photo's
camera, so the mesh projects back onto the matte whatever the thickness.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from scipy.sparse import coo_matrix, diags
from scipy.sparse.linalg import spsolve

from near.errors import NearError
from near.geometry.cameras import Camera
from near.geometry.mesh import Material, PbrMesh, RawMesh, to_asset_space
from near.geometry.normals import face_normals
from near.geometry.photo import Photo, no_object
from near.geometry.textures import SRGB_TO_LINEAR

# Cell corners in order (top left, top right, bottom right, bottom left) and edges (top, right, bottom, left): the part of
# a cell that is inside, as polygons over corners 0-3 and edge crossings 4-7, for each of the 16 patterns. Wound like the
# corners; the two saddles are cut into two corners, the same way from every side.
_POLYGONS = {0: (), 1: ((0, 4, 7),), 2: ((4, 1, 5),), 3: ((0, 1, 5, 7),), 4: ((5, 2, 6),), 5: ((0, 4, 7), (5, 2, 6)), 6: ((4, 1, 2, 6),),
             7: ((0, 1, 2, 6, 7),), 8: ((7, 6, 3),), 9: ((0, 4, 6, 3),), 10: ((4, 1, 5), (7, 6, 3)), 11: ((0, 1, 5, 6, 3),), 12: ((7, 5, 2, 3),),
             13: ((0, 4, 5, 2, 3),), 14: ((4, 1, 2, 3, 7),), 15: ((0, 1, 2, 3),)}


@dataclass(frozen=True)
class SilhouetteSettings:
    """cells: grid cells along the matte's longer side. fullness: half thickness relative to the Poisson solution (1: a disc
    becomes a sphere). max_thickness: of the whole object, relative to the matte's longer side. speck: parts smaller than this
    share of the largest are dropped. roughness: of the material."""

    cells: int = 224
    fullness: float = 0.8
    max_thickness: float = 0.8
    speck: float = 1e-3
    roughness: float = 0.6

    def __post_init__(self) -> None:
        if not (16 <= self.cells <= 1024 and 0 < self.fullness <= 2 and 0 < self.max_thickness <= 2 and 0 <= self.speck < 1):
            raise ValueError(f"silhouette settings out of range: {self}")


def silhouette_mesh(photo: Photo, camera: Camera, settings: SilhouetteSettings = SilhouetteSettings()) -> tuple[PbrMesh, Camera]:
    """Inflate the photo's matte.

    Args:
        photo: with a matte. camera: the photo's, of its size; the object is put where it looks past the origin.
    Returns:
        A watertight mesh in asset space (several parts and holes stay) with the photo's colours at its vertices, mirrored to
        the back; and ``camera`` seen from that asset space: the mesh projects onto the matte there.
    Raises:
        NearError: ``photo-no-object``; ``camera-behind`` when the origin is not in front of the camera; ``camera-size``
            when the camera is not of the photo's size.
    """
    if (camera.height, camera.width) != tuple(photo.alpha.shape):
        raise NearError("camera-size", f"The camera is {camera.width} x {camera.height}, the photo {photo.alpha.shape[1]} x {photo.alpha.shape[0]} pixels.",
                        "Use a camera of the photo's size.")
    distance = float(camera.cam_from_world[2, 3])
    if camera.projection == "perspective" and distance <= camera.near:
        raise NearError("camera-behind", "The photo's camera does not look towards the origin.", "Aim the camera at the object, which stands at the origin.")
    grid = _Grid.of(photo, settings)
    height = _half_thickness(grid.inside, settings) * grid.pixels_per_cell / float(camera.K.diagonal()[:2].double().prod()) ** 0.5
    if camera.projection == "perspective":
        height = height * distance
    pixels, depth, faces = _shell(grid, height)
    world = _unproject(pixels, depth + distance, camera)
    normals = np.zeros_like(world)
    scaled = face_normals(world, faces)
    for k in range(3):
        np.add.at(normals, faces[:, k], scaled)
    raw = RawMesh(world, faces, normals, colors=_colours(photo, pixels), materials=(Material("photo", roughness=settings.roughness),))
    mesh = to_asset_space(raw, photo.sha256, "The silhouette")
    return mesh, camera.moved(mesh.source_from_asset)


@dataclass(frozen=True)
class _Grid:
    """The matte on a coarse grid of nodes: ``value`` minus one half changes sign at the contour; node (i, j) is at pixel
    ``origin + pixels_per_cell * (j, i)``. The outermost ring is outside."""

    value: np.ndarray
    inside: np.ndarray
    origin: np.ndarray
    pixels_per_cell: float

    @staticmethod
    def of(photo: Photo, s: SilhouetteSettings) -> _Grid:
        alpha = photo.alpha.numpy().astype(np.float64)
        rows, columns = np.nonzero(alpha > 0.5)
        if not len(rows):
            raise no_object()
        low = np.array([columns.min(), rows.min()], float)
        extent = np.array([columns.max() + 1, rows.max() + 1]) - low
        step = max(float(extent.max()) / s.cells, 0.5)
        count = np.ceil(extent / step).astype(int) + 5
        origin = low + extent / 2 - (count - 1) / 2 * step
        # A mean over the cell keeps parts thinner than a cell from flickering in and out.
        blurred = ndimage.gaussian_filter(np.pad(alpha, 8), 0.35 * step) if step > 1.5 else np.pad(alpha, 8)
        y, x = np.meshgrid(origin[1] + step * np.arange(count[1]), origin[0] + step * np.arange(count[0]), indexing="ij")
        value = ndimage.map_coordinates(blurred, [y - 0.5 + 8, x - 0.5 + 8], order=1, mode="constant")
        value[[0, -1]] = value[:, [0, -1]] = 0
        labels, parts = ndimage.label(value > 0.5, np.ones((3, 3)))
        if not parts:
            raise no_object()
        size = ndimage.sum_labels(np.ones_like(value), labels, np.arange(1, parts + 1))
        kept = np.concatenate([[False], size >= max(s.speck * size.max(), 2)])
        inside = kept[labels]
        if not inside.any():
            raise no_object()
        # Dropped parts must be outside, kept ones strictly inside, so that every crossing lies on an edge.
        value = np.where(inside, np.maximum(value, 0.5 + 1e-3), np.minimum(value, 0.5 - 1e-3))
        return _Grid(value, inside, origin, step)


def _half_thickness(inside: np.ndarray, s: SilhouetteSettings) -> np.ndarray:
    """[h, w] in cells, zero outside."""
    index = np.full(inside.shape, -1)
    index[inside] = np.arange(inside.sum())
    rows, columns = [], []
    for a, b in ((index[:, :-1], index[:, 1:]), (index[:-1], index[1:])):
        both = (a >= 0) & (b >= 0)
        rows += [a[both], b[both]]
        columns += [b[both], a[both]]
    rows, columns = np.concatenate(rows), np.concatenate(columns)
    links = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(inside.sum(),) * 2)
    solution = np.atleast_1d(spsolve((diags(np.full(inside.sum(), 4.0)) - links).tocsc(), np.full(inside.sum(), 4.0)))
    height = np.zeros(inside.shape)
    height[inside] = s.fullness * np.sqrt(np.maximum(solution, 0))
    # A smooth limit keeps broad shapes from becoming deeper than they are wide.
    limit = 0.5 * s.max_thickness * max(np.ptp(np.nonzero(inside)[0]) + 1, np.ptp(np.nonzero(inside)[1]) + 1)
    return limit * np.tanh(height / limit)


def _shell(grid: _Grid, height: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Front and back sheets joined along the contour.

    Returns: pixels [V, 2], depth offset [V], faces [F, 3] wound outwards.
    """
    h, w = grid.value.shape
    nodes = np.full((h, w), -1)
    nodes[grid.inside] = np.arange(grid.inside.sum())
    count = int(grid.inside.sum())
    yx = np.argwhere(grid.inside).astype(float)
    across, at_across = _crossings(grid.value, grid.inside, axis=1)
    down, at_down = _crossings(grid.value, grid.inside, axis=0)
    rim = np.concatenate([at_across, at_down])
    across, down = np.where(across >= 0, across, -1), np.where(down >= 0, down + len(at_across), -1)
    corners = [nodes[:-1, :-1], nodes[:-1, 1:], nodes[1:, 1:], nodes[1:, :-1]]
    edges = [across[:-1], down[:, 1:], across[1:], down[:, :-1]]
    pattern = sum((corners[k] >= 0).astype(int) << k for k in range(4))
    # Vertex numbers: front nodes, back nodes, then the rim, which both sheets share.
    front, back = [], []
    for case, polygons in _POLYGONS.items():
        cells = pattern == case
        if not polygons or not cells.any():
            continue
        for polygon in polygons:
            for k in range(1, len(polygon) - 1):
                triangle = [polygon[0], polygon[k], polygon[k + 1]]
                sides = [[corners[c][cells] + offset if c < 4 else edges[c - 4][cells] + 2 * count for c in triangle] for offset in (0, count)]
                front.append(np.stack(sides[0], -1))
                back.append(np.stack(sides[1], -1)[:, ::-1])
    faces = np.concatenate(front + back)
    place = np.concatenate([yx, yx, rim])[:, ::-1]
    z = height[grid.inside]
    depth = np.concatenate([-z, z, np.zeros(len(rim))])
    # Image axes are x right, y down, z away from the eye: corners in clockwise picture order already face away; turn them.
    return grid.origin + grid.pixels_per_cell * place, depth, faces[:, ::-1]


def _crossings(value: np.ndarray, inside: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (or -1) of the contour points on the grid edges along ``axis``, and their places (row, column)."""
    a, b = (value[:, :-1], value[:, 1:]) if axis == 1 else (value[:-1], value[1:])
    p, q = (inside[:, :-1], inside[:, 1:]) if axis == 1 else (inside[:-1], inside[1:])
    cut = p != q
    number = np.full(cut.shape, -1)
    number[cut] = np.arange(cut.sum())
    t = np.clip((0.5 - a[cut]) / (b[cut] - a[cut]), 0.02, 0.98)
    place = np.argwhere(cut).astype(float)
    place[:, axis] += t
    return number, place


def _unproject(pixels: np.ndarray, depth: np.ndarray, camera: Camera) -> np.ndarray:
    """Pixels at a camera depth -> world points [V, 3]."""
    K = camera.K.double().numpy()
    xy = (pixels - K[:2, 2]) / K.diagonal()[:2]
    if camera.projection == "perspective":
        xy = xy * depth[:, None]
    m = camera.cam_from_world.double().numpy()
    return (np.concatenate([xy, depth[:, None]], 1) - m[:3, 3]) @ m[:3, :3]


def _colours(photo: Photo, pixels: np.ndarray) -> np.ndarray:
    """Linear RGBA [V, 4] of the photo at the vertices; at the rim, of the nearest solid pixels."""
    alpha, srgb = photo.alpha.numpy(), photo.srgb.numpy()
    solid = alpha > min(0.9, 0.9 * float(alpha.max()))
    filled = srgb[tuple(ndimage.distance_transform_edt(~solid, return_distances=False, return_indices=True))]
    at = [pixels[:, 1] - 0.5, pixels[:, 0] - 0.5]
    display = np.stack([ndimage.map_coordinates(filled[..., k], at, order=1, mode="nearest") for k in range(3)], -1)
    linear = np.interp(np.clip(display, 0, 1) * 255, np.arange(256), SRGB_TO_LINEAR)
    return np.concatenate([linear, np.ones((len(linear), 1))], 1).astype(np.float32)
