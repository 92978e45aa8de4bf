"""Where compression gets model inputs from: the images of a run folder, or any tensors. All of them are unlabelled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attar.modalities.image import Loader
from attar.records import Clusters, Items, Policy, Preprocess, Selection
from attar.stages.augment.policy import MIRROR_LIMIT, mirror_accuracy
from attar.stages.augment.samples import help_shown, read_samples, with_samples
from attar.stages.encode import as_input
from attar.workspace import Job

WATCHED = 256
"""Validation inputs that training is watched on, at most."""
JUDGED = 32
"""Validation inputs of a batch."""
NUDGE = 0.125
"""How far training views are moved, as a share of the side."""
ERASED = (0.2, 0.45)
"""Side of the square that is erased, as a share of the shorter side of the view."""


PIECE = 2**21
"""Numbers of a piece of a batch, 13 photos of 224 × 224: what its layers make stays near the processor. A training step of MobileNetV2 takes 211 ms of processor time a photo in pieces of 64, 66 in 16, 53 in 8; a pass 51, 19 and 20."""


class Feed(Protocol):
    """Model inputs for calibration, training and judging, by the split of their item. No test input ever comes from here."""

    count: int
    """Training items."""
    clusters: np.ndarray | None
    """Cluster of each validation item, in the order of `validation`; None where there are none."""

    def example(self, count: int = 1) -> Tensor:
        """Zeros in the shape and type of `count` inputs."""

    def calibration(self, count: int, size: int) -> list[Tensor]:
        """Batches of at most `size` of the same `count` training inputs on every call, as they are (not augmented)."""

    def inputs(self, size: int) -> Iterator[Tensor]:
        """All training inputs, as they are, in batches of at most `size`."""

    def training(self, steps: range, size: int) -> Iterator[tuple[int, Tensor]]:
        """Step and augmented inputs of its batch, a function of seed and step alone: half drawn by the items' weight, half evenly over clusters."""

    def held_out(self) -> Tensor:
        """At most WATCHED validation inputs."""

    def validation(self) -> Iterator[Tensor]:
        """The validation inputs that candidates are judged on, in a fixed order, JUDGED at a time."""


def drawing_share(weight: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    """How often each training item (weight (n,), cluster (n,) int) is drawn: half by its weight, half evenly over clusters.

    Small groups are seen, large ones are not starved.
    """
    weight = np.maximum(np.asarray(weight, np.float64), 1e-6)
    total = np.bincount(cluster, weight)
    even = weight / total[cluster]
    return 0.5 * weight / weight.sum() + 0.5 * even / even.sum()


def piece(example: Tensor, most: int) -> int:
    """Items of a batch, 1 … `most`, that are best computed at once, by one of them.

    >>> [piece(torch.zeros(1, 3, side, side), 64) for side in (32, 224, 1024)]
    [64, 13, 1]
    """
    return max(1, min(most, PIECE // max(1, example[0].numel())))


class ItemFeed:
    """The kept images of a run folder, read and decoded as they are needed, through the model's preprocessing."""

    def __init__(self, items: Items, clusters: Clusters, selection: Selection, policy: Policy, preprocess: Preprocess, job: Job) -> None:
        self._items, self._preprocess, self._job = items, preprocess, job
        self._flips = policy.families["flip"].frequency > 0
        split, ids, kept = items.column("split"), items.column("id"), selection.column("keep")
        train = kept & (split == "train")
        self._train, own = ids[train], clusters.column("cluster")[train]
        self._share = drawing_share(selection.column("weight")[train], own)
        judged = kept & ~selection.column("leak") & (split == "validation")
        self._judged = ids[judged] if judged.any() else items.ids("validation")
        self.count = len(self._train)
        self.clusters: np.ndarray | None = clusters.column("cluster")[self._judged]
        made = policy.generated if help_shown(policy.evidence) else None
        self._samples = read_samples(made, preprocess) if made is not None else None

    def _stream(self, ids: np.ndarray, size: int) -> Iterator[Tensor]:
        """Model inputs of some items, a batch at a time."""
        preprocess = self._preprocess
        with Loader(self._items, preprocess, workers=self._job.workers) as loader:
            for _, images in loader.stream(ids[start : start + size] for start in range(0, len(ids), size)):
                yield as_input(images, preprocess)

    def example(self, count: int = 1) -> Tensor:
        return torch.zeros(count, 3, *self._preprocess.size)

    def calibration(self, count: int, size: int) -> list[Tensor]:
        return list(self._stream(np.sort(self._job.rng("calibration").permutation(self._train)[:count]), size))

    def inputs(self, size: int) -> Iterator[Tensor]:
        return self._stream(self._train, size)

    def training(self, steps: range, size: int) -> Iterator[tuple[int, Tensor]]:
        preprocess, job = self._preprocess, self._job
        with Loader(self._items, preprocess, workers=job.workers) as loader:
            drawn = (job.rng("batch", step).choice(self._train, min(size, self.count), p=self._share) for step in steps)
            for step, (_, images) in zip(steps, loader.stream(drawn)):
                if self._samples is not None:
                    images = with_samples(images, self._samples, job.rng("samples", step))
                yield step, nudged(as_input(images, preprocess), self._flips, job.rng("view", step))

    def held_out(self) -> Tensor:
        ids = np.sort(self._job.rng("held out").permutation(self._items.ids("validation"))[:WATCHED])
        return torch.cat(list(self._stream(ids, JUDGED)))

    def validation(self) -> Iterator[Tensor]:
        return self._stream(self._judged, JUDGED)


class TensorFeed:
    """Tensors as they come, (n, …) in memory, floats or whole numbers, split by content.

    Images (n, 1 or 3, height ≥ 16, width ≥ 16) are nudged and, where the mirror probe allows it, flipped. Anything else is not augmented.
    """

    def __init__(self, tensors: Tensor, split: np.ndarray, cluster: np.ndarray, job: Job) -> None:
        """`split` (n,) of records.SPLITS and `cluster` (n,) int of every item; equal items that are not to count twice have the split ""."""
        self._tensors, self._job = tensors, job
        self._train, self._validation = (np.flatnonzero(split == part) for part in ("train", "validation"))
        self._share = drawing_share(np.ones(len(self._train)), cluster[self._train])
        self._image = is_image(tensors)
        self._flips = self._image and may_flip(tensors[torch.from_numpy(self._train)], job)
        self.count = len(self._train)
        self.clusters: np.ndarray | None = cluster[self._validation]

    def _batches(self, rows: np.ndarray, size: int) -> Iterator[Tensor]:
        return (self._tensors[torch.from_numpy(rows[start : start + size])] for start in range(0, len(rows), size))

    def example(self, count: int = 1) -> Tensor:
        return torch.zeros(count, *self._tensors.shape[1:], dtype=self._tensors.dtype)

    def calibration(self, count: int, size: int) -> list[Tensor]:
        return list(self._batches(np.sort(self._job.rng("calibration").permutation(self._train)[:count]), size))

    def inputs(self, size: int) -> Iterator[Tensor]:
        return self._batches(self._train, size)

    def training(self, steps: range, size: int) -> Iterator[tuple[int, Tensor]]:
        for step in steps:
            rows = self._job.rng("batch", step).choice(self._train, min(size, self.count), p=self._share)
            views = self._tensors[torch.from_numpy(rows)]
            yield step, nudged(views, self._flips, self._job.rng("view", step)) if self._image else views

    def held_out(self) -> Tensor:
        return self._tensors[torch.from_numpy(np.sort(self._job.rng("held out").permutation(self._validation)[:WATCHED]))]

    def validation(self) -> Iterator[Tensor]:
        return self._batches(self._validation, JUDGED)


def is_image(tensors: Tensor) -> bool:
    """Whether (n, …) inputs are images by their shape."""
    return tensors.dim() == 4 and tensors.shape[1] in (1, 3) and min(tensors.shape[2:]) >= 16 and tensors.is_floating_point()


def may_flip(images: Tensor, job: Job) -> bool:
    """Whether a linear probe cannot tell images (n, c, h, w) from their mirror images."""
    chosen = torch.from_numpy(np.sort(job.rng("thumbs").permutation(len(images))[:2000]))
    thumbs = F.adaptive_avg_pool2d(images[chosen].mean(1, keepdim=True), 16).flatten(1)
    low, high = thumbs.min(), thumbs.max()
    grey = ((thumbs - low) / (high - low).clamp_min(1e-12) * 255).round().byte().numpy()
    accuracy = mirror_accuracy(grey, job.rng("mirror"))
    if accuracy > MIRROR_LIMIT:
        job.say(f"mirror images are told from originals with {accuracy:.0%} accuracy: no flips")
    return accuracy <= MIRROR_LIMIT


def nudged(images: Tensor, flips: bool, rng: np.random.Generator) -> Tensor:
    """Views of images (n, c, h, w) of any value range: moved by whole pixels, up to NUDGE of the side, reflected at the border; half of them flipped where that may be.

    Nothing is resampled: what a teacher says of blurred images is little use for sharp ones.
    """
    count, _, height, width = images.shape
    reach_y, reach_x = (max(1, round(NUDGE * side)) for side in (height, width))
    padded = F.pad(images, (reach_x, reach_x, reach_y, reach_y), mode="reflect")
    top, left = (torch.from_numpy(rng.integers(0, 2 * reach + 1, count)) for reach in (reach_y, reach_x))
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = left[:, None] + torch.arange(width)
    mirrored = torch.from_numpy(rng.random(count) < 0.5) & flips
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)[:, None, None, :]
    return padded[torch.arange(count)[:, None, None, None], torch.arange(images.shape[1])[None, :, None, None], rows, columns]


def erased(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Views (n, c, h, w) of which half have a square filled with the mean of all, by channel (cutout, DeVries and Taylor 2017)."""
    count, _, height, width = images.shape
    side = np.rint(min(height, width) * rng.uniform(*ERASED, count)).astype(int) * (rng.random(count) < 0.5)
    inside = []
    for length in (height, width):
        start = rng.integers(0, length - side + 1)
        place = np.arange(length)
        inside.append(torch.from_numpy((place >= start[:, None]) & (place < (start + side)[:, None])))
    square = (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
    return torch.where(square, images.mean((0, 2, 3), keepdim=True), images)
