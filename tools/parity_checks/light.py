"""Fixture groups tonemap and hdri_preprocess."""

from __future__ import annotations

from pathlib import Path

import torch

from near.colour import agx_srgb, srgb_encode
from near.lighting import condition_published
from parity_checks import Row, compare, load_group

DISPLAY_TOL = 0.1 / 255
HDRI_TOL = 2e-4  # spec section 16


def check_tonemap(folder: Path) -> list[Row]:
    """The published tone map is `simple_ocio`'s AgX: the same transform as Blender's. Standard is the sRGB curve."""
    t, _ = load_group(folder, "tonemap")
    rows = []
    for view, function in (("AgX", agx_srgb), ("Standard", srgb_encode)):
        for name in ("grey", "rgb"):
            rows.append(compare("tonemap", f"{view}/{name}", function(t[f"in/{name}"]), t[f"out/{view}/{name}"], DISPLAY_TOL))
    return rows


def check_hdri_preprocess(folder: Path) -> list[Row]:
    """Spec sections 8.1-8.4 on the small map; of the full one, which is not part of the fixture, the directions."""
    t, settings = load_group(folder, "hdri_preprocess")
    rows = []
    for degrees in settings["rotations_deg"]:
        ours = condition_published(t["small/in"], degrees * torch.pi / 180)
        rows.append(compare("hdri_preprocess", f"small/rot{degrees}/strided8", ours[:, ::8, ::8], t[f"small/out_strided8/rot{degrees}"], HDRI_TOL))
        rows.append(compare("hdri_preprocess", f"full/rot{degrees}/directions", ours[6:, 3::16, 3::16],
                            t[f"full/out_strided16_offset3/rot{degrees}"][6:], HDRI_TOL))
        rows.append(compare("hdri_preprocess", f"small/rot{degrees}/row255", ours[:, 255], t[f"small/out_row255/rot{degrees}"], HDRI_TOL))
    return rows
