"""Writer of training objects, the twin of :mod:`near.training.starter`. The same content gives the same bytes."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from near.atomic import write_bytes
from near.colour import srgb_encode
from near.training.starter import DEPTH_STEP, LOG_FLOOR, LOG_TOP, POSITION_STEP

FORMAT = 2  # 1: the starter set; 2 adds photos, shadow and a K for each camera, all optional


@dataclass(frozen=True)
class PhotoFile:
    """jpeg: the photo as a file, alpha: its matte uint8 [S, S]; facts: JSON data (camera, light, capture)."""

    jpeg: bytes
    alpha: np.ndarray
    facts: dict


@dataclass(frozen=True)
class ObjectArrays:
    """What the renderer made of one object; shapes, units and colour spaces as :class:`near.training.starter.StarterObject`.

    matrix_world [C, 4, 4] Blender camera-to-world; K [3, 3] or [C, 3, 3] pixels; shadow [C, L, H, W] or None; meta: JSON data
    with ``object`` and ``lights`` (C lists of L of ``hdri``, ``rotation_z``, ``strength``).
    """

    light: np.ndarray
    ambient: np.ndarray
    alpha: np.ndarray
    base_lin709: np.ndarray
    roughness: np.ndarray
    metallic: np.ndarray
    normal: np.ndarray
    depth: np.ndarray
    matrix_world: np.ndarray
    K: np.ndarray
    points: np.ndarray
    point_normals: np.ndarray
    point_base_lin709: np.ndarray
    point_roughness: np.ndarray
    point_metallic: np.ndarray
    meta: dict
    shadow: np.ndarray | None = None
    photos: tuple[PhotoFile, ...] = field(default=())


def write_starter(path: Path, content: ObjectArrays) -> None:
    """Write one object, whole or not at all.

    Raises:
        NearError: as :func:`near.atomic.write_bytes`.
    """
    seen = content.alpha > 1e-3
    bytes8 = lambda x: np.round(np.clip(x, 0, 1) * 255).astype(np.uint8)  # noqa: E731
    int8 = lambda x: np.round(np.clip(x, -1, 1) * 127).astype(np.int8).view(np.uint8)  # noqa: E731
    arrays = {
        "light": _webp(_log_code(content.light)), "ambient": _webp(_log_code(content.ambient)),
        "gb_base": _webp(_srgb_code(content.base_lin709) * seen[..., None]),
        "gb_rma": _webp(np.stack([bytes8(content.roughness), bytes8(content.metallic), bytes8(content.alpha)], -1)),
        "gb_nrm": _webp(int8(content.normal)), "gb_depth": _depth_code(content.depth),
        "cam_matrix_world": content.matrix_world.astype(np.float32), "cam_K": content.K.astype(np.float32), **_point_codes(content)}
    meta = {"format": FORMAT, **content.meta}
    if content.shadow is not None:
        arrays["shadow"] = _file_bytes(Image.fromarray(bytes8(content.shadow).reshape(-1, content.shadow.shape[-1])), "PNG")
    if content.photos:
        files = [(p.jpeg, _file_bytes(Image.fromarray(p.alpha), "PNG").tobytes()) for p in content.photos]
        arrays["photos"] = np.frombuffer(b"".join(part for pair in files for part in pair), np.uint8)
        meta["photos"] = [{**p.facts, "bytes": [len(jpeg), len(matte)]} for p, (jpeg, matte) in zip(content.photos, files)]
    arrays["meta"] = np.frombuffer(json.dumps(meta, separators=(",", ":"), sort_keys=True).encode(), np.uint8)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)
            # A fixed date: files of the same content are equal.
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), member.getvalue(), zipfile.ZIP_LZMA)
    write_bytes(path, buffer.getvalue())


def _log_code(radiance: np.ndarray) -> np.ndarray:
    return np.round(255 * np.log1p(np.clip(radiance, 0, LOG_TOP) / LOG_FLOOR) / np.log1p(LOG_TOP / LOG_FLOOR)).astype(np.uint8)


def _srgb_code(rgb_lin709: np.ndarray) -> np.ndarray:
    return np.round(srgb_encode(np.clip(rgb_lin709, 0, 1).astype(np.float32)) * 255).astype(np.uint8)


def _file_bytes(image: Image.Image, kind: str, **options) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def _webp(images: np.ndarray) -> np.ndarray:
    """uint8 [..., S, S, 3] stacked top to bottom."""
    return _file_bytes(Image.fromarray(np.ascontiguousarray(images).reshape(-1, images.shape[-2], 3)), "WEBP", lossless=True, quality=100, method=4)


def _delta(values: np.ndarray, axis: int) -> np.ndarray:
    """Differences to the value before (0 before the first), wrapping around."""
    return np.diff(values, axis=axis, prepend=np.zeros_like(np.take(values, [0], axis)))


def _zigzag(steps: np.ndarray) -> np.ndarray:
    """int16 -> uint16 with small numbers for small steps of either sign."""
    steps = steps.astype(np.int16)
    return ((steps << 1) ^ (steps >> 15)).view(np.uint16)


def _depth_code(depth: np.ndarray) -> np.ndarray:
    code = _zigzag(_delta(np.round(np.clip(depth, 0, 7.9) / DEPTH_STEP).astype(np.uint16), -1).view(np.int16))
    return np.stack([code >> 8, code & 255]).astype(np.uint8)


def _point_codes(content: ObjectArrays) -> dict[str, np.ndarray]:
    """Points in the order of a Morton curve, as differences to their neighbour."""
    cell = np.clip(np.round((content.points + 0.5) / POSITION_STEP), 0, round(1 / POSITION_STEP)).astype(np.int32)
    order = np.argsort(_morton(cell), kind="stable")
    position = _zigzag(_delta(cell[order], 0))
    base = _srgb_code(content.point_base_lin709[order])
    base[:, 0] -= base[:, 1]
    base[:, 2] -= base[:, 1]
    normal = np.round(content.point_normals[order] * 127).astype(np.int8).view(np.uint8)
    material = np.round(np.clip(np.stack([content.point_roughness, content.point_metallic], -1)[order], 0, 1) * 255).astype(np.uint8)
    return {"p_pos": np.concatenate([(position >> 8).T, (position & 255).T]).astype(np.uint8),
            "p_nrm": _delta(normal, 0).T, "p_base": _delta(base, 0).T, "p_rm": _delta(material, 0).T}


def _morton(cell: np.ndarray) -> np.ndarray:
    """Interleave the bits of int [N, 3]: uint64 [N]."""
    key = np.zeros(len(cell), np.uint64)
    for bit in range(12):
        for axis in range(3):
            key |= ((cell[:, axis].astype(np.uint64) >> np.uint64(bit)) & np.uint64(1)) << np.uint64(3 * bit + axis)
    return key
