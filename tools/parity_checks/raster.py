"""Cameras, and the published renderer: projection, both passes, what follows rasterisation."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from parity_checks import Row, compare, load_group, same
from torch import Tensor

from near.geometry.cameras import Camera, published_orbit, published_spiral, sphere_hammersley
from near.splatting import PUBLISHED, Gaussians, splat
from near.splatting.reference import project

TOL_CAMERA = 2e-6
TOL_PROJECTION = 2e-5
TOL_RASTER = 2e-3
OUTLIERS = 0.005  # share of pixels where a threshold falls the other way
BACKENDS = ("reference", "cpu")


def check_camera(folder: Path) -> list[Row]:
    group = "camera"
    tensors, _ = load_group(folder, group)
    orbit = [published_orbit(math.radians(y), math.radians(p), r, math.radians(f))
             for y, p, r, f in tensors["yaw_pitch_r_fov_deg"].tolist()]
    spiral = published_spiral(len(tensors["spiral8_extrinsics"]))
    count = len(tensors["hammersley10_yaw_pitch"])
    hammersley = torch.tensor([sphere_hammersley(i, count) for i in range(count)], dtype=torch.float64)
    return [compare(group, "extrinsics", torch.stack([c.cam_from_world for c in orbit]), tensors["extrinsics"], TOL_CAMERA),
            compare(group, "intrinsics", normalised_intrinsics(orbit), tensors["intrinsics"], TOL_CAMERA),
            compare(group, "spiral8_extrinsics", torch.stack([c.cam_from_world for c in spiral]), tensors["spiral8_extrinsics"],
                    TOL_CAMERA),
            compare(group, "spiral8_intrinsics", normalised_intrinsics(spiral), tensors["spiral8_intrinsics"], TOL_CAMERA),
            compare(group, "hammersley10_yaw_pitch", hammersley, tensors["hammersley10_yaw_pitch"], 1e-9)]


def normalised_intrinsics(cameras: list[Camera]) -> Tensor:
    """K over the frame size, as the published code keeps it: [n, 3, 3]."""
    return torch.stack([c.K / torch.tensor([[c.width], [c.height], [1.0]]) for c in cameras])


@torch.no_grad()
def check_render(folder: Path) -> list[Row]:
    """Rasterisation of the captured inputs of the official rasteriser, by every backend (from raw attributes: models.py)."""
    group = "render"
    tensors, settings = load_group(folder, group)
    rows = []
    for n, name in sorted({m.groups() for k in tensors if (m := re.match(r"raster(\d+)/(\w+)/", k))}):
        part = {k.split("/")[-1]: v for k, v in tensors.items() if k.startswith(f"raster{n}/{name}/")}
        size = settings["resolution"]
        camera = Camera(part["viewmats"][0], part["Ks"][0], size, size, near=settings["near"], far=settings["far"])
        gaussians = Gaussians(part["means"], part["quats"], part["scales"], part["opacities"])
        rows += projection_rows(group, f"raster{n}/{name}", gaussians, camera, part)
        for backend in BACKENDS:
            frame = splat(gaussians, part["colors"], camera, PUBLISHED, backend)
            depth = torch.where(torch.isinf(frame.depth), 0.0, frame.depth)
            expected = pass_outputs(tensors, n, name, part)
            ours = pass_layers(frame.channels, frame.alpha, depth, name)
            rows += [compare(group, f"raster{n}/{name}/{key}", ours[key], value, TOL_RASTER, OUTLIERS, backend)
                     for key, value in expected.items()]
    return rows


def projection_rows(group: str, name: str, gaussians: Gaussians, camera: Camera, part: dict[str, Tensor]) -> list[Row]:
    projected, valid = project(gaussians, camera, PUBLISHED), part["proj_valid"][0]
    rows = [same(group, f"{name}/proj_valid", torch.equal(projected.valid, valid))]
    for key in ("means2d", "conics", "depths", "compensations", "opacities"):
        rows.append(compare(group, f"{name}/proj_{key}", getattr(projected, key)[valid], part[f"proj_{key}"][0][valid], TOL_PROJECTION))
    return rows


BASE_LAYOUT = {"base_color": 3, "metallic": 1, "roughness": 1, "pbr1": 1, "normal": 3}
VIEW_LAYOUT = {"color": 3, "shadow": 1, "brightness": 1, "nush1": 1, "hdri1": 1, "hdri2": 1, "normal_view": 3}


def pass_layers(channels: Tensor, alpha: Tensor, depth: Tensor, name: str) -> dict[str, Tensor]:
    """Rasterised channels [H, W, C] of a pass by output name, [c, H, W]; normals turned to OpenGL axes."""
    layout = BASE_LAYOUT if name == "base" else VIEW_LAYOUT
    layers = dict(zip(layout, channels.permute(2, 0, 1).split(list(layout.values())), strict=True))
    suffix = "" if name == "base" else "_view"
    normal = "normal" + suffix
    layers[normal] = layers[normal] * torch.tensor([1.0, -1.0, -1.0])[:, None, None]
    return layers | {"alpha" + suffix: alpha[None], "depth" + suffix: depth[None]}


def pass_outputs(tensors: dict[str, Tensor], n: str, name: str, part: dict[str, Tensor]) -> dict[str, Tensor]:
    """The official outputs of a pass, [c, H, W]."""
    wanted = pass_layers(part["colors"].new_zeros(1, 1, part["colors"].shape[1]), torch.zeros(1, 1), torch.zeros(1, 1), name)
    return {key: tensors[f"out{n}/{key}"] for key in wanted if f"out{n}/{key}" in tensors}
