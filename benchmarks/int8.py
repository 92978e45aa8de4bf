"""int8 of a transformers classifier calibrated on photos without labels: attar beside the quantisers' defaults, on every kind of processor.

    python benchmarks/int8.py MODEL_FOLDER PHOTOS [--calibration 256 1000] [--peers-python PYTHON] [--seeds 1 2 3 4 5] [--exact 100]
        [--rounds 40] [--threads 1] [--out FILE.json]

Each seed draws the peers' calibration photos (the largest count; NNCF takes the first 300 of them by itself), attar's (each count given, nested) and
leaves the rest to judge: the share of photos on which a file decides as the float32 file does in ONNX Runtime, with its Wilson interval. Latency is
that of one photo at a time; every runtime has a process of its own and all files take turns. `saturating` is the share of decisions that would be
others on a processor without VNNI (integers.py), on the first `--exact` judging photos. OpenVINO computes float32 files in bfloat16 where the
processor has it. `--peers-python` names a Python that has nncf and openvino; without it they are left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import integers
import numpy as np
import torch
import workloads
from environment import record
from runtimes import Runtime, take_turns

from attar.config import ModelChoice
from attar.modalities.image import prepare
from attar.models.network import Network, find_classifier
from attar.models.preprocessing import from_hub_config
from attar.records import Preprocess
from attar.runtime import normalise
from attar.stages.compress.quantise import quantise
from attar.stats import share_interval

QUANTISERS = Path(__file__).with_name("quantisers.py")


class Contender(NamedTuple):
    name: str
    runtime: str
    file: Path


def photos(folder: Path, preprocess: Preprocess) -> np.ndarray:
    """Every file of a folder as the model sees it, uint8 (n, height, width, 3), in the order of names."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if not files:
        raise SystemExit(f"{folder}: no files; expected photos")
    with ThreadPoolExecutor(2) as pool:
        return np.stack(list(pool.map(lambda file: prepare(file.read_bytes(), preprocess, max_pixels=10**9), files)))


def write_original(folder: Path, preprocess: Preprocess, target: Path) -> Path:
    """The float32 file of a transformers classifier: image → embedding, logits."""
    import transformers

    body = transformers.AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    example = torch.zeros(2, 3, *preprocess.size)
    network = Network(body, find_classifier(body, torch.rand(example.shape, generator=torch.Generator().manual_seed(0)))).eval()
    names = {"input_names": ["image"], "output_names": ["embedding", "logits"]}
    axes = {name: {0: "items"} for name in ("image", "embedding", "logits")}
    with torch.no_grad():
        torch.onnx.export(network, (example,), str(target), dynamo=False, opset_version=17, dynamic_axes=axes, **names)
    return target


def contenders(
    original: Path, calibration: np.ndarray, counts: Sequence[int], folder: Path, peers_python: str | None
) -> tuple[list[Contender], dict[str, Any]]:
    """Every file of a seed, quantised now, and what was noted on the way; the original in ONNX Runtime comes first."""
    found = [Contender("float32", "onnxruntime", original)]
    inputs, notes = folder / "calibration.npy", {}
    np.save(inputs, calibration)
    peers = {"onnxruntime": sys.executable} | ({"nncf": peers_python} if peers_python else {})
    for quantiser, python in peers.items():
        target = folder / f"{quantiser}.onnx"
        workloads.say(f"{quantiser}: quantising")
        command = [python, str(QUANTISERS), quantiser, str(original), str(target), str(inputs)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{quantiser} failed with {done.returncode}: {done.stderr[-2000:]}")
        found.append(Contender(f"{quantiser} defaults", "onnxruntime", target))
    for count in counts:
        workloads.say(f"attar: quantising with {count} photos")
        start, target = time.perf_counter(), folder / f"attar-{count}.onnx"
        chosen = quantise(original, target, [calibration[at : at + 16] for at in range(0, count, 16)])
        notes[f"attar, {count} photos"] = chosen._asdict() | {"seconds": time.perf_counter() - start}
        found.append(Contender(f"attar, {count} photos", "onnxruntime", target))
    if peers_python:
        found += [one._replace(runtime="openvino") for one in found]
    return found, notes


def measure(entries: Sequence[Contender], judged: np.ndarray, folder: Path, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Agreement, size, latency and what saturation changes, one row per contender."""
    inputs, outputs = folder / "judged.npy", folder / "outputs.npy"
    np.save(inputs, judged)
    python = {"onnxruntime": sys.executable, "openvino": given.peers_python}
    runtimes = {name: Runtime(name, given.threads, python[name]) for name in dict.fromkeys(one.runtime for one in entries)}
    decided, turns = [], {}
    for place, one in enumerate(entries):
        runtime, key = runtimes[one.runtime], str(place)
        runtime.load(key, one.file, (1, *judged.shape[1:]))
        decided.append(runtime.outputs(key, inputs, outputs).argmax(1))
        turns[key] = lambda runtime=runtime, key=key: runtime.turn(key)
    times = list(take_turns(turns, given.rounds).values())
    for runtime in runtimes.values():
        runtime.close()
    others: dict[Path, float | None] = {entries[0].file: None}
    rows = []
    for one, decision, taken in zip(entries, decided, times):
        if one.file not in others:
            workloads.say(f"{one.name}: in integers")
            others[one.file] = 100 * (1 - integers.compare(one.file, judged[: given.exact], "logits")["equal"])
        equal = int((decision == decided[0]).sum())
        low, high = share_interval(equal, len(judged))
        quartiles = [float(value) for value in np.quantile(taken, (0.25, 0.5, 0.75))]
        row = {"contender": one.name, "runtime": one.runtime, "agreement": 100 * equal / len(judged), "low": 100 * low, "high": 100 * high}
        row |= {"megabytes": one.file.stat().st_size / 1e6, "milliseconds": quartiles[1], "quartiles": quartiles[::2]}
        rows.append(row | {"saturating": others[one.file], "ratio": float(np.median(taken / times[0]))})
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """One line per contender and runtime: mean ± spread over seeds, the interval of all seeds' photos together left to each seed's own row."""
    lines = []
    for name, runtime in dict.fromkeys((row["contender"], row["runtime"]) for row in rows):
        own = [row for row in rows if (row["contender"], row["runtime"]) == (name, runtime)]
        line = {"contender": name, "runtime": runtime, "agreement %": workloads.shown([row["agreement"] for row in own])}
        line["95 % of one seed"] = f"{np.mean([row['low'] for row in own]):.1f} – {np.mean([row['high'] for row in own]):.1f}"
        line["MB"] = workloads.shown([row["megabytes"] for row in own])
        line["ms"] = workloads.shown([row["milliseconds"] for row in own])
        line["of float32"] = workloads.shown([row["ratio"] for row in own])
        changed = [row["saturating"] for row in own if row["saturating"] is not None]
        line["changed by saturation %"] = workloads.shown(changed) if changed else "–"
        lines.append(line)
    return lines


def closer(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How many times closer to 100 % attar is than ONNX Runtime's defaults, per count of photos: mean shortfalls over the seeds."""

    def short(name: str) -> float:
        return float(np.mean([100 - row["agreement"] for row in rows if row["contender"] == name and row["runtime"] == "onnxruntime"]))

    names = [name for name in dict.fromkeys(row["contender"] for row in rows) if name.startswith("attar")]
    return [
        f"{name}: {short('onnxruntime defaults') / max(short(name), 1e-9):.1f} times closer to 100 % than ONNX Runtime's" for name in names
    ]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model", type=Path, help="a transformers folder of a classifier")
    arguments.add_argument("photos", type=Path)
    arguments.add_argument("--calibration", type=int, nargs="+", default=[256, 1000], help="photos that attar calibrates with")
    arguments.add_argument("--peers-python", help="a Python with nncf and openvino")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    arguments.add_argument("--exact", type=int, default=100, help="photos that are computed in exact integers")
    arguments.add_argument("--rounds", type=int, default=40)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    preprocess = from_hub_config(str(given.model), ModelChoice(model=f"hf:{given.model}"))
    pixels, most = photos(given.photos, preprocess), max(given.calibration)
    if len(pixels) <= most:
        raise SystemExit(f"--calibration {most}: only {len(pixels)} photos; expected some left to judge")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        original = write_original(given.model, preprocess, folder / "float32.onnx")
        for seed in given.seeds:
            order = np.random.default_rng(seed).permutation(len(pixels))
            entries, notes = contenders(
                original, normalise(pixels[order[:most]], preprocess), sorted(given.calibration), folder, given.peers_python
            )
            found = measure(entries, normalise(pixels[order[most:]], preprocess), folder, given)
            rows += [row | {"seed": seed} | {"chosen": notes.get(row["contender"])} for row in found]
            workloads.say(workloads.table(summary([row for row in rows if row["seed"] == seed])))
    print(f"{len(pixels) - most:,} judging photos, {given.exact} in integers, {given.rounds} rounds, {given.threads} threads\n")
    print(workloads.table(summary(rows)))
    print("\n".join(["", *closer(rows)]))
    record(given, rows=rows)


if __name__ == "__main__":
    main()
