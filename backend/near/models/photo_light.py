"""The light that a photo was taken in, as far as its object shows it: radiance from some hundred directions, none of it negative.

Few harmonics (:mod:`near.models.evidence`) say how bright each side of an object is lit. They hold no lamp: what a lamp does, the highlight
on a curved side and the edge of a shadow, would be left over and taken for paint. Directions hold it. There are more of them than smooth
surfaces can tell apart; starting from the harmonics and stopping after some rounds of multiplicative steps (which keep radiance positive
and are slow to invent what one disc alone would explain) leaves those alone that the photo says nothing of.

Where normals are guesses (of an outline that was inflated), a light of many colours explains paint: blue from where the blue parts happen
to face. There all of it has one colour.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from near.models.gather import cosines, irradiance, rough_lobes, rough_reflection
from near.models.harmonics import fibonacci_sphere
from near.models.shading import albedo_split, scattered_again

DIRECTIONS = 642      # about 8 degrees apart
MIN_ROUGHNESS = 0.3   # of the discs: sharper lobes would fall between the directions
FITTED = 4000         # discs, drawn by how well they are seen
ROUNDS = 40
ALIKE = 0.8           # of a step's logarithm is common to the channels: lamps are hardly coloured, paints are
STEP = 2.0            # factor by which a round may change a direction
DARKEST = 0.05        # of the mean radiance, that a direction starts from
NOTHING = 1e-6        # added to both sides of a step: what no disc sees stays
FLOOR = 0.02          # radiance below which errors no longer count relatively
OUTLIER = 0.5         # log error from which a row counts less: a highlight must not light the rest


def light_directions() -> tuple[Tensor, float]:
    """Unit vectors [DIRECTIONS, 3], and the solid angle in steradians that each stands for."""
    return fibonacci_sphere(DIRECTIONS), 4 * math.pi / DIRECTIONS


def drawn(seen: Tensor) -> Tensor:
    """Rows of the discs that a light is fitted to; seen [M] weights."""
    return torch.multinomial(seen, min(FITTED, len(seen)), generator=torch.Generator().manual_seed(0))


def responses(normals: Tensor, view_dirs: Tensor, visibility: Tensor, material: Tensor, directions: Tensor) -> Tensor:
    """[3, M, n]: radiance of discs towards the camera per unit of flux from each direction; material [M, 5] linear."""
    rough = material[:, 3].clamp_min(MIN_ROUGHNESS)
    f0, diffuse, lobe = albedo_split(material[:, :3], rough, material[:, 4:5], (normals * view_dirs).sum(-1))
    matt = cosines(normals, visibility, directions) / math.pi
    white, grazing = rough_lobes(normals, view_dirs, rough, visibility, directions)
    again = scattered_again(f0, sum(lobe))
    return torch.stack([d * matt + (f * white + (1 - f) * grazing) * s for d, f, s in
                        zip(diffuse.T[..., None], f0.T[..., None], again.T[..., None])])


def shown_under(normals: Tensor, view_dirs: Tensor, visibility: Tensor, material: Tensor, directions: Tensor, flux: Tensor) -> Tensor:
    """Radiance [M, 3] under ``flux`` [n, 3]: the compiled twin of :func:`responses` times flux, for many discs."""
    rough = material[:, 3].clamp_min(MIN_ROUGHNESS)
    f0, diffuse, lobe = albedo_split(material[:, :3], rough, material[:, 4:5], (normals * view_dirs).sum(-1))
    white, grazing = rough_reflection(normals, view_dirs, rough, visibility, directions, flux)
    return diffuse * irradiance(normals, visibility, directions, flux) / math.pi + (f0 * white + (1 - f0) * grazing) * scattered_again(f0, sum(lobe))


def smooth_start(radiance: Tensor, solid_angle: float, one_colour: bool) -> Tensor:
    """Flux [n, 3] to begin with, positive, of a smooth light's radiance [n, 3] from the directions."""
    if one_colour:
        mean = radiance.mean(0)
        radiance = radiance.mean(1, keepdim=True) * (mean / mean.mean().clamp_min(1e-6)).clamp_min(0)
    return torch.maximum(radiance, DARKEST * radiance.mean(0).clamp_min(1e-4)) * solid_angle


def fit_directions(response: Tensor, radiance: Tensor, constant: Tensor, weight: Tensor, start: Tensor, one_colour: bool = False) -> Tensor:
    """Flux [n, 3] that explains ``radiance`` [M, 3] by ``response`` [3, M, n] and a part that is known, ``constant`` [M, 3].

    Multiplicative steps towards the least relative error, robust (a highlight where none should be must not light the rest).
    Args: weight [M]; start [n, 3] flux to begin with, positive; one_colour: the directions keep the start's colours.
    """
    alike = 1.0 if one_colour else ALIKE
    flux = list(start.T)
    for _ in range(ROUNDS):
        steps = torch.stack([_step(*channel, weight) for channel in zip(response, radiance.T, constant.T, flux)])
        steps = torch.lerp(steps, steps.mean(0), alike).exp().clamp(1 / STEP, STEP)
        flux = [f * s for f, s in zip(flux, steps)]
    return torch.stack(flux, -1)


def _step(response: Tensor, wanted: Tensor, known: Tensor, flux: Tensor, weight: Tensor) -> Tensor:
    """Of one channel, logarithm of the factor [n] on its flux [n]; response [M, n], wanted and known [M]."""
    shown = response @ flux + known
    error = ((shown + FLOOR) / (wanted + FLOOR)).log()
    trust = weight / ((wanted + FLOOR) * (shown + FLOOR) * (1 + (error / OUTLIER) ** 2).sqrt())
    more, less = torch.stack([trust * wanted, trust * shown]) @ response
    return ((more + NOTHING) / (less + NOTHING)).log()
