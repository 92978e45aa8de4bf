"""Samples of a generator held against the real items: which may be used, whether they are diverse at all, how they are shown and fed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw

from attar.modalities.image import FILTERS
from attar.models.objectives import effective_rank
from attar.records import Head, Preprocess
from attar.stages.cluster.space import head_probabilities, project, squared_distances, unit

SHARE = 0.25
"""Share of a batch that samples take where they are learned from; the check and the training that follows it use the same."""
TAIL = 0.02
"""Share of the real items themselves that each bound on a distance leaves outside."""
UNSURE = 0.1
"""Share of a cluster's real items that its bound on confidence leaves outside."""
COLLAPSED = 0.5
"""Effective rank of samples below which they have collapsed, as a share of that of as many real items."""
COMPARED = 4000
"""Real items, at most, whose own distances the bounds are taken from."""
BLOCK = 1024
SHOWN, BESIDE, ROWS, CELL = 10, 5, 12, 48  # on a contact sheet: samples of a cluster, real items beside them, clusters; pixels of a picture

ACCEPTED = "accepted"
REASONS = (
    "not sure of its cluster",
    "far from its cluster's centre",
    "copy of a training item",
    "unlike every training item",
    "copy of another sample",
)
"""Why a sample is refused, in the order in which it is asked."""
TABLE = "samples.parquet"
SAMPLE_SCHEMA = pa.schema(
    [
        ("sample", pa.int32()),  # its number; accepted ones are the files NUMBER.png
        ("cluster", pa.int32()),  # most probable cluster
        ("confidence", pa.float32()),  # probability of it
        ("distance", pa.float32()),  # to its centroid, in the clustering space
        ("novelty", pa.float32()),  # 1 − cosine similarity to the nearest training item
        ("neighbour", pa.int64()),  # id of that item
        ("verdict", pa.string()),  # ACCEPTED or one of REASONS
    ]
)


class Known(NamedTuple):
    """What real training items look like to the encoder, and the bounds that follow from it."""

    values: np.ndarray  # (n, d) float32, of length one
    head: Head
    confidence: np.ndarray  # (k,) least probability of its own cluster that counts as sure
    reach: np.ndarray  # (k,) largest distance to the centroid
    near: float  # least 1 − cosine similarity to the nearest training item; below it lies a copy
    far: float  # largest one


class Verdicts(NamedTuple):
    """One row per sample, as in SAMPLE_SCHEMA; `neighbour` is a row of Known.values."""

    cluster: np.ndarray
    confidence: np.ndarray
    distance: np.ndarray
    novelty: np.ndarray
    neighbour: np.ndarray
    verdict: np.ndarray  # of strings

    @property
    def mask(self) -> Bool[np.ndarray, " n"]:
        return self.verdict == ACCEPTED


def nearest(
    queries: Float[np.ndarray, "n d"], known: Float[np.ndarray, "m d"], own: Int[np.ndarray, " n"] | None = None
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """1 − cosine similarity to the most similar known vector, and its row; both sides of length one. `own` rows are passed over, one per query."""
    distance, row = np.empty(len(queries), np.float32), np.empty(len(queries), np.int64)
    for start in range(0, len(queries), BLOCK):
        similarity = queries[start : start + BLOCK] @ known.T
        if own is not None:
            similarity[np.arange(len(similarity)), own[start : start + BLOCK]] = -np.inf
        best = similarity.argmax(1)
        row[start : start + BLOCK] = best
        distance[start : start + BLOCK] = 1 - similarity[np.arange(len(best)), best]
    return distance, row


def _placed(vectors: Float[np.ndarray, "n d"], head: Head) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Most probable cluster, its probability and the distance to its centroid."""
    probability = head_probabilities(vectors, head)
    squared = squared_distances(project(vectors, head), head.centroids)
    cluster, rows = probability.argmax(1), np.arange(len(vectors))
    return cluster, probability[rows, cluster], np.sqrt(squared[rows, cluster])


def known(vectors: Float[np.ndarray, "n d"], head: Head, rng: np.random.Generator) -> Known:
    """The bounds that real training items give: quantiles of what they are to each other, each item left out of its own.

    A cluster without items gets bounds that nothing meets.
    """
    values = unit(vectors)
    cluster, confidence, distance = _placed(values, head)
    sure, reach = np.full(len(head.centroids), np.inf), np.zeros(len(head.centroids))
    for number in np.unique(cluster):
        inside = cluster == number
        sure[number] = np.quantile(confidence[inside], UNSURE)
        reach[number] = np.quantile(distance[inside], 1 - TAIL)
    chosen = np.sort(rng.permutation(len(values))[:COMPARED])
    near, far = np.quantile(nearest(values[chosen], values, chosen)[0], [TAIL, 1 - TAIL])
    return Known(values, head, sure, reach, float(near), float(far))


def accepted(embeddings: Float[np.ndarray, "n d"], known: Known) -> Verdicts:
    """Which samples may be used: those the cluster head is sure of, inside their cluster, neither copies nor unlike everything.

    Sure, inside and alike are what 1 − UNSURE or 1 − TAIL of the real training items are to each other, so a sample as good as they are is
    refused about as rarely. Of samples that are copies of each other the first stays.
    """
    values = unit(embeddings)
    cluster, confidence, distance = _placed(values, known.head)
    novelty, neighbour = nearest(values, known.values)
    with np.errstate(invalid="ignore"):  # an embedding without a direction has no place anywhere: NaN meets no bound
        fine = confidence >= known.confidence[cluster], distance <= known.reach[cluster], novelty >= known.near, novelty <= known.far
    verdict = np.select([~each for each in fine], REASONS[:4], ACCEPTED).astype(object)
    standing: list[int] = []
    for row in np.flatnonzero(verdict == ACCEPTED):
        if standing and float((values[standing] @ values[row]).max()) > 1 - known.near:
            verdict[row] = REASONS[4]
        else:
            standing.append(int(row))
    return Verdicts(cluster, confidence, distance, novelty, neighbour, verdict)


def diversity(embeddings: Float[np.ndarray, "n d"], known: Known, rng: np.random.Generator) -> float:
    """Effective rank of samples about the middle of the real items, as a share of that of as many real items; below COLLAPSED they are all alike.

    RankMe (Garrido et al. 2023) of unit vectors less the real items' mean: samples that hardly differ share one direction there.
    """
    middle, count = known.values.mean(0), min(len(embeddings), len(known.values))
    real = known.values[rng.permutation(len(known.values))[:count]]
    ranks = [effective_rank(torch.from_numpy(np.nan_to_num(rows - middle))) for rows in (unit(embeddings[:count]), real)]
    return ranks[0] / ranks[1]


def to_input(images: Sequence[np.ndarray] | UInt8[np.ndarray, "n h w 3"], preprocess: Preprocess) -> UInt8[np.ndarray, "n i j 3"]:
    """Pictures that show what a model sees of an item, at another size, as its input: scaled, never cropped again."""
    height, width = preprocess.size
    sized = [Image.fromarray(image).resize((width, height), FILTERS[preprocess.resample]) for image in images]
    return np.stack([np.asarray(image) for image in sized])


def resized(images: UInt8[np.ndarray, "n h w 3"], side: int) -> UInt8[np.ndarray, "n side side 3"]:
    """A model's inputs as squares of another size, antialiased."""
    return np.stack([np.asarray(Image.fromarray(image).resize((side, side), FILTERS["bilinear"])) for image in images])


def contact_sheet(
    samples: UInt8[np.ndarray, "n s s 3"], clusters: Int[np.ndarray, " n"], real: Mapping[int, UInt8[np.ndarray, "m h w 3"]]
) -> Image.Image:
    """A picture for people: one row per cluster, SHOWN samples on the left, BESIDE real items on the right; the ROWS most frequent clusters."""
    order = sorted(real, key=lambda number: (-int((clusters == number).sum()), number))[:ROWS]
    gap, head = 12, 18
    sheet = Image.new("RGB", (70 + (SHOWN + BESIDE) * CELL + gap, head + CELL * max(1, len(order))), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((70, 3), "generated", fill="black")
    pen.text((70 + SHOWN * CELL + gap, 3), "real", fill="black")
    for row, number in enumerate(order):
        top = head + row * CELL
        pen.text((4, top + CELL // 2 - 6), f"cluster {number}", fill="black")
        for left, images, most in ((70, samples[clusters == number], SHOWN), (70 + SHOWN * CELL + gap, real[number], BESIDE)):
            for place, image in enumerate(images[:most]):
                sheet.paste(Image.fromarray(image).resize((CELL - 2, CELL - 2), FILTERS["bicubic"]), (left + place * CELL, top))
    return sheet


def read_samples(folder: Path, preprocess: Preprocess) -> UInt8[np.ndarray, "n h w 3"]:
    """The accepted samples of a folder as a model's inputs, in the order of their numbers."""
    table = pq.read_table(folder / TABLE)
    numbers = table["sample"].to_numpy()[table["verdict"].to_numpy(zero_copy_only=False) == ACCEPTED]
    return to_input([np.asarray(Image.open(folder / f"{number:06d}.png").convert("RGB")) for number in numbers], preprocess)


def with_samples(
    images: UInt8[np.ndarray, "n h w 3"], samples: UInt8[np.ndarray, "m h w 3"], rng: np.random.Generator
) -> UInt8[np.ndarray, "n h w 3"]:
    """A batch, the last SHARE of it replaced by samples drawn evenly."""
    count = round(SHARE * len(images))
    return np.concatenate([images[: len(images) - count], samples[rng.integers(0, len(samples), count)]])


def help_shown(evidence: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a policy's evidence says that a student learned better with the samples."""
    return any(row.get("verdict") == "helps" for row in evidence)
