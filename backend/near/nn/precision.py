"""Running the heavy part of a model in 16 bits, as the published models do (spec section 2)."""

from __future__ import annotations

import torch
from torch import nn

from near.nn.conv import KernelConv


def cast_weights(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the parameters of linear layers and convolutions inside ``module``, in place; norms stay as they are."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, KernelConv)):
            part.to(dtype)
    return module


def weight_dtype(module: nn.Module) -> torch.dtype:
    """Type of the first linear layer or convolution inside ``module``."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d, nn.Conv3d, KernelConv)):
            return part.weight.dtype
    raise ValueError(f"{type(module).__name__} has no linear layer")
