"""How sure a figure is, and the label-free and labelled scores that need no model: pure kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num
from scipy.optimize import linear_sum_assignment
from scipy.stats import beta, t

BLOCK_BYTES = 16 << 20  # of the similarities the neighbour search holds; larger blocks leave the caches and are slower


def share_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of a share: the quantiles (1 ∓ confidence)/2 of Beta(s, n − s + 1) and Beta(s + 1, n − s) (Clopper and Pearson 1934).

    It never covers less than it says, at any n and share; Wilson's score interval does so only on average. n = 0 says nothing: (0, 1).

    >>> [round(bound, 3) for bound in share_interval(98, 100)]
    [0.93, 0.998]
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}; expected 0 to n")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: {confidence}; expected above 0, below 1")
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, n - successes + 1))
    high = 1.0 if successes == n else float(beta.ppf(1 - tail, successes + 1, n - successes))
    return low, high


def agreement(a: np.ndarray, b: np.ndarray, confidence: float = 0.95) -> tuple[float, float, float]:
    """Share of items two models decide alike, with its exact interval: a, b (n,) decisions → (share, low, high).

    >>> agreement(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 0]))[0]
    0.75
    """
    _same_length(a, b)
    equal = int(np.count_nonzero(np.asarray(a) == np.asarray(b)))
    return (equal / len(a), *share_interval(equal, len(a), confidence))


def bootstrap(
    rows: np.ndarray,
    rng: np.random.Generator,
    statistic: Callable[[np.ndarray], float] = np.mean,
    repeats: int = 1000,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a statistic over rows (n, …): its quantiles over resamples of the rows (Efron 1979).

    Rows are drawn whole, so that paired columns stay paired.

    >>> low, high = bootstrap(np.arange(100.0), np.random.default_rng(0))
    >>> 40 < low < 49.5 < high < 60
    True
    """
    rows = np.asarray(rows)
    if len(rows) == 0:
        raise ValueError("no rows to resample; expected at least one")
    draws = np.array([statistic(rows[rng.integers(0, len(rows), len(rows))]) for _ in range(repeats)])
    return quantiles(draws, confidence)


def quantiles(draws: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """The central share of bootstrap draws (repeats,); NaN draws (an undefined statistic) are left out."""
    low, high = np.nanquantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def spread(value: float, draws: np.ndarray, floor: float, confidence: float = 0.95) -> tuple[float, float]:
    """Normal interval with the bootstrap's standard error, value ± z·sd(draws), within [floor, 1] (Efron and Tibshirani 1993, §13.3).

    For scores a resample inflates (its repeated items look like structure), whose quantiles can miss the value itself.
    """
    half = _z(confidence) * float(np.std(draws, ddof=1))
    return max(floor, value - half), min(1.0, value + half)


class Paired(NamedTuple):
    """A mean difference of pairs with its interval, and the p of there being none."""

    difference: float
    low: float
    high: float
    p: float


def paired(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"], confidence: float = 0.95) -> Paired:
    """Mean of a − b over pairs that share what varies (a seed, an item), with Student's interval and two-sided p (Student 1908).

    d̄ ± t(n − 1) · sd(d)/√n. Pairs that all differ by the same amount have no spread to judge by: the interval is the amount, p is 0, or 1 at 0.
    Raises ValueError for fewer than two pairs.

    >>> [round(value, 3) for value in paired(np.array([3.0, 4.0, 5.0]), np.array([1.0, 3.0, 3.0]))]
    [1.667, 0.232, 3.101, 0.038]
    """
    _same_length(a, b)
    n = len(a)
    if n < 2:
        raise ValueError(f"{n} pair; expected at least two")
    _z(confidence)
    differences = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    mean, error = float(differences.mean()), float(differences.std(ddof=1)) / np.sqrt(n)
    if error <= 1e-12 * max(1.0, float(np.abs(differences).max())):
        return Paired(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    half = float(t.ppf((1 + confidence) / 2, n - 1)) * error
    return Paired(mean, mean - half, mean + half, float(2 * t.sf(abs(mean) / error, n - 1)))


def crossed(gains: Float[np.ndarray, "seeds items"]) -> tuple[float, float, float]:
    """Mean of paired differences over seeds and items, and its 95 % interval.

    Seeds and items are both drawn at random (a crossed two-way layout): the variance is that of the seeds' means over the seeds plus that of the
    items' means over the items, which counts their interaction twice and so is never too small in expectation; the quantile is Student's for one
    less than the seeds.
    """
    seeds, items = gains.shape
    variance = gains.mean(1).var(ddof=1) / seeds + (gains.mean(0).var(ddof=1) / items if items > 1 else 0.0)
    half = float(t.ppf(0.975, seeds - 1) * np.sqrt(variance))
    mean = float(gains.mean())
    return mean, mean - half, mean + half


def blocked(values: Float[np.ndarray, "k n"], best: int, confidence: float = 0.95) -> list[Paired]:
    """Each of k candidates against one of them, over n blocks (seeds) that all share: a randomised block design (Fisher 1935).

    As `paired`, but the error is pooled over all candidates: s² = Σ r² / ((k − 1)(n − 1)), r = value − candidate's mean − block's mean + mean; the
    difference of two means has the standard error √(2 s²/n). With few blocks that is what lets a difference be seen: two blocks of twenty
    candidates leave 19 degrees of freedom, where a pair alone has 1. Raises ValueError for fewer than two candidates or blocks.

    >>> values = np.array([[1.0, 2.0, 3.0], [2.0, 3.1, 3.9]])
    >>> round(blocked(values, 1)[0].p, 5) == round(paired(values[0], values[1]).p, 5)
    True
    """
    values = np.asarray(values, np.float64)
    k, n = values.shape
    if min(k, n) < 2:
        raise ValueError(f"{k} candidates in {n} blocks; expected at least two of each")
    _z(confidence)
    residual = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    freedom = (k - 1) * (n - 1)
    error = float(np.sqrt(2 * (residual**2).sum() / freedom / n))
    half = float(t.ppf((1 + confidence) / 2, freedom)) * error
    exact = error <= 1e-12 * max(1.0, float(np.abs(values).max()))
    found = []
    for mean in (values.mean(1) - values[best].mean()).tolist():
        p = float(mean == 0) if exact else float(2 * t.sf(abs(mean) / error, freedom))
        found.append(Paired(mean, mean - half, mean + half, p))
    return found


def holm(p: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """p-values of m comparisons adjusted so that deciding by them errs at all with at most the stated probability (Holm 1979).

    The i-th smallest becomes the largest of (m − j + 1) · p₍ⱼ₎ over j ≤ i, at most 1.

    >>> holm(np.array([0.01, 0.04, 0.03])).round(3).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p, np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values {p.tolist()}; expected 0 to 1")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order]))
    return adjusted


def neighbours(x: Float[np.ndarray, "n d"], k: int, tick: Callable[[int], object] | None = None) -> Int[np.ndarray, "n k"]:
    """Indices (n, k) of the k rows of x (n, d) with the highest cosine similarity to each row, itself left out; best first.

    Works in blocks of rows: memory n × d floats + 3 × BLOCK_BYTES. `tick` is called with the rows done after each block.
    """
    n = len(x)
    if not 1 <= k < n:
        raise ValueError(f"{k} neighbours of {n} items; expected 1 to n − 1")
    unit = x.astype(np.float32)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    found = np.empty((n, k), np.int64)
    size = max(1, BLOCK_BYTES // (4 * n))
    for start in range(0, n, size):
        similarity = unit[start : start + size] @ unit.T
        rows = np.arange(len(similarity))
        similarity[rows, start + rows] = -np.inf
        best = np.argpartition(similarity, n - k, axis=1)[:, n - k :]
        best.sort(axis=1)  # equal similarities come in index order, whatever order the partition left
        order = np.argsort(-np.take_along_axis(similarity, best, axis=1), axis=1, kind="stable")
        found[start : start + size] = np.take_along_axis(best, order, axis=1)
        if tick:
            tick(len(rows))
    return found


def knn_overlap(
    a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "n e"], k: int, tick: Callable[[int], object] | None = None
) -> Float[np.ndarray, " n"]:
    """Share of each item's k nearest neighbours (cosine) that two embeddings have in common, 0 … 1.

    |N_a(i) ∩ N_b(i)| / k; unchanged by rotation and scaling of either embedding.

    >>> x = np.eye(4) + 0.1 * np.arange(4)
    >>> knn_overlap(x, 3 * x, 2).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    _same_length(a, b)
    both = np.concatenate([neighbours(x, k, tick) for x in (a, b)], axis=1)
    both.sort(axis=1)  # each side names an index once, so equal indices lie side by side
    return np.count_nonzero(both[:, 1:] == both[:, :-1], axis=1) / k


def cosine(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    """Cosine similarity of paired rows, −1 … 1; 0 where a row is zero.

    >>> cosine(np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([[2.0, 0.0], [1.0, -1.0]])).tolist()
    [1.0, 0.0]
    """
    return (a * b).sum(axis=1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)


def knn_vote(labels: Int[np.ndarray, " n"], near: Int[np.ndarray, "m k"]) -> Int[np.ndarray, " m"]:
    """Leave-one-out k-nearest-neighbour decision: the most frequent label among the neighbours; the nearer wins a tie.

    `near` holds row numbers of `labels`, nearest first, as `neighbours` gives them.
    """
    votes = labels[near]
    counts = np.zeros(votes.shape, np.int64)  # how often each neighbour's label occurs among all of them
    for column in votes.T:
        counts += votes == column[:, None]
    first = np.argmax(counts, axis=1)  # the first of the largest: neighbours come nearest first
    return np.take_along_axis(votes, first[:, None], axis=1)[:, 0]


class Crossing(NamedTuple):
    """A table of two decisions over the same items, by its filled cells: item counts never need the full table."""

    rows: np.ndarray  # (m,) first decision of each cell
    columns: np.ndarray  # (m,) second decision
    counts: np.ndarray  # (m,) items
    shape: tuple[int, int]

    def dense(self, counts: np.ndarray) -> np.ndarray:
        table = np.zeros(self.shape)
        table[self.rows, self.columns] = counts
        return table


def crossing(a: Int[np.ndarray, " n"], b: Int[np.ndarray, " n"], shape: tuple[int, int] | None = None) -> Crossing:
    """Counts of every pair of decisions that occurs; decisions are numbered from 0."""
    _same_length(a, b)
    shape = shape or (int(a.max()) + 1, int(b.max()) + 1)
    cells, counts = np.unique(np.asarray(a, np.int64) * shape[1] + b, return_counts=True)
    return Crossing(cells // shape[1], cells % shape[1], counts, shape)


def resample(table: Crossing, rng: np.random.Generator, repeats: int = 1000) -> Iterator[Int[np.ndarray, " cells"]]:
    """Cell counts of bootstrap resamples of the items, one by one: multinomial draws, the same as drawing the items and counting."""
    n = table.counts.sum()
    return (rng.multinomial(n, table.counts / n) for _ in range(repeats))


def class_scores(table: Crossing, counts: Num[np.ndarray, " cells"]) -> Float[np.ndarray, "3 classes"]:
    """Precision, recall and F1 of every class from truth × prediction counts.

    precision = tp / predicted (0 when never predicted), recall = tp / true, F1 = 2·tp / (true + predicted);
    NaN for a class with no true item. The macro score is the mean over the classes that have one.
    """
    size = max(table.shape)
    true, predicted = (np.bincount(side, counts, size) for side in (table.rows, table.columns))
    hit = np.bincount(table.rows, counts * (table.rows == table.columns), size)
    with np.errstate(invalid="ignore", divide="ignore"):
        scores = np.stack([np.where(predicted > 0, hit / predicted, 0.0), hit / true, 2 * hit / (true + predicted)])
    scores[:, true == 0] = np.nan
    return scores


def cluster_scores(table: Crossing, counts: Num[np.ndarray, " cells"]) -> Float[np.ndarray, "3"]:
    """Clustering accuracy, normalised mutual information and adjusted Rand index from label × cluster counts.

    ACC: share of items on the best one-to-one matching of clusters to labels (Hungarian; Yang et al. 2010).
    NMI: I(L; C) / ((H(L) + H(C)) / 2) (Strehl and Ghosh 2002). ARI: Hubert and Arabie 1985, equations 2 and 5.
    From counts rather than items, so that a thousand resamples cost what one pass over the items does.
    """
    dense = table.dense(counts)
    n, rows, columns = dense.sum(), dense.sum(axis=1), dense.sum(axis=0)
    matched = dense[linear_sum_assignment(dense, maximize=True)].sum()
    entropies = [-(p[p > 0] / n * np.log(p[p > 0] / n)).sum() for p in (rows, columns, dense.ravel())]
    mean = (entropies[0] + entropies[1]) / 2
    mutual = max(0.0, entropies[0] + entropies[1] - entropies[2])
    pairs = [(p * (p - 1) / 2).sum() for p in (dense.ravel(), rows, columns)]
    expected, largest = (pairs[1] * pairs[2] / max(n * (n - 1) / 2, 1)), (pairs[1] + pairs[2]) / 2
    rand = 1.0 if largest == expected else (pairs[0] - expected) / (largest - expected)
    return np.array([matched / n, mutual / mean if mean > 0 else 1.0, rand])


def clustering_accuracy(labels: Int[np.ndarray, " n"], clusters: Int[np.ndarray, " n"]) -> float:
    """Share of items on the best one-to-one matching of clusters to labels, both numbered from 0.

    >>> clustering_accuracy(np.array([0, 0, 1, 1]), np.array([1, 1, 0, 1]))
    0.75
    """
    table = crossing(labels, clusters)
    return float(cluster_scores(table, table.counts)[0])


def _z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: {confidence}; expected above 0, below 1")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _same_length(a: np.ndarray, b: np.ndarray) -> None:
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"{len(a)} and {len(b)} rows; expected as many, at least one")
