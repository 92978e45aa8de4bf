"""What was in the folder: the map, the galleries, the funnel, duplicates, outliers, leaks and what could not be read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from attar.config import FLAGS
from attar.records import SPLITS, Clusters, Items, Selection, Vectors
from attar.stages.augment.controller import is_dial
from attar.stages.cluster.space import project
from attar.stages.report import charts, words
from attar.stages.report.pictures import SMALL, Album, Photo
from attar.stages.signals import closing
from attar.workspace import Job

ON_MAP = 1500  # items; more would only overprint each other
MAP = (860, 560)  # pixels
TILE = 34  # pixels of a photo on the map
SHOWN = 12  # pairs and outliers
ROWS = 50  # of the quarantine table
WORDS = {
    "exact duplicate": "exact duplicates",
    "near duplicate": "near duplicates",
    "outlier": "outliers",
    "redundant": "redundant",
}


class Step(NamedTuple):
    """One step of the funnel: how many left, and how many remained."""

    name: str
    out: int
    left: int


class Pair(NamedTuple):
    dropped: Photo
    witness: Photo
    reason: str
    similarity: float


class Spots(NamedTuple):
    """The items on the map."""

    ids: np.ndarray  # (m,)
    clusters: np.ndarray  # (m,)
    points: np.ndarray  # (m, 2) pixels
    pictured: list[int]  # rows shown as photos


def spots(vectors: Vectors, clusters: Clusters, job: Job) -> Spots:
    """At most ON_MAP items laid out in the plane by t-SNE (van der Maaten & Hinton 2008) on the clustering space.

    Started from principal components and run on one thread, so that the same items give the same map.
    """
    ids = clusters.column("id")
    if len(ids) > ON_MAP:
        rest = np.setdiff1d(ids, clusters.medoids)
        drawn = job.rng("map").choice(rest, ON_MAP - len(clusters.medoids), replace=False)
        ids = np.sort(np.concatenate([np.unique(clusters.medoids), drawn]))
    values = np.asarray(project(vectors.rows(ids), clusters.head), np.float64)
    numbers = clusters.column("cluster")[np.searchsorted(clusters.column("id"), ids)]
    with job.progress(1, "laying out the map", "maps") as bar:
        points = charts.fit(_plane(values, job.seed), *MAP, 28)
        bar.update()
    medoids = [int(row) for row in np.searchsorted(ids, np.unique(clusters.medoids))]
    return Spots(ids, numbers, points, charts.place(points, medoids, TILE + 4, 110))


def _plane(values: np.ndarray, seed: int) -> np.ndarray:
    """(n, p) → (n, 2); too few items, or all the same, are laid out along their own first axes."""
    spread = values - values.mean(axis=0)
    if len(values) < 8 or np.allclose(spread, 0):
        return np.pad(spread, ((0, 0), (0, max(0, 2 - spread.shape[1]))))[:, :2]
    with threadpool_limits(1):
        u, scale, _ = np.linalg.svd(spread, full_matrices=False)
        start = np.pad(u[:, :2] * scale[:2], ((0, 0), (0, max(0, 2 - u.shape[1]))))
        start *= 1e-4 / start[:, 0].std()  # the scale the method's authors advise, so that no pair starts far apart
        layout = TSNE(perplexity=min(30, (len(values) - 1) / 3), init=start.astype(np.float32), random_state=seed, n_jobs=1)
        return layout.fit_transform(values)


def draw_map(found: Spots, album: Album, sample_of: int, names: Mapping[int, str]) -> dict[str, Any]:
    said = {number: f" ({name})" for number, name in names.items()}
    titles = [
        f"{words.middle(album.paths[item], 60)} · cluster {cluster}{said.get(int(cluster), '')}"
        for item, cluster in zip(found.ids, found.clusters)
    ]
    photos = [(row, album.photo(found.ids[row], side=SMALL)) for row in found.pictured]
    pictures = [charts.Picture(row, photo.uri, titles[row]) for row, photo in photos if photo.uri]
    svg = charts.cluster_map(found.points, found.clusters, found.ids.tolist(), titles, pictures, TILE, *MAP)
    return {"svg": svg, "shown": len(found.ids), "of": sample_of}


def funnel(items: Items, selection: Selection) -> list[Step]:
    """From the files found to the items kept; reasons in the order they are decided in."""
    broken = items.quarantine.num_rows
    reasons = selection.column("reason")[~selection.column("keep")]
    left = len(items)
    steps = [Step("files found", 0, left + broken)]
    if broken:
        steps.append(Step("could not be read", broken, left))
    for reason in (*WORDS, *sorted(set(reasons) - WORDS.keys())):
        out = int((reasons == reason).sum())
        left -= out
        if out:
            steps.append(Step(WORDS.get(reason, words.plain(reason)), out, left))
    return steps


def splits(items: Items, selection: Selection) -> list[dict[str, Any]]:
    kept = np.zeros(len(items), bool)
    kept[selection.column("id")] = selection.column("keep")
    split = items.column("split")
    return [{"name": name, "count": int((split == name).sum()), "kept": int((kept & (split == name)).sum())} for name in SPLITS]


def pairs_to_show(selection: Selection) -> np.ndarray:
    """Rows of the selection: dropped items with a witness, those least like it first, as these are the decisions to check."""
    similarity, reason = selection.column("similarity"), selection.column("reason")
    found = (selection.column("witness") >= 0) & np.isin(reason, ["exact duplicate", "near duplicate"])
    rows = np.flatnonzero(found)
    return rows[np.lexsort((rows, similarity[rows], reason[rows] == "exact duplicate"))][:SHOWN]


def pairs(selection: Selection, rows: np.ndarray, album: Album) -> list[Pair]:
    ids, witness = selection.column("id"), selection.column("witness")
    similarity, reason = selection.column("similarity"), selection.column("reason")
    return [Pair(album.photo(ids[row]), album.photo(witness[row]), str(reason[row]), float(similarity[row])) for row in rows]


def strangest(clusters: Clusters) -> np.ndarray:
    """Rows of the clusters' table with the highest outlier scores, strongest first."""
    score = clusters.column("outlier")
    return np.argsort(-score, kind="stable")[:SHOWN]


def outliers(clusters: Clusters, selection: Selection, rows: np.ndarray, album: Album) -> list[dict[str, Any]]:
    ids, score = clusters.column("id"), clusters.column("outlier")
    dropped = set(selection.column("id")[selection.column("reason") == "outlier"].tolist())
    return [{"photo": album.photo(ids[row]), "score": float(score[row]), "dropped": int(ids[row]) in dropped} for row in rows]


def leaked(selection: Selection) -> np.ndarray:
    return selection.column("id")[selection.column("leak")]


def flagged(selection: Selection) -> np.ndarray:
    """Rows of the selection with a flag, one of each kind before the second of any."""
    flag = selection.column("flag")
    rows = np.flatnonzero(flag != "")
    _, kind = np.unique(flag[rows].astype(str), return_inverse=True)
    order = np.argsort(kind, kind="stable")
    nth = np.empty(len(rows), np.int64)
    nth[order] = np.arange(len(rows)) - np.searchsorted(kind[order], kind[order])
    return rows[np.lexsort((kind, nth))][:SHOWN]


def faults(selection: Selection, rows: np.ndarray, album: Album) -> list[dict[str, Any]]:
    ids, flag, keep = selection.column("id"), selection.column("flag"), selection.column("keep")
    return [{"photo": album.photo(ids[row]), "flag": str(flag[row]), "dropped": not keep[row]} for row in rows]


def flag_counts(selection: Selection) -> list[tuple[str, int]]:
    """How many items have each flag."""
    told = Counter(name for flag in selection.column("flag") for name in flag.split(", ") if name)
    return [(name, told[name]) for name in FLAGS if told[name]]


def leaks(items: Items, selection: Selection) -> dict[str, int]:
    """Items of each held-out split that have a near duplicate in the training split."""
    split = items.column("split")[leaked(selection)]
    return {name: int((split == name).sum()) for name in SPLITS[1:] if (split == name).any()}


def quarantine(items: Items) -> dict[str, Any]:
    rows = items.quarantine.slice(0, ROWS).to_pylist()
    return {
        "rows": [{key: words.plain(value) for key, value in row.items()} for row in rows],
        "more": items.quarantine.num_rows - len(rows),
    }


def notes(items: Items) -> list[tuple[str, int]]:
    """What had to be changed to read items, and for how many, most frequent first."""
    values, counts = np.unique(items.column("note").astype(str), return_counts=True)
    found = [(words.plain(value), int(count)) for value, count in zip(values, counts) if value]
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))


def curves(vectors: Vectors, clusters: Clusters) -> dict[str, Any]:
    """The scores by number of clusters, and the training curve of an encoder that was learned here."""
    points = [(float(row["k"]), float(row["score"])) for row in clusters.curve]
    chart: Markup | None = None
    if len(points) > 1:
        chart = charts.line(
            points, title="score", across="number of clusters", marked=float(clusters.count), mark=f"{clusters.count} chosen"
        )
    learned = [{name: value for name, value in row.items() if not is_dial(name)} for row in vectors.signals]
    return {"scores": chart, "training": charts.signals(learned), "verdict": closing(vectors.signals, vectors.dim) if learned else ""}


def section(items: Items, vectors: Vectors, clusters: Clusters, selection: Selection) -> dict[str, Any]:
    """The parts of this section that need no pictures."""
    reason = selection.column("reason")
    thresholds: Mapping[str, float] = selection.thresholds
    return {
        "funnel": funnel(items, selection),
        "splits": splits(items, selection),
        "quarantine": quarantine(items),
        "notes": notes(items),
        "leaks": leaks(items, selection),
        "flags": flag_counts(selection),
        "counts": {name: int((reason == name).sum()) for name in WORDS},
        "thresholds": [(words.label(name), words.number(value)) for name, value in thresholds.items()],
        "curves": curves(vectors, clusters),
        "separation": f"{clusters.separation:.2f}".replace("-", words.MINUS),
        "method": words.closed(clusters.method),
    }
