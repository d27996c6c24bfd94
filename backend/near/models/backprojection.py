"""Radiance of discs whose splat is the photo, rather than the photo read at the discs' centres.

A disc that wears the pixel under its centre is blurred a second time when it is splatted: a photo lifted and splatted back is 34.3 dB
of itself on average, and 37.1 dB after three rounds of this (twelve training objects; carved wood and print gain 5 dB). Each round
multiplies a disc's radiance by what the photo has over the splat where the disc is seen (Richardson and Lucy's way, which keeps
radiance positive and treats dark and bright alike).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from near.colour import agx_inverse
from near.geometry.cameras import Camera
from near.models.anchors import AnchorCloud, front_facing
from near.models.lifting import LiftedPhoto
from near.splatting import SURFACE, splat_weights

ROUNDS = 3
DARK = 2e-3          # radiance that a disc at least has
NOISE_FLOOR = 4e-3   # radiance added to both sides of a ratio, so that noise in the dark is not amplified
RATIO_LIMIT = 4.0    # of one round
SEEN_WEIGHT = 0.02   # pixels that a disc must fill to be corrected
COVERED = (0.2, 0.5)  # coverage by discs, and by the photo's matte, from which a pixel counts


def photo_radiance(cloud: AnchorCloud, lifted: LiftedPhoto, srgb: Tensor, alpha: Tensor, camera: Camera,
                   poll: Callable[[], None] = lambda: None) -> Tensor:
    """Linear Rec.709 radiance [M, 3] of the discs, towards the photo's camera.

    Args:
        lifted: the photo at the discs; discs that it does not see (``seen`` zero) keep what it says of them.
        srgb: [H, W, 3] display colours 0..1; alpha: [H, W]; camera: the photo's, in asset space, of that size.
        poll: called between the rounds; raises to stop (cancellation).
    """
    radiance = agx_inverse(lifted.colour.clamp(0, 1)).clamp_min(DARK).numpy()
    blend = blend_matrix(cloud, camera)
    covered = np.asarray(blend.sum(1))[:, 0]
    matte = alpha.reshape(-1).numpy()
    trust = matte * ((covered > COVERED[0]) & (matte > COVERED[1]))
    back = blend.T.tocsr()
    weight = back @ trust
    rows = (weight > SEEN_WEIGHT) & (lifted.seen.numpy() > 0)
    shown = agx_inverse(srgb.clamp(0, 1)).reshape(-1, 3).numpy() + NOISE_FLOOR
    for _ in range(ROUNDS):
        poll()
        splatted = blend @ radiance / np.maximum(covered, 1e-4)[:, None] + NOISE_FLOOR
        ratio = np.clip(shown / splatted, 1 / RATIO_LIMIT, RATIO_LIMIT)
        factor = back @ (ratio * trust[:, None])
        radiance[rows] *= factor[rows] / weight[rows, None]
    return torch.from_numpy(radiance).clamp_min(DARK)


def blend_matrix(cloud: AnchorCloud, camera: Camera) -> scipy.sparse.csr_matrix:
    """[H W, M] float32: what every disc adds to every pixel of a splat."""
    rows = front_facing(cloud, camera)
    indptr, index, weight = splat_weights(cloud.gaussians()[rows], camera, SURFACE)
    return scipy.sparse.csr_matrix((np.asarray(weight), np.asarray(rows)[np.asarray(index)], np.asarray(indptr)),
                                   shape=(camera.height * camera.width, len(cloud)))
