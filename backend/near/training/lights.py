"""Lights to train under: the environments of a folder, and further ones made of two of them each.

A network that learns from a few dozen lights could come to recognise them, and with them how bright and how warm they are. What is
made of two at a time, at other strengths and contrasts, cannot be recognised, and shows whether any was: heads that learned
from 25 lights alone answered as well under made ones as heads that had learned from those, too.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from near.colour import LUMINANCE
from near.errors import NearError
from near.lighting import (Environment, PrefilteredLight, load_environment, prefilter, resample_equirect, rotation_z, row_solid_angles,
                           texel_directions)

JOINED_SHARE = 0.75        # of the made lights show two environments, the others one
CONTRAST_DEVIATION = 0.2   # of the logarithm of the exponent
CONTRAST_LIMIT = 20.0      # how much brighter a small sun may become
TINT_DEVIATION = 0.07      # of the logarithm, per channel
STRENGTH_STOPS = 0.2


class LightLibrary:
    """Environments of a folder by name, loaded and prefiltered once each, when first asked for; :meth:`invent` adds to them.

    Raises:
        NearError: ``training-lights-missing`` when the folder holds none.
    """

    def __init__(self, folder: Path) -> None:
        self.paths = {p.stem: p for p in sorted(folder.glob("*")) if p.suffix in (".exr", ".hdr")}
        if not self.paths:
            raise NearError("training-lights-missing", f"There are no environment maps (.exr, .hdr) in {folder}.",
                            "Name the folder of the lights that the objects were rendered under.")
        self.invented: list[str] = []
        self._maps: dict[str, Environment] = {}
        self._prefiltered: dict[str, PrefilteredLight] = {}

    def environment(self, name: str) -> Environment:
        """As it lies in its file, or as it was made."""
        if name not in self._maps:
            self._maps[name] = load_environment(self.paths[name], allow_repair=True)
        return self._maps[name]

    def get(self, name: str, rotation_z_rad: float, strength: float) -> tuple[Environment, PrefilteredLight]:
        env = self.environment(name)
        if name not in self._prefiltered:
            self._prefiltered[name] = prefilter(env)
        return Environment(env.rgb_lin709, rotation_z(rotation_z_rad), strength), self._prefiltered[name]

    def brighter_than(self, mean_radiance: float) -> list[str]:
        """Names of the folder's environments of at least this mean luminance over the sphere, sorted.

        Raises:
            NearError: ``training-lights-dim`` when there is none.
        """
        names = sorted(n for n in self.paths if mean_luminance(self.environment(n).rgb_lin709) >= mean_radiance)
        if not names:
            raise NearError("training-lights-dim", f"None of the {len(self.paths)} lights is bright enough for a photo: a mean radiance of "
                            f"{mean_radiance:g} is needed.", "Add environment maps of daylight or of a lit room.")
        return names

    def invent(self, count: int, darkest: float, seed: int) -> None:
        """Add ``count`` made lights (``invented`` names them), of environments of at least the mean luminance ``darkest``.

        Raises:
            NearError: ``training-lights-dim``.
        """
        names, generator = self.brighter_than(darkest), torch.Generator().manual_seed(seed)
        for k in range(count):
            first, second = (self.environment(names[int(torch.randint(len(names), (), generator=generator))]).rgb_lin709 for _ in range(2))
            name = f"invented {k}"
            self._maps[name] = Environment(_joined(_changed(first, generator), _changed(second, generator), generator))
            self.invented.append(name)


def mean_luminance(rgb_lin709: Tensor) -> float:
    """Over the sphere, of an equirectangular map [H, W, 3]."""
    height, width = rgb_lin709.shape[:2]
    return float((rgb_lin709 @ LUMINANCE).double().sum(1) @ row_solid_angles(height, width)) / (4 * math.pi)


def uniform(generator: torch.Generator, low: float = 0.0, high: float = 1.0) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _changed(rgb: Tensor, generator: torch.Generator) -> Tensor:
    """The map [H, W, 3] turned, perhaps mirrored, of other contrast and tint, as bright on average as before."""
    made = rgb.roll(int(torch.randint(rgb.shape[1], (), generator=generator)), 1)
    if uniform(generator) < 0.5:
        made = made.flip(1)
    luminance = (made @ LUMINANCE).clamp_min(1e-4)
    exponent = math.exp(CONTRAST_DEVIATION * float(torch.randn((), generator=generator)))
    made = made * (luminance / luminance.mean()).pow(exponent - 1).clamp_max(CONTRAST_LIMIT)[..., None]
    made = made * (TINT_DEVIATION * torch.randn(3, generator=generator)).exp()
    return made * (mean_luminance(rgb) / max(mean_luminance(made), 1e-6))


def _joined(first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
    """One map [H, W, 3] of two: each on its side of a soft boundary of random direction, or the first alone."""
    strength = 2 ** (STRENGTH_STOPS * float(torch.randn((), generator=generator)))
    if uniform(generator) > JOINED_SHARE:
        return first * strength
    second = resample_equirect(second, *first.shape[:2])
    normal = torch.nn.functional.normalize(torch.randn(3, generator=generator), dim=0)
    side = texel_directions(*first.shape[:2]) @ normal - uniform(generator, -0.5, 0.5)
    return torch.lerp(second, first, torch.sigmoid(side * uniform(generator, 2, 8))[..., None]) * strength
