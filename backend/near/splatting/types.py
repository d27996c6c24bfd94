"""What goes in and comes out of the splatter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from near.geometry.cameras import split_similarity


@dataclass(frozen=True, eq=False)
class Gaussians:
    """M Gaussians in world space (or asset space, with ``camera.moved``).

    Attributes:
        means: [M, 3] metres.
        quats: [M, 4] rotation (w, x, y, z), any non-zero length.
        scales: [M, 3] standard deviations along the rotated axes, metres.
        opacities: [M]; above 1 they count as 1, below ``SplatSettings.alpha_min`` the Gaussian vanishes.
    """

    means: Tensor
    quats: Tensor
    scales: Tensor
    opacities: Tensor

    def __post_init__(self) -> None:
        count = len(self.means)
        for name, shape in (("means", (count, 3)), ("quats", (count, 4)), ("scales", (count, 3)), ("opacities", (count,))):
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"Gaussians.{name} has shape {tuple(getattr(self, name).shape)}, expected {shape}")

    def __len__(self) -> int:
        return len(self.means)

    def __getitem__(self, rows: Tensor | slice) -> Gaussians:
        """The Gaussians of some rows (index, mask or slice)."""
        return self._map(lambda t: t[rows])

    def to(self, *args, **kwargs) -> Gaussians:
        """All tensors through ``Tensor.to``."""
        return self._map(lambda t: t.to(*args, **kwargs))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """means, quats, scales, opacities."""
        return self.means, self.quats, self.scales, self.opacities

    def transformed(self, world_from_asset: Tensor) -> Gaussians:
        """These Gaussians, given in asset space, in the world.

        Args: world_from_asset [4, 4]: rotation, uniform positive scale, translation.
        Raises: NearError ``scale-not-uniform``.
        """
        rotation, translation, scale = split_similarity(world_from_asset)
        means = self.means @ (rotation.T * scale).to(self.means) + translation.to(self.means)
        turn = quaternion_from_rotation(rotation).to(self.quats)
        return replace(self, means=means, quats=quaternion_product(turn, self.quats), scales=self.scales * scale)

    @staticmethod
    def concat(parts: Sequence[Gaussians]) -> Gaussians:
        """Several clouds as one, in order."""
        return Gaussians(*(torch.cat(column) for column in zip(*(p.tensors() for p in parts), strict=True)))

    def _map(self, function) -> Gaussians:
        return Gaussians(*(function(t) for t in self.tensors()))


@dataclass(frozen=True)
class SplatSettings:
    """Rasteriser constants; the defaults are gsplat's (spec section 7.4).

    Attributes:
        eps2d: px^2 added to the diagonal of every projected covariance, so that no Gaussian is thinner than a pixel.
        antialiased: lower the opacity of what ``eps2d`` has widened. Right for the published weights, which were trained with
            it; wrong for surfaces, which it makes translucent (ANALYTIC.md section 4).
        alpha_min: contributions below this are skipped. max_alpha: contributions are cut here.
        transmittance_stop: a pixel is finished before the contribution that would bring its transmittance here.
    """

    eps2d: float = 0.3
    antialiased: bool = False
    alpha_min: float = 1 / 255
    transmittance_stop: float = 1e-4
    max_alpha: float = 0.999

    def __post_init__(self) -> None:
        # A smaller alpha_min would reach beyond the 3.33 standard deviations that the tile lists cover.
        if not (self.eps2d >= 0 and 1 / 255 <= self.alpha_min < self.max_alpha < 1 and 0 < self.transmittance_stop < 1):
            raise ValueError(f"{self}: need eps2d >= 0, 1/255 <= alpha_min < max_alpha < 1, 0 < transmittance_stop < 1")


PUBLISHED = SplatSettings(antialiased=True)
SURFACE = SplatSettings(antialiased=False)


@dataclass(frozen=True, eq=False)
class Splat:
    """A rasterised frame.

    Attributes:
        channels: [H, W, C], premultiplied with alpha, on zero.
        alpha: [H, W] in 0..1.
        depth: [H, W] expected camera z of what is seen, +inf where alpha < 1e-4.
    """

    channels: Tensor
    alpha: Tensor
    depth: Tensor


def quaternion_from_rotation(rotation: Tensor) -> Tensor:
    """(w, x, y, z), float64 [4], of a rotation matrix [3, 3]: the best conditioned of the four formulas."""
    r = rotation.double()
    squares = torch.cat([r.trace()[None], 2 * r.diagonal() - r.trace()])  # 4 q_i^2 - 1
    wx, wy, wz = r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]
    xy, xz, yz = r[0, 1] + r[1, 0], r[0, 2] + r[2, 0], r[1, 2] + r[2, 1]
    products = torch.stack([wx, wy, wz, wx, xy, xz, wy, xy, yz, wz, xz, yz]).view(4, 3)
    best = int(squares.argmax())
    q = torch.cat([products[best, :best], 1 + squares[best : best + 1], products[best, best:]])
    return q / q.norm()


def quaternion_product(a: Tensor, b: Tensor) -> Tensor:
    """Rotation b first, then a: a [4] or [..., 4], b [..., 4], (w, x, y, z)."""
    aw, ax, ay, az = a.unbind(-1)
    bw, bx, by, bz = b.unbind(-1)
    return torch.stack([aw * bw - ax * bx - ay * by - az * bz, aw * bx + ax * bw + ay * bz - az * by,
                        aw * by - ax * bz + ay * bw + az * bx, aw * bz + ax * by - ay * bx + az * bw], -1)


def rotation_from_quaternion(quats: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] of quaternions [..., 4] (w, x, y, z) of any non-zero length."""
    w, x, y, z = torch.nn.functional.normalize(quats, dim=-1).unbind(-1)
    return torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
                        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
                        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)], -1).unflatten(-1, (3, 3))
