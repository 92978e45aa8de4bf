"""Compiled: JPEGs straight to a quarter or an eighth of their sides.

What binds there are the bits, which all have to be gone through. Here two coefficients are looked up at once, and at an eighth, where brightness needs
the first of each block alone, the others are stepped over. A pixel is the mean of its box of the full image, which is a weighted sum of the block's
coefficients: the transform, averaged. libjpeg-turbo takes the same means in integers (jidctred.c), and as there chroma that is stored at half of the
sides is made at twice the size, so that nothing is enlarged: pixels differ by a level or two of rounding.

Only what cameras and most programs write is read: one interleaved baseline scan, grey or YCbCr, brightness once or twice as fine as chroma. Of
all else, and of what is not exactly as the standard has it (ITU-T T.81), nothing is made: a library has to see to it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float32, Int16, Int32, Int64, UInt8, UInt16
from numba import njit

from attar.modalities.jpeg import SCAN, segments

OPTIONS = {"nogil": True, "cache": True, "fastmath": True, "error_model": "numpy"}
U = np.uint64
BITS, VALUED_BITS = 13, 11
"""Bits looked up at once, without and with values: more of them find more coefficients, and drive the tables out of the nearest cache."""
LOOKS = 3
"""Looks into a word, which has 57 bits at least: 13 for a first coefficient, and three times 13."""
END = 128
"""Coefficients that the end of a block counts for: more than there are."""
ROOM = 512
"""Bytes that may be read beyond the end: a block of damaged data, at most 64 times 31 bits, and a word."""
DOWN, ACROSS = (
    np.array(axis) for axis in zip(*sorted(((v, u) for v in range(8) for u in range(8)), key=lambda at: (sum(at), at[1 - sum(at) % 2])))
)
"""Vertical and horizontal frequency of every coefficient, in the order they are stored in (zigzag)."""


class Component(NamedTuple):
    """Brightness or one of the chromas, as the headers have it."""

    across: int  # its blocks side by side in an MCU
    down: int
    quantisation: bytes  # 64 steps, zigzag
    dc: bytes  # 16 numbers of codes by length, then the symbols
    ac: bytes


class Header(NamedTuple):
    """What has to be known to read a scan."""

    size: tuple[int, int]  # width, height
    components: tuple[Component, ...]
    restart: int  # MCUs between restart markers, 0 where there are none
    start: int  # the scan's first byte


def header(data: bytes) -> Header | None:
    """The header of a file of the kind that is read here; None for others, and for what is damaged."""
    try:
        found = _header(data)
    except (IndexError, KeyError):  # it ends too early, or names tables it has not
        return None
    return found if found and _readable(found) else None


def _header(data: bytes) -> Header | None:
    quantisation: dict[int, bytes] = {}
    codes: dict[int, bytes] = {}
    frame, scan, restart, coloured, start = b"", b"", 0, True, 0
    for marker, body, end in segments(data):
        if marker == SCAN:
            scan, start = body, end
        elif marker in (0xC0, 0xC1):
            frame = body
        elif marker == 0xC4:
            while body:
                size = 17 + sum(body[1:17])
                codes[body[0]], body = body[1:size], body[size:]
        elif marker == 0xDB:
            while body:
                quantisation[body[0]], body = body[1:65], body[65 + 64 * (body[0] >> 4) :]  # of 16 bits: under numbers nothing asks for
        elif marker == 0xDD:
            restart = body[0] << 8 | body[1]
        elif marker == 0xEE and body.startswith(b"Adobe"):
            coloured = body[11] == 1
        elif marker != 0xFE and not 0xE0 <= marker <= 0xEF:
            return None
    count = frame[5]
    own, named = frame[6 : 6 + 3 * count], scan[1 : 1 + 2 * count]
    plain = frame[0] == 8 and scan[0] == count and named[::2] == own[::3] and scan[1 + 2 * count :] == b"\0\x3f\0"
    if not plain or not coloured or own[::3] == b"RGB" or start > len(data):
        return None
    parts = [
        Component(sampling >> 4, sampling & 15, quantisation[steps], codes[tables >> 4], codes[16 | tables & 15])
        for sampling, steps, tables in zip(own[1::3], own[2::3], named[1::2])
    ]
    if count == 1:
        parts = [parts[0]._replace(across=1, down=1)]  # whatever it says: alone in a scan it has a block an MCU
    return Header((frame[3] << 8 | frame[4], frame[1] << 8 | frame[2]), tuple(parts), restart, start)


def _readable(found: Header) -> bool:
    """Whether all is of the kind that is read here, and whole."""
    first, *rest = found.components
    return (
        len(rest) in (0, 2)
        and 0 not in found.size
        and all({one.across, one.down} <= {1, 2} for one in found.components)
        and all(one.across <= first.across and one.down <= first.down for one in rest)
        and all(len(one.quantisation) == 64 for one in found.components)
        and all(_codes(one.dc) is not None and _codes(one.ac) is not None and max(one.dc[16:]) < 12 for one in found.components)
    )


@functools.lru_cache(maxsize=32)
def _codes(table: bytes) -> UInt16[np.ndarray, "65536"] | None:
    """By the next 16 bits, the length and the symbol of the code they begin with, as length · 2⁸ + symbol; 0 where there is none. None for no table."""
    counts, symbols = table[:16], iter(table[16:])
    if len(table) != 16 + sum(counts) or len(table) == 16:
        return None
    found, at = np.zeros(1 << 16, np.uint16), 0
    for length, count in enumerate(counts, 1):
        step = 1 << 16 - length
        if at + count * step > len(found):
            return None
        for _ in range(count):
            found[at : at + step] = length << 8 | next(symbols)
            at += step
    return found


class Tables(NamedTuple):
    """What the next bits mean, by every table of a file; where they hold no whole coefficient, 0.

    In `first` one coefficient, as bits | value · 2¹⁶; in `skipped` as many as there are, as bits | how many · 2⁵; in `valued` one or two, as
    bits | how many · 2⁵ | how many with the first · 2¹³ | first value · 2³² | second · 2⁴⁸. Zeros before a coefficient are counted with it.
    """

    codes: UInt16[np.ndarray, "tables 65536"]  # _codes
    first: Int32[np.ndarray, "tables 8192"]
    skipped: Int16[np.ndarray, "tables 8192"]
    valued: Int64[np.ndarray, "tables 2048"]


@functools.lru_cache(maxsize=8)
def _tables(specified: tuple[bytes, ...]) -> Tables:
    """Tables of the headers' descriptions; 1 ms, so those of a camera or program are kept."""
    codes = np.stack([_codes(one) for one in specified])  # type: ignore[misc]
    made = Tables(
        codes,
        np.zeros((len(codes), 1 << BITS), np.int32),
        np.zeros((len(codes), 1 << BITS), np.int16),
        np.zeros((len(codes), 1 << VALUED_BITS), np.int64),
    )
    _look_up(*made)
    return made


@functools.lru_cache(maxsize=16)
def _weights(quantisation: bytes, height: int, width: int) -> Float32[np.ndarray, "256 16"]:
    """What a unit of each coefficient adds to each of the height × width pixels that are made of a block; rows beyond the 64th are zero.

    The inverse transform of T.81, A.3.3, averaged over boxes, times the quantiser's step.
    """
    place, frequency = np.arange(8)[:, None], np.arange(8)
    waves = np.cos((2 * place + 1) * frequency * np.pi / 16) * np.where(frequency == 0, np.sqrt(0.5), 1) / 2
    down, across = (waves.reshape(count, 8 // count, 8).mean(1) for count in (height, width))
    found = np.zeros((256, 16), np.float32)
    found[:64, : height * width] = np.einsum("yz,xz->zyx", down[:, DOWN], across[:, ACROSS]).reshape(64, -1)
    found[:64] *= np.frombuffer(quantisation, np.uint8)[:, None]
    return found


def decode(data: bytes, size: tuple[int, int], reduction: int) -> UInt8[np.ndarray, "height width 3"] | None:
    """RGB pixels of a file of (width, height) with sides ⌈side / reduction⌉, 8 or 4; None for what is not read here."""
    found = header(data)
    if found is None or found.size != size:
        return None
    parts, (width, height) = found.components, size
    most_across, most_down = parts[0].across, parts[0].down
    across, down = -(-width // (8 * most_across)), -(-height // (8 * most_down))
    intervals = -(-across * down // found.restart) if found.restart else 1
    scan, ends = np.zeros(len(data) - found.start + ROOM, np.uint8), np.zeros(intervals, np.int64)
    if not _unstuff(np.frombuffer(data, np.uint8), found.start, scan, ends):
        return None
    tables = tuple(dict.fromkeys(table for one in parts for table in (one.dc, one.ac)))
    shapes = [(8 // reduction * most_down // one.down, 8 // reduction * most_across // one.across) for one in parts]
    planes = np.empty((len(parts), down * most_down * 8 // reduction, across * most_across * 8 // reduction), np.uint8)
    blocks = [
        (
            number,
            tables.index(one.dc),
            tables.index(one.ac),
            *shape,
            np.ravel_multi_index((number, y * shape[0], x * shape[1]), planes.shape),
        )
        for number, (one, shape) in enumerate(zip(parts, shapes))
        for y in range(one.down)
        for x in range(one.across)
    ]
    weights = np.stack([_weights(one.quantisation, *shape) for one, shape in zip(parts, shapes)])
    if not _read(scan, ends, found.restart or across * down, np.array(blocks), weights, *_tables(tables), planes, down, across):
        return None
    out = np.empty((-(-height // reduction), -(-width // reduction), 3), np.uint8)
    _colour(planes, out)
    return out


@njit(**OPTIONS, inline="always")
@no_type_check
def _coefficient(codes, table, word):
    """Bits, coefficients passed and value of the first coefficient in the word, whatever its length; 0 bits where there is no such code."""
    found = np.int64(codes[table, np.int64(word >> U(48))])
    length, run, size = found >> 8, found >> 4 & 15, found & 15
    value = np.int64(0)
    if size:
        value = np.int64(word << U(length) >> U(64 - size))
        if value < 1 << (size - 1):
            value += 1 - (1 << size)
    return length + size if length else 0, run + 1 if found & 255 else END, value


@njit(**OPTIONS)
@no_type_check
def _look_up(codes, first, skipped, valued):
    """Fills the tables by reading what each number of BITS or VALUED_BITS holds, one coefficient after the other."""
    for table in range(len(codes)):
        for bits in range(1 << BITS):
            used, passed = 0, 0
            while passed < 64 and used < BITS:
                length, run, value = _coefficient(codes, table, U(bits) << U(64 - BITS + used))
                if length == 0 or used + length > BITS:
                    break
                if used == 0:
                    first[table, bits] = length | value << 16
                used, passed = used + length, passed + run
            skipped[table, bits] = used | passed << 5
        for bits in range(1 << VALUED_BITS):
            used, passed, entry = 0, 0, 0
            for place in range(2):
                if used == VALUED_BITS or passed >= END:
                    break
                length, run, value = _coefficient(codes, table, U(bits) << U(64 - VALUED_BITS + used))
                if length == 0 or used + length > VALUED_BITS:
                    break
                used, passed = used + length, passed + run
                entry |= (value & 0xFFFF) << (32 + 16 * place)
                if place == 0:
                    entry |= (run & 127) << 13  # of the end, which has no value, nothing
            valued[table, bits] = entry | used | passed << 5


@njit(**OPTIONS, inline="always")
@no_type_check
def _word(scan, at):
    """The 64 bits from byte `at` on, the first one on top; compiled into one load."""
    place = U(at)
    word = U(scan[place]) << U(56) | U(scan[place + U(1)]) << U(48) | U(scan[place + U(2)]) << U(40) | U(scan[place + U(3)]) << U(32)
    return word | U(scan[place + U(4)]) << U(24) | U(scan[place + U(5)]) << U(16) | U(scan[place + U(6)]) << U(8) | U(scan[place + U(7)])


@njit(**OPTIONS, inline="always")
@no_type_check
def _from(scan, bit):
    """The next 57 bits or more, on top of a word."""
    return _word(scan, bit >> 3) << U(bit & 7)


@njit(**OPTIONS)
@no_type_check
def _unstuff(data, start, scan, ends):
    """Copies the scan without the zeros after bytes of 255 and without markers; where each interval ends. Whether all are there, and the end after them."""
    at, made, interval = start, 0, 0
    while at + 1 < len(data):
        if at + 8 <= len(data):
            word = _word(data, at)
            if (~word - U(0x0101010101010101)) & word & U(0x8080808080808080) == U(0):  # no byte is 255
                for place in range(8):
                    scan[made + place] = data[at + place]
                at, made = at + 8, made + 8
                continue
        scan[made] = data[at]
        if data[at] != 255:
            at, made = at + 1, made + 1
            continue
        after = data[at + 1]
        at += 2
        if after == 0:
            made += 1
            continue
        ends[interval] = made
        interval += 1
        if interval == len(ends):
            return after == 0xD9
        if after != 0xD0 + (interval - 1) % 8:
            return False
    return False


@njit(**OPTIONS, inline="always")
@no_type_check
def _alone(scan, bit, k, table, codes):
    """The place after the coefficient at `bit` (-1 for damage), the bit after it, and its value: where a look finds no whole one, or too many."""
    length, run, value = _coefficient(codes, table, _from(scan, bit))
    return -1 if length == 0 or 64 < k + run < END else k + run, bit + length, np.float32(value)


@njit(**OPTIONS, inline="always")
@no_type_check
def _beyond(passed):
    """Whether a look that gets to this place went on into the next block."""
    return 64 < passed < END or passed >= END + 64


@njit(**OPTIONS, inline="always")
@no_type_check
def _skip(scan, bit, word, table, codes, skipped):
    """The bit after a block whose coefficients nobody needs; -1 for damage."""
    k = 1
    while True:
        for _ in range(LOOKS):
            entry = np.int64(skipped[table, np.int64(word >> U(64 - BITS))])
            passed = k + (entry >> 5)
            if entry == 0 or _beyond(passed):
                break
            k, bit, word = passed, bit + (entry & 31), word << U(entry & 31)
            if k >= 64:
                return bit
        else:
            word = _from(scan, bit)
            continue
        k, bit, _ = _alone(scan, bit, k, table, codes)
        if k < 0 or k >= 64:
            return bit if k > 0 else -1
        word = _from(scan, bit)


@njit(**OPTIONS, inline="always")
@no_type_check
def _four(scan, bit, word, table, codes, valued, level, weights, component):
    """The bit after a block (-1 for damage), and its 2 × 2 pixels, row by row."""
    k, a, b, c, d = 1, level, level, level, level
    while True:
        for _ in range(LOOKS):
            entry = valued[table, np.int64(word >> U(64 - VALUED_BITS))]
            passed = k + (entry >> 5 & 255)
            if entry == 0 or _beyond(passed):
                break
            one, two = k + (entry >> 13 & 127) - 1, passed - 1
            first, second = np.float32(entry << 16 >> 48), np.float32(entry >> 48)
            a += first * weights[component, one, 0] + second * weights[component, two, 0]
            b += first * weights[component, one, 1] + second * weights[component, two, 1]
            c += first * weights[component, one, 2] + second * weights[component, two, 2]
            d += first * weights[component, one, 3] + second * weights[component, two, 3]
            k, bit, word = passed, bit + (entry & 31), word << U(entry & 31)
            if k >= 64:
                return bit, a, b, c, d
        else:
            word = _from(scan, bit)
            continue
        k, bit, first = _alone(scan, bit, k, table, codes)
        if k < 0:
            return -1, a, b, c, d
        a += first * weights[component, k - 1, 0]
        b += first * weights[component, k - 1, 1]
        c += first * weights[component, k - 1, 2]
        d += first * weights[component, k - 1, 3]
        if k >= 64:
            return bit, a, b, c, d
        word = _from(scan, bit)


@njit(**OPTIONS, inline="always")
@no_type_check
def _some(scan, bit, word, table, codes, valued, level, weights, component, pixels):
    """The bit after a block (-1 for damage); its pixels, 16 or fewer, row by row, go to `pixels`."""
    k = 1
    for i in range(16):
        pixels[i] = level
    while True:
        for _ in range(LOOKS):
            entry = valued[table, np.int64(word >> U(64 - VALUED_BITS))]
            passed = k + (entry >> 5 & 255)
            if entry == 0 or _beyond(passed):
                break
            one, two = k + (entry >> 13 & 127) - 1, passed - 1
            first, second = np.float32(entry << 16 >> 48), np.float32(entry >> 48)
            if passed != k + END:  # the end at once adds nothing
                for i in range(16):
                    pixels[i] += first * weights[component, one, i] + second * weights[component, two, i]
            k, bit, word = passed, bit + (entry & 31), word << U(entry & 31)
            if k >= 64:
                return bit
        else:
            word = _from(scan, bit)
            continue
        k, bit, first = _alone(scan, bit, k, table, codes)
        if k < 0:
            return -1
        for i in range(16):
            pixels[i] += first * weights[component, k - 1, i]
        if k >= 64:
            return bit
        word = _from(scan, bit)


@njit(**OPTIONS, inline="always")
@no_type_check
def _level(value):
    return np.uint8(min(max(value, np.float32(0)), np.float32(255)))


@njit(**OPTIONS)
@no_type_check
def _read(scan, ends, restart, blocks, weights, codes, first, skipped, valued, planes, down, across):
    """Fills the planes, block by block; whether the scan held these and nothing else.

    `blocks` are those of an MCU: component, table of the first and of other coefficients, height and width in pixels, place in the first MCU's planes.
    Masks say that numbers are not negative, which indices are asked about otherwise.
    """
    bit, interval, left = 0, 0, restart
    before, pixels = np.zeros(4, np.int64), np.empty(16, np.float32)
    flat, pitch = planes.reshape(-1), planes.shape[2]
    tall, wide = planes.shape[1] // down, planes.shape[2] // across
    for row in range(down):
        for column in range(across):
            if left == 0:
                if not 0 <= 8 * ends[interval] - bit < 8:
                    return False
                bit, interval, left = 8 * ends[interval], interval + 1, restart
                before[:] = 0
            left -= 1
            corner = row * tall * pitch + column * wide
            for block in range(len(blocks)):
                component, dc, ac = blocks[block, 0] & 3, blocks[block, 1] & 7, blocks[block, 2] & 7
                height, width, at = blocks[block, 3], blocks[block, 4], (corner + blocks[block, 5]) & (1 << 40) - 1
                word = _from(scan, bit)
                entry = np.int64(first[dc, np.int64(word >> U(64 - BITS))])
                if entry:
                    before[component] += entry >> 16
                    bit, word = bit + (entry & 31), word << U(entry & 31)
                else:
                    length, _, value = _coefficient(codes, dc, word)
                    if length == 0:
                        return False
                    before[component] += value
                    bit += length
                    word = _from(scan, bit)
                level = np.float32(before[component]) * weights[component, 0, 0] + np.float32(128.5)
                if width * height == 1:
                    bit = _skip(scan, bit, word, ac, codes, skipped)
                    flat[at] = _level(level)
                elif width * height == 4:
                    bit, a, b, c, d = _four(scan, bit, word, ac, codes, valued, level, weights, component)
                    flat[at], flat[at + 1] = _level(a), _level(b)
                    flat[at + pitch], flat[at + pitch + 1] = _level(c), _level(d)
                else:
                    bit = _some(scan, bit, word, ac, codes, valued, level, weights, component, pixels)
                    for y in range(height):
                        for x in range(width):
                            flat[at + y * pitch + x] = _level(pixels[width * y + x])
                if bit < 0 or bit > 8 * ends[interval]:  # asked of every block: what is read beyond the end is bounded by it
                    return False
    return 0 <= 8 * ends[-1] - bit < 8


@njit(**OPTIONS)
@no_type_check
def _colour(planes, out):
    """RGB of planes that may be a little larger: grey, or YCbCr (JFIF, ITU-R BT.601)."""
    half, middle, width = np.float32(0.5), np.float32(128), out.shape[1]
    red, green, blue = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    for y in range(len(out)):
        level, line = planes[0, y], out[y].reshape(-1)
        if len(planes) == 1:
            for x in range(width):
                line[3 * x] = line[3 * x + 1] = line[3 * x + 2] = level[x]
            continue
        to_blue, to_red = planes[1, y], planes[2, y]
        for x in range(width):
            u, v, bright = np.float32(to_blue[x]) - middle, np.float32(to_red[x]) - middle, np.float32(level[x]) + half
            red[x], blue[x] = bright + np.float32(1.402) * v, bright + np.float32(1.772) * u
            green[x] = bright - np.float32(0.344136) * u - np.float32(0.714136) * v
        for x in range(width):
            line[3 * x], line[3 * x + 1], line[3 * x + 2] = _level(red[x]), _level(green[x]), _level(blue[x])
