"""The records that flow down the spine. Frozen; a stage reads records and returns one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

SPLITS = ("train", "validation", "test")

ITEM_SCHEMA = pa.schema(
    [
        ("id", pa.int64()),  # 0 … n−1, in the order of `path`
        ("path", pa.string()),  # relative to the data root; members of a container are "archive.tar::member.jpg"
        ("modality", pa.string()),
        ("content", pa.string()),  # hash of the decoded pixels: equal for exact duplicates, whatever the file format
        ("bytes", pa.int64()),  # of the encoded file
        ("width", pa.int32()),  # pixels, after EXIF orientation
        ("height", pa.int32()),
        ("format", pa.string()),  # what the bytes are ("JPEG"), whatever the name says
        ("frame_time", pa.float64()),  # seconds from the start of the video; null for still images
        ("split", pa.string()),  # one of SPLITS
        ("note", pa.string()),  # what had to be changed to read it ("rotated by EXIF"); empty when nothing
        ("thumb", pa.binary(256)),  # 16 × 16 grey bytes: the fingerprint near-duplicate checks confirm with
        ("blur", pa.float32()),  # 0 (sharp) … 1 (blurred), see curate/quality.py; NaN or null where there is no edge to judge by
    ]
)
QUARANTINE_SCHEMA = pa.schema([("path", pa.string()), ("reason", pa.string()), ("remedy", pa.string())])
CLUSTER_SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("cluster", pa.int32()),  # coarse cluster, 0 … k−1, by descending size
        ("subcluster", pa.int32()),  # group inside it, numbered across the whole table; −1 for none and for noise
        ("distance", pa.float32()),  # to the cluster's centroid, in the clustering space
        ("density", pa.float32()),  # 1 / mean distance to the nearest neighbours in the cluster
        ("outlier", pa.float32()),  # 0 (typical) … 1 (far from everything): see cluster.outlier_scores
    ]
)
SELECTION_SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("keep", pa.bool_()),
        ("reason", pa.string()),  # why it was dropped ("exact duplicate", "near duplicate", "outlier", "redundant", a flag); empty for kept
        ("witness", pa.int64()),  # the kept item that stands for it; −1 where there is none
        ("similarity", pa.float32()),  # cosine similarity to the witness
        ("weight", pa.float32()),  # kept items: how many items they stand for, itself included; dropped: 0
        ("leak", pa.bool_()),  # a validation or test item with a near duplicate in the training split
        ("flag", pa.string()),  # what is wrong with it, kept or not ("blank", "dark, odd size", …: curate/quality.py); empty for nothing
    ]
)
OBJECT_SCHEMA = pa.schema(
    [
        ("item", pa.int64()),
        ("kind", pa.int32()),  # 0 … kinds−1
        ("score", pa.float32()),  # 0 … 1: how rare in features and colour, how surely told from the rest, how little cut off by the frame
        ("x", pa.int32()),  # box, pixels of the upright original
        ("y", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("area", pa.int64()),  # of the mask, pixels of the upright original
        ("mask_height", pa.int32()),  # the mask at the size it was found: the original's, or smaller
        ("mask_width", pa.int32()),
        ("counts", pa.list_(pa.int32())),  # its run lengths, column by column, zeros first
    ]
)


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How an image becomes a model's input; always taken from the model, its file or the user, never guessed."""

    size: tuple[int, int]
    """Height and width of the input, pixels."""
    resize_shortest: int | None = None
    """Scale the shorter side to this, then crop the centre to `size`; None scales straight to `size`."""
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Per-channel mean, in units of [0, 1]."""
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    """Per-channel standard deviation, in units of [0, 1]."""
    resample: str = "bilinear"
    """Filter: nearest, bilinear, bicubic, lanczos or box (antialiased when shrinking)."""
    origin: str = ""
    """Where these figures come from, in words a person can check."""


@dataclass(frozen=True, kw_only=True)
class Items:
    """What scan found: one row per readable item, and what was set aside and why."""

    root: str
    """The data as the user named it, made absolute: folder, glob, list file, archive or Parquet file."""
    table: pa.Table
    """Schema ITEM_SCHEMA, ordered by id."""
    quarantine: pa.Table
    """Schema QUARANTINE_SCHEMA."""

    def __len__(self) -> int:
        return self.table.num_rows

    def column(self, name: str) -> np.ndarray:
        """One column as a numpy array (strings as objects)."""
        return self.table[name].to_numpy(zero_copy_only=False)

    def ids(self, split: str | None = None) -> np.ndarray:
        """Ids (int64) of one split, or of all items."""
        ids = self.column("id")
        return ids if split is None else ids[self.column("split") == split]


class Shard(NamedTuple):
    ids: np.ndarray  # (m,) int64
    values: np.ndarray  # (m, d) float16 or float32


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """id → embedding, in shards that are read one at a time, and the model that made them."""

    shards: Sequence[Callable[[], Shard]]
    """Each call reads one shard; ids ascend within and across shards."""
    count: int
    dim: int
    model: Model
    """The encoder; for `self` the one that was just trained."""
    signals: tuple[Mapping[str, float], ...] = ()
    """Training curve of the `self` encoder (step, loss, validation loss, effective rank); empty for a given model."""

    def batches(self) -> Iterator[Shard]:
        for shard in self.shards:
            yield shard()

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Vectors of some ids, (len(ids), dim) float32, in the order asked; reads one shard at a time."""
        out = np.empty((len(ids), self.dim), np.float32)
        order = np.argsort(ids, kind="stable")
        wanted = np.asarray(ids)[order]
        for shard in self.batches():
            low, high = np.searchsorted(wanted, [shard.ids[0], shard.ids[-1] + 1])
            if low < high:
                out[order[low:high]] = shard.values[np.searchsorted(shard.ids, wanted[low:high])]
        return out


@dataclass(frozen=True, kw_only=True)
class Head:
    """Embedding → cluster probabilities, of z = (e/‖e‖ − mean) · projection: softmax(−‖z − centroid‖² / temperature), the nearest centroid; or,
    where there are weights, softmax(z · weights + bias), any partition by flat borders; the centroids then only say where its items lie."""

    mean: np.ndarray  # (d,) float32
    projection: np.ndarray  # (d, p) float32
    centroids: np.ndarray  # (k, p) float32
    temperature: float
    weights: np.ndarray | None = None  # (p, k) float32
    bias: np.ndarray | None = None  # (k,) float32


@dataclass(frozen=True, kw_only=True)
class Clusters:
    table: pa.Table
    """Schema CLUSTER_SCHEMA, ordered by id."""
    head: Head
    medoids: np.ndarray
    """(k,) id of the item nearest each centroid."""
    curve: tuple[Mapping[str, float], ...]
    """Score of every number of clusters tried: {"k": 8, "score": 0.31}."""
    separation: float
    """Mean silhouette of the chosen clustering in the clustering space, −1 … 1."""
    method: str
    """In words: what made the clusters, and what chose their number."""
    names: Mapping[int, str] = field(default_factory=dict)
    """Names people gave to clusters, by number; they lie in a file of their own and outlive the stage."""

    @property
    def count(self) -> int:
        return len(self.head.centroids)

    def column(self, name: str) -> np.ndarray:
        return self.table[name].to_numpy(zero_copy_only=False)


@dataclass(frozen=True, kw_only=True)
class Selection:
    table: pa.Table
    """Schema SELECTION_SCHEMA, ordered by id."""
    thresholds: Mapping[str, float]
    """The figures the decisions were made with (near-duplicate similarity, outlier cut, share)."""

    def column(self, name: str) -> np.ndarray:
        return self.table[name].to_numpy(zero_copy_only=False)


class Dial(NamedTuple):
    strength: float  # 0 (identity) … 1 (the family's full range)
    frequency: float  # probability that the family is applied to a view


@dataclass(frozen=True, kw_only=True)
class Policy:
    families: Mapping[str, Dial]
    """Dial of each family of transforms, for items of no particular cluster."""
    clusters: tuple[Mapping[str, Dial], ...] = ()
    """Dials per cluster, by cluster number; empty when the global ones serve all."""
    pick: int | None = None
    """How many of the named entries each view gets, drawn evenly; None draws each by its own frequency."""
    method: str = "defaults"
    """How the dials were found."""
    evidence: tuple[Mapping[str, Any], ...] = ()
    """The measurements behind them."""
    generated: Path | None = None
    """Folder of generated items (samples.parquet, accepted ones as PNG, sheet.png); None where there are none."""

    def of(self, cluster: int | None = None) -> Mapping[str, Dial]:
        return self.families if cluster is None or not self.clusters else self.clusters[cluster]


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """What the search found: the policy to take, and the figures of all."""

    policy: Policy
    rows: tuple[Mapping[str, Any], ...]
    """One per policy, best first: rank, policy, eliminated (round, or empty), seeds, cost, score and every yardstick with interval."""
    verdict: str
    """In a sentence."""


@dataclass(frozen=True, kw_only=True)
class Objects:
    """What stands out in each image, in shards that are read one at a time."""

    shards: Sequence[Callable[[], pa.Table]]
    """Each call reads one shard, schema OBJECT_SCHEMA; items ascend within and across shards, scores descend within an item."""
    images: pa.Table
    """id, path, width, height of every item, ordered by id."""
    kinds: tuple[Mapping[str, Any], ...]
    """One per kind, the largest first: kind, objects (how many), item and score of the one nearest its centre."""
    method: str
    """In words: how they were found."""
    sheet: bytes
    """A PNG file: some of the images with boxes and masks drawn, a colour per kind."""

    @property
    def count(self) -> int:
        return sum(kind["objects"] for kind in self.kinds)

    def batches(self) -> Iterator[pa.Table]:
        for shard in self.shards:
            yield shard()

    def foreground(self) -> np.ndarray:
        """The box x0, y0, x1, y1 around all objects of each item, (items, 4) float64 in pixels; NaN where there are none: `boxes` of attar.Augment."""
        boxes = np.tile([np.inf, np.inf, -np.inf, -np.inf], (self.images.num_rows, 1))
        for table in self.batches():
            item, x, y, width, height = (table[name].to_numpy() for name in ("item", "x", "y", "width", "height"))
            np.minimum.at(boxes[:, :2], item, np.stack([x, y], 1))
            np.maximum.at(boxes[:, 2:], item, np.stack([x + width, y + height], 1))
        return np.where(np.isfinite(boxes), boxes, np.nan)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A network as weights plus the recipe that rebuilds its graph."""

    source: Mapping[str, Any]
    """What builds the uncut graph: {"source": "hf:…", …}; see models.sources.build."""
    state: Mapping[str, Any]
    """name → torch tensor."""
    preprocess: Preprocess
    shape: tuple[int, ...] = ()
    """Shape of one input that comes as a tensor and is taken as it is; empty for images, whose shape is that of `preprocess`."""
    dtype: str = "float32"
    """Type of the inputs."""
    classes: tuple[str, ...] = ()
    """Class names in the order of the logits; empty for an encoder."""
    cuts: tuple[Any, ...] = ()
    """Structural cuts replayed on the graph before the weights are loaded: (module, is_out, channels removed)."""
    head: Head | None = None
    parameters: int = 0
    macs: int = 0
    """Multiply-accumulates of one item."""
    lineage: tuple[str, ...] = ()
    """What was done to it, in order, on what evidence."""
    signals: tuple[Mapping[str, float], ...] = ()
    """Training curve of the stage that made it."""


class Figure(NamedTuple):
    """One figure with its interval; `low` = `high` = `value` for exact counts."""

    name: str  # "agreement", "accuracy", "latency_ms" …
    of: str  # "original" or "student"
    value: float
    low: float
    high: float
    n: int
    split: str
    method: str  # how the interval was made: "exact 95 %", "bootstrap 95 %", "count"
    unit: str  # "share", "ms", "bytes", "ratio" …


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One point of the Pareto list; its file has been built and measured."""

    name: str
    model: Model
    onnx: Path
    """The file as it would be shipped."""
    precision: str
    """"float32", "float16" or "int8"."""
    runtime: str = "onnxruntime"
    """The runtime it was judged and timed in, and is to be run in: "onnxruntime" or "openvino"."""
    figures: Mapping[str, float]
    """size (bytes), parameters, macs, latency (ms), agreement (validation share) and n of it; ratios to the original end in "_ratio"."""


@dataclass(frozen=True, kw_only=True)
class Front:
    original: Candidate
    """The original in float32 ONNX, run by ONNX Runtime: what the ratios are against."""
    candidates: tuple[Candidate, ...]
    chosen: str
    """Name of the candidate delivered."""
    budget: str
    met: bool
    reason: str
    """Why it stopped, and which constraint binds when the budget was not met."""
    threads: int
    """Threads of the latency measurement."""

    @property
    def student(self) -> Candidate:
        return next(c for c in (*self.candidates, self.original) if c.name == self.chosen)


class Certificate(NamedTuple):
    """What the student keeps of the original, on test items that nothing was fitted to, chosen on or calibrated with."""

    kind: str  # what agreeing means: "same top-1 class as the original", or the same most probable cluster
    agreement: Figure
    worst_cluster: Figure | None  # of the clusters with enough test items; None where there is none
    per_cluster: tuple[Mapping[str, Any], ...]  # cluster, n, value, low, high

    def __str__(self) -> str:
        text = f"{self.kind} on {_interval(self.agreement)} untouched test items"
        return text + (f"; in the worst cluster on {_interval(self.worst_cluster)}" if self.worst_cluster else "")


def _interval(figure: Figure) -> str:
    return f"{figure.value:.1%} (95 % interval {figure.low:.1%} to {figure.high:.1%}) of {figure.n}"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    figures: tuple[Figure, ...]
    per_cluster: tuple[Mapping[str, Any], ...] = ()
    """Agreement in each cluster: cluster, n, value, low, high."""
    notes: tuple[str, ...] = ()
    """What could not be measured, and why."""

    def get(self, name: str, of: str = "student") -> Figure | None:
        return next((f for f in self.figures if f.name == name and f.of == of), None)

    @property
    def certificate(self) -> Certificate:
        agreement = next(figure for figure in self.figures if figure.name == "agreement")
        kind = agreement.method.partition("; ")[2]
        return Certificate(kind, agreement, self.get("agreement_worst_cluster"), self.per_cluster)


@dataclass(frozen=True, kw_only=True)
class Export:
    """The deliverable: RUN/model, usable without attar's training side."""

    onnx: Path
    card: Mapping[str, Any]
    checks: Mapping[str, float] = field(default_factory=dict)
    """Largest difference between the file and the torch model on real items, and share of equal decisions."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """The report."""

    html: str
    sentence: str
    """The result in one sentence with its figures."""
