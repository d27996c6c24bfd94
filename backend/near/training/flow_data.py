"""Photos and SLAT targets for the two flows, from the precomputed cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from near.models.conditioning import photo_square
from near.models.material import HOMOGENEOUS, shaded_slat

STAGES = ("base", "homogenizer")


@dataclass(frozen=True)
class FlowItem:
    """One photo of one object: coords uint8 [L, 3]; lift [L, LIFT_CHANNELS]; prior, target [L, 8] SLATs; weight [L, 8] of
    the loss; condition SLAT [L, 8] or None (homogeniser: the shaded SLAT); square [4, S, S] the cropped photo."""

    coords: Tensor
    lift: Tensor
    prior: Tensor
    target: Tensor
    weight: Tensor
    condition: Tensor | None
    square: Tensor


class FlowData:
    """All photos of the cached objects; ``held_out`` objects are kept apart for the sample sheets."""

    def __init__(self, files: list[Path], stage: str, *, held_out: int = 24) -> None:
        if stage not in STAGES:
            raise ValueError(f"stage must be one of {STAGES}, not {stage!r}")
        self.stage = stage
        self.objects = []
        for path in files:
            data = torch.load(path, weights_only=True, mmap=True)
            self.objects.append({k: data[k] for k in ("name", "coords", "slat", "slat_known", "photos", "alpha")})
        step = max(1, len(self.objects) // max(held_out, 1))
        self.test = list(range(0, len(self.objects), step))[:held_out]
        self.train = [(o, p) for o in range(len(self.objects)) if o not in self.test for p in range(len(self.objects[o]["photos"]))]

    def __len__(self) -> int:
        return len(self.train)

    def item(self, obj: int, photo: int, generator: torch.Generator | None = None, augment: bool = False,
             with_square: bool = True) -> FlowItem:
        data, shot = self.objects[obj], self.objects[obj]["photos"][photo]
        lift, colour, shaded = shot["features"].float(), shot["voxel_colour"].float(), shot["shaded"].float()
        filled = shaded_slat(colour)
        alpha = data["alpha"][shot["view"]].float()
        square = torch.zeros(0) if not with_square else photo_square(shot["srgb"].float() / 255 / alpha.clamp_min(1 / 255)[..., None], alpha)
        coords = data["coords"]
        if self.stage == "base":
            return FlowItem(coords, lift, filled, shaded, torch.ones_like(shaded), None, square)
        if augment and torch.rand((), generator=generator) < 0.5:
            shaded = filled  # the base flow's fill-in is not perfect: do not rely on it
        slat = data["slat"].float()
        weight = torch.ones_like(slat)
        weight[:, HOMOGENEOUS] = 0.3 * data["slat_known"][:, None].float()
        return FlowItem(coords, lift, filled, slat, weight, shaded, square)
