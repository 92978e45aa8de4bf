"""Compiled: the part of a scaled image that a model sees, without scaling the rest.

The weights are Pillow's (antialiased when shrinking), so the pixels are Pillow's within a level: it rounds between its two passes, this does not.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple, no_type_check

import numpy as np
from jaxtyping import Float, Int, UInt8
from numba import njit

KERNELS = {"box": 0.5, "bilinear": 1.0}
"""Filters without negative weights, and their radius in pixels of the target: the others overshoot, which Pillow clips between its passes."""


class Taps(NamedTuple):
    """For each pixel of a line what it is made of."""

    first: Int[np.ndarray, " out"]
    weights: Float[np.ndarray, "out taps"]  # rows sum to 1; 0 beyond the line's end


@functools.lru_cache(maxsize=256)
def taps(filter_: str, given: int, length: float, scaled: int, start: int, count: int) -> Taps:
    """Pixels start … start + count − 1 of a line of `given` pixels, of which the first `length` are scaled to `scaled`.

    Centre c = (x + ½) · length / scaled; the filter is as wide as a target pixel when shrinking, as a source pixel when enlarging.
    """
    radius = KERNELS[filter_]
    scale = length / scaled
    wide = max(scale, 1.0)
    centre = (np.arange(start, start + count) + 0.5) * scale
    first = np.maximum((centre - radius * wide + 0.5).astype(np.int64), 0)
    last = np.minimum((centre + radius * wide + 0.5).astype(np.int64), given)
    places = first[:, None] + np.arange(math.ceil(2 * radius * wide) + 2)
    distance = (places + 0.5 - centre[:, None]) / wide
    weights = (distance > -0.5) & (distance <= 0.5) if filter_ == "box" else np.maximum(1 - np.abs(distance), 0)
    weights = np.where(places < last[:, None], weights, 0.0)
    weights = weights[:, : int((last - first).max())]
    return Taps(first, (weights / weights.sum(1, keepdims=True)).astype(np.float32))


@njit(nogil=True, cache=True, fastmath=True, error_model="numpy")
@no_type_check
def _resample(pixels, rows, row_weights, columns, column_weights, out):
    taps_down, taps_across = row_weights.shape[1], column_weights.shape[1]
    left, right = columns[0] * 3, min(columns[-1] + taps_across, pixels.shape[1]) * 3
    flat = pixels.reshape(pixels.shape[0], pixels.shape[1] * 3)
    line = np.zeros(right - left + taps_across * 3, np.float32)  # of the source's columns; some more that weigh nothing
    for y in range(out.shape[0]):
        line[: right - left] = 0
        for tap in range(min(taps_down, pixels.shape[0] - rows[y])):
            weight, source = row_weights[y, tap], flat[rows[y] + tap, left:right]
            for i in range(right - left):
                line[i] += weight * np.float32(source[i])
        for x in range(out.shape[1]):
            red, green, blue = np.float32(0.5), np.float32(0.5), np.float32(0.5)  # of rounding
            place = columns[x] * 3 - left
            for tap in range(taps_across):
                weight = column_weights[x, tap]
                red += weight * line[place]
                green += weight * line[place + 1]
                blue += weight * line[place + 2]
                place += 3
            out[y, x, 0] = np.uint8(min(red, np.float32(255)))
            out[y, x, 1] = np.uint8(min(green, np.float32(255)))
            out[y, x, 2] = np.uint8(min(blue, np.float32(255)))


def window(
    pixels: UInt8[np.ndarray, "height width 3"],
    scaled: tuple[int, int],
    place: tuple[int, int, int, int],
    filter_: str,
    length: tuple[float, float] | None = None,
) -> UInt8[np.ndarray, "rows columns 3"]:
    """Pixels top, left, rows, columns of an image scaled to (height, width); `length` says how much of its own height and width that is, all by default."""
    top, left, high, wide = place
    size, own = pixels.shape[:2], length or pixels.shape[:2]
    down = taps(filter_, size[0], float(own[0]), scaled[0], top, high)
    across = taps(filter_, size[1], float(own[1]), scaled[1], left, wide)
    out = np.empty((high, wide, 3), np.uint8)
    _resample(np.ascontiguousarray(pixels), *down, *across, out)
    return out
