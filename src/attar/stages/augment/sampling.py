"""The compiled pass over the pixels: coordinates, four neighbours, bilinear mean, colour, table, normalised values, row by row.

A row of a view goes through small buffers that stay in the nearest cache: where each pixel comes from (coordinates.py), the two neighbours above and
the two below as one word of 8 bytes each, then all arithmetic on whole rows, which the compiler turns into vector instructions. Pixels whose
neighbours are not all inside the image (and the last ones of its last row, after which a word would reach beyond the memory) are put together byte by
byte. Where a view shows whole pixels (flips, quarter turns, its own size) there are no neighbours; where axes stay axes the columns are found once and
means across are kept from one row to the next.

Within the rows of a view nothing is sliced (a slice counts references, by instructions that lock memory), and what a row needs is asked for some rows
before: photos lie in main memory, and a turned row reads from many places.
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np
from numba import njit

from attar.stages.augment.coordinates import (
    AFFINE,
    CONSTANT,
    OPTIONS,
    REFLECT,
    WARPED,
    affine_row,
    elastic_rows,
    find_row,
    fold,
    locate,
    whole_pixels,
    window,
)  # fmt: skip
from attar.stages.augment.words import brain_bits, byte, half_bits, load8, load32, load64, load_level, prefetch

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
TALL = 2**24  # rows of an image that never ends
AHEAD = 6  # rows of a view between what is computed and what is asked for
LINE = 64  # bytes that come at once


@njit(**OPTIONS)
@no_type_check
def _neighbour(image, row, column, border, fill):
    """One pixel as red + 2⁸ green + 2¹⁶ blue, by the rule of the border."""
    address, rows, columns, pitch, channels = image
    if row < 0 or row >= rows or column < 0 or column >= columns:
        if border == CONSTANT:
            return np.int64(fill)
        if border == REFLECT:
            row, column = row % (2 * rows), column % (2 * columns)
            row, column = min(row, 2 * rows - 1 - row), min(column, 2 * columns - 1 - column)
        else:
            row, column = min(max(row, 0), rows - 1), min(max(column, 0), columns - 1)
    start = row * pitch + column * channels
    if channels == 1:
        return load8(address, start) * 0x010101
    return load8(address, start) | load8(address, start + 1) << 8 | load8(address, start + 2) << 16


@njit(**OPTIONS)
@no_type_check
def _gather(image, base, offset, sx, sy, right, low, border, fill, above, below):
    """The two neighbours above (at base + offset) and the two below: bytes r g b r g b of one word each. What cannot be loaded is put together."""
    _, _, _, pitch, channels = image
    lower, outside = base + pitch, 0
    for x in range(len(offset)):
        outside += offset[x] < 0
    if channels == 3 and outside == 0:
        for x in range(len(offset)):
            start = np.int64(offset[x])
            above[x], below[x] = load64(base, start), load64(lower, start)
        return
    for x in range(len(offset)):
        start = np.int64(offset[x])
        if start < 0:
            left, top = np.int64(np.floor(sx[x])), np.int64(np.floor(sy[x]))
            right[x], low[x] = sx[x] - np.floor(sx[x]), sy[x] - np.floor(sy[x])
            for down in range(2):
                pair = _neighbour(image, top + down, left, border, fill) | _neighbour(image, top + down, left + 1, border, fill) << 24
                if down:
                    below[x] = pair
                else:
                    above[x] = pair
        elif channels == 3:
            above[x], below[x] = load64(base, start), load64(lower, start)
        elif channels == 4:
            above[x], below[x] = _without_alpha(load64(base, start)), _without_alpha(load64(lower, start))
        else:
            above[x], below[x] = _two_greys(base, start), _two_greys(lower, start)


@njit(**OPTIONS)
@no_type_check
def _without_alpha(word):
    return word & 0xFFFFFF | (word >> 32 & 0xFFFFFF) << 24


@njit(**OPTIONS)
@no_type_check
def _two_greys(address, start):
    return load8(address, start) * 0x010101 | load8(address, start + 1) * 0x010101 << 24


@njit(**OPTIONS)
@no_type_check
def _mean(a, b, c, d, u, v):
    upper, lower = a + u * (b - a), c + u * (d - c)
    return upper + v * (lower - upper)


@njit(**OPTIONS)
@no_type_check
def _blend(above, below, right, low, red, green, blue):
    """Bilinear means of words, as pairs of int32: r g b r | g b of the upper two pixels and of the lower two. In 0 … 255."""
    for x in range(len(right)):
        a, b, c, d, u, v = above[2 * x], above[2 * x + 1], below[2 * x], below[2 * x + 1], right[x], low[x]
        red[x] = _mean(byte(a, 0), byte(a, 24), byte(c, 0), byte(c, 24), u, v)
        green[x] = _mean(byte(a, 8), byte(b, 0), byte(c, 8), byte(d, 0), u, v)
        blue[x] = _mean(byte(a, 16), byte(b, 8), byte(c, 16), byte(d, 8), u, v)


@njit(**OPTIONS)
@no_type_check
def _pixels(address, start, step, words):
    """A word of every pixel from `start` on, `step` bytes apart."""
    if step < 0:
        last = np.uint64(len(words) - 1)
        for x in range(len(words)):
            words[last - np.uint64(x)] = load32(address, start + (len(words) - 1 - x) * step)
    else:
        for x in range(len(words)):
            words[x] = load32(address, start + x * step)


@njit(**OPTIONS)
@no_type_check
def _planes(address, start, red, green, blue):
    """Red, green and blue of pixels of three bytes that follow each other, in 0 … 255."""
    for x in range(len(red)):
        at = start + 3 * x
        red[x], green[x], blue[x] = load_level(address, at), load_level(address, at + 1), load_level(address, at + 2)


@njit(**OPTIONS)
@no_type_check
def _mirrored(address, start, red, green, blue):
    """As `_planes`, from the last pixel to the first, which is at `start`."""
    last = np.uint64(len(red) - 1)
    for x in range(len(red)):
        at, to = start + 3 * x, last - np.uint64(x)
        red[to], green[to], blue[to] = load_level(address, at), load_level(address, at + 1), load_level(address, at + 2)


@njit(**OPTIONS)
@no_type_check
def _unpack(words, red, green, blue):
    """Red, green and blue of words of one pixel, in 0 … 255."""
    for x in range(len(red)):
        red[x], green[x], blue[x] = byte(words[x], 0), byte(words[x], 8), byte(words[x], 16)


@njit(**OPTIONS)
@no_type_check
def _ask(image, m, offset):
    """Asks for what a row AHEAD will read, judged by the matrix: rows that are not straight come from too many places for the processor to foresee."""
    address, _, _, pitch, channels = image
    away = address + np.int64(np.floor(AHEAD * m[1, 1] / m[2, 2])) * pitch + np.int64(AHEAD * m[0, 1] / m[2, 2]) * channels
    for x in range(0, len(offset), 4):
        prefetch(away, np.int64(offset[x]))


@njit(**OPTIONS)
@no_type_check
def _ask_row(address, first, end):
    for start in range(min(first, end), max(first, end), LINE):
        prefetch(address, start)


@njit(**OPTIONS)
@no_type_check
def _pairs(image, base, offset, words):
    """Every pixel of a row at base + offset with its right neighbour: bytes r g b r g b of one word."""
    if image[4] == 3:
        for x in range(len(offset)):
            words[x] = load64(base, np.int64(offset[x]))
    elif image[4] == 4:
        for x in range(len(offset)):
            words[x] = _without_alpha(load64(base, np.int64(offset[x])))
    else:
        for x in range(len(offset)):
            words[x] = _two_greys(base, np.int64(offset[x]))


@njit(**OPTIONS)
@no_type_check
def _across(words, right, red, green, blue):
    """Means of two neighbours in a row, of words as pairs of int32: r g b r | g b. In 0 … 255."""
    for x in range(len(right)):
        a, b, u = words[2 * x], words[2 * x + 1], right[x]
        red[x] = byte(a, 0) + u * (byte(a, 24) - byte(a, 0))
        green[x] = byte(a, 8) + u * (byte(b, 0) - byte(a, 8))
        blue[x] = byte(a, 16) + u * (byte(b, 8) - byte(a, 16))


@njit(**OPTIONS)
@no_type_check
def _down(r0, r1, g0, g1, b0, b1, low, red, green, blue):
    """Means of what two rows of the image show, by channel."""
    for x in range(len(red)):
        red[x] = r0[x] + low * (r1[x] - r0[x])
        green[x] = g0[x] + low * (g1[x] - g0[x])
        blue[x] = b0[x] + low * (b1[x] - b0[x])


@njit(**OPTIONS)
@no_type_check
def _recolour(red, green, blue, colour, view, times, plus, made, at, apart):
    """The colour map (from 0 … 255 to [0, 1]), clipped, times scale plus shift, in three rows `apart` from each other."""
    a0, a1, a2, a3 = colour[view, 0, 0], colour[view, 0, 1], colour[view, 0, 2], colour[view, 0, 3]
    b0, b1, b2, b3 = colour[view, 1, 0], colour[view, 1, 1], colour[view, 1, 2], colour[view, 1, 3]
    c0, c1, c2, c3 = colour[view, 2, 0], colour[view, 2, 1], colour[view, 2, 2], colour[view, 2, 3]
    (t0, t1, t2), (p0, p1, p2) = (times[0], times[1], times[2]), (plus[0], plus[1], plus[2])
    second, third, zero, one = at + np.uint64(apart), at + np.uint64(2 * apart), np.float32(0), np.float32(1)
    for x in range(len(red)):
        r, g, b, to = red[x], green[x], blue[x], np.uint64(x)
        made[at + to] = min(max(a0 * r + a1 * g + a2 * b + a3, zero), one) * t0 + p0
        made[second + to] = min(max(b0 * r + b1 * g + b2 * b + b3, zero), one) * t1 + p1
        made[third + to] = min(max(c0 * r + c1 * g + c2 * b + c3, zero), one) * t2 + p2


@njit(**OPTIONS)
@no_type_check
def _tint(red, green, blue, colour, view, times, plus, made, at, apart):
    """As `_recolour`, of a map that keeps the channels apart."""
    a, b, c = colour[view, 0, 0], colour[view, 1, 1], colour[view, 2, 2]
    a3, b3, c3 = colour[view, 0, 3], colour[view, 1, 3], colour[view, 2, 3]
    (t0, t1, t2), (p0, p1, p2) = (times[0], times[1], times[2]), (plus[0], plus[1], plus[2])
    second, third, zero, one = at + np.uint64(apart), at + np.uint64(2 * apart), np.float32(0), np.float32(1)
    for x in range(len(red)):
        to = np.uint64(x)
        made[at + to] = min(max(a * red[x] + a3, zero), one) * t0 + p0
        made[second + to] = min(max(b * green[x] + b3, zero), one) * t1 + p1
        made[third + to] = min(max(c * blue[x] + c3, zero), one) * t2 + p2


@njit(**OPTIONS)
@no_type_check
def _level_table(colour, view, tables, table, given, times, plus, lut):
    """Level → the table's value, normalised; with `given` from the level before the colour map, which then keeps the channels apart."""
    for c in range(3):
        for level in range(256):
            found = level
            if given:
                value = min(max(colour[view, c, c] * np.float32(level) + colour[view, c, 3], np.float32(0)), np.float32(1))
                found = int(np.float32(255) * value + np.float32(0.5))
            lut[256 * c + level] = np.float32(tables[table, c, found]) / np.float32(255) * times[c] + plus[c]


@njit(**OPTIONS)
@no_type_check
def _look_up(row, lut, c, levels, times, made, at):
    """lut[c, ⌊times row + ½⌋]."""
    half, first = np.float32(0.5), np.uint64(256 * c)
    for x in range(len(row)):
        levels[x] = np.uint8(np.int32(times * row[x] + half))
    for x in range(len(row)):
        made[at + np.uint64(x)] = lut[first + np.uint64(levels[x])]


@njit(**OPTIONS)
@no_type_check
def _look_up_pixels(address, start, step, width, lut, made, at, apart):
    """lut[c, byte] of pixels `step` bytes apart, in three rows `apart` from each other."""
    second, third = at + np.uint64(apart), at + np.uint64(2 * apart)
    for x in range(width):
        pixel, to = np.uint32(load32(address, start + step * x)), np.uint64(x)  # one load for three bytes, for loads are what binds
        made[at + to] = lut[np.uint64(pixel & np.uint32(255))]
        made[second + to] = lut[np.uint64(256) + np.uint64(pixel >> np.uint32(8) & np.uint32(255))]
        made[third + to] = lut[np.uint64(512) + np.uint64(pixel >> np.uint32(16) & np.uint32(255))]


@njit(**OPTIONS)
@no_type_check
def _pack(values, view, y, height, width, out, bits, kind, last):
    """A row of values (3, width) in the output's type and layout."""
    for c in range(3):
        row, times = values[c], 3 if last else 1
        start = (view * height + y) * width * 3 + c if last else ((view * 3 + c) * height + y) * width
        floats, words = (
            out[start : start + times * width],
            bits[start : start + times * width],
        )  # an index from 0 on needs no test for what is below
        if kind == FLOAT16:
            for x in range(width):
                words[times * x] = half_bits(row[x])
        elif kind == BFLOAT16:
            for x in range(width):
                words[times * x] = brain_bits(row[x])
        elif not last:
            for x in range(width):
                floats[x] = row[x]
    if kind == FLOAT32 and last:
        start = (view * height + y) * width * 3
        pixels, red, green, blue = out[start : start + 3 * width], values[0], values[1], values[2]
        for x in range(width):
            pixels[3 * x], pixels[3 * x + 1], pixels[3 * x + 2] = red[x], green[x], blue[x]


@njit(**OPTIONS)
@no_type_check
def _erase_row(box, y, height, width, scale, shift, made, at, apart):
    """Normalised mid grey where the centre of a pixel lies within the box: in three rows `apart` from each other."""
    if box[1] * height < y + 0.5 < box[3] * height:
        first, end = max(int(np.floor(box[0] * width - 0.5)) + 1, 0), min(int(np.ceil(box[2] * width - 0.5)), width)
        for c in range(3):
            grey = np.float32(0.5) * scale[c] + shift[c]
            for x in range(at + c * apart + first, at + c * apart + end):
                made[x] = grey


@njit(**OPTIONS)
@no_type_check
def sample_views(
    first, end, chosen, images, source, matrix, kinds, boxes, warp, elastic, border, fill, colour, plain, alone, table, tables, erase, scale, shift,
    height, width, out, bits, kind, last, whole, raw,
):  # fmt: skip
    """Views chosen[first … end − 1]: sampled, coloured, looked up. Stored erased and normalised in `out` (or `bits`), or with `raw` as values in [0, 1] in
    `whole` (3, h, w).

    Returns a byte of every array of box means: their memory is held until then.
    """
    sx, sy, right, low = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    px, py, across = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    r0, g0, b0 = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    r1, g1, b1 = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    red, green, blue = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    offset, columns_at, levels = np.empty(width, np.int32), np.empty(width, np.int32), np.empty(width, np.uint8)
    above, below, words = np.empty(width, np.int64), np.empty(width, np.int64), np.empty(width, np.int32)
    packed, mixed, nodes = np.empty((3, width), np.float32), np.empty(3 * width, np.float32), np.empty((2, 5, width), np.float32)
    upper, lower = above.view(np.int32), below.view(np.int32)
    m, lut, unit, none = np.empty((3, 3)), np.empty(768, np.float32), np.ones(3, np.float32), np.zeros(3, np.float32)
    times, plus = (unit, none) if raw else (scale, shift)
    direct, held = kind == FLOAT32 and not last, 0
    made = whole.reshape(-1) if raw else (out if direct else packed.reshape(-1))
    apart = height * width if raw or direct else width
    for number in range(first, end):
        view = chosen[number]
        index = source[view]
        given = images[index, 0], images[index, 1], images[index, 2], images[index, 3], images[index, 4]
        image, means = window(given, matrix[view], kinds[view], boxes[view], height, width, m)
        address, rows, columns, pitch, channels = image
        exact, col, cx, cy, top, rx, ry = whole_pixels(m, kinds[view], rows, columns, height, width)
        exact &= channels > 1
        aligned = kinds[view] == AFFINE and m[0, 1] == 0 and m[1, 0] == 0 and not exact
        bends = kinds[view] == WARPED and np.any(elastic[view] != 0)
        tabled, bytewise = table[view] >= 0, exact and alone[view]
        if tabled:
            _level_table(colour, view, tables, table[view], bytewise, times, plus, lut)
        bent = warp[view]
        if bends:
            elastic_rows(elastic[view], nodes)
        if aligned:
            affine_row(m, 0, px, sy)
            fold(px, columns, border, True)
            sy[:] = 0
            locate(px, sy, TALL, columns, 1, channels, columns_at, across, low)
            aligned = columns_at.min() >= 0
        even, odd = -1, -1  # rows of the image whose means across are in r0, g0, b0 and in r1, g1, b1
        for y in range(height):
            start, step = (top + ry * y) * pitch + (col + cy * y) * channels, rx * pitch + cx * channels
            furthest = max(start, start + step * (width - 1))
            # A word of the last pixel of the image reaches beyond the memory.
            copied = exact and furthest < (rows - 1) * pitch + (columns - 1) * channels
            looked_up = copied and tabled and bytewise
            if copied:
                if rx == 0:
                    away = start + AHEAD * ry * pitch
                    _ask_row(address, away, away + step * (width - 1))
                if step == 3 and not looked_up:
                    _planes(address, start, red, green, blue)
                elif step == -3 and not looked_up:
                    _mirrored(address, start - 3 * (width - 1), red, green, blue)
                elif not looked_up:
                    _pixels(address, start, step, words)
                    _unpack(words, red, green, blue)
            else:
                place = np.float32(m[1, 1] * (y + 0.5) + m[1, 2] - 0.5)
                if aligned and place >= 0 and place < rows - 2:
                    row = np.int64(place)
                    share = place - np.float32(row)
                    later = address + np.int64(np.float32(m[1, 1] * (y + 0.5 + AHEAD) + m[1, 2])) * pitch
                    _ask_row(later, columns_at[0], columns_at[width - 1])
                    _ask_row(later + pitch, columns_at[0], columns_at[width - 1])
                    for wanted in range(row, row + 2):
                        if wanted & 1 == 0 and even != wanted:
                            _pairs(image, address + wanted * pitch, columns_at, above)
                            _across(upper, across, r0, g0, b0)
                            even = wanted
                        elif wanted & 1 == 1 and odd != wanted:
                            _pairs(image, address + wanted * pitch, columns_at, above)
                            _across(upper, across, r1, g1, b1)
                            odd = wanted
                    if row & 1:
                        share = np.float32(1) - share
                    _down(r0, r1, g0, g1, b0, b1, share, red, green, blue)
                else:
                    find_row(image, m, kinds[view], y, height, bent, nodes, bends, border, px, py, sx, sy, offset, right, low)
                    _ask(image, m, offset)
                    _gather(image, address, offset, sx, sy, right, low, border, fill, above, below)
                    _blend(upper, lower, right, low, red, green, blue)
            at = np.uint64(y * width if raw else ((view * 3 * height + y) * width if direct else 0))
            if looked_up:
                _look_up_pixels(address, start, step, width, lut, made, at, apart)
            elif tabled and (plain[view] or bytewise):
                _look_up(red, lut, 0, levels, np.float32(1), made, at)
                _look_up(green, lut, 1, levels, np.float32(1), made, at + np.uint64(apart))
                _look_up(blue, lut, 2, levels, np.float32(1), made, at + np.uint64(2 * apart))
            elif tabled:
                _recolour(red, green, blue, colour, view, unit, none, mixed, np.uint64(0), width)
                _look_up(mixed[:width], lut, 0, levels, np.float32(255), made, at)
                _look_up(mixed[width : 2 * width], lut, 1, levels, np.float32(255), made, at + np.uint64(apart))
                _look_up(mixed[2 * width :], lut, 2, levels, np.float32(255), made, at + np.uint64(2 * apart))
            elif alone[view]:
                _tint(red, green, blue, colour, view, times, plus, made, at, apart)
            else:
                _recolour(red, green, blue, colour, view, times, plus, made, at, apart)
            if not raw:
                if erase[view, 3] > erase[view, 1]:
                    _erase_row(erase[view], y, height, width, scale, shift, made, np.int64(at), apart)
                if not direct:
                    _pack(packed, view, y, height, width, out, bits, kind, last)
        if means.size > 0:
            held += means[0, 0, 0]
    return held


@njit(**OPTIONS)
@no_type_check
def store_view(whole, erase, view, scale, shift, out, bits, kind, last):
    """A view of values (3, height, width), clipped to [0, 1], erased and normalised into the output."""
    _, height, width = whole.shape
    values, packed = whole.reshape(-1), np.empty((3, width), np.float32)
    direct = kind == FLOAT32 and not last
    made, apart = (out, height * width) if direct else (packed.reshape(-1), width)
    for y in range(height):
        at = (view * 3 * height + y) * width if direct else 0
        for c in range(3):
            _clip(values, np.uint64((c * height + y) * width), width, scale[c], shift[c], made, np.uint64(at + c * apart))
        if erase[3] > erase[1]:
            _erase_row(erase, y, height, width, scale, shift, made, at, apart)
        if not direct:
            _pack(packed, view, y, height, width, out, bits, kind, last)


@njit(**OPTIONS)
@no_type_check
def _clip(values, start, width, times, plus, made, at):
    zero, one = np.float32(0), np.float32(1)
    for x in range(width):
        made[at + np.uint64(x)] = min(max(values[start + np.uint64(x)], zero), one) * times + plus
