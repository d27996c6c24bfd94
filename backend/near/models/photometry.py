"""What a photo still says once materials are guessed: a smooth light is fitted to it, and what that light cannot explain is paint.

The homogeniser answers for voxels, and being unsure it answers with averages: a white sole beside a dark upper comes out grey.
Light does not change between two discs that face the same way, so what differs there is theirs. Materials in, ratios out;
the object's mean brightness is left to the homogeniser, for the fitted light takes it up.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from near.models.anchors import AnchorCloud
from near.models.harmonics import fibonacci_sphere, sh_bands, sh_basis
from near.models.shading import DIELECTRIC_F0
from near.models.visibility import evaluate_visibility

LIGHT_ORDER = 3
DIRECTIONS = 200
RIDGE = 0.02       # of the harmonics above the mean, per disc: keeps unseen sides of the light quiet
FLOOR = 0.02       # radiance below which errors no longer count relatively
OUTLIER = 0.5      # log error from which a disc counts less: a highlight must not light the rest
ROUNDS = 3


def light_response(cloud: AnchorCloud, material: Tensor, view_dirs: Tensor, chunk: int = 16384) -> tuple[Tensor, Tensor]:
    """What each harmonic of a light adds to every disc: through its diffuse and its (blurred) mirror side, each [M, K].

    Args: material [M, 5] linear; view_dirs [M, 3] towards the camera.
    """
    directions = fibonacci_sphere(DIRECTIONS).to(view_dirs)
    basis = sh_basis(directions, LIGHT_ORDER)
    seen_basis = sh_basis(directions, math.isqrt(cloud.visibility.shape[1]) - 1)
    diffuse = torch.cat([((n @ directions.T).clamp_min(0) * (v @ seen_basis.T).clamp(0, 1)) @ basis
                         for n, v in zip(cloud.normals.split(chunk), cloud.visibility.split(chunk))]) * (4 / DIRECTIONS)
    n_dot_v = (cloud.normals * view_dirs).sum(-1, keepdim=True)
    mirror = F.normalize(2 * n_dot_v * cloud.normals - view_dirs, dim=-1)
    alpha = material[:, 3].clamp_min(0.03) ** 2
    bands = sh_bands(LIGHT_ORDER).to(view_dirs)
    blur = torch.exp(-0.5 * bands * (bands + 1) * alpha.clamp_min(0.01)[:, None] ** 2)
    return diffuse, sh_basis(mirror, LIGHT_ORDER) * blur * evaluate_visibility(cloud.visibility, mirror, blur=alpha ** 2)[:, None]


def fit_light(design: Tensor, radiance: Tensor, weight: Tensor) -> Tensor:
    """Harmonics [K] of the light that best explains ``radiance`` [M] through ``design`` [M, K]; robust, relative errors."""
    ridge = torch.full((design.shape[1],), RIDGE * len(design))
    ridge[0] *= 0.02
    relative = weight / (radiance + FLOOR)
    trust, light = relative, torch.zeros(design.shape[1])
    for _ in range(ROUNDS):
        rows = trust[:, None] * design
        gram = rows.T @ rows
        light = torch.linalg.solve(gram + torch.diag(ridge * gram[0, 0] / len(design)), rows.T @ (trust * radiance))
        error = ((design @ light).clamp_min(0) + FLOOR).log() - (radiance + FLOOR).log()
        trust = relative / (1 + (error / OUTLIER) ** 2).sqrt()
    return light


def unexplained(cloud: AnchorCloud, material: Tensor, radiance_lin709: Tensor, seen: Tensor, view_dirs: Tensor) -> Tensor:
    """Log ratio [M, 3] of the photo to what the materials show under the best smooth light; zero where nothing is seen.

    Args: material [M, 5] linear; radiance_lin709 [M, 3] the photo's, per disc; seen [M] weights 0..1; view_dirs [M, 3].
    """
    rows = torch.nonzero(seen > 0)[:, 0]
    out = torch.zeros_like(radiance_lin709)
    if len(rows) < 4 * (LIGHT_ORDER + 1) ** 2:
        return out
    diffuse, mirror = light_response(cloud, material, view_dirs)
    diffuse, mirror, material, radiance = diffuse[rows], mirror[rows], material[rows], radiance_lin709[rows]
    metal = material[:, 4]
    for c in range(3):
        base = material[:, c]
        f0 = DIELECTRIC_F0 * (1 - metal) + base * metal
        design = (base * (1 - metal))[:, None] * diffuse + f0[:, None] * mirror
        shown = design @ fit_light(design, radiance[:, c], seen[rows].sqrt())
        shown = shown.clamp_min(0.15 * float(shown.mean().clamp_min(1e-3)))
        out[rows, c] = ((radiance[:, c] + 0.004) / (shown + 0.004)).log()
    return out
