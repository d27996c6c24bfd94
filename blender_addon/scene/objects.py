"""Proxy objects: what stands in the scene for an asset, and where its file is."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import bpy
from mathutils import Matrix

from .. import paths
from ..errors import NearError

_SHA = re.compile(r"[0-9a-f]{64}")
_UNEVEN = 1e-3                          # relative difference of the axes' scales that still counts as uniform; as the backend's


@dataclass(frozen=True)
class PlacedAsset:
    """One visible instance. `world_from_asset` [4][4]: rotation, uniform scale, translation; metres."""
    name: str
    path: Path
    sha256: str
    world_from_asset: tuple[tuple[float, ...], ...]


def is_proxy(obj: bpy.types.Object | None) -> bool:
    """Whether an object stands for an asset."""
    return obj is not None and obj.type == "MESH" and getattr(obj, "near_relight", None) is not None and obj.near_relight.is_proxy


def proxies(scene: bpy.types.Scene) -> list[bpy.types.Object]:
    """The scene's proxy objects, hidden ones too."""
    return [obj for obj in scene.objects if is_proxy(obj)]


def placed_assets(depsgraph: bpy.types.Depsgraph) -> list[PlacedAsset]:
    """All visible instances, through duplicates, collection instances and geometry nodes, in a steady order.

    Raises:
        NearError: `asset-file-missing`, `scale-not-uniform`, `transform-mirrored`, `transform-invalid`.
    """
    found = []
    for instance in depsgraph.object_instances:
        obj = instance.object
        if obj.type != "MESH" or not (instance.show_self or instance.is_instance):
            continue
        original = obj.original
        if not is_proxy(original):
            continue
        matrix = instance.matrix_world.copy()
        check_transform(matrix, original.name)
        found.append(PlacedAsset(original.name, asset_path(original), original.near_relight.sha256, tuple(tuple(row) for row in matrix)))
    return sorted(found, key=lambda p: (p.name, p.world_from_asset))


def check_transform(matrix: Matrix, name: str) -> None:
    """Assets keep their proportions.

    Raises:
        NearError: `transform-invalid`, `transform-mirrored`, `scale-not-uniform`.
    """
    linear = matrix.to_3x3()
    determinant = linear.determinant()
    if not abs(determinant) > 1e-24:           # also refuses NaN
        raise NearError("transform-invalid", f"The object {name} has no size: its scale is zero along an axis.", "Give it a scale above zero.")
    if determinant < 0:
        raise NearError("transform-mirrored", f"The object {name} is mirrored: its scale is negative.", "Give it a positive scale.")
    scale = determinant ** (1 / 3)
    gram = linear.transposed() @ linear
    if any(abs(gram[i][j] - (scale * scale if i == j else 0.0)) > _UNEVEN * scale * scale for i in range(3) for j in range(3)):
        raise NearError("scale-not-uniform", f"The object {name} is scaled differently along its axes, or sheared.",
                        "Give it the same scale on all axes: relightable assets keep their proportions.")


def asset_path(obj: bpy.types.Object) -> Path:
    """The asset's file: where the object says, beside the .blend, in the add-on's folder, or packed in the .blend.

    Raises:
        NearError: `asset-file-missing`.
    """
    data = obj.near_relight
    for path in candidate_paths(obj):
        if path.is_file():
            return path
    if data.packed is not None and (content := packed_bytes(data.packed)) is not None:
        path = paths.asset_store() / f"{data.sha256}.near"
        paths.write_atomic(path, content)
        return path
    raise NearError("asset-file-missing", f"The asset file of {obj.name} is not there ({data.asset_path or 'no path'}).",
                    "Find the file, or create the asset again.")


def candidate_paths(obj: bpy.types.Object) -> list[Path]:
    """Where the asset's file may be, most likely first."""
    data, found = obj.near_relight, []
    if data.asset_path:
        found.append(Path(os.path.normpath(bpy.path.abspath(data.asset_path, library=obj.library))))
    if _SHA.fullmatch(data.sha256):
        name = f"{data.sha256}.near"
        places = [paths.beside_blend(), paths.asset_store(create=False)]
        if obj.library is not None:
            places.insert(0, paths.beside_blend(bpy.path.abspath(obj.library.filepath)))
        if data.origin:                          # where it was when its .blend was saved: an appended object finds it there
            places.append(Path(data.origin))
        found += [place / name for place in places if place is not None]
    return found


# ---------------------------------------------------------------- packing
_PACKED = "near_asset"


def packed_bytes(text: bpy.types.Text) -> bytes | None:
    """The content that `pack` put into a .blend."""
    content = text.get(_PACKED)
    return bytes(content) if isinstance(content, (bytes, bytearray)) else None


def pack(obj: bpy.types.Object) -> None:
    """Puts the asset's file into the .blend; objects that share the asset share the copy. Raises as `asset_path`."""
    data = obj.near_relight
    name = f"near_{data.sha256[:12]}"
    text = next((t for t in bpy.data.texts if t.name.startswith(name) and t.library is None and _PACKED in t), None)
    if text is None:
        content = asset_path(obj).read_bytes()
        text = bpy.data.texts.new(name)
        text.write(f"The packed NeAR asset {data.sha256}. Delete this text to drop the copy.\n")
        text[_PACKED] = content
    data.packed = text


def unpack(obj: bpy.types.Object) -> Path:
    """Writes the packed copy back to a file and forgets it. Raises as `asset_path`."""
    path = asset_path(obj)
    text, obj.near_relight.packed = obj.near_relight.packed, None
    if text is not None and text.users <= text.use_fake_user:
        bpy.data.texts.remove(text)
    return path
