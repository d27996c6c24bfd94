"""Analytic image-based light on surface discs: what the lighting-aware decoder corrects rather than learns.

Diffuse light, and what rough surfaces reflect, is summed over the environment's directional samples through each disc's own
visibility; smooth surfaces reflect by a split-sum look-up in the prefiltered environment; and what a disc cannot see returns
what the object sends itself (:mod:`near.models.exchange`), or its mean radiance, so that metals never reflect black
(`spec/ANALYTIC.md` sections 2, 3 and 6). Everything is linear in the light. Colours are linear Rec.709.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from near.lighting import Environment, PrefilteredLight, brdf_table
from near.models.gather import irradiance, rough_reflection
from near.models.visibility import evaluate_visibility

if TYPE_CHECKING:  # it builds on the discs, which build on this
    from near.models.exchange import Exchange

DIELECTRIC_F0 = 0.04
HIDDEN_SHARE = 0.5  # radiance of a hidden direction, relative to the object's mean (ANALYTIC.md section 2)
RETURNED_SHARE = 0.7  # of what the object would send itself if nothing stood between its patches; chosen on training objects
MIRROR_UP_TO, ROUGH_FROM = 0.2, 0.4  # roughness that reflects by the prefiltered map alone, and by directional samples alone
NUM_CORRECTIONS = 9  # log gains, each RGB: diffuse, specular, hidden light


@dataclass(frozen=True)
class Surface:
    """Attributes of M discs, in the frame the light is given in.

    normals [M, 3] unit shading normals; base_lin709 [M, 3]; roughness, metallic [M]; visibility [M, K] harmonics;
    openness [M] cosine-weighted free share of the upper hemisphere; weight [M] disc areas (for means).
    """

    normals: Tensor
    base_lin709: Tensor
    roughness: Tensor
    metallic: Tensor
    visibility: Tensor
    openness: Tensor
    weight: Tensor

    def __getitem__(self, rows: Tensor) -> "Surface":
        return Surface(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class IncidentLight:
    """What one light does to one surface, whatever the view: irradiance [M, 3] through the visibility, and
    hidden_lin709 [M, 3], the radiance that hidden directions return."""

    irradiance: Tensor
    hidden_lin709: Tensor

    def __getitem__(self, rows: Tensor) -> "IncidentLight":
        return IncidentLight(self.irradiance[rows], self.hidden_lin709[rows])


@dataclass(frozen=True)
class ShadingTerms:
    """Radiance towards the viewer by origin, each [M, 3]; their sum is the uncorrected shade."""

    diffuse: Tensor
    specular: Tensor
    hidden: Tensor

    def combine(self, corrections: Tensor | None = None) -> Tensor:
        """Sum the terms; ``corrections`` [M, 9] are log gains (diffuse RGB, specular RGB, hidden RGB)."""
        if corrections is None:
            return self.diffuse + self.specular + self.hidden
        gains = corrections.clamp(-3, 3).exp()
        return self.diffuse * gains[:, 0:3] + self.specular * gains[:, 3:6] + self.hidden * gains[:, 6:9]


def normal_reflectance(base_lin709: Tensor, metallic: Tensor) -> Tensor:
    """F0 of a base colour and how metallic it is, of shapes that broadcast."""
    return DIELECTRIC_F0 * (1 - metallic) + base_lin709 * metallic


def total_albedo(base_lin709: Tensor, metallic: Tensor) -> Tensor:
    """Share of the light that goes on from a surface, diffuse and specular, up to its lobe; shapes broadcast."""
    return base_lin709 * (1 - metallic) + normal_reflectance(base_lin709, metallic)


def lobe_albedo(n_dot_v: Tensor, roughness: Tensor) -> tuple[Tensor, Tensor]:
    """Directional albedo of GGX, single scatter: F0 * scale + bias, each [M]; their sum is that of F0 = 1."""
    table = brdf_table().to(n_dot_v)
    size = table.shape[0]
    # Shading normals may lean away from the viewer; a small positive cosine keeps Fresnel bounded there.
    cosine = n_dot_v.abs().clamp(1e-3, 1)
    grid = torch.stack([roughness.clamp(0, 1) * 2 - 1, cosine * 2 - 1], -1)[None, None]
    scale, bias = F.grid_sample(table.permute(2, 0, 1)[None], grid * (size - 1) / size, mode="bilinear", padding_mode="border",
                                align_corners=False)[0, :, 0]
    return scale, bias


def tinted_albedo(f0: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Directional albedo [M, 3] of GGX for ``f0`` [M, 3], all scatter, from :func:`lobe_albedo`."""
    return (f0 * scale[:, None] + bias[:, None]) * scattered_again(f0, scale + bias)


def albedo_split(base_lin709: Tensor, roughness: Tensor, metallic: Tensor, n_dot_v: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """How a material [M, 3], [M], [M, 1] shares out light seen at a cosine [M]: F0 [M, 3], diffuse albedo [M, 3], :func:`lobe_albedo`."""
    f0, lobe = normal_reflectance(base_lin709, metallic), lobe_albedo(n_dot_v, roughness)
    dielectric = tinted_albedo(torch.full_like(f0, DIELECTRIC_F0), *lobe)
    return f0, base_lin709 * (1 - metallic) * (1 - dielectric), lobe


def scattered_again(f0: Tensor, single: Tensor) -> Tensor:
    """Factor [M, 3]: energy lost between microfacets comes back tinted by F0 (Turquin's compensation, as Cycles has it).
    ``single`` [M]: single-scatter albedo at F0 = 1."""
    return 1 + f0 * (1 / single.clamp_min(1e-3) - 1)[:, None]


def light_surface(surface: Surface, light: PrefilteredLight, env: Environment, exchange: Exchange | None = None) -> IncidentLight:
    """Everything about a light that does not depend on the view. Without ``exchange`` every hidden direction returns a share of the
    object's mean radiance."""
    directions = light.directions @ env.env_from_world  # rows: world = env_from_world^T @ d
    e = irradiance(surface.normals, surface.visibility, directions, light.flux * env.strength)
    albedo = total_albedo(surface.base_lin709, surface.metallic[:, None])
    weight = surface.weight / surface.weight.sum().clamp_min(1e-12)
    elsewhere = HIDDEN_SHARE * (albedo * e / math.pi * weight[:, None]).sum(0)
    if exchange is None:
        return IncidentLight(e, elsewhere.expand_as(e))
    return IncidentLight(e, RETURNED_SHARE * exchange.received(albedo * e / math.pi, albedo, elsewhere))


def reflection(normals: Tensor, view_dirs: Tensor, roughness: Tensor, visibility: Tensor, lobe: tuple[Tensor, Tensor],
               light: PrefilteredLight, env: Environment) -> tuple[Tensor, Tensor, Tensor]:
    """What discs reflect of a light before their colour is known.

    Args: lobe: :func:`lobe_albedo` of the same view and roughness.
    Returns:
        white, grazing [M, 3]: a disc of reflectance F0 shows F0 * white + (1 - F0) * grazing (times :func:`scattered_again`);
        seen [M]: share of its lobe that the object does not hide.
    """
    n_dot_v = (normals * view_dirs).sum(-1)
    mirror = F.normalize(2 * n_dot_v[:, None] * normals - view_dirs, dim=-1)
    seen = evaluate_visibility(visibility, mirror, blur=roughness.clamp_min(0.03) ** 4)
    scale, bias = lobe
    smooth = light.specular(mirror, roughness, env) * seen[:, None]
    white, grazing = smooth * (scale + bias)[:, None], smooth * bias[:, None]
    share = ((roughness - MIRROR_UP_TO) / (ROUGH_FROM - MIRROR_UP_TO)).clamp(0, 1)
    rows = torch.nonzero(share > 0)[:, 0]
    rough = rough_reflection(normals[rows], view_dirs[rows], roughness[rows], visibility[rows], light.directions @ env.env_from_world,
                             light.flux * env.strength)
    share = share[rows, None]
    return *(a.index_copy(0, rows, torch.lerp(a[rows], b, share)) for a, b in zip((white, grazing), rough)), seen


def shade_terms(surface: Surface, incident: IncidentLight, light: PrefilteredLight, env: Environment,
                view_dirs: Tensor) -> ShadingTerms:
    """Radiance towards the viewer.

    Args: view_dirs [M, 3] unit, from the disc to the camera, in the frame of the surface's normals.
    """
    n_dot_v = (surface.normals * view_dirs).sum(-1)
    f0, diffuse_albedo, lobe = albedo_split(surface.base_lin709, surface.roughness, surface.metallic[:, None], n_dot_v)
    white, grazing, seen = reflection(surface.normals, view_dirs, surface.roughness, surface.visibility, lobe, light, env)
    return ShadingTerms(
        diffuse=diffuse_albedo * incident.irradiance / math.pi,
        specular=(f0 * white + (1 - f0) * grazing) * scattered_again(f0, sum(lobe)),
        hidden=incident.hidden_lin709 * (diffuse_albedo * (1 - surface.openness[:, None]) + tinted_albedo(f0, *lobe) * (1 - seen[:, None])))
