"""Names that people give to clusters: kept in RUN/names.json, and carried over when the clusters are made again.

A name belongs to items, not to a number: it follows the new cluster that holds most of its old members, if these are most of that cluster too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attar.errors import UsageError
from attar.formats import NAMES, read_json, write_json
from attar.records import Clusters, Items

REMEMBERED = 200
"""Members, at most, that a name is recognised by."""
LONGEST = 80
"""Characters of a name."""


def set_name(root: Path, items: Items, clusters: Clusters, number: int, name: str) -> dict[int, str]:
    """Names a cluster, or takes its name away ("").

    Returns all names by number. Raises UsageError for a cluster there is not, a name that another cluster has, or text that is no name.
    """
    name = name.strip()
    if not 0 <= number < clusters.count:
        raise UsageError(f"cluster {number}: there is none; the clusters of {root} are 0 to {clusters.count - 1}")
    if len(name) > LONGEST or not name.isprintable():
        raise UsageError(f"name: {name!r}: expected one line of at most {LONGEST} printable characters")
    taken = next((other for other, known in clusters.names.items() if known == name and other != number), None)
    if name and taken is not None:
        raise UsageError(
            f"name: {name!r} is the name of cluster {taken} already; choose another, or take it from there with: name {taken} ''"
        )
    names = {other: known for other, known in clusters.names.items() if other != number} | ({number: name} if name else {})
    _write(root, items, clusters, names)
    return dict(sorted(names.items()))


def carry_names(root: Path, items: Items, clusters: Clusters) -> list[str]:
    """Moves names given to earlier clusters to those of now; returns what became of each that has another number now or is lost."""
    file = root / NAMES
    if not file.is_file() or (kept := read_json(file))["medoids"] == clusters.medoids.tolist():
        return []
    cluster = dict(zip(items.column("path").tolist(), clusters.column("cluster").tolist()))
    sizes = np.bincount(clusters.column("cluster"), minlength=clusters.count)
    names: dict[int, str] = {}
    told = []
    for row in kept["names"]:
        found = _heir(row, cluster, sizes)
        if found is None or found in names:
            told.append(f"the name {row['name']!r} is dropped: no cluster of now holds most of cluster {row['cluster']} as it was")
            continue
        names[found] = row["name"]
        if found != row["cluster"]:
            told.append(f"the name {row['name']!r} moved from cluster {row['cluster']} to {found}, which holds most of its items")
    _write(root, items, clusters, names)
    return told


def _heir(row: Mapping[str, Any], cluster: Mapping[str, int], sizes: np.ndarray) -> int | None:
    """The cluster of now that holds over half of a named one's remembered members, and of whose items they stand for over half."""
    present = [cluster[path] for path in row["members"] if path in cluster]
    if not present:
        return None
    counts = np.bincount(present, minlength=len(sizes))
    best = int(counts.argmax())
    share = counts[best] / len(row["members"])
    return best if share > 0.5 and share * row["items"] > 0.5 * sizes[best] else None


def _write(root: Path, items: Items, clusters: Clusters, names: Mapping[int, str]) -> None:
    paths, cluster = items.column("path"), clusters.column("cluster")
    rows = []
    for number, name in sorted(names.items()):
        members = np.flatnonzero(cluster == number)
        some = members[np.unique(np.linspace(0, len(members) - 1, min(len(members), REMEMBERED)).astype(int))]
        rows.append({"cluster": number, "name": name, "items": len(members), "members": paths[some].tolist()})
    temporary = root / f"{NAMES}.tmp"
    write_json(temporary, {"medoids": clusters.medoids, "names": rows})
    os.replace(temporary, root / NAMES)
