"""Which directions each surface disc can see, baked once per asset into spherical harmonics.

The occluders are the asset's own discs, rasterised into an orthographic depth map per direction, so the same
code serves meshes, inflated silhouettes and bare point samples. `spec/ANALYTIC.md` section 3.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from near.models.harmonics import MAX_ORDER, fibonacci_sphere, sh_basis

HALF_EXTENT = 0.88  # half the diagonal of the unit cube (0.866) and a margin


@numba.njit(parallel=True, cache=True, fastmath=True)
def _bake(points, normals, radii, dirs, tangents, bitangents, offset, size, out):
    """out[m, k] = 1 where the side of disc m that faces dirs[k] sees along it, 0 where it is hidden."""
    count = points.shape[0]
    scale = size / (2.0 * HALF_EXTENT)
    for k in numba.prange(dirs.shape[0]):
        d, t, b = dirs[k], tangents[k], bitangents[k]
        depth = np.full((size, size), -1e9, dtype=np.float32)
        for m in range(count):
            p0, p1, p2 = points[m, 0], points[m, 1], points[m, 2]
            n0, n1, n2 = normals[m, 0], normals[m, 1], normals[m, 2]
            u = p0 * t[0] + p1 * t[1] + p2 * t[2]
            v = p0 * b[0] + p1 * b[1] + p2 * b[2]
            w = p0 * d[0] + p1 * d[1] + p2 * d[2]
            nu = n0 * t[0] + n1 * t[1] + n2 * t[2]
            nv = n0 * b[0] + n1 * b[1] + n2 * b[2]
            nw = n0 * d[0] + n1 * d[1] + n2 * d[2]
            r = radii[m]
            pu, pv, pr = (u + HALF_EXTENT) * scale, (v + HALF_EXTENT) * scale, r * scale
            i0, i1 = max(0, int(pu - pr)), min(size - 1, int(pu + pr))
            j0, j1 = max(0, int(pv - pr)), min(size - 1, int(pv + pr))
            # A disc seen edge-on covers no pixel centre; keep its slope finite.
            inv = -1.0 / nw if abs(nw) > 0.05 else 0.0
            centre_i, centre_j = int(pu), int(pv)
            for j in range(j0, j1 + 1):
                dv = (j + 0.5 - pv) / scale
                for i in range(i0, i1 + 1):
                    du = (i + 0.5 - pu) / scale
                    dw = (nu * du + nv * dv) * inv
                    # The pixel under the centre is always marked, else small discs would leave pinholes.
                    if du * du + dv * dv + dw * dw <= r * r:
                        if w + dw > depth[j, i]:
                            depth[j, i] = w + dw
                    elif i == centre_i and j == centre_j:
                        if w > depth[j, i]:
                            depth[j, i] = w
        for m in range(count):
            n0, n1, n2 = normals[m, 0], normals[m, 1], normals[m, 2]
            lift = offset + 0.7 * radii[m]
            if n0 * d[0] + n1 * d[1] + n2 * d[2] <= 0.0:
                lift = -lift
            p0, p1, p2 = points[m, 0] + n0 * lift, points[m, 1] + n1 * lift, points[m, 2] + n2 * lift
            i = int((p0 * t[0] + p1 * t[1] + p2 * t[2] + HALF_EXTENT) * scale)
            j = int((p0 * b[0] + p1 * b[1] + p2 * b[2] + HALF_EXTENT) * scale)
            w = p0 * d[0] + p1 * d[1] + p2 * d[2]
            hidden = 0 <= i < size and 0 <= j < size and w < depth[j, i]
            out[m, k] = 0 if hidden else 1


@numba.njit(parallel=True, cache=True, fastmath=True)
def _project(seen, normals, dirs, nearest, grid, projector, out):
    """Least-squares harmonics of the visibility; a direction below the horizon takes its mirror image's value,
    which keeps the function smooth there (it is never used there)."""
    directions, coefficients = dirs.shape[0], projector.shape[0]
    for m in numba.prange(seen.shape[0]):
        n = normals[m]
        acc = np.zeros(coefficients, dtype=np.float32)
        above, free = 0, 0
        for k in range(directions):
            if dirs[k, 0] * n[0] + dirs[k, 1] * n[1] + dirs[k, 2] * n[2] > 0.0:
                above += 1
                free += seen[m, k]
        mean = free / max(above, 1)
        for k in range(directions):
            value = seen[m, k]
            d = dirs[k]
            c = 2.0 * (d[0] * n[0] + d[1] * n[1] + d[2] * n[2])
            if c <= 0.0:
                x, y, z = d[0] - c * n[0], d[1] - c * n[1], d[2] - c * n[2]
                i = min(grid - 1, max(0, int((x * 0.5 + 0.5) * grid)))
                j = min(grid - 1, max(0, int((y * 0.5 + 0.5) * grid)))
                mirror = nearest[1 if z > 0 else 0, j, i]
                value = seen[m, mirror]
                if dirs[mirror, 0] * n[0] + dirs[mirror, 1] * n[1] + dirs[mirror, 2] * n[2] <= 0.0:  # its mirror image rounds to a direction below the horizon too
                    for q in range(coefficients):
                        acc[q] += projector[q, k] * mean
                    continue
            if value == 1:
                for q in range(coefficients):
                    acc[q] += projector[q, k]
        for q in range(coefficients):
            out[m, q] = acc[q]


def _nearest_table(dirs: np.ndarray, grid: int) -> np.ndarray:
    """[2, grid, grid] index of the direction nearest to (x, y, -/+ sqrt(1 - x^2 - y^2))."""
    axis = (np.arange(grid) + 0.5) / grid * 2 - 1
    x, y = np.meshgrid(axis, axis)
    z = np.sqrt(np.maximum(0, 1 - x * x - y * y))
    out = np.empty((2, grid, grid), np.int64)
    for side, sign in enumerate((-1.0, 1.0)):
        v = np.stack([x, y, sign * z], -1)
        v /= np.linalg.norm(v, axis=-1, keepdims=True)
        out[side] = (v.reshape(-1, 3) @ dirs.T).argmax(1).reshape(grid, grid)
    return out


def bake_visibility(points: Tensor, normals: Tensor, radii: Tensor, *, order: int = MAX_ORDER,
                    directions: int = 160, size: int = 256) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Visibility of the outside world from both sides of every disc.

    Args:
        points: [M, 3] in asset space; normals: [M, 3] unit, outward; radii: [M] asset units.
        order: last band of the harmonics; directions: depth maps made; size: their side in pixels.
    Returns:
        for the front and for the back side: coefficients [M, (order+1)**2] of the visibility (1 = free), and the share
        of that side's hemisphere that is free, cosine-weighted, [M] (0 = nothing ever sees it).
    """
    dirs = fibonacci_sphere(directions)
    up = torch.where(dirs[:, 2:].abs() < 0.9, torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
    tangents = torch.nn.functional.normalize(torch.cross(up.expand_as(dirs), dirs, dim=-1), dim=-1)
    bitangents = torch.cross(dirs, tangents, dim=-1)
    points_, normals_, radii_, dirs_, tangents_, bitangents_ = [
        np.ascontiguousarray(a.detach().cpu().numpy(), dtype=np.float32) for a in (points, normals, radii, dirs, tangents, bitangents)]
    seen = np.empty((len(points), directions), np.uint8)
    pixel = 2 * HALF_EXTENT / size
    _bake(points_, normals_, radii_, dirs_, tangents_, bitangents_, np.float32(0.75 * pixel), size, seen)
    projector = np.ascontiguousarray(np.linalg.pinv(sh_basis(dirs.double(), order).numpy()), dtype=np.float32)
    nearest = _nearest_table(dirs_, 64)

    def side(outward: np.ndarray) -> tuple[Tensor, Tensor]:
        coefficients = np.zeros((len(points), projector.shape[0]), np.float32)
        _project(seen, outward, dirs_, nearest, 64, projector, coefficients)
        cosine = np.clip(outward @ dirs_.T, 0, None)
        free = (cosine * seen).sum(1) / np.maximum(cosine.sum(1), 1e-6)
        return torch.from_numpy(coefficients), torch.from_numpy(free.astype(np.float32))

    return side(normals_), side(np.ascontiguousarray(-normals_))


def evaluate_visibility(coefficients: Tensor, dirs: Tensor, blur: Tensor | None = None) -> Tensor:
    """Visibility in one direction per disc.

    Args:
        coefficients: [M, K]; dirs: [M, 3] unit.
        blur: [M] angular variance of the lobe that looks (radians squared); band l fades by exp(-l(l+1) blur / 2).
    Returns:
        [M] in 0..1.
    """
    order = math.isqrt(coefficients.shape[1]) - 1
    basis = sh_basis(dirs, order)
    if blur is not None:
        bands = torch.arange(order + 1, device=dirs.device, dtype=dirs.dtype)
        fade = torch.exp(-0.5 * blur[:, None] * bands * (bands + 1))
        basis = basis * torch.repeat_interleave(fade, torch.tensor([2 * b + 1 for b in range(order + 1)], device=dirs.device), 1)
    return (coefficients * basis).sum(-1).clamp(0, 1)
