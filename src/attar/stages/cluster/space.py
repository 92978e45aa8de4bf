"""The space clusters are found in: principal components of unit vectors, read a shard at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.special import softmax

from attar.errors import DataError
from attar.records import Head, Items, Vectors
from attar.workspace import Job

SPREAD = 1e-7  # total variance of unit vectors below which they are one vector up to float16 rounding
RANK = 1e-6  # principal components with less than this share of the first one's variance are rounding noise


def unit(values: np.ndarray) -> np.ndarray:
    """Rows scaled to length one: (n, d) of any float to (n, d) float32; rows without a direction become NaN or infinite."""
    values = np.asarray(values, np.float32)
    with np.errstate(all="ignore"):
        return values / np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True).astype(np.float32)


def project(vectors: np.ndarray, head: Head) -> np.ndarray:
    """Embeddings in the clustering space: (e/‖e‖ − mean) · projection, (n, d) → (n, p) float32."""
    return (unit(vectors) - head.mean) @ head.projection


def squared_distances(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """‖z − c‖² of every point to every centroid: (n, p), (k, p) → (n, k) float32."""
    out = np.empty((len(points), len(centroids)), np.float32)
    for column, centroid in enumerate(centroids):  # the difference itself: ‖z‖² − 2z·c + ‖c‖² loses the small distances in float32
        difference = points - centroid
        out[:, column] = np.einsum("np,np->n", difference, difference)
    return out


def head_scores(points: np.ndarray, head: Head) -> np.ndarray:
    """Logits of points in the clustering space, (n, p) → (n, k) float32: z · weights + bias of a linear head, else −‖z − c‖² / temperature."""
    if head.weights is not None:
        return points @ head.weights + head.bias
    return -squared_distances(points, head.centroids) / np.float32(head.temperature)


def head_probabilities(vectors: np.ndarray, head: Head) -> np.ndarray:
    """Cluster probabilities of embeddings, the softmax of their scores: (n, d) → (n, k) float32, rows sum to 1.

    Of nearest centroids this is the posterior of equally likely spherical Gaussians of variance temperature/2.
    """
    return softmax(head_scores(project(vectors, head), head), axis=1)


def principal_axes(covariance: np.ndarray, components: int) -> np.ndarray:
    """The first principal axes of a (d, d) float64 covariance: (d, p) float32, p = min(components, numerical rank).

    Each axis points to where its largest loading is positive, so that the result does not depend on the solver's signs.
    """
    values, axes = np.linalg.eigh(covariance)
    values, axes = values[::-1], axes[:, ::-1]
    axes = axes[:, : min(components, int((values > values[0] * RANK).sum()))]
    signs = np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    return (axes * signs).astype(np.float32)


def _read(vectors: Vectors, job: Job, label: str) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows of the table, unit vectors) of each shard."""
    start = 0
    with job.progress(vectors.count, label) as bar:
        for shard in vectors.batches():
            yield slice(start, start := start + len(shard.ids)), unit(shard.values)
            bar.update(len(shard.ids))


def place(vectors: Vectors, mean: np.ndarray, projection: np.ndarray, job: Job) -> tuple[np.ndarray, np.ndarray]:
    """All items in the clustering space, (n, p) float32, and how far from it each lies, (n,) float32; reads one shard at a time."""
    points = np.empty((vectors.count, projection.shape[1]), np.float32)
    residual = np.empty(vectors.count, np.float32)
    for rows, values in _read(vectors, job, "placing vectors"):
        centred = values - mean
        points[rows] = centred @ projection
        residual[rows] = np.sqrt(np.maximum((centred**2).sum(1) - (points[rows] ** 2).sum(1), 0))
    return points, residual


def moments_of(items: Items, vectors: Vectors, fitted: np.ndarray, job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and covariance (d, d), float64, of the fitted items' unit vectors; refuses vectors without a direction."""
    total, second = np.zeros(vectors.dim), np.zeros((vectors.dim, vectors.dim))
    bad: list[int] = []
    for rows, values in _read(vectors, job, "principal components"):
        whole = np.isfinite(values).all(1)
        bad.extend((rows.start + np.flatnonzero(~whole)).tolist())
        values = values[whole & fitted[rows]].astype(np.float64)
        total += values.sum(0)
        second += values.T @ values
    if bad:
        names = ", ".join(items.table["path"].take(bad[:3]).to_pylist())
        raise DataError(
            f"{len(bad)} of {vectors.count} vectors have no direction (all zero, NaN or infinite), the first of {names}; "
            "the encoder collapsed or overflowed on these images: choose another with --model, or take the images out"
        )
    mean = total / fitted.sum()
    return mean, second / fitted.sum() - np.outer(mean, mean)


def axes_of(items: Items, vectors: Vectors, fitted: np.ndarray, components: int, job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and projection (d, p), float32, of the clustering space; refuses data that is all one point."""
    train = int((items.column("split") == "train").sum())
    if fitted.sum() < 2:
        raise DataError(
            f"training images: {train}, different ones among them: {int(fitted.sum())}; clustering needs at least 2 that differ in their "
            "pixels: add other images"
        )
    mean, covariance = moments_of(items, vectors, fitted, job)
    spread = float(np.trace(covariance))
    if spread < SPREAD:
        raise DataError(
            f"the encoder gives all {train} training images the same vector (variance {spread:.1e}, expected above {SPREAD:.0e}): "
            "it has collapsed; choose another with --model, or train it longer with --self-steps"
        )
    return mean.astype(np.float32), principal_axes(covariance, components)
