"""Does the policy found without labels teach a student better than TrivialAugment, than nothing? Hidden labels only judge.

    python benchmarks/distil_policies.py --cifar FOLDER --model resnet_cifar.py:resnet20 --weights resnet20.safetensors
        [--items 4000] [--judged 3000] [--steps 1000] [--search-steps 6000] [--seeds 3] [--cache FOLDER] [--threads 1] [--out FILE.json]

Files, student and judging are those of condensed.py. Here the teacher answers what the student sees: views of the same items, under

- none: the items as they are;
- moved: by whole pixels, and mirrored where that cannot be told: what `attar compress` shows;
- trivial: TrivialAugment;
- searched: the policy `attar augment search` ranks first on these items;
- found: strengths of the stage augment, one for all clusters; per cluster: the same with the dials of each cluster.

The seed decides the student's first weights and the batches; the arms share it. Differences are paired by seed and item; their 95 % intervals count
both as drawn at random (stats.crossed).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import workloads
from condensed import Lesson, Workload, judge, learn, prepare
from environment import record
from torch import Tensor

from attar import config
from attar.models import sources
from attar.records import Policy
from attar.stages.augment.catalogue import POLICIES
from attar.stages.augment.engine import augment, normalise
from attar.stages.augment.search import search
from attar.stages.compress.feed import nudged
from attar.stats import crossed
from attar.workspace import Job


def policies(work: Workload, given: argparse.Namespace) -> dict[str, Policy | None]:
    """The arms; None stands for `moved`."""
    found = work.run["augment"]
    job = Job("search", work.run.root.parent / "search", seed=0, workers=given.threads)
    ranked = search(work.run["scan"], config.Search(search_steps=given.search_steps), job)
    workloads.say(ranked.verdict)
    return {
        "none": POLICIES["none"],
        "moved": None,
        "trivial": POLICIES["trivial"],
        "searched": ranked.policy,
        "found": replace(found, clusters=()),
        "per cluster": found,
    }


def taught(work: Workload, policy: Policy | None) -> Lesson:
    """Views under the policy, and what the teacher says of them."""
    model = work.run["embed"].model
    teacher, clusters = sources.network(model).eval(), work.run["cluster"].column("cluster")
    pixels = ((work.train.images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()

    def lesson(rows: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if policy is None:
            views = (nudged(work.train.images[torch.from_numpy(rows)], True, rng) + 1) / 2
        else:
            views = augment(pixels[rows], policy, clusters[rows] if policy.clusters else None, rng)
        with torch.no_grad():
            embedding, logits = teacher(normalise(views, model.preprocess.mean, model.preprocess.std))
        return views * 2 - 1, (embedding, logits)

    return lesson


def compare(work: Workload, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Every arm: figures by seed, and its paired differences to the other arms."""
    share = (work.run["scan"].column("split") == "train").astype(float)
    share /= share.sum()
    found: dict[str, list[Mapping[str, np.ndarray]]] = {}
    arms = policies(work, given)
    for seed in range(given.seeds):
        for arm, policy in arms.items():
            student, seconds = learn(work.train, share, given.steps, seed, taught(work, policy))
            judged = judge(student, work)
            found.setdefault(arm, []).append(judged)
            workloads.say(
                f"seed {seed}, {arm}: accuracy {100 * judged['accuracy'].mean():.2f}, loss {judged['loss'].mean():.3f}, {seconds:.0f} s"
            )
    rows = []
    for arm, own in found.items():
        row: dict[str, Any] = {"arm": arm, "policy": "" if arms[arm] is None else arms[arm].method}
        for figure in ("accuracy", "loss"):
            row[figure] = [float(one[figure].mean()) for one in own]
        for other in found:
            if other != arm and given.seeds > 1:
                row[f"accuracy - {other}"] = crossed(np.stack([a["accuracy"] - b["accuracy"] for a, b in zip(own, found[other])]))
        rows.append(row)
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    def interval(row: Mapping[str, Any], other: str) -> str:
        key = f"accuracy - {other}"
        return "{:+.2f} ({:+.2f} … {:+.2f})".format(*(100 * value for value in row[key])) if key in row else "–"

    return workloads.table(
        [
            {
                "arm": row["arm"],
                "accuracy %": workloads.shown([100 * value for value in row["accuracy"]]),
                "loss": workloads.shown(row["loss"], 3),
            }
            | {f"against {other}": interval(row, other) for other in ("none", "moved", "trivial", "found")}
            for row in rows
        ]
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--cifar", type=Path, required=True, help="folder with train/CLASS/*.jpg and test/CLASS/*.jpg")
    arguments.add_argument("--model", required=True, help="FILE.py:BUILDER of the teacher")
    arguments.add_argument("--weights", type=Path, required=True)
    arguments.add_argument("--items", type=int, default=4000)
    arguments.add_argument("--judged", type=int, default=3000)
    arguments.add_argument("--steps", type=int, default=1000)
    arguments.add_argument("--search-steps", type=int, default=6000, help="training steps of the search, over all its encoders")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--cache", type=Path, default=workloads.CACHE)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    given.cache.mkdir(parents=True, exist_ok=True)
    rows = compare(prepare("cifar", given, until="augment"), given)
    print(report(rows))
    record(given, rows=rows)


if __name__ == "__main__":
    main()
