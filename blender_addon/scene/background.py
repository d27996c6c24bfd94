"""The light as a camera sees it behind everything else: what is in the picture where film is not transparent."""

from __future__ import annotations

import numpy as np

from .. import wire

_BAND = 128       # rows at a time: the directions of a large frame need not all be there at once


def background(rgb: np.ndarray | None, light: wire.LightSpec, camera: wire.CameraSpec, border: tuple[int, ...] = ()) -> np.ndarray:
    """float32 [h, w, 3] linear Rec.709 of the frame or its border.

    Args:
        rgb: the light's map [H, W, 3]; None: `light.uniform_lin709`.
    """
    x0, y0, x1, y1 = border or (0, 0, camera.width, camera.height)
    if rgb is None:
        return np.broadcast_to(np.array(light.uniform_lin709, np.float32) * np.float32(light.strength), (y1 - y0, x1 - x0, 3)).copy()
    out = np.empty((y1 - y0, x1 - x0, 3), np.float32)
    env_from_cam = np.array(light.env_from_world).reshape(3, 3) @ np.array(camera.cam_from_world).reshape(4, 4)[:3, :3].T
    padded = _padded(rgb)
    for top in range(y0, y1, _BAND):
        bottom = min(top + _BAND, y1)
        rays = _rays(camera, x0, x1, top, bottom) @ env_from_cam.T.astype(np.float32)
        out[top - y0:bottom - y0] = _lookup(padded, rays)
    return out * np.float32(light.strength)


def _rays(camera: wire.CameraSpec, x0: int, x1: int, y0: int, y1: int) -> np.ndarray:
    """[rows, columns, 3] viewing directions in the camera's axes; of any length."""
    rays = np.zeros((y1 - y0, x1 - x0, 3), np.float32)
    rays[..., 2] = 1
    if camera.projection == "perspective":
        fx, _, cx, _, fy, cy = camera.K[:6]
        rays[..., 0] = (np.arange(x0, x1) + 0.5 - cx) / fx
        rays[..., 1] = ((np.arange(y0, y1) + 0.5 - cy) / fy)[:, None]
    return rays


def _padded(rgb: np.ndarray) -> np.ndarray:
    """One texel around: the seam goes on at the other side; rows at the poles are repeated."""
    wide = np.concatenate([rgb[:, -1:], rgb, rgb[:, :1]], 1)
    return np.concatenate([wide[:1], wide, wide[-1:]], 0)


def _lookup(padded: np.ndarray, rays: np.ndarray) -> np.ndarray:
    height, width = padded.shape[0] - 2, padded.shape[1] - 2
    x, y, z = rays[..., 0], rays[..., 1], rays[..., 2]
    u = (0.5 - np.arctan2(y, x) / (2 * np.pi)) * width + 0.5
    v = np.arctan2(np.hypot(x, y), z) / np.pi * height + 0.5
    column, row = np.clip(u.astype(np.int32), 0, width), np.clip(v.astype(np.int32), 0, height)
    fx, fy = (u - column)[..., None].astype(np.float32), (v - row)[..., None].astype(np.float32)
    top = padded[row, column] * (1 - fx) + padded[row, column + 1] * fx
    bottom = padded[row + 1, column] * (1 - fx) + padded[row + 1, column + 1] * fx
    return top * (1 - fy) + bottom * fy


def panorama(rgb: np.ndarray | None, light: wire.LightSpec, rows: int) -> np.ndarray:
    """float32 [rows, 2 rows, 3]: the light as the world has it, turned and with its strength."""
    if rgb is None:
        return np.broadcast_to(np.array(light.uniform_lin709, np.float32) * np.float32(light.strength), (rows, 2 * rows, 3)).copy()
    polar = ((np.arange(rows) + 0.5) / rows * np.pi)[:, None]
    azimuth = np.pi - (np.arange(2 * rows) + 0.5) / rows * np.pi
    rays = np.stack([np.sin(polar) * np.cos(azimuth), np.sin(polar) * np.sin(azimuth), np.broadcast_to(np.cos(polar), (rows, 2 * rows))], -1)
    return _lookup(_padded(rgb), rays @ np.array(light.env_from_world).reshape(3, 3).T) * np.float32(light.strength)
