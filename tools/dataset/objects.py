"""Objects of the generator's own: one to a dozen parts, arranged, each painted with one or several materials."""

from __future__ import annotations

import bmesh
import bpy
import numpy as np
from mathutils import Matrix, Quaternion, Vector

from dataset.materials import random_material
from dataset.shapes import quaternion, random_part

SHARP_RAD = 0.6  # edges sharper than this are not smoothed


def build_own(rng: np.random.Generator) -> dict:
    """Fill the empty scene with an object; returns what it is (JSON data)."""
    arrangement = str(rng.choice(["single", "pile", "ring", "row", "scatter", "mirror"], p=[.22, .25, .15, .1, .18, .1]))
    makers = {"single": _single, "pile": _pile, "ring": _ring, "row": _row, "scatter": _scatter, "mirror": _mirror}
    kinds: list[str] = []

    def part():
        item, kind = random_part(rng)
        kinds.append(kind)
        return realised(item)

    placed = makers[arrangement](rng, part)
    for mesh, matrix in placed:
        copy = mesh.copy()
        copy.transform(matrix)
        if matrix.determinant() < 0:
            copy.flip_normals()
        _link(copy)
    for mesh in {m for m, _ in placed}:
        bpy.data.meshes.remove(mesh)
    meshes = [o for o in bpy.context.scene.objects if o.type == "MESH"]
    return {"arrangement": arrangement, "parts": kinds, "materials": _paint(rng, meshes)}


def realised(item):
    """The mesh that an object's modifiers, curve or metaballs make; objects of the scene are removed."""
    bpy.context.view_layer.update()
    graph = bpy.context.evaluated_depsgraph_get()
    mesh = bpy.data.meshes.new_from_object(item.evaluated_get(graph), preserve_all_data_layers=True, depsgraph=graph)
    for other in list(bpy.context.scene.objects):
        if other is item or other.get("helper"):
            bpy.data.objects.remove(other)
    mesh.materials.clear()
    if not len(mesh.polygons):
        raise ValueError("a part came out empty")
    faces = bmesh.new()
    faces.from_mesh(mesh)
    bmesh.ops.recalc_face_normals(faces, faces=faces.faces)  # generators wind their faces either way
    faces.to_mesh(mesh)
    faces.free()
    mesh.polygons.foreach_set("use_smooth", np.ones(len(mesh.polygons), bool))
    mesh.set_sharp_from_angle(angle=SHARP_RAD)
    return mesh


def _link(mesh) -> None:
    bpy.context.scene.collection.objects.link(bpy.data.objects.new("own", mesh))


# -- arrangements: lists of (mesh, matrix) -----------------------------------------------------------------------------


def _turned(rng: np.random.Generator, free: float) -> Matrix:
    """A random orientation; upright with some probability."""
    if rng.random() < free:
        return Quaternion(quaternion(rng)).to_matrix().to_4x4()
    return Matrix.Rotation(rng.uniform(0, 2 * np.pi), 4, "Z")


def _extent(mesh, matrix: Matrix) -> tuple[Vector, Vector]:
    co = np.empty(len(mesh.vertices) * 3)
    mesh.vertices.foreach_get("co", co)
    p = co.reshape(-1, 3) @ np.array(matrix.to_3x3()).T + np.array(matrix.translation)
    return Vector(p.min(0)), Vector(p.max(0))


def _single(rng, part) -> list:
    return [(part(), _turned(rng, 0.4))]


def _pile(rng, part) -> list:
    """Parts on top of each other, sunk in a little."""
    placed, top = [], 0.0
    for _ in range(int(rng.integers(2, 5))):
        mesh, matrix = part(), _turned(rng, 0.25) @ Matrix.Diagonal((*(rng.uniform(0.4, 1.1) * rng.uniform(0.7, 1.3, 3)), 1))
        low, high = _extent(mesh, matrix)
        sink = rng.uniform(0.0, 0.25) * (high.z - low.z)
        shift = Vector((*(rng.uniform(-0.15, 0.15, 2) - [(low.x + high.x) / 2, (low.y + high.y) / 2]), top - low.z - sink))
        placed.append((mesh, Matrix.Translation(shift) @ matrix))
        top += high.z - low.z - sink
    return placed


def _ring(rng, part) -> list:
    """A middle part with copies of another around it: legs, petals, spokes, bolts."""
    count, radius = int(rng.integers(3, 9)), rng.uniform(0.25, 0.6)
    middle, limb = part(), part()
    size = rng.uniform(0.2, 0.6)
    own = Matrix.Translation((radius, 0, rng.uniform(-0.4, 0.4))) @ _turned(rng, 0.3) @ Matrix.Diagonal((size, size, size * rng.uniform(0.5, 2), 1))
    return [(middle, _turned(rng, 0.1)), *((limb, Matrix.Rotation(2 * np.pi * k / count, 4, "Z") @ own) for k in range(count))]


def _row(rng, part) -> list:
    """Copies side by side on a plate or rail."""
    mesh, count, pitch = part(), int(rng.integers(2, 6)), rng.uniform(0.3, 0.8)
    own = _turned(rng, 0.2) @ Matrix.Diagonal((*([rng.uniform(0.3, 0.7)] * 3), 1))
    placed = [(mesh, Matrix.Translation((k * pitch, 0, 0)) @ own) for k in range(count)]
    base = part()
    return [*placed, (base, Matrix.Translation(((count - 1) * pitch / 2, 0, -0.3)) @ Matrix.Diagonal((count * pitch, rng.uniform(0.3, 1), rng.uniform(0.15, 0.5), 1)))]


def _scatter(rng, part) -> list:
    """Several parts stuck into each other."""
    return [(part(), Matrix.Translation(rng.uniform(-0.25, 0.25, 3)) @ _turned(rng, 0.6) @ Matrix.Diagonal((*([rng.uniform(0.3, 0.9)] * 3), 1)))
            for _ in range(int(rng.integers(2, 6)))]


def _mirror(rng, part) -> list:
    """Left and right alike."""
    placed = [(part(), _turned(rng, 0.1))]
    for _ in range(int(rng.integers(1, 4))):
        mesh = part()
        own = Matrix.Translation((rng.uniform(0.15, 0.5), *rng.uniform(-0.3, 0.3, 2))) @ _turned(rng, 0.5) @ Matrix.Diagonal((*([rng.uniform(0.25, 0.7)] * 3), 1))
        placed += [(mesh, own), (mesh, Matrix.Diagonal((-1, 1, 1, 1)) @ own)]
    return placed


# -- paint -------------------------------------------------------------------------------------------------------------


def _paint(rng: np.random.Generator, items: list) -> list[dict]:
    """One to four materials: part by part (copies alike), or split across a part by a plane."""
    made = [random_material(rng) for _ in range(int(rng.choice([1, 2, 3, 4], p=[.25, .35, .25, .15])))]
    by_shape: dict[int, int] = {}
    for item in items:
        mesh = item.data
        choice = by_shape.setdefault(len(mesh.polygons), int(rng.integers(len(made))))
        for material, _ in made:
            mesh.materials.append(material)
        index = np.full(len(mesh.polygons), choice, np.int32)
        if len(made) > 1 and rng.random() < 0.3:
            centre = np.empty(len(index) * 3, np.float32)
            mesh.polygons.foreach_get("center", centre)
            along = centre.reshape(-1, 3) @ (rng.normal(size=3) if rng.random() < 0.4 else np.eye(3)[rng.integers(3)])
            index[along > np.quantile(along, rng.uniform(0.2, 0.8))] = int(rng.integers(len(made)))
        mesh.polygons.foreach_set("material_index", index)
    return [facts for _, facts in made]
