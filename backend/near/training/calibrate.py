"""The homogeniser's brightness, set by path-traced photos.

Its heads answer in logarithms and are unsure of the light's strength, so they answer the middle of what is likely; most of them learned
from photos of the analytic renderer. What is left over on path-traced photos of the training objects, as one factor for all of them,
is measured and taken into the weights: the mean of the residual, which is a number that the flow already has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from near.colour import LUMINANCE
from near.errors import NearError
from near.models.compact_flows import CompactFlow
from near.models.material import HOMOGENEOUS, MATERIAL, decode_material
from near.models.shading import total_albedo
from near.training.flow_data import FlowData
from near.training.lights import LightLibrary
from near.training.relit import RelitConfig

BLACK = 0.01  # albedo below which a logarithm says nothing
COLOURS = slice(0, 3)  # of a residual; its look is HOMOGENEOUS


@dataclass(frozen=True)
class BrightnessBias:
    """Log ratio of true to answered albedo: mean and standard deviation over so many photos."""

    mean: float
    deviation: float
    photos: int


@torch.no_grad()
def brightness_bias(flow: CompactFlow, files: list[Path], hdri_folder: Path, per_object: int,
                    progress: Callable[[], object] = lambda: None) -> BrightnessBias:
    """How much brighter objects are than the homogeniser's heads say.

    Args:
        files: precomputed objects with rendered photos (:mod:`near.training.cache`); ``per_object`` photos of each are drawn, of those
            taken in enough light for the heads' training.
    Raises:
        NearError: ``training-lights-dim``, ``training-data-few`` when no photo is bright enough.
    """
    bright = LightLibrary(hdri_folder).brighter_than(RelitConfig.darkest)
    data = FlowData(files, "homogenizer", held_out=0, head=flow.pointwise)
    generator, errors = torch.Generator().manual_seed(0), []
    for index, item in enumerate(data.objects):
        usable = [k for k, p in enumerate(item["photos"]) if item["lights"][p["view"]][p["light"]][0] in bright]
        for k in torch.randperm(len(usable), generator=generator)[:per_object].tolist():
            errors.append(_log_ratio(flow, data, index, usable[k]))
        progress()
    if len(errors) < 2:
        raise NearError("training-data-few", f"{len(errors)} photos in enough light are too few to calibrate by.", "Precompute more objects.")
    found = torch.tensor(errors, dtype=torch.float64)
    return BrightnessBias(float(found.mean()), float(found.std()), len(errors))


def calibrate(flow: CompactFlow, bias: BrightnessBias) -> None:
    """Take a bias into the flow's weights: base colour and look answer brighter by it."""
    flow.residual_mean[COLOURS] += bias.mean
    flow.residual_mean[HOMOGENEOUS] += bias.mean


def _log_ratio(flow: CompactFlow, data: FlowData, index: int, photo: int) -> float:
    """Of one photo, over the voxels that it sees."""
    item = data.item(index, photo, with_square=False)
    answer = flow.compose(flow.denormalise(item.guess), item.prior).clamp(-1, 1)
    weight = (item.lift[:, 6] * item.lift[:, 8]).clamp_min(0)
    return float(((_log_albedo(item.target) - _log_albedo(answer)) * weight).sum() / weight.sum().clamp_min(1e-6))


def _log_albedo(slat: Tensor) -> Tensor:
    material = decode_material(slat[:, MATERIAL])
    return (total_albedo(material[:, :3], material[:, 4:5]) @ LUMINANCE).clamp_min(BLACK).log()
