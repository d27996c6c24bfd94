"""What a smooth light explains of a photo, voxel by voxel: the homogeniser's evidence of paint, and of the light itself.

A voxel's colour is its paint times the light that meets it. A light in few harmonics, fitted to all voxels at once through
their normals and visibility, tells the two apart as far as a light can: what it shows of a grey object is shading, what it
leaves over is paint: light does not change between two places that face the same way, so what differs there is theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from torch import Tensor

from near.colour import LUMINANCE
from near.models.anchors import AnchorCloud
from near.models.exchange import Exchange
from near.models.harmonics import fibonacci_sphere, sh_bands, sh_basis
from near.models.material import voxel_mean
from near.models.photo_light import FLOOR, OUTLIER, drawn, fit_directions, light_directions, responses, shown_under, smooth_start
from near.models.shading import DIELECTRIC_F0, RETURNED_SHARE, normal_reflectance, total_albedo
from near.models.visibility import evaluate_visibility

LIGHT_ORDER = 3
DIRECTIONS = 200
RIDGE = 0.02       # of the harmonics above the mean, per row: keeps unseen sides of the light quiet
ROUNDS = 3
BLACK = 0.004      # radiance added before logarithms
SATIN, GREY = 0.35, 0.4  # roughness and base colour of the object that the light is fitted to


def diffuse_response(normals: Tensor, visibility: Tensor, chunk: int = 16384) -> Tensor:
    """What each harmonic of a light adds to every white matt surface point, [M, K]; normals [M, 3], visibility [M, Q] harmonics."""
    directions = fibonacci_sphere(DIRECTIONS).to(normals)
    basis = sh_basis(directions, LIGHT_ORDER)
    seen_basis = sh_basis(directions, math.isqrt(visibility.shape[1]) - 1)
    return torch.cat([((n @ directions.T).clamp_min(0) * (v @ seen_basis.T).clamp(0, 1)) @ basis
                      for n, v in zip(normals.split(chunk), visibility.split(chunk))]) * (4 / DIRECTIONS)


def mirror_response(normals: Tensor, visibility: Tensor, view_dirs: Tensor, roughness: Tensor) -> Tensor:
    """The same, [M, K], of (blurred) mirrors; view_dirs [M, 3] towards the camera, roughness [M]."""
    n_dot_v = (normals * view_dirs).sum(-1, keepdim=True)
    mirror = F.normalize(2 * n_dot_v * normals - view_dirs, dim=-1)
    alpha = roughness.clamp_min(0.1) ** 2
    bands = sh_bands(LIGHT_ORDER).to(view_dirs)
    blur = torch.exp(-0.5 * bands * (bands + 1) * alpha[:, None] ** 2)
    return sh_basis(mirror, LIGHT_ORDER) * blur * evaluate_visibility(visibility, mirror, blur=alpha ** 2)[:, None]


def fit_light(design: Tensor, radiance: Tensor, weight: Tensor) -> Tensor:
    """Harmonics [C, K] of the lights that best explain ``radiance`` [M, C] through ``design`` [C, M, K] (or one [M, K] for
    all channels); relative errors, robust; weight [M]."""
    design = design if design.dim() == 3 else design.expand(radiance.shape[1], *design.shape)
    radiance = radiance.T
    ridge = torch.full((design.shape[2],), RIDGE).to(design)
    ridge[0] *= 0.02
    relative = weight / (radiance + FLOOR)
    trust = relative
    for _ in range(ROUNDS):
        rows = trust[..., None] * design
        gram = rows.mT @ rows
        light = torch.linalg.solve(gram + torch.diag(ridge) * gram[:, :1, :1].clamp_min(1e-9), rows.mT @ (trust * radiance)[..., None])
        error = ((design @ light)[..., 0].clamp_min(0) + FLOOR).log() - (radiance + FLOOR).log()
        trust = relative / (1 + (error / OUTLIER) ** 2).sqrt()
    return light[..., 0]


def shown_by(design: Tensor, light: Tensor) -> Tensor:
    """Radiance [M, 3] through ``design`` under ``light`` [C, K], kept from falling to nothing."""
    return kept_up(shown_through(design, light))


def shown_through(design: Tensor, light: Tensor) -> Tensor:
    """Radiance [M, C] through ``design`` [M, K] or [C, M, K] under ``light`` [C, K]."""
    return design @ light.T if design.dim() == 2 else torch.einsum("cmk,ck->mc", design, light)


def kept_up(shown: Tensor) -> Tensor:
    """Radiance [M, C], none of it below a share of its mean."""
    return torch.maximum(shown, 0.15 * shown.mean(0).clamp_min(1e-3))


def painted(material: Tensor, diffuse: Tensor, mirror: Tensor) -> Tensor:
    """Response [3, M, K] of a linear material [M, 5] from :func:`mirror_response` and :func:`diffuse_response` (diffuse [M, K], or [3, M, K])."""
    base, metal = material[:, :3].T[..., None], material[:, 4, None]
    return base * (1 - metal) * diffuse + normal_reflectance(base, metal) * mirror


def sent_to_itself(exchange: Exchange, openness: Tensor, material: Tensor, diffuse: Tensor) -> Tensor:
    """What each harmonic of a light adds to discs by way of the object's other discs, [3, M, K] of base colour 1; ``diffuse`` [M, K]
    their white diffuse response, material [M, 5] linear."""
    albedo = total_albedo(material[:, :3], material[:, 4:5])
    nothing = torch.zeros(diffuse.shape[1])
    got = [exchange.received(a[:, None] * diffuse, a[:, None], nothing) for a in albedo.T]
    return torch.stack(got) * RETURNED_SHARE * (1 - openness)[:, None]


def unexplained(cloud: AnchorCloud, exchange: Exchange, material: Tensor, radiance_lin709: Tensor, seen: Tensor, view_dirs: Tensor,
                poll: Callable[[], None] = lambda: None, *, one_colour: bool = False) -> Tensor:
    """Log ratio [M, 3] of the photo to what the materials show under the light that fits it best; zero where nothing is seen.

    The homogeniser answers for voxels, and being unsure it answers with averages: a white sole beside a dark upper comes out
    grey. This is what it missed. The object's mean brightness stays the homogeniser's, for the fitted light takes it up.

    Args: material [M, 5] linear; radiance_lin709 [M, 3] the photo's, per disc; seen [M] weights 0..1; view_dirs [M, 3].
        ``poll``: called between the steps; raises to stop (cancellation). one_colour: of all directions of the light, for normals
        that are guesses (:mod:`near.models.photo_light`).
    """
    rows = torch.nonzero(seen > 0)[:, 0]
    out = torch.zeros_like(radiance_lin709)
    if len(rows) < 4 * (LIGHT_ORDER + 1) ** 2:
        return out
    # Discs that the photo does not see light those that it does.
    diffuse = diffuse_response(cloud.normals, cloud.visibility)
    own, radiance, weight = material[rows], radiance_lin709[rows], seen[rows].sqrt()
    discs = normals, views, visibility = cloud.normals[rows], view_dirs[rows], cloud.visibility[rows]
    sent = sent_to_itself(exchange, cloud.openness, material, diffuse)[:, rows]
    mirror = mirror_response(normals, visibility, views, own[:, 3])
    light = fit_light(painted(own, diffuse[rows] + sent, mirror), radiance, weight)
    returned = own[:, :3] * (1 - own[:, 4:5]) * shown_through(sent, light).clamp_min(0)
    poll()
    # That light is smooth; from it starts one that holds lamps.
    directions, solid_angle = light_directions()
    start = smooth_start(sh_basis(directions, LIGHT_ORDER) @ light.T, solid_angle, one_colour)
    some = drawn(seen[rows])
    flux = fit_directions(responses(*(d[some] for d in discs), own[some], directions), radiance[some], returned[some], weight[some], start,
                          one_colour)
    poll()
    shown = kept_up(shown_under(*discs, own, directions, flux) + returned)
    out[rows] = ((radiance + BLACK) / (shown + BLACK)).log()
    return out


@dataclass(frozen=True)
class VoxelView:
    """How the voxels [L] of one object answer a light, seen by one camera: ``diffuse`` and ``mirror`` responses [L, K], and
    ``nearest`` [L], the row of the seen voxel that speaks for each."""

    diffuse: Tensor
    mirror: Tensor
    nearest: Tensor


def voxel_view(cloud: AnchorCloud, lift: Tensor, eye_dirs: Tensor) -> VoxelView:
    """lift [L, LIFT_CHANNELS] of a photo (:mod:`near.models.lifting`); eye_dirs [M, 3] from the discs to its camera."""
    count = len(lift)
    normals = F.normalize(voxel_mean(cloud.normals, cloud.voxel, count), dim=-1)
    to_eye = F.normalize(voxel_mean(eye_dirs, cloud.voxel, count), dim=-1)
    visibility = voxel_mean(cloud.visibility, cloud.voxel, count)
    diffuse, mirror = diffuse_response(normals, visibility), mirror_response(normals, visibility, to_eye, torch.full((count,), SATIN))
    known, centres = lift[:, 8] > 0.5, lift[:, 17:20]
    nearest = torch.arange(count)
    if known.any() and not known.all():
        _, rows = cKDTree(centres[known].numpy()).query(centres[~known].numpy())
        nearest[~known] = torch.nonzero(known)[:, 0][torch.from_numpy(rows)]
    return VoxelView(diffuse, mirror, nearest)


@dataclass(frozen=True)
class Explained:
    """Of one photo: what the fitted light shows of a grey object, ``shown`` [L, 3], and the log ratio of the photo to it,
    ``rest`` [L, 3] (of the nearest seen voxel where a voxel is hidden); ``mirror_rest`` [L], the same of brightness if the
    object were a mirror; ``light`` [3, K] harmonics."""

    shown: Tensor
    rest: Tensor
    mirror_rest: Tensor
    light: Tensor


def explain(view: VoxelView, radiance_lin709: Tensor, weight: Tensor) -> Explained:
    """radiance_lin709 [L, 3] of the photo; weight [L], 0 where it does not see a voxel."""
    grey = GREY * view.diffuse + DIELECTRIC_F0 * view.mirror
    light = fit_light(grey, radiance_lin709, weight)
    shown = shown_by(grey, light)
    metal = 0.5 * view.mirror
    reflected = shown_by(metal, fit_light(metal, radiance_lin709, weight))
    lum = LUMINANCE.to(shown)
    rest = ((radiance_lin709 + BLACK) / (shown + BLACK)).log()
    mirror_rest = ((radiance_lin709 @ lum + BLACK) / (reflected @ lum + BLACK)).log()
    return Explained(shown, rest[view.nearest], mirror_rest[view.nearest], light)


def irradiance_along_axes(light: Tensor) -> Tensor:
    """[C, 6]: what the lights [C, K] shed on unoccluded planes that face +x, -x, +y, -y, +z, -z."""
    directions = fibonacci_sphere(DIRECTIONS).to(light)
    axes = torch.eye(3).to(light).repeat_interleave(2, 0) * torch.tensor([1.0, -1.0]).to(light).repeat(3)[:, None]
    return light @ ((axes @ directions.T).clamp_min(0) @ sh_basis(directions, LIGHT_ORDER) * (4 / DIRECTIONS)).T


def mean_radiance(light: Tensor) -> Tensor:
    """[C] mean over all directions of lights [C, K]."""
    return light @ sh_basis(fibonacci_sphere(DIRECTIONS).to(light), LIGHT_ORDER).mean(0)
