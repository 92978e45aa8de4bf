"""What is done to a view after its colour, where it was drawn: equalise, blur, sharpen, noise, JPEG. Compiled, on float32 (3, height, width).

Each is defined in reference.py under the same name. Every compiled function that another calls lies in this file, since numba caches by file.
"""

from __future__ import annotations

import math
from typing import no_type_check

import numpy as np
from jaxtyping import Bool, Float32
from numba import njit

from attar.stages.augment.plan import Plan
from attar.stages.augment.reference import REACH, TO_RGB, TO_YCC, dct_matrix, quantisers
from attar.stages.augment.words import add32, exponent, mantissa, scramble, upper24, xor32

OPTIONS = {"nogil": True, "cache": True, "fastmath": True, "error_model": "numpy"}
TILE = 32
"""Columns of what `jpeg` transforms at once."""
PLAIN = np.tile(np.arange(256, dtype=np.uint8), (3, 1))
DCT = dct_matrix().astype(np.float32)
_YCC, _RGB = TO_YCC.astype(np.float32), TO_RGB.astype(np.float32)
SINE = np.array([-1.0 / 39916800, 1.0 / 362880, -1.0 / 5040, 1.0 / 120, -1.0 / 6, 1.0])  # Taylor: 6e-8 at a quarter turn
LOGARITHM = np.array([7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
                      2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1])  # fmt: skip  # logf of Cephes, on sqrt(1/2) … sqrt(2)


def needed(plan: Plan) -> Bool[np.ndarray, " n"]:
    """Which views have any of these."""
    return plan.equalise | (plan.blur > 0) | (plan.sharpen > 0) | (plan.noise > 0) | (plan.jpeg > 0)


def alter(whole: Float32[np.ndarray, "3 height width"], spare: Float32[np.ndarray, "height width"], plan: Plan, view: int) -> None:
    """One view's values, in place and in the order of a plan; `spare` is written over."""
    if plan.equalise[view]:
        table = plan.tables[plan.table[view]] if plan.table[view] >= 0 else PLAIN
        equalise(whole, np.ascontiguousarray(table))
    if plan.blur[view] > 0:
        kernel = gaussian_kernel(float(plan.blur[view]))
        blur(whole, spare, kernel, np.float32(-1))
    if plan.sharpen[view] > 0:
        blur(whole, spare, UNIT, np.float32(plan.sharpen[view]))
    if plan.noise[view] > 0:
        add_noise(whole, np.uint32(plan.seed[view]), np.float32(plan.noise[view]))
    if plan.jpeg[view] > 0:
        jpeg(whole, quantisers(int(plan.jpeg[view])).astype(np.float32))


def gaussian_kernel(sigma: float) -> Float32[np.ndarray, " taps"]:
    """The upper half of the kernel, from its centre on; a zero behind it where it has one tap beside the centre, since taps are added two or three at once."""
    reach = math.ceil(REACH * np.float32(sigma))
    taps = [math.exp(-0.5 * (place / sigma) ** 2) for place in range(reach + 1)]  # so few that arrays would take longer
    total = taps[0] + 2 * sum(taps[1:])
    return np.array([*(tap / total for tap in taps), *[0.0] * (reach == 1)], np.float32)


UNIT = gaussian_kernel(1.0)


@njit(**OPTIONS)
@no_type_check
def equalise(whole, table):
    """reference.equalise, and a table of levels after it."""
    _, height, width = whole.shape
    count, values, levels = np.empty((4, 256), np.int64), np.empty(256, np.float32), np.empty((height, width), np.uint8)
    for c in range(3):
        count[:] = 0
        for y in range(height):
            row, level = whole[c, y], levels[y]
            for x in range(width):
                level[x] = np.uint8(np.int32(np.float32(255) * row[x] + np.float32(0.5)))
            for x in range(width):  # four counts: equal levels follow each other, and an addition must wait for the one before
                count[x & 3, level[x]] += 1
        above, first, rest = 0, 0, 0
        for value in range(256):
            above += count[0, value] + count[1, value] + count[2, value] + count[3, value]
            if first == 0:
                first, rest = above, height * width - above
            equal = (510 * (above - first) + rest) // (2 * rest) if rest > 0 else value
            values[value] = np.float32(table[c, equal]) / np.float32(255)
        for y in range(height):
            row, level = whole[c, y], levels[y]
            for x in range(width):
                row[x] = values[level[x]]


@njit(**OPTIONS)
@no_type_check
def _mirrored(index, count):
    """… 2 1 | 0 1 2 … at both ends, however far outside."""
    if count == 1:
        return 0
    index = abs(index) % (2 * count - 2)
    return min(index, 2 * count - 2 - index)


@njit(**OPTIONS)
@no_type_check
def blur(whole, spare, kernel, amount):
    """The Gaussian G(v) of half a kernel for an amount below 0, else v + amount (v − G(v))."""
    _, height, width = whole.shape
    reach = len(kernel) - 1
    taps = 2 * reach + 1
    padded, mean = np.empty(width + 2 * reach, np.float32), np.empty(width, np.float32)
    values, flat, start = whole.reshape(-1), spare.reshape(-1), np.arange(taps)
    columns, rows = np.empty(width + 2 * reach, np.int64), np.empty(height + 2 * reach, np.int64)
    for x in range(width + 2 * reach):
        columns[x] = _mirrored(x - reach, width)
    for y in range(height + 2 * reach):
        rows[y] = _mirrored(y - reach, height) * width
    for c in range(3):
        for y in range(height):
            at = np.uint64((c * height + y) * width)
            for x in range(reach):
                padded[x], padded[width + reach + x] = whole[c, y, columns[x]], whole[c, y, columns[width + reach + x]]
            for x in range(width):
                padded[np.uint64(reach + x)] = values[at + np.uint64(x)]
            _weighted(padded, start, 0, kernel, flat, np.uint64(y * width), width)
        for y in range(height):
            at = np.uint64((c * height + y) * width)
            if amount < 0:
                _weighted(flat, rows, y, kernel, values, at, width)
            else:
                _weighted(flat, rows, y, kernel, mean, np.uint64(0), width)
                for x in range(width):
                    values[at + np.uint64(x)] += amount * (values[at + np.uint64(x)] - mean[x])


@njit(**OPTIONS)
@no_type_check
def _weighted(values, start, first, kernel, out, at, width):
    """Sum of the runs of values that begin at start[first], start[first + 1], …, weighted by half a kernel."""
    reach, centre = len(kernel) - 1, kernel[0]
    middle = first + reach
    m, j = np.uint64(start[middle]), 1
    if reach == 0:
        for i in range(width):
            out[at + np.uint64(i)] = centre * values[m + np.uint64(i)]
    while j <= reach:  # three pairs of taps in one pass, two where that comes out even: as many as leave the sums in registers
        tap_1, tap_2 = kernel[j], kernel[j + 1]
        a, b = np.uint64(start[middle - j]), np.uint64(start[middle - j - 1])
        d, e = np.uint64(start[middle + j]), np.uint64(start[middle + j + 1])
        if reach - j == 1 or reach - j == 3:
            if j == 1:
                for i in range(width):
                    x = np.uint64(i)
                    out[at + x] = centre * values[m + x] + (
                        tap_1 * (values[a + x] + values[d + x]) + tap_2 * (values[b + x] + values[e + x])
                    )
            else:
                for i in range(width):
                    x = np.uint64(i)
                    out[at + x] += tap_1 * (values[a + x] + values[d + x]) + tap_2 * (values[b + x] + values[e + x])
            j += 2
            continue
        tap_3, c, f = kernel[j + 2], np.uint64(start[middle - j - 2]), np.uint64(start[middle + j + 2])
        if j == 1:
            for i in range(width):
                x = np.uint64(i)
                out[at + x] = centre * values[m + x] + (
                    tap_1 * (values[a + x] + values[d + x])
                    + tap_2 * (values[b + x] + values[e + x])
                    + tap_3 * (values[c + x] + values[f + x])
                )
        else:
            for i in range(width):
                x = np.uint64(i)
                out[at + x] += (
                    tap_1 * (values[a + x] + values[d + x])
                    + tap_2 * (values[b + x] + values[e + x])
                    + tap_3 * (values[c + x] + values[f + x])
                )
        j += 3


@njit(**OPTIONS)
@no_type_check
def add_noise(whole, seed, std):
    """reference.normals, times std."""
    flat = whole.reshape(-1)
    key = scramble(np.int32(seed))
    one, half, quarter, least = np.float32(1), np.float32(0.5), np.float32(0.25), np.float32(2.0**-24)
    sine, logarithm = SINE.astype(np.float32), LOGARITHM.astype(np.float32)
    s0, s1, s2, s3, s4, s5 = sine[0], sine[1], sine[2], sine[3], sine[4], sine[5]
    l0, l1, l2, l3, l4 = logarithm[0], logarithm[1], logarithm[2], logarithm[3], logarithm[4]
    l5, l6, l7, l8 = logarithm[5], logarithm[6], logarithm[7], logarithm[8]
    for i in range(len(flat)):
        a = scramble(xor32(np.int32(i), key))
        b = scramble(add32(a, np.int32(-1640531527)))
        u = (upper24(a) + half) * least
        large = mantissa(u) > np.float32(1.41421356)
        z = (mantissa(u) * half if large else mantissa(u)) - one
        e = exponent(u) + (one if large else np.float32(0))
        series = l0 * z + l1
        series = ((series * z + l2) * z + l3) * z + l4
        series = (((series * z + l5) * z + l6) * z + l7) * z + l8
        ln = e * np.float32(0.69314718) + (z - half * z * z + z * z * z * series)
        turn = (abs(upper24(b) * least - half) - quarter) * np.float32(2 * np.pi)  # cos 2πt = sin 2π(|t − ½| − ¼)
        t2 = turn * turn
        cos = turn * (((((s0 * t2 + s1) * t2 + s2) * t2 + s3) * t2 + s4) * t2 + s5)
        flat[i] += std * np.sqrt(np.float32(-2) * ln) * cos


@njit(**OPTIONS)
@no_type_check
def jpeg(whole, steps):
    """reference.jpeg, by tiles of 8 × TILE values, flat: rows TILE apart, a distance that the compiler knows."""
    _, height, width = whole.shape
    values = whole.reshape(-1)
    luma, cb, cr, other = (
        np.empty(8 * TILE, np.float32),
        np.empty(8 * TILE, np.float32),
        np.empty(8 * TILE, np.float32),
        np.empty(8 * TILE, np.float32),
    )
    step = np.empty((3, 8 * TILE), np.float32)
    for c in range(3):
        for k in range(8):
            for x in range(TILE):
                step[c, k * TILE + x] = steps[c, x & 7, k]  # blocks are turned over when their values are rounded
    step0, step1, step2 = step[0], step[1], step[2]
    red, green, blue = np.empty(8 * TILE, np.float32), np.empty(8 * TILE, np.float32), np.empty(8 * TILE, np.float32)
    for top in range(0, height, 8):
        for left in range(0, width, TILE):
            _take(values, height, width, 0, top, left, red)
            _take(values, height, width, 1, top, left, green)
            _take(values, height, width, 2, top, left, blue)
            _weigh(red, green, blue, _YCC[0], np.float32(255), np.float32(-128), luma)
            _weigh(red, green, blue, _YCC[1], np.float32(255), np.float32(0), cb)
            _weigh(red, green, blue, _YCC[2], np.float32(255), np.float32(0), cr)
            _coarsen(luma, other, step0)
            _coarsen(cb, other, step1)
            _coarsen(cr, other, step2)
            level = np.float32(128 / 255)
            _weigh(luma, cb, cr, _RGB[0], np.float32(1 / 255), level, red)
            _weigh(luma, cb, cr, _RGB[1], np.float32(1 / 255), level, green)
            _weigh(luma, cb, cr, _RGB[2], np.float32(1 / 255), level, blue)
            _put(red, values, height, width, 0, top, left)
            _put(green, values, height, width, 1, top, left)
            _put(blue, values, height, width, 2, top, left)


@njit(**OPTIONS)
@no_type_check
def _take(values, height, width, c, top, left, tile):
    """A tile of one channel; the edge's values continue beyond it."""
    there = min(TILE, width - left)
    for y in range(8):
        start, first = np.uint64((c * height + min(top + y, height - 1)) * width + left), np.uint64(y * TILE)
        for x in range(there):
            tile[first + np.uint64(x)] = values[start + np.uint64(x)]
        for x in range(there, TILE):
            tile[first + np.uint64(x)] = values[start + np.uint64(there - 1)]


@njit(**OPTIONS)
@no_type_check
def _put(tile, values, height, width, c, top, left):
    for y in range(min(8, height - top)):
        start, first = np.uint64((c * height + top + y) * width + left), np.uint64(y * TILE)
        for x in range(min(TILE, width - left)):
            values[start + np.uint64(x)] = tile[first + np.uint64(x)]


@njit(**OPTIONS)
@no_type_check
def _weigh(a, b, c, weights, times, plus, out):
    p, q, r = times * weights[0], times * weights[1], times * weights[2]
    for x in range(8 * TILE):
        out[x] = p * a[x] + q * b[x] + r * c[x] + plus


@njit(**OPTIONS)
@no_type_check
def _coarsen(tile, other, steps):
    """What is left of a tile of 8 × 8 blocks when its coefficients are rounded to steps, in place."""
    _transform(tile, other)
    _turn_over(other, tile)
    _transform(tile, other)
    for x in range(8 * TILE):
        other[x] = np.floor(other[x] / steps[x] + np.float32(0.5)) * steps[x]
    _transform_back(other, tile)
    _turn_over(tile, other)
    _transform_back(other, tile)


@njit(**OPTIONS)
@no_type_check
def _turn_over(tile, out):
    """Every 8 × 8 block transposed."""
    for left in range(0, TILE, 8):
        for i in range(8):
            for j in range(8):
                out[np.uint64(j * TILE + left + i)] = tile[np.uint64(i * TILE + left + j)]


@njit(**OPTIONS)
@no_type_check
def _transform(v, out):
    """DCT-II along the columns: sums and differences of the halves, then 4 × 4 products of each."""
    d = DCT
    for x in range(TILE):
        v0, v1, v2, v3 = v[x], v[TILE + x], v[2 * TILE + x], v[3 * TILE + x]
        v4, v5, v6, v7 = v[4 * TILE + x], v[5 * TILE + x], v[6 * TILE + x], v[7 * TILE + x]
        a, b, c, e = v0 + v7, v1 + v6, v2 + v5, v3 + v4
        p, q, r, s = v0 - v7, v1 - v6, v2 - v5, v3 - v4
        out[x] = d[0, 0] * (a + e + b + c)
        out[4 * TILE + x] = d[4, 0] * (a + e - b - c)
        out[2 * TILE + x] = d[2, 0] * (a - e) + d[2, 1] * (b - c)
        out[6 * TILE + x] = d[6, 0] * (a - e) + d[6, 1] * (b - c)
        out[TILE + x] = d[1, 0] * p + d[1, 1] * q + d[1, 2] * r + d[1, 3] * s
        out[3 * TILE + x] = d[3, 0] * p + d[3, 1] * q + d[3, 2] * r + d[3, 3] * s
        out[5 * TILE + x] = d[5, 0] * p + d[5, 1] * q + d[5, 2] * r + d[5, 3] * s
        out[7 * TILE + x] = d[7, 0] * p + d[7, 1] * q + d[7, 2] * r + d[7, 3] * s


@njit(**OPTIONS)
@no_type_check
def _transform_back(v, out):
    """The inverse of `_transform`."""
    d = DCT
    for x in range(TILE):
        v0, v1, v2, v3 = v[x], v[TILE + x], v[2 * TILE + x], v[3 * TILE + x]
        v4, v5, v6, v7 = v[4 * TILE + x], v[5 * TILE + x], v[6 * TILE + x], v[7 * TILE + x]
        sum_, gap = d[0, 0] * (v0 + v4), d[0, 0] * (v0 - v4)
        wide, narrow = d[2, 0] * v2 + d[6, 0] * v6, d[2, 1] * v2 + d[6, 1] * v6
        a, b, c, e = sum_ + wide, gap + narrow, gap - narrow, sum_ - wide
        p = d[1, 0] * v1 + d[3, 0] * v3 + d[5, 0] * v5 + d[7, 0] * v7
        q = d[1, 1] * v1 + d[3, 1] * v3 + d[5, 1] * v5 + d[7, 1] * v7
        r = d[1, 2] * v1 + d[3, 2] * v3 + d[5, 2] * v5 + d[7, 2] * v7
        s = d[1, 3] * v1 + d[3, 3] * v3 + d[5, 3] * v5 + d[7, 3] * v7
        out[x], out[7 * TILE + x], out[TILE + x], out[6 * TILE + x] = a + p, a - p, b + q, b - q
        out[2 * TILE + x], out[5 * TILE + x], out[3 * TILE + x], out[4 * TILE + x] = c + r, c - r, e + s, e - s
