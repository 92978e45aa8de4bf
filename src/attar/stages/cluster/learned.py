"""A clustering head learned on frozen features from what many partitions agree on, and whether it beats the nearest centroid.

k-means cuts large groups and joins small ones, each time elsewhere: where a hundred fits to random halves agree is where the groups are. Items
that often fall together are joined by average linkage (evidence accumulation, Fred & Jain 2005), which may make clusters of any size, and a
linear softmax head is trained on the outcome, so that it places any item.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
from jaxtyping import Float, Int
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.exceptions import ConvergenceWarning

from attar.stages.cluster.head import regress
from attar.stages.cluster.methods import Partition, linear_of

LEARNED = 3_000
"""Points, at most, that are learned from: what they agree on is a square table (36 MB, and twice that while they are joined)."""
FITS = 100
MORE = 1.25, 1.75
"""Clusters of a fit, as a multiple of those wanted: from, to."""
NEIGHBOURS = 10
FEWEST = 200
"""Points below which neither the head nor the comparison means much."""


def together(points: Float[np.ndarray, "n p"], k: int, rng: np.random.Generator, fits: int = FITS) -> Float[np.ndarray, "n n"]:
    """Share of k-means fits, each to a random half of the points, that put two points into one cluster; 0 … 1, 1 on the diagonal.

    Each fit has a random number of clusters, a quarter to three quarters more than k: with k, small groups are joined more often than told
    apart (1,000, 50, 50 and 50 round points: adjusted Rand index .29, so .67).
    """
    shares = np.zeros((len(points), len(points)), np.float32)
    half, (low, high) = max(len(points) // 2, min(k, len(points))), (math.ceil(share * k) for share in MORE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters: some stay empty
        for _ in range(fits):
            some = points[rng.permutation(len(points))[:half]]
            count, seed = min(int(rng.integers(low, high + 1)), half), int(rng.integers(2**31))
            member = np.eye(count, dtype=np.float32)[KMeans(count, n_init=1, random_state=seed).fit(some).predict(points)]
            shares += member @ member.T
    return shares / fits


def learned(points: Float[np.ndarray, "n p"], k: int, rng: np.random.Generator) -> Partition:
    """At most k clusters as a linear softmax head, trained on what fits to halves of the points agree on."""
    some = points if len(points) <= LEARNED else points[np.sort(rng.choice(len(points), LEARNED, replace=False))]
    apart = together(some, k, rng)
    np.subtract(1, apart, out=apart)
    labels = AgglomerativeClustering(min(k, len(some)), metric="precomputed", linkage="average").fit_predict(apart)
    return linear_of(*regress(some, labels, int(labels.max()) + 1))


def neighbour_agreement(points: Float[np.ndarray, "n p"], labels: Int[np.ndarray, " n"]) -> float:
    """How much more often than by chance the nearest neighbours (cosine) of a point are of its cluster, at most 1: (p − q) / (1 − q).

    p: share of the 10 neighbours of each that have its label; q: Σ of squared cluster shares, the same for labels drawn at random (Cohen's κ).
    0 where all are of one cluster.
    """
    directions = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    count, alike = min(NEIGHBOURS, len(points) - 1), 0
    for start in range(0, len(points), 1024):
        similarity = directions[start : start + 1024] @ directions.T
        similarity[np.arange(len(similarity)), np.arange(start, start + len(similarity))] = -np.inf
        nearest = np.argpartition(-similarity, count - 1, axis=1)[:, :count]
        alike += int((labels[nearest] == labels[start : start + 1024, None]).sum())
    shares = np.bincount(labels) / len(labels)
    chance = float((shares**2).sum())
    return (alike / (len(points) * count) - chance) / (1 - chance) if chance < 1 else 0.0
