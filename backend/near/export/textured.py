"""A compact asset's proxy mesh with PBR textures baked from its discs, as GLB.

The proxy has no UVs, so each triangle gets half a square cell of its own in the texture; a mesh of the user's that has UVs
keeps them (`onto`). A texel takes the materials of the nearest discs whose side it is on.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import trimesh
from PIL import Image
from scipy.spatial import cKDTree

from near.assets import Asset
from near.errors import NearError
from near.export.onto import in_the_files_space, texels, with_margins
from near.geometry.mesh import PbrMesh
from near.pipeline.types import CancelCheck, Progress, check

TEXTURE = 2048
SMALLEST_CELL = 6           # pixels; one around each triangle is a margin, for the filtering of whoever shows it
NEIGHBOURS = 6
CHUNK = 200_000


def atlas(faces: int, size: int = TEXTURE) -> tuple[int, int]:
    """-> (cells per row, pixels per cell) for two triangles a cell.

    Raises:
        NearError: `export-too-fine`.
    """
    row = math.ceil(math.sqrt(math.ceil(faces / 2)))
    cell = size // max(row, 1)
    if cell < SMALLEST_CELL:
        raise NearError("export-too-fine", f"The asset's mesh has {faces:,} faces, too many for one texture.", "Create the asset again; its mesh is reduced then.")
    return row, min(cell, 64)


def triangle_uvs(faces: int, size: int = TEXTURE) -> np.ndarray:
    """UVs [F, 3, 2] in pixels, y down: even triangles in the upper left of their cell, odd ones in the lower right."""
    row, cell = atlas(faces, size)
    index = np.arange(faces)
    corner = np.stack([index // 2 % row, index // 2 // row], -1)[:, None] * cell
    a, b = 1.0, cell - 2.5
    upper, lower = np.array([[a, a], [b, a], [a, b]]), np.array([[cell - a, cell - a], [cell - b, cell - a], [cell - a, cell - b]])
    return corner + np.where((index % 2 == 0)[:, None, None], upper, lower)


def texel_surface(vertices: np.ndarray, faces: np.ndarray, uvs: np.ndarray, size: int = TEXTURE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> (pixel (y, x) [N, 2], point [N, 3], normal [N, 3]) of every texel in a cell that is in use; margins lie on the triangle's plane."""
    _, cell = atlas(len(faces), size)
    grid = np.stack(np.meshgrid(np.arange(cell), np.arange(cell), indexing="xy"), -1).reshape(-1, 2)
    first = (grid + 0.5).sum(-1) < cell               # the upper left half belongs to the even triangle
    corners = vertices[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True).clip(1e-20)
    pixels, points, sides = [], [], []
    for parity, half in ((0, grid[first]), (1, grid[~first])):
        chosen = np.arange(parity, len(faces), 2)
        origin = np.floor(uvs[chosen].min(1) / cell) * cell
        local = uvs[chosen] - origin[:, None]
        edges = np.stack([local[:, 1] - local[:, 0], local[:, 2] - local[:, 0]], -1)
        weights = np.linalg.solve(edges[:, None], (half[None] + 0.5 - local[:, :1])[..., None])[..., 0]
        weights = np.concatenate([1 - weights.sum(-1, keepdims=True), weights], -1).clip(0, 1)
        weights /= weights.sum(-1, keepdims=True)
        points.append((weights[..., None] * corners[chosen][:, None]).sum(2).reshape(-1, 3))
        sides.append(np.repeat(normals[chosen], len(half), 0))
        pixels.append((origin[:, None] + half[None]).reshape(-1, 2)[:, ::-1].astype(int))
    return np.concatenate(pixels), np.concatenate(points), np.concatenate(sides)


def textured_glb(asset: Asset, engine, progress: Progress, cancelled: CancelCheck | None, size: int = TEXTURE, onto: PbrMesh | None = None) -> bytes:
    """The GLB file: the proxy, or `onto`, whose file has it in asset space.

    Raises:
        NearError: `export-unsupported` without a proxy mesh, `export-no-uvs`, `export-uvs-outside`, `Cancelled`.
    """
    if onto is not None:
        vertices, normals, faces, uvs = in_the_files_space(onto)
        pixels, points, sides = texels(vertices, normals, faces, uvs, size)
        baked = with_margins(_materials(asset, engine, pixels, points, sides, size, progress, cancelled), pixels)
        progress("writing", 0.95, None)
        return _glb(vertices, normals, faces, uvs, baked)
    if asset.proxy_vertices is None or not len(asset.proxy_faces):
        raise NearError("export-unsupported", "The asset has no mesh to put textures on.", "Create it again.")
    vertices, faces = asset.proxy_vertices.double().numpy(), asset.proxy_faces.numpy()
    uvs = triangle_uvs(len(faces), size)
    baked = _materials(asset, engine, *texel_surface(vertices, faces, uvs, size), size, progress, cancelled)
    progress("writing", 0.95, None)
    smooth = trimesh.Trimesh(vertices, faces, process=False).vertex_normals[faces].reshape(-1, 3)
    return _glb(vertices[faces].reshape(-1, 3), smooth, np.arange(3 * len(faces)).reshape(-1, 3), (uvs / size).reshape(-1, 2), baked)


def _materials(asset: Asset, engine, pixels: np.ndarray, points: np.ndarray, normals: np.ndarray, size: int, progress: Progress,
               cancelled: CancelCheck | None) -> np.ndarray:
    """float32 [size, size, 5]: linear base colour, roughness, metallic of the discs near each texel's point."""
    state = engine.compact_renderer().discs(asset)
    tree, sides = cKDTree(state.cloud.points.numpy()), state.cloud.disc_normals.numpy()
    material = state.material.numpy()
    baked = np.zeros((size, size, 5), np.float32)
    for start in range(0, len(points), CHUNK):
        check(cancelled)
        progress("textures", 0.1 + 0.8 * start / len(points), None)
        part = slice(start, start + CHUNK)
        distance, near = tree.query(points[part], NEIGHBOURS)
        facing = (sides[near] * normals[part][:, None]).sum(-1)
        weight = (facing.clip(0) + 1e-3) / (distance + 1e-4)
        baked[tuple(pixels[part].T)] = (weight[..., None] * material[near]).sum(1) / weight.sum(1)[:, None]
    return baked


def _glb(vertices: np.ndarray, normals: np.ndarray, faces: np.ndarray, uvs: np.ndarray, baked: np.ndarray) -> bytes:
    """Of vertices with a normal and a UV (v down) each."""
    from near.colour import srgb_encode

    base = srgb_encode(torch.from_numpy(baked[..., :3]).clamp(0, 1)).numpy()
    occlusion_roughness_metallic = np.concatenate([np.ones_like(baked[..., :1]), baked[..., 3:5]], -1)
    images = [Image.fromarray((x.clip(0, 1) * 255 + 0.5).astype(np.uint8)) for x in (base, occlusion_roughness_metallic)]
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=images[0], metallicRoughnessTexture=images[1], metallicFactor=1.0,
                                                   roughnessFactor=1.0, name="NeAR")
    flipped = uvs * (1, -1) + (0, 1)                                                   # trimesh counts v from the bottom
    turned = lambda rows: np.stack([rows[:, 0], rows[:, 2], -rows[:, 1]], -1)          # noqa: E731  glTF is Y-up
    mesh = trimesh.Trimesh(turned(vertices), faces, process=False, vertex_normals=turned(normals),
                           visual=trimesh.visual.TextureVisuals(uv=flipped, material=material))
    return mesh.export(file_type="glb", include_normals=True)
