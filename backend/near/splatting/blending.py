"""Compiled kernels of the CPU splatter, second half: the blend, tile by tile and sixteen pixels at a time.

The two innermost operations are explicit vector code. LLVM does not vectorise these loops by itself (it cannot prove that the
arrays are distinct), and they are nearly all of a frame's time. Written as LLVM vectors they stay portable: a machine
without 512-bit registers gets two or four shorter ones.

A kernel takes tiles first, first + step, ..., so that threads can share a frame. They live in one file with what they inline
because numba's cache looks only at the file of the function that is called.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from near.splatting.binning import HALF_A, HALF_C, OPACITY, SIGMA_MAX, SLOPE, TILE, X, Y
from near.splatting.threads import compiled

LANES = TILE
EMPTY = 1e-4  # below this alpha a pixel has no depth
FLOATS = ir.VectorType(ir.FloatType(), LANES)
MASK = ir.IntType(LANES)
FLAGS = ("contract", "nsz", "arcp", "reassoc")  # not "nnan": lanes that are discarded may overflow
# exp(-s) = p(s)^8, p the minimax polynomial of exp(-s / 8) on [0, 5.7]: relative error 2e-6 in float32. Opacities end at 1 and
# contributions at 1/255 = exp(-5.54), so nothing beyond is asked for.
EXP_COEFFICIENTS = (1.0, -1.2499928602745489e-1, 7.810823813948095e-3, -3.2421059852472876e-4, 9.71415811225969e-6, -1.784791349270301e-7)
EXP_END = 5.7


def _spread(builder: ir.IRBuilder, scalar: ir.Value) -> ir.Value:
    """All lanes equal to ``scalar``."""
    first = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, ir.Constant(FLOATS, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))


def _constant(*values: float) -> ir.Constant:
    return ir.Constant(FLOATS, list(values) * (LANES // len(values)))


def _lanes_at(context, builder, array_type, array, offset) -> ir.Value:
    """Pointer to the vector at float ``offset`` of an array."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [offset]), FLOATS.as_pointer())


@intrinsic
def blend_lanes(typing, left_over, offset, weight, centre, base, half_a, opacity, sigma_max, cap, stop, floor):
    """One Gaussian over one row of sixteen pixels with centres at 0, 1, ... 15.

    sigma = base + half_a (i - centre)^2; weight[i] = what the Gaussian adds to pixel i; left_over[offset + i], the transmittance
    (0 = finished), is advanced. Returns uint32; bit i: pixel i received more than ``floor``; bit 16 + i: pixel i is unfinished.
    """
    array = types.Array(types.float32, 1, "C")
    signature = types.uint32(array, types.intp, array, *(types.float32,) * 8)

    def emit(context, builder, _, arguments):
        rest_pointer = _lanes_at(context, builder, array, arguments[0], arguments[1])
        weight_pointer = _lanes_at(context, builder, array, arguments[2], ir.Constant(arguments[1].type, 0))
        centre_, base_, half_a_, opacity_, sigma_max_, cap_, stop_, floor_ = (_spread(builder, a) for a in arguments[3:])

        def mul(a, b):
            return builder.fmul(a, b, flags=FLAGS)

        def add(a, b):
            return builder.fadd(a, b, flags=FLAGS)

        def least(a, b):
            return builder.select(builder.fcmp_ordered("<", a, b), a, b)

        dx = builder.fsub(_constant(*range(LANES)), centre_, flags=FLAGS)
        sigma = add(base_, mul(mul(half_a_, dx), dx))
        s = least(sigma, _constant(EXP_END))
        p = _constant(EXP_COEFFICIENTS[-1])
        for coefficient in EXP_COEFFICIENTS[-2::-1]:
            p = add(mul(p, s), _constant(coefficient))
        for _ in range(3):
            p = mul(p, p)
        zero = _constant(0.0)
        opaque = builder.select(builder.fcmp_ordered("<=", sigma, sigma_max_), least(mul(opacity_, p), cap_), zero)
        before = builder.load(rest_pointer, align=4)
        added = mul(before, opaque)
        after = builder.fsub(before, added, flags=FLAGS)
        unfinished = builder.fcmp_ordered(">", after, stop_)
        added = builder.select(unfinished, added, zero)
        builder.store(builder.select(unfinished, after, zero), rest_pointer, align=4)
        builder.store(added, weight_pointer, align=4)
        word = ir.IntType(32)
        received = builder.zext(builder.bitcast(builder.fcmp_ordered(">", added, floor_), MASK), word)
        going = builder.zext(builder.bitcast(unfinished, MASK), word)
        return builder.or_(received, builder.shl(going, ir.Constant(word, LANES)))

    return signature, emit


@intrinsic
def add_lanes(typing, sums, offset, weight, values, first, count):
    """sums[offset + 16 c + i] += weight[i] * values[first + c] for count values c and sixteen lanes i."""
    array = types.Array(types.float32, 1, "C")
    signature = types.void(array, types.intp, array, array, types.intp, types.intp)

    def emit(context, builder, _, arguments):
        index = arguments[1].type
        lanes = builder.load(_lanes_at(context, builder, array, arguments[2], ir.Constant(index, 0)), align=4)
        data = context.make_array(array)(context, builder, arguments[3]).data
        with cgutils.for_range(builder, arguments[5]) as loop:
            value = _spread(builder, builder.load(builder.gep(data, [builder.add(arguments[4], loop.index)]), align=4))
            offset = builder.add(arguments[1], builder.mul(loop.index, ir.Constant(index, LANES)))
            pointer = _lanes_at(context, builder, array, arguments[0], offset)
            builder.store(builder.fadd(builder.load(pointer, align=4), builder.fmul(lanes, value, flags=FLAGS), flags=FLAGS),
                          pointer, align=4)
        return context.get_dummy_value()

    return signature, emit


@compiled
def whole_lines(count):
    """Uninitialised float32 [count] at the start of a cache line: lanes that straddle two lines cost twice."""
    room = np.empty(count + LANES, np.float32)
    skip = ((64 - (room.ctypes.data & 63)) & 63) // 4
    return room[skip : skip + count]


@compiled
def start_tile(left_over, columns):
    """Full transmittance; pixels beyond the frame are finished from the start."""
    for r in range(TILE):
        for i in range(TILE):
            left_over[r * TILE + i] = np.float32(1.0) if i < columns else np.float32(0.0)


@compiled
def touched_rows(packed, g, x0, y0, rows):
    """Centre of Gaussian g relative to the first pixel centre of a tile, and its first and last row in the tile."""
    gx, gy = packed[g, X] - np.float32(x0 + 0.5), packed[g, Y] - np.float32(y0 + 0.5)
    reach = math.sqrt(packed[g, SIGMA_MAX] / packed[g, HALF_C])
    low, high = max(gy - reach, np.float32(0.0)), min(gy + reach, np.float32(rows - 1))
    return gx, gy, int(math.ceil(low)), int(math.floor(high))


@compiled
def row_section(packed, g, gx, gy, row):
    """Where Gaussian g is highest on a row of a tile, its exponent there, and whether it reaches any of the row's pixels."""
    dy = np.float32(row) - gy
    centre = gx + packed[g, SLOPE] * dy
    base = packed[g, HALF_C] * dy * dy
    off = max(max(-centre, centre - np.float32(TILE - 1)), np.float32(0.0))
    return centre, base, base + packed[g, HALF_A] * off * off <= packed[g, SIGMA_MAX]


@compiled
def blend(first, step, tiles_x, top, starts, entries, packed, values, channels, max_alpha, stop, box, out, alpha, depth):
    """Tiles first, first + step, ... of the tile rows from ``top``: out [H, W, C], alpha [H, W], depth [H, W].

    values: float32 [M (C + 2)], per Gaussian its channels, 1 and its depth. Every output pixel is the mean of box x box
    rasterised ones (box is 1 or 2), its depth the nearest of theirs.
    """
    height, width = alpha.shape[0] * box, alpha.shape[1] * box
    total = channels + 2
    sums = whole_lines(TILE * total * TILE)  # [row, channel, column]
    left_over = whole_lines(TILE * TILE)
    weight = whole_lines(TILE)
    alive = np.empty(TILE, np.bool_)
    cap, limit, nothing = np.float32(max_alpha), np.float32(stop), np.float32(0.0)
    for t in range(first, len(starts) - 1, step):
        y0, x0 = (top + t // tiles_x) * TILE, (t % tiles_x) * TILE
        rows, columns = min(TILE, height - y0), min(TILE, width - x0)
        if starts[t] == starts[t + 1]:
            fill_empty(y0 // box, x0 // box, rows // box, columns // box, out, alpha, depth)
            continue
        sums[:] = 0
        start_tile(left_over, columns)
        alive[:] = True
        unfinished = rows
        for n in range(starts[t], starts[t + 1]):
            g = entries[n]
            gx, gy, r0, r1 = touched_rows(packed, g, x0, y0, rows)
            for r in range(r0, r1 + 1):
                centre, base, reaches = row_section(packed, g, gx, gy, r)
                if not (reaches and alive[r]):
                    continue
                result = blend_lanes(left_over, r * TILE, weight, centre, base, packed[g, HALF_A], packed[g, OPACITY],
                                     packed[g, SIGMA_MAX], cap, limit, nothing)
                if result & np.uint32(0xFFFF):
                    add_lanes(sums, r * total * TILE, weight, values, g * total, total)
                if result < 0x10000:
                    alive[r] = False
                    unfinished -= 1
            if unfinished == 0:
                break
        store_tile(sums, channels, y0, x0, rows, columns, box, out, alpha, depth)


@compiled
def fill_empty(y0, x0, rows, columns, out, alpha, depth):
    """A tile without Gaussians."""
    for y in range(y0, y0 + rows):
        for x in range(x0, x0 + columns):
            for c in range(out.shape[2]):
                out[y, x, c] = 0
            alpha[y, x] = 0
            depth[y, x] = np.inf


@compiled
def store_tile(sums, channels, y0, x0, rows, columns, box, out, alpha, depth):
    """Sums [row, channel, column] of a tile -> box x box means in the frame, pixel by pixel."""
    line = (channels + 2) * TILE
    for r in range(rows):
        opaque, deep = r * line + channels * TILE, r * line + (channels + 1) * TILE
        for i in range(TILE):
            sums[deep + i] = sums[deep + i] / sums[opaque + i] if sums[opaque + i] >= np.float32(EMPTY) else np.float32(np.inf)
    if box == 2:
        for r in range(0, rows, 2):
            for c in range(channels + 2):
                source, target = r * line + c * TILE, r // 2 * line + c * TILE
                for i in range(TILE // 2):
                    a, b = sums[source + 2 * i], sums[source + 2 * i + 1]
                    d, e = sums[source + line + 2 * i], sums[source + line + 2 * i + 1]
                    sums[target + i] = (a + b + d + e) * np.float32(0.25) if c <= channels else min(min(a, b), min(d, e))
    for r in range(rows // box):
        y, x1, at = y0 // box + r, (x0 + columns) // box, r * line
        pixels, opaque, deep = out[y, x0 // box : x1], alpha[y, x0 // box : x1], depth[y, x0 // box : x1]
        for i in range(columns // box):
            opaque[i] = sums[at + channels * TILE + i]
        for i in range(columns // box):
            deep[i] = sums[at + (channels + 1) * TILE + i]
        for i in range(columns // box):
            for c in range(channels):
                pixels[i, c] = sums[at + c * TILE + i]


@compiled
def mark_seen(first, step, tiles_x, top, starts, entries, packed, max_alpha, stop, height, width, floor, seen):
    """seen bool [M] becomes True where a Gaussian contributes more than ``floor`` to a pixel of the tiles first, first + step, ..."""
    left_over = whole_lines(TILE * TILE)
    weight = whole_lines(TILE)
    alive = np.empty(TILE, np.bool_)
    cap, limit, least = np.float32(max_alpha), np.float32(stop), np.float32(floor)
    for t in range(first, len(starts) - 1, step):
        y0, x0 = (top + t // tiles_x) * TILE, (t % tiles_x) * TILE
        rows, columns = min(TILE, height - y0), min(TILE, width - x0)
        start_tile(left_over, columns)
        alive[:] = True
        unfinished = rows
        for n in range(starts[t], starts[t + 1]):
            g = entries[n]
            gx, gy, r0, r1 = touched_rows(packed, g, x0, y0, rows)
            most = np.uint32(0)
            for r in range(r0, r1 + 1):
                centre, base, reaches = row_section(packed, g, gx, gy, r)
                if not (reaches and alive[r]):
                    continue
                result = blend_lanes(left_over, r * TILE, weight, centre, base, packed[g, HALF_A], packed[g, OPACITY],
                                     packed[g, SIGMA_MAX], cap, limit, least)
                most |= result & np.uint32(0xFFFF)
                if result < 0x10000:
                    alive[r] = False
                    unfinished -= 1
            if most:
                seen[g] = True
            if unfinished == 0:
                break


@compiled
def pixel_weights(first, step, tiles_x, top, starts, entries, packed, max_alpha, stop, height, width, counts, cursor, index, weights):
    """The blend of tiles first, first + step, ... as sparse rows: with an empty ``index`` counts every pixel's entries into
    counts int64 [H W], else writes them from cursor int64 [H W], which advances."""
    fill = len(index) > 0
    left_over = whole_lines(TILE * TILE)
    weight = whole_lines(TILE)
    cap, limit, nothing = np.float32(max_alpha), np.float32(stop), np.float32(0.0)
    for t in range(first, len(starts) - 1, step):
        y0, x0 = (top + t // tiles_x) * TILE, (t % tiles_x) * TILE
        rows, columns = min(TILE, height - y0), min(TILE, width - x0)
        start_tile(left_over, columns)
        for n in range(starts[t], starts[t + 1]):
            g = entries[n]
            gx, gy, r0, r1 = touched_rows(packed, g, x0, y0, rows)
            for r in range(r0, r1 + 1):
                centre, base, reaches = row_section(packed, g, gx, gy, r)
                if not reaches:
                    continue
                result = blend_lanes(left_over, r * TILE, weight, centre, base, packed[g, HALF_A], packed[g, OPACITY],
                                     packed[g, SIGMA_MAX], cap, limit, nothing)
                for i in range(columns):
                    if not (result >> np.uint32(i)) & np.uint32(1):
                        continue
                    pixel = (y0 + r) * width + x0 + i
                    if fill:
                        index[cursor[pixel]] = g
                        weights[cursor[pixel]] = weight[i]
                        cursor[pixel] += 1
                    else:
                        counts[pixel] += 1
