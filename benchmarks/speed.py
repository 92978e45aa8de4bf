"""Cut and int8, timed: the files that `compress.py --keep FOLDER` left, attar's int8 beside the peers' cuts quantised by the peers' defaults.

    python benchmarks/speed.py FOLDER DATA --model FILE.py:BUILDER --weights W.safetensors [--peers-python PYTHON] [--rounds 50] [--threads 1]
        [--seeds 1 2 3 4 5] [--out FILE.json]

Ratios are to the float32 original in ONNX Runtime at batch 1, paired by round. Each runtime has a process of its own, all files take turns.
`--peers-python` names a Python that has nncf and openvino; without it ONNX Runtime alone is measured.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import workloads
from compress import Judge
from environment import record
from runtimes import Runtime, take_turns

QUANTISERS = Path(__file__).with_name("quantisers.py")


class Contender(NamedTuple):
    name: str
    runtime: str
    file: Path


def contenders(folder: Path, seed: int, peers_python: str | None) -> list[Contender]:
    """Every file of a seed, the peers' quantised first where they are not yet."""
    found, runtimes = [], ("onnxruntime", "openvino") if peers_python else ("onnxruntime",)
    for home in sorted(folder.glob(f"*-{seed}")):
        side = home.name.removesuffix(f"-{seed}")
        found.append(Contender(f"{side}, float32", "onnxruntime", home / "trained.onnx"))
        if (home / "int8.onnx").exists():
            found += [Contender(f"{side}, int8", runtime, home / "int8.onnx") for runtime in runtimes]
            continue
        found.append(_quantised(home, side, "onnxruntime", sys.executable, "onnxruntime"))
        if peers_python:
            found += [_quantised(home, side, "nncf", peers_python, runtime) for runtime in runtimes]
    if not found:
        raise SystemExit(f"{folder}: no folder SIDE-{seed}; expected what compress.py --keep leaves")
    return found


def _quantised(home: Path, side: str, quantiser: str, python: str, runtime: str) -> Contender:
    target = home / f"{quantiser}.onnx"
    if not target.exists():
        workloads.say(f"{quantiser}: quantising {home.name}")
        command = [python, str(QUANTISERS), quantiser, *map(str, (home / "trained.onnx", target, home / "calibration.npy"))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{quantiser} failed with {done.returncode}: {done.stderr[-2000:]}")
    return Contender(f"{side}, {quantiser} defaults", runtime, target)


def measure(
    entries: list[Contender], judge: Judge, folder: Path, python: dict[str, str], rounds: int, threads: int
) -> list[dict[str, Any]]:
    """Size, latency, accuracy and agreement of all; the first is what the ratios are to."""
    inputs, outputs = folder / "inputs.npy", folder / "outputs.npy"
    np.save(inputs, judge.inputs.numpy())
    runtimes = {name: Runtime(name, threads, python[name]) for name in dict.fromkeys(entry.runtime for entry in entries)}
    decided, turns = {}, {}
    for entry in entries:
        key, runtime = f"{entry.name} in {entry.runtime}", runtimes[entry.runtime]
        runtime.load(key, entry.file, judge.shape)
        decided[key] = runtime.outputs(key, inputs, outputs).argmax(1)
        turns[key] = lambda runtime=runtime, key=key: runtime.turn(key)
    times = take_turns(turns, rounds)
    for runtime in runtimes.values():
        runtime.close()
    first = times[next(iter(times))]
    rows = []
    for entry, key in zip(entries, times):
        row = {"contender": entry.name, "runtime": entry.runtime, "milliseconds": float(np.median(times[key]))}
        row |= {"faster": float(np.median(first / times[key])), "smaller": entries[0].file.stat().st_size / entry.file.stat().st_size}
        row |= {
            f"{kind}": 100 * float((decided[key] == truth).mean())
            for kind, truth in (("accuracy", judge.truth), ("agreement", judge.decided))
        }
        rows.append(row)
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """One line per contender and runtime: mean ± spread over seeds."""
    lines = []
    for name, runtime in dict.fromkeys((row["contender"], row["runtime"]) for row in rows):
        own = [row for row in rows if (row["contender"], row["runtime"]) == (name, runtime)]
        line = {"contender": name, "runtime": runtime}
        for key, digits in (("milliseconds", 2), ("faster", 2), ("smaller", 2), ("accuracy", 2), ("agreement", 2)):
            line[key] = workloads.shown([row[key] for row in own], digits)
        lines.append(line)
    return lines


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("data", type=Path)
    arguments.add_argument("--model", required=True, help="FILE.py:BUILDER")
    arguments.add_argument("--weights", type=Path, required=True)
    arguments.add_argument("--peers-python", help="a Python with nncf and openvino")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    arguments.add_argument("--rounds", type=int, default=50)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--test", type=int, default=10_000, help="test images that judge")
    arguments.add_argument("--cache", type=Path, default=workloads.CACHE, help="decoded images")
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    judge = Judge(given.model, given.weights, given.data / "test", given.cache, given.threads, given.folder, given.test)
    python = {"onnxruntime": sys.executable, "openvino": given.peers_python or sys.executable}
    base = [Contender("original, float32", "onnxruntime", judge.file)]
    base += [Contender("original, float32", "openvino", judge.file)] if given.peers_python else []
    rows: list[dict[str, Any]] = []
    for seed in given.seeds:
        entries = base + contenders(given.folder, seed, given.peers_python)
        rows += [row | {"seed": seed} for row in measure(entries, judge, given.folder, python, given.rounds, given.threads)]
    print(
        f"{len(judge.truth):,} test images, {given.rounds} rounds, {given.threads} threads; faster and smaller than the original in ONNX Runtime\n"
    )
    print(workloads.table(summary(rows)))
    record(given, rows=rows)


if __name__ == "__main__":
    main()
