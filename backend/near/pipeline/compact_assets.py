"""Photo or mesh -> compact asset (DESIGN sections 2 and 5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from torch import Tensor

from near.assets import Asset
from near.geometry.cameras import Camera, orbit_camera
from near.geometry.mesh import PbrMesh
from near.geometry.neighbours import nearest
from near.geometry.normals import face_normals
from near.geometry.photo import Photo
from near.geometry.silhouette import silhouette_mesh
from near.geometry.surface import sample_surface
from near.models.anchors import AnchorCloud, build_anchors, decode_anchors, stored_detail, view_directions
from near.models.backprojection import photo_radiance
from near.models.compact import CompactModels
from near.models.compact_renderer import encoder_inputs
from near.models.evidence import unexplained, voxel_view
from near.models.exchange import build_exchange
from near.models.hidden import completed
from near.models.lifting import lift_photo
from near.models.material import decode_material, encode_colour, encode_material, voxel_mean, within_white
from near.pipeline.proxy import proxy_mesh
from near.pipeline.types import CancelCheck, Progress, check

# Discs before hidden ones are dropped: one per DISC_SPACING^2 of surface, 0.8 pixels apart where the object fills a picture of 256
# (ANALYTIC.md section 4); more for a small surface, which close-ups show, fewer for a very winding one.
DISC_SPACING, MIN_DISCS, MAX_DISCS = 0.0045, 90_000, 360_000
TRAINED_PIXELS = 88  # of an object of size 1, in the training photos
DETAIL_PIXELS = 2 / DISC_SPACING  # of an object of size 1: finer ones say nothing more of the discs
DETAIL_LIMIT = 2.0  # log ratio by which a photo may at most move a disc's base colour
# Of what light does not explain and is brighter, paint: of a voxel's mean, and of what differs inside it; for a mirror, and what a
# matt surface adds, which has no small highlights. All that is darker is paint. Chosen on training objects.
BRIGHTER, BRIGHTER_MATT = (0.75, 0.9), (0.35, 0.2)
BRIGHTENED = 0.1  # log ratio by which seen paint is brighter than what explains the photo; likewise chosen
BLENDED, BLEND_RADIUS = 8, 0.7  # voxels a disc hears, and the deviation of their weights in voxels


def default_photo_camera(width: int, height: int) -> Camera:
    """The camera assumed of a photo that comes without one: in front, level, 40 degrees."""
    return orbit_camera(0.0, 0.0, 2.0, torch.pi * 40 / 180, width, height)


def disc_count(mesh: PbrMesh) -> int:
    """Discs that the surface of a mesh of size 1 is worth: sharpness does not depend on how much surface there is."""
    doubled = np.linalg.norm(face_normals(mesh.vertices.numpy(), mesh.faces.numpy()), axis=-1)
    return int(np.clip(doubled.sum() / 2 / DISC_SPACING ** 2, MIN_DISCS, MAX_DISCS))


def encode_mesh(models: CompactModels, mesh: PbrMesh, *, seed: int, samples: int | None = None, progress: Progress,
                cancelled: CancelCheck | None) -> Asset:
    """Asset of a mesh with PBR materials: its surface attributes go through the SLAT encoder. ``samples``: discs, of the front
    sides; None: :func:`disc_count`."""
    progress("sample surface", 0.0, None)
    surface = sample_surface(mesh, samples or disc_count(mesh), seed)
    check(cancelled)
    progress("visibility", 0.3, None)
    coords, anchors, rows = build_anchors(surface.points, surface.normals, surface.geometric_normals,
                                          models.config.resolution, spread=models.config.spread)
    check(cancelled)
    cloud = decode_anchors(coords, anchors, models.config.resolution)
    encoded = encode_material(surface.base_lin709[rows], surface.roughness[rows], surface.metallic[rows])
    mean = voxel_mean(encoded, cloud.voxel, len(coords))
    progress("encode", 0.8, None)
    slat = models.encode_slat(coords, encoder_inputs(cloud, encoded, coords))
    # Detail is measured against what the decoder will read back from the stored half-precision SLAT.
    slat = slat.half()
    anchors = replace(anchors, detail=stored_detail(encoded - models.voxel_material(coords, slat.float())[cloud.voxel]))
    progress("encode", 1.0, None)
    return _asset(models, coords, slat, anchors, mesh, kind="encode", seed=seed, mesh_sha256=mesh.sha256)


def create_asset(models: CompactModels, photo: Photo, mesh: PbrMesh | None, camera: Camera | None, *, seed: int,
                 steps: int | None, samples: int | None = None, progress: Progress, cancelled: CancelCheck | None) -> Asset:
    """Asset of a photo with a matte: base flow to a shaded SLAT, then the homogeniser (paper section 3.1)."""
    height, width = photo.alpha.shape
    camera = camera or default_photo_camera(width, height)
    source = "mesh"
    if mesh is None:
        progress("inflate silhouette", 0.0, None)
        mesh, camera = silhouette_mesh(photo, camera)
        source = "silhouette"
    check(cancelled)
    progress("sample surface", 0.1, None)
    surface = sample_surface(mesh, samples or disc_count(mesh), seed)
    check(cancelled)
    progress("visibility", 0.2, None)
    coords, anchors, _ = build_anchors(surface.points, surface.normals, surface.geometric_normals, models.config.resolution,
                                       spread=models.config.spread)
    cloud = decode_anchors(coords, anchors, models.config.resolution)
    check(cancelled)
    progress("lift photo", 0.35, None)
    radiance, seen = photo_on_discs(cloud, coords, models.config.resolution, photo, camera, lambda: check(cancelled))
    check(cancelled)
    # The flows learned from photos of one sharpness; finer pixels are for the discs' detail alone.
    coarse, coarse_camera = reduce_photo(photo, camera, TRAINED_PIXELS)
    features = lift_photo(cloud, coords, models.config.resolution, coarse.srgb, coarse.alpha, coarse_camera)

    def part(start: float, stop: float):
        return lambda stage, fraction: progress(stage, start + (stop - start) * fraction, None)

    run = {"seed": seed, "steps": steps, "cancelled": cancelled}
    shaded = models.sample_shaded(coords, features, photo, progress=part(0.4, 0.65), **run)
    view = voxel_view(cloud, features.features, view_directions(cloud.points, coarse_camera))
    slat = models.sample_homogenised(coords, features, view, shaded, photo, progress=part(0.65, 0.95), **run)
    slat = slat.half()
    material = models.voxel_material(coords, slat.float())
    detail = photo_detail(cloud, radiance, seen, material, camera, models.config.resolution, lambda: check(cancelled),
                          guessed_normals=source == "silhouette")
    anchors = replace(anchors, detail=stored_detail(detail))
    progress("done", 1.0, None)
    return _asset(models, coords, slat, anchors, mesh, kind="create", seed=seed, geometry=source, shaded=shaded.half(),
                  photo_sha256=photo.sha256, mesh_sha256=mesh.sha256 if source == "mesh" else None,
                  photo_camera=camera_record(camera))


def reduce_photo(photo: Photo, camera: Camera, pixels: float) -> tuple[Photo, Camera]:
    """The photo averaged down to about ``pixels`` per object size, and its camera; never enlarged."""
    distance = float(camera.position.norm()) if camera.projection == "perspective" else 1.0
    factor = int(float(camera.K[0, 0]) / distance / pixels + 0.5)
    factor = min(factor, min(photo.alpha.shape) // 32)
    if factor < 2:
        return photo, camera
    height, width = (n // factor * factor for n in photo.alpha.shape)
    stack = torch.cat([photo.srgb * photo.alpha[..., None], photo.alpha[..., None]], -1)[:height, :width]
    small = F.avg_pool2d(stack.permute(2, 0, 1)[None], factor)[0].permute(1, 2, 0)
    alpha = small[..., 3]
    K = camera.K.clone()
    K[:2] /= factor
    reduced = Photo(srgb=(small[..., :3] / alpha.clamp_min(1e-3)[..., None]).clamp(0, 1), alpha=alpha, sha256=photo.sha256)
    return reduced, replace(camera, K=K, width=width // factor, height=height // factor)


def photo_on_discs(cloud: AnchorCloud, coords: Tensor, resolution: int, photo: Photo, camera: Camera,
                   poll: Callable[[], None] = lambda: None) -> tuple[Tensor, Tensor]:
    """What the photo says of each disc: linear radiance [M, 3] and how well it is seen [M], 0..1. ``poll`` may raise to stop."""
    photo, camera = reduce_photo(photo, camera, DETAIL_PIXELS)
    lifted = lift_photo(cloud, coords, resolution, photo.srgb, photo.alpha, camera)
    return photo_radiance(cloud, lifted, photo.srgb, photo.alpha, camera, poll), lifted.seen.clamp(0, 1)


def photo_detail(cloud: AnchorCloud, radiance_lin709: Tensor, seen: Tensor, material: Tensor, camera: Camera, resolution: int,
                 poll: Callable[[], None] = lambda: None, *, guessed_normals: bool = False) -> Tensor:
    """Paint that the voxels' materials miss: where the photo differs from how they look under the light that fits it best,
    most of the difference is base colour; of what is brighter less, for it may be a highlight.

    Args: radiance_lin709 [M, 3] of the discs in the photo; seen [M] weights 0..1; material [L, 5] encoded; guessed_normals: of an inflated outline.
    Returns: [M, 5] encoded residual to the disc's voxel. What the photo does not see wears what is seen of places like it
    (:mod:`near.models.hidden`), blended over the voxels' edges.
    """
    of_discs = material[cloud.voxel]
    linear = decode_material(of_discs)
    rest = unexplained(cloud, build_exchange(cloud, resolution), linear, radiance_lin709, seen, view_directions(cloud.points, camera), poll,
                       one_colour=guessed_normals)
    broad = voxel_mean(rest, cloud.voxel, len(material), seen)[cloud.voxel]
    fine = rest - broad
    paint = torch.zeros_like(rest)
    for part, mirror, matt in zip((broad, fine), BRIGHTER, BRIGHTER_MATT):
        paint = paint + torch.where(part > 0, part * (mirror + matt * linear[:, 3:4]), part)
    # What may be a highlight is left out of the brighter places alone; the object as a whole must not darken by it.
    paint = paint + ((rest - paint) * (seen / seen.sum().clamp_min(1e-6))[:, None]).sum(0).mean() + BRIGHTENED
    paint = paint.clamp(-DETAIL_LIMIT, DETAIL_LIMIT)
    painted = linear[:, :3].clamp_min(1e-3) * (paint * seen.sqrt()[:, None]).exp()
    detail = F.pad(encode_colour(within_white(painted)) - of_discs[:, :3], (0, 2))
    unseen = torch.nonzero(seen <= 0)[:, 0]
    likely = completed(cloud, material, of_discs + detail, seen)
    detail[unseen] = between_voxels(cloud, unseen, likely, resolution) - of_discs[unseen]
    return detail


def between_voxels(cloud: AnchorCloud, discs: Tensor, material: Tensor, resolution: int) -> Tensor:
    """Materials [m, 5] of the discs in rows ``discs`` [m], blended from the voxels [L, 5] around each: a voxel's edges are not the
    paint's. Voxels whose discs face elsewhere have hardly a say."""
    count = len(material)
    centres = voxel_mean(cloud.points, cloud.voxel, count)
    normals = F.normalize(voxel_mean(cloud.normals, cloud.voxel, count), dim=-1)
    heard = min(BLENDED, count)
    distance, rows = nearest(cKDTree(centres.numpy()), cloud.points[discs].numpy(), heard)
    rows = torch.from_numpy(rows).view(-1, heard)
    distance = torch.from_numpy(distance).float().view_as(rows) * (resolution / BLEND_RADIUS)
    agree = (normals[rows] * cloud.normals[discs, None]).sum(-1).clamp_min(0.02) ** 2
    weight = torch.exp(-0.5 * distance ** 2) * agree
    return (material[rows] * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)


def camera_record(camera: Camera) -> dict:
    """The photo's camera as plain data for the asset's metadata ("look through the photo")."""
    return {"cam_from_asset": camera.cam_from_world.tolist(), "K": camera.K.tolist(), "width": camera.width, "height": camera.height,
            "projection": camera.projection}


def _asset(models: CompactModels, coords: Tensor, slat: Tensor, anchors, mesh: PbrMesh, *, shaded: Tensor | None = None, **record) -> Asset:
    vertices, faces = proxy_mesh(mesh)
    meta = {"pack": models.pack_id, "pack_sha256": models.pack_sha256, **{k: v for k, v in record.items() if v is not None}}
    return Asset(coords=coords, feats=slat, resolution=models.config.resolution, anchors=anchors, color_feats=shaded,
                 brm_feats=None, proxy_vertices=vertices, proxy_faces=faces, meta=meta)
