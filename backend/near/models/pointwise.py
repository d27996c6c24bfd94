"""Per-voxel intrinsic decomposition: what one voxel's photo colour, its surroundings, its mirror image and the object as a whole
say about its material. It carries most of the homogeniser's answer; the flow adds what needs more context."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from near.colour import LUMINANCE, agx_inverse
from near.models.evidence import VoxelView, explain, irradiance_along_axes, mean_radiance
from near.models.lifting import LIFT_CHANNELS
from near.models.material import SLAT_CHANNELS

BLURS = (5, 11)  # voxels; what a paint's surroundings look like tells shadow and highlight from colour
LOCAL_CHANNELS = LIFT_CHANNELS + 7 + 4 * len(BLURS) + 2 * 5
GLOBAL_CHANNELS = 27
EXPLAINED_LOCAL, EXPLAINED_GLOBAL = 22, 21
CHANNELS = LOCAL_CHANNELS + GLOBAL_CHANNELS + EXPLAINED_LOCAL + EXPLAINED_GLOBAL
DROPOUT = 0.08
QUANTILES = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95, 1.0])


def log_radiance(lift: Tensor) -> Tensor:
    """Log of the linear light [L, 3] behind lifted display colours."""
    return agx_inverse(lift[:, :3].clamp(-1, 1) * 0.5 + 0.5).clamp_min(1e-3).log()


def grid_rows(lift: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """Voxel coordinates [L, 3] as the lifted features hold them, and the rows of a dense grid [R, R, R], -1 where empty."""
    coords = ((lift[:, 17:20] * 0.5 + 0.5) * resolution - 0.5).round().long().clamp(0, resolution - 1)
    grid = torch.full((resolution,) * 3, -1, dtype=torch.long, device=lift.device)
    grid[coords[:, 0], coords[:, 1], coords[:, 2]] = torch.arange(len(lift), device=lift.device)
    return coords, grid


def mirror_features(lift: Tensor, log: Tensor, coords: Tensor, grid: Tensor) -> Tensor:
    """[L, 10]: for the planes x = 0 and y = 0, the mirrored voxel's colour beside one's own, whether the photo sees it (and
    it is there), and how well its normal mirrors one's own. Most made things are symmetric; hidden sides profit."""
    parts, last = [], grid.shape[0] - 1
    for axis in (0, 1):
        other = coords.clone()
        other[:, axis] = last - other[:, axis]
        row = grid[other[:, 0], other[:, 1], other[:, 2]]
        there = (row >= 0).float()[:, None]
        row = row.clamp_min(0)
        sign = torch.ones(3, device=lift.device)
        sign[axis] = -1
        agree = (lift[:, 10:13] * lift[row, 10:13] * sign).sum(-1, keepdim=True)
        seen = lift[row, 8:9] * there
        parts += [(log[row] - log) * seen, seen, agree * there]
    return torch.cat(parts, -1)


def surroundings(log: Tensor, weight: Tensor, coords: Tensor, resolution: int) -> Tensor:
    """[L, 4 * len(BLURS)]: seen colour of the neighbourhood beside one's own, and how much of it is seen."""
    dense = torch.zeros(4, resolution, resolution, resolution, device=log.device)
    dense[:, coords[:, 0], coords[:, 1], coords[:, 2]] = torch.cat([log * weight, weight], -1).T
    parts = []
    for size in BLURS:
        blurred = dense[None]
        for axis in range(3):  # a box is separable
            kernel, padding = [1, 1, 1], [0, 0, 0]
            kernel[axis], padding[axis] = size, size // 2
            blurred = F.avg_pool3d(blurred, kernel, 1, padding)
        near = blurred[0][:, coords[:, 0], coords[:, 1], coords[:, 2]].T * size
        mass = near[:, 3:4]
        parts += [torch.where(mass > 1e-4, near[:, :3] / mass.clamp_min(1e-4) - log, torch.zeros(())), mass]
    return torch.cat(parts, -1)


def local_features(lift: Tensor, log: Tensor, coords: Tensor, grid: Tensor) -> Tensor:
    """[L, LOCAL_CHANNELS] of one object: lifted features, logarithm ``log`` of the light, hue and contrast to the object,
    to the surroundings and to the mirror images."""
    grey = (log.exp() @ LUMINANCE.to(log)).log()[:, None]
    return torch.cat([lift, log, grey - grey.mean(), log - grey, surroundings(log, lift[:, 6:7], coords, len(grid)),
                      mirror_features(lift, log, coords, grid)], -1)


def global_features(lift: Tensor, log: Tensor, local: Tensor) -> Tensor:
    """[GLOBAL_CHANNELS] of one object: colour and brightness statistics of what the photo sees, where it is bright, and how
    symmetric the object is."""
    weight = lift[:, 6:7].clamp_min(1e-4)
    weight = weight / weight.sum()
    colour = lift[:, :3]
    mean = (colour * weight).sum(0)
    std = ((colour - mean) ** 2 * weight).sum(0).sqrt()
    grey = (log.exp() @ LUMINANCE.to(log)).log()
    seen = grey[lift[:, 8] > 0.5] if (lift[:, 8] > 0.5).any() else grey
    normal = lift[:, 10:13]
    centred = (grey - (grey[:, None] * weight).sum())[:, None]
    towards = (centred * normal * weight).sum(0)
    across = (centred * normal.abs() * weight).sum(0)
    log_mean = (log * weight).sum(0)
    rest = torch.stack([(lift[:, 3:6].mean(-1) * weight[:, 0]).sum(), (lift[:, 13] * weight[:, 0]).sum(), (centred.square() * weight).sum().sqrt(),
                        torch.tensor(float(len(lift))).log().to(lift)])
    symmetry = local[:, [-6, -1]].mean(0)  # agreement of normals with the mirror image, per plane
    return torch.cat([mean, std, torch.quantile(seen, QUANTILES.to(seen)), towards, across, log_mean, rest, symmetry])


def explained_features(lift: Tensor, log: Tensor, view: VoxelView, coords: Tensor, grid: Tensor) -> Tensor:
    """[L, EXPLAINED_LOCAL + EXPLAINED_GLOBAL]: what a smooth light shows of a grey object and what it leaves over, here, in
    the surroundings and at the mirror images; the light itself, and how much it leaves over."""
    weight = (lift[:, 6] * lift[:, 8]).clamp_min(0).sqrt()
    found = explain(view, log.exp(), weight)
    shown, rest, lum = found.shown.log(), found.rest, LUMINANCE.to(log)
    around = surroundings(rest, lift[:, 6:7], coords, len(grid)).view(len(lift), len(BLURS), 4)[..., :3].flatten(1)
    mirrors = mirror_features(lift, rest, coords, grid).view(len(lift), 2, 5)[..., :3].flatten(1)
    share = weight / weight.sum().clamp_min(1e-6)
    spread = lambda values: ((values - (values * share[:, None]).sum(0)) ** 2 * share[:, None]).sum(0).sqrt()
    brightness = irradiance_along_axes(found.light).clamp_min(1e-3)
    ambient = mean_radiance(found.light).clamp_min(1e-3).log()
    seen = (rest @ lum)[lift[:, 8] > 0.5] if (lift[:, 8] > 0.5).any() else rest @ lum
    whole = torch.cat([(lum @ brightness).log(), ambient, (rest * share[:, None]).sum(0), spread(rest), spread(found.mirror_rest[:, None]),
                       torch.quantile(seen, QUANTILES[:5].to(seen))])
    return torch.cat([shown, rest, shown - ambient, around, mirrors, found.mirror_rest[:, None], whole.expand(len(lift), -1)], -1)


def prior_features(lift: Tensor, view: VoxelView, resolution: int) -> Tensor:
    """[L, CHANNELS] of one object's lifted features [L, LIFT_CHANNELS]."""
    log = log_radiance(lift)
    coords, grid = grid_rows(lift, resolution)
    local = local_features(lift, log, coords, grid)
    return torch.cat([local, global_features(lift, log, local).expand(len(lift), -1),
                      explained_features(lift, log, view, coords, grid)], -1)


def _columns() -> tuple[list[int], list[int], list[tuple[int, int, int]]]:
    """Where :func:`prior_features` holds vectors with and without a sign, by their first column; and pairs of blocks
    (first column, second, length) that belong to x and y."""
    mirrors = LIFT_CHANNELS + 7 + 4 * len(BLURS)
    whole, shown = LOCAL_CHANNELS, LOCAL_CHANNELS + GLOBAL_CHANNELS
    light = shown + EXPLAINED_LOCAL
    pairs = [(mirrors, mirrors + 5, 5), (whole + 25, whole + 26, 1), (shown + 15, shown + 18, 3), (light, light + 2, 2)]
    return [10, 14, 17, whole + 12], [whole + 15], pairs


def seen_otherwise(features: Tensor, swap: bool, flips: tuple[bool, bool]) -> Tensor:
    """The same object with x and y swapped and flipped: every photo is as true of it. Colours stay, for light is warm or cold
    and hardly ever green, and paint is anything: that difference tells them apart."""
    vectors, lengths, pairs = _columns()
    index, sign = list(range(features.shape[-1])), torch.ones(features.shape[-1])
    if swap:
        for start in vectors + lengths:
            index[start], index[start + 1] = start + 1, start
        for first, second, length in pairs:
            one, other = slice(first, first + length), slice(second, second + length)
            index[one], index[other] = index[other], index[one]
    light = LOCAL_CHANNELS + GLOBAL_CHANNELS + EXPLAINED_LOCAL
    for axis, flip in enumerate(flips):
        if flip:
            sign[[start + axis for start in vectors]] = -1
            plus = light + 2 * axis
            index[plus], index[plus + 1] = index[plus + 1], index[plus]
    return features[..., index] * sign


class PointwisePrior(nn.Module):
    """From :func:`prior_features` to a normalised residual [L, 8]; each voxel also hears a code pooled over its object,
    so that what one part shows of the light helps all others."""

    def __init__(self, width: int) -> None:
        super().__init__()
        code = width // 2
        self.register_buffer("mean", torch.zeros(CHANNELS))
        self.register_buffer("std", torch.ones(CHANNELS))
        self.read = nn.Sequential(nn.Linear(CHANNELS, width), nn.SiLU(), nn.Dropout(DROPOUT), nn.Linear(width, width), nn.SiLU())
        self.pool = nn.Linear(width, code)
        self.spread = nn.Sequential(nn.Linear(2 * code, width), nn.SiLU(), nn.Dropout(DROPOUT), nn.Linear(width, width))
        self.answer = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Dropout(DROPOUT), nn.Linear(width, width), nn.SiLU(),
                                    nn.Linear(width, SLAT_CHANNELS))
        nn.init.zeros_(self.answer[-1].weight)
        nn.init.zeros_(self.answer[-1].bias)

    def from_features(self, features: Tensor, counts: list[int]) -> Tensor:
        """features [N, C] of objects with ``counts`` rows each -> [N, 8]."""
        weight = features[:, 6:7].clamp_min(1e-3)  # the visible share
        hidden = self.read(((features - self.mean) / self.std).clamp(-6, 6))
        pooled = [torch.cat([(w * p).sum(0) / w.sum(), p.amax(0)])
                  for p, w in zip(self.pool(hidden).split(counts), weight.split(counts))]
        heard = self.spread(torch.stack(pooled))
        return self.answer(hidden + torch.cat([h.expand(n, -1) for h, n in zip(heard, counts)]))


class PointwiseEnsemble(nn.Module):
    """Several priors, trained apart, and the mean of their answers: what one photo leaves open, each guesses differently."""

    def __init__(self, resolution: int, width: int, members: int = 2) -> None:
        super().__init__()
        self.resolution = resolution
        self.members = nn.ModuleList(PointwisePrior(width) for _ in range(members))

    def from_features(self, features: Tensor, counts: list[int]) -> Tensor:
        """features [N, C] of objects with ``counts`` rows each -> [N, 8]."""
        return torch.stack([member.from_features(features, counts) for member in self.members]).mean(0)

    def forward(self, lift: Tensor, view: VoxelView) -> Tensor:
        """lift [L, LIFT_CHANNELS] of one object and its voxels' answer to light -> [L, 8]."""
        return self.from_features(prior_features(lift, view, self.resolution), [len(lift)])
