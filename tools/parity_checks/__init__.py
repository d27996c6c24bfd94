"""Checks of a fixture folder against our modules, one function per group.

A module here (models, flows, raster, light, geometry) offers functions ``check_<group>(folder: Path) -> list[Row]``;
`tools/parity.py` finds them. Tolerances are those of `spec/NEAR-SPEC.md` section 16, nowhere looser.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

AREAS = ("models", "flows", "raster", "light", "geometry")


@dataclass(frozen=True)
class Row:
    """One compared tensor: its largest absolute error, the tolerance, and whether it passed."""

    group: str
    tensor: str
    max_abs: float
    tol: float
    ok: bool
    note: str = ""


def load_group(folder: Path, group: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and JSON settings of a group; raises FileNotFoundError when the folder does not hold it."""
    settings = folder / f"{group}.json"
    return load_file(str(folder / f"{group}.safetensors")), json.loads(settings.read_text()) if settings.exists() else {}


def under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below ``prefix/``, without it."""
    return {k[len(prefix) + 1 :]: v for k, v in tensors.items() if k.startswith(prefix + "/")}


def compare(group: str, name: str, ours: Tensor, theirs: Tensor, tol: float, outlier_share: float = 0.0, note: str = "",
            channel_axis: int | None = None) -> Row:
    """Largest absolute difference; a share ``outlier_share`` of the values may exceed the tolerance where a threshold
    decides (rasterisation). ``channel_axis``: count pixels instead, outlying in any channel along that axis. Shapes must
    be equal; NaN fails."""
    if tuple(ours.shape) != tuple(theirs.shape):
        return Row(group, name, float("inf"), tol, False, f"shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}")
    error = (ours.detach().cpu().double() - theirs.detach().cpu().double()).abs()
    if error.numel() == 0:
        return Row(group, name, 0.0, tol, True, note or "empty")
    worst = float(error.max())
    outlying = ~(error <= tol)
    over = float((outlying if channel_axis is None else outlying.any(channel_axis)).double().mean())
    ok = over == 0 if outlier_share == 0 else over <= outlier_share
    if over and ok:
        note = f"{note} {over:.2%} outliers".strip()
    return Row(group, name, worst, tol, ok, note)


def same(group: str, name: str, ok: bool, note: str = "") -> Row:
    """An exact comparison (integers, partitions, keys)."""
    return Row(group, name, 0.0 if ok else float("inf"), 0.0, bool(ok), note)
