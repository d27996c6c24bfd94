"""Photo(s), and a mesh if there is one -> published asset (spec sections 9 to 11)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from near.assets import Asset
from near.errors import NearError
from near.geometry.mesh import PbrMesh
from near.geometry.photo import Photo, square_crop
from near.geometry.voxels import voxelize
from near.models.conditioner import ImageConditioner
from near.models.homogenizer import Homogenizer
from near.models.samplers import SamplerConfig
from near.models.sparse_structure import SparseStructureDecoder, SparseStructureFlowModel, photo_to_voxels
from near.nn import SparseTensor
from near.pipeline.proxy import MAX_PROXY_FACES, proxy_mesh
from near.pipeline.types import CancelCheck, Progress, check

FACE_CORNERS = {  # corners of a voxel's face, counter-clockwise seen from outside, by axis and side
    (0, 0): ((0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 1, 0)), (0, 1): ((1, 0, 0), (1, 1, 0), (1, 1, 1), (1, 0, 1)),
    (1, 0): ((0, 0, 0), (1, 0, 0), (1, 0, 1), (0, 0, 1)), (1, 1): ((0, 1, 0), (0, 1, 1), (1, 1, 1), (1, 1, 0)),
    (2, 0): ((0, 0, 0), (0, 1, 0), (1, 1, 0), (1, 0, 0)), (2, 1): ((0, 0, 1), (1, 0, 1), (1, 1, 1), (0, 1, 1))}


@dataclass(frozen=True)
class StructureModels:
    """TRELLIS's photo -> voxels."""

    flow: SparseStructureFlowModel
    decoder: SparseStructureDecoder
    sampler: SamplerConfig


@dataclass(frozen=True)
class CreatorModels:
    """What creating an asset needs: features, flow(s), the SLAT's normalisation, and a structure model if installed.

    slat_mean, slat_std: [C]. sampler: the checkpoint's own settings.
    """

    conditioner: ImageConditioner
    homogenizer: Homogenizer
    sampler: SamplerConfig
    slat_mean: Tensor
    slat_std: Tensor
    structure: StructureModels | None = None


@torch.inference_mode()
def create_asset(models: CreatorModels, photos: Sequence[Photo], mesh: PbrMesh | None, *, seed: int, steps: int | None,
                 multi_image: str, progress: Progress, cancelled: CancelCheck | None, meta: dict) -> Asset:
    """Sample an asset.

    Args:
        photos: with mattes, one or several of the same object. mesh: gives the voxels; without it the structure model does.
        multi_image: ``stochastic`` or ``multidiffusion``, for several photos. meta: goes into the asset.
    Raises:
        NearError: ``no-geometry`` without mesh and structure model; ``too-many-voxels``; ``Cancelled``.
    """
    device = models.homogenizer.base.input_layer.weight.device
    flow = models.homogenizer.base
    progress("photo", 0.0, None)
    conditions = []
    for photo in photos:
        check(cancelled)
        conditions.append(models.conditioner(photo_tensor(photo, models.conditioner.side).to(device)))
    sampler = replace(models.sampler, multi_image=multi_image, steps=steps or models.sampler.steps)
    start = 0.1
    if mesh is not None:
        coords = torch.as_tensor(voxelize(mesh.vertices, mesh.faces, flow.config.resolution))
    elif models.structure is not None:
        structure = models.structure
        sampling = replace(structure.sampler, multi_image=multi_image, steps=steps or structure.sampler.steps)
        coords = photo_to_voxels(structure.flow, structure.decoder, conditions, sampling, seed=seed,
                                 progress=lambda s, f, p: progress(s, 0.1 + 0.4 * f, p), cancelled=cancelled)
        start = 0.5
    else:
        raise NearError("no-geometry", "The published flow needs voxels, and there is neither a mesh nor a geometry model.",
                        "Give a mesh, or run `near weights pull trellis-geometry`.")
    check(cancelled)
    voxels = SparseTensor.create(torch.zeros(len(coords), 1, device=device), coords.int().to(device))
    slat, shaded = models.homogenizer.sample(voxels, conditions, sampler, seed=seed, cancelled=cancelled,
                                             progress=lambda s, f, p: progress(s, start + (1 - start) * f, p))
    mean, std = models.slat_mean.to(device), models.slat_std.to(device)
    feats = (slat * std + mean).cpu()
    if not bool(torch.isfinite(feats).all()):
        raise NearError("slat-not-finite", "The flow did not converge on this photo.", "Try another seed or float32 precision.")
    proxy = proxy_mesh(mesh) if mesh is not None else voxel_hull(coords, flow.config.resolution)
    record = {"kind": "create", "seed": seed, "steps": sampler.steps, "geometry": "mesh" if mesh is not None else "structure",
              "homogenizer": models.homogenizer.config.mode, "photo_sha256": [p.sha256 for p in photos], **meta}
    if mesh is not None:
        record["mesh_sha256"] = mesh.sha256
    return Asset(coords.to(torch.uint8), feats.half(), flow.config.resolution, proxy_vertices=proxy[0], proxy_faces=proxy[1], meta=record,
                 color_feats=(shaded * std + mean).cpu().half() if shaded is not None else None)


def photo_tensor(photo: Photo, side: int) -> Tensor:
    """The photo as the conditioner sees it: square around the object, on black, [1, 3, side, side] (spec section 9)."""
    square = torch.as_tensor(square_crop(photo, side)).float()
    return (square[..., :3] * square[..., 3:]).permute(2, 0, 1)[None].clamp(0, 1)


def voxel_hull(coords: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """Boundary of the occupied voxels as a mesh, coarsened until it is light enough for a proxy.

    Args: coords [L, 3]. Returns: vertices float32 [V, 3] in asset space, faces int32 [F, 3].
    """
    cells = coords.long()
    while True:
        grid = torch.zeros(resolution + 2, resolution + 2, resolution + 2, dtype=torch.bool)
        grid[tuple((cells + 1).T)] = True
        cells = (grid.nonzero() - 1)
        quads = []
        for (axis, side), corners in FACE_CORNERS.items():
            step = F.one_hot(torch.tensor(axis), 3) * (2 * side - 1)
            open_side = cells[~grid[tuple((cells + 1 + step).T)]]
            quads.append(open_side[:, None] + torch.tensor(corners))
        corners = torch.cat(quads)
        if len(corners) * 2 <= MAX_PROXY_FACES or resolution <= 8:
            break
        cells, resolution = torch.div(cells, 2, rounding_mode="floor"), -(-resolution // 2)
    vertices, index = torch.unique(corners.flatten(0, 1), dim=0, return_inverse=True)
    quad = index.view(-1, 4)
    faces = torch.cat([quad[:, [0, 1, 2]], quad[:, [0, 2, 3]]])
    return vertices.float() / resolution - 0.5, faces.int()
