"""All pairs of vectors whose cosine similarity reaches a threshold: none missed, in bounded memory.

Rows are turned onto orthonormal axes U of a sample's principal directions; a = x/‖x‖ keeps its first m coordinates a_m and one more,
s_a = √(1 − ‖a_m‖²), the length of what was cut off. By Cauchy–Schwarz

    a·b = a_m·b_m + (a − a_m)·(b − b_m) ≤ a_m·b_m + s_a s_b,

so the scalar product of m + 1 numbers bounds the cosine from above: only pairs whose bound reaches the threshold are looked at again, with
more coordinates and then with the vectors themselves. Whichever axes are taken the result is the same; good ones leave fewer pairs.
Rows are sorted into boxes: (a_m, s_a) lies on a sphere, so the gap g of two boxes bounds the cosine by 1 − g²/2, and most pairs of boxes of
clustered data are never multiplied at all. Where no bound helps, the whole product is computed block by block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64
from numba import njit
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from threadpoolctl import threadpool_limits

from attar.errors import DataError, UsageError

LEAF = 512  # rows of a box; a tile of two boxes' bounds is 1 MB of float32, which the second-level cache holds
RUN = 32  # bounds looked at together; divides LEAF
STRIP = 16  # boxes compared with one box in one piece of work
READ = 4096  # rows converted at once
SAMPLE = 2048  # rows that axes and costs are estimated on
EDGE = 1e-12  # what float64 sums may lack of a threshold that is reached
HALF = 2.0**-24  # unit roundoff of float32
WIDTHS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# Nanoseconds, measured on one core (AVX-512): a column of a bound, the rest of it, a pair that reaches it, a column of its vectors.
COLUMN, BOUND, REACHED, COMPARED = 0.018, 0.12, 40, 1.0
OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "fastmath": {"reassoc", "contract", "nsz", "nnan"}}


class Pairs(NamedTuple):
    """Rows that are alike: `left[k]` and `right[k]`, left < right within one set."""

    left: Int64[np.ndarray, " pairs"]
    right: Int64[np.ndarray, " pairs"]
    cosine: Float32[np.ndarray, " pairs"]


@dataclass(frozen=True)
class Plan:
    """How bounds are made: from the first `coarse` coordinates of `axes`, then from all of them; no axes: by whole vectors."""

    axes: Float64[np.ndarray, "dim fine"] | None
    coarse: int = 0
    fine: bool = False


@njit(**OPTIONS)
def _survivors(bounds, floor, left, right, fine_floor, rows, columns, triangle):  # numba compiles types, not shapes
    """Pairs of a tile (rows, runs, RUN) whose bound reaches `floor`, and whose finer bound left·right reaches `fine_floor` where there is one."""
    count = 0
    for i in range(bounds.shape[0]):
        for run in range(bounds.shape[1]):
            hits = 0
            for k in range(bounds.shape[2]):  # counted without a branch: vector instructions
                hits += bounds[i, run, k] >= floor
            if hits == 0:
                continue
            for k in range(bounds.shape[2]):
                j = run * bounds.shape[2] + k
                if bounds[i, run, k] < floor or (triangle and j <= i):
                    continue
                if left.shape[1]:
                    bound = np.float32(0)
                    for column in range(left.shape[1]):
                        bound += left[i, column] * right[j, column]
                    if bound < fine_floor:
                        continue
                rows[count], columns[count] = i, j
                count += 1
    return count


@njit(**OPTIONS)
def _cosines(left, right, rows, columns, left_norms, right_norms, out):
    """Scalar products in float64 over the product of the norms, pair by pair."""
    for pair in range(len(rows)):
        i, j = rows[pair], columns[pair]
        total = 0.0
        for k in range(left.shape[1]):
            total += np.float64(left[i, k]) * np.float64(right[j, k])
        out[pair] = total / (left_norms[i] * right_norms[j])


def norms(rows: Float[np.ndarray, "n dim"], what: str = "vectors") -> Float64[np.ndarray, " n"]:
    """Length of every row. Raises DataError for what has no direction: NaN, infinite or zero rows, rows without columns."""
    if rows.ndim != 2 or not rows.shape[1] or rows.dtype not in (np.float16, np.float32, np.float64):
        raise DataError(f"the {what} have shape {rows.shape} and type {rows.dtype}; expected (items, dimensions) of float16 or float32")
    lengths = np.empty(len(rows))
    for start in range(0, len(rows), READ):
        block = rows[start : start + READ].astype(np.float64)
        lengths[start : start + READ] = np.sqrt(np.einsum("nd,nd->n", block, block))
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(bad):
        fault = "is zero" if lengths[bad[0]] == 0 else "holds NaN or infinite values"
        raise DataError(
            f"row {bad[0]} of the {what} {fault} ({len(bad)} such rows of {len(rows)}): it has no direction; take such rows out, or make them anew"
        )
    return lengths


def slack(terms: int) -> float:
    """How far a float32 scalar product of two unit vectors may fall below the exact one, vectors rounded to float32 before: (terms + 6) 2⁻²⁴.

    Any order of summation errs by at most γ_n Σ|a_k b_k| ≤ n 2⁻²⁴ / (1 − n 2⁻²⁴) (Higham 2002, §3.1), rounding the vectors by 2 · 2⁻²⁴.
    """
    return (terms + 6) * HALF


def _residual(dim: int) -> float:
    """What 1 − ‖a_m‖² may lack by float64 sums of `dim` terms; added, so that √ never falls short."""
    return 8 * dim * 2.0**-53


def shadows(
    rows: Float[np.ndarray, "n dim"], lengths: Float64[np.ndarray, " n"], axes: Float64[np.ndarray, "dim m"]
) -> Float32[np.ndarray, "n m1"]:
    """The m coordinates of each row's direction and the length of what they leave out, (n, m + 1)."""
    out = np.empty((len(rows), axes.shape[1] + 1), np.float32)
    unit = rows.astype(np.float64) / lengths[:, None]
    kept = unit @ axes
    out[:, :-1] = kept
    out[:, -1] = np.sqrt(np.maximum(1 - np.einsum("nm,nm->n", kept, kept), 0) + _residual(rows.shape[1]))
    return out


def make_plan(sample: Float64[np.ndarray, "s dim"], threshold: float, widest: int = WIDTHS[-1]) -> Plan:
    """The cheapest bounds for rows like the unit rows of a sample: costs per pair are estimated on all pairs of the sample.

    Axes are those of the sample's second moments, the largest first, so that what is cut off is short. At most `widest` columns.
    """
    s, dim = sample.shape
    _, axes = np.linalg.eigh(sample.T @ sample)
    axes = axes[:, ::-1]

    def share(bounds: np.ndarray) -> float:
        return (np.count_nonzero(bounds >= threshold) - s) / max(1, s * (s - 1))  # without the rows themselves

    kept, reached = (sample @ axes).astype(np.float32), {}
    widths = [m for m in WIDTHS if m <= min(widest, dim - 2)]
    product = np.zeros((s, s), np.float32)
    for before, m in zip([0, *widths], widths):
        product += kept[:, before:m] @ kept[:, before:m].T
        rest = np.sqrt(np.maximum(1 - (kept[:, :m] ** 2).sum(1), 0))
        reached[m] = share(product + np.outer(rest, rest))
    found, compare = share(kept @ kept.T), COMPARED * dim + 200
    options = [(COLUMN * dim + BOUND + found * (REACHED + compare), 0, 0)]
    for m in widths:
        first = COLUMN * (m + 1) + BOUND + reached[m] * REACHED
        options.append((first + reached[m] * compare, m, m))
        options += [(first + reached[n] * compare, m, n) for n in widths if m < n <= dim // 2]
    _, coarse, fine = min(options)
    return Plan(np.ascontiguousarray(axes[:, :fine]), coarse, fine > coarse) if coarse else Plan(None)


def _sample(rows: np.ndarray, lengths: np.ndarray, size: int) -> Float64[np.ndarray, "s dim"]:
    index = np.arange(0, len(rows), max(1, len(rows) // size))
    return rows[index].astype(np.float64) / lengths[index, None]


def box_order(points: Float32[np.ndarray, "n m"], leaf: int) -> Int64[np.ndarray, " n"]:
    """Rows in an order whose runs of `leaf` are close together: halved again and again across the axis of largest variance (k-d tree)."""
    order = np.arange(len(points))
    parts = deque([(0, len(points))])
    while parts:
        start, stop = parts.pop()
        boxes = -(-(stop - start) // leaf)
        if boxes < 2:
            continue
        inside = order[start:stop]
        axis = points[inside[:: max(1, len(inside) // 4096)]].var(0).argmax()
        middle = boxes // 2 * leaf
        order[start:stop] = inside[np.argpartition(points[inside, axis], middle)]
        parts += [(start, start + middle), (start + middle, stop)]
    return order


class _Set:
    """One set of rows, in the order of its boxes, with what bounds them."""

    def __init__(self, rows: np.ndarray, lengths: np.ndarray, plan: Plan) -> None:
        self.rows, self.lengths, self.plan = rows, lengths, plan
        self.order = np.arange(len(rows))
        self._coarse = self._fine = None
        if plan.axes is not None:
            coarse = self._shadows(plan.axes[:, : plan.coarse])
            self.order = box_order(coarse, LEAF)
            self._coarse = coarse[self.order]
            del coarse
            self._fine = self._shadows(plan.axes) if plan.fine else None
            starts = np.arange(0, len(rows), LEAF)
            self.low, self.high = np.minimum.reduceat(self._coarse, starts), np.maximum.reduceat(self._coarse, starts)
        self.boxes = -(-len(rows) // LEAF)

    def _shadows(self, axes: np.ndarray) -> np.ndarray:
        out = np.empty((len(self.rows), axes.shape[1] + 1), np.float32)
        for start in range(0, len(out), READ):
            index = self.order[start : start + READ]
            out[start : start + READ] = shadows(self.rows[index], self.lengths[index], axes)
        return out

    def coarse(self, box: int) -> np.ndarray:
        part = slice(box * LEAF, (box + 1) * LEAF)
        if self._coarse is not None:
            return self._coarse[part]
        index = self.order[part]
        return (self.rows[index] / self.lengths[index, None]).astype(np.float32)

    def fine(self, box: int) -> np.ndarray:
        return np.empty((0, 0), np.float32) if self._fine is None else self._fine[box * LEAF : (box + 1) * LEAF]

    def near(self, box: int, other: _Set, threshold: float, first: int) -> np.ndarray:
        """Boxes of another set, from `first` on, that a box's rows may have a similar row in."""
        boxes = np.arange(first, other.boxes)
        if self._coarse is None:
            return boxes
        gap = np.maximum(other.low[first:] - self.high[box], self.low[box] - other.high[first:]).astype(np.float64)
        squared = (np.maximum(gap, 0) ** 2).sum(1)
        error = 8 * (HALF + np.sqrt(_residual(self.rows.shape[1])))  # of the corners, twice, at a distance of at most 2
        return boxes[squared <= 2 - 2 * threshold + 2 * EDGE + error]


def similar_pairs(
    rows: Float[np.ndarray, "n dim"],
    threshold: float,
    other: Float[np.ndarray, "k dim"] | None = None,
    *,
    workers: int = 1,
    memory_bytes: int = 1 << 30,
) -> Iterator[Pairs]:
    """All pairs (i < j) of rows, or all (i of rows, j of other), whose cosine similarity is at least a threshold; a few at a time.

    The cosine is Σ x_k y_k / (‖x‖ ‖y‖) of the numbers as they are stored, summed in float64: a threshold counts as reached from 10⁻¹² below
    it on. Rows are float16 or float32 of any length, in memory or mapped (np.memmap). At most `memory_bytes` are taken beside them for the
    bounds; a piece of work adds at most 8,192 × 512 pairs, two pieces per worker. Order and bits do not depend on `workers`.

    Raises DataError for NaN, infinite or zero rows and for sets of different dimensions, UsageError for a threshold outside −1 … 1.

    Example:
        >>> rows = np.array([[1, 0], [0, 1], [2, 0.1]], np.float32)
        >>> [(int(i), int(j)) for found in similar_pairs(rows, 0.99) for i, j in zip(found.left, found.right)]
        [(0, 2)]
    """
    if not -1 <= threshold <= 1:
        raise UsageError(f"threshold: {threshold}; expected a cosine similarity, -1 to 1")
    lengths = norms(rows)
    if other is not None and rows.shape[1:] != other.shape[1:]:
        raise DataError(
            f"the vectors have {rows.shape[1]} dimensions, those they are compared with {other.shape[1]}; make both with the same encoder"
        )
    other_lengths = lengths if other is None else norms(other, "vectors to compare with")
    total = len(rows) + (0 if other is None else len(other))
    if not len(rows) or (other is not None and not len(other)):
        return
    sample = (
        [_sample(rows, lengths, SAMPLE)]
        if other is None
        else [_sample(rows, lengths, SAMPLE // 2), _sample(other, other_lengths, SAMPLE // 2)]
    )
    plan = make_plan(np.concatenate(sample), threshold, widest=max(0, memory_bytes // (8 * total) - 2))
    left = _Set(rows, lengths, plan)
    right = left if other is None else _Set(other, other_lengths, plan)
    pieces = ((box, strip) for box in range(left.boxes) for strip in _strips(left.near(box, right, threshold, box if right is left else 0)))
    with threadpool_limits(1 if workers > 1 else None):
        yield from _work(pieces, left, right, threshold, workers)


def _strips(boxes: np.ndarray) -> Iterator[np.ndarray]:
    return (boxes[start : start + STRIP] for start in range(0, len(boxes), STRIP))


def _work(pieces: Iterable[tuple[int, np.ndarray]], left: _Set, right: _Set, threshold: float, workers: int) -> Iterator[Pairs]:
    if workers == 1:
        yield from filter(_some, (_compare(left, right, box, strip, threshold) for box, strip in pieces))
        return
    waiting: deque[Future[Pairs]] = deque()
    with ThreadPoolExecutor(workers, "attar-pairs") as pool:
        try:
            for box, strip in pieces:
                waiting.append(pool.submit(_compare, left, right, box, strip, threshold))
                if len(waiting) == 2 * workers and _some(found := waiting.popleft().result()):
                    yield found
            while waiting:
                if _some(found := waiting.popleft().result()):
                    yield found
        finally:
            for piece in waiting:
                piece.cancel()


def _some(pairs: Pairs) -> bool:
    return len(pairs.left) > 0


def _compare(left: _Set, right: _Set, box: int, strip: np.ndarray, threshold: float) -> Pairs:
    """Pairs of the rows of one box with those of some others, as numbered by the user."""
    own, fine = left.coarse(box), left.fine(box)
    floor, fine_floor = np.float32(threshold - 2 * slack(own.shape[1])), np.float32(threshold - 2 * slack(fine.shape[1]))
    rows, columns = np.empty(LEAF * LEAF, np.int32), np.empty(LEAF * LEAF, np.int32)
    bounds, found = np.empty((LEAF, LEAF), np.float32), []
    for number in strip.tolist():
        coarse = right.coarse(number)
        np.matmul(own, coarse.T, out=bounds[: len(own), : len(coarse)])
        bounds[:, len(coarse) :] = -9  # below any threshold
        tile = bounds[: len(own)].reshape(len(own), -1, RUN)
        count = _survivors(tile, floor, fine, right.fine(number), fine_floor, rows, columns, right is left and number == box)
        if count:
            i, j = rows[:count] + np.int64(box * LEAF), columns[:count] + np.int64(number * LEAF)
            found.append(_verified(left, right, i, j, threshold))
    if not found:
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    return Pairs(*(np.concatenate(column) for column in zip(*found)))


def _verified(left: _Set, right: _Set, i: np.ndarray, j: np.ndarray, threshold: float) -> Pairs:
    """Those of some candidates whose vectors' cosine reaches the threshold."""
    (of_left, i), (of_right, j) = np.unique(left.order[i], return_inverse=True), np.unique(right.order[j], return_inverse=True)
    cosine = np.empty(len(i))
    some = [np.float32 if part.rows.dtype == np.float16 else part.rows.dtype for part in (left, right)]
    values = [part.rows[index].astype(kind) for part, index, kind in zip((left, right), (of_left, of_right), some)]
    _cosines(*values, i, j, left.lengths[of_left], right.lengths[of_right], cosine)
    reached = cosine >= threshold - EDGE
    a, b = of_left[i[reached]], of_right[j[reached]]
    if right is left:
        a, b = np.minimum(a, b), np.maximum(a, b)
    return Pairs(a, b, cosine[reached].astype(np.float32))


def groups(count: int, pairs: Iterable[Pairs], priority: Float[np.ndarray, " n"] | None = None) -> Int64[np.ndarray, " n"]:
    """The representative of each item's connected group: (n,) row numbers; an item that is like no other has itself.

    The representative is the group's item of highest priority, by default the first. Pairs are merged as they come, `count` of them at a
    time, so that quadratically many (frames of a still video) need linear memory.
    """
    label, waiting, held = np.arange(count), list[Pairs](), 0

    def merge() -> np.ndarray:
        a, b = (label[np.concatenate(rows)] for rows in list(zip(*waiting))[:2])
        graph = coo_array((np.ones(len(a), bool), (a, b)), shape=(count, count))
        return connected_components(graph, directed=False)[1][label]

    for found in pairs:
        waiting.append(found)
        held += len(found.left)
        if held > count:  # so that merging takes a share of the time of finding
            label, waiting, held = merge(), [], 0
    label = merge() if waiting else label
    order = np.arange(count) if priority is None else np.lexsort((np.arange(count), -np.asarray(priority)))
    first = np.full(count, count)
    np.minimum.at(first, label[order], np.arange(count))
    return order[first[label]]
