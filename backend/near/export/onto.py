"""Where the texels of a mesh with UVs of its own lie on its surface."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import distance_transform_edt

from near.compiled import compiled
from near.errors import NearError
from near.geometry.mesh import PbrMesh

OUTSIDE = 1e-3              # of the unit square; more is a layout that one texture cannot hold
MARGIN_TEXELS = 8           # painted around each island, for the filtering of whoever shows it


def in_the_files_space(mesh: PbrMesh) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """-> (vertices [V, 3], normals [V, 3], faces [F, 3], uvs [V, 2], v down) as they were before the mesh was centred and scaled.

    Raises:
        NearError: `export-no-uvs`, `export-uvs-outside`.
    """
    if not mesh.uvs:
        raise NearError("export-no-uvs", "The mesh to bake onto has no UVs.", "Unwrap it, or bake onto the asset's own mesh.")
    uvs = mesh.uvs[0].double().numpy()
    if uvs.min() < -OUTSIDE or uvs.max() > 1 + OUTSIDE:
        raise NearError("export-uvs-outside", "The UVs of the mesh to bake onto reach outside of the unit square.",
                        "Pack the islands into the square (UV Editor, Pack Islands).")
    matrix = mesh.source_from_asset.numpy()
    vertices = mesh.vertices.double().numpy() @ matrix[:3, :3].T + matrix[:3, 3]
    normals = mesh.normals.double().numpy() @ matrix[:3, :3].T        # rotation and one scale: directions stay right
    return vertices, normals / np.linalg.norm(normals, axis=-1, keepdims=True).clip(1e-20), mesh.faces.numpy(), uvs


def texels(vertices: np.ndarray, normals: np.ndarray, faces: np.ndarray, uvs: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> (pixel (y, x) [N, 2], point [N, 3], unit normal [N, 3]) of every texel whose centre lies in a triangle."""
    face, weight = np.full((size, size), -1, np.int64), np.zeros((size, size, 3))
    _cover(uvs[faces] * size, face, weight)
    pixels = np.argwhere(face >= 0)
    corners, share = faces[face[tuple(pixels.T)]], weight[tuple(pixels.T)][..., None]
    points, sides = (share * vertices[corners]).sum(1), (share * normals[corners]).sum(1)
    return pixels, points, sides / np.linalg.norm(sides, axis=-1, keepdims=True).clip(1e-20)


@compiled()
def _cover(corners, face, weight):
    """Writes each triangle ([F, 3, (x, y)] in pixels) into the texels whose centres it holds, with their barycentric weights."""
    size = face.shape[0]
    for f in range(len(corners)):
        ax, ay, bx, by, cx, cy = corners[f, 0, 0], corners[f, 0, 1], corners[f, 1, 0], corners[f, 1, 1], corners[f, 2, 0], corners[f, 2, 1]
        area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        if abs(area) < 1e-12:
            continue
        left, right = max(int(np.floor(min(ax, bx, cx) - 0.5)), 0), min(int(np.ceil(max(ax, bx, cx))), size - 1)
        top, bottom = max(int(np.floor(min(ay, by, cy) - 0.5)), 0), min(int(np.ceil(max(ay, by, cy))), size - 1)
        for y in range(top, bottom + 1):
            for x in range(left, right + 1):
                px, py = x + 0.5, y + 0.5
                u = ((bx - px) * (cy - py) - (by - py) * (cx - px)) / area
                v = ((cx - px) * (ay - py) - (cy - py) * (ax - px)) / area
                if u >= -1e-9 and v >= -1e-9 and u + v <= 1 + 1e-9:
                    face[y, x] = f
                    weight[y, x, 0], weight[y, x, 1], weight[y, x, 2] = u, v, 1 - u - v


def with_margins(baked: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """The texture [size, size, C] with each island's rim carried outward."""
    empty = np.ones(baked.shape[:2], bool)
    empty[tuple(pixels.T)] = False
    distance, (y, x) = distance_transform_edt(empty, return_indices=True)
    return np.where((distance <= MARGIN_TEXELS)[..., None], baked[y, x], baked)
