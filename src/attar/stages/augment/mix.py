"""Mixing: inputs between the items, and who was mixed with whom. A teacher answers for any input, so a student may be asked about mixtures as well.

Every function takes a batch, a generator and a dial (see each for what strength 1 means; strength 0 gives the batch back as it is; an item is mixed
with the probability `frequency`) and returns the mixed batch with its sources, so that soft targets can follow:

>>> batch, labels = torch.tensor([[0.0, 2.0], [4.0, 6.0]]), torch.eye(2)
>>> mixed = mixup(batch, np.random.default_rng(0), (1.0, 1.0))
>>> bool(torch.allclose(mixed.follow(labels) @ batch, mixed.inputs))
True

Averages of whole numbers mean nothing where these are tokens or classes: whole numbers are left alone, save that pieces of uint8 images move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from attar.errors import DataError
from attar.records import Dial
from attar.stages.augment.dials import FULL, dial, members, of_clusters

PLAIN = 0.5
"""Share of the batches that stay as they are in `mix`."""
BEYOND = 0.5
"""Extrapolation of full strength: away from the neighbour by up to this share of the distance (DeVries and Taylor 2017)."""

Dialled = Dial | float | Sequence[float]


class Mixed(NamedTuple):
    """A mixed batch, and what each of its items was made of."""

    inputs: Tensor  # (items, …), as the batch that was given
    sources: Int[np.ndarray, "items parts"]  # numbers of the batch's items
    shares: Float[np.ndarray, "items parts"]  # of each source, each row sums to 1; the neighbour's is below 0 in extrapolation

    def follow(self, targets: Shaped[Tensor, "items ..."]) -> Shaped[Tensor, "items ..."]:
        """Soft targets mixed as the inputs were: Σ share · target of the source. Extrapolated ones can leave the targets' range."""
        if len(targets) != len(self.sources):
            raise DataError(f"{len(targets)} targets for {len(self.sources)} mixed items; expected one each")
        if not targets.is_floating_point():
            raise DataError(
                f"targets of type {targets.dtype} cannot be mixed; give floats, for classes torch.nn.functional.one_hot(…).float()"
            )
        shares = torch.from_numpy(self.shares).to(targets)
        return torch.einsum("np,np...->n...", shares, targets[torch.from_numpy(self.sources).to(targets.device)])


def mix(inputs: Shaped[Tensor, "items ..."], rng: np.random.Generator) -> Shaped[Tensor, "items ..."]:
    """A batch, in PLAIN of the cases; else every item mixed with another of the batch.

    Images (n, c, h, w) are as often blended (mixup, Zhang et al. 2018) as given a box of the other (CutMix, Yun et al. 2019); anything else that is
    made of floats is blended. The share of the other is uniform in 0 … 1, one for the batch. Whole numbers (tokens) are left alone.
    """
    if not inputs.is_floating_point() or rng.random() < PLAIN:
        return inputs
    partner = rng.permutation(len(inputs))
    share, boxed = np.full(len(inputs), rng.random()), rng.random() < 0.5
    if inputs.dim() != 4 or not boxed:
        return _blend(inputs, partner, share)
    height, width = inputs.shape[2:]
    tall, wide = round(height * share[0] ** 0.5), round(width * share[0] ** 0.5)
    top, left = rng.integers(0, height - tall + 1), rng.integers(0, width - wide + 1)
    return _paste(inputs, partner, np.tile([top, left, top + tall, left + wide], (len(inputs), 1)))


def mixup(inputs: Shaped[Tensor, "items ..."], rng: np.random.Generator, strength: Dialled = FULL, *, alpha: float = 1.0) -> Mixed:
    """(1 − λ) · item + λ · another of the batch (Zhang et al. 2018), λ its own for each item.

    λ is strength · Beta(alpha, alpha): uniform in 0 … 1 at full strength and alpha 1. Any floats: images, embeddings, sequences.
    """
    drawn = _drawn(strength, "mixup", len(inputs), rng)
    partner, share = rng.permutation(len(inputs)), drawn * rng.beta(alpha, alpha, len(inputs))
    return _blended(inputs, partner, share)


def cutmix(inputs: Shaped[Tensor, "items ..."], rng: np.random.Generator, strength: Dialled = FULL, *, alpha: float = 1.0) -> Mixed:
    """A box of another item at the same place in each item (Yun et al. 2019): of images (n, c, h, w); of sequences (n, t, d) a stretch of time.

    The box is meant to hold strength · Beta(alpha, alpha) of the area and lies wholly inside, anywhere; the shares are those of the pixels.
    """
    drawn = _drawn(strength, "cutmix", len(inputs), rng)
    if _left_alone(inputs):
        return _same(inputs)
    if inputs.dim() not in (3, 4):
        raise DataError(f"cutmix of inputs of shape {tuple(inputs.shape)}; expected images (n, c, h, w) or sequences (n, t, d): use mixup")
    images = inputs if inputs.dim() == 4 else inputs[:, None]
    height, width = images.shape[2:]
    partner, wanted = rng.permutation(len(images)), drawn * rng.beta(alpha, alpha, len(images))
    tall = np.rint(height * (wanted**0.5 if inputs.dim() == 4 else wanted)).astype(np.int64)
    wide = np.rint(width * wanted**0.5).astype(np.int64) if inputs.dim() == 4 else np.full(len(images), width)
    top, left = rng.integers(0, height - tall + 1), rng.integers(0, width - wide + 1)
    mixed = _paste(images, partner, np.stack([top, left, top + tall, left + wide], 1))
    return _pair(mixed.reshape(inputs.shape), partner, tall * wide / (height * width))


def _paste(
    images: Shaped[Tensor, "items channels height width"], partner: Int[np.ndarray, " items"], boxes: Int[np.ndarray, "items 4"]
) -> Shaped[Tensor, "items channels height width"]:
    """Images with the boxes (top, left, bottom, right) of their partners."""
    height, width = images.shape[2:]
    top, left, bottom, right = torch.from_numpy(boxes).to(images.device).T[:, :, None]
    y, x = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    return torch.where(inside, images[torch.from_numpy(partner).to(images.device)], images)


def mosaic(images: Shaped[Tensor, "items channels height width"], rng: np.random.Generator, strength: Dialled = FULL) -> Mixed:
    """Four items of the batch, each scaled into one of four rectangles that meet in a drawn centre (after Bochkovskiy et al. 2020).

    The item itself is in one of them, drawn evenly; its sides are 1 − strength · u of the whole, u uniform in 1/4 … 3/4. Shares are those of the area.
    """
    drawn = _drawn(strength, "mosaic", len(images), rng)
    if images.dim() != 4:
        raise DataError(f"mosaic of inputs of shape {tuple(images.shape)}; expected images (n, c, h, w)")
    if _left_alone(images):
        return _same(images)
    count, _, height, width = images.shape
    own, corner = 1 - drawn[:, None] * rng.uniform(0.25, 0.75, (count, 2)), rng.integers(0, 4, count)
    sides = np.maximum(np.rint(own * (height, width)).astype(np.int64), 1)
    # Sources by rectangle: the item's own first, then the one beside it, the one above or below, the one across.
    sources = np.stack([np.arange(count), *(rng.permutation(count) for _ in range(3))], 1)
    mixed, shares = images.clone(), np.zeros((count, 4))
    for item in np.flatnonzero(drawn):
        for part, (top, bottom, left, right) in enumerate(_quarters(sides[item], (height, width), int(corner[item]))):
            if bottom > top and right > left:
                mixed[item, :, top:bottom, left:right] = _scaled(images[sources[item, part]], (bottom - top, right - left))
                shares[item, part] = (bottom - top) * (right - left) / (height * width)
    shares[drawn == 0, 0] = 1
    return Mixed(mixed, sources, shares)


def _quarters(own: np.ndarray, size: tuple[int, int], corner: int) -> list[tuple[int, int, int, int]]:
    """Boxes (top, bottom, left, right): the item's own of size `own`, in a corner (1: right, 2: bottom), then those beside it, above or below, across."""
    (tall, wide), (height, width) = own.tolist(), size
    rows = [(height - tall, height), (0, height - tall)] if corner & 2 else [(0, tall), (tall, height)]
    columns = [(width - wide, width), (0, width - wide)] if corner & 1 else [(0, wide), (wide, width)]
    return [(*row, *column) for row in rows for column in columns]


def _scaled(image: Tensor, size: tuple[int, int]) -> Tensor:
    """An image (c, h, w) at another size, bilinear and antialiased, in its own type."""
    if image.shape[1:] == size:
        return image
    small = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
    return (small if image.is_floating_point() else small.round().clamp(0, 255)).to(image.dtype)


def resample(inputs: Shaped[Tensor, "items ..."], rng: np.random.Generator, strength: Dialled = FULL, *, clusters: Any = None) -> Mixed:
    """A bootstrap of the batch: each place is given to an item drawn evenly, with replacement, from its cluster (below 0: no cluster, it stays).

    There is nothing gradual about it: a strength above 0 switches it on. Inputs of any type, since none is changed.
    """
    drawn = _drawn(strength, "resample", len(inputs), rng)
    numbers, sources = of_clusters(clusters, len(inputs)), np.arange(len(inputs))
    for own in members(numbers):
        sources[own] = np.where(drawn[own] > 0, rng.choice(own, len(own)), own)
    taken = torch.from_numpy(sources).to(inputs.device)
    return Mixed(inputs[taken], sources[:, None], np.ones((len(inputs), 1)))


def interpolate(
    inputs: Shaped[Tensor, "items ..."],
    vectors: Any,
    clusters: Any,
    rng: np.random.Generator,
    strength: Dialled = FULL,
    *,
    neighbours: int = 5,
) -> Mixed:
    """item + λ · (neighbour − item), the neighbour one of the k nearest in the same cluster by `vectors` (SMOTE, Chawla et al. 2002, without classes).

    λ is uniform in 0 … strength: up to the neighbour at full strength. Items alone in their cluster, or of none (below 0), are left alone.
    """
    drawn = _drawn(strength, "interpolate", len(inputs), rng)
    partner = neighbour(as_rows(vectors, len(inputs)), of_clusters(clusters, len(inputs)), neighbours, rng)
    return _blended(inputs, partner, drawn * rng.random(len(inputs)))


def extrapolate(
    inputs: Shaped[Tensor, "items ..."],
    vectors: Any,
    clusters: Any,
    rng: np.random.Generator,
    strength: Dialled = FULL,
    *,
    neighbours: int = 5,
) -> Mixed:
    """item + λ · (item − neighbour), the neighbour as in `interpolate`, λ uniform in 0 … strength / 2 (DeVries and Taylor 2017, in feature space).

    Values can leave the range of the inputs: meant for embeddings.
    """
    drawn = _drawn(strength, "extrapolate", len(inputs), rng)
    partner = neighbour(as_rows(vectors, len(inputs)), of_clusters(clusters, len(inputs)), neighbours, rng)
    return _blended(inputs, partner, -BEYOND * drawn * rng.random(len(inputs)))


def neighbour(
    vectors: Float[np.ndarray, "items dim"], clusters: Int[np.ndarray, " items"], neighbours: int, rng: np.random.Generator
) -> Int[np.ndarray, " items"]:
    """One of the k nearest (Euclidean) other items of the same cluster for each item, drawn evenly; itself where there is none.

    Vectors of no dimensions are all equally near.
    """
    if neighbours < 1:
        raise DataError(f"neighbours {neighbours}; expected at least 1")
    if not np.isfinite(vectors).all():
        raise DataError(
            f"vectors of {int((~np.isfinite(vectors).all(1)).sum())} items hold values that are not finite; expected finite ones only"
        )
    partner, choice = np.arange(len(vectors)), rng.random(len(vectors))
    for own in members(clusters):
        near = min(neighbours, len(own) - 1)
        if near and not vectors.shape[1]:
            shift = 1 + (choice[own] * (len(own) - 1)).astype(np.int64)
            partner[own] = own[(np.arange(len(own)) + shift) % len(own)]
        elif near:
            found = NearestNeighbors(n_neighbors=near).fit(vectors[own]).kneighbors(return_distance=False)
            partner[own] = own[found[np.arange(len(own)), (choice[own] * near).astype(np.int64)]]
    return partner


def as_rows(vectors: Any, count: int) -> Float[np.ndarray, "items dim"]:
    """Vectors in float64, from an array or a tensor; raises DataError where they are not one for each of `count` items."""
    rows = np.asarray(vectors.detach().cpu() if isinstance(vectors, Tensor) else vectors, np.float64)
    if rows.ndim != 2:
        raise DataError(f"vectors of shape {rows.shape}; expected one vector per item, shape (items, dimensions)")
    if len(rows) != count:
        raise DataError(f"{len(rows)} vectors for {count} items; expected one each")
    return rows


def _drawn(strength: Dialled, name: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Strength for each item, 0 where it is not drawn."""
    dialled = dial(strength, name)
    return np.where(rng.random(count) < dialled.frequency, dialled.strength, 0.0)


def _left_alone(inputs: Tensor) -> bool:
    return not (inputs.is_floating_point() or (inputs.dtype == torch.uint8 and inputs.dim() == 4))


def _blended(inputs: Tensor, partner: np.ndarray, share: np.ndarray) -> Mixed:
    if not inputs.is_floating_point():
        return _same(inputs)
    share = np.where(partner == np.arange(len(partner)), 0.0, share)  # with itself: nothing, rather than a rounding error
    return _pair(_blend(inputs, partner, share), partner, share)


def _blend(inputs: Tensor, partner: np.ndarray, share: np.ndarray) -> Tensor:
    """(1 − share) · item + share · partner; an item of share 0 keeps its very bits, whatever its partner holds."""
    other = inputs[torch.from_numpy(partner).to(inputs.device)]
    shape = (len(inputs), *[1] * (inputs.dim() - 1))
    own, theirs = (torch.from_numpy(part).to(inputs).view(shape) for part in (1 - share, share))
    return torch.where(theirs == 0, inputs, own * inputs + theirs * other)


def _pair(inputs: Tensor, partner: np.ndarray, share: np.ndarray) -> Mixed:
    return Mixed(inputs, np.stack([np.arange(len(partner)), partner], 1), np.stack([1 - share, share], 1))


def _same(inputs: Tensor) -> Mixed:
    return Mixed(inputs, np.arange(len(inputs))[:, None], np.ones((len(inputs), 1)))
