"""What is done to a view after its colour, where it was drawn: equalise, blur, sharpen, noise, JPEG. Compiled, on float32 (3, height, width).

Each is defined in reference.py under the same name. Every compiled function that another calls lies in this file, since numba caches by file.
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np
from jaxtyping import Bool, Float32
from numba import njit

from attar.stages.augment.plan import Plan
from attar.stages.augment.reference import REACH, TO_RGB, TO_YCC, dct_matrix, quantisers
from attar.stages.augment.words import add32, exponent, mantissa, scramble, upper24, xor32

OPTIONS = {"nogil": True, "cache": True, "fastmath": True, "error_model": "numpy"}
AT_ONCE = 3
"""Pairs of taps that `_add_taps` adds."""
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
        blur(whole, spare, gaussian_kernel(1.0), np.float32(plan.sharpen[view]))
    if plan.noise[view] > 0:
        add_noise(whole, np.uint32(plan.seed[view]), np.float32(plan.noise[view]))
    if plan.jpeg[view] > 0:
        jpeg(whole, quantisers(int(plan.jpeg[view])).astype(np.float32))


def gaussian_kernel(sigma: float) -> Float32[np.ndarray, " taps"]:
    """The upper half of the kernel, from its centre on, filled up with zeros to one tap and a multiple of AT_ONCE."""
    reach = int(np.ceil(REACH * np.float32(sigma)))
    kernel = np.exp(-0.5 * (np.arange(reach + 1) / sigma) ** 2)
    kernel /= kernel[0] + 2 * kernel[1:].sum()
    return np.pad(kernel, (0, -reach % AT_ONCE)).astype(np.float32)


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
    padded, mean = np.empty(width + 2 * reach, np.float32), np.empty(width, np.float32)
    for c in range(3):
        for y in range(height):
            row, out = whole[c, y], spare[y]
            for x in range(width):
                padded[reach + x] = row[x]
            for j in range(1, reach + 1):
                padded[reach - j] = row[_mirrored(-j, width)]
                padded[reach + width - 1 + j] = row[_mirrored(width - 1 + j, width)]
            for x in range(width):
                out[x] = kernel[0] * row[x]
            for j in range(1, reach + 1, 3):
                k = reach - j
                _add_taps(
                    padded[k : k + width], padded[k + 2 * j :][:width], kernel[j],
                    padded[k - 1 : k - 1 + width], padded[k + 2 * j + 1 :][:width], kernel[j + 1],
                    padded[k - 2 : k - 2 + width], padded[k + 2 * j + 2 :][:width], kernel[j + 2], out,
                )  # fmt: skip
        for y in range(height):
            row, centre = whole[c, y], spare[y]
            for x in range(width):
                mean[x] = kernel[0] * centre[x]
            for j in range(1, reach + 1, 3):
                _add_taps(
                    spare[_mirrored(y - j, height)], spare[_mirrored(y + j, height)], kernel[j],
                    spare[_mirrored(y - j - 1, height)], spare[_mirrored(y + j + 1, height)], kernel[j + 1],
                    spare[_mirrored(y - j - 2, height)], spare[_mirrored(y + j + 2, height)], kernel[j + 2], mean,
                )  # fmt: skip
            for x in range(width):
                row[x] = mean[x] if amount < 0 else row[x] + amount * (row[x] - mean[x])


@njit(**OPTIONS)
@no_type_check
def _add_taps(before_1, after_1, tap_1, before_2, after_2, tap_2, before_3, after_3, tap_3, out):
    for x in range(len(out)):
        out[x] += tap_1 * (before_1[x] + after_1[x]) + tap_2 * (before_2[x] + after_2[x]) + tap_3 * (before_3[x] + after_3[x])


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
    """Bands of eight rows: to YCbCr, transformed along columns and rows, rounded to steps, and back."""
    _, height, width = whole.shape
    wide = (width + 7) // 8 * 8
    band, other, turned = np.empty((3, 8, wide), np.float32), np.empty((8, wide), np.float32), np.empty((8, 8), np.float32)
    for k in range(8):
        for x in range(8):
            turned[x, k] = DCT[k, x]
    for top in range(0, height, 8):
        for y in range(8):
            row = min(top + y, height - 1)
            _to_ycc(whole[0, row], whole[1, row], whole[2, row], band[0, y], band[1, y], band[2, y])
        for c in range(3):
            _columns(band[c], other)
            for k in range(8):
                _along(other[k], turned, band[c, k])
                _round_to(band[c, k], steps[c, k])
                _along(band[c, k], DCT, other[k])
            _columns_back(other, band[c])
        for y in range(min(8, height - top)):
            _to_rgb(band[0, y], band[1, y], band[2, y], whole[0, top + y], whole[1, top + y], whole[2, top + y])


@njit(**OPTIONS)
@no_type_check
def _to_ycc(red, green, blue, luma, cb, cr):
    m00, m01, m02 = _YCC[0, 0], _YCC[0, 1], _YCC[0, 2]
    m10, m11, m12 = _YCC[1, 0], _YCC[1, 1], _YCC[1, 2]
    m20, m21, m22 = _YCC[2, 0], _YCC[2, 1], _YCC[2, 2]
    white, width = np.float32(255), len(red)
    for x in range(width):
        r, g, b = white * red[x], white * green[x], white * blue[x]
        luma[x] = m00 * r + m01 * g + m02 * b - np.float32(128)
        cb[x] = m10 * r + m11 * g + m12 * b
        cr[x] = m20 * r + m21 * g + m22 * b
    for x in range(width, len(luma)):
        luma[x], cb[x], cr[x] = luma[width - 1], cb[width - 1], cr[width - 1]


@njit(**OPTIONS)
@no_type_check
def _to_rgb(luma, cb, cr, red, green, blue):
    m02, m11, m12, m21 = _RGB[0, 2], _RGB[1, 1], _RGB[1, 2], _RGB[2, 1]
    unit = np.float32(1 / 255)
    for x in range(len(red)):
        y = luma[x] + np.float32(128)
        red[x] = (y + m02 * cr[x]) * unit
        green[x] = (y + m11 * cb[x] + m12 * cr[x]) * unit
        blue[x] = (y + m21 * cb[x]) * unit


@njit(**OPTIONS)
@no_type_check
def _columns(rows, out):
    """DCT-II along the columns of (8, n): sums and differences of the halves, then 4 × 4 products of each."""
    d = DCT
    for x in range(rows.shape[1]):
        a, b, c, e = rows[0, x] + rows[7, x], rows[1, x] + rows[6, x], rows[2, x] + rows[5, x], rows[3, x] + rows[4, x]
        p, q, r, s = rows[0, x] - rows[7, x], rows[1, x] - rows[6, x], rows[2, x] - rows[5, x], rows[3, x] - rows[4, x]
        out[0, x] = d[0, 0] * (a + e + b + c)
        out[4, x] = d[4, 0] * (a + e - b - c)
        out[2, x] = d[2, 0] * (a - e) + d[2, 1] * (b - c)
        out[6, x] = d[6, 0] * (a - e) + d[6, 1] * (b - c)
        out[1, x] = d[1, 0] * p + d[1, 1] * q + d[1, 2] * r + d[1, 3] * s
        out[3, x] = d[3, 0] * p + d[3, 1] * q + d[3, 2] * r + d[3, 3] * s
        out[5, x] = d[5, 0] * p + d[5, 1] * q + d[5, 2] * r + d[5, 3] * s
        out[7, x] = d[7, 0] * p + d[7, 1] * q + d[7, 2] * r + d[7, 3] * s


@njit(**OPTIONS)
@no_type_check
def _columns_back(rows, out):
    """The inverse of `_columns`."""
    d = DCT
    for x in range(rows.shape[1]):
        sum_, gap = d[0, 0] * (rows[0, x] + rows[4, x]), d[0, 0] * (rows[0, x] - rows[4, x])
        wide, narrow = d[2, 0] * rows[2, x] + d[6, 0] * rows[6, x], d[2, 1] * rows[2, x] + d[6, 1] * rows[6, x]
        a, b, c, e = sum_ + wide, gap + narrow, gap - narrow, sum_ - wide
        r1, r3, r5, r7 = rows[1, x], rows[3, x], rows[5, x], rows[7, x]
        p = d[1, 0] * r1 + d[3, 0] * r3 + d[5, 0] * r5 + d[7, 0] * r7
        q = d[1, 1] * r1 + d[3, 1] * r3 + d[5, 1] * r5 + d[7, 1] * r7
        r = d[1, 2] * r1 + d[3, 2] * r3 + d[5, 2] * r5 + d[7, 2] * r7
        s = d[1, 3] * r1 + d[3, 3] * r3 + d[5, 3] * r5 + d[7, 3] * r7
        out[0, x], out[7, x], out[1, x], out[6, x] = a + p, a - p, b + q, b - q
        out[2, x], out[5, x], out[3, x], out[4, x] = c + r, c - r, e + s, e - s


@njit(**OPTIONS)
@no_type_check
def _along(row, matrix, out):
    """Each eight values of a row times an 8 × 8 matrix."""
    m0, m1, m2, m3, m4, m5, m6, m7 = matrix[0], matrix[1], matrix[2], matrix[3], matrix[4], matrix[5], matrix[6], matrix[7]
    for left in range(0, len(row), 8):
        block, made = row[left : left + 8], out[left : left + 8]
        a, b, c, d, e, f, g, h = block[0], block[1], block[2], block[3], block[4], block[5], block[6], block[7]
        for k in range(8):
            made[k] = a * m0[k] + b * m1[k] + c * m2[k] + d * m3[k] + e * m4[k] + f * m5[k] + g * m6[k] + h * m7[k]


@njit(**OPTIONS)
@no_type_check
def _round_to(row, steps):
    for left in range(0, len(row), 8):
        block = row[left : left + 8]
        for k in range(8):
            block[k] = np.floor(block[k] / steps[k] + np.float32(0.5)) * steps[k]
