"""Which items to learn from: duplicates, outliers and redundant ones are dropped, each with a reason and a witness.

The witness of a dropped item is the kept item that stands for it; `weight` counts for how many items a kept one stands.
Splits never decide about each other: an item's witness is in its own split. What validation and test share with the
training split is only marked, as a leak.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from scipy.spatial.distance import cdist

from attar import config
from attar.formats import read_json, write_json
from attar.records import SELECTION_SCHEMA, SPLITS, Clusters, Items, Selection, Vectors
from attar.scale.local import Tick
from attar.stages.cluster.space import place, unit
from attar.stages.curate import quality
from attar.stages.curate.coreset import core_set, coverage
from attar.stages.curate.pairs import SAMPLE, make_plan, shadows, slack
from attar.workspace import Job

WAVE = 4  # blocks per slot of an engine that are compared at once with those before them
BLOCK = 2048  # items compared with as many others at once: two float32 tables of 16 MB
ROUNDING = 1e-6  # of float32 scalar products: equal vectors must reach a threshold of 1
FLAT = 2.0  # grey levels of standard deviation under which a correlation is one of noise
CAP = 0.05  # largest share of the training split dropped as outliers


def thumbnails_agree(a: np.ndarray, b: np.ndarray, threshold: float) -> np.ndarray:
    """Which thumbnails show the same: (m, t), (n, t) uint8 → (m, n) bool.

    Pearson correlation ≥ threshold; where either has almost no contrast (standard deviation under 2 grey levels) its
    correlation is one of noise, so there the mean absolute difference must be at most 2 grey levels instead.
    """

    def standard(thumbs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        centred = thumbs.astype(np.float32) - thumbs.mean(1, keepdims=True, dtype=np.float32)
        deviation = centred.std(1, keepdims=True)
        return centred / np.maximum(deviation * np.sqrt(np.float32(thumbs.shape[1])), 1e-6), deviation[:, 0] < FLAT

    (left, flat_left), (right, flat_right) = standard(a), standard(b)
    agree = left @ right.T >= threshold - ROUNDING
    agree[flat_left] = cdist(a[flat_left], b, "cityblock") <= FLAT * a.shape[1]
    agree[:, flat_right] = cdist(a, b[flat_right], "cityblock") <= FLAT * a.shape[1]
    return agree


def near_duplicates(a: np.ndarray, b: np.ndarray, thumbs_a: np.ndarray, thumbs_b: np.ndarray, threshold: float) -> np.ndarray:
    """Cosine similarity of near duplicates, −2 for all other pairs: (m, d), (n, d) unit vectors → (m, n) float32.

    Near duplicates are pairs whose cosine similarity reaches the threshold and whose thumbnails agree: the vector alone joins
    different things of one kind, the thumbnail alone different things of one outline.
    """
    similarity = a @ b.T
    near = similarity >= threshold - ROUNDING
    rows, columns = near.any(1), near.any(0)
    if rows.any():
        near[np.ix_(rows, columns)] &= thumbnails_agree(thumbs_a[rows], thumbs_b[columns], threshold)
    return np.where(near, similarity, np.float32(-2))


def pick_leaders(similarity: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Which items stand for themselves, in order: (m, m) of near_duplicates, (m,) bool → (m,) bool.

    A free item is a leader unless an earlier leader is its near duplicate.
    """
    leader = free.copy()
    for row in range(len(leader)):
        if leader[row]:
            leader[row + 1 :] &= similarity[row, row + 1 :] < -1
    return leader


def resolve(witness: np.ndarray) -> np.ndarray:
    """The end of each row's chain of witnesses: (n,) row numbers, −1 for rows that stand for themselves → (n,) row numbers."""
    end = np.where(witness < 0, np.arange(len(witness)), witness)
    while not np.array_equal(end, further := end[end]):
        end = further
    return end


class _Units(NamedTuple):
    """Unit vectors on disk in the order they are compared, so that any block is read alone, and what bounds their cosines (see pairs.py)."""

    path: Path
    dim: int
    width: int  # columns of the bounds; 0 where none would be cheaper than the vectors
    rows: np.ndarray  # (u,) table row of each position
    position: np.ndarray  # (n,) position of each table row, −1 for exact duplicates

    def read(self, index: slice | np.ndarray) -> np.ndarray:
        return np.array(np.memmap(self.path / "vectors.f32", np.float32, "r").reshape(-1, self.dim)[index])

    def grey(self, index: np.ndarray) -> np.ndarray:
        """Their thumbnails, (m, 256) uint8."""
        return np.array(np.memmap(self.path / "thumbs.u8", np.uint8, "r").reshape(-1, 256)[index])

    def suspects(self, a: slice | np.ndarray, b: slice, threshold: float) -> np.ndarray:
        """Which pairs may reach a threshold: (len(a), len(b)) bool, true for all that do."""
        if not self.width:
            return self.read(a) @ self.read(b).T >= threshold - ROUNDING - 2 * slack(self.dim)
        bounds = np.memmap(self.path / "bounds.f32", np.float32, "r").reshape(-1, self.width)
        return bounds[a] @ bounds[b].T >= threshold - ROUNDING - slack(self.width) - slack(self.dim)


def _comparison_order(items: Items, distinct: np.ndarray) -> np.ndarray:
    """Rows of the distinct items, split after split; in each the ones to be kept first: most pixels, then most bytes, then lowest id.

    So of a photo and its thumbnails the photo stays, and of a slow pan every frame that differs from the last one kept.
    """
    split = np.array([SPLITS.index(name) for name in items.column("split")])
    pixels = items.column("width").astype(np.int64) * items.column("height")
    order = np.lexsort((items.ids(), -items.column("bytes"), -pixels, split))
    return order[distinct[order]]


def _write_units(items: Items, vectors: Vectors, distinct: np.ndarray, threshold: float, job: Job) -> _Units:
    rows = _comparison_order(items, distinct)
    position = np.full(len(items), -1)
    position[rows] = np.arange(len(rows))

    def write(folder: Path) -> None:
        folder.mkdir()
        sample = unit(vectors.rows(items.ids()[np.sort(rows)[:: max(1, len(rows) // SAMPLE)]])).astype(np.float64)
        plan = make_plan(sample[np.isfinite(sample).all(1)], threshold)
        axes, start = None if plan.axes is None else plan.axes[:, : plan.coarse], 0
        width = 0 if axes is None else axes.shape[1] + 1
        write_json(folder / "bounds.json", {"width": width})
        with (
            (folder / "vectors.f32").open("wb") as stream,
            (folder / "bounds.f32").open("wb") as bounds,
            (folder / "thumbs.u8").open("wb") as thumbs,
            job.progress(len(items), "normalising vectors") as bar,
        ):
            for first in range(0, len(rows), BLOCK):
                thumbs.writelines(items.table["thumb"].take(rows[first : first + BLOCK]).to_pylist())
            for ids, values in vectors.batches():
                target = position[start : start + len(ids)]
                made = unit(values[target >= 0])
                shadow = made[:, :0] if axes is None else shadows(made, np.linalg.norm(made.astype(np.float64), axis=1), axes)
                for place, row, bound in zip(target[target >= 0].tolist(), made, shadow, strict=True):
                    stream.seek(place * row.nbytes)
                    stream.write(row.tobytes())
                    bounds.seek(place * bound.nbytes)
                    bounds.write(bound.tobytes())
                start += len(ids)
                bar.update(len(ids))

    path = job.build("units", write)
    return _Units(path, vectors.dim, read_json(path / "bounds.json")["width"], rows, position)


@dataclass(frozen=True)
class _Comparing:
    """Work of an engine: which earlier leaders the items of a block are near duplicates of."""

    units: _Units
    split: np.ndarray  # (u,) of each position
    leader: np.ndarray  # (u,) position that stands for each, as far as that is decided
    threshold: float

    def open(self, workers: int) -> AbstractContextManager[Callable[[tuple[slice, list[slice]], Tick], pa.Table]]:
        return nullcontext(self.earlier)

    def _near(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return near_duplicates(self.units.read(a), self.units.read(b), self.units.grey(a), self.units.grey(b), self.threshold)

    def earlier(self, part: tuple[slice, list[slice]], tick: Tick) -> pa.Table:
        """The nearest leader of each item in the blocks before (its own position where there is none), how near, whether it leaks."""
        block, before = part
        own = np.arange(block.start, block.stop)
        own_leader, best, leak = own.copy(), np.full(len(own), -2, np.float32), np.zeros(len(own), bool)
        for other in before:
            same = self.split[other.start] == self.split[block.start]
            index = np.arange(other.start, other.stop)
            index = index[self.leader[index] == index] if same else index
            suspects = self.units.suspects(index, block, self.threshold)
            rows, columns = suspects.any(1), np.flatnonzero(suspects.any(0))
            tick(1)
            if not len(columns):
                continue
            found = self._near(index[rows], own[columns])
            if same:
                better = found.max(0) > best[columns]
                own_leader[columns[better]] = index[rows][found.argmax(0)[better]]
                best[columns] = np.maximum(best[columns], found.max(0))
            else:
                leak[columns] |= found.max(0) > -2
        return pa.table({"leader": own_leader, "best": best, "leak": leak})

    def settled(self, block: slice, missing: list[slice], found: pa.Table, tick: Tick) -> pa.Table:
        """The leader of each item of a block and whether it leaks, when all blocks before are settled; `missing` were not when it was looked at."""
        found = _nearer(found, self.earlier((block, missing), tick)) if missing else found
        own = np.arange(block.start, block.stop)
        own_leader, best = found["leader"].to_numpy().copy(), found["best"].to_numpy()
        suspects = np.triu(self.units.suspects(block, block, self.threshold), 1)
        some = np.flatnonzero(suspects.any(0) | suspects.any(1))
        if len(some):
            near = self._near(own[some], own[some])
            leads = pick_leaders(near, best[some] == -2)
            near = np.where(np.triu(np.broadcast_to(leads[:, None], near.shape), 1), near, np.float32(-2))
            better = ~leads & (near.max(0) > best[some])
            own_leader[some[better]] = own[some[near.argmax(0)[better]]]
        return pa.table({"leader": own_leader, "leak": found["leak"]})


def _nearer(first: pa.Table, second: pa.Table) -> pa.Table:
    """What two looks of one block at different blocks before it found together; the first where they are equally near."""
    better = second["best"].to_numpy() > first["best"].to_numpy()
    columns = {name: np.where(better, second[name].to_numpy(), first[name].to_numpy()) for name in ("leader", "best")}
    return pa.table(columns | {"leak": first["leak"].to_numpy() | second["leak"].to_numpy()})


def _compare(items: Items, units: _Units, threshold: float, job: Job) -> Iterator[pa.Table]:
    """Per block of positions: the position that stands for each item (its own for leaders), and whether it leaks.

    Exact, over all pairs: an item is compared with every earlier leader of its split, so no two leaders are near duplicates and
    every other item is a near duplicate of its leader (the most similar one); a connected group, as of a panning camera, is not
    collapsed into one. Validation and test items are also compared with every training item, kept or not: what comes before
    curation (`self` encoders) has seen them all. Two blocks of bounds, the vectors of those that may be near, and one decision per
    item are all that is held. An engine of other machines compares a wave of blocks at once with all that are settled.
    """
    split = items.column("split")[units.rows]
    edges = np.r_[np.flatnonzero(np.r_[True, split[1:] != split[:-1]]), len(split)]
    blocks = [slice(i, min(i + BLOCK, b)) for a, b in itertools.pairwise(edges) for i in range(a, b, BLOCK)]
    before = [[b for b in blocks[:number] if split[b.start] in ("train", split[block.start])] for number, block in enumerate(blocks)]
    wave = WAVE * job.engine.slots if job.engine.remote else 1
    work = _Comparing(units, split, np.arange(len(split)), threshold)
    with job.progress(sum(len(some) + 1 for some in before), "near duplicates", "blocks") as bar:
        for first in range(0, len(blocks), wave):
            numbers = range(first, min(first + wave, len(blocks)))
            kept = {number: table for number in numbers if (table := job.recall(f"shard-{number:05d}.parquet")) is not None}
            start = blocks[first].start
            parts = {number: (blocks[number], [b for b in before[number] if b.start < start]) for number in numbers if number not in kept}
            looked = dict(job.engine.map(work, parts, bar.update))
            for number in numbers:
                if (found := kept.get(number)) is None:
                    inside = [b for b in before[number] if b.start >= start]
                    found = job.shard(number, functools.partial(work.settled, blocks[number], inside, looked[number], bar.update))
                work.leader[blocks[number]] = found["leader"].to_numpy()
                bar.update(1 + (len(before[number]) if number in kept else 0))
                yield found


class _Decisions:
    """Reason and witness of every row so far; a row without a reason stands."""

    def __init__(self, items: Items) -> None:
        self.train = items.column("split") == "train"
        self.reason = np.full(len(items), "", object)
        self.witness = np.full(len(items), -1)

    def drop(self, rows: np.ndarray, reason: str, witness: np.ndarray | int) -> None:
        self.reason[rows] = reason
        self.witness[rows] = witness

    @property
    def standing(self) -> np.ndarray:
        return self.reason == ""


def _drop_exact(items: Items, decisions: _Decisions) -> None:
    """Equal content in one split: the lowest id stays."""
    content, split = (np.unique(items.column(name), return_inverse=True)[1] for name in ("content", "split"))
    _, first, group = np.unique(content * len(SPLITS) + split, return_index=True, return_inverse=True)
    copies = first[group] != np.arange(len(items))
    decisions.drop(copies, "exact duplicate", first[group][copies])


def _drop_near(items: Items, units: _Units, settings: config.Curate, decisions: _Decisions, job: Job) -> np.ndarray:
    """Drops near duplicates of a leader; returns which validation and test rows leak, shared by all that stand for each other."""
    found = pa.concat_tables(list(_compare(items, units, settings.near_duplicate, job)))
    leader = found["leader"].to_numpy()
    dropped = leader != np.arange(len(leader))
    decisions.drop(units.rows[dropped], "near duplicate", units.rows[leader[dropped]])
    leak = np.zeros(len(items), bool)
    leak[units.rows] = found["leak"].to_numpy()
    content = np.unique(items.column("content"), return_inverse=True)[1]
    leak |= ~decisions.train & np.isin(content, content[decisions.train])
    end = resolve(decisions.witness)
    shared = np.zeros(len(items), bool)
    shared[end[leak]] = True
    return shared[end]


def _drop_flagged(
    items: Items, clusters: Clusters, settings: config.Curate, flagged: Mapping[str, np.ndarray], decisions: _Decisions
) -> None:
    """Training items with a flag that is to be dropped, with their duplicates; the medoids of clusters stay, as with outliers."""
    for name in config.FLAGS:
        if name not in settings.dropped_flags:
            continue
        end = resolve(decisions.witness)
        medoid = end[np.searchsorted(items.ids(), clusters.medoids)]
        rows = decisions.train & decisions.standing & flagged[name]
        rows[medoid] = False
        group = np.isin(end, np.flatnonzero(rows))
        decisions.drop(group, name, medoid[clusters.column("cluster")[end[group]]])


def _drop_outliers(items: Items, clusters: Clusters, settings: config.Curate, decisions: _Decisions, job: Job) -> None:
    """Training items with a score above the cut, the farthest first, with their duplicates, up to the cap.

    Their witness is the medoid of their cluster; what a medoid stands by is never dropped, so no cluster is emptied.
    """
    end = resolve(decisions.witness)
    medoid = end[np.searchsorted(items.ids(), clusters.medoids)]
    score = clusters.column("outlier")
    far = decisions.train & decisions.standing & (score > settings.outlier_cut)
    far[medoid] = False
    rows = np.flatnonzero(far)
    rows = rows[np.lexsort((rows, -score[rows]))]
    sizes = np.bincount(end, minlength=len(items))[rows]
    allowed = int(CAP * decisions.train.sum())
    taken, left = [], allowed
    for row, size in zip(rows.tolist(), sizes.tolist(), strict=True):  # one too often copied to fit does not shield the others
        if size <= left:
            taken.append(row)
            left -= size
    if len(taken) < len(rows):
        job.say(
            f"{sizes.sum()} training items have an outlier score above {settings.outlier_cut:g}, more than the {CAP:.0%} of the split "
            f"that may be dropped as outliers: only the farthest, at most {allowed}, are"
        )
    group = np.isin(end, taken)
    decisions.drop(group, "outlier", medoid[clusters.column("cluster")[end[group]]])


def _drop_redundant(vectors: Vectors, clusters: Clusters, settings: config.Curate, decisions: _Decisions, job: Job) -> None:
    """Keeps a core set of the size asked for, at least one item of each cluster; each of the others has a kept one that stands for it."""
    rows = np.flatnonzero(decisions.train & decisions.standing)
    total = round(settings.keep_share * len(rows)) if settings.keep_items is None else settings.keep_items
    if total >= len(rows):
        return
    points, labels = place(vectors, clusters.head.mean, clusters.head.projection, job)[0][rows], clusters.column("cluster")[rows]
    nearest = core_set(points, labels, clusters.column("distance")[rows], total, settings.core_method, job)
    dropped = nearest != np.arange(len(rows))
    decisions.drop(rows[dropped], "redundant", rows[nearest[dropped]])
    kept = np.flatnonzero(~dropped)
    if len(kept) < len(rows):
        found = coverage(points, labels, kept, job.rng("coverage"))
        job.say(f"core set ({settings.core_method}): {len(kept)} of {len(rows)} items; {found}")


def _similarity(vectors: Vectors, units: _Units, witness: np.ndarray) -> np.ndarray:
    """Cosine similarity of every row to its witness's row, (n,) float32; 1 for rows that are their own."""
    out = np.ones(len(witness), np.float32)
    start = 0
    for ids, values in vectors.batches():
        rows = np.arange(start, start := start + len(ids))
        other = witness[rows] != rows
        pairs = units.read(units.position[witness[rows[other]]])
        out[rows[other]] = np.einsum("nd,nd->n", unit(values[other]), pairs)
    return out


def _funnel(decisions: _Decisions, leak: np.ndarray) -> str:
    train, held = decisions.reason[decisions.train], decisions.reason[~decisions.train]
    steps = " → ".join(
        f"{word} {int(np.isin(train, reasons).sum())}"
        for word, reasons in (
            ("exact duplicates", ["exact duplicate"]),
            ("near duplicates", ["near duplicate"]),
            ("outliers", ["outlier"]),
            ("redundant", ["redundant"]),
            ("flagged", config.FLAGS),
            ("kept", [""]),
        )
        if word != "flagged" or np.isin(train, reasons).any()
    )
    return f"train {len(train)} → {steps}; validation and test {len(held)}: duplicates {int((held != '').sum())}, leaks {int(leak.sum())}"


def curate(items: Items, vectors: Vectors, clusters: Clusters, settings: config.Curate, job: Job) -> Selection:
    """Decides for every item whether it is kept, and if not why and what stands for it.

    In this order: exact duplicates and near duplicates (in every split), outliers, redundant items (in the training split only).
    Flagged items (quality.py) are dropped after duplicates, where that is asked for.
    Σ weight of a split = its items − those dropped as outliers or for a flag. similarity is 1 and witness −1 for kept items. leak marks
    validation and test items with a (near) duplicate in the training split, and those they stand for: keep is not changed by it.
    """
    decisions = _Decisions(items)
    _drop_exact(items, decisions)
    units = _write_units(items, vectors, decisions.standing, settings.near_duplicate, job)
    leak = _drop_near(items, units, settings, decisions, job)
    flagged = quality.of_items(items)
    _drop_flagged(items, clusters, settings, flagged, decisions)
    _drop_outliers(items, clusters, settings, decisions, job)
    _drop_redundant(vectors, clusters, settings, decisions, job)
    end = resolve(decisions.witness)
    stood_for = ~np.isin(decisions.reason, ["outlier", *config.FLAGS])
    weight = np.bincount(end[stood_for], minlength=len(items)).astype(np.float32)
    columns = {
        "id": items.ids(),
        "keep": decisions.standing,
        "reason": decisions.reason,
        "witness": np.where(decisions.standing, -1, items.ids()[end]),
        "similarity": _similarity(vectors, units, end),
        "weight": weight,
        "leak": leak,
        "flag": quality.words(flagged, len(items)),
    }
    if counts := [f"{rows.sum()} {name}" for name, rows in flagged.items() if rows.any()]:
        job.say(f"flagged: {', '.join(counts)}")
    job.say(_funnel(decisions, leak))
    thresholds = {"near_duplicate": settings.near_duplicate, "outlier_cut": settings.outlier_cut, "keep_share": settings.keep_share}
    return Selection(table=pa.table(columns, schema=SELECTION_SCHEMA), thresholds=thresholds | {"outlier_cap": CAP})
