"""The splatter on CUDA: gsplat, where it is installed and its compiled part loads. Differentiable."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from near.geometry.cameras import Camera
from near.splatting.types import Gaussians, Splat, SplatSettings

EMPTY = 1e-4  # below this alpha a pixel has no depth


@cache
def _load_problem() -> str | None:
    """Why gsplat cannot run here, or None. The first call may compile its CUDA code, which takes minutes."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device."
    try:
        import gsplat  # noqa: F401
        from gsplat.cuda._backend import _C
    except Exception as error:  # its build fails in as many ways as there are compilers
        logging.getLogger(__name__).warning("gsplat does not load, splatting on the CPU: %s", error)
        return f"gsplat does not load ({type(error).__name__})."
    if _C is None:
        return "gsplat found no CUDA toolkit to compile its code with."
    return None


def gsplat_missing(settings: SplatSettings | None = None) -> str | None:
    """Why the gsplat backend cannot be used (a sentence), or None where it can.

    Args: settings: constants that gsplat has compiled in must have their default values.
    """
    if settings is not None and replace(settings, eps2d=0.3, antialiased=False) != SplatSettings():
        return "its thresholds are fixed, and the settings ask for others."
    return _load_problem()


def splat_gsplat(gaussians: Gaussians, channels: Tensor, camera: Camera, settings: SplatSettings) -> Splat:
    """See :func:`near.splatting.splat`; the tensors are on a CUDA device."""
    from gsplat import rasterization

    means, quats, scales, opacities = (t.float() for t in gaussians.tensors())
    device = means.device
    # Depth as one more channel of ours: gsplat's own depth modes cannot do without a colour.
    view = camera.cam_from_world.to(device)
    z = means @ view[2, :3] + view[2, 3]
    colours, alpha, _ = rasterization(
        means=means, quats=quats, scales=scales, opacities=opacities.clamp_max(1), colors=torch.cat([channels.float(), z[:, None]], -1),
        viewmats=view[None], Ks=camera.K.to(device)[None], width=camera.width, height=camera.height, near_plane=camera.near,
        far_plane=camera.far, eps2d=settings.eps2d, packed=False, render_mode="RGB",
        rasterize_mode="antialiased" if settings.antialiased else "classic",
        camera_model="ortho" if camera.projection == "orthographic" else "pinhole")
    colours, alpha = colours[0], alpha[0, ..., 0]
    depth = torch.where(alpha >= EMPTY, colours[..., -1] / alpha.clamp_min(1e-10), torch.full_like(alpha, torch.inf))
    return Splat(colours[..., :-1], alpha, depth)
