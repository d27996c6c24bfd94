"""PLY and STL, through trimesh; both are Z-up as Blender imports them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import trimesh

from near.geometry.mesh import Material, RawMesh, too_big, unreadable
from near.geometry.textures import SRGB_TO_LINEAR


def read_ply(path: Path, max_triangles: int, digest) -> RawMesh:
    """Reader for `load_mesh`: vertex colours (8 bit, sRGB) become the base colour; normals in the file are used."""
    data = path.read_bytes()
    digest.update(data)
    _refuse_by_header(data[:65536], max_triangles)
    header = data[:65536].partition(b"end_header")[0]
    return _read(path, "ply", max_triangles, has_normals=b" nx" in header and b" nz" in header)


def read_stl(path: Path, max_triangles: int, digest) -> RawMesh:
    """Reader for `load_mesh`; no material."""
    data = path.read_bytes()
    digest.update(data)
    binary_count = int.from_bytes(data[80:84], "little")
    if 84 + 50 * binary_count == len(data) and binary_count > max_triangles:
        raise too_big(f"has {binary_count:,} triangles", max_triangles)
    return _read(path, "stl", max_triangles)


def _refuse_by_header(header: bytes, max_triangles: int) -> None:
    for line in header.partition(b"end_header")[0].split(b"\n"):
        words = line.split()
        if words[:2] == [b"element", b"face"] and len(words) == 3 and int(words[2]) > max_triangles:
            raise too_big(f"has {int(words[2]):,} faces", max_triangles)


def _read(path: Path, kind: str, max_triangles: int, has_normals: bool = False) -> RawMesh:
    mesh = trimesh.load(str(path), file_type=kind, process=False, maintain_order=True)
    if not isinstance(mesh, trimesh.Trimesh):
        if isinstance(mesh, trimesh.PointCloud) or not getattr(mesh, "geometry", None):
            return RawMesh(np.zeros((0, 3)), np.zeros((0, 3), np.int64))
        raise unreadable(path.name, "it is not a mesh")
    if len(mesh.faces) > max_triangles:
        raise too_big(f"has {len(mesh.faces):,} triangles", max_triangles)
    colors = None
    if mesh.visual.kind == "vertex":
        rgba = np.asarray(mesh.visual.vertex_colors)
        colors = np.concatenate([SRGB_TO_LINEAR[rgba[:, :3]], rgba[:, 3:].astype(np.float32) / 255], 1)
    uv = getattr(mesh.visual, "uv", None)
    uvs = () if uv is None else (np.stack([uv[:, 0], 1 - uv[:, 1]], -1),)
    # trimesh invents smooth normals when asked; only normals the file brings are worth having.
    normals = np.asarray(mesh.vertex_normals) if has_normals else None
    return RawMesh(np.asarray(mesh.vertices), np.asarray(mesh.faces), normals, uvs, colors, None, (Material(roughness=0.5),))
