"""Training objects, precomputed: anchors, sparse splat matrices, lifted photos and SLAT targets, one file each.

With the geometry of a training object fixed, an image is ``W @ colours`` with one sparse matrix per camera, so the
renderer trains through the splatter at the price of a sparse product.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from near.colour import agx_srgb
from near.geometry.cameras import Camera
from near.models.anchors import AnchorCloud, build_anchors, decode_anchors
from near.models.backprojection import blend_matrix
from near.models.exchange import build_exchange
from near.models.lifting import lift_photo
from near.models.material import encode_colour, encode_material, shaded_slat, voxel_mean
from near.models.shading import light_surface, shade_terms
from near.training.lights import LightLibrary
from near.training.starter import StarterObject, read_starter

SUPERSAMPLE = 2


@dataclass(frozen=True)
class CacheConfig:
    """resolution: voxels per side; spread: disc radius over mean neighbour distance (as in the pipeline)."""

    resolution: int = 32
    spread: float = 0.6


def splat_matrix(cloud: AnchorCloud, camera: Camera) -> scipy.sparse.csr_matrix:
    """[H * W, M]: splat at twice the size, then average 2 x 2 (the pipeline's downsampling)."""
    fine = camera.scaled(SUPERSAMPLE)
    y, x = np.divmod(np.arange(fine.height * fine.width), fine.width)
    coarse = (y // SUPERSAMPLE) * camera.width + x // SUPERSAMPLE
    pool = scipy.sparse.csr_matrix((np.full(len(coarse), 1 / SUPERSAMPLE ** 2, np.float32), (coarse, np.arange(len(coarse)))),
                                   shape=(camera.height * camera.width, len(coarse)))
    return (pool @ blend_matrix(cloud, fine)).astype(np.float32).tocsr()


def pack_matrix(matrix: scipy.sparse.csr_matrix) -> dict:
    """A sparse matrix as tensors (no pickled code in the cache)."""
    return {"indptr": torch.from_numpy(matrix.indptr.astype(np.int32)), "indices": torch.from_numpy(matrix.indices.astype(np.int32)),
            "data": torch.from_numpy(matrix.data.astype(np.float16)), "shape": list(matrix.shape)}


def unpack_matrix(packed: dict) -> scipy.sparse.csr_matrix:
    """Inverse of :func:`pack_matrix`."""
    return scipy.sparse.csr_matrix((packed["data"].float().numpy(), packed["indices"].numpy(), packed["indptr"].numpy()),
                                   shape=tuple(packed["shape"]))


def build_cache(source: StarterObject, lights: LightLibrary, config: CacheConfig) -> dict:
    """Everything the trainers read of one object, as plain tensors."""
    normals = source.point_normals
    coords, anchors, rows = build_anchors(source.points, normals, normals, config.resolution, spread=config.spread)
    cloud = decode_anchors(coords, anchors, config.resolution)
    count = len(coords)
    encoded = encode_material(source.point_base_lin709[rows], source.point_roughness[rows], source.point_metallic[rows])
    mean = voxel_mean(encoded, cloud.voxel, count)
    variance = (voxel_mean(encoded ** 2, cloud.voxel, count) - mean ** 2).clamp_min(0).sqrt()
    linear = torch.cat([source.point_base_lin709[rows], source.point_roughness[rows, None], source.point_metallic[rows, None]], -1)
    surface, exchange = cloud.surface(linear), build_exchange(cloud, config.resolution)

    ambient_sum, ambient_weight = torch.zeros(count, 3), torch.zeros(count, 1)
    matrices, photos = [], []
    for c, camera in enumerate(source.cameras):
        matrices.append(splat_matrix(cloud, camera))
        alpha = source.alpha[c]
        straight = source.ambient[c] / alpha.clamp_min(1e-3)[..., None]
        lifted = lift_photo(cloud, coords, config.resolution, straight.clamp(0, 2) / 2, alpha, camera)
        seen = voxel_mean(lifted.seen[:, None], cloud.voxel, count)
        ambient_sum += lifted.voxel_colour * 2 * seen
        ambient_weight += seen
        for i, spec in enumerate(source.lights[c]):
            env, light = lights.get(spec.hdri, spec.rotation_z_rad, spec.strength)
            photos.append(_photo(source, cloud, coords, surface, exchange, c, i, env, light, config))
    white = surface.base_lin709 * (1 - surface.metallic[:, None]) + surface.base_lin709 * surface.metallic[:, None]
    analytic = voxel_mean(white * (0.5 + 0.5 * cloud.openness[:, None]), cloud.voxel, count)
    known = ambient_weight > 0.02
    homogeneous = torch.where(known, ambient_sum / ambient_weight.clamp_min(1e-6), analytic)
    slat = torch.cat([mean, encode_colour(homogeneous)], -1)
    return {
        "name": source.name, "coords": coords, "anchors": {k: getattr(anchors, k) for k in anchors.__dataclass_fields__},
        "material": encoded.half(), "material_spread": variance.half(), "slat": slat.half(),
        "slat_known": known[:, 0], "analytic_homogeneous": encode_colour(analytic).half(),
        "matrices": [pack_matrix(m) for m in matrices],
        "lit": source.light.half(), "alpha": source.alpha.half(), "cam_from_world": torch.stack([c.cam_from_world for c in source.cameras]),
        "K": source.cameras[0].K, "lights": [[(s.hdri, s.rotation_z_rad, s.strength) for s in view] for view in source.lights],
        "photos": photos,
    }


def _photo(source, cloud, coords, surface, exchange, view, index, env, light, config) -> dict:
    """One lit image as a photo: display colours, lifted features and the shaded SLAT it should lead to."""
    camera, alpha = source.cameras[view], source.alpha[view]
    display = agx_srgb(source.light[view, index] / alpha.clamp_min(1e-3)[..., None])
    display = (display * 255).round() / 255
    lifted = lift_photo(cloud, coords, config.resolution, display, alpha, camera)
    # Unseen voxels: what the analytic renderer says a viewer straight above the surface would see.
    incident = light_surface(surface, light, env, exchange)
    shade = shade_terms(surface, incident, light, env, surface.normals).combine()
    painted = voxel_mean(agx_srgb(shade), cloud.voxel, len(coords))
    seen = voxel_mean(lifted.seen[:, None], cloud.voxel, len(coords)) > 0.02
    target = shaded_slat(torch.where(seen, lifted.voxel_colour, painted))
    return {"view": view, "light": index, "srgb": (display * alpha[..., None] * 255).round().to(torch.uint8),
            "features": lifted.features.half(), "voxel_colour": lifted.voxel_colour.half(), "shaded": target.half()}


def cache_folder(sources: list[Path], hdri_folder: Path, out: Path, config: CacheConfig, progress=None) -> list[Path]:
    """Precompute every object of ``sources`` that ``out`` does not hold yet."""
    lights = LightLibrary(hdri_folder)
    out.mkdir(parents=True, exist_ok=True)
    done = []
    for k, path in enumerate(sources):
        target = out / f"{path.resolve().parent.name}_{path.stem}.pt"
        if not target.exists():
            temporary = target.with_suffix(".part")
            torch.save(build_cache(read_starter(path), lights, config), temporary)
            temporary.replace(target)
        done.append(target)
        if progress:
            progress("precompute", (k + 1) / len(sources), None)
    return done
