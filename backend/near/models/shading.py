"""Analytic image-based light on surface discs: what the lighting-aware decoder corrects rather than learns.

Diffuse light is summed over the environment's directional samples through each disc's own visibility, specular
light is a split-sum look-up in the prefiltered environment, and what a disc cannot see returns the object's own mean
radiance, so that metals never reflect black (`spec/ANALYTIC.md` sections 2, 3 and 6). Everything is linear in the
light. Colours are linear Rec.709.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from near.lighting import Environment, PrefilteredLight, brdf_table
from near.models.harmonics import sh_basis
from near.models.visibility import evaluate_visibility

DIELECTRIC_F0 = 0.04
HIDDEN_SHARE = 0.5  # radiance of a hidden direction, relative to the object's mean (ANALYTIC.md section 2)
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
    hidden_lin709 [3], the radiance that hidden directions return."""

    irradiance: Tensor
    hidden_lin709: Tensor


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


def split_sum(n_dot_v: Tensor, roughness: Tensor, f0: Tensor) -> tuple[Tensor, Tensor]:
    """Directional albedo of GGX with multi-scatter compensation.

    Returns:
        albedo [M, 3] for ``f0`` [M, 3], and the single-scatter albedo at F0 = 1, [M].
    """
    table = brdf_table().to(n_dot_v)
    size = table.shape[0]
    grid = torch.stack([roughness.clamp(0, 1) * 2 - 1, n_dot_v.clamp(0, 1) * 2 - 1], -1)[None, None]
    scale, bias = F.grid_sample(table.permute(2, 0, 1)[None], grid * (size - 1) / size, mode="bilinear", padding_mode="border",
                                align_corners=False)[0, :, 0]
    single = scale + bias
    albedo = f0 * scale[:, None] + bias[:, None]
    # Energy lost between microfacets comes back tinted by F0 (Turquin's compensation, as Cycles has it).
    return albedo * (1 + f0 * (1 / single.clamp_min(1e-3) - 1)[:, None]), single


def irradiance(normals: Tensor, visibility: Tensor | None, directions: Tensor, flux: Tensor, chunk: int = 16384) -> Tensor:
    """Sum of flux * cosine * visibility over the directional samples.

    Args: normals [M, 3]; visibility [M, K] or None; directions [n, 3] unit, same frame; flux [n, 3] radiance * sr.
    """
    if visibility is None:
        return (normals @ directions.T).clamp_min(0) @ flux
    basis = sh_basis(directions, math.isqrt(visibility.shape[1]) - 1)
    return torch.cat([((n @ directions.T).clamp_min(0) * (v @ basis.T).clamp(0, 1)) @ flux
                      for n, v in zip(normals.split(chunk), visibility.split(chunk))])


def light_surface(surface: Surface, light: PrefilteredLight, env: Environment) -> IncidentLight:
    """Everything about a light that does not depend on the view."""
    directions = light.directions @ env.env_from_world  # rows: world = env_from_world^T @ d
    e = irradiance(surface.normals, surface.visibility, directions, light.flux * env.strength)
    f0 = DIELECTRIC_F0 * (1 - surface.metallic[:, None]) + surface.base_lin709 * surface.metallic[:, None]
    albedo = surface.base_lin709 * (1 - surface.metallic[:, None]) + f0
    weight = surface.weight / surface.weight.sum().clamp_min(1e-12)
    mean = (albedo * e / math.pi * weight[:, None]).sum(0)
    return IncidentLight(e, HIDDEN_SHARE * mean)


def shade_terms(surface: Surface, incident: IncidentLight, light: PrefilteredLight, env: Environment,
                view_dirs: Tensor) -> ShadingTerms:
    """Radiance towards the viewer.

    Args: view_dirs [M, 3] unit, from the disc to the camera, in the frame of the surface's normals.
    """
    n = surface.normals
    n_dot_v = (n * view_dirs).sum(-1)
    mirror = F.normalize(2 * n_dot_v[:, None] * n - view_dirs, dim=-1)
    metallic = surface.metallic[:, None]
    f0 = DIELECTRIC_F0 * (1 - metallic) + surface.base_lin709 * metallic
    # Shading normals may lean away from the viewer; a small positive cosine keeps Fresnel bounded there.
    albedo, _ = split_sum(n_dot_v.abs().clamp_min(1e-3), surface.roughness, f0)
    dielectric, _ = split_sum(n_dot_v.abs().clamp_min(1e-3), surface.roughness, torch.full_like(f0, DIELECTRIC_F0))
    diffuse_albedo = surface.base_lin709 * (1 - metallic) * (1 - dielectric)
    alpha = surface.roughness.clamp_min(0.03) ** 2
    seen = evaluate_visibility(surface.visibility, mirror, blur=alpha ** 2)[:, None]
    reflected = light.specular(mirror, surface.roughness, env)
    hidden = incident.hidden_lin709
    return ShadingTerms(
        diffuse=diffuse_albedo * incident.irradiance / math.pi,
        specular=albedo * seen * reflected,
        hidden=hidden * (diffuse_albedo * (1 - surface.openness[:, None]) + albedo * (1 - seen)))
