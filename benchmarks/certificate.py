"""Is the certificate calibrated? The intervals attar gives for agreement against a hidden truth, over data sets × levels of compression.

    python benchmarks/certificate.py [--cifar DATA --resnets FOLDER] [--mnist mnist.npz] [--adult adult-train.csv] [--mammography FILE.csv]
        [--clothing PHOTOS --mobilenet FOLDER] [--sample 500] [--steps 40] [--draws 200] [--seed 0] [--threads 2] [--out FILE.json]

Scikit-learn's digits are always there; every other set joins when its files are named. A set is a classifier (given, or fitted here to labels
in seconds), unlabelled items to compress it with, and a *population* that neither has seen. `attar.compress` makes the levels: int8, cuts of
several sizes in float32 and int8, untrained and distilled. Of the population a small sample plays the test split; `attar.stages.evaluate`
makes its figures from it, and the truth is what the rest of the population shows, at least SCARCE times as many items. Each case has a
sample of its own. Labels are read only to say what a certified agreement tells about accuracy.

A truth of finite size has an error of its own, which an interval does not promise to cover: nominal coverage is 94.4 % and not 95 % with 20 times
as many items. `--draws` further samples per case show coverage without the luck of a few dozen.
"""

from __future__ import annotations

import argparse
import re
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import populations
import torch
import workloads
from environment import record
from populations import Population
from scipy.stats import spearmanr
from sklearn.cluster import KMeans

from attar import stats
from attar.records import Figure
from attar.stages import evaluate

BUDGET = "agreement>=0.99"  # a bound on agreement alone is met by a ladder of cuts, and all of them are judged here
SCARCE = 20
CLUSTERS = 8


class Level(NamedTuple):
    """What original and candidate say about a whole population."""

    population: str
    name: str
    original: np.ndarray  # (n,) class
    student: np.ndarray  # (n,) class
    cluster: np.ndarray  # (n,) of the original
    labels: np.ndarray | None  # (n,)
    delivered: Figure | None = None  # agreement as certified by attar itself, of the candidate it delivers


def levels(name: str, given: Population, steps: int, seed: int, threads: int) -> list[Level]:
    """Every candidate of a compression, run over the population."""
    import attar

    made = attar.compress(given.module, given.items, budget=BUDGET, distil_steps=steps, seed=seed, threads=threads)
    with torch.no_grad():
        logits, population = (torch.cat([given.module(part) for part in side.split(100)]) for side in (given.items, given.population))
    means = KMeans(CLUSTERS, n_init=3, random_state=seed).fit(logits.numpy())
    original, cluster = population.argmax(1).numpy(), means.predict(population.numpy())
    found = []
    for candidate in made.front.candidates:
        delivered = made.certificate.agreement if candidate.name == made.front.chosen else None
        student = workloads.decide(candidate.onnx, given.population, threads)
        if any(np.array_equal(student, level.student) for level in found):
            workloads.say(f"  {candidate.name}: decides everything as an earlier level does; no case of its own")
            continue
        found.append(Level(name, candidate.name, original, student, cluster, given.labels, delivered))
        workloads.say(f"  {candidate.name}: agreement {(student == original).mean():.4f} of {len(student):,}")
    return found


def judge(level: Level, sample: np.ndarray) -> dict[str, Any]:
    """The certificate of a sample (m,) of positions, by the code that evaluates a run, against the rest of the population."""
    rest = np.setdiff1d(np.arange(len(level.original)), sample)
    equal = level.original == level.student
    sides = {"original": level.original[sample], "student": level.student[sample]}
    clusters = dict.fromkeys(sides, level.cluster[sample])
    seen = evaluate.Decisions(sample, sides, clusters, np.full(len(sample), np.nan), sample[:0], {})
    rows = evaluate._per_cluster(seen, CLUSTERS)
    figures = {figure.name: figure for figure in evaluate._agreement(seen, rows).figures}
    whole, worst = figures["agreement"], figures["agreement_worst_cluster"]
    named = re.search(r"cluster (\d+)", worst.method)
    if named is None:
        raise SystemExit(f"{worst.method!r} does not name the worst cluster")
    own = [equal[rest[level.cluster[rest] == cluster]] for cluster in range(CLUSTERS)]
    found: dict[str, Any] = {"population": level.population, "level": level.name, "n": len(sample), "agreement": whole.value}
    found |= _against("", whole.low, whole.high, float(equal[rest].mean()))
    found |= _against("worst_", worst.low, worst.high, float(own[int(named[1])].mean()))
    inside = [row for row in rows if row["n"] >= evaluate.SMALLEST_CLUSTER and len(own[row["cluster"]])]
    found["clusters"] = len(inside)
    found["clusters_covered"] = int(sum(row["low"] <= own[row["cluster"]].mean() <= row["high"] for row in inside))
    if level.labels is not None:
        correct = [(side[rest] == level.labels[rest]).mean() for side in (level.original, level.student)]
        found["accuracy_drop"] = float(correct[0] - correct[1])
    return found


def judge_delivered(level: Level, certified: Figure) -> dict[str, Any]:
    """The certificate that came with the delivered candidate, against the whole population."""
    found = {"population": level.population, "level": f"{level.name}, as delivered", "n": certified.n, "agreement": certified.value}
    return found | _against("", certified.low, certified.high, float((level.original == level.student).mean()))


def _against(prefix: str, low: float, high: float, truth: float) -> dict[str, Any]:
    return {f"{prefix}low": low, f"{prefix}high": high, f"{prefix}truth": truth, f"{prefix}covered": bool(low <= truth <= high)}


def coverage(covered: int, cases: int) -> str:
    low, high = stats.share_interval(covered, cases)
    return f"{100 * covered / cases:.1f} % of {cases:,} ({100 * low:.1f} to {100 * high:.1f})"


def correlation(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Spearman's correlation of certified agreement with the hidden loss of accuracy: in each population, and over all cases."""
    labelled = [row for row in rows if "accuracy_drop" in row]
    parts = {name: [row for row in labelled if row["population"] == name] for name in dict.fromkeys(row["population"] for row in labelled)}
    return {
        name: float(spearmanr([row["agreement"] for row in part], [row["accuracy_drop"] for row in part]).statistic)
        for name, part in {**parts, "all": labelled}.items()
        if len({row["agreement"] for row in part}) > 1 and len({row["accuracy_drop"] for row in part}) > 1
    }


def summary(rows: list[dict[str, Any]], draws: list[dict[str, Any]]) -> dict[str, str]:
    """Coverage of the three kinds of intervals: over the cases, and over further samples of the same cases."""
    found = {}
    for title, some in (("one sample per case", rows), ("further samples", draws)):
        if some:
            found[f"agreement, {title}"] = coverage(sum(row["covered"] for row in some), len(some))
            grouped = [row for row in some if "clusters" in row]
            clusters = (sum(row["clusters_covered"] for row in grouped), sum(row["clusters"] for row in grouped))
            found[f"every cluster, {title}"] = coverage(*clusters)
            found[f"worst cluster, {title}"] = coverage(sum(row["worst_covered"] for row in grouped), len(grouped))
    return found


def line(row: Mapping[str, Any]) -> dict[str, str]:
    """A case as a line of the table, in per cent."""
    return {
        "population": row["population"],
        "level": row["level"],
        "n": str(row["n"]),
        "interval": f"{100 * row['low']:.1f} to {100 * row['high']:.1f}",
        "truth": f"{100 * row['truth']:.1f}",
        "covered": "yes" if row["covered"] else "NO",
        "worst cluster": f"{100 * row['worst_low']:.1f} to {100 * row['worst_high']:.1f}" if "worst_low" in row else "–",
        "its truth": f"{100 * row['worst_truth']:.1f}" + ("" if row["worst_covered"] else " NO") if "worst_low" in row else "–",
        "accuracy lost": f"{100 * row['accuracy_drop']:.2f}" if "accuracy_drop" in row else "–",
    }


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("cifar", "resnets", "mnist", "adult", "mammography", "clothing", "mobilenet", "out"):
        arguments.add_argument(f"--{name}", type=Path)
    arguments.add_argument("--sample", type=int, default=500, help=f"items of a certificate; at most 1/{SCARCE + 1} of the population")
    arguments.add_argument("--items", type=int, default=500, help="unlabelled items a compression gets")
    arguments.add_argument("--steps", type=int, default=40, help="steps of each distillation")
    arguments.add_argument("--draws", type=int, default=200)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--cache", type=Path, default=workloads.CACHE, help="decoded images")
    given = arguments.parse_args()
    for one, other in (("cifar", "resnets"), ("clothing", "mobilenet")):
        if (getattr(given, one) is None) != (getattr(given, other) is None):
            arguments.error(f"--{one} and --{other} go together")
    return given


def sets(given: argparse.Namespace) -> dict[str, Callable[[], Population]]:
    """The populations whose files were named, made when they are called."""
    seed, items = given.seed, given.items
    found: dict[str, Callable[[], Population]] = {"digits": lambda: populations.digits(seed)}
    if given.mnist:
        found["mnist"] = lambda: populations.mnist(given.mnist, items, seed)
    for name in ("adult", "mammography"):
        if file := getattr(given, name):
            found[name] = lambda file=file: populations.rows(file, items, seed)
    if given.cifar:
        for builder in ("resnet20", "resnet56"):
            found[f"cifar {builder}"] = lambda builder=builder: populations.cifar(
                given.cifar, given.resnets, builder, items, seed, given.cache
            )
    if given.clothing:
        found["clothing"] = lambda: populations.clothing(given.clothing, given.mobilenet, items, seed)
    return found


def main() -> None:
    given, start = parse(), time.perf_counter()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    draws: list[dict[str, Any]] = []
    for name, make in sets(given).items():
        population = make()
        size = min(given.sample, len(population.population) // (SCARCE + 1))
        workloads.say(
            f"{name}: {len(population.items)} items to compress with, population of {len(population.population):,}, samples of {size}"
        )
        for number, level in enumerate(levels(name, population, given.steps, given.seed, given.threads)):
            rng = np.random.default_rng([given.seed, len(rows), number])
            samples = [np.sort(rng.choice(len(level.original), size, replace=False)) for _ in range(1 + given.draws)]
            rows.append(judge(level, samples[0]))
            draws += [judge(level, sample) for sample in samples[1:]]
            if level.delivered:
                rows.append(judge_delivered(level, level.delivered))
    found, related = summary(rows, draws), correlation(rows)
    print(workloads.table([line(row) for row in rows]) + "\n")
    print("\n".join(f"{title}: {text}" for title, text in found.items()))
    print("certified agreement and accuracy lost, Spearman: " + ", ".join(f"{name} {value:.2f}" for name, value in related.items()))
    workloads.say(f"{time.perf_counter() - start:.0f} s")
    record(given, coverage=found, spearman=related, cases=rows)


if __name__ == "__main__":
    main()
