"""Clusters against hidden labels: the learned head and the default beside k-means on the same features, and the number of clusters found alone.

    python benchmarks/clusters.py --clothing PHOTOS LABELS.csv MODEL --cifar IMAGES FILE.py:BUILDER WEIGHTS --mnist RUN [--cache FOLDER] [--out FILE]

Features are made once by `attar embed` in run folders under --cache; then each seed is the cluster stage alone. Labels only judge: ACC is the
share of labelled items under the best one-to-one match of clusters and classes. --mnist takes any finished run on digit images in class folders.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from environment import record
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from workloads import say, shown, table

import attar
from attar import config, records
from attar.pipeline import Run
from attar.stages.cluster.cluster import cluster
from attar.workspace import Job

CLASSES = {"clothing": 18, "cifar": 10}


class Workload(NamedTuple):
    name: str
    items: records.Items
    vectors: records.Vectors
    labels: np.ndarray  # (n,) of text, "" for none


def accuracy(found: np.ndarray, labels: np.ndarray) -> float:
    """Share of items in the cluster that the best one-to-one match gives to their class."""
    codes = np.unique(labels, return_inverse=True)[1]
    counts = np.zeros((found.max() + 1, codes.max() + 1))
    np.add.at(counts, (found, codes), 1)
    return float(counts[linear_sum_assignment(-counts)].sum() / len(codes))


def scores(found: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    known = labels != ""
    found, labels = found[known], labels[known]
    return {
        "ACC": accuracy(found, labels),
        "NMI": float(normalized_mutual_info_score(labels, found)),
        "ARI": float(adjusted_rand_score(labels, found)),
    }


def workload(name: str, run: Run, label: Callable[[str], str]) -> Workload:
    items = run["scan"]
    return Workload(name, items, run["embed"], np.array([label(path) for path in items.column("path")]))


def embedded(data: str, cache: Path, name: str, **settings: Any) -> Run:
    return attar.run(data, out=str(cache / name), until="embed", workers=1, **settings)


def workloads(given: argparse.Namespace, cache: Path) -> list[Workload]:
    made = []
    if given.clothing:
        photos, labels, model = given.clothing
        with open(labels, encoding="utf-8") as stream:
            known = {row["path"]: row["label"] for row in csv.DictReader(stream)}
        made.append(workload("clothing", embedded(photos, cache, "clothing", model=f"hf:{model}"), lambda path: known.get(path, "")))
    if given.cifar:
        images, model, weights = given.cifar
        made.append(workload("cifar", embedded(images, cache, "cifar", model=model, weights=weights), lambda path: path.split("/")[0]))
    if given.mnist:
        made.append(workload("mnist", Run(given.mnist), lambda path: path.split("/")[0]))
    return made


def once(work: Workload, method: str, k: int, seed: int) -> dict[str, Any]:
    """One seed of the cluster stage on made features."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        settings = config.Cluster(cluster_method=method, clusters=k)
        found = cluster(work.items, work.vectors, settings, Job("cluster", Path(folder), seed=seed, quiet=True))
        seconds = time.perf_counter() - started
    return {"k": found.count, **scores(found.column("cluster"), work.labels), "seconds": seconds, "said": found.method}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clothing", nargs=3, metavar=("PHOTOS", "LABELS", "MODEL"))
    parser.add_argument("--cifar", nargs=3, metavar=("IMAGES", "MODEL", "WEIGHTS"))
    parser.add_argument("--mnist", metavar="RUN")
    parser.add_argument("--methods", nargs="+", default=["kmeans", "learned", "auto"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "attar-benchmarks" / "clusters")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows, every = [], []
    for work in workloads(given, given.cache):
        cases = [(method, CLASSES[work.name]) for method in given.methods] if work.name in CLASSES else [(m, 0) for m in ("kmeans", "auto")]
        for method, k in cases:
            say(f"{work.name}: {method}, {k or 'unknown number of'} clusters")
            runs = [once(work, method, k, seed) for seed in range(given.seeds)]
            every.append({"workload": work.name, "method": method, "asked": k, "runs": runs})
            row = {"workload": work.name, "method": method, "clusters": k or " ".join(str(run["k"]) for run in runs)}
            rows.append(row | {name: shown([run[name] for run in runs], 3) for name in ("ACC", "NMI", "ARI", "seconds")})
    print(table(rows))
    record(given, results=every)


if __name__ == "__main__":
    main()
