"""Reader of training objects: the starter set (format 1) and what `tools/render_dataset.py` writes (format 2).

One ``.npz`` is one object. Format 2 adds optional keys: ``shadow``, ``photos`` and a K for each camera.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from near.errors import NearError
from near.geometry.cameras import Camera, camera_from_blender

LOG_FLOOR, LOG_TOP = 0.02, 64.0
POSITION_STEP, DEPTH_STEP = 1 / 1024, 1 / 8192


@dataclass(frozen=True)
class Light:
    """One light of one view: environment id, rotation about +Z (radians), strength."""

    hdri: str
    rotation_z_rad: float
    strength: float


@dataclass(frozen=True)
class CapturedPhoto:
    """A photo as a camera would have saved it: srgb uint8 [S, S, 3] with its noise, JPEG blocks and sometimes a background;
    alpha uint8 [S, S] of the object; the camera of its pixels; its light; capture: JSON data (exposure, view, quality, ...)."""

    srgb: Tensor
    alpha: Tensor
    camera: Camera
    light: Light
    capture: dict


@dataclass(frozen=True)
class StarterObject:
    """C cameras, L lights each, H x W pixels, N surface samples. Colours are linear Rec.709.

    light [C, L, H, W, 3] and ambient [C, H, W, 3] premultiplied radiance; alpha, roughness, metallic [C, H, W];
    base_lin709, normal [C, H, W, 3]; depth [C, H, W] metric z, 0 = empty; points, point_normals, point_base_lin709
    [N, 3]; point_roughness, point_metallic [N]; lights: C lists of L; shadow [C, L, H, W] share of the unoccluded
    irradiance that arrives, or None; photos: format 2 only.
    """

    name: str
    light: Tensor
    ambient: Tensor
    alpha: Tensor
    base_lin709: Tensor
    roughness: Tensor
    metallic: Tensor
    normal: Tensor
    depth: Tensor
    points: Tensor
    point_normals: Tensor
    point_base_lin709: Tensor
    point_roughness: Tensor
    point_metallic: Tensor
    cameras: list[Camera]
    lights: list[list[Light]]
    shadow: Tensor | None = None
    photos: list[CapturedPhoto] = field(default_factory=list)


def object_files(folders: list[Path]) -> list[Path]:
    """Training objects (.npz) in folders and in all that lies below them, folder by folder, sorted.

    Raises:
        NearError: ``training-data-missing`` when there is none.
    """
    found = [path for folder in folders for path in sorted(folder.rglob("[!.]*.npz"))]  # hidden ones are half written
    if not found:
        raise NearError("training-data-missing", f"There are no training objects (.npz) in {', '.join(str(f) for f in folders)}.",
                        "Make some with tools/render_dataset.py and name its folder of objects.")
    return found


def read_starter(path: Path) -> StarterObject:
    """Decode one object.

    Raises:
        NearError: ``training-data-broken`` when the file is not a starter object.
    """
    try:
        with np.load(path, allow_pickle=False) as f:
            return _decode(f)
    except (KeyError, ValueError, OSError, EOFError) as error:
        raise NearError("training-data-broken", f"{path.name} is not a readable training object ({error}).",
                        "Remove it or fetch the training data again.") from error


def _decode(f) -> StarterObject:
    meta = json.loads(bytes(f["meta"]))
    matrices = torch.from_numpy(f["cam_matrix_world"].astype(np.float32))
    views, lights = len(matrices), len(meta["lights"][0])
    log_table = (LOG_FLOOR * np.expm1(np.arange(256) / 255 * np.log1p(LOG_TOP / LOG_FLOOR))).astype(np.float32)
    level = np.arange(256) / 255
    srgb_table = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4).astype(np.float32)
    lit = log_table[_webp(f["light"], views, lights)]
    masks = _webp(f["gb_rma"], views).astype(np.float32) / 255
    normal = _webp(f["gb_nrm"], views).view(np.int8).astype(np.float32)
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-6)
    position, point_normal, base8, material8 = _points(f)
    size = lit.shape[-2]
    K = torch.from_numpy(f["cam_K"].astype(np.float32)).expand(views, 3, 3)
    shadow = None
    if "shadow" in f:
        shadow = torch.from_numpy(_picture(f["shadow"].tobytes()).astype(np.float32).reshape(views, lights, size, size) / 255)
    t = torch.from_numpy
    return StarterObject(
        name=str(meta.get("object", "")), light=t(lit), ambient=t(log_table[_webp(f["ambient"], views)]),
        alpha=t(masks[..., 2].copy()), base_lin709=t(srgb_table[_webp(f["gb_base"], views)]),
        roughness=t(masks[..., 0].copy()), metallic=t(masks[..., 1].copy()), normal=t(normal), depth=t(_depth(f["gb_depth"])),
        points=t(position), point_normals=t(point_normal), point_base_lin709=t(srgb_table[base8]),
        point_roughness=t(material8[:, 0].copy()), point_metallic=t(material8[:, 1].copy()),
        cameras=[camera_from_blender(m, k, size, size) for m, k in zip(matrices, K)],
        lights=[[_light(x) for x in view] for view in meta["lights"]], shadow=shadow, photos=_photos(f, meta))


def _light(entry: dict) -> Light:
    return Light(entry["hdri"], float(entry["rotation_z"]), float(entry["strength"]))


def _photos(f, meta: dict) -> list[CapturedPhoto]:
    photos, start = [], 0
    data = f["photos"].tobytes() if "photos" in f else b""
    for facts in meta.get("photos", ()):
        middle = start + facts["bytes"][0]
        end = middle + facts["bytes"][1]
        srgb, alpha = _picture(data[start:middle]), _picture(data[middle:end])
        matrix, K = (torch.tensor(facts[name], dtype=torch.float32) for name in ("matrix_world", "K"))
        photos.append(CapturedPhoto(torch.from_numpy(srgb.copy()), torch.from_numpy(alpha.copy()),
                                    camera_from_blender(matrix, K, srgb.shape[1], srgb.shape[0]), _light(facts["light"]), facts["capture"]))
        start = end
    return photos


def _picture(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def _depth(code: np.ndarray) -> np.ndarray:
    """Undo the differences along a row: metric z [C, H, W], 0 = empty."""
    zigzag = (code[0].astype(np.uint16) << 8) | code[1]
    steps = (zigzag >> 1) ^ (0 - (zigzag & 1)).astype(np.uint16)
    return np.cumsum(steps, -1, dtype=np.uint16).astype(np.float32) * DEPTH_STEP


def _webp(data: np.ndarray, *lead: int) -> np.ndarray:
    """Images of one kind, stacked top to bottom in one lossless WebP: uint8 [*lead, S, S, 3]."""
    tall = np.asarray(Image.open(io.BytesIO(data.tobytes())).convert("RGB"))
    return tall.reshape(*lead, tall.shape[1], tall.shape[1], 3)


def _points(f) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Undo the delta coding along the Morton curve: positions, unit normals, base colour codes, [rough, metal]."""
    planes = f["p_pos"].astype(np.uint16)
    zigzag = ((planes[:3] << 8) | planes[3:]).T
    steps = (zigzag >> 1).astype(np.int32) ^ -(zigzag & 1).astype(np.int32)
    position = np.cumsum(steps, 0).astype(np.float32) * POSITION_STEP - 0.5
    normal = np.cumsum(f["p_nrm"].T, 0, dtype=np.uint8).view(np.int8).astype(np.float32)
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-6)
    base = np.cumsum(f["p_base"].T, 0, dtype=np.uint8)
    base[:, 0] += base[:, 1]
    base[:, 2] += base[:, 1]
    material = np.cumsum(f["p_rm"].T, 0, dtype=np.uint8).astype(np.float32) / 255
    return position, normal, base, material
