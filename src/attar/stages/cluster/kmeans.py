"""k-means."""

from __future__ import annotations

import warnings

import numpy as np
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning

from attar.stages.cluster.space import squared_distances

EXACT = 50_000  # training items up to which k-means is Lloyd's algorithm, not the mini-batch one


def fit_centroids(points: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k-means centroids of (n, p) points, best of four starts: (≤ k, p) float32; fewer only when fewer points are distinct."""
    seed = int(rng.integers(2**31))
    small = len(points) <= EXACT
    model = KMeans(k, n_init=4, random_state=seed) if small else MiniBatchKMeans(k, n_init=4, batch_size=4096, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters: the empty ones are dropped below
        model.fit(points)
    centroids = model.cluster_centers_.astype(np.float32)
    return centroids[np.unique(squared_distances(points, centroids).argmin(1))]
