"""Sample sheets of held-out objects, as the trainers show them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from near.colour import to_uint8
from near.sheets import contact_sheet

GAIN = 4  # of the differences shown


def comparison(rows: list[tuple[str, dict[str, Tensor]]], title: str) -> np.ndarray:
    """A row per object: display pictures [H, W, 3] in 0..1 by name (the first is the truth, the second the prediction),
    then the absolute difference of these two, ``GAIN`` times. Returns uint8 [H, W, 3]."""
    columns = [*rows[0][1], f"difference x {GAIN}"]
    cells = []
    for _, pictures in rows:
        truth, prediction, *_ = pictures.values()
        cells.append([_pixels(p) for p in (*pictures.values(), (truth - prediction).abs() * GAIN)])
    return contact_sheet(cells, row_titles=[name[:18] for name, _ in rows], column_titles=columns, title=title, cell=(128, 128))


def _pixels(display: Tensor) -> np.ndarray:
    return to_uint8(display.detach().float().cpu().clamp(0, 1)).numpy()


def splatted(matrix, voxel_colours: Tensor, counts: Tensor) -> Tensor:
    """Picture [S, S, 3] of colours per voxel [L, 3]: ``matrix`` [S * S, M] (scipy) splats anchors, ``counts`` [L] per voxel."""
    colours = voxel_colours.detach().float().cpu().repeat_interleave(counts.cpu().long(), 0)
    side = int(matrix.shape[0] ** 0.5)
    return torch.from_numpy(matrix @ colours.numpy()).view(side, side, 3)
