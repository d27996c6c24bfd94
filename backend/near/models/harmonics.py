"""Real spherical harmonics up to order 4, the carrier of per-Gaussian visibility.

`spec/ANALYTIC.md` section 3: order 4 (25 numbers) per Gaussian recovers all of what true shadows add.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_ORDER = 4


def sh_count(order: int) -> int:
    """Number of coefficients of a basis that ends with band ``order``."""
    return (order + 1) ** 2


def sh_bands(order: int) -> Tensor:
    """Band index l of each of the ``(order + 1)**2`` coefficients, int64."""
    return torch.cat([torch.full((2 * band + 1,), band) for band in range(order + 1)])


def sh_basis(dirs: Tensor, order: int = MAX_ORDER) -> Tensor:
    """Evaluate the orthonormal real basis.

    Args:
        dirs: unit vectors [..., 3].
        order: last band, 0 to 4.
    Returns:
        [..., (order + 1)**2]; band l occupies columns l**2 to (l + 1)**2 - 1, m from -l to l.
    """
    if not 0 <= order <= MAX_ORDER:
        raise ValueError(f"order must be 0 to {MAX_ORDER}, got {order}")
    x, y, z = dirs.unbind(-1)
    pi = math.pi
    out = [torch.full_like(x, 0.5 / math.sqrt(pi))]
    if order >= 1:
        c = math.sqrt(3 / (4 * pi))
        out += [c * y, c * z, c * x]
    if order >= 2:
        c = 0.5 * math.sqrt(15 / pi)
        out += [c * x * y, c * y * z, 0.25 * math.sqrt(5 / pi) * (3 * z * z - 1), c * x * z, 0.5 * c * (x * x - y * y)]
    if order >= 3:
        a, b, d = 0.25 * math.sqrt(35 / (2 * pi)), 0.5 * math.sqrt(105 / pi), 0.25 * math.sqrt(21 / (2 * pi))
        out += [a * y * (3 * x * x - y * y), b * x * y * z, d * y * (5 * z * z - 1),
                0.25 * math.sqrt(7 / pi) * z * (5 * z * z - 3),
                d * x * (5 * z * z - 1), 0.5 * b * z * (x * x - y * y), a * x * (x * x - 3 * y * y)]
    if order >= 4:
        a, b = 0.75 * math.sqrt(35 / pi), 0.75 * math.sqrt(35 / (2 * pi))
        c, d = 0.75 * math.sqrt(5 / pi), 0.75 * math.sqrt(5 / (2 * pi))
        zz = z * z
        out += [a * x * y * (x * x - y * y), b * y * z * (3 * x * x - y * y), c * x * y * (7 * zz - 1),
                d * y * z * (7 * zz - 3), (3 / 16) / math.sqrt(pi) * (35 * zz * zz - 30 * zz + 3),
                d * x * z * (7 * zz - 3), 0.5 * c * (x * x - y * y) * (7 * zz - 1),
                b * x * z * (x * x - 3 * y * y), 0.25 * a * (x * x * (x * x - 3 * y * y) - y * y * (3 * x * x - y * y))]
    return torch.stack(out, -1)


def fibonacci_sphere(count: int) -> Tensor:
    """``count`` evenly spread unit vectors [count, 3]."""
    i = torch.arange(count, dtype=torch.float64) + 0.5
    z = 1 - 2 * i / count
    phi = math.pi * (1 + math.sqrt(5)) * i
    r = torch.sqrt(1 - z * z)
    return torch.stack([r * torch.cos(phi), r * torch.sin(phi), z], -1).float()
