"""Per-voxel intrinsic decomposition: what one voxel's photo colour, its neighbours on the object and the object's statistics
say about its material. It carries most of the homogeniser's answer; the flow adds what needs context."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from near.colour import agx_inverse
from near.models.lifting import LIFT_CHANNELS
from near.models.material import SLAT_CHANNELS

LOCAL_CHANNELS = LIFT_CHANNELS + 3 + 7
GLOBAL_CHANNELS = 25
DROPOUT = 0.25
LUMINANCE = torch.tensor([0.2126, 0.7152, 0.0722])
QUANTILES = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95, 1.0])


def local_features(lift: Tensor, shaded: Tensor) -> Tensor:
    """[L, LOCAL_CHANNELS] of one object: lifted features, shaded colour, its logarithm, hue and contrast to the object."""
    radiance = agx_inverse(shaded[:, :3] * 0.5 + 0.5).clamp_min(1e-3)
    log = radiance.log()
    grey = (radiance @ LUMINANCE.to(radiance)).log()[:, None]
    return torch.cat([lift, shaded[:, :3], log, grey - grey.mean(), log - grey], -1)


def global_features(lift: Tensor, shaded: Tensor) -> Tensor:
    """[GLOBAL_CHANNELS] of one object: colour and brightness statistics of what the photo sees, where it is bright."""
    weight = lift[:, 6:7].clamp_min(1e-4)
    weight = weight / weight.sum()
    colour = shaded[:, :3]
    mean = (colour * weight).sum(0)
    std = ((colour - mean) ** 2 * weight).sum(0).sqrt()
    radiance = agx_inverse(colour * 0.5 + 0.5).clamp_min(1e-3)
    grey = (radiance @ LUMINANCE.to(radiance)).log()
    seen = grey[lift[:, 8] > 0.5] if (lift[:, 8] > 0.5).any() else grey
    normal = lift[:, 10:13]
    centred = (grey - (grey[:, None] * weight).sum())[:, None]
    towards = (centred * normal * weight).sum(0)
    across = (centred * normal.abs() * weight).sum(0)
    log_mean = (radiance.log() * weight).sum(0)
    rest = torch.stack([(lift[:, 3:6].mean(-1) * weight[:, 0]).sum(), (lift[:, 13] * weight[:, 0]).sum(), (centred.square() * weight).sum().sqrt(),
                        torch.tensor(float(len(lift))).log().to(lift)])
    return torch.cat([mean, std, torch.quantile(seen, QUANTILES.to(seen)), towards, across, log_mean, rest])


class PointwisePrior(nn.Module):
    """MLP from :func:`local_features` and :func:`global_features` to a normalised residual [L, 8]."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        channels = LOCAL_CHANNELS + GLOBAL_CHANNELS
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.mlp = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Dropout(DROPOUT), nn.Linear(width, width), nn.SiLU(),
                                 nn.Dropout(DROPOUT), nn.Linear(width, width), nn.SiLU(), nn.Dropout(DROPOUT), nn.Linear(width, SLAT_CHANNELS))
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)

    def from_features(self, features: Tensor) -> Tensor:
        """[L, LOCAL + GLOBAL] -> [L, 8]."""
        return self.mlp(((features - self.mean) / self.std).clamp(-6, 6))

    def forward(self, lift: Tensor, shaded: Tensor, counts: list[int]) -> Tensor:
        """lift [N, LIFT_CHANNELS] and shaded [N, 8] of objects with ``counts`` voxels each, one after the other."""
        parts = [torch.cat([local_features(a, b), global_features(a, b).expand(len(a), -1)], -1)
                 for a, b in zip(lift.split(counts), shaded.split(counts))]
        return self.from_features(torch.cat(parts))
