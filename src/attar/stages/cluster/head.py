"""The cluster head: what places any embedding among the clusters that were found, whatever found them."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from attar.records import Head
from attar.stages.cluster.space import principal_axes, unit

NOWHERE = 10.0
"""Coordinates of a cluster without items: projected unit vectors come no nearer to it than 8."""
NEVER = -1e4
"""Bias of a cluster without items."""
REGRESSED = 20_000
"""Items, at most, that the regression looks at: evenly spaced ones."""
LOOSE = 10.0
"""Inverse strength of the regression's penalty, for points scaled to a mean squared length of one per dimension."""


def middles(points: Float[np.ndarray, "n p"], labels: Int[np.ndarray, " n"], k: int) -> Float[np.ndarray, "k p"]:
    """Mean of each cluster's points, float32; far from everything where a cluster has none."""
    found = np.full((k, points.shape[1]), NOWHERE, np.float32)
    for label in np.unique(labels):
        found[label] = points[labels == label].mean(0, dtype=np.float64)
    return found


def spread_of(points: Float[np.ndarray, "n p"], labels: Int[np.ndarray, " n"], centroids: Float[np.ndarray, "k p"]) -> float:
    """Mean squared distance of the points to the centroid of their cluster."""
    return float(np.square(points - centroids[labels]).sum(1).mean())


def nearest_head(mean: np.ndarray, projection: np.ndarray, centroids: np.ndarray, spread: float) -> Head:
    """The head of nearest centroids; temperature: a quarter of the mean squared distance of an item to its centroid."""
    return Head(mean=mean, projection=projection, centroids=centroids, temperature=spread / 4 or 1e-6)


def regress(points: Float[np.ndarray, "n p"], labels: Int[np.ndarray, " n"], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights (p, k) and bias (k,), float32, of the multinomial logistic regression of the labels on the points.

    The borders nearest to those of any partition that a linear softmax can have; a cluster without points is never the answer.
    """
    chosen = np.unique(np.linspace(0, len(points) - 1, min(len(points), REGRESSED)).astype(int))
    present, own = np.unique(labels[chosen], return_inverse=True)
    weights, bias = np.zeros((points.shape[1], k)), np.full(k, NEVER)
    bias[present] = 0
    if len(present) > 1:
        scale = float(np.sqrt(np.square(points[chosen]).mean())) or 1.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # separable clusters have no optimum: any of the late steps will do
            model = LogisticRegression(C=LOOSE, max_iter=300).fit(points[chosen].astype(np.float64) / scale, own)
        if len(present) == 2:  # scikit-learn has one column for two classes
            weights[:, present[1]], bias[present[1]] = model.coef_[0] / scale, model.intercept_[0]
        else:
            weights[:, present], bias[present] = model.coef_.T / scale, model.intercept_
    return weights.astype(np.float32), bias.astype(np.float32)


def refit_head(embeddings: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], head: Head) -> Head:
    """The head for the embeddings an encoder gives now, perhaps of another width: the same clusters, placed by their items.

    A head of nearest centroids gets the mean of each cluster's items, a linear one is regressed anew; a cluster without items is never the answer.
    """
    values, k = unit(embeddings), len(head.centroids)
    mean = values.mean(0)
    projection = principal_axes(np.cov(values.T.astype(np.float64), bias=True), head.projection.shape[1])
    points = (values - mean) @ projection
    centroids = middles(points, labels, k)
    made = nearest_head(mean, projection, centroids, spread_of(points, labels, centroids))
    if head.weights is None:
        return made
    weights, bias = regress(points, labels, k)
    return replace(made, weights=weights, bias=bias)
