"""Lloyd iterations over vectors that are read in blocks, in memory that does not grow with their length.

Of each row a few bytes of bounds are kept (as many as BOUNDS allows), which spare most of the distances once the centroids move
little; the result is that of plain Lloyd iterations up to float noise.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning

from attar.errors import DataError
from attar.stages.cluster import nearest
from attar.stages.cluster.rows import Rows
from attar.stages.cluster.space import unit

BOUNDS = 128 << 20  # bytes kept of all rows together; more than 11 million rows are looked at afresh in every iteration
GROUPED = 16  # centroids in a group at least
CHUNK = 512  # rows multiplied at a time: their products with 1,000 centroids are 2 MB, so that they stay in the cache
DENSE = 0.4  # share of (row, group) pairs above which all products are computed: one large one is faster than many small ones


class Form(NamedTuple):
    """What becomes of a row before distances are taken."""

    shift: np.ndarray  # (d,) float32, subtracted so that ‖x‖² − 2x·c + ‖c‖² loses no digits to a common offset
    spherical: bool

    def apply(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(m, d) rows of any float → the same in float32, shifted or of length one, and their squared lengths (m,).

        Raises DataError for rows that hold NaN or infinite values, and in the spherical form for rows of zeros.
        """
        x = unit(values) if self.spherical else np.subtract(values, self.shift, dtype=np.float32)
        squares = np.einsum("nd,nd->n", x, x)
        bad = np.flatnonzero(~np.isfinite(squares))
        if len(bad):
            what = "NaN, infinite values or nothing but zeros" if self.spherical else "NaN or infinite values"
            raise DataError(f"{len(bad)} of {len(x)} vectors that were read together hold {what}: leave these items out")
        return x, squares


class Sums(NamedTuple):
    """What one look at all rows gives."""

    totals: np.ndarray  # (k, d) float64, sum of the rows nearest to each centroid
    counts: np.ndarray  # (k,) int64
    squares: float  # Σ‖x‖²

    def inertia(self, centroids: np.ndarray) -> float:
        """Σ‖x − c‖² over rows and their centroids."""
        wide = centroids.astype(np.float64)
        return float(self.squares - 2 * (self.totals * wide).sum() + self.counts @ (wide**2).sum(1))

    def means(self, centroids: np.ndarray, spherical: bool) -> np.ndarray:
        """The centroids these rows ask for, (k, d) float32; one without rows stays where it is."""
        own = self.counts > 0
        fresh = centroids.astype(np.float64)
        fresh[own] = self.totals[own] / self.counts[own, None]
        if spherical:
            length = np.linalg.norm(fresh, axis=1, keepdims=True)
            fresh = np.where(length > 0, fresh / np.maximum(length, 1e-30), centroids)
        return fresh.astype(np.float32)


class _Kept(NamedTuple):
    """What is known of the rows of a block."""

    label: np.ndarray  # (m,) int32
    upper: np.ndarray  # (m,) float32, bound of the distance to the own centroid
    lower: np.ndarray  # (m, groups) float32, bounds of the distance to the nearest other one


class _Centroids(NamedTuple):
    """Centroids in the order of their groups."""

    values: np.ndarray  # (k, d) float32
    half: np.ndarray  # (k,) ‖c‖²/2
    edges: np.ndarray  # (groups + 1,) where each group begins
    group: np.ndarray  # (k,) int32

    @classmethod
    def of(cls, values: np.ndarray, edges: np.ndarray) -> _Centroids:
        half = 0.5 * np.einsum("kd,kd->k", values, values)
        return cls(values, half, edges, np.repeat(np.arange(len(edges) - 1, dtype=np.int32), np.diff(edges)))

    def look(self, x: np.ndarray, squares: np.ndarray, rows: np.ndarray, kept: _Kept, needed: np.ndarray | None) -> None:
        """Nearest centroid and bounds of rows x (m, d) of a block, all groups or those needed (m, groups)."""
        most = len(kept.label)
        length = np.zeros(most, np.float32)
        length[rows] = squares
        best, owner = np.full(most, nearest.FAR, np.float32), np.full(most, -1, np.int32)
        if needed is None or needed.mean() > DENSE:
            for start in range(0, len(x), CHUNK):
                products = x[start : start + CHUNK] @ self.values.T
                some = rows[start : start + CHUNK]
                for group, (first, last) in enumerate(zip(self.edges[:-1], self.edges[1:])):
                    nearest.fold_group(products, first, first, last, self.half, group, some, length, best, kept.label, owner, kept.lower)
        else:
            for group, (first, last) in enumerate(zip(self.edges[:-1], self.edges[1:])):
                if len(places := np.flatnonzero(needed[:, group])):
                    products = x[places] @ self.values[first:last].T
                    nearest.fold_group(
                        products, 0, first, last, self.half, group, rows[places], length, best, kept.label, owner, kept.lower
                    )
        kept.upper[rows] = np.sqrt(np.maximum(2 * best[rows] + squares, 0))


def _first_look(values: np.ndarray, form: Form, centroids: _Centroids) -> tuple[np.ndarray, np.ndarray, _Kept]:
    """Rows of a block of which nothing is known: the rows, their squared lengths, what is known now."""
    x, squares = form.apply(values)
    groups = len(centroids.edges) - 1
    kept = _Kept(np.zeros(len(x), np.int32), np.zeros(len(x), np.float32), np.full((len(x), groups), nearest.FAR, np.float32))
    centroids.look(x, squares, np.arange(len(x)), kept, None)
    return x, squares, kept


def sums_of(rows: Rows, form: Form, values: np.ndarray, threads: int = 1) -> Sums:
    """One look at all rows that keeps nothing of them."""
    centroids = _Centroids.of(values, np.array([0, len(values)]))
    totals, counts, squares = np.zeros(values.shape), np.zeros(len(values), np.int64), 0.0
    with _in_order(threads) as mapped:
        for x, lengths, kept in mapped(lambda number: _first_look(rows.read(number), form, centroids), len(rows.blocks)):
            nearest.accumulate(x, np.full(len(x), -1, np.int32), kept.label, totals, counts)
            squares += float(lengths.sum(dtype=np.float64))
    return Sums(totals, counts, squares)


class Bounded:
    """Looks at all rows again and again, and only at those the bounds leave open; called with centroids (k, d), gives their Sums."""

    def __init__(self, rows: Rows, form: Form, centroids: np.ndarray, threads: int) -> None:
        self._rows, self._form, self._threads = rows, form, threads
        groups = max(1, min(len(centroids) // GROUPED, (BOUNDS // rows.count - 8) // 4))
        label = _grouped(centroids, groups)
        self._order = np.argsort(label, kind="stable")
        self._edges = np.r_[0, np.bincount(label).cumsum()]
        self._kept: list[_Kept | None] = [None] * len(rows.blocks)
        self._centroids: _Centroids | None = None
        self._totals, self._counts, self._squares = np.zeros(centroids.shape), np.zeros(len(centroids), np.int64), 0.0

    def __call__(self, values: np.ndarray) -> Sums:
        fresh = _Centroids.of(np.ascontiguousarray(values[self._order]), self._edges)
        moved = np.zeros(len(values), np.float32)
        if self._centroids is not None:
            moved[:] = np.linalg.norm(fresh.values.astype(np.float64) - self._centroids.values, axis=1) * (1 + 1e-6)
        most = np.maximum.reduceat(moved, self._edges[:-1])
        self._centroids = fresh
        with _in_order(self._threads) as mapped:  # sums are taken in the order of the blocks: the same bits on any number of threads
            for x, before, after, squares in mapped(lambda number: self._block(number, fresh, moved, most), len(self._kept)):
                nearest.accumulate(x, before, after, self._totals, self._counts)
                self._squares += squares
        totals, counts = np.empty_like(self._totals), np.empty_like(self._counts)
        totals[self._order], counts[self._order] = self._totals, self._counts
        return Sums(totals, counts, self._squares)

    def _block(
        self, number: int, centroids: _Centroids, moved: np.ndarray, most: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """Rows of a block that changed centroids: the rows, the centroid before and after; Σ‖x‖² where the block was not known."""
        kept = self._kept[number]
        if kept is None:
            x, squares, kept = _first_look(self._rows.read(number), self._form, centroids)
            self._kept[number] = kept
            return x, np.full(len(x), -1, np.int32), kept.label.copy(), float(squares.sum(dtype=np.float64))
        rows = nearest.loosen(kept.label, kept.upper, kept.lower, moved, most)
        if not len(rows):
            return np.empty((0, self._rows.dim), np.float32), rows, rows, 0.0
        x, squares = self._form.apply(self._rows.read(number)[rows])
        open_, needed = nearest.tighten(x, rows, centroids.values, kept.label, kept.upper, kept.lower, centroids.group)
        rows, x = rows[open_], x[open_]
        before = kept.label[rows]
        if len(rows):
            centroids.look(x, squares[open_], rows, kept, needed)
        after = kept.label[rows]
        changed = before != after
        return x[changed], before[changed], after[changed], 0.0


def _grouped(centroids: np.ndarray, groups: int) -> np.ndarray:
    """(k,) group of each centroid, none empty: groups of near ones."""
    if groups == 1:
        return np.zeros(len(centroids), np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # centroids in few places: some groups stay empty and are left out
        label = KMeans(groups, n_init=1, max_iter=10, random_state=0).fit(centroids).labels_
    return np.unique(label, return_inverse=True)[1]


@contextmanager
def _in_order(threads: int) -> Iterator[Callable[[Callable[[int], Any], int], Iterator[Any]]]:
    """A map over 0 … n − 1 on some threads whose results come in order, few at a time."""
    if threads == 1:
        yield lambda make, count: map(make, range(count))
        return
    pool = ThreadPoolExecutor(threads, "attar-kmeans")

    def mapped(make: Callable[[int], Any], count: int) -> Iterator[Any]:
        waiting: deque[Future] = deque()
        for number in range(count):
            waiting.append(pool.submit(make, number))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield mapped
    finally:
        pool.shutdown(cancel_futures=True)
