"""Is an encoder better for dials that move while it learns? The same runs with live dials and with dials held; hidden labels only judge.

    python benchmarks/live_dials.py mnist=MNIST.npz cifar=CIFAR/train clothing=CLOTHING [--steps 400] [--seeds 3] [--items 3000] [--judged 2000]
        [--side 32] [--width 8] [--out FILE.json]

Data sets are those of policies.py. `attar run` learns an encoder from the images alone (stage embed, one set of dials) and lets it learn on with the
dials found for each cluster (stage train). After either stage the same held-out images are judged by their ten nearest neighbours among the items
learned from. Differences are paired by seed and image; their 95 % intervals count both as drawn at random (stats.crossed).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workloads
from environment import record
from PIL import Image
from policies import Labelled, read

import attar
from attar.models import sources
from attar.records import Model
from attar.stages.encode import as_input
from attar.stats import crossed, knn_vote

STAGES = ("embed", "train")


def correct(model: Model, data: Labelled) -> np.ndarray:
    """Of every held-out image, whether the vote of its ten nearest neighbours is its label."""
    network = sources.network(model).eval()

    def units(images: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            parts = [network(as_input(images[start : start + 256], model.preprocess))[0] for start in range(0, len(images), 256)]
        return torch.nn.functional.normalize(torch.cat(parts), dim=1)

    near = (units(data.held) @ units(data.train).T).topk(10).indices.numpy()
    return (knn_vote(data.train_labels, near) == data.held_labels).astype(float)


def encoders(images: Path, out: Path, live: bool, seed: int, given: argparse.Namespace) -> dict[str, Model]:
    """The encoder after each of STAGES."""
    run = attar.run(
        images,
        until="train",
        out=str(out),
        model="self",
        dials="live" if live else "held",
        seed=seed,
        self_steps=given.steps,
        self_width=given.width,
        workers=given.threads,
        test_share=0.02,
        validation_share=0.1,
        quiet=True,
    )
    return {"embed": run["embed"].model, "train": run["train"]}


def compare(name: str, data: Labelled, given: argparse.Namespace) -> list[dict[str, Any]]:
    found: dict[tuple[str, bool], list[np.ndarray]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        images = Path(temporary) / "images"
        images.mkdir()
        for number, image in enumerate(data.train):
            Image.fromarray(image).save(images / f"{number:06d}.png")
        for seed in range(given.seeds):
            for live in (True, False):
                for stage, model in encoders(images, Path(temporary) / f"{seed}-{live}", live, seed, given).items():
                    found.setdefault((stage, live), []).append(correct(model, data))
                    workloads.say(f"{name}, seed {seed}, {'live' if live else 'held'}, {stage}: {100 * found[stage, live][-1].mean():.2f}")
    rows = []
    for stage in STAGES:
        row: dict[str, Any] = {"set": name, "stage": stage, "n": len(data.held)}
        row |= {side: [float(one.mean()) for one in found[stage, live]] for side, live in (("live", True), ("held", False))}
        if given.seeds > 1:
            row["difference"] = crossed(np.stack([a - b for a, b in zip(found[stage, True], found[stage, False])]))
        rows.append(row)
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("data", nargs="+", help="NAME=PATH")
    arguments.add_argument("--steps", type=int, default=400, help="contrastive steps of an encoder; half as many in the stage train")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--items", type=int, default=3000)
    arguments.add_argument("--judged", type=int, default=2000)
    arguments.add_argument("--side", type=int, default=32)
    arguments.add_argument("--width", type=int, default=8)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    rows = []
    for one in given.data:
        name, _, path = one.partition("=")
        rows += compare(name, read(Path(path), given.side, given.items, given.judged), given)
    table = [
        {
            "set": row["set"],
            "after": row["stage"],
            **{f"{side} %": workloads.shown([100 * value for value in row[side]]) for side in ("live", "held")},
            "difference": "{:+.2f} ({:+.2f} … {:+.2f})".format(*(100 * value for value in row["difference"]))
            if "difference" in row
            else "–",
        }
        for row in rows
    ]
    print(workloads.table(table))
    record(given, rows=rows)


if __name__ == "__main__":
    main()
