"""From linear light to a photo as a camera saves it: exposure, white balance, lens, noise, view transform, JPEG."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

# View transform and look of Blender's colour configuration, with their shares.
VIEWS = {("AgX", ""): 0.4, ("AgX", "AgX - Medium High Contrast"): 0.1, ("AgX", "AgX - Punchy"): 0.1, ("Filmic", ""): 0.08,
         ("Filmic", "Medium High Contrast"): 0.1, ("Standard", ""): 0.14, ("Khronos PBR Neutral", ""): 0.08}
BACKGROUNDS = {"none": 0.6, "plain": 0.2, "surroundings": 0.2}
GREY = 0.18


@dataclass(frozen=True)
class Capture:
    """How a photo is taken. exposure_ev: on top of the metered exposure; gains: white balance error; read_noise and
    shot_noise: deviation at black, and at radiance 1 after exposure; blur_px; vignette: darkening of the corners."""

    view: str
    look: str
    exposure_ev: float
    gains: tuple[float, float, float]
    read_noise: float
    shot_noise: float
    blur_px: float
    vignette: float
    jpeg_quality: int
    subsampling: int
    background: str


def random_capture(rng: np.random.Generator) -> Capture:
    views = list(VIEWS)
    view, look = views[rng.choice(len(views), p=list(VIEWS.values()))]
    noisy = rng.random() < 0.6
    gains = np.exp(rng.normal(0, 0.05, 3))
    number = lambda x: round(float(x), 4)  # noqa: E731
    return Capture(view, look, number(rng.normal(0.1, 0.55)), tuple(number(g) for g in gains / gains[1]),
                   number(noisy * np.exp(rng.uniform(np.log(5e-4), np.log(6e-3)))), number(noisy * np.exp(rng.uniform(np.log(3e-3), np.log(0.03)))),
                   number(max(rng.normal(0.15, 0.35), 0)), number(rng.uniform(0, 0.35) * (rng.random() < 0.3)), int(rng.integers(55, 98)),
                   int(rng.choice([0, 1, 2])), str(rng.choice(list(BACKGROUNDS), p=list(BACKGROUNDS.values()))))


def take(rng: np.random.Generator, rgba: np.ndarray, surroundings: np.ndarray, how: Capture, colours: Path) -> tuple[bytes, float]:
    """The photo as a JPEG file, and the exposure in stops.

    Args:
        rgba: premultiplied linear Rec.709 [S, S, 4]. surroundings: what the camera sees behind the object, linear [S, S, 3].
        colours: Blender's colour management folder.
    """
    alpha = rgba[..., 3:].clip(0, 1)
    light = rgba[..., :3] + (1 - alpha) * _background(rng, how.background, rgba, surroundings)
    exposure_ev = float(np.log2(GREY / _metered(rgba)) + how.exposure_ev)
    light = light * 2 ** exposure_ev * np.array(how.gains)
    if how.vignette:
        y, x = np.mgrid[-1:1:1j * len(light), -1:1:1j * light.shape[1]]
        light = light * (1 - how.vignette * (x ** 2 + y ** 2) / 2)[..., None]
    if how.blur_px:
        light = gaussian_filter(light, (how.blur_px, how.blur_px, 0))
    light = light + rng.normal(size=light.shape) * np.sqrt(how.read_noise ** 2 + how.shot_noise ** 2 * light.clip(0))
    display = shown(light.clip(0).astype(np.float32), how.view, how.look, colours)
    buffer = io.BytesIO()
    Image.fromarray(np.round(display * 255).astype(np.uint8)).save(buffer, "JPEG", quality=how.jpeg_quality, subsampling=how.subsampling)
    return buffer.getvalue(), exposure_ev


def _metered(rgba: np.ndarray) -> float:
    """What the light meter reads of the object: between its mean and its median, so that a small glint does not black it out."""
    inside = rgba[..., 3] > 0.5
    if not inside.any():
        return GREY
    luminance = rgba[inside][:, :3] @ np.array([0.2126, 0.7152, 0.0722])
    return float(max(np.sqrt(max(np.median(luminance), 1e-4) * min(luminance.mean(), 20 * max(np.median(luminance), 1e-4))), 1e-4))


def _background(rng: np.random.Generator, kind: str, rgba: np.ndarray, surroundings: np.ndarray) -> np.ndarray:
    size = rgba.shape[0]
    if kind == "plain":  # paper, a wall: one tone with a fall-off
        tone = np.exp(rng.uniform(np.log(0.3), np.log(4))) * _metered(rgba) * np.exp(rng.normal(0, 0.12, 3))
        slope = np.linspace(rng.uniform(0.5, 1.2), rng.uniform(0.5, 1.2), size)
        return tone * (slope[:, None, None] if rng.random() < 0.7 else slope[None, :, None])
    if kind == "surroundings":
        sigma = rng.uniform(0.01, 0.08) * size
        return gaussian_filter(surroundings.clip(0, 30), (sigma, sigma, 0))
    return np.zeros((size, size, 3))


@lru_cache(maxsize=16)
def _processor(config: str, view: str, look: str):
    import PyOpenColorIO as ocio

    file = ocio.Config.CreateFromFile(config)
    steps = ocio.GroupTransform()
    if look:
        steps.appendTransform(ocio.LookTransform(src="Linear Rec.709", dst="Linear Rec.709", looks=look))
    steps.appendTransform(ocio.DisplayViewTransform(src="Linear Rec.709", display="sRGB", view=view, looksBypass=True))
    return file.getProcessor(steps).getDefaultCPUProcessor()


def shown(rgb_lin709: np.ndarray, view: str, look: str, colours: Path) -> np.ndarray:
    """Linear Rec.709 [H, W, 3] to display values 0..1 as Blender's view transform ``view`` with ``look`` shows them."""
    flat = np.ascontiguousarray(rgb_lin709, np.float32).reshape(-1, 3).copy()
    _processor(str(colours / "config.ocio"), view, look).applyRGB(flat)
    return np.nan_to_num(flat).clip(0, 1).reshape(rgb_lin709.shape)
