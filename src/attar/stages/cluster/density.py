"""Density: groups inside a cluster, and how typical each item is."""

from __future__ import annotations

import numpy as np
from scipy.special import erf
from sklearn.cluster import HDBSCAN
from sklearn.neighbors import NearestNeighbors

NEIGHBOURS = 10
DENSE = 5_000  # items of a cluster HDBSCAN looks at


def neighbour_distances(points: np.ndarray, labels: np.ndarray, content: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """Mean distance of each item to its 10 nearest neighbours among the pool's items of the same cluster: (n,) float64.

    content (n,) int: items of equal content are no neighbours of each other, so copies do not make an outlier look typical.
    pool (n,) bool: one item per content. Infinite where the cluster has no other item. Blocked: memory grows with n only.
    """
    reach = np.full(len(points), np.inf)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        known = members[pool[members]]
        if not len(known):
            continue
        search = NearestNeighbors(n_neighbors=min(NEIGHBOURS + 1, len(known)), algorithm="brute").fit(points[known])
        distance, index = search.kneighbors(points[members])
        distance = distance.astype(np.float64)
        distance[content[known[index]] == content[members][:, None]] = np.inf
        distance = np.sort(distance, axis=1)[:, :NEIGHBOURS]
        found = np.isfinite(distance)
        reach[members] = np.where(found, distance, 0).sum(1) / np.maximum(found.sum(1), 1)
        reach[members[~found.any(1)]] = np.inf
    return reach


def _surprise(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Robust z of positive values on a log scale: (log v − median) / σ, where σ comes from the upper quartile of the known ones.

    The upper quartile, because distances are skewed and only the far side matters; never under 0.1, so that being 40 % further
    than the median is the least that can count as far, however alike the others are.
    """
    typical = np.log(values[known & np.isfinite(values)])
    middle, upper = np.quantile(typical, [0.5, 0.75]) if len(typical) else (0.0, 0.0)
    return (np.log(values) - middle) / max((upper - middle) / 0.6745, 0.1)


def outlier_scores(reach: np.ndarray, residual: np.ndarray, labels: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """How far from everything each item is: erf(z / (1.5 √2)), 0 (typical) … 1, (n,) float32; 0.98 is z = 3.5.

    z is the larger of two robust z-scores of the logarithm, 0 if negative: of `reach`, the mean distance to the nearest
    neighbours, within the item's cluster (over all items where the cluster has fewer than 20 in the pool); and of `residual`,
    the distance to the clustering space, over all items. The second is what shows an image unlike anything in the folder: it has
    no place among the principal components, so its projection lands in the middle of the others (the Q statistic beside T² of
    Jackson & Mudholkar 1979). The squashing is that of LoOP (Kriegel et al. 2009).
    reach, residual: (n,) distances ≥ 0, reach may be infinite (score 1); labels (n,) int; pool (n,) bool: what is typical is
    learned from these.
    """
    finite = reach[pool & np.isfinite(reach)]
    reach = np.maximum(reach, max(1e-3 * float(np.median(finite)) if len(finite) else 0.0, 1e-12))
    score = np.maximum(_surprise(reach, pool), 0)
    for label in np.unique(labels):
        inside = labels == label
        if (inside & pool).sum() >= 20:
            score[inside] = np.maximum(_surprise(reach, inside & pool)[inside], 0)
    score = np.maximum(score, _surprise(np.maximum(residual, 1e-12), pool))
    return erf(score / (1.5 * np.sqrt(2))).astype(np.float32)


def density_groups(points: np.ndarray, fitted: np.ndarray, smallest: int, rng: np.random.Generator) -> np.ndarray:
    """Density clusters of one coarse cluster's (n, p) points: (n,) int, 0 … g−1, −1 for items between them.

    HDBSCAN (Campello et al. 2013) on the fitted (n,) bool ones, at most 5,000 drawn at random; the others take the label of the
    nearest of those. All −1 when there are not two groups of the smallest size: one group would only repeat the coarse cluster.
    """
    chosen = np.flatnonzero(fitted)
    chosen = np.sort(rng.choice(chosen, DENSE, replace=False)) if len(chosen) > DENSE else chosen
    if len(chosen) < 2 * smallest:
        return np.full(len(points), -1)
    labels = HDBSCAN(min_cluster_size=smallest, algorithm="kd_tree", copy=True).fit(points[chosen]).labels_
    if labels.max() < 1:
        return np.full(len(points), -1)
    nearest = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(points[chosen]).kneighbors(points, return_distance=False)[:, 0]
    return labels[nearest]
