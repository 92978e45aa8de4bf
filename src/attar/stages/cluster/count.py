"""How many clusters: the number whose partition is most natural, found without labels."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
from sklearn.metrics import adjusted_rand_score, silhouette_score

from attar import config
from attar.errors import UsageError
from attar.records import Items
from attar.stages.cluster.kmeans import fit_centroids
from attar.stages.cluster.space import squared_distances
from attar.workspace import Job

FITTED = 10_000  # items a number of clusters is scored on
SAMPLED = 2_000  # items a silhouette is averaged over: its cost is quadratic
REPEATS = 6  # pairs of halves behind a stability figure


def separation(points: np.ndarray, labels: np.ndarray) -> float:
    """Mean silhouette (Rousseeuw 1987) of (n, p) points, −1 … 1; 0 where it is undefined (one group, or every item its own)."""
    return float(silhouette_score(points, labels)) if 2 <= len(np.unique(labels)) < len(labels) else 0.0


def score_count(points: np.ndarray, reference: np.ndarray, k: int, rng: np.random.Generator) -> dict[str, float]:
    """How natural a number of clusters is: score = √(silhouette⁺ · stability⁺), 0 … 1.

    silhouette: of k-means on all (n, p) points, on a sample. stability: adjusted Rand index, on the (m, p) reference, between
    k-means fitted to two random halves of the points, mean of a few pairs (Ben-Hur et al. 2002; Lange et al. 2004).
    Neither is enough alone: silhouette climbs on to over-fine partitions of high-dimensional data (MNIST pixels: 0.13 at 7,
    0.14 at 14) where halves no longer agree (0.84, then 0.57); stability is perfect for coarse partitions that join whole
    groups (five blobs: 1.0 at 3 and at 5) where the silhouette is low. Their geometric mean is high only where both are, and
    needs no weights. The same generator state for every k pairs the comparisons: the same halves, the same sample.
    """
    halves = [np.array_split(rng.permutation(len(points)), 2) for _ in range(REPEATS)]
    sample = rng.permutation(len(points))[:SAMPLED]
    silhouette = separation(points[sample], squared_distances(points[sample], fit_centroids(points, k, rng)).argmin(1))
    agreement = [
        adjusted_rand_score(*(squared_distances(reference, fit_centroids(points[half], k, rng)).argmin(1) for half in pair))
        for pair in halves
    ]
    stability = float(np.mean(agreement))
    score = float(np.sqrt(max(silhouette, 0) * max(stability, 0)))
    return {"k": k, "score": score, "silhouette": silhouette, "stability": stability}


def candidate_counts(most: int) -> list[int]:
    """Numbers of clusters to try: every one from 2 to 12, then steps of about 15 %, up to and including `most`."""
    counts = list(range(2, min(most, 12) + 1))
    while counts[-1] < most:
        counts.append(min(most, max(counts[-1] + 2, round(counts[-1] * 1.15))))
    return counts


def _choose(points: np.ndarray, reference: np.ndarray, most: int, job: Job) -> tuple[int, list[dict[str, float]]]:
    """The number of clusters with the best score and the scores of all that were tried; the best one's neighbours are tried too."""
    curve: dict[int, dict[str, float]] = {}
    grid = candidate_counts(most)

    def best() -> int:
        return max(curve, key=lambda k: (curve[k]["score"], -k))

    with job.progress(len(grid), "choosing the number of clusters", "counts") as bar:

        def score(counts: Iterable[int]) -> None:
            for k in counts:
                curve[k] = job.once(f"count-{k:05d}.json", functools.partial(score_count, points, reference, k, job.rng("score")))
                bar.update()

        score(grid)
        at = grid.index(best())
        skipped = range(grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)])
        score(k for k in skipped if k not in curve)
    return best(), [curve[k] for k in sorted(curve)]


def count_clusters(
    items: Items, points: np.ndarray, fitted: np.ndarray, settings: config.Cluster, job: Job
) -> tuple[int, list[dict[str, float]], str]:
    """How many clusters, the scores behind it, and in words what chose it."""
    distinct = int(fitted.sum())
    if settings.clusters > distinct:
        raise UsageError(
            f"clusters: {settings.clusters}; there are {distinct} different training items, which cannot make more clusters than that; "
            f"choose at most {distinct}, or 0 to let the data decide"
        )
    if settings.clusters:
        return settings.clusters, [], f"k-means, {settings.clusters} clusters: as asked for"
    most = max(2, min(settings.max_clusters, distinct // 4))
    if most == 2:
        return 2, [], f"k-means, 2 clusters: {distinct} different training items and max_clusters {settings.max_clusters} leave no choice"
    draw = job.rng("sample")
    train = np.flatnonzero(fitted)
    train = np.sort(draw.permutation(train)[:FITTED])
    other = draw.permutation(np.flatnonzero(items.column("split") == "validation"))[:SAMPLED]
    other = np.r_[other, draw.permutation(train)[: max(200 - len(other), 0)]]  # few validation items would leave stability to chance
    k, curve = _choose(points[train], points[other], most, job)
    score = next(row for row in curve if row["k"] == k)
    method = (
        f"k-means, {k} clusters: of 2 to {most} the best score {score['score']:.2f}, the geometric mean of "
        f"silhouette {score['silhouette']:.2f} and stability {score['stability']:.2f} (agreement of fits to halves of the data)"
    )
    if score["stability"] < 0.2:
        method += "; no clear groups: those fits hardly agree, so take the clusters as a partition of convenience"
    return k, curve, method
