"""The light's directional samples, summed through what each disc sees of them: for its matt side and for a rough mirror.

A prefiltered map knows one round lobe per roughness. That serves near-mirrors; a rough surface seen at a slant gathers light from a
long, leaning lobe, and under a lamp behind the object the round one misses most of it (up to half of the reflection of a rough
metal). Few directions are enough for lobes this wide, and each is dimmed by what the disc sees of it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from near.models.harmonics import sh_basis
from near.splatting.threads import compiled, run_shared

MIN_COSINE = 1e-3
MIN_ROUGHNESS = 0.03


def irradiance(normals: Tensor, visibility: Tensor | None, directions: Tensor, flux: Tensor) -> Tensor:
    """Sum of flux * cosine * visibility over the directional samples, [M, 3].

    Args: normals [M, 3]; visibility [M, K] harmonics or None; directions [n, 3] unit, same frame; flux [n, 3] radiance * sr.
    """
    if not _plain(normals, visibility, flux):
        return irradiance_torch(normals, visibility, directions, flux)
    n = _array(normals)
    out, seen = np.empty((len(n), 3), np.float32), _seen(visibility, directions, flux)
    run_shared(lambda k, shares: _collect(len(n) * k // shares, len(n) * (k + 1) // shares, n, *seen, out))
    return torch.from_numpy(out)


def irradiance_torch(normals: Tensor, visibility: Tensor | None, directions: Tensor, flux: Tensor, chunk: int = 16384) -> Tensor:
    """Plain torch twin of :func:`irradiance`: any device."""
    rows = (slice(start, start + chunk) for start in range(0, len(normals), chunk))
    return torch.cat([torch.zeros(0, 3).to(flux), *(cosines(normals[r], None if visibility is None else visibility[r], directions) @ flux for r in rows)])


def rough_reflection(normals: Tensor, view_dirs: Tensor, roughness: Tensor, visibility: Tensor | None, directions: Tensor,
                     flux: Tensor) -> tuple[Tensor, Tensor]:
    """Radiance towards the viewer through a GGX lobe (Smith masking, single scatter), split for Schlick's Fresnel term.

    Args: normals, view_dirs (towards the camera) [M, 3] unit; roughness [M] perceptual; visibility [M, K] harmonics or None;
        directions [n, 3] unit, in the same frame; flux [n, 3] radiance * sr.
    Returns: white [M, 3] and grazing [M, 3]: a surface of reflectance F0 shows F0 * white + (1 - F0) * grazing. Linear in flux.
    """
    if not _plain(normals, view_dirs, roughness, visibility, flux):
        return rough_reflection_torch(normals, view_dirs, roughness, visibility, directions, flux)
    n, v, r = _array(normals), _array(view_dirs), _array(roughness)
    out, seen = np.empty((len(n), 6), np.float32), _seen(visibility, directions, flux)
    run_shared(lambda k, shares: _reflect(len(n) * k // shares, len(n) * (k + 1) // shares, n, v, r, *seen, out))
    both = torch.from_numpy(out)
    return both[:, :3], both[:, 3:]


def rough_reflection_torch(normals: Tensor, view_dirs: Tensor, roughness: Tensor, visibility: Tensor | None, directions: Tensor,
                           flux: Tensor, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """Plain torch twin of :func:`rough_reflection`: any device."""
    white, grazing = [torch.zeros(0, 3).to(flux)], [torch.zeros(0, 3).to(flux)]
    for start in range(0, len(normals), chunk):
        rows = slice(start, start + chunk)
        lobe, slant = rough_lobes(normals[rows], view_dirs[rows], roughness[rows], None if visibility is None else visibility[rows], directions)
        white.append(lobe @ flux)
        grazing.append(slant @ flux)
    return torch.cat(white), torch.cat(grazing)


def rough_lobes(normals: Tensor, view_dirs: Tensor, roughness: Tensor, visibility: Tensor | None, directions: Tensor) -> tuple[Tensor, Tensor]:
    """What each of the directions adds to the two sums of :func:`rough_reflection` per unit of its flux, each [M, n]."""
    a2 = roughness[:, None].clamp_min(MIN_ROUGHNESS) ** 4
    n_dot_v, n_dot_l = (normals * view_dirs).sum(-1, keepdim=True), normals @ directions.T
    one = (1 + view_dirs @ directions.T).clamp_min(1e-4)
    n_dot_h2 = ((n_dot_l + n_dot_v) ** 2 / (2 * one)).clamp_max(1)
    facing = n_dot_v.abs().clamp_min(MIN_COSINE)
    masking = n_dot_l * (a2 + (1 - a2) * facing ** 2).sqrt() + facing * (a2 + (1 - a2) * n_dot_l ** 2).sqrt()
    lobe = a2 / math.pi / (n_dot_h2 * (a2 - 1) + 1) ** 2 * 0.5 * n_dot_l / masking
    lobe = torch.where(n_dot_l > 0, lobe, torch.zeros_like(lobe))
    if visibility is not None:
        lobe = lobe * seen_share(visibility, directions)
    return lobe, lobe * (1 - (one / 2).sqrt()).clamp_min(0) ** 5


def cosines(normals: Tensor, visibility: Tensor | None, directions: Tensor) -> Tensor:
    """What each of the directions adds to the irradiance per unit of its flux, [M, n]."""
    cosine = (normals @ directions.T).clamp_min(0)
    return cosine if visibility is None else cosine * seen_share(visibility, directions)


def seen_share(visibility: Tensor, directions: Tensor) -> Tensor:
    """[M, n] of harmonics [M, K] in directions [n, 3], clipped to 0..1."""
    return (visibility @ sh_basis(directions, math.isqrt(visibility.shape[1]) - 1).T).clamp(0, 1)


def _plain(*tensors: Tensor | None) -> bool:
    """Whether the compiled kernels serve: single precision on the CPU, no gradient wanted."""
    return all(t is None or (t.device.type == "cpu" and t.dtype == torch.float32 and not (t.requires_grad and torch.is_grad_enabled()))
               for t in tensors)


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().numpy())


def _seen(visibility: Tensor | None, directions: Tensor, flux: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For the kernels: the discs' coefficients [M, K], the harmonics of the directions [K, n] (K = 0: everything is seen), and
    [6, n]: the directions' x, y, z, the flux' red, green, blue."""
    lit = np.ascontiguousarray(np.concatenate([_array(directions).T, _array(flux).T]))
    if visibility is None:
        return np.empty((1, 0), np.float32), np.empty((0, len(directions)), np.float32), lit
    return _array(visibility), _array(sh_basis(directions, math.isqrt(visibility.shape[1]) - 1).T), lit


# Loops over the directions are kept free of branches, so that the compiler makes vectors of them.


@compiled
def _sees(coefficients, basis, seen):
    """seen[j]: visibility of direction j, not clipped yet."""
    for j in range(len(seen)):
        seen[j] = 0 if len(basis) else 1
    for q in range(len(basis)):
        c, row = coefficients[q], basis[q]
        for j in range(len(seen)):
            seen[j] += c * row[j]


@compiled
def _collect(first, last, normals, visibility, basis, lit, out):
    """Irradiance of rows first..last."""
    dx, dy, dz, red, green, blue = lit[0], lit[1], lit[2], lit[3], lit[4], lit[5]
    seen = np.empty(lit.shape[1], np.float32)
    zero, one_ = np.float32(0), np.float32(1)
    for m in range(first, last):
        _sees(visibility[m if len(basis) else 0], basis, seen)
        n0, n1, n2 = normals[m, 0], normals[m, 1], normals[m, 2]
        r = g = b = zero
        for j in range(len(seen)):
            w = max(n0 * dx[j] + n1 * dy[j] + n2 * dz[j], zero) * min(max(seen[j], zero), one_)
            r += w * red[j]
            g += w * green[j]
            b += w * blue[j]
        out[m, 0], out[m, 1], out[m, 2] = r, g, b


@compiled
def _reflect(first, last, normals, view_dirs, roughness, visibility, basis, lit, out):
    """Both sums of :func:`rough_reflection` for rows first..last."""
    dx, dy, dz, red, green, blue = lit[0], lit[1], lit[2], lit[3], lit[4], lit[5]
    count = lit.shape[1]
    seen = np.empty(count, np.float32)
    zero, one_, two, half = np.float32(0), np.float32(1), np.float32(2), np.float32(0.5)
    per_pi = np.float32(1 / math.pi)
    for m in range(first, last):
        _sees(visibility[m if len(basis) else 0], basis, seen)
        n0, n1, n2 = normals[m, 0], normals[m, 1], normals[m, 2]
        v0, v1, v2 = view_dirs[m, 0], view_dirs[m, 1], view_dirs[m, 2]
        n_dot_v = n0 * v0 + n1 * v1 + n2 * v2
        facing = max(abs(n_dot_v), np.float32(MIN_COSINE))
        r = max(roughness[m], np.float32(MIN_ROUGHNESS))
        a2 = r * r * r * r
        rest = one_ - a2
        mask_v = math.sqrt(a2 + rest * facing * facing)
        scale = a2 * per_pi * half
        w0 = w1 = w2 = g0 = g1 = g2 = zero
        for j in range(count):
            n_dot_l = max(n0 * dx[j] + n1 * dy[j] + n2 * dz[j], zero)
            one = max(one_ + v0 * dx[j] + v1 * dy[j] + v2 * dz[j], np.float32(1e-4))
            total = n_dot_l + n_dot_v
            t = min(total * total / (two * one), one_) * -rest + one_
            masking = n_dot_l * mask_v + facing * np.float32(math.sqrt(a2 + rest * n_dot_l * n_dot_l))
            lobe = scale * n_dot_l / (t * t * masking) * min(max(seen[j], zero), one_)
            x = max(one_ - np.float32(math.sqrt(one * half)), zero)
            slant = lobe * x * x * x * x * x
            w0 += lobe * red[j]
            w1 += lobe * green[j]
            w2 += lobe * blue[j]
            g0 += slant * red[j]
            g1 += slant * green[j]
            g2 += slant * blue[j]
        out[m, 0], out[m, 1], out[m, 2] = w0, w1, w2
        out[m, 3], out[m, 4], out[m, 5] = g0, g1, g2
