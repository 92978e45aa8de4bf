"""Which method, how many clusters, how near is near: chosen by the data, without labels, unless they are given."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from sklearn.metrics import adjusted_rand_score
from sklearn.neighbors import NearestNeighbors

from attar import config
from attar.errors import DataError
from attar.records import Items
from attar.stages.cluster.count import SAMPLED, checked, count_clusters, samples
from attar.stages.cluster.learned import FEWEST, learned, neighbour_agreement
from attar.stages.cluster.learned import FITS as FITS_OF_HALVES
from attar.stages.cluster.methods import TREE, Partition, anchored, dbscan, fit_of, hdbscan, kmeans
from attar.workspace import Job

TRIED = 12
"""Values tried of a density method's setting."""
HALVES = 3
"""Pairs of halves behind a density method's stability."""
EQUAL = 0.02
"""Scores this near the best count as equal: of these the one with the most clusters is taken, since merged groups are as stable."""


class Found(NamedTuple):
    partition: Partition
    asked: int
    curve: list[dict[str, float]]
    method: str


def find_clusters(items: Items, points: np.ndarray, fitted: np.ndarray, settings: config.Cluster, job: Job) -> Found:
    """The clusters of the fitted (n,) bool ones of (n, p) points, by the method asked for.

    Raises UsageError for more clusters than items, DataError where a density method finds no two groups.
    """
    checked(fitted, settings)
    if settings.cluster_method in DENSE:
        return _by_density(items, points, fitted, settings, job)
    if settings.cluster_method in ("learned", "auto"):
        return _learned(items, points, fitted, settings, job)
    fit = fit_of(settings.cluster_method, job.engine)
    said = "k-means" if settings.cluster_method == "kmeans" else settings.cluster_method
    k, curve, method = count_clusters(items, points, fitted, settings, job, said, fit)
    return Found(fit(points[fitted], k, job.rng("fit")), k, curve, method)


def _learned(items: Items, points: np.ndarray, fitted: np.ndarray, settings: config.Cluster, job: Job) -> Found:
    """The learned head; if the method is left to the data, only where near held-out items agree on it more than on k-means."""
    k, curve, method = count_clusters(items, points, fitted, settings, job)
    known = points[fitted]
    plain = kmeans(known, k, job.rng("fit"), job.engine)
    if settings.cluster_method == "auto" and len(known) < FEWEST:
        return Found(plain, k, curve, method)
    head = learned(known, k, job.rng("learned"))
    other = samples(items, fitted, SAMPLED, job)[1]
    found = {name: neighbour_agreement(points[other], part.place(points[other])) for name, part in (("learned", head), ("k-means", plain))}
    said = f"near neighbours agree {found['learned']:.2f} beyond chance on the learned head, {found['k-means']:.2f} on k-means"
    if settings.cluster_method == "auto" and found["learned"] <= found["k-means"]:
        return Found(plain, k, curve, f"{method}; {said}")
    return Found(
        head, k, curve, f"learned head on what {FITS_OF_HALVES} fits to halves of the data agree on ({said}); their number: {method}"
    )


# density


def _reaches(points: np.ndarray, smallest: int) -> list[float]:
    """Distances to try as eps: from what makes a twentieth of the points dense to three times what makes nearly all of them so."""
    search = NearestNeighbors(n_neighbors=min(smallest, len(points)), algorithm="brute").fit(points)
    reach = np.concatenate([search.kneighbors(part)[0][:, -1] for part in np.array_split(points, -(-len(points) // 1000))])
    low, high = np.maximum(np.quantile(reach, [0.05, 0.98]), 1e-9)
    return np.geomspace(low, 3 * high, TRIED).tolist()


def _sizes(points: np.ndarray, smallest: int) -> list[float]:
    """Smallest cluster sizes to try, up to a tenth of the points."""
    return sorted({float(round(size)) for size in np.geomspace(smallest, max(smallest, len(points) / 10), TRIED)})


DENSE = {
    "dbscan": (_reaches, lambda points, value, smallest: dbscan(points, value, smallest), "eps"),
    "hdbscan": (_sizes, lambda points, value, smallest: hdbscan(points, max(2, round(value * smallest))), "smallest cluster"),
}
"""Values to try, the method, and what the value is called. A half of the data has half the density: its smallest sizes are halved too."""


def score_density(
    name: str, points: np.ndarray, reference: np.ndarray, value: float, smallest: int, rng: np.random.Generator
) -> dict[str, float]:
    """How natural the clusters of a density method are at a value of its setting: score = √(stability⁺ · placed), 0 … 1.

    stability: adjusted Rand index, on the (m, p) reference, between fits to two random halves of the (n, p) points; placed: share of the
    points that are not noise. 0 where there are fewer than two clusters. No silhouette: these clusters need not be round.
    """
    run = DENSE[name][1]
    whole, half = (smallest, max(2, smallest // 2)) if name == "dbscan" else (1, 0.5)
    labels = run(points, value, whole)
    found = {"k": int(labels.max()) + 1, "value": value, "placed": float((labels >= 0).mean())}
    agreement = []
    for _ in range(HALVES if found["k"] > 1 else 0):
        parts = np.array_split(rng.permutation(len(points)), 2)
        made = [(points[part], run(points[part], value, half)) for part in parts]
        both = all(labels.max() > 0 for _, labels in made)
        agreement.append(adjusted_rand_score(*(anchored(*one).place(reference) for one in made)) if both else 0.0)
    stability = float(np.mean(agreement)) if agreement else 0.0
    return found | {"stability": stability, "score": float(np.sqrt(max(stability, 0) * found["placed"])) if agreement else 0.0}


def _by_density(items: Items, points: np.ndarray, fitted: np.ndarray, settings: config.Cluster, job: Job) -> Found:
    name, smallest = settings.cluster_method, settings.min_subcluster
    values, run, called = DENSE[name]
    train, other = samples(items, fitted, TREE, job)
    known, reference = points[train], points[other]
    rows = []
    with job.progress(TRIED, f"choosing {called}", "values") as bar:
        for number, value in enumerate(values(known, smallest)):
            score = functools.partial(score_density, name, known, reference, value, smallest, job.rng("score"))
            rows.append(job.once(f"{name}-{number:02d}.json", score))
            bar.update()
    fit = [row for row in rows if row["k"] > 1 and row["k"] == (settings.clusters or row["k"])]
    if not fit:
        counts = ", ".join(str(count) for count in sorted({row["k"] for row in rows}))
        wanted = f"{settings.clusters} clusters" if settings.clusters else "two clusters or more"
        raise DataError(
            f"{name}: finds no {wanted} in these vectors (numbers found at the values of {called} that were tried: {counts or 'none'}); "
            "choose --cluster-method kmeans or learned, a smaller --min-subcluster, or another --model"
        )
    best = max(row["score"] for row in fit)
    row = max((row for row in fit if row["score"] >= best - EQUAL), key=lambda row: (row["k"], row["placed"]))
    labels = run(known, row["value"], smallest if name == "dbscan" else 1)
    at = {k: max((one for one in rows if one["k"] == k), key=lambda one: one["score"]) for k in {one["k"] for one in rows}}
    method = (
        f"{name}, {row['k']} clusters at {called} {row['value']:.3g}: stability {row['stability']:.2f} (agreement of fits to halves of the data), "
        f"{1 - row['placed']:.1%} noise, which counts to the nearest cluster and is marked by an outlier score of at least 0.9"
    )
    return Found(anchored(known, labels), row["k"], [at[k] for k in sorted(at)], method)
