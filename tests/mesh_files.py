"""Small mesh files for tests: a glTF writer that takes plain arrays, and a rasteriser that knows no splats."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
from numba import njit

_CODES = {"int8": 5120, "uint8": 5121, "int16": 5122, "uint16": 5123, "uint32": 5125, "float32": 5126}
_TYPES = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4", 16: "MAT4"}


def icosphere(subdivisions: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Unit sphere, outward winding."""
    import trimesh

    mesh = trimesh.creation.icosphere(subdivisions)
    return np.asarray(mesh.vertices, np.float32), np.asarray(mesh.faces, np.int64)


def quad(z: float = 0.0, size: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Square in x, y facing +z (file space): vertices, faces, UVs with v = 0 at the far (+y) side."""
    corner = np.array([(0, 0), (1, 0), (1, 1), (0, 1)], np.float32)
    vertices = np.concatenate([(corner - 0.5) * size, np.full((4, 1), z, np.float32)], 1).astype(np.float32)
    return vertices, np.array([(0, 1, 2), (0, 2, 3)]), np.stack([corner[:, 0], 1 - corner[:, 1]], -1)


class GlbWriter:
    """Collects accessors, images, materials, meshes and nodes; ``bytes()`` gives the file."""

    def __init__(self) -> None:
        self.binary = b""
        self.json: dict = {"asset": {"version": "2.0"}, "buffers": [{}], "bufferViews": [], "accessors": [], "meshes": [], "nodes": [],
                           "materials": [], "images": [], "textures": [], "scenes": [{"nodes": []}], "scene": 0}

    def view(self, data: bytes) -> int:
        self.binary += b"\0" * (-len(self.binary) % 4)
        self.json["bufferViews"].append({"buffer": 0, "byteOffset": len(self.binary), "byteLength": len(data)})
        self.binary += data
        return len(self.json["bufferViews"]) - 1

    def accessor(self, values: np.ndarray, normalized: bool = False) -> int:
        values = np.asarray(values)
        width = 1 if values.ndim == 1 else values.shape[1]
        self.json["accessors"].append({"bufferView": self.view(values.tobytes()), "componentType": _CODES[values.dtype.name], "count": len(values),
                                       "type": _TYPES[width], "normalized": normalized})
        return len(self.json["accessors"]) - 1

    def texture(self, png: bytes, sampler: dict | None = None) -> int:
        self.json["images"].append({"bufferView": self.view(png), "mimeType": "image/png"})
        entry = {"source": len(self.json["images"]) - 1}
        if sampler:
            self.json.setdefault("samplers", []).append(sampler)
            entry["sampler"] = len(self.json["samplers"]) - 1
        self.json["textures"].append(entry)
        return len(self.json["textures"]) - 1

    def material(self, **data) -> int:
        self.json["materials"].append(data)
        return len(self.json["materials"]) - 1

    def primitive(self, vertices, faces, normals=None, uv=None, material=None, extra=None, mode=4) -> dict:
        attributes = {"POSITION": vertices if isinstance(vertices, int) else self.accessor(np.asarray(vertices, np.float32))}
        if normals is not None:
            attributes["NORMAL"] = normals if isinstance(normals, int) else self.accessor(np.asarray(normals, np.float32))
        if uv is not None:
            attributes["TEXCOORD_0"] = uv if isinstance(uv, int) else self.accessor(np.asarray(uv, np.float32))
        attributes.update(extra or {})
        primitive = {"attributes": attributes, "mode": mode}
        if faces is not None:
            primitive["indices"] = self.accessor(np.asarray(faces, np.uint32).reshape(-1))
        if material is not None:
            primitive["material"] = material
        return primitive

    def add(self, *primitives: dict, root: bool = True, **node) -> int:
        self.json["meshes"].append({"primitives": list(primitives)})
        self.json["nodes"].append({"mesh": len(self.json["meshes"]) - 1, **node})
        if root:
            self.json["scenes"][0]["nodes"].append(len(self.json["nodes"]) - 1)
        return len(self.json["nodes"]) - 1

    def bytes(self) -> bytes:
        data = {k: v for k, v in self.json.items() if v != []}
        data["buffers"] = [{"byteLength": len(self.binary)}]
        text = json.dumps(data).encode()
        text += b" " * (-len(text) % 4)
        binary = self.binary + b"\0" * (-len(self.binary) % 4)
        total = 12 + 8 + len(text) + 8 + len(binary)
        return b"".join([struct.pack("<4sII", b"glTF", 2, total), struct.pack("<I4s", len(text), b"JSON"), text,
                         struct.pack("<I4s", len(binary), b"BIN\0"), binary])

    def write(self, path: Path) -> Path:
        path.write_bytes(self.bytes())
        return path


@njit(cache=True)
def _rasterise(pixel, z, faces, face, weights, depth):
    height, width = face.shape
    for f in range(len(faces)):
        i, j, k = faces[f]
        ax, ay, bx, by, cx, cy = pixel[i, 0], pixel[i, 1], pixel[j, 0], pixel[j, 1], pixel[k, 0], pixel[k, 1]
        area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
        if abs(area) < 1e-12:
            continue
        for y in range(max(int(np.ceil(min(ay, by, cy) - 0.5)), 0), min(int(np.floor(max(ay, by, cy) - 0.5)) + 1, height)):
            for x in range(max(int(np.ceil(min(ax, bx, cx) - 0.5)), 0), min(int(np.floor(max(ax, bx, cx) - 0.5)) + 1, width)):
                px, py = x + 0.5, y + 0.5
                w1 = ((px - ax) * (cy - ay) - (cx - ax) * (py - ay)) / area
                w2 = ((bx - ax) * (py - ay) - (px - ax) * (by - ay)) / area
                if w1 < 0 or w2 < 0 or w1 + w2 > 1:
                    continue
                # Perspective: weights are linear in 1 / z.
                q0, q1, q2 = (1 - w1 - w2) / z[i], w1 / z[j], w2 / z[k]
                here = 1 / (q0 + q1 + q2)
                if 0 < here < depth[y, x]:
                    depth[y, x] = here
                    face[y, x] = f
                    weights[y, x, 0], weights[y, x, 1], weights[y, x, 2] = q0 * here, q1 * here, q2 * here


def rasterise(mesh, camera):
    """Nearest face [H, W] (-1: none), its barycentric weights [H, W, 3] and camera z (inf: none) at pixel centres."""
    pixel, z = camera.project(mesh.vertices.double())
    if camera.projection != "perspective":
        z = 1 + (z - z.min()) * 1e-9  # flat weights; nearest by the average depth is enough for coverage
    face = np.full((camera.height, camera.width), -1)
    weights = np.zeros((camera.height, camera.width, 3))
    depth = np.full(face.shape, np.inf)
    _rasterise(pixel.numpy(), z.numpy(), mesh.faces.numpy(), face, weights, depth)
    return face, weights, depth
