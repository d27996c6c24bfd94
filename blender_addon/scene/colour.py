"""The file's working space against linear Rec.709, in which everything on the wire is (DESIGN section 4)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

# CIE xy of red, green, blue and white, by a word in the name of the working space. Up to Blender 4.5 it is always Rec.709.
PRIMARIES = {
    "rec.709": ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), (0.3127, 0.3290)),
    "rec.2020": ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), (0.3127, 0.3290)),
    "acescg": ((0.713, 0.293), (0.165, 0.830), (0.128, 0.044), (0.32168, 0.33767)),
}
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def working_space() -> str:
    """Name of the open file's working space; "Linear Rec.709" where Blender knows no other."""
    import bpy

    return getattr(getattr(bpy.data, "colorspace", None), "working_space", "Linear Rec.709")


def _xyz(x: float, y: float) -> np.ndarray:
    return np.array([x / y, 1.0, (1 - x - y) / y])


def _xyz_from_rgb(name: str) -> np.ndarray:
    """[3, 3], adapted to D65 by Bradford's method."""
    red, green, blue, white = (_xyz(*xy) for xy in PRIMARIES[name])
    basis = np.stack([red, green, blue], 1)
    matrix = basis * np.linalg.solve(basis, white)
    cone_from, cone_to = BRADFORD @ white, BRADFORD @ _xyz(*PRIMARIES["rec.709"][3])
    return np.linalg.inv(BRADFORD) @ np.diag(cone_to / cone_from) @ BRADFORD @ matrix


@lru_cache(maxsize=8)
def lin709_from(space: str) -> np.ndarray | None:
    """[3, 3] float32 from a working space to linear Rec.709; None when they are the same (or the name is not known)."""
    name = next((key for key in PRIMARIES if key in space.lower()), "rec.709")
    if name == "rec.709":
        return None
    return (np.linalg.inv(_xyz_from_rgb("rec.709")) @ _xyz_from_rgb(name)).astype(np.float32)


def to_lin709(rgb: np.ndarray, space: str) -> np.ndarray:
    """[..., 3] of the working space -> linear Rec.709, never below zero (a light has no negative colours)."""
    matrix = lin709_from(space)
    return rgb if matrix is None else np.maximum(rgb @ matrix.T, 0)


def from_lin709(rgb: np.ndarray, space: str) -> np.ndarray:
    """[..., 3 or 4] linear Rec.709 (alpha is left alone) -> the working space."""
    matrix = lin709_from(space)
    if matrix is None:
        return rgb
    out = rgb.copy()
    out[..., :3] = rgb[..., :3] @ np.linalg.inv(matrix).T
    return out
