"""Procedural sample lights made by this project: a studio, a sunset, an overcast day, a street at night.

Each is drawn by casting one ray per (fine) texel from the origin at eye height into a little analytic scene, then
averaged down without losing energy. Deterministic; no data files; free of rights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

from near.errors import NearError
from near.lighting.environment import Environment, environment_from_array
from near.lighting.equirect import resample_equirect, texel_directions

OVERSAMPLE = 2
EYE_HEIGHT = 1.6  # metres


def sample_environment(name: str, height: int = 256) -> Environment:
    """A sample light by name (see :data:`SAMPLES`), [height, 2 * height, 3].

    Raises:
        NearError: ``light-sample-unknown``.
    """
    if name not in SAMPLES:
        raise NearError("light-sample-unknown", f"There is no sample light named {name!r}.", f"Choose one of: {', '.join(SAMPLES)}.")
    return _sample(name, height)


@lru_cache(maxsize=8)
def _sample(name: str, height: int) -> Environment:
    directions = texel_directions(height * OVERSAMPLE, 2 * height * OVERSAMPLE).double().numpy()
    fine = torch.from_numpy(SAMPLES[name](directions).astype(np.float32))
    return environment_from_array(resample_equirect(fine, height, 2 * height))


def studio(d: np.ndarray) -> np.ndarray:
    """A dark studio: large warm-white key, tall cool rim light, overhead bank, a faint fill card, pale sweep floor."""
    up = d[..., 2]
    wall = _mix(rgb(0.020, 0.021, 0.024), rgb(0.055, 0.057, 0.062), _smooth(-0.5, 0.9, up))
    image = _mix(wall, rgb(0.085, 0.082, 0.08), _smooth(-0.02, -0.30, up))
    image = image * (0.75 + 0.5 * _smooth(-1, 1, -d[..., 1]))[..., None]
    image += _softbox(d, yaw=-0.80, pitch=0.55, roll=0.06, width=1.0, height=0.8, radiance=rgb(13.0, 12.1, 11.0))
    image += _softbox(d, yaw=2.35, pitch=0.22, roll=-0.06, width=0.30, height=1.6, radiance=rgb(12.5, 14.5, 17.0))
    image += _softbox(d, yaw=0.20, pitch=1.25, roll=0.0, width=1.1, height=0.30, radiance=rgb(3.4, 3.4, 3.5))
    image += _softbox(d, yaw=1.25, pitch=0.05, roll=0.0, width=0.8, height=1.2, radiance=rgb(0.42, 0.45, 0.50))
    return image


def sunset(d: np.ndarray) -> np.ndarray:
    """A low small sun, warm haze around it, blue zenith, streaky lit clouds, dark meadow."""
    sun = _unit(-0.62, -0.77, 0.115)
    up, toward = d[..., 2], d @ sun
    altitude = np.clip(up, 0, 1)
    sky = _mix(rgb(0.62, 0.40, 0.26), rgb(0.30, 0.36, 0.47), _smooth(0.0, 0.22, altitude))
    sky = _mix(sky, rgb(0.085, 0.16, 0.34), _smooth(0.12, 0.95, altitude))
    near_horizon = np.exp(-altitude / 0.13)[..., None]
    glow = (np.exp((toward - 1) / 0.045)[..., None] * rgb(5.2, 2.5, 0.85) + np.exp((toward - 1) / 0.35)[..., None] * rgb(1.25, 0.58, 0.22))
    sky = sky + glow * (0.35 + 0.65 * near_horizon)
    # Clouds on a plane: streaks that grow towards the horizon, lit from the sun's side.
    height = np.maximum(up, 0.02)
    streaks = _fractal(np.stack([d[..., 0] / height * 0.8, d[..., 1] / height * 2.0, np.full_like(up, 3.7)], -1), 5)
    cover = (_smooth(0.52, 0.74, streaks) * _smooth(0.015, 0.14, up))[..., None] * 0.75
    lit = rgb(0.36, 0.30, 0.33) + np.exp((toward - 1) / 0.25)[..., None] * rgb(3.4, 1.6, 0.75)
    sky = sky * (1 - cover) + lit * cover
    disc = _smooth(math.cos(math.radians(0.62)), math.cos(math.radians(0.45)), toward)[..., None]
    sky = sky + disc * rgb(19000, 9800, 3900)
    ground = _ground_noise(d, 0.9) * rgb(0.115, 0.09, 0.05) * (0.55 + 0.9 * _smooth(-1, 1, toward))[..., None]
    return _mix(ground, sky, _smooth(-0.008, 0.008, up))


def overcast(d: np.ndarray) -> np.ndarray:
    """The CIE overcast sky with soft cloud relief over pale paving."""
    up = d[..., 2]
    height = np.maximum(up, 0.0) + 0.18
    relief = _fractal(np.stack([d[..., 0] / height * 1.1, d[..., 1] / height * 1.1, np.full_like(up, 9.2)], -1), 5)
    level = (1 + 2 * np.clip(up, 0, 1)) / 3 * (0.72 + 0.56 * relief)
    sky = level[..., None] * rgb(1.75, 1.86, 2.02)
    ground = _ground_noise(d, 1.4) * rgb(0.24, 0.23, 0.215)
    haze = np.exp(-np.abs(up) / 0.06)[..., None]
    image = _mix(ground, sky, _smooth(-0.01, 0.01, up))
    return image * (1 - 0.35 * haze) + rgb(0.72, 0.76, 0.80) * 0.35 * haze


def night_street(d: np.ndarray) -> np.ndarray:
    """A street between lit facades: sodium lamps, windows, one cyan and one magenta sign, a deep blue sky."""
    up = d[..., 2]
    stars = _mix(rgb(0.012, 0.014, 0.022), rgb(0.004, 0.007, 0.018), _smooth(0.0, 0.8, up))
    glow = np.exp(-np.clip(up, 0, 1) / 0.25)[..., None] * rgb(0.022, 0.014, 0.010)
    image = stars + glow
    lamps = [np.array([side * 5.0, along, 4.6 - EYE_HEIGHT]) for side in (-1, 1) for along in (-33.0, -21.0, -9.0, 3.0, 15.0, 27.0)]
    for side in (-1, 1):
        image = _facade(image, d, side, lamps)
    image = _asphalt(image, d, lamps)
    for lamp in lamps:
        distance = np.linalg.norm(lamp)
        cosine = d @ (lamp / distance)
        radius = math.atan(0.24 / distance)
        bulb = _smooth(math.cos(radius * 1.25), math.cos(radius * 0.85), cosine)[..., None]
        image = image + bulb * rgb(240, 130, 46) + np.exp((cosine - 1) / (6 * radius * radius))[..., None] * rgb(0.9, 0.48, 0.17)
    return image


SAMPLES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "studio": studio, "sunset": sunset, "overcast": overcast, "night-street": night_street}


def rgb(r: float, g: float, b: float) -> np.ndarray:
    """Linear Rec.709 radiance."""
    return np.array([r, g, b], np.float64)


def _unit(x: float, y: float, z: float) -> np.ndarray:
    v = np.array([x, y, z])
    return v / np.linalg.norm(v)


def _smooth(low: float, high: float, x: np.ndarray) -> np.ndarray:
    """Smooth step from 0 at ``low`` to 1 at ``high`` (which may be the smaller)."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _mix(a: np.ndarray, b: np.ndarray, share: np.ndarray) -> np.ndarray:
    share = share[..., None] if share.ndim == 2 else share
    return a * (1 - share) + b * share


def _softbox(d: np.ndarray, yaw: float, pitch: float, roll: float, width: float, height: float, radiance: np.ndarray) -> np.ndarray:
    """A rectangle at distance 1 facing the origin, brighter in the middle, with a feathered edge. yaw 0 is -Y (the front)."""
    forward = np.array([math.sin(yaw) * math.cos(pitch), -math.cos(yaw) * math.cos(pitch), math.sin(pitch)])
    right = np.array([math.cos(yaw), math.sin(yaw), 0.0])
    above = np.cross(right, forward)
    right, above = math.cos(roll) * right + math.sin(roll) * above, math.cos(roll) * above - math.sin(roll) * right
    depth = d @ forward
    x, y = d @ right / np.maximum(depth, 1e-3) / (width / 2), d @ above / np.maximum(depth, 1e-3) / (height / 2)
    inside = _smooth(1.03, 0.97, np.abs(x)) * _smooth(1.03, 0.97, np.abs(y)) * (depth > 0)
    falloff = 0.55 + 0.45 * np.exp(-(x * x + y * y) * 1.1)
    return (inside * falloff)[..., None] * radiance


def _facade(image: np.ndarray, d: np.ndarray, side: int, lamps: list[np.ndarray]) -> np.ndarray:
    """The house wall at x = 8 * side: plaster lit by the lamps, storeys of windows, some of them lit, one sign."""
    t = 8.0 / np.maximum(side * d[..., 0], 1e-4)
    y, z = t * d[..., 1], t * d[..., 2] + EYE_HEIGHT
    house = np.floor(y / 13.0)
    top = 9.0 + 6.0 * _hash(house, np.full_like(house, side), np.zeros_like(house))
    hit = (side * d[..., 0] > 1e-3) & (z > 0) & (z < top) & (np.abs(y) < 90)
    light = sum(_lamp_on_plane(np.stack([np.full_like(y, 8.0 * side), y, z - EYE_HEIGHT], -1), lamp, np.array([-side, 0.0, 0.0])) for lamp in lamps)
    tint = 0.6 + 0.4 * np.stack([_hash(house, np.full_like(house, side), np.full_like(house, c)) for c in (1, 2, 3)], -1)
    wall = light[..., None] * rgb(1.0, 0.56, 0.22) * 0.16 * tint + 0.004
    column, storey = np.floor(y / 2.1), np.floor(z / 3.0)
    cell_y, cell_z = y / 2.1 - column, z / 3.0 - storey
    pane = (np.abs(cell_y - 0.5) < 0.30) & (np.abs(cell_z - 0.55) < 0.27) & (storey >= 1)
    choice = _hash(column, storey, np.full_like(column, 7 + side))
    warm = rgb(1.35, 0.78, 0.34) * (0.35 + _hash(column, storey, np.full_like(column, 31)))[..., None]
    cool = rgb(0.38, 0.52, 0.74)
    pane_colour = np.where((choice > 0.86)[..., None], cool, np.where((choice > 0.55)[..., None], warm, rgb(0.01, 0.013, 0.02)))
    colour = np.where(pane[..., None], pane_colour, wall)
    shop = (storey == 0) & (np.abs(cell_z - 0.45) < 0.33) & (_hash(np.floor(y / 6.5), np.full_like(y, side), np.full_like(y, 5)) > 0.45)
    colour = np.where((shop & (np.abs(y / 6.5 - np.floor(y / 6.5) - 0.5) < 0.4))[..., None], rgb(1.35, 0.98, 0.6), colour)
    sign = (np.abs(y - (4.5 if side > 0 else -6.0)) < 1.5) & (np.abs(z - 3.55) < 0.38)
    colour = np.where(sign[..., None], rgb(1.2, 15.0, 17.0) if side > 0 else rgb(17.0, 1.1, 10.0), colour)
    return np.where(hit[..., None], colour, image)


def _asphalt(image: np.ndarray, d: np.ndarray, lamps: list[np.ndarray]) -> np.ndarray:
    """The road: pools of lamp light, kerbs, a dashed line."""
    t = EYE_HEIGHT / np.maximum(-d[..., 2], 1e-4)
    x, y = t * d[..., 0], t * d[..., 1]
    hit = (d[..., 2] < -1e-3) & (np.abs(x) < 8.0)
    light = sum(_lamp_on_plane(np.stack([x, y, np.full_like(x, -EYE_HEIGHT)], -1), lamp, np.array([0.0, 0.0, 1.0])) for lamp in lamps)
    grain = 0.7 + 0.6 * _fractal(np.stack([x * 1.7, y * 1.7, np.zeros_like(x)], -1), 3)
    albedo = np.where(np.abs(x) > 3.6, 0.26, 0.11) * grain
    dashed = (np.abs(x) < 0.09) & (np.mod(y, 4.0) < 2.2)
    albedo = np.where(dashed, 0.55, albedo)
    colour = (light * albedo)[..., None] * rgb(1.0, 0.56, 0.22) + albedo[..., None] * rgb(0.02, 0.022, 0.03)
    return np.where(hit[..., None], colour, image)


def _lamp_on_plane(point: np.ndarray, lamp: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Irradiance / pi of a small lamp on a plane (a softened inverse square)."""
    offset = lamp - point
    squared = (offset ** 2).sum(-1) + 0.3
    return np.clip(offset @ normal, 0, None) / squared ** 1.5 * 9.0


def _ground_noise(d: np.ndarray, scale: float) -> np.ndarray:
    """[H, W, 1] mottling of a ground plane, fading to its mean towards the horizon."""
    t = EYE_HEIGHT / np.maximum(-d[..., 2], 0.03)
    noise = _fractal(np.stack([t * d[..., 0] * scale, t * d[..., 1] * scale, np.full_like(t, 1.3)], -1), 4)
    return (1 + (noise - 0.5) * 1.1 * np.exp(-t / 14))[..., None]


def _fractal(p: np.ndarray, octaves: int) -> np.ndarray:
    """Fractal value noise in about [0, 1] at points [..., 3]."""
    total, amplitude = np.zeros(p.shape[:-1]), 0.5
    for octave in range(octaves):
        total += amplitude * _value_noise(p * 2.0 ** octave + 17.0 * octave)
        amplitude *= 0.5
    return total / (1 - 0.5 ** octaves)


def _value_noise(p: np.ndarray) -> np.ndarray:
    cell = np.floor(p)
    f = p - cell
    f = f * f * (3 - 2 * f)
    total = np.zeros(p.shape[:-1])
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod([f[..., a] if corner[a] else 1 - f[..., a] for a in range(3)], axis=0)
        total += weight * _hash(*(cell[..., a] + corner[a] for a in range(3)))
    return total


def _hash(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Uniform [0, 1) by integer lattice point (whole numbers of any sign)."""
    h = x.astype(np.int64) * 73856093 ^ y.astype(np.int64) * 19349663 ^ z.astype(np.int64) * 83492791
    h = (h & 0xFFFFFFFF).astype(np.uint64)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = ((h ^ (h >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    return (h ^ (h >> np.uint64(16))).astype(np.float64) / 2.0 ** 32
