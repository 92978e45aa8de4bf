"""attar objects: what stands out in each image, as boxes and masks, sorted into kinds; from a model's dense features, without labels.

The space of the features and the visual words come from at most SAMPLED training images; then every shard of images is looked at alone, so that an
interrupted search goes on where it stopped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from sklearn.metrics import silhouette_score
from threadpoolctl import threadpool_limits

from attar import config
from attar.errors import DataError
from attar.modalities.image import Loader
from attar.models import sources
from attar.records import OBJECT_SCHEMA, Items, Objects, Preprocess, Vectors
from attar.stages.cluster.kmeans import fit_centroids
from attar.stages.cluster.space import principal_axes, squared_distances, unit
from attar.stages.encode import as_input
from attar.stages.objects import discovery, masks
from attar.stages.objects.dense import Sight, sight
from attar.stages.objects.sheet import drawn, sheet
from attar.workspace import Bar, Job, Stage, Workspace

SAMPLED, PLACES = 128, 64
"""Training images that the space, its figure direction and the words come from, and places of each."""
COMPONENTS, WORDS = 64, 12
"""Dimensions of the space; visual words."""
SHARD, BATCH = 256, 8
MASK_SIDE = 224
"""Longer side of the masks, pixels, at most."""
BLANK = 2.0
"""Standard deviation of the brightness, in levels of 255, below which an image shows nothing."""
ALIKE = 0.2
"""Cosine above which two places are alike (TokenCut's τ)."""
RADIUS, FLOOR = 8, 1e-3
"""Guided filter: windows of 2 RADIUS + 1 pixels of the mask, colours that differ by less than √FLOOR taken for one."""
KINDS = 10
"""Most kinds tried."""
SHOWN = 24
"""Images on the contact sheet."""


class Space(NamedTuple):
    """Where places are compared: unit vectors of (x − mean) · axes; the direction from what lies behind to what stands in front; visual words."""

    mean: np.ndarray  # (channels,) float32
    axes: np.ndarray  # (channels, dim) float32
    figure: np.ndarray  # (dim,) float32
    words: discovery.Words

    def of(self, places: np.ndarray) -> np.ndarray:
        """Features (places, channels) → unit vectors (places, dim)."""
        values = (places.astype(np.float32) - self.mean) @ self.axes
        return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-6)


class Found(NamedTuple):
    """One object of an image."""

    mask: np.ndarray  # (height, width) bool
    score: float  # 0 … 1
    vector: np.ndarray  # (dim,) float32 mean feature


def find(image: np.ndarray, places: np.ndarray, space: Space, settings: config.Objects) -> list[Found]:
    """The objects of one image, best first: pixels (height, width, 3) uint8 at the size of the masks, features (rows, columns, channels).

    A blank image has none.
    """
    if image.mean(2).std() < BLANK:
        return []
    grid = places.shape[:2]
    features = space.of(places.reshape(-1, places.shape[2]))
    part = METHODS[settings.objects_method](features, grid, space)
    if part is None:
        return []
    soft = masks.guided(image / 255, masks.enlarge(part.strength, image.shape[:2]), RADIUS, FLOOR)
    inside = soft > 0.5
    parts = masks.separate(inside, max(1, int(settings.objects_least * inside.size)), settings.objects_neck)
    lab, found = discovery.to_lab(image), []
    for mask in parts:
        weight = masks.shares(mask, grid).ravel()
        vector = features.T @ weight / max(weight.sum(), 1e-9)
        sure = float(soft[mask].mean().clip(0, 1))
        score = discovery.rarity(features, weight) * discovery.colourful(lab, mask) * sure * (1 - masks.contact(mask))
        found.append(Found(mask, score, vector.astype(np.float32)))
    return sorted(found, key=lambda one: -one.score)[: settings.objects_most]


METHODS = {
    "cut": lambda features, grid, space: discovery.token_cut(features, grid, ALIKE, space.figure),
    "lost": lambda features, grid, space: discovery.lost(features, grid),
    "words": lambda features, grid, space: discovery.word_part(features, grid, space.words),
}


class Looker:
    """Items as the pixels and features objects are found in, at any input sizes; a context manager."""

    def __init__(self, items: Items, look: Sight, workers: int) -> None:
        self._items, self._look, self._workers = items, look, workers
        sizes = np.stack([items.column("height"), items.column("width")], 1)
        self._inputs = np.array([look.size_of(int(height), int(width)) for height, width in sizes]).reshape(-1, 2)
        scale = np.minimum(1, MASK_SIDE / sizes.max(1, keepdims=True))
        self._masks = np.maximum(1, np.rint(sizes * scale)).astype(int)

    def stream(self, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Id, pixels (height, width, 3) uint8 at the size of its masks, and features (rows, columns, channels) of each item; by input size, then id."""
        look = self._look
        for size in np.unique(self._inputs[ids], axis=0):
            own = ids[(self._inputs[ids] == size).all(1)]
            with Loader(self._items, replace(look.preprocess, size=tuple(size.tolist())), workers=self._workers) as loader:
                for batch, images in loader.stream(own[start : start + BATCH] for start in range(0, len(own), BATCH)):
                    features = look.dense(as_input(images, look.preprocess)).float().numpy()
                    for item, image, places in zip(batch, images, features):
                        height, width = self._masks[item]
                        small = Image.fromarray(image).resize((int(width), int(height)), Image.Resampling.BOX)
                        yield int(item), np.asarray(small), places


def fit_space(looker: Looker, ids: np.ndarray, job: Job) -> Space:
    """The space from places drawn from some items, then what stands in front from their cuts. Raises DataError where all places are alike."""
    drawn = []
    with job.progress(2 * len(ids), "learning places", "items") as bar:
        for item, _, places in looker.stream(ids):
            flat = places.reshape(-1, places.shape[2])
            drawn.append(flat[job.rng("places", item).permutation(len(flat))[:PLACES]])
            bar.update()
        values = np.concatenate(drawn)
        mean, covariance = values.mean(0), np.cov(values.T.astype(np.float64), bias=True)
        if not np.isfinite(values).all() or np.trace(covariance) <= 1e-12 * max(1.0, float(mean @ mean)):
            raise DataError(
                f"the model's map is the same at all places of {len(ids)} images, or not finite: nothing stands out in it; choose another --model"
            )
        axes = principal_axes(covariance, COMPONENTS)
        nothing = np.zeros(axes.shape[1], np.float32)
        space = Space(mean, axes, nothing, discovery.Words(nothing[None], np.zeros(1, bool)))
        centres = fit_centroids(space.of(values), WORDS, job.rng("words"))
        sides = []
        for _, _, places in looker.stream(ids):
            sides.append(_side(space.of(places.reshape(-1, places.shape[2])), places.shape[:2], centres))
            bar.update()
    return settle(space, centres, [side for side in sides if side is not None])


class Side(NamedTuple):
    """One side of an image's cut."""

    enclosed: float  # how much it keeps away from the border; negative: the other side does
    difference: np.ndarray  # (dim,) from the other side's mean feature to its own
    words: np.ndarray  # (2, words) places of each word on the other side and on it


def _side(features: np.ndarray, grid: tuple[int, int], centres: np.ndarray) -> Side | None:
    vector = discovery.halve(features, ALIKE)
    if vector is None:
        return None
    side, word = vector > 0, squared_distances(features, centres).argmin(1)
    counts = np.stack([np.bincount(word[part], minlength=len(centres)) for part in (~side, side)])
    return Side(discovery.enclosed(side.reshape(grid)), discovery.difference(features, side), counts)


def settle(space: Space, centres: np.ndarray, sides: Sequence[Side]) -> Space:
    """The space with its figure direction: sides' differences by how enclosed the sides are, summed; a word is in front where most of its places are.

    One image alone is often wrong about what stands in front, all together are not.
    """
    if not sides:
        return space
    figure = np.sum([side.enclosed * side.difference for side in sides], 0)
    counts = np.sum([side.words if side.difference @ figure >= 0 else side.words[::-1] for side in sides], 0)
    return space._replace(figure=figure.astype(np.float32), words=discovery.Words(centres, counts[1] > counts[0]))


def _keep(space: Space) -> dict[str, object]:
    """The space as tensors, to be remembered."""
    arrays = {"mean": space.mean, "axes": space.axes, "figure": space.figure, **space.words._asdict()}
    return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}


def _kept(body: dict[str, torch.Tensor]) -> Space:
    arrays = {name: value.numpy() for name, value in body.items()}
    mean, axes, figure = (arrays.pop(name) for name in ("mean", "axes", "figure"))
    return Space(mean, axes, figure, discovery.Words(**arrays))


def _shard(looker: Looker, space: Space, ids: np.ndarray, sizes: np.ndarray, settings: config.Objects, bar: Bar) -> pa.Table:
    """The objects of some items as a table: OBJECT_SCHEMA without kinds, and their mean features."""
    rows: dict[int, list[dict[str, object]]] = {}
    for item, image, places in looker.stream(ids):
        rows[item] = [row(item, one, sizes[item]) for one in find(image, places, space, settings)]
        bar.update()
    schema = OBJECT_SCHEMA.remove(OBJECT_SCHEMA.get_field_index("kind")).append(pa.field("vector", pa.list_(pa.float32())))
    return pa.Table.from_pylist([one for item in sorted(rows) for one in rows[item]], schema=schema)


def row(item: int, one: Found, size: np.ndarray) -> dict[str, object]:
    """An object as a row: its box and area in pixels of the original, whose height and width are given."""
    whole = masks.resize(one.mask, (int(size[0]), int(size[1])))
    x, y, width, height = masks.box_of(whole)
    counts = masks.counts_of(one.mask).astype(np.int32)
    place = {"x": x, "y": y, "width": width, "height": height, "area": int(whole.sum())}
    shape = {"mask_height": one.mask.shape[0], "mask_width": one.mask.shape[1], "counts": counts, "vector": one.vector}
    return {"item": item, "score": one.score, **place, **shape}


def sort_kinds(vectors: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Centres (kinds, dim) of mean features (n, dim): k-means with `count` of them, or (0) as many, up to KINDS, as have the best silhouette.

    One where no number of kinds lies apart at all (no silhouette above 0.1), or where there are too few objects to tell.
    """
    values = unit(vectors)
    if count or len(values) < 2 * KINDS:
        return fit_centroids(values, min(count or 1, len(values)), rng)
    seen = values[rng.permutation(len(values))[:2000]]
    best, chosen = 0.1, 1
    for k in range(2, KINDS + 1):
        labels = squared_distances(seen, fit_centroids(seen, k, rng)).argmin(1)
        score = float(silhouette_score(seen, labels)) if 1 < len(np.unique(labels)) < len(seen) else 0.0
        best, chosen = (score, k) if score > best else (best, chosen)
    return fit_centroids(values, chosen, rng)


def _with_kinds(path: Path, centres: np.ndarray) -> pa.Table:
    """A shard as the record has it."""
    table = pq.read_table(path)
    kinds = squared_distances(unit(_vectors(table, centres.shape[1])), centres).argmin(1)
    return table.drop(["vector"]).add_column(1, OBJECT_SCHEMA.field("kind"), pa.array(kinds, pa.int32())).cast(OBJECT_SCHEMA)


def _vectors(table: pa.Table, dim: int) -> np.ndarray:
    return table["vector"].combine_chunks().flatten().to_numpy().reshape(-1, dim)


def objects(items: Items, vectors: Vectors, settings: config.Objects, job: Job) -> Objects:
    """The objects of all items, from the map of the model that made the vectors; places and words are learned from the training split alone.

    Raises ModelError for a model without a map over the image, DataError where its map is the same everywhere or no image shows anything.
    """
    look = sight(vectors.model, sources.network(vectors.model), settings.objects_side, settings.objects_layer)
    if look.note:
        job.say(look.note)
    looker, sizes = Looker(items, look, job.workers), np.stack([items.column("height"), items.column("width")], 1)
    train = np.sort(job.rng("sample").permutation(items.ids("train"))[:SAMPLED])
    ids, parts = items.ids(), []
    with threadpool_limits(1):  # sums over threads come in any order
        space = _kept(job.once("space.pt", lambda: _keep(fit_space(looker, train, job))))
        with job.progress(len(ids), "finding objects", "items") as bar:
            for number, start in enumerate(range(0, len(ids), SHARD)):
                part = ids[start : start + SHARD]
                table = job.shard(number, functools.partial(_shard, looker, space, part, sizes, settings, bar))
                bar.update(start + len(part) - bar.n)  # a shard that was there already
                parts.append((table["item"].to_numpy(), table["score"].to_numpy(), _vectors(table, space.axes.shape[1])))
        item, score, seen = (np.concatenate(column) for column in zip(*parts))
        if not len(item):
            raise DataError(
                f"{items.root}: no object stands out in any of {len(ids)} images; lower --objects-least, or choose another --model"
            )
        learned = np.isin(item, items.ids("train"))
        centres = sort_kinds(seen[learned] if learned.any() else seen, settings.object_kinds, job.rng("kinds"))
        centres, kinds = _ordered(unit(seen), centres, item, score)
    shards = [functools.partial(_with_kinds, job.folder / f"shard-{number:05d}.parquet", centres) for number in range(len(parts))]
    said = f"{WORDS_OF[settings.objects_method]} on {look.dense.layer.shown}, inputs of about {look.preprocess.size[0]} pixels"
    job.say(f"{len(item)} objects in {len(np.unique(item))} of {len(ids)} images, {len(kinds)} kinds: {said}")
    images = items.table.select(["id", "path", "width", "height"])
    return Objects(shards=shards, images=images, kinds=kinds, method=said, sheet=_sheet(items, shards, job))


WORDS_OF = {"cut": "normalised cuts", "words": "visual words", "lost": "the rarest place of each image"}


def _ordered(
    values: np.ndarray, centres: np.ndarray, item: np.ndarray, score: np.ndarray
) -> tuple[np.ndarray, tuple[dict[str, object], ...]]:
    """Centres by descending number of objects, and what is told of each kind."""
    squared = squared_distances(values, centres)
    mine = squared.argmin(1)
    order = np.argsort(-np.bincount(mine, minlength=len(centres)), kind="stable")
    kinds: list[dict[str, object]] = []
    for number, kind in enumerate(order):
        members = np.flatnonzero(mine == kind)
        if len(members):
            middle = members[squared[members, kind].argmin()]
            kinds.append({"kind": number, "objects": len(members), "item": int(item[middle]), "score": round(float(score[middle]), 4)})
    return centres[order[: len(kinds)]], tuple(kinds)


def _sheet(items: Items, shards: Sequence[Callable[[], pa.Table]], job: Job) -> bytes:
    """Some of the images with what was found in them, drawn by the seed."""
    chosen = np.sort(job.rng("sheet").permutation(items.ids())[:SHOWN])
    rows: dict[int, list[dict[str, Any]]] = {int(item): [] for item in chosen}
    for shard in shards:
        table = shard()
        for one in table.filter(pa.array(np.isin(table["item"].to_numpy(), chosen))).to_pylist():
            rows[one["item"]].append(one)
    square = Preprocess(size=(8, 8))
    with Loader(items, square, workers=1) as loader:
        return sheet([drawn(loader.original(item), found) for item, found in rows.items()])


STAGE = Stage(make=objects, record=Objects, needs=("scan", "embed"), settings=("objects",))
"""Beside the spine: it needs the items and the model that embeds them, and no stage needs it."""


def objects_config(config: config.Config, *, quiet: bool = False) -> Objects:
    """The objects of a run folder, which is taken to the stage embed first where it was not; a finished search for them is not done again."""
    from attar.pipeline import SPINE, run_config

    run_config(config, until="embed", quiet=quiet)
    with Workspace(config.out, SPINE | {"objects": STAGE}) as space:
        return space.run("objects", config, quiet=quiet)
