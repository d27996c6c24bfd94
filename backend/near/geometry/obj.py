"""Wavefront OBJ with MTL materials, including the PBR statements (`Pr`, `Pm`, `map_Pr`, `map_Pm`, `norm`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from near.geometry.mesh import BLEND, MASK, Material, RawMesh, too_big, unreadable
from near.geometry.gltf import Z_UP_FROM_Y_UP
from near.geometry.textures import SRGB_TO_LINEAR, Texture, TextureSlot, decode_texture


def read_obj(path: Path, max_triangles: int, digest) -> RawMesh:
    """Reader for `load_mesh`; Y-up as Blender imports it."""
    data = path.read_bytes()
    digest.update(data)
    faces = data.count(b"\nf ")
    if faces > max_triangles:
        raise too_big(f"has {faces:,} faces", max_triangles)
    if b"\0" in data[:4096]:
        raise unreadable(path.name, "it is not a text file")
    text = data.decode("utf-8", "replace").replace("\\\r\n", " ").replace("\\\n", " ")
    lines: dict[str, list[str]] = {"v": [], "vt": [], "vn": []}
    groups: list[tuple[str, list[str]]] = []
    current, libraries, by_name = "", [], {}
    for line in text.splitlines():
        key, _, rest = line.lstrip().partition(" ")
        if key in lines:
            lines[key].append(rest)
        elif key == "f":
            if current not in by_name:
                by_name[current] = len(groups)
                groups.append((current, []))
            groups[by_name[current]][1].append(_absolute(rest, lines) if "-" in rest else rest)
        elif key == "usemtl":
            current = rest.strip()
        elif key == "mtllib":
            libraries.append(rest.strip())
    positions, colors = _positions(lines["v"])
    coordinates, normals = _rows(lines["vt"], 2), _rows(lines["vn"], 3)
    counts = np.array([len(positions), len(coordinates), len(normals)])
    corners, face_material = [], []
    for number, (_, statements) in enumerate(groups):
        triangles = _triangulate(statements, counts)
        corners.append(triangles)
        face_material.append(np.full(len(triangles), number))
    if not corners:
        return RawMesh(np.zeros((0, 3)), np.zeros((0, 3), np.int64))
    corner = np.concatenate(corners)
    if len(corner) > max_triangles:
        raise too_big(f"has {len(corner):,} triangles", max_triangles)
    known = _read_libraries(path, libraries, digest)
    materials = tuple(known.get(name, Material(roughness=0.5)) for name, _ in groups)
    return _assemble(corner, positions, coordinates, normals, colors, np.concatenate(face_material), materials)


def _assemble(corner, positions, coordinates, normals, colors, face_material, materials) -> RawMesh:
    """One vertex per distinct (position, UV, normal) triple."""
    flat = corner.reshape(-1, 3)
    size = np.array([len(coordinates) + 1, len(normals) + 1], np.int64)
    key = (flat[:, 0] * size[0] + flat[:, 1] + 1) * size[1] + flat[:, 2] + 1
    _, first, index = np.unique(key, return_index=True, return_inverse=True)
    rows = flat[first]
    uv = np.zeros((len(rows), 2), np.float32)
    has_uv = rows[:, 1] >= 0
    uv[has_uv] = coordinates[rows[has_uv, 1]] * (1, -1) + (0, 1)
    swap = Z_UP_FROM_Y_UP[:3, :3].T
    return RawMesh(positions[rows[:, 0]] @ swap, index.reshape(-1, 3),
                   normals[rows[:, 2]] @ swap if len(normals) and (rows[:, 2] >= 0).all() else None,
                   (uv,) if has_uv.any() else (), None if colors is None else colors[rows[:, 0]], face_material, materials)


def _absolute(statement: str, lines: dict[str, list[str]]) -> str:
    """A face statement with its negative numbers, which count back from the last vertex so far, made positive."""
    have = [len(lines[k]) for k in ("v", "vt", "vn")]
    corners = []
    for corner in statement.split("#")[0].split():
        numbers = [int(x or 0) for x in corner.split("/")]
        if any(n < -h for n, h in zip(numbers, have)):
            raise ValueError("a face names a vertex that does not exist")
        corners.append("/".join(str(n + h + 1 if n < 0 else n) for n, h in zip(numbers, have)))
    return " ".join(corners)


def _rows(lines: list[str], width: int) -> np.ndarray:
    if not lines:
        return np.zeros((0, width))
    values = np.array(" ".join(lines).split(), float)
    if len(values) % len(lines) == 0 and len(values) // len(lines) >= width:
        return values.reshape(len(lines), -1)[:, :width]
    return np.array([(line.split() + ["0"] * width)[:width] for line in lines], float)


def _positions(lines: list[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Positions and, where written after them, vertex colours (linear RGBA)."""
    if lines and len(lines[0].split()) >= 6:
        rows = _rows(lines, 6)
        # 0..1 or 0..255, sRGB by habit of the programs that write them.
        srgb = np.clip(rows[:, 3:] / (255 if rows[:, 3:].max() > 1 else 1), 0, 1)
        linear = np.interp(srgb * 255, np.arange(256), SRGB_TO_LINEAR)
        return rows[:, :3], np.concatenate([linear, np.ones((len(rows), 1))], 1).astype(np.float32)
    return _rows(lines, 3), None


def _triangulate(statements: list[str], counts: np.ndarray) -> np.ndarray:
    """Corner indices [T, 3, 3] (position, UV, normal; -1 absent), polygons as fans."""
    words = [s.split("#")[0].split() for s in statements]
    sizes = np.array([len(w) for w in words])
    corners = [c for w in words for c in w]
    slashes = {c.count("/") for c in corners} if len(corners) < 64 else {corners[0].count("/"), corners[-1].count("/")}
    indices = _corner_indices(corners, slashes, counts)
    start = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    out = []
    for size in np.unique(sizes[sizes >= 3]):
        fan = np.stack([np.zeros(size - 2, int), np.arange(1, size - 1), np.arange(2, size)], -1)
        out.append((start[sizes == size][:, None, None] + fan).reshape(-1, 3))
    return indices[np.concatenate(out)] if out else np.zeros((0, 3, 3), np.int64)


def _corner_indices(corners: list[str], slashes: set[int], counts: np.ndarray) -> np.ndarray:
    width = max(slashes, default=0) + 1
    try:
        if len(slashes) != 1:
            raise ValueError("mixed forms")
        joined = " ".join(corners).replace("//", "/0/").replace("/", " ")
        values = np.array(joined.split(), np.int64).reshape(len(corners), width)
    except ValueError:  # corners of different forms in one file
        parsed = [[int(x or 0) for x in c.split("/")] for c in corners]
        values = np.array([(row + [0, 0])[:3] for row in parsed], np.int64).reshape(-1, 3)
    full = np.zeros((len(values), 3), np.int64)
    full[:, :values.shape[1]] = values
    if (full > counts).any() or (full < 0).any() or (full[:, 0] < 1).any():
        raise ValueError("a face names a vertex that does not exist")
    return full - 1  # 0 means absent


def _read_libraries(path: Path, names: list[str], digest) -> dict[str, Material]:
    materials: dict[str, Material] = {}
    images: dict[str, Texture | None] = {}
    for name in names:
        file = find_beside(path.parent, name)
        if file is None:
            continue  # common in the wild; the mesh is still useful in grey
        data = file.read_bytes()
        digest.update(data)
        statements: dict[str, list[str]] = {}
        current = None
        for line in data.decode("utf-8", "replace").splitlines() + ["newmtl "]:
            words = line.split("#")[0].split()
            if words and words[0] == "newmtl":
                if current is not None:
                    materials[current] = _material(current, statements, file.parent, images, digest)
                current, statements = " ".join(words[1:]), {}
            elif len(words) > 1:
                statements[words[0].lower()] = words[1:]
    return materials


def _material(name: str, s: dict[str, list[str]], folder: Path, images: dict, digest) -> Material:
    def slot(*keys: str) -> TextureSlot | None:
        for key in keys:
            if key in s and (texture := _texture(s[key], folder, images, digest)) is not None:
                return TextureSlot(texture)
        return None

    def number(key: str, default: float) -> float:
        return float(s[key][0]) if key in s else default

    base = slot("map_kd", "map_ka")
    rough, metal = slot("map_pr"), slot("map_pm")
    # Without PBR statements the Phong exponent is all there is; Blender's rule for it.
    roughness = number("pr", 1.0 if rough else 1 - (max(number("ns", 250.0), 0) / 1000) ** 0.5)
    color = tuple(float(c) for c in s.get("kd", ["1", "1", "1"])[:3]) if base is None else (1.0, 1.0, 1.0)
    alpha = number("d", 1 - number("tr", 0.0))
    mode = MASK if "map_d" in s and base is not None and base.texture.pixels.shape[2] == 4 else BLEND if alpha < 0.5 else "opaque"
    return Material(name, (*color, alpha), base, min(max(roughness, 0.0), 1.0), rough and (rough, 0), number("pm", 1.0 if metal else 0.0),
                    metal and (metal, 0), normal_map=slot("norm", "map_kn"), alpha_mode=mode)


def _texture(words: list[str], folder: Path, images: dict, digest) -> Texture | None:
    """The file a map statement names (its options skipped), decoded once."""
    for start in range(len(words)):
        name = " ".join(words[start:])
        file = find_beside(folder, name)
        if file is not None:
            if str(file) not in images:
                data = file.read_bytes()
                digest.update(data)
                images[str(file)] = Texture(decode_texture(data, file.name))
            return images[str(file)]
    return None


def find_beside(folder: Path, name: str) -> Path | None:
    """A file named in an OBJ or MTL: inside the folder, or its bare name beside it (files come with paths of the machine
    they were made on). Never outside the folder."""
    root = folder.resolve()
    plain = name.replace("\\", "/")
    for candidate in (plain, plain.rsplit("/", 1)[-1], "textures/" + plain.rsplit("/", 1)[-1]):
        target = (root / candidate).resolve()
        if target.is_relative_to(root) and target.is_file():
            return target
    return None
