"""Compiled: which part of an image a view shows, and where in it each pixel of a row lies.

Functions of sampling.py call these and are cached by their own file alone: after a change here, delete the caches (`__pycache__/*.nb*`).
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np
from numba import njit

from attar.stages.augment.words import load8

AFFINE, PROJECTIVE, WARPED = 0, 1, 2
REFLECT, EDGE, CONSTANT = 0, 1, 2
SPHERICAL, CUBIC = 1, 2
OPTIONS = {"nogil": True, "cache": True, "fastmath": True, "error_model": "numpy"}
NEAREST = 1e-6
FAR = 1e9
REST = 2  # pixels around the region that a view shows
EXACT = 1e-4  # pixels between a coordinate and a pixel's centre that are no difference
ARCSINE = np.array([-0.0012624911, 0.0066700901, -0.0170881256, 0.0308918810, -0.0501743046, 0.0889789874, -0.2145988016, 1.5707963050])
SINE = np.array([-1.0 / 39916800, 1.0 / 362880, -1.0 / 5040, 1.0 / 120, -1.0 / 6, 1.0])  # Taylor: 6e-8 at a quarter turn

# ARCSINE is 4.4.46 of Abramowitz & Stegun: π/2 − √(1 − r) · polynomial, to 2e-8.
# A compiled function cannot be wrapped, so the checks of shapes that the tests switch on are kept away: @no_type_check.


@njit(**OPTIONS)
@no_type_check
def project(m, x, y):
    bottom = max(m[2, 0] * x + m[2, 1] * y + m[2, 2], NEAREST)
    return (m[0, 0] * x + m[0, 1] * y + m[0, 2]) / bottom, (m[1, 0] * x + m[1, 1] * y + m[1, 2]) / bottom, bottom


@njit(**OPTIONS)
@no_type_check
def _region(m, kind, rows, columns, height, width):
    """Left, top, right, lower end of the pixels that a view shows (with REST around); the whole image where it is not inside it."""
    left, top, right, low = 1e30, 1e30, -1e30, -1e30
    for corner in range(4):
        x, y, bottom = project(m, 0.5 + (width - 1) * (corner & 1), 0.5 + (height - 1) * (corner >> 1))
        if bottom <= NEAREST:
            return 0, 0, columns, rows
        left, right, top, low = min(left, x), max(right, x), min(top, y), max(low, y)
    if kind == WARPED or left < 0.5 or top < 0.5 or right > columns - 0.5 or low > rows - 0.5:
        return 0, 0, columns, rows
    return max(int(left) - REST, 0), max(int(top) - REST, 0), min(int(right) + REST + 1, columns), min(int(low) + REST + 1, rows)


@njit(**OPTIONS)
@no_type_check
def _box_means(image, box, left, top, right, low):
    """Means over boxes, rounded to bytes, of the boxes left … right − 1, top … low − 1: (low − top, right − left, 3)."""
    address, rows, columns, pitch, channels = image
    out = np.empty((low - top, right - left, 3), np.uint8)
    first, last = left * box * channels, min(right * box, columns) * channels
    sums = np.empty(last - first, np.int32)
    for row in range(top, low):
        bottom = min((row + 1) * box, rows)
        for i in range(last - first):
            sums[i] = 0
        for y in range(row * box, bottom):
            start = y * pitch + first
            for i in range(last - first):
                sums[i] += load8(address, start + i)
        for column in range(left, right):
            x0, x1 = (column - left) * box, min((column - left + 1) * box, columns - left * box)
            area = (bottom - row * box) * (x1 - x0)
            for c in range(3):
                total = 0
                for x in range(x0, x1):
                    total += sums[x * channels + (c if channels > 1 else 0)]
                out[row - top, column - left, c] = (2 * total + area) // (2 * area)
    return out


@njit(**OPTIONS)
@no_type_check
def window(image, matrix, kind, box, height, width, m):
    """The part of an image that a view shows, as an image of its own (box means where box > 1); the matrix that counts from it goes into `m`.

    The image is an address only: the caller holds the memory behind it, which for box means is the last of what is returned.
    """
    address, rows, columns, pitch, channels = image
    for i in range(3):
        m[0, i], m[1, i], m[2, i] = matrix[0, i] / box, matrix[1, i] / box, matrix[2, i]
    left, top, right, low = _region(m, kind, (rows + box - 1) // box, (columns + box - 1) // box, height, width)
    for i in range(3):
        m[0, i] -= left * m[2, i]
        m[1, i] -= top * m[2, i]
    if box == 1:
        return (address + top * pitch + left * channels, low - top, right - left, pitch, channels), np.empty((0, 0, 3), np.uint8)
    means = _box_means(image, box, left, top, right, low)
    return (np.int64(means.ctypes.data), low - top, right - left, (right - left) * 3, np.int64(3)), means


@njit(**OPTIONS)
@no_type_check
def whole_pixels(m, kind, rows, columns, height, width):
    """Whether a view shows whole pixels of the image, one each, as flips and quarter turns do; and the integers of
    column = c0 + cx x + cy y, row = r0 + rx x + ry y."""
    cx, cy, rx, ry = round(m[0, 0]), round(m[0, 1]), round(m[1, 0]), round(m[1, 1])
    x, y = (m[0, 0] + m[0, 1]) / 2 + m[0, 2] - 0.5, (m[1, 0] + m[1, 1]) / 2 + m[1, 2] - 0.5
    c0, r0 = round(x), round(y)
    off = abs(m[0, 0] - cx) * width + abs(m[0, 1] - cy) * height + abs(m[1, 0] - rx) * width + abs(m[1, 1] - ry) * height
    exact = kind == AFFINE and off + abs(x - c0) + abs(y - r0) < EXACT and abs(cx) + abs(cy) == 1 and abs(rx) + abs(ry) == 1
    low_column, low_row = min(cx * (width - 1), 0) + min(cy * (height - 1), 0), min(rx * (width - 1), 0) + min(ry * (height - 1), 0)
    high_column, high_row = max(cx * (width - 1), 0) + max(cy * (height - 1), 0), max(rx * (width - 1), 0) + max(ry * (height - 1), 0)
    inside = c0 + low_column >= 0 and r0 + low_row >= 0 and c0 + high_column < columns and r0 + high_row < rows
    return exact and inside, c0, cx, cy, r0, rx, ry


@njit(**OPTIONS)
@no_type_check
def _line(m, y):
    """Steps along x and y of the source from pixel to pixel of a straight row, and where it begins."""
    ax, ay = np.float32(m[0, 0]), np.float32(m[1, 0])
    bx = np.float32(0.5 * m[0, 0] + (y + 0.5) * m[0, 1] + m[0, 2] - 0.5)
    by = np.float32(0.5 * m[1, 0] + (y + 0.5) * m[1, 1] + m[1, 2] - 0.5)
    return ax, ay, bx, by


@njit(**OPTIONS)
@no_type_check
def affine_row(m, y, sx, sy):
    ax, ay, bx, by = _line(m, y)
    for x in range(len(sx)):
        step = np.float32(np.int32(x))
        sx[x], sy[x] = ax * step + bx, ay * step + by


@njit(**OPTIONS)
@no_type_check
def _inner_row(m, y, rows, columns, pitch, channels, offset, right, low):
    """What `affine_row` and `locate` find, in one pass, of a row that lies well inside the image; whether it does."""
    ax, ay, bx, by = _line(m, y)
    across, down, furthest = (len(offset) - 1) * ax, (len(offset) - 1) * ay, (2**31 - 1 - 4 * columns) // pitch - 1
    if min(bx, bx + across) < 0 or min(by, by + down) < 0:
        return False
    if max(bx, bx + across) > columns - 3 or max(by, by + down) > min(rows - 3, furthest - 1):
        return False
    pitch, channels = np.int32(pitch), np.int32(channels)
    for x in range(len(offset)):
        step = np.float32(np.int32(x))
        px, py = ax * step + bx, ay * step + by
        left, top = np.int32(px), np.int32(py)
        right[x], low[x] = px - np.float32(left), py - np.float32(top)
        offset[x] = np.int32(top * pitch + left * channels)
    return True


@njit(**OPTIONS)
@no_type_check
def projected(m, px, py, sx, sy):
    """px, py, pixels of the view, through the matrix."""
    a, b, c = np.float32(m[0, 0]), np.float32(m[0, 1]), np.float32(m[0, 2])
    d, e, f = np.float32(m[1, 0]), np.float32(m[1, 1]), np.float32(m[1, 2])
    g, h, i = np.float32(m[2, 0]), np.float32(m[2, 1]), np.float32(m[2, 2])
    one, half, far, nearest = np.float32(1), np.float32(0.5), np.float32(FAR), np.float32(NEAREST)
    for x in range(len(sx)):
        u, v = px[x], py[x]
        share = one / max(g * u + h * v + i, nearest)
        sx[x] = min(max((a * u + b * v + c) * share - half, -far), far)
        sy[x] = min(max((d * u + e * v + f) * share - half, -far), far)


@njit(**OPTIONS)
@no_type_check
def elastic_rows(elastic, nodes):
    """The five rows of nodes, interpolated along x at every pixel: (2, 5, width)."""
    width = nodes.shape[2]
    for x in range(width):
        position = (x + 0.5) / width * 4
        left = min(int(position), 3)
        right = np.float32(position - left)
        for axis in range(2):
            for row in range(5):
                nodes[axis, row, x] = elastic[axis, row, left] + right * (elastic[axis, row, left + 1] - elastic[axis, row, left])


@njit(**OPTIONS)
@no_type_check
def warped_row(y, height, width, warp, nodes, bends, px, py):
    """Where the elastic and the radial warp move the pixels of a row to, in pixels of the view."""
    half = np.float32(max(height, width) / 2)
    mid_x, mid_y, one = np.float32(width / 2), np.float32(height / 2), np.float32(1)
    kind, amount, centre_u, centre_v = int(warp[0]), warp[1], warp[2], warp[3]
    unit, start, across = one / half, np.float32(0.5) - mid_x, np.float32(y + 0.5) - mid_y
    for x in range(width):
        px[x], py[x] = (np.float32(np.int32(x)) + start) * unit, across * unit
    if bends:
        position = (y + 0.5) / height * 4
        row = min(int(position), 3)
        low = np.float32(position - row)
        upper_u, lower_u, upper_v, lower_v = nodes[0, row], nodes[0, row + 1], nodes[1, row], nodes[1, row + 1]
        for x in range(width):
            px[x] += upper_u[x] + low * (lower_u[x] - upper_u[x])
            py[x] += upper_v[x] + low * (lower_v[x] - upper_v[x])
    if kind == CUBIC:
        for x in range(width):
            u, v = px[x] - centre_u, py[x] - centre_v
            factor = one + amount * (u * u + v * v)
            px[x], py[x] = centre_u + u * factor, centre_v + v * factor
    elif kind == SPHERICAL:
        _spherical(amount, centre_u, centre_v, px, py)
    for x in range(width):
        px[x], py[x] = px[x] * half + mid_x, py[x] * half + mid_y


@njit(**OPTIONS)
@no_type_check
def _spherical(amount, centre_u, centre_v, px, py):
    """mapping._reach within r < 1, by polynomials, for the compiler to make vectors of."""
    a0, a1, a2, a3 = np.float32(ARCSINE[0]), np.float32(ARCSINE[1]), np.float32(ARCSINE[2]), np.float32(ARCSINE[3])
    a4, a5, a6, a7 = np.float32(ARCSINE[4]), np.float32(ARCSINE[5]), np.float32(ARCSINE[6]), np.float32(ARCSINE[7])
    s0, s1, s2, s3, s4, s5 = (
        np.float32(SINE[0]), np.float32(SINE[1]), np.float32(SINE[2]), np.float32(SINE[3]), np.float32(SINE[4]), np.float32(SINE[5]),
    )  # fmt: skip
    zero, one, quarter, least = np.float32(0), np.float32(1), np.float32(np.pi / 2), np.float32(1e-6)
    kept, turn = one - abs(amount), np.float32(2 / np.pi)
    for x in range(len(px)):
        u, v = px[x] - centre_u, py[x] - centre_v
        r = max(np.sqrt(u * u + v * v), least)
        near = min(r, one)
        if amount > zero:
            series = ((((((a0 * near + a1) * near + a2) * near + a3) * near + a4) * near + a5) * near + a6) * near + a7
            curve = (quarter - np.sqrt(one - near) * series) * turn
        else:
            t = quarter * near
            t2 = t * t
            curve = t * (((((s0 * t2 + s1) * t2 + s2) * t2 + s3) * t2 + s4) * t2 + s5)
        factor = kept + abs(amount) * curve / near if r < one else one
        px[x], py[x] = centre_u + u * factor, centre_v + v * factor


@njit(**OPTIONS)
@no_type_check
def fold(s, count, border, straight):
    """Coordinates along one axis of `count` pixels, brought inside where one of them is outside: mirrored at the pixels' edges, or held.

    Mirroring or holding the coordinate gives the same mean as mirroring or holding the pixels. Of a straight row the ends are furthest out.
    """
    last, turn, zero, half = np.float32(count - 1), np.float32(2 * count), np.float32(0), np.float32(0.5)
    outside, step = 0, max(len(s) - 1, 1) if straight else 1
    for x in range(0, len(s), step):
        outside += (s[x] < zero) | (s[x] > last)
    if outside == 0 or border == CONSTANT:
        return
    for x in range(len(s)):
        p = s[x]
        if border == REFLECT and (p < zero or p > last):
            p += half
            p -= turn * np.floor(p / turn)
            p = min(p, turn - p) - half
        s[x] = min(max(p, zero), last)


@njit(**OPTIONS)
@no_type_check
def locate(sx, sy, rows, columns, pitch, channels, offset, right, low):
    """Byte offset of the upper left neighbour, −1 where not all four can be loaded as words; weights of the right and the lower neighbours."""
    last_x, last_y, end_x, end_y = np.float32(columns - 1), np.float32(rows - 1), np.float32(columns - 2), np.float32(rows - 2)
    furthest = np.float32((2**31 - 1 - 4 * columns) // pitch - 1)  # the last row whose offsets fit into 32 bits
    zero, wanted, pitch, channels = np.float32(0), columns > 1 and rows > 1, np.int32(pitch), np.int32(channels)
    for x in range(len(sx)):
        px, py = sx[x], sy[x]
        left, top = min(np.floor(px), end_x), min(np.floor(py), end_y)
        right[x], low[x] = px - left, py - top
        inside = wanted & (px >= zero) & (py >= zero) & (px <= last_x) & (py <= last_y) & (top < furthest)
        inside &= (left < end_x) | (top < end_y)  # a word of the last two pixels of the last row reaches beyond the memory
        offset[x] = np.int32(np.int32(top) * pitch + np.int32(left) * channels) if inside else np.int32(-1)


@njit(**OPTIONS)
@no_type_check
def find_row(image, m, kind, y, height, warp, nodes, bends, border, px, py, sx, sy, offset, right, low):
    """Where a row of a view of any kind reads: `locate`'s offsets and weights; sx and sy as well, unless the row lies well inside the image."""
    _, rows, columns, pitch, channels = image
    if kind == AFFINE:
        if _inner_row(m, y, rows, columns, pitch, channels, offset, right, low):
            return
        affine_row(m, y, sx, sy)
    else:
        if kind == WARPED:
            warped_row(y, height, len(px), warp, nodes, bends, px, py)
        else:
            for x in range(len(px)):
                px[x], py[x] = np.float32(x + 0.5), np.float32(y + 0.5)
        projected(m, px, py, sx, sy)
    fold(sy, rows, border, kind == AFFINE)
    fold(sx, columns, border, kind == AFFINE)
    locate(sx, sy, rows, columns, pitch, channels, offset, right, low)
