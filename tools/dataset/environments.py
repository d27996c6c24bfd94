"""Random environments of the data engine's own: skies, studios, rooms, nights, plain gradients. Free of rights.

Each is a function of a seed alone: float32 equirectangular map, linear Rec.709, top row +Z (as in `near.lighting`).
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np

HEIGHT = 192
OVERSAMPLE = 2
Draw = Callable[[np.random.Generator, np.ndarray], np.ndarray]


def make_environment(seed: int, height: int = HEIGHT) -> tuple[np.ndarray, str]:
    """An environment [height, 2 * height, 3] and the name of its kind; mean luminance 0.25 to 1.5."""
    rng = np.random.default_rng([seed, 0x11687])
    kind = str(rng.choice(list(KINDS), p=[w for w, _ in KINDS.values()]))
    fine = KINDS[kind][1](rng, _directions(height * OVERSAMPLE))
    rgb = fine.reshape(height, OVERSAMPLE, 2 * height, OVERSAMPLE, 3).mean((1, 3))
    weight = np.sin((np.arange(height) + 0.5) * np.pi / height)[:, None, None]
    mean = float((rgb * weight).sum() / (weight.sum() * rgb.shape[1] * 3))
    return (rgb * np.exp(rng.uniform(np.log(0.25), np.log(1.5))) / max(mean, 1e-6)).astype(np.float32), kind


def _directions(height: int) -> np.ndarray:
    polar = (np.arange(height) + 0.5) * np.pi / height
    azimuth = np.pi - (np.arange(2 * height) + 0.5) * np.pi / height
    sin = np.sin(polar)[:, None]
    return np.stack([sin * np.cos(azimuth), sin * np.sin(azimuth), np.broadcast_to(np.cos(polar)[:, None], (height, 2 * height))], -1)


# -- building blocks ---------------------------------------------------------------------------------------------------


def tint(rng: np.random.Generator, saturation: float) -> np.ndarray:
    """A colour of luminance about 1."""
    rgb = np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, saturation), 1.0))
    return rgb / (rgb @ [0.2126, 0.7152, 0.0722])


def white_point(rng: np.random.Generator) -> np.ndarray:
    """From candle-warm to sky-blue, along the black-body line roughly."""
    t = rng.uniform(-1, 1)
    return np.array([1 + 0.45 * t, 1 + 0.05 * t, 1 - 0.5 * t]).clip(0.15)


def direction(rng: np.random.Generator, low: float, high: float) -> np.ndarray:
    """Unit vector with z uniform in [low, high]."""
    z, a = rng.uniform(low, high), rng.uniform(0, 2 * np.pi)
    r = np.sqrt(max(1 - z * z, 0))
    return np.array([r * np.cos(a), r * np.sin(a), z])


def smooth(low: float, high: float, x: np.ndarray) -> np.ndarray:
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def lobes(rng: np.random.Generator, d: np.ndarray, count: int, sharpness: tuple[float, float]) -> np.ndarray:
    """[H, W] in 0..1: a random smooth pattern on the sphere."""
    total = np.zeros(d.shape[:2])
    for _ in range(count):
        total += rng.uniform(0.3, 1) * np.exp(rng.uniform(*sharpness) * (d @ direction(rng, -1, 1) - 1))
    return total / max(float(total.max()), 1e-9)


def noise(rng: np.random.Generator, d: np.ndarray, octaves: int = 5, frequency: float = 2.0) -> np.ndarray:
    """[H, W] in about 0..1: sums of plane waves of rising frequency."""
    total, amplitude, norm = np.zeros(d.shape[:2]), 1.0, 0.0
    for _ in range(octaves):
        for _ in range(4):
            total += amplitude * np.sin(d @ (direction(rng, -1, 1) * frequency) * np.pi + rng.uniform(0, 2 * np.pi))
        norm += amplitude
        amplitude, frequency = amplitude * 0.55, frequency * 2.0
    return np.clip(0.5 + total / (4 * norm), 0, 1)


def softbox(rng: np.random.Generator, d: np.ndarray, centre: np.ndarray, size: tuple[float, float]) -> np.ndarray:
    """[H, W] in 0..1: a turned rectangle at distance 1, of half-sizes ``size``, with a soft edge."""
    side = np.cross(centre, direction(rng, -1, 1))
    side /= max(np.linalg.norm(side), 1e-6)
    up = np.cross(centre, side)
    facing = d @ centre
    x, y = (np.abs(d @ axis) / np.maximum(facing, 1e-3) / half for axis, half in zip((side, up), size))
    edge = rng.uniform(0.03, 0.3)
    return (facing > 0.05) * (1 - smooth(1 - edge, 1 + edge, x)) * (1 - smooth(1 - edge, 1 + edge, y))


# -- kinds -------------------------------------------------------------------------------------------------------------


def sky(rng: np.random.Generator, d: np.ndarray) -> np.ndarray:
    """Sun at any height and haze, clouds, a ground of some colour."""
    up = d[..., 2]
    zenith, horizon = np.array([0.18, 0.35, 0.8]) * rng.uniform(0.5, 1.3), np.array([0.8, 0.85, 0.95]) * rng.uniform(0.5, 1.2)
    sun = direction(rng, 0.03, 0.95)
    warm = np.array([1.0, 0.55, 0.25]) ** (1.2 * np.exp(-5 * sun[2]))
    haze = np.exp(rng.uniform(3, 25) * (d @ sun - 1))[..., None] * warm * rng.uniform(0.3, 3)
    image = horizon + (zenith - horizon) * smooth(0, 0.7, up)[..., None] + haze
    cover = smooth(*sorted(rng.uniform(0.35, 0.75, 2) + [0, 0.05]), noise(rng, d * [1, 1, 3], 5, 2.5))[..., None]
    image = image * (1 - cover) + cover * (0.9 + 0.4 * haze) * rng.uniform(0.4, 1.0)
    radius = rng.uniform(0.3, 1.5) * np.pi / 180
    disc = smooth(np.cos(radius * 1.5), np.cos(radius), d @ sun)[..., None]
    image += disc * warm * 10 ** rng.uniform(1.5, 4.2) * (1 if rng.random() < 0.75 else 0)
    ground = tint(rng, 0.6) * rng.uniform(0.05, 0.45) * (0.7 + 0.6 * noise(rng, d, 4, 6.0)[..., None])
    return np.where(up[..., None] > 0, image, image * 0 + ground)


def studio(rng: np.random.Generator, d: np.ndarray) -> np.ndarray:
    """A dark or grey surround with one to five lights of different shapes."""
    base = rng.uniform(0.01, 0.25)
    image = base * (tint(rng, 0.15) + 0.8 * smooth(-0.4, 0.9, d[..., 2])[..., None])
    for _ in range(rng.integers(1, 6)):
        centre = direction(rng, -0.2, 1.0)
        shape = softbox(rng, d, centre, tuple(np.exp(rng.uniform(np.log(0.06), np.log(0.9), 2))))
        if rng.random() < 0.35:
            radius = np.exp(rng.uniform(np.log(0.04), np.log(0.6)))
            shape = smooth(np.cos(radius * 1.15), np.cos(radius), d @ centre)
        image = image + shape[..., None] * white_point(rng) * 10 ** rng.uniform(0.0, 1.7)
    return image


def room(rng: np.random.Generator, d: np.ndarray) -> np.ndarray:
    """Inside a box: coloured walls, windows, lamps at the ceiling."""
    half = np.array([rng.uniform(2, 6), rng.uniform(2, 6), rng.uniform(1.2, 2.2)])
    eye = half * rng.uniform(-0.5, 0.5, 3)
    with np.errstate(divide="ignore"):
        t = np.where(d > 0, half - eye, half + eye) / np.maximum(np.abs(d), 1e-6)
    axis = t.argmin(-1)
    hit = eye + d * t.min(-1, keepdims=True)
    wall = axis * 2 + (np.take_along_axis(d, axis[..., None], -1)[..., 0] > 0)
    image = np.zeros(d.shape)
    glow, light = np.zeros(d.shape[:2]), white_point(rng)
    paint = tint(rng, 0.4)
    for face in range(6):
        here = wall == face
        albedo = (paint if face < 4 and rng.random() < 0.7 else tint(rng, 0.5)) * (rng.uniform(0.5, 0.9) if face != 4 else rng.uniform(0.1, 0.5))
        u, v = (hit[..., a] / half[a] for a in range(3) if a != face // 2)
        shade = 0.25 + 0.2 * noise(rng, d, 4, 3.0)
        image = np.where(here[..., None], albedo * shade[..., None], image)
        for _ in range(rng.integers(0, 3) if face != 4 else 0):  # no lamps in the floor
            cu, cv, su, sv = rng.uniform(-0.6, 0.6), rng.uniform(-0.5, 0.5), *np.exp(rng.uniform(np.log(0.05), np.log(0.4), 2))
            pane = here & (np.abs(u - cu) < su) & (np.abs(v - cv) < sv)
            colour = white_point(rng) * 10 ** rng.uniform(0.3, 1.8)
            image = np.where(pane[..., None], colour * (0.7 + 0.6 * noise(rng, d, 3, 4.0))[..., None], image)
            glow += su * sv * float(colour.mean())
    return image * np.where(image.max(-1, keepdims=True) < 1, 0.4 + glow[..., None] * light, 1)


def night(rng: np.random.Generator, d: np.ndarray) -> np.ndarray:
    """Dark, with coloured small lamps, near and far."""
    image = rng.uniform(0.005, 0.04) * (tint(rng, 0.7) + smooth(-0.3, 0.6, d[..., 2])[..., None])
    image = image * (0.5 + noise(rng, d, 5, 3.0))[..., None]
    for _ in range(rng.integers(3, 14)):
        radius = np.exp(rng.uniform(np.log(0.015), np.log(0.2)))
        spot = smooth(np.cos(radius * 1.2), np.cos(radius), d @ direction(rng, -0.15, 0.7))
        image = image + spot[..., None] * tint(rng, 0.9) * 10 ** rng.uniform(0.3, 2.0)
    return image


def gradient(rng: np.random.Generator, d: np.ndarray) -> np.ndarray:
    """Broad coloured light from several sides."""
    image = np.full(d.shape, rng.uniform(0.02, 0.3))
    for _ in range(rng.integers(1, 4)):
        image = image + lobes(rng, d, 2, (1.0, 12.0))[..., None] * tint(rng, 0.7) * rng.uniform(0.3, 3)
    return image


KINDS: dict[str, tuple[float, Draw]] = {"sky": (0.32, sky), "studio": (0.28, studio), "room": (0.2, room), "night": (0.1, night), "gradient": (0.1, gradient)}
