"""Clusters mapped back to the items: who is in each, what is typical and what lies on a border; as a table, or as folders of links."""

from __future__ import annotations

import csv
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from attar.data import Reader
from attar.errors import UsageError, WorkspaceError
from attar.records import Clusters, Items, Vectors
from attar.stages.cluster.space import head_probabilities

BORDERS = 5
"""Border items listed for each cluster."""
LONGEST_NAME = 240
"""Bytes of a file's own name; file systems take 255 with what comes before it."""
COLUMNS = ("path", "cluster", "name", "subcluster", "distance", "outlier", "next_cluster", "margin")


def margins(clusters: Clusters, vectors: Vectors) -> tuple[np.ndarray, np.ndarray]:
    """The most probable other cluster of every item, and how much less probable it is than the item's own, −1 … 1; reads one shard at a time.

    Near 0: between the two. Negative: the head, which has flat borders, would place the item there.
    """
    other, margin = np.zeros(vectors.count, np.int32), np.ones(vectors.count, np.float32)
    own, start = clusters.column("cluster"), 0
    for shard in vectors.batches():
        part = slice(start, start := start + len(shard.ids))
        shares, rows = head_probabilities(shard.values, clusters.head), np.arange(len(shard.ids))
        mine = shares[rows, own[part]]
        shares[rows, own[part]] = -1
        other[part] = shares.argmax(1)
        margin[part] = mine - shares[rows, other[part]]
    return other, margin


def name_of(clusters: Clusters, number: int) -> str:
    return clusters.names.get(number, "")


def summary(items: Items, clusters: Clusters, margin: np.ndarray) -> list[dict[str, Any]]:
    """One row per cluster: number, name, items, medoid, and the items nearest to another cluster."""
    paths, cluster, ids = items.column("path"), clusters.column("cluster"), items.ids()
    rows = []
    for number, medoid in enumerate(clusters.medoids):
        members = np.flatnonzero(cluster == number)
        border = members[np.argsort(margin[members], kind="stable")][:BORDERS]
        row = {"cluster": number, "name": name_of(clusters, number), "items": len(members)}
        rows.append(row | {"medoid": paths[np.searchsorted(ids, medoid)], "borders": paths[border].tolist()})
    return rows


def write_table(file: Path, items: Items, clusters: Clusters, other: np.ndarray, margin: np.ndarray) -> None:
    """Every item as a line of a CSV file (COLUMNS); raises UsageError when something is there already."""
    cluster = clusters.column("cluster")
    names = [name_of(clusters, number) for number in range(clusters.count)]
    columns = (
        items.column("path"),
        cluster,
        (names[number] for number in cluster),
        clusters.column("subcluster"),
        (f"{value:.5f}" for value in clusters.column("distance")),
        (f"{value:.4f}" for value in clusters.column("outlier")),
        other,
        (f"{value:.4f}" for value in margin),
    )
    try:
        with file.open("x", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(COLUMNS)
            writer.writerows(zip(*columns))
    except FileExistsError:
        raise UsageError(f"{file}: exists already and is left as it is; name another file") from None
    except OSError as error:
        raise UsageError(f"{file}: cannot be written ({error.strerror}); name a file in a folder you can write to") from None


def write_links(folder: Path, items: Items, clusters: Clusters) -> int:
    """A folder of symbolic links per cluster, the most typical items first; returns their number.

    It is whole or absent. Raises UsageError when something is there already or items have no files of their own, WorkspaceError where links
    cannot be made.
    """
    if folder.is_symlink() or (folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))):
        raise UsageError(f"{folder}: exists already and is left as it is; name a folder that does not exist yet")
    paths = items.column("path")
    with Reader(items.root) as reader:
        files = [reader.file(path) for path in paths]
    packed = [path for path, file in zip(paths, files) if file is None]
    if packed:
        raise UsageError(
            f"{len(packed)} items lie inside a container and have no files to link to, the first is {packed[0]}; write a table with --table instead"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".attar-links-", dir=folder.parent))
        temporary.chmod(0o755)
    except OSError as error:
        raise WorkspaceError(f"{folder}: cannot be made ({error.strerror}); choose a folder you can write to") from None
    try:
        for number in range(clusters.count):
            _link(temporary, number, files, clusters)
        os.replace(temporary, folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise WorkspaceError(
            f"{folder}: symbolic links cannot be made there ({error.strerror}); choose a folder on another disk, or write a table with --table"
        ) from None
    return len(files)


def _link(folder: Path, number: int, files: list[Any], clusters: Clusters) -> None:
    """One cluster's links: "0001 photo.jpg" for the item nearest to the centroid, and so on."""
    members = np.flatnonzero(clusters.column("cluster") == number)
    members = members[np.argsort(clusters.column("distance")[members], kind="stable")]
    home = folder / folder_name(clusters, number)
    home.mkdir(mode=0o755)
    width = max(4, len(str(len(members))))
    for rank, member in enumerate(members, 1):
        stem = os.path.basename(files[member]).encode()[-LONGEST_NAME:].decode(errors="ignore")
        os.symlink(files[member], home / f"{rank:0{width}d} {stem}")


def folder_name(clusters: Clusters, number: int) -> str:
    """ "07 sneakers": the number, and the name where there is one, without what a file system takes for something else."""
    name = "".join("_" if sign in '/\\:*?"<>|' else sign for sign in name_of(clusters, number)).strip(". ")
    return f"{number:0{len(str(clusters.count - 1))}d} {name.encode()[:LONGEST_NAME].decode(errors='ignore')}".strip()
