"""Fixture groups of the geometry front end: voxelize, image_preprocess."""

from __future__ import annotations

from pathlib import Path

import torch

from near.geometry.photo import Photo, square_crop
from near.geometry.voxels import published_voxels
from parity_checks import Row, compare, load_group, same


def check_voxelize(folder: Path) -> list[Row]:
    """The same set of voxels as Open3D's."""
    tensors, settings = load_group(folder, "voxelize")
    ours = published_voxels(tensors["in/vertices_y_up"], tensors["in/faces"], int(settings.get("resolution", 64)))
    theirs = tensors["out/coords_sorted"][:, 1:]
    first = {tuple(c) for c in tensors["out/coords_open3d_order_first64"][:, 1:].tolist()}
    return [same("voxelize", "coords", torch.equal(ours, theirs), f"{len(ours)} voxels, expected {len(theirs)}"),
            same("voxelize", "open3d_first64", first <= set(map(tuple, ours.tolist())))]


def check_image_preprocess(folder: Path) -> list[Row]:
    """Crop and Lanczos resize and compositing on black, to the last bit."""
    tensors, settings = load_group(folder, "image_preprocess")
    rgba = tensors["in/rgba"].float() / 255
    ours = square_crop(Photo(rgba[..., :3].contiguous(), rgba[..., 3].contiguous()), settings["out_size"][0])
    black = ours[..., :3] * ours[..., 3:] * 255
    rows = [same("image_preprocess", "size", list(ours.shape) == list(settings["out_size"])),
            compare("image_preprocess", "rgba", (ours * 255).round()[::7, ::7], tensors["out/rgba_strided7"].float(), 0.0)]
    # The original truncates to 8 bits here; ours goes on in floating point (1e-3 covers its rounding).
    rows.append(compare("image_preprocess", "black_matte", (black + 1e-3).floor()[::7, ::7], tensors["out/black_matte_strided7"].float(), 0.0))
    return rows
