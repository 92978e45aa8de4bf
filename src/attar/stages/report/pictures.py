"""The photos of the page: which items are shown where, each opened once, as data URIs."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from attar.errors import DataError
from attar.modalities.image import Loader, show
from attar.records import Clusters, Items, Policy, Preprocess, Selection
from attar.stages.augment.engine import preview
from attar.stages.report import words
from attar.workspace import Job

SIDE = 128  # pixels of a picture in a gallery
LARGE = 220  # of the item in the middle of a cluster
SMALL = 72  # of a picture on the map, as wide again as it is drawn
TYPICAL, BORDER = 5, 5  # pictures in a gallery besides the medoid
VIEWS = 6


class Photo(NamedTuple):
    """One item as the page shows it; `uri` is empty when its file can no longer be read."""

    id: int
    uri: str
    path: str


class Gallery(NamedTuple):
    cluster: int
    total: int
    share: float
    groups: int
    kept: int
    medoid: Photo
    typical: list[Photo]
    border: list[Photo]
    name: str = ""


class Views(NamedTuple):
    """One item and what the augmentation makes of it."""

    cluster: int
    path: str
    original: str
    views: list[str]


def uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")


class Album:
    """Pictures by item and size, each file opened once; what cannot be opened any more is absent."""

    def __init__(self, items: Items) -> None:
        self.paths = items.column("path")
        self._pictures: dict[tuple[int, int], str] = {}
        self.missing: set[int] = set()

    def load(self, loader: Loader | None, wanted: Iterable[tuple[int, int]], job: Job) -> None:
        """Opens every (id, side) wanted; without a loader all are missing."""
        sides: dict[int, set[int]] = {}
        for item, side in wanted:
            sides.setdefault(int(item), set()).add(side)
        if loader is None:
            self.missing |= sides.keys()
            return

        def small(item: int) -> dict[tuple[int, int], str]:
            image = _original(loader, item)
            return {} if image is None else {(item, side): uri(show(image, side)) for side in sorted(sides[item])}

        order = sorted(sides)
        with job.progress(len(order), "pictures") as bar, ThreadPoolExecutor(job.workers) as pool:
            for item, found in zip(order, pool.map(small, order)):
                self._pictures |= found
                if not found:
                    self.missing.add(item)
                bar.update()

    def photo(self, item: int, side: int = SIDE) -> Photo:
        return Photo(int(item), self._pictures.get((int(item), side), ""), words.plain(self.paths[item]))


@contextmanager
def opened(items: Items, preprocess: Preprocess, workers: int) -> Iterator[Loader | None]:
    """A loader of the items, or None when the data as a whole is gone: the report says what is recorded all the same."""
    try:
        loader = Loader(items, preprocess, workers=workers)
    except DataError:
        yield None
        return
    with loader:
        yield loader


def _original(loader: Loader, item: int) -> Image.Image | None:
    """An item's image, or None when its file was moved, changed or broken since the scan."""
    try:
        return loader.original(item)
    except Exception:  # archives raise what they like when they were replaced; a report with a gap beats no report
        return None


def members(clusters: Clusters, selection: Selection) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each cluster the ids to show: typical ones by distance, then border ones, farthest first; copies and outliers left out."""
    keep = selection.column("keep") | (selection.column("reason") == "redundant")
    shown = np.isin(clusters.column("id"), selection.column("id")[keep])
    ids, cluster, distance = clusters.column("id"), clusters.column("cluster"), clusters.column("distance")
    groups = []
    for number, medoid in enumerate(clusters.medoids):
        inside = (cluster == number) & shown & (ids != medoid)
        order = ids[inside][np.argsort(distance[inside], kind="stable")]
        groups.append((order[:TYPICAL], order[TYPICAL:][::-1][:BORDER]))
    return groups


def galleries(clusters: Clusters, selection: Selection, album: Album) -> list[Gallery]:
    """A gallery for each cluster, in the order of their numbers."""
    ids, cluster, fine = clusters.column("id"), clusters.column("cluster"), clusters.column("subcluster")
    kept = np.isin(ids, selection.column("id")[selection.column("keep")])
    found = []
    for number, (typical, border) in enumerate(members(clusters, selection)):
        inside = cluster == number
        found.append(
            Gallery(
                number,
                int(inside.sum()),
                float(inside.mean()),
                len(np.unique(fine[inside & (fine >= 0)])),
                int((inside & kept).sum()),
                album.photo(clusters.medoids[number], LARGE),
                [album.photo(item) for item in typical],
                [album.photo(item) for item in border],
                clusters.names.get(number, ""),
            )
        )
    return found


def augmented(
    loader: Loader | None, items: Items, clusters: Clusters, policy: Policy, missing: set[int], job: Job, most: int = 5
) -> list[Views]:
    """The middle item of the largest clusters beside augmented views of it, as the model would be shown them."""
    sizes = np.bincount(clusters.column("cluster"), minlength=clusters.count)
    order = [int(c) for c in np.argsort(-sizes, kind="stable")]
    numbers = np.array([c for c in order if int(clusters.medoids[c]) not in missing][:most])
    if loader is None or not len(numbers):
        return []
    images = loader.batch(clusters.medoids[numbers])
    views = preview(images, policy, numbers, job.rng("views"), VIEWS)
    paths = items.column("path")
    return [
        Views(int(c), words.plain(paths[clusters.medoids[c]]), _picture(image), [_picture(view) for view in row])
        for c, image, row in zip(numbers, images, views)
    ]


def _picture(image: np.ndarray) -> str:
    return uri(show(Image.fromarray(image), SIDE))


def wanted(
    groups: list[tuple[np.ndarray, np.ndarray]], medoids: np.ndarray, others: Iterable[Any], small: Iterable[Any]
) -> list[tuple[int, int]]:
    """Every (id, side) of the galleries, of the pairs and outliers, and of the map."""
    usual = [*(item for group in groups for half in group for item in half), *others]
    return [(int(item), side) for side, items in ((LARGE, medoids), (SIDE, usual), (SMALL, small)) for item in items]
