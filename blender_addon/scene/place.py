"""Puts an asset into the scene: its file where the .blend will find it, its proxy mesh where the user wants it."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import bpy
import numpy as np
from mathutils import Matrix, Vector

from .. import paths
from ..errors import NearError
from . import assetfile

_PIECE = 1 << 20


def storing(data: bytes, sha256: str) -> Generator[None, None, Path]:
    """Writes an asset beside the .blend (before it is saved: to the add-on's folder), in pieces; -> its path."""
    folder = paths.beside_blend() or paths.asset_store()
    path = folder / f"{sha256}.near"
    if path.is_file() and path.stat().st_size == len(data):
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    try:
        with open(part, "wb") as file:
            for start in range(0, len(data), _PIECE):
                file.write(data[start:start + _PIECE])
                yield
        part.replace(path)
    except OSError as error:
        raise NearError("cannot-write", f"The asset could not be stored in {folder} ({error.strerror}).",
                        "Free some space there, or save the .blend in a folder that you may write to.") from None
    finally:
        part.unlink(missing_ok=True)
    return path


def blend_path(path: Path) -> str:
    """The path as a .blend should keep it: relative to it where that can be."""
    try:
        return bpy.path.relpath(str(path)) if bpy.data.filepath else str(path)
    except ValueError:                        # another drive
        return str(path)


def add_proxy(scene: bpy.types.Scene, path: Path, sha256: str, name: str, world_from_asset: Matrix | None = None, photo: str = "",
              select: bool = True, mesh: bpy.types.Mesh | None = None) -> bpy.types.Object:
    """A proxy object for the asset; without a transform it stands on the 3D cursor. `mesh`: made already with `mesh_of`.

    Raises as `assetfile.read_proxy`.
    """
    if mesh is None:
        mesh = mesh_of(name, *assetfile.read_proxy(path))
    obj = bpy.data.objects.new(name, mesh)
    if world_from_asset is None:
        lowest = min((corner[2] for corner in obj.bound_box), default=-0.5)
        world_from_asset = Matrix.Translation(scene.cursor.location - Vector((0, 0, lowest)))
    obj.matrix_world = world_from_asset
    data = obj.near_relight
    data.is_proxy, data.sha256, data.asset_path, data.photo = True, sha256, blend_path(path), photo
    data.origin = str(path.parent)
    scene.collection.objects.link(obj)
    layer = bpy.context.view_layer if bpy.context.scene == scene else None
    if layer is not None:
        layer.update()                          # only now does the layer know the object
    if select and layer is not None and obj.name in layer.objects:
        for other in layer.objects:
            other.select_set(False)
        obj.select_set(True)
        layer.objects.active = obj
    return obj


def mesh_of(name: str, vertices: np.ndarray, faces: np.ndarray) -> bpy.types.Mesh:
    """A mesh datablock of triangles: vertices float32 [V, 3], faces int32 [F, 3]."""
    mesh = bpy.data.meshes.new(name)
    mesh.vertices.add(len(vertices))
    mesh.vertices.foreach_set("co", np.ascontiguousarray(vertices, np.float32).ravel())
    mesh.loops.add(3 * len(faces))
    mesh.loops.foreach_set("vertex_index", np.ascontiguousarray(faces, np.int32).ravel())
    mesh.polygons.add(len(faces))
    mesh.polygons.foreach_set("loop_start", np.arange(0, 3 * len(faces), 3, dtype=np.int32))
    mesh.update(calc_edges=True)
    mesh.validate()
    return mesh


def set_preview(obj: bpy.types.Object, pixels: np.ndarray) -> None:
    """uint8 [h, w, 3], top row first, as the object's preview in the asset browser."""
    preview = obj.preview_ensure()
    preview.image_size = (pixels.shape[1], pixels.shape[0])
    preview.image_pixels_float.foreach_set(preview_floats(pixels))


def preview_floats(pixels: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3], top row first -> what Blender's previews hold: float32 RGBA, bottom row first, flat."""
    rgba = np.ones((*pixels.shape[:2], 4), np.float32)
    rgba[..., :3] = pixels[::-1] / np.float32(255)
    return rgba.ravel()


def push_undo(message: str) -> None:
    """One undo step for what a timer changed; where there is no window there is no undo either."""
    manager = bpy.context.window_manager
    if bpy.app.background or not manager.windows:
        return
    with bpy.context.temp_override(window=manager.windows[0]):
        bpy.ops.ed.undo_push(message=message)


# ---------------------------------------------------------------- a mesh of the scene as a file
def placement(matrix_world: Matrix) -> tuple[Matrix, Matrix]:
    """-> (place: translation and rotation, residual: the 3x3 rest, scale and shear): matrix_world = place @ residual."""
    location, rotation, _ = matrix_world.decompose()
    place = Matrix.Translation(location) @ rotation.to_matrix().to_4x4()
    return place, rotation.to_matrix().inverted() @ matrix_world.to_3x3()


def evaluated_mesh(obj: bpy.types.Object, depsgraph: bpy.types.Depsgraph) -> tuple[bpy.types.Mesh, Matrix]:
    """-> (a new mesh datablock with modifiers and scale applied, world_from_asset of an asset made from it). Remove it after use.

    Raises:
        NearError: `mesh-empty`, `transform-invalid`.
    """
    place, residual = placement(obj.matrix_world)
    if abs(residual.determinant()) < 1e-24:
        raise NearError("transform-invalid", f"The object {obj.name} has no size: its scale is zero along an axis.", "Give it a scale above zero.")
    mesh = bpy.data.meshes.new_from_object(obj.evaluated_get(depsgraph), preserve_all_data_layers=True, depsgraph=depsgraph)
    mesh.transform(residual.to_4x4())
    if residual.determinant() < 0:
        mesh.flip_normals()
    vertices, faces = mesh_arrays(mesh)
    if not len(faces):
        bpy.data.meshes.remove(mesh)
        raise NearError("mesh-empty", f"The object {obj.name} has no faces.", "Choose an object with a surface.")
    used = vertices[np.unique(faces)].astype(np.float64)
    low, high = used.min(0), used.max(0)
    return mesh, place @ Matrix.Translation((low + high) / 2) @ Matrix.Scale(float((high - low).max()), 4)


def mesh_arrays(mesh: bpy.types.Mesh) -> tuple[np.ndarray, np.ndarray]:
    """-> vertices float32 [V, 3], triangles int32 [F, 3]."""
    mesh.calc_loop_triangles()
    vertices = np.empty(3 * len(mesh.vertices), np.float32)
    mesh.vertices.foreach_get("co", vertices)
    faces = np.empty(3 * len(mesh.loop_triangles), np.int32)
    mesh.loop_triangles.foreach_get("vertices", faces)
    return vertices.reshape(-1, 3), faces.reshape(-1, 3)


def ply_bytes(vertices: np.ndarray, faces: np.ndarray) -> bytes:
    """A binary PLY file of a bare triangle mesh."""
    head = (f"ply\nformat binary_little_endian 1.0\nelement vertex {len(vertices)}\nproperty float x\nproperty float y\nproperty float z\n"
            f"element face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n")
    rows = np.empty(len(faces), np.dtype([("n", "u1"), ("v", "<i4", (3,))]))
    rows["n"], rows["v"] = 3, faces
    return head.encode() + np.ascontiguousarray(vertices, "<f4").tobytes() + rows.tobytes()
