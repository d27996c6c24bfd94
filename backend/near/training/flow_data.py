"""Photos and SLAT targets for the two flows, from the precomputed cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from near.assets import Anchors
from near.errors import NearError
from near.models.anchors import decode_anchors
from near.models.conditioning import photo_square
from near.models.evidence import voxel_view
from near.models.material import HOMOGENEOUS, shaded_slat
from near.models.pointwise import PointwiseEnsemble, prior_features
from near.training.cache import unpack_matrix
from near.training.pictures import splatted

STAGES = ("base", "homogenizer")


@dataclass(frozen=True)
class FlowItem:
    """One photo of one object: coords uint8 [L, 3]; lift [L, LIFT_CHANNELS]; prior, target [L, 8] SLATs; weight [L, 8] of
    the loss; condition SLAT [L, 8] or None (homogeniser: the shaded SLAT); guess [L, 8] or None (homogeniser: its head's
    answer); square [4, S, S] the cropped photo."""

    coords: Tensor
    lift: Tensor
    prior: Tensor
    target: Tensor
    weight: Tensor
    condition: Tensor | None
    guess: Tensor | None
    square: Tensor


def held_out_rows(count: int, wanted: int) -> list[int]:
    """Which of ``count`` objects training does not see: ``wanted`` of them, evenly, but at most a quarter.

    Raises:
        NearError: ``training-data-few``.
    """
    if wanted == 0:
        return []
    if count < 2:
        raise NearError("training-data-few", f"{count} objects are too few to train on and to test with.", "Precompute more objects.")
    wanted = min(wanted, max(count // 4, 1))
    return list(range(0, count, count // wanted))[:wanted]


class FlowData:
    """All photos of the cached objects; ``held_out`` objects are kept apart for the sample sheets. The homogeniser's stage
    needs its trained per-voxel ``head``."""

    def __init__(self, files: list[Path], stage: str, *, held_out: int = 24, head: PointwiseEnsemble | None = None) -> None:
        if stage not in STAGES:
            raise ValueError(f"stage must be one of {STAGES}, not {stage!r}")
        self.stage, self.head = stage, head
        self.objects = []
        for path in files:
            data = torch.load(path, weights_only=True, mmap=True)
            self.objects.append({k: data[k] for k in ("name", "coords", "slat", "slat_known", "photos", "alpha", "matrices", "anchors", "cam_from_world", "lights")})
        self.test = held_out_rows(len(files), held_out)
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
            return FlowItem(coords, lift, filled, shaded, torch.ones_like(shaded), None, None, square)
        if augment and torch.rand((), generator=generator) < 0.5:
            shaded = filled  # the base flow's fill-in is not perfect: do not rely on it
        slat = data["slat"].float()
        weight = torch.ones_like(slat)
        weight[:, HOMOGENEOUS] = 0.3 * data["slat_known"][:, None].float()
        return FlowItem(coords, lift, filled, slat, weight, shaded, self._guess(data, shot, lift), square)

    @torch.no_grad()
    def _guess(self, data: dict, shot: dict, lift: Tensor) -> Tensor:
        self.head.eval()
        cloud = decode_anchors(data["coords"], Anchors(**data["anchors"]), self.head.resolution)
        cam = data["cam_from_world"][shot["view"]]
        eye = F.normalize(-cam[:3, :3].T @ cam[:3, 3] - cloud.points, dim=-1)
        features = prior_features(lift, voxel_view(cloud, lift, eye), self.head.resolution)
        return self.head.from_features(features.to(self.head.members[0].mean.device), [len(lift)]).cpu()

    def picture(self, obj: int, photo: int, colour: Tensor) -> Tensor:
        """Colours per voxel [L, 3] in -1..1 as the photo's camera sees them: [S, S, 3] in 0..1."""
        data = self.objects[obj]
        matrix = unpack_matrix(data["matrices"][data["photos"][photo]["view"]])
        return splatted(matrix, colour.clamp(-1, 1) * 0.5 + 0.5, data["anchors"]["counts"])
