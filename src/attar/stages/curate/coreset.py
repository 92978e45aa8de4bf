"""Core sets: fewer items that stand for many, each with the items it stands for.

Whatever the method, clusters are first cut into cells of at most CELL items, and only items of one cell are compared: time grows with n · CELL and
memory with n, so a million items are minutes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from attar.stages.cluster.density import NEIGHBOURS
from attar.workspace import Job

CELL = 4096  # items compared with each other: a table of 128 MB at most
LEAF = 16  # items of a cell's smallest groups, on average
STRATUM = 8  # items that a stratum keeps, on average
APART = 0.5  # of the middle distance in a stratum: what lies nearer to a kept item is as good as a copy of it
LOOKED_AT = 2000  # items whose distance to the nearest kept one is measured
DRAWS = 3  # random subsets that a core set's cover is compared with

Points = Float[np.ndarray, "m p"]
Method = Callable[[Points, int, int, np.random.Generator], Int[np.ndarray, " m"]]
"""Points, how many to keep, the row of the most central one → row of the kept point that stands for each; kept ones stand for themselves."""


def water_fill(sizes: np.ndarray, total: int) -> np.ndarray:
    """Quotas that are as equal as the sizes allow: (k,) int, sum → (k,) int with quota ≤ size, Σ quota = min(total, Σ size).

    Small groups keep all; what remains over is shared equally by the others, the odd ones going to the lowest numbers.
    Example: water_fill([2, 10, 10], 13) = [2, 6, 5].
    """
    quotas = np.zeros(len(sizes), np.int64)
    left = min(int(total), int(np.sum(sizes)))
    while left:
        open_ = np.flatnonzero(quotas < sizes)
        share = max(left // len(open_), 1)
        given = np.minimum(sizes[open_] - quotas[open_], share)[:left]
        quotas[open_[: len(given)]] += given
        left -= int(given.sum())
    return quotas


def proportional(sizes: np.ndarray, total: int) -> np.ndarray:
    """Quotas in proportion to the sizes, at least 1 for every group while there are enough: (k,) int, sum → (k,) int as of `water_fill`.

    One each, the largest groups first; the rest by largest remainders (Hamilton). Example: proportional([2, 10, 10], 13) = [2, 6, 5].
    """
    left = min(int(total), int(np.sum(sizes)))
    largest = np.argsort(-sizes, kind="stable")
    quotas = np.zeros(len(sizes), np.int64)
    quotas[largest[: min(left, int((sizes > 0).sum()))]] = 1
    left -= int(quotas.sum())
    if left:
        exact = left * (sizes - quotas) / (sizes - quotas).sum()
        given = np.floor(exact).astype(np.int64)
        given[np.argsort(given - exact, kind="stable")[: left - int(given.sum())]] += 1
        quotas += given
    return quotas


def farthest_first(points: np.ndarray, count: int, start: int) -> np.ndarray:
    """Greedy k-centre cover (Gonzalez 1985): each point's nearest chosen point, (m, p) float → (m,) int; chosen ones have themselves.

    Begins with `start` and adds `count` − 1 times the point farthest from those chosen (the first of equally far ones); the
    largest distance to a chosen point is at most twice the smallest possible one.
    """
    nearest = np.full(len(points), start)
    distance = ((points - points[start]) ** 2).sum(1)
    distance[start] = -1
    for _ in range(count - 1):
        new = int(distance.argmax())
        fresh = ((points - points[new]) ** 2).sum(1)
        nearest[fresh < distance] = new
        nearest[new] = new
        distance = np.minimum(distance, fresh)
        distance[new] = -1
    return nearest


def stand_for(points: Points, kept: Int[np.ndarray, " q"]) -> Int[np.ndarray, " m"]:
    """Row of the kept point nearest each point, the first of equally near ones; kept points have themselves."""
    nearest = np.concatenate([kept[cdist(block, points[kept], "sqeuclidean").argmin(1)] for block in _blocks(points)])
    nearest[kept] = kept
    return nearest


def _blocks(points: Points) -> list[Points]:
    return [points[start : start + CELL] for start in range(0, len(points), CELL)]


def _k_centre(points: Points, count: int, start: int, rng: np.random.Generator) -> Int[np.ndarray, " m"]:
    return farthest_first(points, count, start)


def _by_density(points: Points, count: int, start: int, rng: np.random.Generator) -> Int[np.ndarray, " m"]:
    """Drawn in proportion to the mean distance to the nearest neighbours: dense places are thinned, outliers are no surer than their distance.

    Without replacement, by the smallest of exponential variables with these rates (Efraimidis and Spirakis 2006).
    """
    neighbours = min(NEIGHBOURS, len(points) - 1)
    distance = NearestNeighbors(n_neighbors=neighbours, algorithm="brute").fit(points).kneighbors()[0].mean(1)
    waits = rng.exponential(size=len(points)) / np.maximum(distance, 1e-9)
    return stand_for(points, np.sort(np.argsort(waits, kind="stable")[:count]))


def _by_hierarchy(points: Points, count: int, start: int, rng: np.random.Generator) -> Int[np.ndarray, " m"]:
    """Hierarchical k-means sampling (Vo et al. 2024): as many of each group of groups, of each group in it, drawn at random in the smallest.

    Groups of groups are k-means of the centroids of groups, which lie more evenly over the space than the points do.
    """
    leaves, centroids = _k_means(points, round(len(points) / LEAF), rng)
    branches, _ = _k_means(centroids, round(np.sqrt(len(centroids))), rng)
    sizes = np.bincount(leaves)
    quotas = np.zeros(len(sizes), np.int64)
    for own, quota in zip(_members(branches), water_fill(np.bincount(branches, sizes).astype(np.int64), count).tolist()):
        quotas[own] = water_fill(sizes[own], quota)
    kept = [rng.permutation(own)[:quota] for own, quota in zip(_members(leaves), quotas.tolist())]
    return stand_for(points, np.sort(np.concatenate(kept)))


def _by_strata(points: Points, count: int, start: int, rng: np.random.Generator) -> Int[np.ndarray, " m"]:
    """As large a share of each small group as of all, drawn at random but for what nearly repeats an item already drawn, which comes last.

    Stratified sampling (Neyman 1934) with a least distance inside a stratum, as Poisson discs have it (random sequential addition, Widom 1966): the
    kept ones lie as all do, so that they stand for equally many. Each stands for what is near it in its stratum, none for two more than another.
    """
    strata = _members(cells(points, rng, min(CELL, max(2, round(2 * STRATUM * len(points) / count)))))
    nearest = np.full(len(points), -1)
    for rows, quota in zip(strata, proportional(np.array([len(rows) for rows in strata]), count).tolist()):
        if quota:
            distance = cdist(points[rows], points[rows])
            kept = np.sort(_spread(distance, quota, rng))
            nearest[rows] = rows[_shared_out(distance, kept)]
    if (nearest < 0).any():
        nearest = np.where(nearest < 0, stand_for(points, np.unique(nearest[nearest >= 0])), nearest)
    return nearest


def _spread(distance: Float[np.ndarray, "m m"], count: int, rng: np.random.Generator) -> Int[np.ndarray, " count"]:
    """Rows drawn at random that lie APART times the median distance or more from each other; where those are too few, the farthest of the rest."""
    least = APART * np.median(distance[np.triu_indices(len(distance), 1)]) if len(distance) > 1 else 0.0
    reach, kept = np.full(len(distance), np.inf), list[int]()
    for row in rng.permutation(len(distance)):
        if len(kept) < count and reach[row] >= least:
            kept.append(row)
            reach = np.minimum(reach, distance[row])
    reach[kept] = -1
    while len(kept) < count:
        kept.append(int(reach.argmax()))
        reach = np.minimum(reach, distance[kept[-1]])
        reach[kept[-1]] = -1
    return np.array(kept)


def _shared_out(distance: Float[np.ndarray, "m m"], kept: Int[np.ndarray, " q"]) -> Int[np.ndarray, " m"]:
    """Kept row that stands for each: as equally many each as can be, at the least sum of distances (linear assignment)."""
    nearest = np.arange(len(distance))
    others = np.delete(nearest, kept)
    most = -(-len(others) // len(kept))
    row, place = linear_sum_assignment(np.repeat(distance[np.ix_(others, kept)], most, axis=1))
    nearest[others[row]] = kept[place // most] if most else kept[:0]
    return nearest


def _at_random(points: Points, count: int, start: int, rng: np.random.Generator) -> Int[np.ndarray, " m"]:
    return stand_for(points, np.sort(rng.permutation(len(points))[:count]))


METHODS: dict[str, Method] = {
    "stratified": _by_strata,
    "hierarchical": _by_hierarchy,
    "k-centre": _k_centre,
    "density": _by_density,
    "random": _at_random,
}
IN_PROPORTION = ("stratified", "random")
"""Methods by which clusters keep the same share; by the others as many as each other where they can."""


def _k_means(points: Points, k: int, rng: np.random.Generator) -> tuple[Int[np.ndarray, " m"], Float[np.ndarray, "k p"]]:
    """Group of each point, numbered without gaps, and the groups' means; one start, as only an even partition is wanted."""
    k = int(np.clip(k, 1, len(np.unique(points, axis=0))))
    labels = KMeans(k, n_init=1, max_iter=25, random_state=int(rng.integers(2**31))).fit_predict(points)
    labels = np.unique(labels, return_inverse=True)[1]
    return labels, np.stack([points[own].mean(0) for own in _members(labels)])


def _members(labels: Int[np.ndarray, " m"]) -> list[Int[np.ndarray, " own"]]:
    """Rows of each label, ascending; labels are numbered without gaps."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.cumsum(np.bincount(labels))[:-1])


def cells(points: Points, rng: np.random.Generator, most: int | None = None) -> Int[np.ndarray, " m"]:
    """Number of the cell of each point: parts of at most so many points (CELL) by k-means of a sample, again where one is larger."""
    found, waiting, number, most = np.zeros(len(points), np.int64), [np.arange(len(points))], 0, most or CELL
    while waiting:
        rows = waiting.pop()
        if len(rows) <= most:
            found[rows] = number
            number += 1
            continue
        sample = points[np.sort(rng.choice(rows, 4 * CELL, replace=False) if len(rows) > 4 * CELL else rows)]
        _, centroids = _k_means(sample, min(64, -(-2 * len(rows) // most)), rng)
        part = np.concatenate([cdist(block, centroids, "sqeuclidean").argmin(1) for block in _blocks(points[rows])])
        if np.bincount(part).max() > 0.9 * len(rows):  # mostly equal points, which no centroids part
            part = np.argsort(np.argsort(points[rows, 0], kind="stable")) // most
        waiting.extend(rows[part == one] for one in np.unique(part)[::-1])
    return found


def condense(points: Points, count: int, distance: Float[np.ndarray, " m"], method: str, rng: np.random.Generator) -> Int[np.ndarray, " m"]:
    """Row of the kept point that stands for each of one cluster's points, `count` ≥ 1 of which are kept.

    `distance` to the cluster's centre tells which is the most central. The kept point is one of the cell, by most methods its nearest, or the
    cluster's nearest for cells that keep none. Cells, as clusters, keep as many as each other where they can; in proportion to their size by a method of IN_PROPORTION.
    """
    parts = _members(cells(points, rng))
    quotas = _fill(method)(np.array([len(rows) for rows in parts]), count)
    nearest = np.full(len(points), -1)
    for rows, quota in zip(parts, quotas.tolist()):
        if quota == len(rows):
            nearest[rows] = rows
        elif quota:
            nearest[rows] = rows[METHODS[method](points[rows], quota, int(distance[rows].argmin()), rng)]
    left, kept = np.flatnonzero(nearest < 0), np.unique(nearest[nearest >= 0])
    for block in np.array_split(left, -(-len(left) // CELL) or 1):
        nearest[block] = kept[cdist(points[block], points[kept], "sqeuclidean").argmin(1)]
    return nearest


def _condensed(*asked: Any) -> pa.Table:
    return pa.table({"nearest": condense(*asked)})


def _fill(method: str) -> Callable[[np.ndarray, int], np.ndarray]:
    return proportional if method in IN_PROPORTION else water_fill


def core_set(
    points: Float[np.ndarray, "n p"],
    labels: Int[np.ndarray, " n"],
    distance: Float[np.ndarray, " n"],
    total: int,
    method: str,
    job: Job,
) -> Int[np.ndarray, " n"]:
    """Row of the kept item that stands for each item, itself for `total` kept ones, at least one of every cluster.

    `points` in the clustering space, `labels` the cluster and `distance` how far from its centre each is. A cluster is made once and kept by the job.
    How often a row is named is its weight: Σ weight = n.
    """
    labels = np.unique(labels, return_inverse=True)[1]
    sizes = np.bincount(labels)
    quotas = _fill(method)(sizes, max(total, len(sizes)))
    nearest = np.arange(len(points))
    with job.progress(len(points), "core set") as bar, threadpool_limits(1):  # sums over threads come in any order
        for number in np.flatnonzero(quotas < sizes).tolist():
            rows = np.flatnonzero(labels == number)
            asked = points[rows], int(quotas[number]), distance[rows], method, job.rng("core set", number)
            found = job.once(f"core-{number:05d}.parquet", functools.partial(_condensed, *asked))
            nearest[rows] = rows[found["nearest"].to_numpy()]
            bar.update(len(rows))
    return nearest


class Coverage(NamedTuple):
    """How far items are from the nearest kept one, in the clustering space, beside random subsets of the same size."""

    mean: float
    farthest: float
    random_mean: float
    random_farthest: float
    least: int  # kept items of the cluster that keeps fewest
    random_least: float

    def __str__(self) -> str:
        return (
            f"an item lies {self.mean:.3g} from the nearest kept one on average and {self.farthest:.3g} at most "
            f"(as many drawn at random: {self.random_mean:.3g} and {self.random_farthest:.3g}); "
            f"every cluster keeps {self.least} or more (at random {self.random_least:.3g})"
        )


def coverage(
    points: Float[np.ndarray, "n p"], labels: Int[np.ndarray, " n"], kept: Int[np.ndarray, " q"], rng: np.random.Generator
) -> Coverage:
    """What a core set covers: on at most LOOKED_AT items, kept ones among them at distance 0, beside the mean of DRAWS random subsets."""
    seen = np.sort(rng.permutation(len(points))[:LOOKED_AT])
    labels = np.unique(labels, return_inverse=True)[1]

    def figures(chosen: Int[np.ndarray, " q"]) -> tuple[float, float, float]:
        rest = seen[~np.isin(seen, chosen)]
        search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(points[chosen])
        reach = search.kneighbors(points[rest])[0][:, 0] if len(rest) else np.zeros(1)
        least = np.bincount(labels[chosen], minlength=int(labels.max()) + 1).min()
        return float(reach.sum() / len(seen)), float(reach.max()), float(least)

    with threadpool_limits(1):
        own = figures(kept)
        drawn = np.mean([figures(np.sort(rng.permutation(len(points))[: len(kept)])) for _ in range(DRAWS)], axis=0)
    return Coverage(own[0], own[1], float(drawn[0]), float(drawn[1]), int(own[2]), float(drawn[2]))
