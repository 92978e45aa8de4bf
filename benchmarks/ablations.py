"""What each trick of the cut gives alone and what its absence costs: accuracy before and after a few gradient steps, by hidden labels.

    python benchmarks/ablations.py DATA --model FILE.py:BUILDER --weights W.safetensors [--share 0.5] [--items 1000] [--steps 100]
        [--seeds 1 2 3] [--variants …] [--test 2000] [--out FILE.json]

A variant is a context in which `attar.compress` runs: it may override settings, and it may replace parts of the code for as long as it is
open. The same cut is judged untrained and after `--steps` steps, so that a variant costs one compression per seed.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import workloads
from compress import Judge
from environment import record
from torch import nn

from attar.models.network import Network
from attar.stages.compress import cutter, distil, prune, reconstruct, repair, search

Settings = dict[str, Any]


@contextlib.contextmanager
def overriding(**settings: Any) -> Iterator[Settings]:
    """Nothing replaced; some settings of `attar.compress` as given."""
    yield settings


@contextlib.contextmanager
def replacing(*parts: tuple[Any, str, Any]) -> Iterator[Settings]:
    """Functions and constants of the code, (owner, name, value), replaced; raises AttributeError when one has gone, so that no variant does nothing."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in parts:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield {}


def _even(network: nn.Module, batches: Iterable[torch.Tensor], layers: Sequence[str], seed: int) -> dict[str, torch.Tensor]:
    """In the place of the Fisher information: every output of a layer counts alike, in units of the layer's variance."""
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    hooks = []
    for name in layers:
        layer = network.get_submodule(name)
        axis = 1 if isinstance(layer, nn.Conv2d) else -1
        keep = lambda _, __, output, name=name, axis=axis: rows[name].append(output.movedim(axis, 0).flatten(1)[:, ::16])  # noqa: E731
        hooks.append(layer.register_forward_hook(keep))
    with torch.no_grad():
        for batch in batches:
            network(batch)
    for hook in hooks:
        hook.remove()
    outputs = {name: torch.cat(parts, 1).double() for name, parts in rows.items()}
    return {name: torch.eye(len(found)).double() / found.var(1).sum() for name, found in outputs.items()}


def _by_magnitude(consumers: Sequence[repair.Consumer], width: int) -> tuple[list[int], np.ndarray]:
    """In the place of the surgeon's order: by the squares of the consumers' weights."""
    same = [
        one._replace(
            moments=repair.Moments(torch.eye(one.weight.shape[1]).double(), 1), sensitivity=torch.eye(one.weight.shape[0]).double()
        )
        for one in consumers
    ]
    return SURGEON(same, width)


def _unrepaired(
    cut: Network, original: Network, cuts: Any, example: torch.Tensor, moments: Any
) -> tuple[list[str], dict[str, torch.Tensor]]:
    """In the place of the repair: which layers lost inputs and what stays, the weights as the cut leaves them."""
    rows, columns = prune.kept(original, cuts, example)
    return [name for name in moments if len(columns[name]) < original.get_submodule(name).weight.shape[1]], rows


def _off_stream(seen: Any, now: Any, landing: Any, kept: torch.Tensor) -> torch.Tensor:
    """In the place of the target on a stream: the original's outputs alone."""
    return TARGET(seen, now, None, kept)


SURGEON, TARGET = repair.eliminate, reconstruct._target
NO_REPAIR = (cutter, "repaired", _unrepaired)
NO_RECONSTRUCTION = (cutter.Cutter, "_reconstruct", lambda *_: 0)

VARIANTS: dict[str, Callable[[], AbstractContextManager[Settings]]] = {
    "everything": overriding,
    "no Fisher information": lambda: replacing((repair, "sensitivities", _even)),
    "order by magnitude": lambda: replacing((repair, "eliminate", _by_magnitude)),
    "no reconstruction": lambda: replacing(NO_RECONSTRUCTION),
    "reconstruction without the stream": lambda: replacing((reconstruct, "_target", _off_stream)),
    "neither repair nor reconstruction": lambda: replacing(NO_REPAIR, NO_RECONSTRUCTION),
    "nothing but magnitude": lambda: replacing(NO_REPAIR, NO_RECONSTRUCTION, (repair, "eliminate", _by_magnitude)),
    "norms not settled": lambda: replacing((distil, "settle", lambda *_: None)),
    "norms held": lambda: replacing((distil, "live_norms", lambda *_: [])),
    "no mixing": lambda: replacing((distil, "mix", lambda views, _: views)),
    "no mimicry": lambda: replacing((distil, "comparable", lambda *_: [])),
    "nothing erased": lambda: replacing((distil, "ERASED_FROM", math.inf)),
    "no mean of the weights": lambda: replacing((distil, "AVERAGED", 0.0)),
    "deep cuts at once": lambda: replacing((search, "DEEP", 0.0)),
}
"""Everything as it comes, then with tricks taken away."""


def measure(name: str, module: nn.Module, tensors: torch.Tensor, judge: Judge, share: float, steps: int, seed: int) -> dict[str, Any]:
    """One variant with one seed: figures before and after the steps."""
    import attar

    start = time.perf_counter()
    with VARIANTS[name]() as settings:
        asked = {"budget": f"macs<={share}x", "distil_steps": steps, "seed": seed, "threads": judge.threads} | settings
        made = attar.compress(module, tensors, **asked)
    row: dict[str, Any] = {"variant": name, "seed": seed, "seconds": time.perf_counter() - start}
    kinds = {"before": r"cut[\d.]+-float32", "after": r"cut[\d.]+-distilled-float32"}
    for state, pattern in kinds.items():
        found = [one for one in made.front.candidates if re.fullmatch(pattern, one.name) and one.figures["macs_ratio"] <= share]
        if found:
            best = max(found, key=lambda one: one.figures["macs_ratio"])
            row[state] = judge.figures(best.onnx) | {"share": best.figures["macs_ratio"]}
        elif steps or state == "before":
            raise SystemExit(f"{name}, seed {seed}: no candidate {pattern} within {share:.0%} of the MACs")
    return row


def summary(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """One line per variant: accuracy, and the difference to the first variant with the same seed."""
    by_seed = {row["seed"]: row for row in rows if row["variant"] == rows[0]["variant"]}
    lines = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == name]
        line = {"variant": name, "seeds": str(len(own))}
        for state in ("before", "after"):
            if state in own[0]:
                values = [row[state]["accuracy"] for row in own]
                gains = [value - by_seed[row["seed"]][state]["accuracy"] for value, row in zip(values, own)]
                line |= {state: workloads.shown(values), f"{state}, difference": workloads.shown(gains)}
        line["seconds"] = workloads.shown([row["seconds"] for row in own], 0)
        lines.append(line)
    return lines


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("data", type=Path)
    arguments.add_argument("--model", required=True, help="FILE.py:BUILDER")
    arguments.add_argument("--weights", type=Path, required=True)
    arguments.add_argument("--share", type=float, default=0.5)
    arguments.add_argument("--items", type=int, default=1000)
    arguments.add_argument("--steps", type=int, default=100, help="gradient steps; 0 for the figures before them alone")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    arguments.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    arguments.add_argument("--test", type=int, default=10_000, help="test images that judge, the same random ones for all")
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--cache", type=Path, default=workloads.CACHE, help="decoded images")
    arguments.add_argument("--out", type=Path)
    return arguments.parse_args()


def main() -> None:
    given = parse()
    torch.set_num_threads(given.threads)
    module = workloads.original(given.model, given.weights)
    images = workloads.pictures(given.data / "train", given.cache).images
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        judge = Judge(given.model, given.weights, given.data / "test", given.cache, given.threads, Path(temporary), given.test)
        for seed in given.seeds:
            chosen = np.random.default_rng(seed).choice(len(images), given.items, replace=False)
            tensors = workloads.normalised(images[chosen], module.mean, module.std)
            for name in given.variants:
                row = measure(name, module.module, tensors, judge, given.share, given.steps, seed)
                rows.append(row)
                states = ", ".join(f"{state} {row[state]['accuracy']:.2f}" for state in ("before", "after") if state in row)
                workloads.say(f"{name}, seed {seed}: {states}; {row['seconds']:.0f} s")
    print(f"original {judge.accuracy:.2f} % of {len(judge.truth):,} test images; {given.items} unlabelled images, {given.steps} steps\n")
    print(workloads.table(summary(rows)))
    record(given, original=judge.accuracy, rows=rows)


if __name__ == "__main__":
    main()
