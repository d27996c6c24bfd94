"""A compact asset under one light as 3D Gaussian splats, in the PLY layout that splat viewers and Blender 5.3 read.

Those show spherical harmonics as display colours, without a view transform, so radiance goes through AgX first; each disc's
colour is seen from many sides and fitted by harmonics of order 2.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from near.assets import Asset
from near.colour import agx_srgb
from near.geometry.cameras import Camera, orbit_camera
from near.lighting import Environment
from near.models.anchors import view_directions
from near.pipeline.types import CancelCheck, Progress, check

DIRECTIONS, RADIUS, ORDER = 32, 2.5, 2
# Shrinks what few directions determine: the constant hardly, the second band most.
RIDGE = (1e-4, 1e-3, 5e-3)
_SH_0, _SH_1 = 0.28209479177387814, 0.4886025119029199


def sphere_cameras(count: int) -> list[Camera]:
    """Cameras spread evenly around the asset (a Fibonacci lattice)."""
    golden = math.pi * (3 - math.sqrt(5))
    return [orbit_camera(i * golden, math.asin(1 - 2 * (i + 0.5) / count), RADIUS, math.radians(30), 64, 64) for i in range(count)]


def splat_basis(d: Tensor) -> Tensor:
    """The harmonics of 3D Gaussian splatting [..., 9], with its signs, of unit vectors [..., 3] from the camera to the splat."""
    x, y, z = d.unbind(-1)
    return torch.stack([torch.full_like(x, _SH_0), -_SH_1 * y, _SH_1 * z, -_SH_1 * x, 1.0925484305920792 * x * y, -1.0925484305920792 * y * z,
                        0.31539156525252005 * (2 * z * z - x * x - y * y), -1.0925484305920792 * x * z, 0.5462742152960396 * (x * x - y * y)], -1)


def fit_colours(asset: Asset, light: Environment, renderer, progress: Progress, cancelled: CancelCheck | None) -> Tensor:
    """Coefficients [M, 9, 3] of display colour minus one half, least squares over the directions that see a disc's front."""
    state = renderer.discs(asset)
    count, terms = len(state.cloud), (ORDER + 1) ** 2
    normal = torch.zeros(count, terms, terms)
    right = torch.zeros(count, terms, 3)
    for index, camera in enumerate(sphere_cameras(DIRECTIONS)):
        check(cancelled)
        progress("colours from all sides", 0.05 + 0.85 * index / DIRECTIONS, None)
        colour = agx_srgb(renderer.radiance(asset, light, camera).clamp_min(0)) - 0.5
        view = view_directions(state.cloud.points, camera)
        weight = (state.cloud.disc_normals * view).sum(-1).clamp_min(0)
        basis = splat_basis(-view)
        weighted = basis * weight[:, None]
        normal += weighted[:, :, None] * basis[:, None, :]
        right += weighted[:, :, None] * colour[:, None, :]
    total = normal[:, 0, 0] / _SH_0 ** 2
    ridge = torch.tensor([RIDGE[0]] + [RIDGE[1]] * 3 + [RIDGE[2]] * 5)
    return torch.linalg.solve(normal + torch.diag_embed(ridge[None] * total.clamp_min(1e-3)[:, None]), right)


def splats_ply(asset: Asset, light: Environment, engine, progress: Progress, cancelled: CancelCheck | None) -> bytes:
    """The PLY file. Raises `Cancelled`."""
    renderer = engine.compact_renderer()
    coefficients = fit_colours(asset, light, renderer, progress, cancelled)
    state = renderer.discs(asset)
    gaussians = state.gaussians
    opacity = gaussians.opacities.clamp(1e-4, 1 - 1e-4)
    columns = {**_named("{}", "xyz", gaussians.means), **_named("n{}", "xyz", state.surface.normals),
               **_named("f_dc_{}", range(3), coefficients[:, 0]),
               # the others channel by channel: all of red, all of green, all of blue
               **_named("f_rest_{}", range(24), coefficients[:, 1:].transpose(1, 2).flatten(1)),
               "opacity": torch.log(opacity / (1 - opacity)), **_named("scale_{}", range(3), gaussians.scales.clamp_min(1e-7).log()),
               **_named("rot_{}", range(4), F.normalize(gaussians.quats, dim=-1))}
    table = np.ascontiguousarray(torch.stack([c.float() for c in columns.values()], -1).cpu().numpy(), "<f4")
    head = "ply\nformat binary_little_endian 1.0\ncomment NeAR Relight, display colours (AgX)\n" + f"element vertex {len(table)}\n" \
        + "".join(f"property float {name}\n" for name in columns) + "end_header\n"
    progress("done", 1.0, None)
    return head.encode() + table.tobytes()


def _named(pattern: str, names, values: Tensor) -> dict[str, Tensor]:
    return {pattern.format(name): values[:, i] for i, name in enumerate(names)}
