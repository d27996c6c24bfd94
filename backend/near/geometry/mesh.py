"""Meshes with PBR materials, in asset space (DESIGN section 4)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from near.errors import NearError
from near.geometry.textures import TextureSlot

MAX_TRIANGLES = 2_000_000
MAX_MESH_BYTES = 2 << 30
OPAQUE, MASK, BLEND = "opaque", "mask", "blend"


@dataclass(frozen=True, eq=False)
class Material:
    """Metallic-roughness material; a texture multiplies its factor.

    base_factor: linear Rec.709 + alpha. roughness_map and metallic_map are (slot, channel). A normal map's green points
    up in the image (OpenGL); normal_scale multiplies its x and y.
    """

    name: str = ""
    base_factor: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    base_map: TextureSlot | None = None
    roughness: float = 1.0
    roughness_map: tuple[TextureSlot, int] | None = None
    metallic: float = 0.0
    metallic_map: tuple[TextureSlot, int] | None = None
    glossiness_map: tuple[TextureSlot, int] | None = None  # old files: roughness = 1 - (1 - roughness) * glossiness
    normal_map: TextureSlot | None = None
    normal_scale: float = 1.0
    alpha_mode: str = OPAQUE
    alpha_cutoff: float = 0.5
    double_sided: bool = False


@dataclass(frozen=True, eq=False)
class RawMesh:
    """What a file holds, Z-up, in the file's own units. vertices [V, 3] float64; faces [F, 3] int64; normals [V, 3] or None
    (then by angle); uvs: sets of [V, 2], v = 0 at the top row; colors [V, 4] linear or None; face_material [F]."""

    vertices: np.ndarray
    faces: np.ndarray
    normals: np.ndarray | None = None
    uvs: tuple[np.ndarray, ...] = ()
    colors: np.ndarray | None = None
    face_material: np.ndarray | None = None
    materials: tuple[Material, ...] = (Material(),)


@dataclass(frozen=True, eq=False)
class PbrMesh:
    """A triangle mesh with materials.

    vertices: float32 [V, 3] in asset space (Z-up, bounding box centred, longest side 1). faces: int64 [F, 3]. normals:
    float32 [V, 3] unit shading normals. uvs: tuple of float32 [V, 2], v = 0 at the image's top row. colors: float32 [V, 4]
    linear, multiplying the base colour, or None. face_material: int64 [F] into ``materials``. source_from_asset: float64
    [4, 4], asset space to the file's coordinates as Blender imports them. sha256: of the file.
    """

    vertices: Tensor
    faces: Tensor
    normals: Tensor
    uvs: tuple[Tensor, ...] = ()
    colors: Tensor | None = None
    face_material: Tensor | None = None
    materials: tuple[Material, ...] = (Material(),)
    source_from_asset: Tensor = field(default_factory=lambda: torch.eye(4, dtype=torch.float64))
    sha256: str = ""

    def transformed(self, target_from_asset: Tensor) -> PbrMesh:
        """The mesh after a rotation, uniform scale and translation ([4, 4]); leaves asset space unless undone."""
        linear = target_from_asset[:3, :3].to(self.vertices)
        scale = torch.linalg.det(linear).abs() ** (1 / 3)
        return PbrMesh(self.vertices @ linear.T + target_from_asset[:3, 3].to(self.vertices), self.faces,
                       self.normals @ (linear / scale).T, self.uvs, self.colors, self.face_material, self.materials,
                       self.source_from_asset @ torch.linalg.inv(target_from_asset.double()), self.sha256)


def load_mesh(path: str | Path, max_triangles: int = MAX_TRIANGLES) -> PbrMesh:
    """Read GLB, glTF, OBJ (+ MTL), PLY or STL.

    Non-manifold, open and doubled surfaces are fine.

    Raises:
        NearError: ``mesh-missing``, ``mesh-format``, ``mesh-unreadable``, ``mesh-compressed``, ``mesh-too-big``, ``mesh-empty``,
            ``mesh-not-finite``, ``mesh-flat`` or an error of its textures.
    """
    path = Path(path)
    reader = _reader(path)
    try:
        if path.stat().st_size > MAX_MESH_BYTES:
            raise too_big(f"is {path.stat().st_size / 2**30:.1f} GiB large", max_triangles)
        digest = hashlib.sha256()
        raw = reader(path, max_triangles, digest)
    except NearError:
        raise
    except FileNotFoundError as error:
        raise NearError("mesh-missing", f"There is no file {Path(error.filename or path).name}.", "Check the path of the mesh.") from error
    except OSError as error:
        raise NearError("mesh-unreadable", f"{path.name} cannot be read ({error.strerror}).", "Check that it is a file you may read.") from error
    except MemoryError as error:
        raise too_big("does not fit in memory", max_triangles) from error
    except Exception as error:  # a damaged file can fail in any parser step
        raise unreadable(path.name, "its contents are damaged") from error
    return to_asset_space(raw, digest.hexdigest(), path.name)


def too_big(what: str, limit: int) -> NearError:
    """The refusal of a mesh beyond the stated limit."""
    return NearError("mesh-too-big", f"The mesh {what}.", f"Reduce it to {limit:,} triangles or fewer, for example with Blender's Decimate modifier.")


def unreadable(name: str, why: str) -> NearError:
    """A file that is not what its name says, or cut."""
    return NearError("mesh-unreadable", f"{name} cannot be read: {why}.", "Export it again, as GLB if you can.")


def _reader(path: Path):
    from near.geometry import gltf, obj, ply

    readers = {".glb": gltf.read_gltf, ".gltf": gltf.read_gltf, ".obj": obj.read_obj, ".ply": ply.read_ply, ".stl": ply.read_stl}
    if path.suffix.lower() not in readers:
        raise NearError("mesh-format", f"{path.name} is not a kind of mesh this program reads.", "Export it as GLB, glTF, OBJ, PLY or STL.")
    return readers[path.suffix.lower()]


def to_asset_space(raw: RawMesh, sha256: str = "", name: str = "The mesh") -> PbrMesh:
    """Check, centre and scale.

    Raises:
        NearError: ``mesh-empty``, ``mesh-unreadable`` (indices), ``mesh-not-finite``, ``mesh-flat`` (a single point).
    """
    faces = np.ascontiguousarray(raw.faces, dtype=np.int64).reshape(-1, 3)
    if not len(faces):
        raise NearError("mesh-empty", f"{name} holds no triangles.", "Export it with its faces.")
    if faces.min() < 0 or faces.max() >= len(raw.vertices):
        raise unreadable(name, "a face names a vertex that does not exist")
    used = np.zeros(len(raw.vertices), bool)
    used[faces] = True
    points = np.asarray(raw.vertices, np.float64)
    if not np.isfinite(points[used]).all():
        raise NearError("mesh-not-finite", f"{name} has vertices that are not numbers (NaN or infinite).",
                        "Clean it up: in Blender, Mesh > Clean Up > Delete Loose and check its modifiers.")
    low, high = points[used].min(0), points[used].max(0)
    side = float((high - low).max())
    if not 0 < side < 1e30:
        raise NearError("mesh-flat", f"{name} has no extent: all its vertices are at one point.", "Choose a mesh with a surface.")
    centre = (low + high) / 2
    source_from_asset = np.eye(4)
    source_from_asset[:3, :3] *= side
    source_from_asset[:3, 3] = centre
    vertices = np.where(used[:, None], (points - centre) / side, 0.0).astype(np.float32)
    raw_normals = None if raw.normals is None else np.asarray(raw.normals, np.float32)
    extra = (*raw.uvs, *([] if raw.colors is None else [raw.colors]))
    if raw_normals is None:
        from near.geometry.normals import split_normals

        vertices, faces, raw_normals, extra = split_normals(vertices, faces, extra)
    uvs = tuple(np.nan_to_num(np.asarray(e, np.float32), posinf=0, neginf=0) for e in extra[:len(raw.uvs)])
    colors = None if raw.colors is None else np.nan_to_num(np.asarray(extra[-1], np.float32)).clip(0)
    material = np.zeros(len(faces), np.int64) if raw.face_material is None else np.asarray(raw.face_material, np.int64)
    return PbrMesh(torch.from_numpy(vertices), torch.from_numpy(faces), torch.from_numpy(_unit(raw_normals)),
                   tuple(map(torch.from_numpy, uvs)), None if colors is None else torch.from_numpy(colors),
                   torch.from_numpy(material), raw.materials, torch.from_numpy(source_from_asset), sha256)


def _unit(normals: np.ndarray) -> np.ndarray:
    normals = np.nan_to_num(normals, posinf=0, neginf=0)
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    return np.divide(normals, length, out=np.zeros_like(normals), where=length > 1e-12)
