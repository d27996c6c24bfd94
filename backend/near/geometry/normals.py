"""Shading normals of meshes that bring none, and tangent frames from UVs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numba import njit

SMOOTH_ANGLE_RAD = np.pi * 40 / 180  # edges sharper than this stay sharp


def face_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Normals times twice the area, float64 [F, 3]."""
    a, b, c = (vertices[faces[:, k]].astype(np.float64) for k in range(3))
    return np.cross(b - a, c - a)


def flat_normals(vertices: np.ndarray, faces: np.ndarray, extra: Sequence[np.ndarray] = ()):
    """Give every face its own vertices and its own normal (glTF's rule where a file has no normals).

    Returns: vertices [3F, 3], faces [F, 3], normals float32 [3F, 3], ``extra`` arrays per new vertex.
    """
    normals = face_normals(vertices, faces)
    normals /= np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-30)
    corner = faces.reshape(-1)
    return (vertices[corner], np.arange(len(corner)).reshape(-1, 3), np.repeat(normals, 3, axis=0).astype(np.float32),
            tuple(e[corner] for e in extra))


def split_normals(vertices: np.ndarray, faces: np.ndarray, extra: Sequence[np.ndarray] = (), angle_rad: float = SMOOTH_ANGLE_RAD):
    """Smooth normals that keep edges sharper than ``angle_rad``: a corner averages the faces around its position whose
    normals are within that angle of its own face. Positions are welded first, so UV seams do not show.

    Returns: as :func:`flat_normals`; where a vertex's corners agree it is kept once.
    """
    scaled = face_normals(vertices, faces)
    unit = scaled / np.maximum(np.linalg.norm(scaled, axis=-1, keepdims=True), 1e-30)
    place = weld(np.ascontiguousarray(vertices, np.float32))[faces]
    order = np.argsort(place.reshape(-1), kind="stable")
    start = np.searchsorted(place.reshape(-1)[order], np.arange(place.max() + 2))
    corner_normals = _corner_normals(place, order, start, scaled, unit, np.cos(angle_rad))
    # One vertex per distinct (vertex, normal): rounding joins what differs only in the last bits.
    rounded = np.round(corner_normals * 4096).astype(np.float32).reshape(-1, 3)
    corner = faces.reshape(-1)
    group = weld(np.concatenate([corner.astype(np.uint32).view(np.float32)[:, None], rounded], 1))
    first = np.full(group.max() + 1, len(corner), np.int64)
    np.minimum.at(first, group, np.arange(len(corner)))
    return (vertices[corner[first]], group.reshape(-1, 3), corner_normals.reshape(-1, 3)[first].astype(np.float32),
            tuple(e[corner[first]] for e in extra))


@njit(cache=True)
def _corner_normals(place, order, start, scaled, unit, limit):
    out = np.zeros((place.shape[0], 3, 3))
    for f in range(place.shape[0]):
        for c in range(3):
            total = np.zeros(3)
            p = place[f, c]
            # A pole with thousands of faces would cost their square; its normal is the plain average.
            crowded = start[p + 1] - start[p] > 256
            if crowded:
                total[:] = unit[f]
            else:
                for k in range(start[p], start[p + 1]):
                    g = order[k] // 3
                    if unit[f, 0] * unit[g, 0] + unit[f, 1] * unit[g, 1] + unit[f, 2] * unit[g, 2] >= limit:
                        total += scaled[g]
            length = np.sqrt(total[0] ** 2 + total[1] ** 2 + total[2] ** 2)
            out[f, c] = total / length if length > 1e-30 else unit[f]
    return out


def weld(rows: np.ndarray) -> np.ndarray:
    """Group index [N] of bitwise equal float32 rows [N, K] (+0 and -0 count as equal).

    Compared through a 64-bit hash: among ten million rows the chance of one false match is about 1e-6.
    """
    bits = (np.ascontiguousarray(rows, np.float32) + np.float32(0)).view(np.uint32)
    key = np.zeros(len(bits), np.uint64)
    with np.errstate(over="ignore"):
        for column in bits.T:
            key = (key ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
            key ^= key >> np.uint64(29)
            key *= np.uint64(0xBF58476D1CE4E5B9)
            key ^= key >> np.uint64(32)
    return np.unique(key, return_inverse=True)[1].reshape(-1)


def corner_tangents(vertices: np.ndarray, normals: np.ndarray, uv: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Tangent frames from UVs, as MikkTSpace (and so Blender and Cycles) builds them.

    Corners that share position, normal, UV and the UVs' orientation share a tangent: the faces' directions of growing u,
    projected on the plane of the normal and weighted by the corner's angle.

    Args: vertices, normals [V, 3]; uv [V, 2] with v = 0 at the top row; faces [F, 3].
    Returns: float32 [F, 3, 4]: tangent (zero where the UVs are degenerate) and the sign of the bitangent,
    ``bitangent = sign * cross(normal, tangent)``, pointing up in the image.
    """
    p, t = vertices[faces].astype(np.float64), uv[faces].astype(np.float64)
    e1, e2 = p[:, 1] - p[:, 0], p[:, 2] - p[:, 0]
    d1, d2 = t[:, 1] - t[:, 0], t[:, 2] - t[:, 0]
    area = d1[:, 0] * d2[:, 1] - d1[:, 1] * d2[:, 0]
    # In image space v points down: the bitangent is -dP/dv, so a positive area is a mirrored (left-handed) frame.
    sign = np.where(area > 0, -1.0, 1.0)
    along_u = (d2[:, 1:] * e1 - d1[:, 1:] * e2) * np.sign(area)[:, None]
    row = np.concatenate([vertices, normals, uv], 1).astype(np.float32)
    corner = faces.reshape(-1)
    group = weld(np.concatenate([row[corner], np.repeat(sign, 3)[:, None].astype(np.float32)], 1)).reshape(-1, 3)
    total = _sum_tangents(p, normals[faces].astype(np.float64), along_u, group, int(group.max()) + 1)
    length = np.linalg.norm(total, axis=-1, keepdims=True)
    total = np.divide(total, length, out=np.zeros_like(total), where=length > 1e-20)
    return np.concatenate([total[group], np.repeat(sign, 3).reshape(-1, 3, 1)], -1).astype(np.float32)


@njit(cache=True)
def _sum_tangents(p, n, along_u, group, groups):
    total = np.zeros((groups, 3))
    for f in range(p.shape[0]):
        for c in range(3):
            normal = n[f, c]
            tangent = along_u[f] - normal * np.dot(normal, along_u[f])
            length = np.sqrt(np.dot(tangent, tangent))
            a = p[f, (c + 1) % 3] - p[f, c]
            b = p[f, (c + 2) % 3] - p[f, c]
            a = a - normal * np.dot(normal, a)
            b = b - normal * np.dot(normal, b)
            ab = np.sqrt(np.dot(a, a) * np.dot(b, b))
            if length > 1e-30 and ab > 1e-30:
                angle = np.arccos(min(max(np.dot(a, b) / ab, -1.0), 1.0))
                total[group[f, c]] += tangent / length * angle
    return total
