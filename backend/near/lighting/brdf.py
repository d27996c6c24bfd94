"""Directional albedo of the GGX microfacet lobe (split-sum table) and its multi-scatter compensation."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from near.compiled import compiled

SAMPLES = 128


@lru_cache(maxsize=4)
def brdf_table(n: int = 64) -> Tensor:
    """[n, n, 2] float32: (scale, bias) with albedo(F0) = F0 * scale + bias (do not modify: shared).

    Rows: n.v = i / (n - 1); columns: perceptual roughness = j / (n - 1), alpha = roughness^2. Height-correlated Smith
    masking as in Cycles, Schlick's Fresnel; integrated over visible normals with low-discrepancy points.
    """
    out = np.empty((n, n, 2), np.float32)
    _integrate(out, SAMPLES)
    return torch.from_numpy(out)


def multiscatter(f0: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Albedo [N, 3] with the energy that single scattering loses added back, tinted by ``f0`` [N, 3] (Turquin 2019).

    Args: scale, bias [N]: values of :func:`brdf_table`.
    """
    single = (scale + bias).clamp(1e-3, 1.0)
    return (f0 * scale[:, None] + bias[:, None]) * (1 + f0 * (1 / single - 1)[:, None])


@compiled()
def _integrate(out, samples):
    n = out.shape[0]
    for i in range(n):
        # At n.v = 0 nothing is visible; the limit is taken from slightly above.
        cos_v = max(i / (n - 1), 1e-3)
        sin_v = math.sqrt(1 - cos_v * cos_v)
        for j in range(n):
            alpha = max((j / (n - 1)) ** 2, 1e-5)
            scale = bias = 0.0
            for a in range(samples):
                u = (a + 0.5) / samples
                for b in range(samples // 16):
                    w = ((b + 0.5) / (samples // 16) + a * 0.6180339887498949) % 1.0
                    s, t = _sample(cos_v, sin_v, alpha, u, w)
                    scale += s
                    bias += t
            count = samples * (samples // 16)
            out[i, j, 0] = scale / count
            out[i, j, 1] = bias / count


@compiled()
def _sample(cos_v, sin_v, alpha, u, w):
    """One visible normal (Heitz 2018): its (1 - Fresnel) and Fresnel parts of G2 / G1."""
    # Stretch the view, sample the projected half disc, unstretch.
    vx, vz = alpha * sin_v, cos_v
    length = math.sqrt(vx * vx + vz * vz)
    vx /= length
    vz /= length
    r = math.sqrt(u)
    phi = 2 * math.pi * w
    t1 = r * math.cos(phi)
    t2 = r * math.sin(phi)
    blend = 0.5 * (1 + vz)
    t2 = (1 - blend) * math.sqrt(max(0.0, 1 - t1 * t1)) + blend * t2
    t3 = math.sqrt(max(0.0, 1 - t1 * t1 - t2 * t2))
    # Basis around v in the x-z plane: T1 = (0, 1, 0), T2 = v x T1.
    hx = t2 * (-vz) + t3 * vx
    hy = t1
    hz = t2 * vx + t3 * vz
    hx *= alpha
    hy *= alpha
    hz = max(hz, 1e-9)
    length = math.sqrt(hx * hx + hy * hy + hz * hz)
    hx /= length
    hz /= length
    v_dot_h = sin_v * hx + cos_v * hz
    cos_l = 2 * v_dot_h * hz - cos_v
    if v_dot_h <= 0 or cos_l <= 0:
        return 0.0, 0.0
    a2 = alpha * alpha
    lambda_v = 0.5 * (math.sqrt(1 + a2 * (1 - cos_v * cos_v) / (cos_v * cos_v)) - 1)
    lambda_l = 0.5 * (math.sqrt(1 + a2 * (1 - cos_l * cos_l) / (cos_l * cos_l)) - 1)
    ratio = (1 + lambda_v) / (1 + lambda_v + lambda_l)
    fresnel = (1 - v_dot_h) ** 5
    return (1 - fresnel) * ratio, fresnel * ratio
