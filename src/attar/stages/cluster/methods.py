"""The ways to find clusters: each takes points and a number, and gives what places any point."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from sklearn.cluster import DBSCAN, HDBSCAN, AgglomerativeClustering
from sklearn.neighbors import NearestNeighbors

from attar.scale.local import Engine
from attar.stages.cluster.kmeans import fit_centroids
from attar.stages.cluster.kmeans import kmeans as lloyd
from attar.stages.cluster.space import squared_distances

TREE = 5_000
"""Points that methods of quadratic cost look at; all others go where the nearest of these is."""


class Partition(NamedTuple):
    """What a method found: how any point is placed, and the arrays of the head that does the same where there is one."""

    place: Callable[[np.ndarray], np.ndarray]  # (m, p) points → (m,) cluster
    clusters: int
    centroids: np.ndarray | None = None  # (k, p): placed by the nearest
    weights: np.ndarray | None = None  # (p, k): placed by the largest of z · weights + bias
    bias: np.ndarray | None = None  # (k,)
    noise: Callable[[np.ndarray], np.ndarray] | None = None  # (m, p) points → (m,) bool: in no dense place


Fit = Callable[[np.ndarray, int, np.random.Generator], Partition]


def nearest_of(centroids: Float[np.ndarray, "k p"]) -> Partition:
    """Every point to the nearest centroid."""
    return Partition(lambda points: squared_distances(points, centroids).argmin(1), len(centroids), centroids=centroids)


def linear_of(weights: Float[np.ndarray, "p k"], bias: Float[np.ndarray, " k"]) -> Partition:
    """Every point to the largest of z · weights + bias."""
    return Partition(lambda points: (points @ weights + bias).argmax(1), len(bias), weights=weights, bias=bias)


def anchored(points: Float[np.ndarray, "n p"], labels: Int[np.ndarray, " n"]) -> Partition:
    """Every point to the cluster of the nearest labelled one; −1 marks noise, and points whose nearest of all is noise are in no dense place."""
    inside = np.flatnonzero(labels >= 0)
    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(points[inside])
    whole = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(points)

    def place(asked: np.ndarray) -> np.ndarray:
        return labels[inside[search.kneighbors(asked, return_distance=False)[:, 0]]]

    def noise(asked: np.ndarray) -> np.ndarray:
        return labels[whole.kneighbors(asked, return_distance=False)[:, 0]] < 0

    return Partition(place, int(labels.max()) + 1, noise=noise if len(inside) < len(labels) else None)


def kmeans(points: Float[np.ndarray, "n p"], k: int, rng: np.random.Generator, engine: Engine | None = None) -> Partition:
    return nearest_of(fit_centroids(points, k, rng, engine))


def spherical(points: Float[np.ndarray, "n p"], k: int, rng: np.random.Generator, engine: Engine | None = None) -> Partition:
    """k-means by direction: of points scaled to length one, placed by the largest cosine (Dhillon & Modha 2001).

    Its weights stand for softmax(cosine · 10) of a point of average length.
    """
    length = np.linalg.norm(points, axis=1)
    directions = lloyd(points[length > 0], k, rng, spherical=True, engine=engine).centroids
    return linear_of((directions.T * (10 / float(length.mean() or 1))).astype(np.float32), np.zeros(len(directions), np.float32))


def _sampled(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return points if len(points) <= TREE else points[np.sort(rng.choice(len(points), TREE, replace=False))]


def ward(points: Float[np.ndarray, "n p"], k: int, rng: np.random.Generator) -> Partition:
    """The two clusters whose union spreads least are joined until k are left (Ward 1963)."""
    return _joined(points, k, rng, "ward")


def agglomerative(points: Float[np.ndarray, "n p"], k: int, rng: np.random.Generator) -> Partition:
    """The two clusters of least mean distance between their points are joined until k are left."""
    return _joined(points, k, rng, "average")


def _joined(points: np.ndarray, k: int, rng: np.random.Generator, linkage: str) -> Partition:
    some = _sampled(points, rng)
    return anchored(some, AgglomerativeClustering(min(k, len(some)), linkage=linkage).fit_predict(some))


def dbscan(points: Float[np.ndarray, "n p"], eps: float, smallest: int) -> np.ndarray:
    """Labels, −1 for noise: points with `smallest` others within eps, and what is within eps of them (Ester et al. 1996)."""
    return DBSCAN(eps=eps, min_samples=smallest).fit_predict(points)


def hdbscan(points: Float[np.ndarray, "n p"], smallest: int) -> np.ndarray:
    """Labels, −1 for noise: the clusters of at least that size that last longest as the density rises (Campello et al. 2013)."""
    return HDBSCAN(min_cluster_size=smallest, algorithm="kd_tree", copy=True).fit_predict(points)


def reordered(found: Partition, order: Int[np.ndarray, " j"]) -> Partition:
    """The same partition with only these of its clusters, numbered in this order; no placed point may have been in another."""
    if found.centroids is not None:
        return nearest_of(found.centroids[order])
    if found.weights is not None and found.bias is not None:
        return linear_of(found.weights[:, order], found.bias[order])
    number = np.full(found.clusters, -1)
    number[order] = np.arange(len(order))
    return found._replace(place=lambda points: number[found.place(points)], clusters=len(order))


NUMBERED = ("kmeans", "spherical", "ward", "agglomerative")
"""Methods that are told the number of clusters."""


def fit_of(method: str, engine: Engine | None = None) -> Fit:
    """The fit of a NUMBERED method; what can be shared out is done on the engine's machines."""
    fits: dict[str, Fit] = {
        "kmeans": functools.partial(kmeans, engine=engine),
        "spherical": functools.partial(spherical, engine=engine),
        "ward": ward,
        "agglomerative": agglomerative,
    }
    return fits[method]
