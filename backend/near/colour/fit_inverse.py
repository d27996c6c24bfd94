"""Numeric inverse of AgX for photos, by damped least squares at the nodes of a table (used by `tools/make_agx_lut.py`)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from near.colour.agx import agx_srgb, grey_curve

PULL = 0.002  # display error that is traded for one stop of distance from the channel-wise guess


def fit_inverse(size: int, low: float, high: float, iterations: int = 80) -> np.ndarray:
    """Solve ``agx_srgb(2**z) = display`` for z in [low, high].

    The table's axes are the *grey codes* of the display channels (see :func:`near.colour.agx.grey_curve`), so a grey
    photo is inverted exactly and the table only holds what colour adds.

    Returns: [size, size, size, 3] float64, log2 of linear Rec.709.
    """
    node = torch.linspace(0, 1, size, dtype=torch.float64)
    codes = torch.stack(torch.meshgrid(node, node, node, indexing="ij"), -1).reshape(-1, 3)
    guess = low + codes * (high - low)
    # The display value that each channel would have were it grey.
    display = torch.from_numpy(np.interp(guess.numpy(), *grey_curve(low, high)))
    z, damping = guess.clone(), torch.full((len(guess), 1, 1), 1e-2, dtype=torch.float64)
    cost, jacobian, residual = _linearise(z, display, guess)
    eye = torch.eye(3, dtype=torch.float64)
    for _ in range(iterations):
        hessian = jacobian.mT @ jacobian
        step = torch.linalg.solve(hessian + damping * eye, -(jacobian.mT @ residual[..., None]))[..., 0]
        trial = (z + step.clamp(-2, 2)).clamp(low, high)
        new_cost, new_jacobian, new_residual = _linearise(trial, display, guess)
        better = new_cost < cost
        z = torch.where(better[:, None], trial, z)
        cost = torch.where(better, new_cost, cost)
        jacobian = torch.where(better[:, None, None], new_jacobian, jacobian)
        residual = torch.where(better[:, None], new_residual, residual)
        damping = torch.where(better[:, None, None], damping * 0.4, damping * 4).clamp(1e-7, 1e4)
    return z.reshape(size, size, size, 3).numpy()


def _linearise(z: Tensor, display: Tensor, guess: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cost [N], Jacobian [N, 6, 3] and residual [N, 6] of the display error and the pull towards the guess."""
    leaf = z.detach().requires_grad_()
    value = agx_srgb(leaf.exp2())
    rows = [torch.autograd.grad(value[:, c].sum(), leaf, retain_graph=True)[0] for c in range(3)]
    pull = (PULL * torch.eye(3, dtype=z.dtype)).expand(len(z), 3, 3)
    residual = torch.cat([value.detach() - display, PULL * (z - guess)], -1)
    return (residual ** 2).sum(-1), torch.cat([torch.stack(rows, 1), pull], 1), residual
