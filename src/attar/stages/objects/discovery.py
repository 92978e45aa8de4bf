"""What stands out in a grid of features, without labels: normalised cuts (TokenCut), the rarest patch (LOST), visual words.

All take unit features (places, dim) of one image; a place is a cell of the map, row by row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from scipy.ndimage import label
from scipy.sparse.linalg import LinearOperator, eigsh

from attar.stages.cluster.space import squared_distances

WEAK = 1e-5
"""Weight of two places that are not alike: keeps the graph in one piece (TokenCut's ε)."""
EIGHT = np.ones((3, 3), int)


def graph(features: Float[np.ndarray, "n d"], alike: float) -> Float[np.ndarray, "n n"]:
    """Weights of pairs of places: 1 where the cosine is above `alike`, else WEAK (Wang et al. 2022, eq. 6)."""
    return np.where(features @ features.T > alike, 1.0, WEAK)


def second_vector(weights: Float[np.ndarray, "n n"]) -> Float[np.ndarray, " n"]:
    """The eigenvector of (D − W) y = λ D y with the second smallest λ, D = diag(W 1); of length 1, its largest entry positive.

    It is D^(−1/2) times the second largest of D^(−1/2) W D^(−1/2), whose largest is known, D^(1/2) 1, and is taken out.
    """
    root = np.sqrt(weights.sum(1))
    first = root / np.linalg.norm(root)
    scaled = weights / root[:, None] / root

    def product(x: np.ndarray) -> np.ndarray:
        x = x.reshape(-1)
        return scaled @ x + x - 2 * first * (first @ x)  # shifted by 1: all eigenvalues from 0, the known one at 0

    n = len(weights)
    start = np.random.default_rng(0).standard_normal(n)  # fixed: the same bits every time
    if n < 4:
        values, vectors = np.linalg.eigh(scaled + np.eye(n) - 2 * np.outer(first, first))
        found = vectors[:, values.argmax()]
    else:
        found = eigsh(LinearOperator((n, n), product, dtype=np.float64), k=1, which="LA", v0=start, tol=1e-5)[1][:, 0]
    found = found / root
    found /= np.linalg.norm(found)
    return found * np.sign(found[np.abs(found).argmax()])


class Part(NamedTuple):
    """What was told from the rest of the grid."""

    strength: Float[np.ndarray, "rows columns"]  # 0 (rest) … 1, 0.5 at the boundary
    inside: Bool[np.ndarray, "rows columns"]


def _soft(values: np.ndarray, boundary: float) -> np.ndarray:
    """Values as strengths: 0 at the least, 0.5 at the boundary, 1 at the largest."""
    low, high = min(values.min(), boundary), max(values.max(), boundary)
    below = 0.5 * (values - low) / max(boundary - low, 1e-12)
    above = 0.5 + 0.5 * (values - boundary) / max(high - boundary, 1e-12)
    return np.where(values > boundary, above, below).clip(0, 1)


def halve(features: Float[np.ndarray, "n d"], alike: float) -> Float[np.ndarray, " n"] | None:
    """The second vector of an image less its mean: the two sides of its normalised cut by their signs. None where nothing stands out."""
    weights = graph(features, alike)
    if weights.min() == 1.0 or weights.sum() - len(weights) < 2 * WEAK * len(weights) ** 2:
        return None  # all places are alike, or none is like another
    vector = second_vector(weights)
    return vector - vector.mean()


def enclosed(inside: Bool[np.ndarray, "rows columns"]) -> float:
    """How much rarer a side is on the border of the grid than within it, −1 … 1: what is in front is seldom cut off by the frame."""
    edge = ring(*inside.shape)
    return float(inside[~edge].mean() - inside[edge].mean()) if not edge.all() else 0.0


def difference(features: Float[np.ndarray, "n d"], side: Bool[np.ndarray, " n"]) -> Float[np.ndarray, " d"]:
    """Unit mean feature of a side less that of the other one."""
    means = np.stack([features[side].mean(0), features[~side].mean(0)])
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-9)
    return means[0] - means[1]


def token_cut(
    features: Float[np.ndarray, "n d"], grid: tuple[int, int], alike: float, figure: Float[np.ndarray, " d"] | None = None
) -> Part | None:
    """The image in two by a normalised cut (TokenCut, Wang et al. 2022); the side whose features lie towards `figure` is what stands in front.

    Without a direction it is the side that keeps away from the border. None where nothing stands out.
    """
    vector = halve(features, alike)
    if vector is None:
        return None
    side = vector > 0
    front = enclosed(side.reshape(grid)) if figure is None else float(difference(features, side) @ figure)
    strength = _soft(vector if front >= 0 else -vector, 0.0).reshape(grid)
    return Part(strength, strength > 0.5)


def lost(features: Float[np.ndarray, "n d"], grid: tuple[int, int], seeds: int = 100) -> Part | None:
    """One object around the place that is like the fewest others (LOST, Siméoni et al. 2021).

    Seed: the place with the fewest positive cosines. It is joined by those of the `seeds` places of lowest degree that are like it; the object is what is
    like them on average and hangs together with the seed. None where all places are alike.
    """
    cosines = features @ features.T
    degree = (cosines > 0).sum(1)
    if degree.min() == degree.max():
        return None
    order = np.argsort(degree, kind="stable")
    near = order[: min(seeds, len(order) // 2)]
    near = near[cosines[near, order[0]] > 0]
    towards = cosines[:, near].mean(1)
    strength = _soft(towards, 0.0).reshape(grid)
    pieces = label(strength > 0.5, EIGHT)[0]
    own = pieces == pieces.reshape(-1)[order[0]]
    return Part(np.where(own, strength, np.minimum(strength, 0.5)), own & (pieces > 0))


class Words(NamedTuple):
    """Kinds of places over all images, and which of them stand in front."""

    centres: Float[np.ndarray, "words d"]
    front: Bool[np.ndarray, " words"]


def word_part(features: Float[np.ndarray, "n d"], grid: tuple[int, int], words: Words) -> Part | None:
    """The places whose word stands in front; strength by how much nearer the next such word is than the next other one. None where there is none."""
    if words.front.all() or not words.front.any():
        return None
    squared = squared_distances(features, words.centres)
    front, rest = squared[:, words.front].min(1), squared[:, ~words.front].min(1)
    strength = (rest / np.maximum(front + rest, 1e-12)).reshape(grid)
    return Part(strength, strength > 0.5) if (strength > 0.5).any() else None


def ring(rows: int, columns: int) -> Bool[np.ndarray, "rows columns"]:
    """The outermost places of a grid."""
    inside = np.zeros((rows, columns), bool)
    inside[[0, -1]] = inside[:, [0, -1]] = True
    return inside


def rarity(features: Float[np.ndarray, "n d"], weights: Float[np.ndarray, " n"]) -> float:
    """How few places are like those of an object, 0 … 1: 1 − their mean positive cosine with all places (LOST's degree); `weights` say how much a place is in."""
    likeness = np.maximum(features @ features.T, 0).mean(1)
    return float(1 - likeness @ weights / max(weights.sum(), 1e-9))


def to_lab(image: UInt8[np.ndarray, "height width 3"]) -> Float[np.ndarray, "height width 3"]:
    """Pixels in CIE Lab, in Pillow's bytes: L 0 … 255, a and b −128 … 127."""
    values = np.asarray(Image.fromarray(image).convert("LAB")).astype(np.float64)
    values[..., 1:] -= 256 * (values[..., 1:] > 127)
    return values


def colourful(lab: Float[np.ndarray, "height width 3"], mask: Bool[np.ndarray, "height width"]) -> float:
    """How far the mean colour of an object is from that of the image (Achanta et al. 2009), 0 … 1: d / (d + mean distance of the pixels)."""
    middle = lab.mean((0, 1))
    away = float(np.linalg.norm(lab[mask].mean(0) - middle))
    usual = float(np.linalg.norm(lab - middle, axis=2).mean())
    return away / (away + usual) if away > 0 else 0.0
