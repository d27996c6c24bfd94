"""The split-sum table against an independent quadrature, and its multi-scatter compensation."""

from __future__ import annotations

import math

import numpy as np
import torch

from near.lighting import brdf_table, multiscatter


def brute_force_albedo(cos_v: float, roughness: float, n: int = 900) -> tuple[float, float]:
    """Hemisphere quadrature of the GGX lobe, written apart from the table's sampling."""
    alpha = roughness ** 2
    theta, phi = ((np.arange(n) + 0.5) / n * top for top in (math.pi / 2, math.pi))
    sin, cos = np.sin(theta)[:, None], np.cos(theta)[:, None]
    light = np.stack(np.broadcast_arrays(sin * np.cos(phi), sin * np.sin(phi), cos), -1)
    view = np.array([math.sqrt(1 - cos_v ** 2), 0, cos_v])
    half = light + view
    half /= np.linalg.norm(half, axis=-1, keepdims=True)
    d = alpha ** 2 / (math.pi * (half[..., 2] ** 2 * (alpha ** 2 - 1) + 1) ** 2)

    def smith(c):
        return 0.5 * (np.sqrt(1 + alpha ** 2 * (1 - c * c) / (c * c)) - 1)

    weight = d / (1 + smith(cos_v) + smith(light[..., 2])) / (4 * cos_v) * sin * 2 * (math.pi / 2 / n) * (math.pi / n)
    fresnel = (1 - half @ view) ** 5
    return float((weight * (1 - fresnel)).sum()), float((weight * fresnel).sum())


def test_brdf_table() -> None:
    table = brdf_table()
    assert table.shape == (64, 64, 2) and table is brdf_table()
    for i, j in ((63, 63), (63, 32), (20, 63), (20, 30), (5, 40), (40, 50)):
        scale, bias = brute_force_albedo(i / 63, j / 63)
        assert abs(float(table[i, j, 0]) - scale) < 2e-3 and abs(float(table[i, j, 1]) - bias) < 2e-3
    total = table.sum(-1)
    assert (total <= 1.001).all() and (table >= 0).all()
    assert torch.allclose(total[1:, 0], torch.ones(63), atol=1e-3)  # a mirror loses nothing


def test_multiscatter_conserves_energy() -> None:
    table = brdf_table().reshape(-1, 2)
    white = multiscatter(torch.ones(len(table), 3), table[:, 0], table[:, 1])
    assert (white[table.sum(-1) > 2e-3] - 1).abs().max() < 2e-3
    dark = multiscatter(torch.full((len(table), 3), 0.04), table[:, 0], table[:, 1])
    assert (dark <= 1.0).all()
