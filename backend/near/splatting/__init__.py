"""Gaussian splatting behind one interface: gsplat on CUDA, compiled code on the CPU, plain torch as the oracle of both."""

from __future__ import annotations

import torch
from torch import Tensor

from near.errors import NearError
from near.geometry.cameras import Camera
from near.splatting.cpu import seen_cpu, splat_cpu, weights_cpu
from near.splatting.coverage import trim_coverage
from near.splatting.cuda import gsplat_missing, splat_gsplat
from near.splatting.filters import downsample2
from near.splatting.reference import splat_reference
from near.splatting.types import PUBLISHED, SURFACE, Gaussians, Splat, SplatSettings

__all__ = ["BACKENDS", "PUBLISHED", "SURFACE", "Gaussians", "Splat", "SplatSettings", "downsample2", "gsplat_missing", "splat",
           "splat_weights", "trim_coverage", "visible"]

BACKENDS = ("auto", "reference", "cpu", "gsplat")


def splat(gaussians: Gaussians, channels: Tensor, camera: Camera, settings: SplatSettings = SURFACE, backend: str = "auto",
          supersample: int = 1, kernel: str = "box") -> Splat:
    """Rasterise M Gaussians with C channels each (spec section 7.4).

    Args:
        channels: finite float [M, C], C >= 0; additive quantities. On the device of the Gaussians.
        backend: "reference" (plain torch, differentiable, slow), "cpu" (compiled, float32, no gradients), "gsplat" (CUDA,
            differentiable), or "auto": gsplat for tensors on a GPU where it works, reference where gradients are asked
            for, else cpu.
        supersample: 1 or 2; 2 rasterises at twice the size and filters down (depth: the nearest of four). Equal to
            :func:`downsample2` afterwards, and cheaper.
        kernel: of the filter, see :func:`downsample2`.
    Returns:
        The frame, on the device of the Gaussians.
    Raises:
        NearError: ``gsplat-missing`` when "gsplat" is asked for and cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, must be one of {', '.join(BACKENDS)}")
    if channels.ndim != 2 or len(channels) != len(gaussians):
        raise ValueError(f"channels have shape {tuple(channels.shape)}, expected ({len(gaussians)}, C)")
    if supersample not in (1, 2):
        raise ValueError(f"supersample is {supersample}, must be 1 or 2")
    fine = camera.scaled(supersample) if supersample > 1 else camera
    chosen = choose_backend(gaussians, channels, settings) if backend == "auto" else backend
    if chosen == "cpu":
        fused = supersample == 2 and kernel == "box"
        frame = splat_cpu(gaussians, channels, fine, settings, box=2 if fused else 1)
        frame = _halve(frame, kernel, settings) if supersample == 2 and not fused else frame
        device = gaussians.means.device
        return frame if device.type == "cpu" else Splat(*(t.to(device) for t in (frame.channels, frame.alpha, frame.depth)))
    if chosen == "gsplat":
        if reason := gsplat_missing(settings):
            raise NearError("gsplat-missing", f"The CUDA splatter cannot run: {reason}",
                            "Install the extra near-relight[cuda], or use the backend 'auto', which works without it.")
        frame = splat_gsplat(gaussians, channels, fine, settings)
    else:
        frame = splat_reference(gaussians, channels, fine, settings)
    return _halve(frame, kernel, settings) if supersample == 2 else frame


def choose_backend(gaussians: Gaussians, channels: Tensor, settings: SplatSettings) -> str:
    """What "auto" means for these inputs."""
    if gaussians.means.is_cuda and not gsplat_missing(settings):
        return "gsplat"
    wants_gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (*gaussians.tensors(), channels))
    return "reference" if wants_gradients else "cpu"


def _halve(frame: Splat, kernel: str, settings: SplatSettings) -> Splat:
    channels, alpha = (downsample2(t, kernel, settings.eps2d) for t in (frame.channels, frame.alpha[..., None]))
    d = frame.depth
    nearest = torch.minimum(torch.minimum(d[0::2, 0::2], d[0::2, 1::2]), torch.minimum(d[1::2, 0::2], d[1::2, 1::2]))
    return Splat(channels, alpha[..., 0], nearest)


def splat_weights(gaussians: Gaussians, camera: Camera, settings: SplatSettings = SURFACE) -> tuple[Tensor, Tensor, Tensor]:
    """The blend as a sparse matrix in CSR: channels of pixel p = sum over its entries of weight * values[index].

    With fixed geometry and camera an image is then a sparse product, which trains colours without a splatter.

    Returns:
        indptr int64 [H W + 1], index int32 [nnz], weight float32 [nnz], on the CPU; a pixel's entries go front to back.
    """
    return weights_cpu(gaussians, camera, settings)


def visible(gaussians: Gaussians, camera: Camera, settings: SplatSettings = SURFACE, floor: float = 1e-3) -> Tensor:
    """Which Gaussians contribute more than ``floor`` (transmittance times alpha) to some pixel: bool [M].

    The pixels are the camera's own: for a frame that is supersampled, pass ``camera.scaled(2)``.
    """
    return seen_cpu(gaussians, camera, settings, floor).to(gaussians.means.device)
