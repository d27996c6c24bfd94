"""From raw Gaussian attributes to what is splatted: activations and normals (spec sections 5.6 and 6)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from near.models.args import one_of, pick_args, require

SH_DC = 0.28209479177387814  # the constant real spherical harmonic
LR_NAMES = ("_xyz", "_base_color", "_scaling", "_rotation", "_opacity", "_roughness", "_metallic", "_pbr1", "_scaling_view",
            "_rgb", "_shadow", "_hdri1", "_hdri2")


@dataclass(frozen=True)
class RepresentationConfig:
    """How head outputs become Gaussians; the defaults are TRELLIS's.

    Attributes:
        lr: factor of every raw attribute (13 names).
        num_gaussians: per voxel. voxel_size: reach of a Gaussian's offset, in voxels. perturb_offset: start them spread out.
        kernel_3d: smallest standard deviation, added in quadrature. scaling_bias: initial scale. opacity_bias: see `opacity`.
        scaling_activation: "softplus" or "exp".
        opacity: "tanh" = tanh(raw + 2 atanh(opacity_bias)), as published (range -1..1, Gaussians below 1/255 vanish), or
            "sigmoid" = sigmoid(raw + logit(opacity_bias)).
    """

    lr: Mapping[str, float] = field(default_factory=lambda: {n: 0.1 if n == "_rotation" else 1.0 for n in LR_NAMES})
    num_gaussians: int = 32
    voxel_size: float = 1.5
    perturb_offset: bool = True
    kernel_3d: float = 9e-4
    scaling_bias: float = 4e-3
    opacity_bias: float = 0.1
    scaling_activation: str = "softplus"
    opacity: str = "tanh"

    def __post_init__(self) -> None:
        one_of("Gaussians", "scaling_activation", self.scaling_activation, ("softplus", "exp"))
        one_of("Gaussians", "opacity", self.opacity, ("tanh", "sigmoid"))
        require("Gaussians", self.num_gaussians > 0, f"num_gaussians is {self.num_gaussians}")
        missing = [n for n in LR_NAMES if n not in self.lr]
        require("Gaussians", not missing, f"the lr table lacks {', '.join(missing)}")

    @classmethod
    def from_args(cls, args: Mapping[str, Any]) -> "RepresentationConfig":
        """From a published ``representation_config``."""
        renamed = {"kernel_3d" if k == "3d_filter_kernel_size" else k: v for k, v in args.items()}
        known = set(cls.__dataclass_fields__) - {"opacity"}
        return cls(**pick_args("representation_config", renamed, known, ["2d_filter_kernel_size"]))


def offset_perturbation(num_gaussians: int, voxel_size: float) -> Tensor:
    """Initial offsets before the tanh, float32 [G, 3]: atanh((2 hammersley(g) - 1) / voxel_size)."""

    def radical_inverse(i: int, base: int) -> float:
        value, scale = 0.0, 1.0 / base
        while i:
            i, digit = divmod(i, base)
            value, scale = value + digit * scale, scale / base
        return value

    points = [[g / num_gaussians, radical_inverse(g, 2), radical_inverse(g, 3)] for g in range(num_gaussians)]
    return torch.atanh((torch.tensor(points, dtype=torch.float32) * 2 - 1) / voxel_size)


def place(offsets: Tensor, coords_xyz: Tensor, resolution: int, config: RepresentationConfig, perturbation: Tensor) -> Tensor:
    """Positions in the unit cube.

    Args: offsets [n, G, 3] raw, already times lr; coords_xyz int [n, 3]; perturbation [G, 3].
    Returns: [n, G, 3] = voxel centre + tanh(offset) * voxel_size / 2 voxels.
    """
    if config.perturb_offset:
        offsets = offsets + perturbation
    centres = (coords_xyz.float() + 0.5) / resolution
    return centres[:, None] + torch.tanh(offsets) / resolution * 0.5 * config.voxel_size


def activate_scales(raw: Tensor, config: RepresentationConfig) -> Tensor:
    """Standard deviations: sqrt(act(raw + bias)^2 + kernel_3d^2), any shape."""
    if config.scaling_activation == "exp":
        s = torch.exp(raw + math.log(config.scaling_bias))
    else:
        s = F.softplus(raw + (config.scaling_bias + math.log(-math.expm1(-config.scaling_bias))))
    return torch.sqrt(s.square() + config.kernel_3d**2)


def activate_opacity(raw: Tensor, config: RepresentationConfig) -> Tensor:
    """Opacities; see `RepresentationConfig.opacity`."""
    beta = config.opacity_bias
    if config.opacity == "tanh":
        return torch.tanh(raw + math.log((1 + beta) / (1 - beta)))
    return torch.sigmoid(raw + math.log(beta / (1 - beta)))


def activate_rotation(raw: Tensor) -> Tensor:
    """Unit quaternions (w, x, y, z) from raw [..., 4]; raw 0 is the identity."""
    return F.normalize(raw + raw.new_tensor([1.0, 0.0, 0.0, 0.0]), dim=-1)


def activate_base_color(raw: Tensor) -> Tensor:
    """Base colour, not clamped above."""
    return (SH_DC * raw + 0.5).clamp_min(0)


def quaternion_axis(quats: Tensor, axis: Tensor) -> Tensor:
    """Column ``axis`` of the rotation matrix.

    Args: quats [M, 4] unit (w, x, y, z); axis int64 [M] in 0..2. Returns: [M, 3].
    """
    w, x, y, z = quats.unbind(-1)
    columns = torch.stack([
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)], -1),
        torch.stack([2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)], -1),
        torch.stack([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)], -1)], -2)
    return columns.gather(-2, axis[:, None, None].expand(-1, 1, 3)).squeeze(-2)


def facing_normals(scales: Tensor, quats: Tensor, positions: Tensor, camera_position: Tensor) -> Tensor:
    """World normals: the axis of the smallest scale, turned towards the camera (spec section 6.3).

    Args:
        scales [M, 3] activated; quats [M, 4] unit; positions [M, 3] and camera_position [3] or [M, 3] in one frame.
            The published models pass un-shifted unit-cube positions beside a camera in the centred frame.
    """
    normals = quaternion_axis(quats, scales.argmin(-1))
    away = (normals * (camera_position - positions)).sum(-1, keepdim=True) < 0
    return torch.where(away, -normals, normals)


@dataclass(frozen=True)
class GaussianGeometry:
    """Activated attributes of M Gaussians that no light changes, in the centred asset frame.

    unit_positions [M, 3] in the unit cube (means + 0.5); means [M, 3]; quats [M, 4]; opacities [M]; scales [M, 3];
    base_color_lin709 [M, 3]; roughness, metallic, pbr1 [M].
    """

    unit_positions: Tensor
    means: Tensor
    quats: Tensor
    opacities: Tensor
    scales: Tensor
    base_color_lin709: Tensor
    roughness: Tensor
    metallic: Tensor
    pbr1: Tensor

    @classmethod
    def from_raw(cls, raw: Mapping[str, Tensor], config: RepresentationConfig) -> "GaussianGeometry":
        """From raw attributes [n, G, k] (see `near.models.lad`), flattened voxel-major to M = n G rows."""
        flat = {k: v.flatten(0, 1).float() for k, v in raw.items()}
        sigmoid = {k: torch.sigmoid(flat["_" + k][:, 0]) for k in ("roughness", "metallic", "pbr1")}
        return cls(unit_positions=flat["_xyz"], means=flat["_xyz"] - 0.5, quats=activate_rotation(flat["_rotation"]),
                   opacities=activate_opacity(flat["_opacity"][:, 0], config), scales=activate_scales(flat["_scaling"], config),
                   base_color_lin709=activate_base_color(flat["_base_color"]), **sigmoid)

    def normals(self, scales: Tensor, camera_position: Tensor, view_origin: str) -> Tensor:
        """World normals [M, 3] for ``scales`` (base or view pass), with the flip test in the configured frame."""
        at = self.unit_positions if view_origin == "unit_cube" else self.means
        return facing_normals(scales, self.quats, at, camera_position)
