"""Yardsticks: what tells a good encoder from a poor one without a label. Pure kernels: pictures or embeddings in, floats out.

All figures are shares, 0 … 1, larger is better, except the effective rank (objectives.effective_rank), which is no yardstick but a veto: an
embedding that fills a small share of the rank others fill has collapsed, whatever else it scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from attar.stages.cluster.kmeans import fit_centroids
from attar.stages.cluster.space import squared_distances, unit
from attar.stats import neighbours, share_interval

TURNS = 4
CHANCE = 1 / TURNS
INFORMATIVE = 0.05
"""How far above chance turns must be told from the thumbnails, at the lower end of the interval, for orientation to have a meaning."""
CHANGED = 0.1
"""Least difference between a thumbnail and its quarter turns, as a share of the difference between two items, for turns to change the images."""
RIDGE, RIDGE_OF_PIXELS = 1e-3, 1.0
"""Of embeddings; and of pixels, which are many and say little each."""


def linear_probe(
    fitted: Float[np.ndarray, "n dim"],
    labels: Int[np.ndarray, " n"],
    judged: Float[np.ndarray, "m dim"],
    truth: Int[np.ndarray, " m"],
    ridge: float = RIDGE,
) -> float:
    """Share of the judged rows a linear classifier decides right that was fitted to other rows; labels from 0.

    Ridge regression to one-hot labels on columns of mean 0 and variance 1 of the fitted rows, closed form: W = (XᵀX/n + λI)⁻¹ XᵀY/n.
    """
    mean, spread = fitted.mean(0, dtype=np.float64), fitted.std(0, dtype=np.float64)
    scale = np.where(spread > 1e-6 * max(float(spread.max()), 1e-12), 1 / np.maximum(spread, 1e-300), 0.0)
    x, y = (fitted - mean) * scale, np.eye(int(max(labels.max(), truth.max())) + 1)[labels]
    gram = x.T @ x / len(x) + ridge * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x.T @ (y - y.mean(0)) / len(x))
    scores = (judged - mean) * scale @ weights + y.mean(0)
    return float((scores.argmax(1) == truth).mean())


def rotation_probe(turned: Float[np.ndarray, "4 items dim"], ridge: float = RIDGE) -> float:
    """Held-out accuracy with which a linear probe tells by how many quarter turns an image was turned, from its embedding; 0.25 is chance.

    Reed et al. 2021 ("SelfAugment"): over hundreds of augmentation policies it ranks encoders as labels do. Fitted on the first half of the
    items, judged on the others, so that no item's turns are on both sides; then the other way round.
    """
    half = turned.shape[1] // 2
    parts = [np.ascontiguousarray(part, np.float64).reshape(-1, turned.shape[2]) for part in (turned[:, :half], turned[:, half:])]
    labels = [np.repeat(np.arange(TURNS), len(part) // TURNS) for part in parts]
    return float(np.mean([linear_probe(parts[a], labels[a], parts[b], labels[b], ridge) for a, b in ((0, 1), (1, 0))]))


class Orientation(NamedTuple):
    """Whether it means something which way up the images are, and what was found."""

    meaningful: bool
    accuracy: float  # of telling the turns of thumbnails apart
    low: float  # its lower bound, exact 95 % for as many decisions as there are items
    changed: float  # difference a turn makes, as a share of the difference between items


def orientation(thumbs: UInt8[np.ndarray, "items side side"]) -> Orientation:
    """Whether quarter turns change the images, and into something that can be told from them by its thumbnail: without labels or an encoder.

    Items in an order that says nothing; of their thumbnails means of 2 × 2 pixels are looked at, for finer ones tell no more and are learned by heart.

    Seen from above (cells, textures, satellites) every way up is as likely, and an encoder does well to ignore it: then the rotation probe
    would punish what is right.
    """
    half = thumbs.shape[1] // 2
    values = thumbs[:, : 2 * half, : 2 * half].reshape(len(thumbs), half, 2, half, 2).mean((2, 4), dtype=np.float32) / 255
    turned = np.stack([np.rot90(values, turn, (1, 2)).reshape(len(values), -1) for turn in range(TURNS)])
    accuracy = rotation_probe(turned, RIDGE_OF_PIXELS)
    between = float(np.abs(values - np.roll(values, 1, 0)).mean())
    changed = float(np.abs(turned[1:] - turned[0]).mean()) / max(between, 1e-12)
    low = share_interval(round(accuracy * len(values)), len(values))[0]
    return Orientation(changed >= CHANGED and low > CHANCE + INFORMATIVE, accuracy, low, changed)


def pseudo_labels(values: Float[np.ndarray, "items dim"], clusters: int, rng: np.random.Generator) -> Int[np.ndarray, " items"]:
    """k-means clusters of the unit vectors, numbered from 0."""
    points = unit(values)
    return squared_distances(points, fit_centroids(points, clusters, rng)).argmin(1)


def learnability(values: Float[np.ndarray, "items dim"], labels: Int[np.ndarray, " items"]) -> float:
    """Share of the items whose pseudo-label a linear probe on these embeddings learns from the other half of the items; both ways round.

    With labels from the same embeddings it is the learnability of CLID (Lu et al. 2023), with labels from another encoder's it asks how much
    of what that encoder found is in these.
    """
    half = len(values) // 2
    sides = (values[:half], labels[:half]), (values[half:], labels[half:])
    return float(np.mean([linear_probe(*sides[a], *sides[b]) for a, b in ((0, 1), (1, 0))]))


def common_neighbours(near: Sequence[Int[np.ndarray, "items k"]]) -> float:
    """Share of an item's nearest neighbours that two encoders have in common, the mean over all pairs of encoders and items."""
    shares = []
    for a in range(len(near)):
        for b in range(a):
            both = np.sort(np.concatenate([near[a], near[b]], axis=1), axis=1)  # a side names an index once: equal ones lie side by side
            shares.append(np.count_nonzero(both[:, 1:] == both[:, :-1]) / near[a].size)
    return float(np.mean(shares))


def retrieval(first: Float[np.ndarray, "items dim"], second: Float[np.ndarray, "items dim"]) -> float:
    """Share of the items whose nearest (cosine) among the second views of all items is their own second view.

    Under one augmentation for all encoders, not the one each was trained with: a policy that does nothing would have an easy task of its own.
    """
    return float(((unit(first) @ unit(second).T).argmax(1) == np.arange(len(first))).mean())


def information(first: Float[np.ndarray, "items dim"], second: Float[np.ndarray, "items dim"]) -> float:
    """What two views of an item tell of each other through the embedding, nats: ½ Σ log(1 + λᵢ), λ the ratios of variance between items to within them.

    λᵢ are the eigenvalues of S_w⁻¹ S_b (Fisher 1936), S_w the covariance of half the difference of two views, S_b that of their mean less what S_w
    lends it. For Gaussian embeddings each term is the capacity of a direction that carries the item through noise of that strength (Shannon 1948), so
    that both a direction that views destroy and one that is missing count for nothing. Unlike the share of items that are found again it does not
    end where all are found, and it does not care in which directions the encoder happens to be loud. S_w is shrunk by RIDGE of its mean variance.
    """
    a, b = first.astype(np.float64), second.astype(np.float64)
    within = np.cov(((a - b) / np.sqrt(2)).T, bias=True)
    between = np.cov(((a + b) / 2).T, bias=True) - within / 2
    within += max(RIDGE * np.trace(within) / len(within), 1e-12) * np.eye(len(within))
    root = np.linalg.cholesky(within)
    whitened = np.linalg.solve(root, np.linalg.solve(root, between).T)
    return float(0.5 * np.log1p(np.clip(np.linalg.eigvalsh((whitened + whitened.T) / 2), 0, None)).sum())


def steadiness(plain: Int[np.ndarray, "items k"], views: Int[np.ndarray, "items k"]) -> float:
    """Share of an item's nearest neighbours that stay when all items are seen through a view: whether the order of the world survives."""
    return common_neighbours([plain, views])


def near(values: Float[np.ndarray, "items dim"], k: int) -> Int[np.ndarray, "items k"]:
    """The k nearest neighbours (cosine) of each item; fewer where there are not that many others."""
    return neighbours(values, min(k, len(values) - 1))
