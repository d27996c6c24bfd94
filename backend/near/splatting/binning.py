"""Compiled kernels of the CPU splatter, first half: projection, depth order, tile lists.

A projected Gaussian is eight floats. With the covariance [[a, b], [b, c]] its exponent is written row by row,
    sigma = HALF_A (x - X - SLOPE (y - Y))^2 + HALF_C (y - Y)^2,   SLOPE = b / c, HALF_A = c / (2 det), HALF_C = 1 / (2 c),
which stays exact for long thin Gaussians and gives the rows and columns they touch without a root.
"""

from __future__ import annotations

import math

import numpy as np

from near.splatting.threads import compiled

TILE = 16
FRUSTUM_MARGIN = 0.3
MAX_EXTENT = 3.33
X, Y, SLOPE, HALF_A, HALF_C, OPACITY, SIGMA_MAX, DEPTH = range(8)
FIELDS = 8
RADIX = 2048


@compiled
def project(start, stop, means, quats, scales, opacities, view, lens, width, height, near, far, perspective, eps2d, antialiased,
            alpha_min, packed, rects, keys):
    """Rows start..stop: packed float32 [M, 8], tile rectangles int32 [M, 4] (x0, x1, y0, y1; empty when not drawn), depth keys uint32 [M].

    view float64 [3, 4]; lens float64 (fx, fy, cx, cy).
    """
    fx, fy, cx, cy = lens[0], lens[1], lens[2], lens[3]
    margin_x, margin_y = FRUSTUM_MARGIN * 0.5 * width / fx, FRUSTUM_MARGIN * 0.5 * height / fy
    low_x, high_x = -(cx / fx + margin_x), (width - cx) / fx + margin_x
    low_y, high_y = -(cy / fy + margin_y), (height - cy) / fy + margin_y
    tiles_x, tiles_y = (width + TILE - 1) // TILE, (height + TILE - 1) // TILE
    bits = np.empty(1, np.float32)
    word = bits.view(np.uint32)
    for i in range(start, stop):
        rects[i, 0] = 0
        rects[i, 1] = 0
        px, py, pz = np.float64(means[i, 0]), np.float64(means[i, 1]), np.float64(means[i, 2])
        x = view[0, 0] * px + view[0, 1] * py + view[0, 2] * pz + view[0, 3]
        y = view[1, 0] * px + view[1, 1] * py + view[1, 2] * pz + view[1, 3]
        z = view[2, 0] * px + view[2, 1] * py + view[2, 2] * pz + view[2, 3]
        if not (z >= near and z <= far):
            continue
        if perspective:
            over_z = 1.0 / z
            tx, ty = x * over_z, y * over_z
            jx, jy = fx * over_z, fy * over_z
            sx = -jx * min(max(tx, low_x), high_x)
            sy = -jy * min(max(ty, low_y), high_y)
            u, v = fx * tx + cx, fy * ty + cy
        else:
            jx, jy, sx, sy = fx, fy, 0.0, 0.0
            u, v = fx * x + cx, fy * y + cy
        # Rows of J R_view, then times the Gaussian's scaled axes: a 2 x 3 factor of the covariance.
        g0, g1, g2 = jx * view[0, 0] + sx * view[2, 0], jx * view[0, 1] + sx * view[2, 1], jx * view[0, 2] + sx * view[2, 2]
        h0, h1, h2 = jy * view[1, 0] + sy * view[2, 0], jy * view[1, 1] + sy * view[2, 1], jy * view[1, 2] + sy * view[2, 2]
        qw, qx, qy, qz = np.float64(quats[i, 0]), np.float64(quats[i, 1]), np.float64(quats[i, 2]), np.float64(quats[i, 3])
        n2 = 2.0 / max(qw * qw + qx * qx + qy * qy + qz * qz, 1e-24)
        s0, s1, s2 = np.float64(scales[i, 0]), np.float64(scales[i, 1]), np.float64(scales[i, 2])
        r00, r01, r02 = 1 - n2 * (qy * qy + qz * qz), n2 * (qx * qy - qw * qz), n2 * (qx * qz + qw * qy)
        r10, r11, r12 = n2 * (qx * qy + qw * qz), 1 - n2 * (qx * qx + qz * qz), n2 * (qy * qz - qw * qx)
        r20, r21, r22 = n2 * (qx * qz - qw * qy), n2 * (qy * qz + qw * qx), 1 - n2 * (qx * qx + qy * qy)
        f0, f1, f2 = (g0 * r00 + g1 * r10 + g2 * r20) * s0, (g0 * r01 + g1 * r11 + g2 * r21) * s1, (g0 * r02 + g1 * r12 + g2 * r22) * s2
        k0, k1, k2 = (h0 * r00 + h1 * r10 + h2 * r20) * s0, (h0 * r01 + h1 * r11 + h2 * r21) * s1, (h0 * r02 + h1 * r12 + h2 * r22) * s2
        a, b, c = f0 * f0 + f1 * f1 + f2 * f2, f0 * k0 + f1 * k1 + f2 * k2, k0 * k0 + k1 * k1 + k2 * k2
        m0, m1, m2 = f1 * k2 - f2 * k1, f2 * k0 - f0 * k2, f0 * k1 - f1 * k0
        before = m0 * m0 + m1 * m1 + m2 * m2
        det = before + eps2d * (a + c + eps2d)
        a += eps2d
        c += eps2d
        opacity = min(np.float64(opacities[i]), 1.0)
        # Far beyond the frame or the size of a world, where float32 would turn into infinities further on.
        if not (det > 0 and a + c < 1e30 and abs(u) < 1e15 and abs(v) < 1e15):
            continue
        if antialiased:
            opacity *= math.sqrt(before / det)
        if not opacity >= alpha_min:
            continue
        sigma_max = math.log(opacity / alpha_min)
        extent = min(MAX_EXTENT, math.sqrt(2.0 * sigma_max))
        rx, ry = math.ceil(extent * math.sqrt(a)), math.ceil(extent * math.sqrt(c))
        if not (u + rx > 0 and u - rx < width and v + ry > 0 and v - ry < height):
            continue
        rects[i, 0] = max(0, math.floor((u - rx) / TILE)) if u > rx else 0
        rects[i, 1] = math.ceil((u + rx) / TILE) if u + rx < width else tiles_x
        rects[i, 2] = max(0, math.floor((v - ry) / TILE)) if v > ry else 0
        rects[i, 3] = math.ceil((v + ry) / TILE) if v + ry < height else tiles_y
        packed[i, X], packed[i, Y] = u, v
        packed[i, SLOPE], packed[i, HALF_A], packed[i, HALF_C] = b / c, 0.5 * c / det, 0.5 / c
        packed[i, OPACITY], packed[i, SIGMA_MAX], packed[i, DEPTH] = opacity, sigma_max, z
        bits[0] = z
        keys[i] = word[0] ^ (np.uint32(0xFFFFFFFF) if z < 0 else np.uint32(0x80000000))


@compiled
def sort_by_depth(rects, keys, order, spare):
    """Indices of the drawn Gaussians, front to back, equal depths in index order, into order int32 [M]; returns their number."""
    count = 0
    histogram = np.zeros((3, RADIX), np.int64)
    for i in range(len(keys)):
        if rects[i, 1] > rects[i, 0]:
            order[count] = i
            count += 1
            histogram[0, keys[i] & 2047] += 1
            histogram[1, (keys[i] >> 11) & 2047] += 1
            histogram[2, keys[i] >> 22] += 1
    swapped = False
    for level in range(3):
        trivial = False
        total = 0
        for bucket in range(RADIX):
            size = histogram[level, bucket]
            trivial |= size == count
            histogram[level, bucket] = total
            total += size
        if trivial:
            continue
        source, target = (spare, order) if swapped else (order, spare)
        shift = np.uint32(11 * level)
        for n in range(count):
            i = source[n]
            bucket = (keys[i] >> shift) & 2047
            target[histogram[level, bucket]] = i
            histogram[level, bucket] += 1
        swapped = not swapped
    if swapped:
        for n in range(count):
            order[n] = spare[n]
    return count


@compiled
def count_tiles(order, count, rects, tiles_x, top, bottom, starts):
    """Prefix sums of the list lengths of tile rows top..bottom, into starts int64 [tiles + 1]."""
    starts[:] = 0
    for n in range(count):
        i = order[n]
        for ty in range(max(rects[i, 2], top), min(rects[i, 3], bottom)):
            row = (ty - top) * tiles_x + 1
            for tx in range(rects[i, 0], rects[i, 1]):
                starts[row + tx] += 1
    for t in range(1, len(starts)):
        starts[t] += starts[t - 1]


@compiled
def fill_tiles(order, count, rects, tiles_x, top, bottom, starts, entries):
    """Tile lists, front to back: entries[starts[t] : starts[t + 1]] are the Gaussians of tile t."""
    cursor = starts[:-1].copy()
    for n in range(count):
        i = order[n]
        for ty in range(max(rects[i, 2], top), min(rects[i, 3], bottom)):
            row = (ty - top) * tiles_x
            for tx in range(rects[i, 0], rects[i, 1]):
                entries[cursor[row + tx]] = i
                cursor[row + tx] += 1
