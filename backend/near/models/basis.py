"""Neural basis: features and normal of a Gaussian -> colour (spec section 7.1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from near.models.args import one_of, pick_args, require
from near.nn import nerf_encoding


@dataclass(frozen=True)
class NeuralBasisConfig:
    """Sizes of the basis; the defaults are those of the published renderer.

    Attributes:
        input_dim: features per Gaussian, before the normal's code.
        output_dim: outputs. hidden_dim, num_layers: of the sine network.
        w0: frequency of the sines: sin(w0 x) after every layer but the last.
        use_normal: append the normal and its code (39 numbers).
        output: "hdr": the first three outputs through ELU(alpha 1e-3) (colour, at least -0.001), the rest through a
            sigmoid; "linear": as they are (corrections of an analytic shade).
        zero_init_last: start with the last layer at zero, so that a correction starts as no correction.
    """

    input_dim: int = 32
    output_dim: int = 5
    hidden_dim: int = 64
    num_layers: int = 3
    w0: float = 30.0
    use_normal: bool = True
    output: str = "hdr"
    zero_init_last: bool = False

    def __post_init__(self) -> None:
        one_of("NeuralBasis", "output", self.output, ("hdr", "linear"))
        require("NeuralBasis", self.num_layers >= 2, f"num_layers is {self.num_layers}, at least 2 are needed")

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> "NeuralBasisConfig":
        """From the ``args`` of a published model JSON. Its class defaults are stale (48 in, 4 out); only what the file
        says counts, and what it does not say is the consistent 32 in, 5 out."""
        return cls(**pick_args("NeuralBasis", args, set(cls.__dataclass_fields__) - {"output", "zero_init_last"}))


class Sine(nn.Module):
    """sin(w0 x)."""

    def __init__(self, w0: float) -> None:
        super().__init__()
        self.w0 = w0

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.w0 * x)


class NeuralBasis(nn.Module):
    """Features [M, input_dim] and world normals [M, 3] -> [M, output_dim]."""

    NORMAL_FREQS = 6

    def __init__(self, config: NeuralBasisConfig) -> None:
        super().__init__()
        self.config = config
        width = config.input_dim + (3 * (1 + 2 * self.NORMAL_FREQS) if config.use_normal else 0)
        layers: list[nn.Module] = []
        for i in range(config.num_layers - 1):
            layers += [nn.Linear(width, config.hidden_dim), Sine(config.w0)]
            width = config.hidden_dim
        layers.append(nn.Linear(width, config.output_dim))
        self.mlp = nn.Sequential(*layers)
        self._initialise()

    def _initialise(self) -> None:
        """Sine-network initialisation: unit-variance phases after every layer."""
        for i, layer in enumerate(m for m in self.mlp if isinstance(m, nn.Linear)):
            bound = 1 / layer.in_features if i == 0 else (6 / layer.in_features) ** 0.5 / self.config.w0
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)
        if self.config.zero_init_last:
            nn.init.zeros_(self.mlp[-1].weight)

    def forward(self, features: Tensor, normals: Tensor | None = None) -> Tensor:
        """features [M, input_dim]; normals [M, 3], any length (normalised here), needed when ``use_normal``.

        Returns:
            [M, output_dim]; with "hdr" output: colour 0:3 in linear HDR, brightness 3, "nush1" 4.
        """
        x = features
        if self.config.use_normal:
            x = torch.cat([features, nerf_encoding(F.normalize(normals, dim=-1), self.NORMAL_FREQS).to(features.dtype)], -1)
        out = self.mlp(x)
        if self.config.output == "linear":
            return out
        return torch.cat([F.elu(out[:, :3], alpha=1e-3), torch.sigmoid(out[:, 3:])], -1)
