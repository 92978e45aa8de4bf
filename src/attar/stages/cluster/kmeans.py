"""k-means of points in memory, in mapped files or in shards: plain, spherical, in mini-batches, on one machine or on an engine's.

Centroids are seeded and settled on a sample, then on all rows (see lloyd.py).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from attar.errors import UsageError
from attar.records import Vectors
from attar.scale.local import Engine, Tick
from attar.stages.cluster.lloyd import BOUNDS, Bounded, Form, Sums, sums_of
from attar.stages.cluster.rows import BLOCK, Rows, rows_of
from attar.stages.cluster.space import squared_distances

EXACT = 50_000  # points up to which scikit-learn's k-means, the best of four starts, is quick enough
SAMPLED = 64  # rows per centroid that the centroids are settled on before all rows are read
SEEDED = 16  # rows per centroid that seeds are drawn from
FEWEST = 10_000  # rows of the sample, however few the centroids
SETTLED = 20, 1e-3  # iterations on the sample at most, and the gain that ends them
STARTS = 4  # starts that a sample decides between, where there are few centroids
MANY = 100  # centroids above which one start is as good as several
BATCH = 4096  # rows of a mini-batch
MIXED = 8  # mini-batches that are read together and mixed, as neighbours in a file are often alike

Step = Callable[[np.ndarray], Sums]


class Fit(NamedTuple):
    centroids: np.ndarray  # (≤ k, d) float32
    sizes: np.ndarray  # rows nearest to each
    inertia: float
    history: tuple[float, ...]  # inertia at each iteration over all rows


def fit_centroids(points: np.ndarray, k: int, rng: np.random.Generator, engine: Engine | None = None) -> np.ndarray:
    """k-means centroids of (n, p) points, best of four starts: (≤ k, p) float32; fewer only when fewer points are distinct.

    Above EXACT points the starts are compared on a sample; with an engine of many machines their work is shared out.
    """
    if len(points) > EXACT:
        return kmeans(points, k, rng, engine=engine).centroids
    model = KMeans(k, n_init=STARTS, random_state=int(rng.integers(2**31)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters: the empty ones are dropped below
        model.fit(points)
    centroids = model.cluster_centers_.astype(np.float32)
    return centroids[np.unique(squared_distances(points, centroids).argmin(1))]


def kmeans(
    source: np.ndarray | Vectors,
    k: int,
    rng: np.random.Generator,
    *,
    iterations: int = 50,
    tolerance: float = 1e-4,
    spherical: bool = False,
    threads: int = 1,
    engine: Engine | None = None,
    watch: Callable[[float], bool | None] | None = None,
) -> Fit:
    """Lloyd's k-means of (n, d) vectors, float16 or float32: argmin Σ‖x − c‖².

    It ends after `iterations` over all rows, when one lowers the inertia by no more than `tolerance` of it, or when `watch`, which is
    called with the inertia of each, says so. Spherical: rows and centroids have length one, so that the nearest centroid is that of
    the largest cosine (Dhillon & Modha 2001). Clusters that run empty begin again at the row of the sample that is farthest from all.
    Equal generators give equal bits, on any number of threads. Memory: a sample, the centroids, and at most BOUNDS bytes.
    Raises UsageError for more clusters than rows, DataError for vectors that are not finite or differ in length.
    """
    rows = rows_of(source)
    start = _start(rows, k, rng, spherical, threads)
    with threadpool_limits(1, "blas"):
        if engine is not None and engine.remote:
            step: Step = Shared(engine, source, rows, start.form)
        elif rows.count * 12 <= BOUNDS:
            step = Bounded(rows, start.form, start.centroids, threads)
        else:
            step = functools.partial(sums_of, rows, start.form, threads=threads)
        return _finish(*_lloyd(step, start, iterations, tolerance, watch), start.form)


def minibatch(
    source: np.ndarray | Vectors, k: int, rng: np.random.Generator, *, passes: int = 1, spherical: bool = False, threads: int = 1
) -> Fit:
    """Mini-batch k-means (Sculley 2010): centroids follow the mean of all rows they were nearest to, batch after batch.

    A batch is drawn from some blocks read together, the blocks in random order. Each pass reads all rows once, and so does the last
    look that the sizes and the inertia come from. Raises as `kmeans` does.
    """
    rows = rows_of(source)
    start = _start(rows, k, rng, spherical, threads)
    centroids, seen = start.centroids, np.zeros(len(start.centroids), np.int64)
    with threadpool_limits(1, "blas"):
        for _ in range(passes):
            for batch in _batches(rows, rng):
                found = sums_of(rows_of(batch), start.form, centroids, threads)
                seen += found.counts
                share = (found.counts / np.maximum(seen, 1))[:, None]
                wide = centroids.astype(np.float64)
                moved = wide + share * (found.means(centroids, False) - wide)
                if spherical:
                    moved /= np.linalg.norm(moved, axis=1, keepdims=True)
                centroids = moved.astype(np.float32)
        found = sums_of(rows, start.form, centroids, threads)
    return _finish(centroids, found, [found.inertia(centroids)], start.form)


class _Start(NamedTuple):
    sample: np.ndarray  # (m, d) rows, as they were read
    form: Form
    centroids: np.ndarray  # (≤ k, d) float32, in the form


def _start(rows: Rows, k: int, rng: np.random.Generator, spherical: bool, threads: int) -> _Start:
    """Centroids that were seeded and settled on a sample."""
    if not 1 <= k <= rows.count:
        raise UsageError(f"clusters: {k}; there are {rows.count} vectors, so choose 1 to {rows.count}")
    sample = rows.sample(max(SAMPLED * k, FEWEST), rng)
    shift = np.zeros(rows.dim, np.float32) if spherical else sample.mean(0, dtype=np.float64).astype(np.float32)
    form = Form(shift if np.isfinite(shift).all() else np.zeros_like(shift), spherical)  # what is not finite is refused when it is read
    best: tuple[float, np.ndarray] | None = None
    with threadpool_limits(threads, "blas"):
        for _ in range(STARTS if k <= MANY else 1):
            drawn = rng.choice(len(sample), min(len(sample), max(SEEDED * k, FEWEST)), replace=False)
            start = _Start(sample, form, seeds(form.apply(sample[drawn])[0], k, rng))
            if rows.count == len(sample) and k > MANY:
                return start  # the sample is all there is
            with threadpool_limits(1, "blas"):
                step = Bounded(rows_of(sample), form, start.centroids, threads)
                centroids, _, history = _lloyd(step, start, *SETTLED, None)
            if best is None or history[-1] < best[0]:
                best = history[-1], centroids
    assert best is not None
    return _Start(sample, form, best[1])


def seeds(x: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k of the rows x (n, d) that lie apart: greedy k-means++ (Arthur & Vassilvitskii 2007).

    Each is the best of 2 + ln k rows drawn by their squared distance to those before. scikit-learn's, which computes in float64, takes three
    times as long for many clusters.
    """
    squares, trials = np.einsum("nd,nd->n", x, x), 2 + int(np.log(k))
    chosen = [int(rng.integers(len(x)))]
    distance = np.maximum(squares - 2 * (x @ x[chosen[0]]) + squares[chosen[0]], 0)
    while len(chosen) < k:
        summed = distance.cumsum(dtype=np.float64)
        drawn = np.minimum(np.searchsorted(summed, rng.random(trials) * summed[-1], side="right"), len(x) - 1)
        closer = squares - 2 * (x[drawn] @ x.T) + squares[drawn, None]
        np.clip(closer, 0, distance, out=closer)
        best = int(closer.sum(1).argmin())
        chosen.append(int(drawn[best]))
        distance = closer[best]
    return x[chosen]


def _lloyd(
    step: Step, start: _Start, iterations: int, tolerance: float, watch: Callable[[float], bool | None] | None
) -> tuple[np.ndarray, Sums, list[float]]:
    """The centroids after some iterations, what the last look at the rows gave, the inertia of each."""
    centroids, history = start.centroids, list[float]()
    while True:
        found = step(centroids)
        history.append(found.inertia(centroids))
        fresh, again = _refill(found.means(centroids, start.form.spherical), found.counts, start)
        settled = len(history) > 1 and history[-2] - history[-1] <= tolerance * history[-1]
        centroids = fresh
        if len(history) == iterations or (settled and not again) or (watch is not None and watch(history[-1])):
            return centroids, found, history


def _refill(centroids: np.ndarray, counts: np.ndarray, start: _Start) -> tuple[np.ndarray, bool]:
    """Puts centroids without rows where the sample is farthest from all others; whether any could be."""
    empty = np.flatnonzero(counts == 0)
    if not len(empty):
        return centroids, False
    distance, refilled = _own_distances(start, centroids[counts > 0]), False
    for cluster in empty:
        far = int(distance.argmax())
        if distance[far] <= 0:
            break
        centroids[cluster] = start.form.apply(start.sample[far : far + 1])[0][0]
        distance = np.minimum(distance, _own_distances(start, centroids[cluster : cluster + 1]))
        refilled = True
    return centroids, refilled


def _own_distances(start: _Start, centroids: np.ndarray) -> np.ndarray:
    """‖x − c‖² of the sample's rows to the nearest of (k, d) centroids: (m,); 0 where it is rounding."""
    out = []
    for first in range(0, len(start.sample), BLOCK):
        x, squares = start.form.apply(start.sample[first : first + BLOCK])
        label = (0.5 * (centroids**2).sum(1) - x @ centroids.T).argmin(1)
        distance = ((x - centroids[label]) ** 2).sum(1)
        out.append(np.where(distance > 1e-10 * squares, distance, 0))
    return np.concatenate(out)


def _finish(centroids: np.ndarray, found: Sums, history: list[float], form: Form) -> Fit:
    """Without the centroids that stayed without rows or lie where another one does."""
    own = np.flatnonzero(found.counts > 0)
    own = own[np.sort(np.unique(centroids[own], axis=0, return_index=True)[1])]
    return Fit(centroids[own] + form.shift, found.counts[own], history[-1], tuple(history))


def _batches(rows: Rows, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """All rows once, in batches; blocks in random order, the rows of several mixed."""
    order, waiting, held = rng.permutation(len(rows.blocks)), list[np.ndarray](), 0
    for position, number in enumerate(order):
        waiting.append(rows.read(int(number)))
        held += len(waiting[-1])
        if held >= MIXED * BATCH or position == len(order) - 1:
            mixed = np.concatenate(waiting)[rng.permutation(held)]
            yield from (mixed[start : start + BATCH] for start in range(0, held, BATCH))
            waiting, held = [], 0


@dataclass(frozen=True)
class _Look:
    """Work of an engine: Sums of some blocks of rows."""

    form: Form
    centroids: np.ndarray

    def open(self, workers: int) -> AbstractContextManager[Callable[[Any, Tick], Sums]]:
        return nullcontext(self._sums)

    def _sums(self, part: Any, tick: Tick) -> Sums:
        with threadpool_limits(1, "blas"):
            return sums_of(rows_of(part), self.form, self.centroids)


class Shared:
    """Looks at all rows on an engine's machines; called with centroids (k, d), gives their Sums."""

    def __init__(self, engine: Engine, source: np.ndarray | Vectors, rows: Rows, form: Form) -> None:
        self._engine, self._form = engine, form
        each = -(-len(rows.blocks) // (4 * engine.slots))
        starts = range(0, len(rows.blocks), each)
        cut: list[Any] = [Rows(rows.count, rows.dim, rows.blocks[start : start + each]) for start in starts]
        if not isinstance(source, Vectors | np.memmap):  # what is in memory is sent, what is on disk is read there
            cut = [source[start * BLOCK : (start + each) * BLOCK] for start in starts]
        self._parts = {number: engine.hold(part) for number, part in enumerate(cut)}

    def __call__(self, centroids: np.ndarray) -> Sums:
        found = dict(self._engine.map(_Look(self._form, centroids), self._parts, lambda count: None))
        ordered = [found[number] for number in sorted(found)]  # sums of floats depend on the order
        return Sums(sum(one.totals for one in ordered), sum(one.counts for one in ordered), sum(one.squares for one in ordered))
