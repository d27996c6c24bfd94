"""Plain data that goes in and out of the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from near.assets import Asset
from near.errors import Cancelled, NearError
from near.geometry.cameras import Camera

Progress = Callable[[str, float, "np.ndarray | None"], None]
CancelCheck = Callable[[], bool]

PASSES = {"color": 4, "alpha": 1, "base_color": 3, "roughness": 1, "metallic": 1, "shadow": 1, "normal": 3, "depth": 1}


@dataclass(frozen=True)
class PlacedAsset:
    """An asset in the scene; ``world_from_asset`` [4, 4] is a rotation, a uniform scale and a translation."""

    asset: Asset
    world_from_asset: Tensor = field(default_factory=lambda: torch.eye(4))

    def __post_init__(self) -> None:
        linear = self.world_from_asset[:3, :3].double()
        scale = torch.linalg.det(linear).abs() ** (1 / 3)
        gram = linear.T @ linear
        if not torch.isfinite(self.world_from_asset).all() or scale < 1e-8:
            raise NearError("transform-invalid", "The asset's transform is not invertible.", "Give it a finite, non-zero scale.")
        if not torch.allclose(gram, torch.eye(3, dtype=torch.float64) * scale ** 2, atol=1e-3 * float(scale) ** 2):
            raise NearError("scale-not-uniform", "The asset is scaled differently along its axes, or sheared.",
                            "Apply a uniform scale to the object: relightable assets keep their proportions.")
        if torch.linalg.det(linear) < 0:
            raise NearError("transform-mirrored", "The asset's transform mirrors it.", "Use a positive scale.")

    @property
    def scale(self) -> float:
        return float(torch.linalg.det(self.world_from_asset[:3, :3].double()) ** (1 / 3))


@dataclass(frozen=True)
class Frame:
    """A rendered frame: ``layers[name]`` is float32 [H, W, C] for the names of :data:`PASSES`.

    color: premultiplied linear Rec.709 RGBA. The others are not premultiplied and 0 where nothing is (depth: +inf);
    normal is in world space, depth is metric z of the camera.
    """

    camera: Camera
    layers: dict[str, Tensor]


def no_progress(stage: str, fraction: float, preview: np.ndarray | None = None) -> None:
    """The default progress sink."""


def check(cancelled: CancelCheck | None) -> None:
    """Raise :class:`near.errors.Cancelled` when the caller has asked to stop."""
    if cancelled is not None and cancelled():
        raise Cancelled()


def check_passes(passes) -> tuple[str, ...]:
    """Validated pass names, in the caller's order.

    Raises:
        NearError: ``pass-unknown``.
    """
    unknown = [p for p in passes if p not in PASSES]
    if unknown or not passes:
        raise NearError("pass-unknown", f"There is no pass named {', '.join(map(repr, unknown)) or '(none given)'}.",
                        f"Choose from {', '.join(PASSES)}.")
    return tuple(dict.fromkeys(passes))
