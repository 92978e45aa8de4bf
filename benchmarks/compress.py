"""Cut a classifier to a share of its MACs on unlabelled images, in minutes: attar beside Torch-Pruning and distillation, judged by hidden labels.

    python benchmarks/compress.py DATA --model FILE.py:BUILDER --weights W.safetensors [--share 0.5] [--minutes 15] [--items 5000]
        [--latency 0.33] [--kept-back 0.15 0.1] [--seeds 1 2 3 4 5] [--sides attar torch-pruning-magnitude …] [--test 10000] [--repair-only] [--keep FOLDER]
        [--out FILE.json]

DATA has train/CLASS/*.jpg and test/CLASS/*.jpg. Each side runs in a process of its own and gets the module, `items` random training images as
tensors, `minutes` of wall time in all and `threads` threads. It hands back ONNX files; all test images go through these in ONNX Runtime, and
MACs are counted from them, so that every side is judged alike. Three states of each:

    cut        as the pruner leaves it (attar does not show this state: its cuts are repaired as they are made)
    repaired   before any gradient step: attar's closed form; for the peers batch-norm statistics taken anew, which their users can add
    trained    the module that is delivered after the minutes, in float32

and of attar `delivered`, the file as it is handed over, and `int8`, which may be the same.

`--latency` bounds attar's latency as well, as a ratio to the original's; no peer can be asked for that. `--kept-back` are the shares of the images that attar keeps back for
its certificate and for choosing, and so does not learn from; peers learn from all. `--keep` keeps the files (and
calibration images) for `speed.py`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
import workloads
from environment import record
from torch import nn

STATES = ("cut", "repaired", "trained")
CALIBRATION = 1000


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one side is asked for, all of it plain values: it is sent to another process."""

    side: str
    seed: int
    model: str
    weights: Path
    train: Path
    cache: Path
    items: int
    minutes: float
    share: float
    latency: float | None
    kept_back: tuple[float, float]
    threads: int
    repair_only: bool
    folder: Path  # where its files go

    @property
    def seconds(self) -> float:
        return 60 * self.minutes


def run(task: Task) -> dict[str, Any]:
    """One side, in the process that is its own: files by state, and the wall time its work took (writing files for the judge not counted)."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(task.threads)
    given = workloads.original(task.model, task.weights)
    images = workloads.pictures(task.train, task.cache).images
    chosen = np.random.default_rng(task.seed).choice(len(images), task.items, replace=False)
    tensors = workloads.normalised(images[chosen], given.mean, given.std)
    task.folder.mkdir(parents=True, exist_ok=True)
    np.save(task.folder / "calibration.npy", tensors[:CALIBRATION].numpy())  # for peers that quantise the files later
    return SIDES[task.side](task, given.module, tensors)


def _end_with_parent() -> None:
    """A side does not compute on for nobody when the benchmark is killed."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def attar_side(task: Task, module: nn.Module, tensors: torch.Tensor) -> dict[str, Any]:
    import attar
    from attar.stages.compress.search import agreeing_most

    settings: dict[str, Any] = {"distil_steps": 0} if task.repair_only else {"minutes": task.minutes}
    budget = f"macs<={task.share}x" + (f", latency<={task.latency}x" if task.latency else "")
    start = time.perf_counter()
    settings |= dict(zip(("test_share", "validation_share"), task.kept_back))
    made = attar.compress(module, tensors, budget=budget, seed=task.seed, **settings)  # latency on one thread
    seconds = time.perf_counter() - start
    files = {"trained": workloads.write_onnx(made.module, tensors, task.folder / "trained.onnx")}
    within = [one for one in made.front.candidates if one.figures["macs_ratio"] <= task.share]
    kinds = {
        "repaired": [one for one in within if re.fullmatch(r"cut[\d.]+-float32", one.name)],
        "int8": [one for one in within if one.precision == "int8"],
        "delivered": [made.front.student],
    }
    chosen = {state: agreeing_most(found) for state, found in kinds.items()}  # as attar itself would choose, without labels
    for state, one in chosen.items():
        files[state] = task.folder / f"{state}.onnx"
        shutil.copyfile(one.onnx, files[state])
    if task.repair_only:
        del files["trained"]
    return {"files": files, "seconds": seconds, "note": made.front.chosen}


def peer_side(task: Task, module: nn.Module, tensors: torch.Tensor) -> dict[str, Any]:
    start = time.perf_counter()
    torch.manual_seed(task.seed)
    student = peers.prune(module, tensors, task.share, peers.METHODS[task.side.removeprefix("torch-pruning-")])
    pruned = time.perf_counter() - start
    made = {"cut": student, "repaired": peers.estimate_norms(student, tensors)}
    files = {state: workloads.write_onnx(one, tensors, task.folder / f"{state}.onnx") for state, one in made.items()}
    if task.repair_only:
        return {"files": files, "seconds": pruned, "note": ""}
    again = time.perf_counter()
    steps = peers.distil(student, module, tensors, peers.clock(again - pruned, task.seconds), task.seed)
    seconds = pruned + time.perf_counter() - again
    files["trained"] = workloads.write_onnx(student, tensors, task.folder / "trained.onnx")
    return {"files": files, "seconds": seconds, "note": f"{steps} steps"}


SIDES: dict[str, Callable[[Task, nn.Module, torch.Tensor], dict[str, Any]]] = {
    "attar": attar_side,
    **{f"torch-pruning-{name}": peer_side for name in peers.METHODS},
}


class Judge:
    """Test images and their hidden labels; the sides never see either."""

    def __init__(self, model: str, weights: Path, test: Path, cache: Path, threads: int, folder: Path, count: int | None = None) -> None:
        given, shown = workloads.original(model, weights), workloads.pictures(test, cache)
        chosen = np.random.default_rng(0).permutation(len(shown.images))[:count]
        self.inputs, self.threads = workloads.normalised(shown.images[chosen], given.mean, given.std), threads
        self.shape = (1, *self.inputs.shape[1:])
        self.truth = np.array([given.classes.index(name) for name in shown.classes])[shown.labels[chosen]]
        self.file = workloads.write_onnx(given.module, self.inputs, folder / "original.onnx")
        self.decided, self.macs = workloads.decide(self.file, self.inputs, threads), workloads.onnx_macs(self.file, self.shape)
        self.accuracy = 100 * float((self.decided == self.truth).mean())

    def figures(self, file: Path) -> dict[str, float]:
        decided = workloads.decide(file, self.inputs, self.threads)
        figures = {"accuracy": 100 * float((decided == self.truth).mean()), "agreement": 100 * float((decided == self.decided).mean())}
        return figures | {"megabytes": file.stat().st_size / 1e6}


def measure(task: Task, judge: Judge) -> dict[str, Any]:
    """One side with one seed: its process, then the judge."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        made = pool.submit(run, task).result()
    row: dict[str, Any] = {"side": task.side, "seed": task.seed, "seconds": made["seconds"], "note": made["note"]}
    for state, file in made["files"].items():
        row[state] = judge.figures(file)
        if state in STATES:
            row[state]["share"] = workloads.onnx_macs(file, judge.shape) / judge.macs
    return row


def summary(rows: list[dict[str, Any]], original: float) -> list[dict[str, str]]:
    """One line per side: mean ± spread over seeds; loss is what the original had more."""
    lines = []
    for side in dict.fromkeys(row["side"] for row in rows):
        own = [row for row in rows if row["side"] == side]
        line = {"side": side, "seeds": str(len(own))}
        for state in STATES:
            values = [row[state]["accuracy"] for row in own if state in row]
            line[state] = workloads.shown(values) if values else "–"
        last = [row.get("trained", row["repaired"]) for row in own]
        line["loss"] = workloads.shown([original - one["accuracy"] for one in last])
        line["agreement"] = workloads.shown([one["agreement"] for one in last])
        line["share of MACs"] = workloads.shown([one["share"] for one in last], 3)
        line["seconds"] = workloads.shown([row["seconds"] for row in own], 0)
        lines.append(line)
    return lines


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("data", type=Path)
    arguments.add_argument("--model", required=True, help="FILE.py:BUILDER")
    arguments.add_argument("--weights", type=Path, required=True)
    arguments.add_argument("--minutes", type=float, default=15)
    arguments.add_argument("--items", type=int, default=5000)
    arguments.add_argument("--share", type=float, default=0.5)
    arguments.add_argument("--latency", type=float, help="bounds attar's latency too, as a ratio to the original's")
    arguments.add_argument(
        "--kept-back",
        type=float,
        nargs=2,
        default=(0.15, 0.1),
        metavar=("TEST", "VALIDATION"),
        help="shares attar does not learn from; by default its own defaults",
    )
    arguments.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    arguments.add_argument(
        "--sides",
        nargs="+",
        default=["attar", "torch-pruning-magnitude", "torch-pruning-magnitude-inner", "torch-pruning-taylor"],
        choices=SIDES,
    )
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--test", type=int, default=10_000, help="test images that judge, the same random ones for all")
    arguments.add_argument("--repair-only", action="store_true", help="no gradient step: cut and repaired alone")
    arguments.add_argument("--cache", type=Path, default=workloads.CACHE, help="decoded images")
    arguments.add_argument("--keep", type=Path, help="folder for the files of every side and seed")
    arguments.add_argument("--out", type=Path)
    return arguments.parse_args()


def main() -> None:
    given = parse()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        home = given.keep or Path(temporary)
        judge = Judge(given.model, given.weights, given.data / "test", given.cache, given.threads, home, given.test)
        workloads.say(f"original: {judge.accuracy:.2f} % of {len(judge.truth):,} test images, {judge.macs / 1e6:.1f} M MACs")
        shared = {
            name: getattr(given, name)
            for name in ("model", "weights", "cache", "items", "minutes", "share", "latency", "kept_back", "threads", "repair_only")
        }
        for seed in given.seeds:
            for side in given.sides:  # sides in turn within a seed, so that a slow hour hits all alike
                folder = home / f"{side}-{seed}"
                row = measure(Task(side=side, seed=seed, train=given.data / "train", folder=folder, **shared), judge)
                rows.append(row)
                states = ", ".join(f"{state} {row[state]['accuracy']:.2f}" for state in (*STATES, "int8", "delivered") if state in row)
                workloads.say(f"{side}, seed {seed}: {states}; {row['seconds']:.0f} s; {row['note']}")
    print(f"original {judge.accuracy:.2f} %; {given.items} unlabelled images, {given.minutes:g} min, {given.threads} threads\n")
    print(workloads.table(summary(rows, judge.accuracy)))
    record(given, original=judge.accuracy, rows=rows)


if __name__ == "__main__":
    main()
