"""The same picture, though encoded again, brighter, mirrored or cut out: what is compared, from 32 × 32 grey thumbnails alone.

Re-encoding, scaling and brightness leave the correlation of two thumbnails near 1, a mirror image that with the mirrored thumbnail. A part of a
picture is found in two steps: its coarse pattern is compared with that of WINDOWS of the other picture, so that it lies within half a cell of
one of them, and then laid on that picture as well as it fits.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from numba import njit
from scipy.fft import dctn

SIDE = 32  # of a thumbnail
CELLS = 16  # of what is correlated
COARSE = 5  # cells of a coarse pattern
SCALES = (0.9, 0.82, 0.74)  # of the windows' sides; a part of 0.7 to 0.95 is near one of them
STEPS = 4  # places of a window along each side
FLAT = 2.0  # grey levels of standard deviation below which there is no pattern
OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "fastmath": {"reassoc", "contract", "nsz", "nnan"}}


class Window(NamedTuple):
    """A square part of a picture, in units of its sides."""

    left: float
    top: float
    scale: float


WINDOWS = tuple(
    Window(x * (1 - scale) / (STEPS - 1), y * (1 - scale) / (STEPS - 1), scale)
    for scale in SCALES
    for x, y in itertools.product(range(STEPS), repeat=2)
)


def _directions(values: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), np.float32(1e-6))


def has_pattern(thumbs: UInt8[np.ndarray, "n side side"]) -> np.ndarray:
    """Which thumbnails are not blank: (n,) bool."""
    return thumbs.std((1, 2), dtype=np.float32) >= FLAT


def patterns(thumbs: UInt8[np.ndarray, "n side side"]) -> Float32[np.ndarray, "n cells"]:
    """Unit vectors (n, 256) whose scalar products are the Pearson correlations of the thumbnails at 16 × 16."""
    cells = _small(thumbs).reshape(len(thumbs), CELLS * CELLS)
    return _directions(cells - cells.mean(1, keepdims=True))


def _means(start: float, length: float) -> Float32[np.ndarray, "cells side"]:
    """Weights that average COARSE equal parts of [start, start + length] out of SIDE pixels over [0, 1]."""
    edges = SIDE * (start + length * np.arange(COARSE + 1) / COARSE)
    low, high = np.maximum(edges[:-1, None], np.arange(SIDE)), np.minimum(edges[1:, None], np.arange(SIDE) + 1)
    shares = np.maximum(high - low, 0)
    return (shares / shares.sum(1, keepdims=True)).astype(np.float32)


def coarse_patterns(thumbs: UInt8[np.ndarray, "n side side"], window: Window) -> Float32[np.ndarray, "n d"]:
    """Unit vectors (n, 24) of a window's 5 × 5 cells: cosine transform, weighted by frequency since natural pictures have amplitudes of 1/f."""
    rows, columns = _means(window.top, window.scale), _means(window.left, window.scale)
    cells = rows @ thumbs.astype(np.float32) @ columns.T
    waves = dctn(cells, axes=(1, 2), norm="ortho") * np.hypot(*np.mgrid[:COARSE, :COARSE]).astype(np.float32)
    return _directions(waves.reshape(len(thumbs), -1)[:, 1:])


@njit(**OPTIONS)
def _correlation(part, whole, left, top, scale):  # numba compiles types, not shapes
    """Pearson correlation of a 16 × 16 picture with a window of another, whose pixels are means of 2 × 2."""
    sum_a = sum_b = sum_aa = sum_bb = sum_ab = 0.0
    for i in range(CELLS):
        y = (top + scale * (i + 0.5) / CELLS) * SIDE - 1
        y = min(max(y, 0.0), SIDE - 2.0 - 1e-6)
        y0 = int(y)
        fy = y - y0
        for j in range(CELLS):
            x = (left + scale * (j + 0.5) / CELLS) * SIDE - 1
            x = min(max(x, 0.0), SIDE - 2.0 - 1e-6)
            x0 = int(x)
            fx = x - x0
            above = whole[y0, x0] * (1 - fx) + whole[y0, x0 + 1] * fx
            below = whole[y0 + 1, x0] * (1 - fx) + whole[y0 + 1, x0 + 1] * fx
            a, b = part[i, j], above * (1 - fy) + below * fy
            sum_a += a
            sum_b += b
            sum_aa += a * a
            sum_bb += b * b
            sum_ab += a * b
    n = CELLS * CELLS
    spread = (sum_aa - sum_a * sum_a / n) * (sum_bb - sum_b * sum_b / n)
    return (sum_ab - sum_a * sum_b / n) / np.sqrt(spread) if spread > 1e-6 else 0.0


@njit(**OPTIONS)
def _fit(parts, wholes, left, top, scale):
    """Moves each window to where its part correlates best: coordinates in turn, in halving steps; gives up where little is alike."""
    moves = ((1.0, 0.0, 0.0), (-1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, -1.0, 0.0), (-0.5, -0.5, 1.0), (0.5, 0.5, -1.0))
    for n in range(len(parts)):
        best = _correlation(parts[n], wholes[n], left[n], top[n], scale[n])
        step = 0.04
        while step > 0.004:
            moved = False
            for dx, dy, ds in moves:
                s = min(max(scale[n] + ds * step, 0.5), 1.0)
                x = min(max(left[n] + dx * step, 0.0), 1 - s)
                y = min(max(top[n] + dy * step, 0.0), 1 - s)
                value = _correlation(parts[n], wholes[n], x, y, s)
                if value > best + 1e-9:
                    best, moved = value, True
                    left[n], top[n], scale[n] = x, y, s
            if not moved:
                step /= 2


def _small(thumbs: UInt8[np.ndarray, "n side side"]) -> Float32[np.ndarray, "n cells cells"]:
    return thumbs.reshape(len(thumbs), CELLS, SIDE // CELLS, CELLS, SIDE // CELLS).mean((2, 4), dtype=np.float32)


def _detail(pictures: Float32[np.ndarray, "n cells cells"]) -> Float32[np.ndarray, "n c2"]:
    """What is left without the mean of 3 × 3, as unit vectors."""
    padded = np.pad(pictures, ((0, 0), (1, 1), (1, 1)), mode="edge")
    mean = sum(padded[:, i : i + CELLS, j : j + CELLS] for i in range(3) for j in range(3)) / np.float32(9)
    left = (pictures - mean).reshape(len(pictures), -1)
    return _directions(left - left.mean(1, keepdims=True))


def likeness(
    parts: UInt8[np.ndarray, "n side side"], wholes: UInt8[np.ndarray, "n side side"], window: Window, *, search: bool = False
) -> tuple[Float32[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """How alike each part is to a window of its whole: (n,) correlation of what is left of both, at 16 × 16, without their coarse pattern.

    −1 … 1. Planted copies (encoded again, brighter, mirrored, cut out) of 32 × 32 photos stay above 0.9, most other pairs that correlate below 0.65. With `search` the window
    is first moved to where the pictures fit best; the scale of the window comes second.
    """
    rows = wholes.astype(np.float32)
    rows = rows[:, 1:] + rows[:, :-1]
    large = (rows[:, :, 1:] + rows[:, :, :-1]) * np.float32(0.25)
    left, top, scale = (np.full(len(parts), value) for value in window)
    small = _small(parts)
    if search:
        _fit(small, large, left, top, scale)
    grid = (np.arange(CELLS) + 0.5) / CELLS
    (y, fy), (x, fx) = (_pixels((start[:, None] + scale[:, None] * grid) * SIDE - 1) for start in (top, left))
    row, column, n = y[:, :, None], x[:, None], np.arange(len(parts))[:, None, None]
    above = large[n, row, column] * (1 - fx[:, None]) + large[n, row, column + 1] * fx[:, None]
    below = large[n, row + 1, column] * (1 - fx[:, None]) + large[n, row + 1, column + 1] * fx[:, None]
    laid = above * (1 - fy[:, :, None]) + below * fy[:, :, None]
    return np.einsum("nd,nd->n", _detail(small), _detail(laid.astype(np.float32))), scale.astype(np.float32)


def _pixels(place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pixel before each place, and how far beyond it the place lies."""
    place = place.clip(0, SIDE - 2 - 1e-6)
    before = place.astype(np.int64)
    return before, place - before
