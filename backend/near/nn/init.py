"""Random weights of sane scale, for benchmarks and synthetic checkpoints."""

from __future__ import annotations

import math
import zlib

import torch
from torch import nn


@torch.no_grad()
def random_sane_weights(model: nn.Module, seed: int = 0, gain: float = 0.7) -> nn.Module:
    """Fill a model with weights that keep activations of order one through any depth, in place.

    Matrices and kernels: normal with variance gain^2 / fan-in; norm gains 1 +- 0.1; layer scales 0.3; biases 0.05.
    A parameter's value depends on the seed, its name and shape only. Buffers and parameters that are not trained keep their values.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        generator = torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(name.encode()))
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            noise *= 0.05
        elif parameter.ndim == 1 and name.endswith("weight") or name.endswith("norm.gamma"):
            noise = 1 + 0.1 * noise
        elif parameter.ndim == 1:
            noise *= 0.3
        else:
            noise *= gain / math.sqrt(parameter[0].numel())
        parameter.copy_(noise)
    return model
