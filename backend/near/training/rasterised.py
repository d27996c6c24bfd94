"""Training through the rasteriser itself, where gsplat runs: the same picture as the prepared sparse matrices give."""

from __future__ import annotations

import torch
from torch import Tensor

from near.geometry.cameras import Camera
from near.models.anchors import AnchorCloud, front_facing
from near.splatting import SURFACE, gsplat_missing, splat
from near.training.cache import SUPERSAMPLE


def rasteriser(device: torch.device) -> str | None:
    """The differentiable splatter to train with on a device: ``gsplat``, or None for the prepared matrices."""
    return "gsplat" if device.type == "cuda" and not gsplat_missing(SURFACE) else None


def rasterised(cloud: AnchorCloud, cam_from_world: Tensor, K: Tensor, size: tuple[int, int], colours: Tensor, backend: str) -> Tensor:
    """Premultiplied colours [H, W, 3] of discs with ``colours`` [M, 3], splatted at twice the size and averaged down.

    Args: size: (width, height) of the picture.
    """
    camera = Camera(cam_from_world=cam_from_world, K=K, width=size[0], height=size[1])
    rows = front_facing(cloud, camera)
    return splat(cloud.gaussians()[rows], colours[rows], camera, SURFACE, backend=backend, supersample=SUPERSAMPLE).channels
