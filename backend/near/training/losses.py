"""Image losses of the renderer's training (paper supplement; spec section 15)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from near.colour import agx_srgb


def gaussian_window(size: int = 11, sigma: float = 1.5) -> Tensor:
    """1-D window of SSIM, summing to one."""
    x = torch.arange(size) - size // 2
    w = torch.exp(-x.float() ** 2 / (2 * sigma ** 2))
    return w / w.sum()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Mean structural similarity of images [3, H, W] in 0..1 (11-pixel Gaussian window), differentiable."""
    w = gaussian_window().to(a)
    channels = a.shape[0]

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(x[None], w.view(1, 1, -1, 1).expand(channels, 1, -1, 1), padding=(5, 0), groups=channels)
        return F.conv2d(x, w.view(1, 1, 1, -1).expand(channels, 1, 1, -1), padding=(0, 5), groups=channels)[0]

    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    return (((2 * ma * mb + c1) * (2 * cov + c2)) / ((ma * ma + mb * mb + c1) * (va + vb + c2))).mean()


def multiscale_gradient(a: Tensor, b: Tensor, scales: int = 3) -> Tensor:
    """The stated substitute for LPIPS, whose weights need a download: L1 of image gradients over a pyramid."""
    total = a.new_zeros(())
    for _ in range(scales):
        for axis in (1, 2):
            total = total + (a.diff(dim=axis) - b.diff(dim=axis)).abs().mean()
        a, b = F.avg_pool2d(a[None], 2)[0], F.avg_pool2d(b[None], 2)[0]
    return total / scales


@lru_cache(maxsize=1)
def perceptual_loss() -> tuple[str, Callable[[Tensor, Tensor], Tensor]]:
    """(name, differentiable function of two [3, H, W] in 0..1): LPIPS where package and weights are on this machine, else the
    substitute. Nothing is downloaded."""
    if list((Path(torch.hub.get_dir()) / "checkpoints").glob("vgg16-*.pth")):
        try:
            import lpips

            network = lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False)
            return "LPIPS (VGG)", lambda a, b: network.to(a.device)(a[None] * 2 - 1, b[None] * 2 - 1).mean()
        except ImportError:
            pass
    return "image gradients over a pyramid (substitute: the LPIPS weights are not on this machine)", multiscale_gradient


def image_loss(predicted: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Log-L1 + 0.2 (1 - SSIM) + 0.2 perceptual on AgX, the last two over the frame, the first within the mask.

    The published terms on volume, opacity and shadow have nothing to act on here: the discs' geometry is given, and what
    shadows them is computed.

    Args: predicted, target: premultiplied linear Rec.709 [H, W, 3]; mask: coverage [H, W].
    """
    share = mask.mean().clamp_min(1e-3)
    log_l1 = ((torch.log1p(predicted.clamp_min(0)) - torch.log1p(target)).abs().mean(-1) * mask).mean() / share
    shown, wanted = agx_srgb(predicted.clamp_min(0)), agx_srgb(target)
    agx_l1 = ((shown - wanted).abs().mean(-1) * mask).mean() / share
    a, b = shown.permute(2, 0, 1), wanted.permute(2, 0, 1)
    structure, perceptual = 1 - ssim(a, b), perceptual_loss()[1](a, b)
    mse = (((shown - wanted) ** 2).mean(-1) * (mask > 0.5)).sum() / (mask > 0.5).sum().clamp_min(1)
    psnr = float(-10 * torch.log10(mse.detach().clamp_min(1e-8)))
    return log_l1 + 2 * agx_l1 + 0.2 * structure / share + 0.2 * perceptual / share, {"psnr_mask": psnr, "log_l1": float(log_l1.detach())}
