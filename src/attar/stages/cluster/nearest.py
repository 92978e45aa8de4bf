"""Compiled: the nearest centroid of each row, and bounds that tell which rows need not be looked at again.

Bounds (Ding et al. 2015, Yinyang k-means): of each row an upper bound of the distance to its own centroid, and for each group of
centroids a lower bound of the distance to the nearest other one. When centroids move by at most δ, distances change by at most δ.
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np
from numba import njit

OPTIONS = {"nogil": True, "cache": True, "fastmath": {"reassoc", "nsz", "contract", "nnan"}, "error_model": "numpy"}
FAR = np.float32(3e38)

# A compiled function cannot be wrapped, so the checks of shapes that the tests switch on are kept away: @no_type_check.


@njit(**OPTIONS)
@no_type_check
def fold_group(products, column, first, last, half, group, rows, squares, best, label, owner, lower):
    """Takes the centroids first … last − 1, one group, into account for some rows.

    products (m, ·) x · c, from `column` on those of the group; half (k,) ‖c‖²/2; rows (m,) places of the rows in what follows:
    squares (n,) ‖x‖²; best (n,) the lowest ‖c‖²/2 − x·c so far, label its centroid, owner its group; lower (n, groups) distances to
    the nearest centroid of each group, without the row's own.
    """
    for i in range(rows.size):
        row = rows[i]
        low = FAR
        for c in range(last - first):
            low = min(low, half[first + c] - products[i, column + c])
        if low < best[row]:
            at, second = -1, FAR
            for c in range(last - first):
                value = half[first + c] - products[i, column + c]
                if value == low and at < 0:
                    at = c
                elif value < second:
                    second = value
            if owner[row] >= 0:
                lower[row, owner[row]] = np.sqrt(max(2 * best[row] + squares[row], np.float32(0)))
            best[row], label[row], owner[row] = low, first + at, group
            low = second
        lower[row, group] = np.sqrt(max(2 * low + squares[row], np.float32(0))) if low < FAR else FAR


@njit(**OPTIONS)
@no_type_check
def loosen(label, upper, lower, moved, most):
    """Bounds after the centroids moved by `moved` (k,), those of each group by at most `most` (groups,); rows that may have a nearer one."""
    rows = np.empty(label.size, np.int64)
    count = 0
    for row in range(label.size):
        upper[row] += moved[label[row]]
        low = FAR
        for group in range(most.size):
            lower[row, group] -= most[group]
            low = min(low, lower[row, group])
        if low < upper[row]:
            rows[count] = row
            count += 1
    return rows[:count]


@njit(**OPTIONS)
@no_type_check
def tighten(x, rows, centroids, label, upper, lower, groups):
    """The exact distance to the own centroid of rows x (m, d); which of them (places in x) still may have a nearer one, in which groups."""
    kept = np.empty(rows.size, np.int64)
    needed = np.zeros((rows.size, lower.shape[1]), np.bool_)
    count = 0
    for i in range(rows.size):
        row, own = rows[i], label[rows[i]]
        total = np.float32(0)
        for j in range(x.shape[1]):
            difference = x[i, j] - centroids[own, j]
            total += difference * difference
        upper[row] = np.sqrt(total)
        wanted = False
        for group in range(lower.shape[1]):
            if lower[row, group] < upper[row]:
                needed[count, group] = wanted = True
        if wanted:
            needed[count, groups[own]] = True
            kept[count] = i
            count += 1
    return kept[:count], needed[:count]


@njit(**OPTIONS)
@no_type_check
def accumulate(x, before, after, sums, counts):
    """Moves rows (m, d) from the sums (k, d) of the centroids `before` (m,) (−1: from none) to those of `after`."""
    for i in range(after.size):
        old, new = before[i], after[i]
        if old == new:
            continue
        counts[new] += 1
        for j in range(x.shape[1]):
            sums[new, j] += x[i, j]
        if old >= 0:
            counts[old] -= 1
            for j in range(x.shape[1]):
                sums[old, j] -= x[i, j]
