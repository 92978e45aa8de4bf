"""MNIST without labels: an encoder learned from the digits themselves, ten clusters, and how well these are the ten digits.

    python benchmarks/mnist.py mnist.npz [--items 63000] [--steps 4000] [--out results/mnist.json]

Everything is what `attar` does with any folder: the digits are written as PNG into one Parquet file, `attar embed` learns (objectives, steps
and policy as stated), `attar cluster --clusters 10` groups. Labels are read at the end, to judge: the share of digits in the cluster that stands
for their class, best one-to-one match (Hungarian), over all items and over the test split that nothing was fitted to.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from environment import record
from PIL import Image
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.neighbors import KNeighborsClassifier

import attar
from attar.pipeline import Run
from attar.stats import clustering_accuracy

POLICY = {
    "rotate": [0.5, 0.9],
    "shear": [0.7, 0.9],
    "scale": [0.5, 0.9],
    "translate": [0.3, 0.5],
    "elastic": [0.8, 0.8],
    "gamma": [1.0, 0.9],
    "contrast": [0.8, 0.5],
    "blur": [0.8, 0.4],
}
"""What a digit bears and stays that digit: slant, thickness, wobble; no flips. Strength and frequency."""


def as_parquet(digits: np.ndarray, file: Path) -> None:
    """Digits (n, 28, 28) as PNG bytes, in this order by name."""

    def png(digit: np.ndarray) -> bytes:
        memory = io.BytesIO()
        Image.fromarray(digit).save(memory, "PNG", compress_level=1)
        return memory.getvalue()

    names = [f"{number:06d}.png" for number in range(len(digits))]
    pq.write_table(pa.table({"path": names, "image": pa.array([png(digit) for digit in digits], pa.binary())}), file)


def scores(labels: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    return {
        "acc": clustering_accuracy(labels, clusters),
        "nmi": float(normalized_mutual_info_score(labels, clusters)),
        "ari": float(adjusted_rand_score(labels, clusters)),
        "n": len(labels),
    }


def judge(run: Path, labels: np.ndarray) -> dict[str, Any]:
    """Scores of the clusters of a finished run against the labels in the order of the items; a 10-neighbour vote as what the vectors hold."""
    done = Run(run)
    items, vectors, clusters = done["scan"], done["embed"], done["cluster"]
    truth = labels[[int(Path(path.split("::")[-1]).stem) for path in items.column("path")]]
    own, split = clusters.column("cluster"), items.column("split")
    found = {"all": scores(truth, own)} | {name: scores(truth[split == name], own[split == name]) for name in ("train", "test")}
    values = vectors.rows(items.ids())
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    vote = KNeighborsClassifier(10).fit(values[split == "train"], truth[split == "train"])
    return found | {"neighbours": float(vote.score(values[split == "test"], truth[split == "test"])), "clusters": int(clusters.count)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("digits", type=Path, help="an .npz with x (n, 28, 28) uint8 and y (n,)")
    arguments.add_argument("--items", type=int, default=63_000)
    arguments.add_argument("--objective", default="nt-xent,cluster")
    arguments.add_argument("--steps", type=int, default=4000, help="per objective")
    arguments.add_argument("--width", type=int, default=16)
    arguments.add_argument("--kinds", type=int, default=10)
    arguments.add_argument("--clusters", type=int, default=10, help="0 lets attar choose")
    arguments.add_argument("--method", default="", help="how clusters are found, where not by the default")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--run", type=Path, help="keep the run folder here; the same call resumes")
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    body = np.load(given.digits)
    chosen = np.sort(np.random.default_rng(0).permutation(len(body["x"]))[: given.items])
    with tempfile.TemporaryDirectory() as home:
        root = given.run or Path(home)
        root.mkdir(parents=True, exist_ok=True)
        if not (root / "digits.parquet").exists():
            as_parquet(body["x"][chosen], root / "digits.parquet")
        (root / "policy.json").write_text(json.dumps({"families": POLICY}))
        start = time.perf_counter()
        how = {"cluster_method": given.method} if given.method else {}
        attar.run(
            root / "digits.parquet",
            until="cluster",
            out=str(root / "run"),
            seed=given.seed,
            objective=given.objective,
            self_steps=given.steps,
            self_width=given.width,
            self_kinds=given.kinds,
            input_size=28,
            policy=str(root / "policy.json"),
            clusters=given.clusters,
            **how,
        )
        minutes = (time.perf_counter() - start) / 60
        found = judge(root / "run", body["y"][chosen].astype(np.int64))
    for name in ("all", "train", "test"):
        row = found[name]
        print(f"{name:6} ACC {row['acc']:.4f}  NMI {row['nmi']:.4f}  ARI {row['ari']:.4f}  n {row['n']}")
    print(f"10 neighbours of test items vote right: {found['neighbours']:.4f}; {found['clusters']} clusters; {minutes:.1f} minutes")
    record(given, minutes=round(minutes, 2), found=found)


if __name__ == "__main__":
    main()
