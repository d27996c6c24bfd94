"""glTF 2.0 and GLB: geometry, node transforms, metallic-roughness materials.

Written for the parts general readers drop: material factors beside textures, `KHR_mesh_quantization`, `KHR_texture_transform`,
one material per primitive, mirrored and skinned nodes. Nothing outside the file's folder is opened.
"""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from near.errors import NearError
from near.geometry.gltf_materials import read_materials
from near.geometry.mesh import RawMesh, too_big, unreadable
from near.geometry.normals import flat_normals

_COMPONENTS = {5120: "i1", 5121: "u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
_WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}
_MAX_DEPTH = 256
Z_UP_FROM_Y_UP = np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
_COMPRESSED = ("KHR_draco_mesh_compression", "EXT_meshopt_compression", "KHR_meshopt_compression")


class GltfDocument:
    """The JSON, with checked access to buffers, accessors and images."""

    def __init__(self, path: Path, digest) -> None:
        self.path, self.digest = path, digest
        data = path.read_bytes()
        digest.update(data)
        self.binary: bytes | None = None
        if data[:4] == b"glTF":
            data = self._split_container(data)
        try:
            self.json = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise unreadable(path.name, "it is not a glTF file or it is cut off") from error
        if not isinstance(self.json, dict) or "asset" not in self.json:
            raise unreadable(path.name, "it is not a glTF 2.0 file")
        for extension in self.json.get("extensionsRequired", []):
            if extension in _COMPRESSED:
                raise NearError("mesh-compressed", f"{path.name} is stored with {extension}, which this program does not read.",
                                "Export it without mesh compression.")
        self._buffers: dict[int, bytes] = {}

    def _split_container(self, data: bytes) -> bytes:
        if len(data) < 20:
            raise unreadable(self.path.name, "it is cut off")
        version, total = struct.unpack_from("<II", data, 4)
        if version != 2:
            raise unreadable(self.path.name, f"it is glTF version {version}, only 2 is read")
        if total > len(data):
            raise unreadable(self.path.name, "it is cut off")
        text, offset = b"", 12
        while offset + 8 <= total:
            length, kind = struct.unpack_from("<I4s", data, offset)
            chunk = data[offset + 8:offset + 8 + length]
            if len(chunk) != length:
                raise unreadable(self.path.name, "it is cut off")
            if kind == b"JSON" and not text:
                text = chunk
            elif kind == b"BIN\0" and self.binary is None:
                self.binary = chunk
            offset += 8 + length + (-length % 4)
        return text

    def external(self, uri: str) -> bytes:
        """Bytes behind a URI: embedded data, or a file in the folder of the glTF."""
        if uri.startswith("data:"):
            return base64.b64decode(uri.partition(",")[2])
        folder = self.path.parent.resolve()
        target = (folder / unquote(uri)).resolve()
        if not target.is_relative_to(folder):
            raise NearError("mesh-outside", f"{self.path.name} refers to a file outside its folder ({uri[:120]}).",
                            "Export it as GLB, so that everything is in one file.")
        if not target.is_file():
            raise NearError("mesh-part-missing", f"{self.path.name} needs {target.name}, which is not beside it.",
                            "Copy the missing file there, or export as GLB.")
        data = target.read_bytes()
        self.digest.update(data)
        return data

    def buffer_view(self, index: int) -> tuple[memoryview, int]:
        """Bytes of a buffer view and its stride (0: packed)."""
        view = self.json["bufferViews"][_index(index)]
        number = _index(view["buffer"])
        if number not in self._buffers:
            buffer = self.json["buffers"][number]
            if "uri" not in buffer and self.binary is None:
                raise unreadable(self.path.name, "its binary part is missing")
            self._buffers[number] = self.external(buffer["uri"]) if "uri" in buffer else self.binary
        start, length = view.get("byteOffset", 0), view["byteLength"]
        data = self._buffers[number]
        if start < 0 or length < 0 or start + length > len(data):
            raise unreadable(self.path.name, "it is cut off")
        return memoryview(data)[start:start + length], view.get("byteStride", 0)

    def accessor(self, index: int, as_float: bool = True) -> np.ndarray:
        """[count, width] array; normalised integers become floats where ``as_float``."""
        accessor = self.json["accessors"][_index(index)]
        dtype, width, count = np.dtype(_COMPONENTS[accessor["componentType"]]), _WIDTHS[accessor["type"]], accessor["count"]
        if "bufferView" in accessor:
            values = self._strided(accessor, dtype, width, count)
        else:
            if count * width > 64_000_000:
                raise unreadable(self.path.name, "an accessor is larger than any mesh")
            values = np.zeros((count, width), dtype)
        if "sparse" in accessor:
            sparse = accessor["sparse"]
            where = dict(sparse["indices"], count=sparse["count"], type="SCALAR")
            rows = self._strided(where, np.dtype(_COMPONENTS[where["componentType"]]), 1, sparse["count"])[:, 0]
            values = values.copy()
            values[rows] = self._strided(sparse["values"], dtype, width, sparse["count"])
        if as_float and accessor.get("normalized") and dtype.kind in "iu":
            values = np.maximum(values.astype(np.float32) / np.iinfo(dtype).max, -1.0)
        return values

    def _strided(self, where: dict, dtype: np.dtype, width: int, count: int) -> np.ndarray:
        view, stride = self.buffer_view(where["bufferView"])
        offset, stride = where.get("byteOffset", 0), stride or dtype.itemsize * width
        if count < 0 or offset < 0 or (count and offset + (count - 1) * stride + dtype.itemsize * width > len(view)):
            raise unreadable(self.path.name, "it is cut off")
        return np.ndarray((count, width), dtype, view, offset, (stride, dtype.itemsize)).copy()

    def image_bytes(self, index: int) -> bytes:
        """Encoded bytes of an image."""
        image = self.json["images"][_index(index)]
        return bytes(self.buffer_view(image["bufferView"])[0]) if "bufferView" in image else self.external(image["uri"])


def read_gltf(path: Path, max_triangles: int, digest) -> RawMesh:
    """Reader for `load_mesh`; the default scene, in rest pose."""
    document = GltfDocument(path, digest)
    instances = list(_instances(document))
    total = sum(_triangles(document, primitive) for _, primitive, _ in instances)
    if total > max_triangles:
        raise too_big(f"has {total:,} triangles", max_triangles)
    used = sorted({primitive.get("material", -1) for _, primitive, _ in instances})
    materials = read_materials(document, used)
    parts = [part for node, primitive, world in instances if (part := _primitive(document, node, primitive, world)) is not None]
    if not parts:
        raise NearError("mesh-empty", f"{path.name} holds no triangles.", "Export it with its faces.")
    sets = max(len(p["uvs"]) for p in parts)
    vertices, faces, offset = [], [], 0
    for part in parts:
        faces.append(part["faces"] + offset)
        offset += len(part["vertices"])
    count = [len(p["vertices"]) for p in parts]
    uvs = tuple(np.concatenate([p["uvs"][k] if k < len(p["uvs"]) else np.zeros((n, 2), np.float32) for p, n in zip(parts, count)])
                for k in range(sets))
    colors = None
    if any(p["colors"] is not None for p in parts):
        colors = np.concatenate([np.ones((n, 4), np.float32) if p["colors"] is None else p["colors"] for p, n in zip(parts, count)])
    vertices = np.concatenate([p["vertices"] for p in parts]) @ Z_UP_FROM_Y_UP[:3, :3].T
    normals = np.concatenate([p["normals"] for p in parts]) @ Z_UP_FROM_Y_UP[:3, :3].T
    face_material = np.concatenate([np.full(len(p["faces"]), used.index(p["material"])) for p in parts])
    return RawMesh(vertices, np.concatenate(faces), normals, uvs, colors, face_material, materials)


def _index(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("negative index")
    return value


def _instances(document: GltfDocument):
    """(node, primitive, world matrix) of everything the default scene shows."""
    data = document.json
    nodes = data.get("nodes", [])
    world: dict[int, np.ndarray] = {}
    scenes = data.get("scenes", [])
    if scenes:
        roots = scenes[data.get("scene", 0)].get("nodes", [])
    else:
        children = {c for n in nodes for c in n.get("children", [])}
        roots = [i for i in range(len(nodes)) if i not in children]
    stack = [(i, np.eye(4), 0) for i in roots]
    while stack:
        i, parent, depth = stack.pop()
        if depth > _MAX_DEPTH or i in world:
            raise unreadable(document.path.name, "its objects contain each other")
        world[_index(i)] = parent @ local_matrix(nodes[i])
        stack += [(c, world[i], depth + 1) for c in nodes[i].get("children", [])]
    for i in sorted(world):
        node = nodes[i]
        if "mesh" in node:
            matrix = _joints(document, node, world) if "skin" in node else world[i]
            for primitive in data["meshes"][_index(node["mesh"])]["primitives"]:
                if primitive.get("mode", 4) in (4, 5, 6) and "POSITION" in primitive.get("attributes", {}):
                    yield node, primitive, matrix


def local_matrix(node: dict) -> np.ndarray:
    """[4, 4] of a node's matrix or translation, rotation (x, y, z, w), scale."""
    if "matrix" in node:
        return np.array(node["matrix"], float).reshape(4, 4).T
    x, y, z, w = np.array(node.get("rotation", (0, 0, 0, 1)), float) / max(np.linalg.norm(node.get("rotation", (0, 0, 0, 1))), 1e-12)
    matrix = np.eye(4)
    matrix[:3, :3] = np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
                               [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
                               [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)]]) * np.array(node.get("scale", (1, 1, 1)), float)
    matrix[:3, 3] = node.get("translation", (0, 0, 0))
    return matrix


def _joints(document: GltfDocument, node: dict, world: dict[int, np.ndarray]) -> np.ndarray:
    """[J, 4, 4] skinning matrices; a skinned mesh ignores its own node's transform (glTF 3.7.3.3)."""
    skin = document.json["skins"][_index(node["skin"])]
    bind = np.tile(np.eye(4), (len(skin["joints"]), 1, 1))
    if "inverseBindMatrices" in skin:
        bind = document.accessor(skin["inverseBindMatrices"]).reshape(-1, 4, 4).transpose(0, 2, 1).astype(float)
    return np.stack([world.get(j, np.eye(4)) @ b for j, b in zip(skin["joints"], bind)])


def _triangles(document: GltfDocument, primitive: dict) -> int:
    index = primitive["indices"] if "indices" in primitive else primitive["attributes"]["POSITION"]
    count = document.json["accessors"][_index(index)]["count"]
    return count // 3 if primitive.get("mode", 4) == 4 else max(count - 2, 0)


def _faces(document: GltfDocument, primitive: dict, vertices: int) -> np.ndarray:
    index = document.accessor(primitive["indices"], False)[:, 0].astype(np.int64) if "indices" in primitive else np.arange(vertices)
    mode = primitive.get("mode", 4)
    if mode == 4:
        return index[:len(index) // 3 * 3].reshape(-1, 3)
    k = np.arange(max(len(index) - 2, 0))
    if mode == 6:
        return np.stack([np.zeros_like(k), k + 1, k + 2], -1) if not len(k) else index[np.stack([0 * k, k + 1, k + 2], -1)]
    odd = k % 2
    return index[np.stack([k, k + 1 + odd, k + 2 - odd], -1)] if len(k) else np.zeros((0, 3), np.int64)


def _primitive(document: GltfDocument, node: dict, primitive: dict, world: np.ndarray) -> dict | None:
    if any(e in primitive.get("extensions", {}) for e in _COMPRESSED[:1]) and "indices" in primitive \
            and "bufferView" not in document.json["accessors"][primitive["indices"]]:
        raise NearError("mesh-compressed", f"{document.path.name} is stored with Draco compression, which this program does not read.",
                        "Export it without mesh compression.")
    attributes = primitive["attributes"]
    positions = document.accessor(attributes["POSITION"]).astype(np.float64)
    normals = document.accessor(attributes["NORMAL"]).astype(np.float64) if "NORMAL" in attributes else None
    mesh = document.json["meshes"][node["mesh"]]
    for weight, target in zip(node.get("weights", mesh.get("weights", [])), primitive.get("targets", [])):
        if weight and "POSITION" in target:
            positions = positions + weight * document.accessor(target["POSITION"])
            if normals is not None and "NORMAL" in target:
                normals = normals + weight * document.accessor(target["NORMAL"])
    faces = _faces(document, primitive, len(positions))
    if not len(faces):
        return None
    if faces.min() < 0 or faces.max() >= len(positions):
        raise unreadable(document.path.name, "a face names a vertex that does not exist")
    uvs = []
    while f"TEXCOORD_{len(uvs)}" in attributes:
        uvs.append(document.accessor(attributes[f"TEXCOORD_{len(uvs)}"]).astype(np.float32))
    colors = None
    if "COLOR_0" in attributes:
        colors = document.accessor(attributes["COLOR_0"]).astype(np.float32)
        colors = np.concatenate([colors[:, :3], colors[:, 3:] if colors.shape[1] == 4 else np.ones((len(colors), 1), np.float32)], 1)
    if world.ndim == 3:
        world = _blend(document, attributes, world)
    linear = world[..., :3, :3]
    positions = np.einsum("...ij,...j->...i", linear, positions) + world[..., :3, 3]
    if normals is not None:
        normals = np.einsum("...ij,...j->...i", _cofactor(linear), normals)
    if np.linalg.det(linear.reshape(-1, 3, 3)[0]) < 0:
        faces = faces[:, ::-1]  # a mirrored node turns the winding round
        normals = None if normals is None else -normals
    if normals is None:
        extra = (*uvs, *([] if colors is None else [colors]))
        positions, faces, normals, extra = flat_normals(positions, faces, extra)
        uvs, colors = list(extra[:len(uvs)]), None if colors is None else extra[-1]
    return {"vertices": positions, "faces": faces, "normals": normals, "uvs": uvs, "colors": colors, "material": primitive.get("material", -1)}


def _blend(document: GltfDocument, attributes: dict, joints: np.ndarray) -> np.ndarray:
    """Per-vertex matrices [V, 4, 4] of a skinned primitive."""
    which = document.accessor(attributes["JOINTS_0"], False).astype(np.int64)
    weight = document.accessor(attributes["WEIGHTS_0"]).astype(np.float64)
    weight /= np.maximum(weight.sum(1, keepdims=True), 1e-12)
    return sum(weight[:, k, None, None] * joints[which[:, k]] for k in range(4))


def _cofactor(linear: np.ndarray) -> np.ndarray:
    """det(A) times the inverse transpose: carries normals, and stays defined where a scale is zero."""
    a, b, c = linear[..., 0, :], linear[..., 1, :], linear[..., 2, :]
    return np.stack([np.cross(b, c), np.cross(c, a), np.cross(a, b)], -2)
