"""How many clusters: the number whose partition is most natural, found without labels."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
from sklearn.metrics import adjusted_rand_score, silhouette_samples, silhouette_score

from attar import config
from attar.errors import UsageError
from attar.records import Items
from attar.stages.cluster.methods import Fit, kmeans
from attar.workspace import Job

FITTED = 10_000  # items a number of clusters is scored on
SAMPLED = 2_000  # items a silhouette is averaged over: its cost is quadratic
BESTS = 3  # numbers of the grid whose neighbours are tried too: at a wrong number a method may do nearly as well by luck
GROUPED = 0.5  # score from which k-means groups inside a density cluster are told apart
REPEATS = 6  # pairs of halves behind a stability figure
EQUAL = 0.03  # share of the best score that chance moves one by: on MNIST encoders of four seeds 3 and 10 clusters differ by −.1 to 5 %


def separation(points: np.ndarray, labels: np.ndarray) -> float:
    """Mean silhouette (Rousseeuw 1987) of (n, p) points, −1 … 1; 0 where it is undefined (one group, or every item its own)."""
    return float(silhouette_score(points, labels)) if 2 <= len(np.unique(labels)) < len(labels) else 0.0


def mean_separation(points: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the clusters of their mean silhouette, −1 … 1: a cluster of fifty weighs as much as one of a thousand.

    The mean over items would not see two small clusters joined (1,000, 200, 50 and 50 round ones: best at 3 instead of 4).
    """
    if not 2 <= len(np.unique(labels)) < len(labels):
        return 0.0
    values = silhouette_samples(points, labels)
    return float(np.mean([values[labels == label].mean() for label in np.unique(labels)]))


def score_count(
    points: np.ndarray, reference: np.ndarray, k: int, rng: np.random.Generator, fit: Fit = kmeans, repeats: int = REPEATS
) -> dict[str, float]:
    """How natural a number of clusters is: score = √(silhouette⁺ · stability⁺), 0 … 1.

    silhouette: of the method on all (n, p) points, on a sample, mean over clusters. stability: adjusted Rand index, on the (m, p) reference, between
    fits to two random halves of the points, mean of a few pairs (Ben-Hur et al. 2002; Lange et al. 2004).
    Neither is enough alone: silhouette climbs on to over-fine partitions of high-dimensional data (MNIST pixels: 0.13 at 7,
    0.14 at 14) where halves no longer agree (0.84, then 0.57); stability is perfect for coarse partitions that join whole
    groups (five blobs: 1.0 at 3 and at 5) where the silhouette is low. Their geometric mean is high only where both are, and
    needs no weights. The same generator state for every k pairs the comparisons: the same halves, the same sample.
    """
    halves = [np.array_split(rng.permutation(len(points)), 2) for _ in range(repeats)]
    sample = rng.permutation(len(points))[:SAMPLED]
    silhouette = mean_separation(points[sample], fit(points, k, rng).place(points[sample]))
    agreement = [adjusted_rand_score(*(fit(points[half], k, rng).place(reference) for half in pair)) for pair in halves]
    stability = float(np.mean(agreement))
    score = float(np.sqrt(max(silhouette, 0) * max(stability, 0)))
    return {"k": k, "score": score, "silhouette": silhouette, "stability": stability}


def candidate_counts(most: int) -> list[int]:
    """Numbers of clusters to try: every one from 2 to 12, then steps of about 15 %, up to and including `most`."""
    counts = list(range(2, min(most, 12) + 1))
    while counts[-1] < most:
        counts.append(min(most, max(counts[-1] + 2, round(counts[-1] * 1.15))))
    return counts


def checked(fitted: np.ndarray, settings: config.Cluster) -> None:
    """Refuses more clusters than there are different training items."""
    distinct = int(fitted.sum())
    if settings.clusters > distinct:
        raise UsageError(
            f"clusters: {settings.clusters}; there are {distinct} different training items, which cannot make more clusters than that; "
            f"choose at most {distinct}, or 0 to let the data decide"
        )


def samples(items: Items, fitted: np.ndarray, most: int, job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Rows that choices are fitted on, at most so many training items, and rows that fits are compared on."""
    draw = job.rng("sample")
    train = np.flatnonzero(fitted)
    train = np.sort(draw.permutation(train)[:most])
    other = draw.permutation(np.flatnonzero(items.column("split") == "validation"))[:SAMPLED]
    return train, np.r_[other, draw.permutation(train)[: max(200 - len(other), 0)]]  # few validation items would leave stability to chance


def best_count(curve: Iterable[dict[str, float]]) -> int:
    """Of the numbers that do better than the next smaller and no worse than the next larger one, the largest within EQUAL of the best.

    Groups of groups may be as natural as the groups in them; who wants to know what there is wants the finer ones.
    """
    rows = sorted(curve, key=lambda row: row["k"])
    scores = np.array([-1.0, *(row["score"] for row in rows), -1.0])
    peak = (scores[1:-1] > scores[:-2]) & (scores[1:-1] >= scores[2:])
    return int(rows[np.flatnonzero(peak & (scores[1:-1] >= (1 - EQUAL) * scores.max()))[-1]]["k"])


def _choose(points: np.ndarray, reference: np.ndarray, most: int, fit: Fit, job: Job) -> tuple[int, list[dict[str, float]]]:
    """The best number of clusters and the scores of all that were tried; the neighbours of the best are tried too."""
    curve: dict[int, dict[str, float]] = {}
    grid = candidate_counts(most)

    with job.progress(len(grid), "choosing the number of clusters", "counts") as bar:

        def score(counts: Iterable[int]) -> None:
            for k in counts:
                scored = functools.partial(score_count, points, reference, k, job.rng("score"), fit)
                curve[k] = job.once(f"count-{k:05d}.json", scored)
                bar.update()

        score(grid)
        for top in sorted(grid, key=lambda k: -curve[k]["score"])[:BESTS]:
            at = grid.index(top)
            skipped = range(grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)])
            score(k for k in skipped if k not in curve)
    return best_count(curve.values()), [curve[k] for k in sorted(curve)]


def count_clusters(
    items: Items, points: np.ndarray, fitted: np.ndarray, settings: config.Cluster, job: Job, name: str = "k-means", fit: Fit = kmeans
) -> tuple[int, list[dict[str, float]], str]:
    """How many clusters, the scores behind it, and in words what chose it."""
    distinct = int(fitted.sum())
    if settings.clusters:
        return settings.clusters, [], f"{name}, {settings.clusters} clusters: as asked for"
    most = max(2, min(settings.max_clusters, distinct // 4))
    if most == 2:
        return 2, [], f"{name}, 2 clusters: {distinct} different training items and max_clusters {settings.max_clusters} leave no choice"
    train, other = samples(items, fitted, FITTED if fit is kmeans else SAMPLED, job)
    k, curve = _choose(points[train], points[other], most, fit, job)
    score, top = next(row for row in curve if row["k"] == k), max(curve, key=lambda row: row["score"])
    finer = score["score"] < top["score"]
    method = (
        f"{name}, {k} clusters: of 2 to {most} {'a score of' if finer else 'the best score'} {score['score']:.2f}, the geometric mean of "
        f"silhouette {score['silhouette']:.2f} and stability {score['stability']:.2f} (agreement of fits to halves of the data)"
    )
    if finer:
        method += f"; {top['k']:.0f} clusters do no better by more than chance ({top['score']:.2f}), and of equals the finer are taken"
    if score["stability"] < 0.2:
        method += "; no clear groups: those fits hardly agree, so take the clusters as a partition of convenience"
    return k, curve, method


def round_groups(points: np.ndarray, fitted: np.ndarray, smallest: int, rng: np.random.Generator) -> np.ndarray:
    """k-means groups inside one density cluster's (n, p) points: (n,) int, 0 … g−1, all −1 where no number of them is natural.

    Of 2 to 6 the number with the best score on the fitted (n,) bool ones, at most 2,000 drawn at random; it must reach GROUPED, and every group
    the smallest size.
    """
    chosen = np.flatnonzero(fitted)
    chosen = np.sort(rng.permutation(chosen)[:SAMPLED])
    none = np.full(len(points), -1)
    if len(chosen) < 4 * smallest:
        return none
    known, seed = points[chosen], int(rng.integers(2**31))
    rows = [score_count(known, known, k, np.random.default_rng(seed), repeats=2) for k in range(2, 7)]
    best = max(rows, key=lambda row: row["score"])
    if best["score"] < GROUPED:
        return none
    labels = kmeans(known, int(best["k"]), rng).place(points)
    return labels if np.bincount(labels[fitted]).min() >= smallest else none
