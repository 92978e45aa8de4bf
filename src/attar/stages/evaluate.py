"""evaluate: what the student keeps of the original and what it costs, on the untouched test split, each figure with its interval.

Two passes are all it takes: every test item goes once through both files (decoded once, resumable by shard), and both
files take turns at batch 1 in a process of their own. Labels only judge: no other stage reads them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from attar import runtime, stats
from attar.config import Evaluate
from attar.errors import DataError, ModelError
from attar.labels import read_labels
from attar.modalities.image import Loader
from attar.models import frozen
from attar.records import Clusters, Evidence, Figure, Front, Items, Model, Selection
from attar.workspace import Job

BATCH = 32
SHARD = 1024  # test items between two saves
SAMPLE = 10_000  # test items whose embeddings are kept for the neighbour figures: bounds their memory and time
ROUNDS = 30
REPEATS = 1000
SIDES = ("original", "student")
SMALLEST_CLUSTER = 5  # items; the worst of smaller clusters is mostly chance


class Decisions(NamedTuple):
    """What both files say about the test items; the mappings have the keys original and student."""

    ids: np.ndarray  # (n,)
    top: Mapping[str, np.ndarray]  # (n,) class of the largest logit; empty for encoders
    cluster: Mapping[str, np.ndarray]  # (n,) most probable cluster
    cosine: np.ndarray  # (n,) between the two embeddings; NaN where their widths differ
    sample: np.ndarray  # (m,) positions in ids whose embeddings are kept
    embedding: Mapping[str, np.ndarray]  # (m, d) float32


class Findings(NamedTuple):
    figures: list[Figure]
    notes: list[str]


Inputs = Callable[[np.ndarray], Iterator[np.ndarray]]
"""Model inputs of some ids, in their order, a batch at a time."""


def evaluate(items: Items, clusters: Clusters, selection: Selection, model: Model, front: Front, settings: Evaluate, job: Job) -> Evidence:
    """Every figure of original and student on the test items that are neither leaks nor duplicates.

    Raises DataError when no test item is left, UsageError or DataError when the labels cannot be used.
    """
    ids, notes = _untouched(items, selection)
    labels = None
    if settings.labels:  # before the long part, so that a wrong file is told at once
        labels, found = read_labels(items, settings.labels)
        labels = labels[ids]
        notes += [*found, f"{np.count_nonzero(labels)} of the {len(ids)} test items carry a label."]
        if not np.any(labels):
            raise DataError(
                f"labels: {settings.labels}: none of the {len(ids)} test items is labelled; label some of them, or drop --labels"
            )

    def judge(seen: Decisions) -> list[Findings]:
        if labels is None:
            return []
        return [_class_figures(seen, labels, model, job), _label_figures(seen, labels, settings.neighbours, job)]

    with Loader(items, model.preprocess, workers=job.workers) as loader:

        def inputs(part: np.ndarray) -> Iterator[np.ndarray]:
            stream = loader.stream(part[low : low + BATCH] for low in range(0, len(part), BATCH))
            return (runtime.normalise(images, model.preprocess) for _, images in stream)

        return measure(ids, inputs, clusters.count, front, settings, notes, judge, job)


def measure(
    ids: np.ndarray,
    inputs: Inputs,
    clusters: int,
    front: Front,
    settings: Evaluate,
    notes: list[str],
    judge: Callable[[Decisions], list[Findings]],
    job: Job,
) -> Evidence:
    """Every figure of original and student on test items, wherever their inputs come from; `judge` adds what labels tell."""
    seen = _decide(ids, inputs, front, job)
    per_cluster = _per_cluster(seen, clusters)
    parts = [_agreement(seen, per_cluster), _embeddings(seen, settings.neighbours, job), _costs(front), _latency(front, job), *judge(seen)]
    figures = tuple(_placed(figure, front) for part in parts for figure in part.figures)
    notes = [*notes, *(note for part in parts for note in part.notes)]
    evidence = Evidence(figures=figures, per_cluster=tuple(per_cluster), notes=tuple(notes))
    job.say(_headline(evidence, front))
    return evidence


def _untouched(items: Items, selection: Selection) -> tuple[np.ndarray, list[str]]:
    """Ids of the test items the figures may rest on: no near duplicate of a training item, none twice."""
    ids = items.ids("test")
    leak = selection.column("leak")[ids].astype(bool)
    # Only duplicates: leaving out what curation found odd would flatter the figures.
    twice = ~leak & np.array(["duplicate" in (reason or "") for reason in selection.column("reason")[ids]], bool)
    left = ids[~leak & ~twice]
    counts = f"{leak.sum()} near duplicates of training items and {twice.sum()} duplicates of other test items"
    if len(left) == 0:
        raise DataError(f"none of the {len(ids)} test items can be measured on, with {counts} set aside; add images, or raise test_share")
    return left, [f"The figures rest on {len(left)} of {len(ids)} test items; {counts} were left out."]


def _decide(ids: np.ndarray, inputs: Inputs, front: Front, job: Job) -> Decisions:
    """Runs both files on the items; a finished shard is not run again after an interruption."""
    kept = np.zeros(len(ids), bool)
    kept[job.rng("neighbours").choice(len(ids), SAMPLE, replace=False) if len(ids) > SAMPLE else slice(None)] = True
    shards = []
    with job.progress(len(ids), "running original and student on the test split") as bar:
        for number, start in enumerate(range(0, len(ids), SHARD)):
            part, keep = ids[start : start + SHARD], kept[start : start + SHARD]
            shards.append(job.shard(number, functools.partial(_table, part, inputs, front, keep, bar.update)))
            bar.update(start + len(part) - bar.n)  # a shard that was kept from before
    table = pa.concat_tables(shards)
    pick = {name: table[name].to_numpy() for name in table.column_names if not name.endswith("embedding")}
    embedding = {}
    for of in SIDES:
        column = table[f"{of}_embedding"].combine_chunks()
        embedding[of] = column.flatten().to_numpy().reshape(kept.sum(), -1)
    top, cluster = ({of: pick[f"{of}_{kind}"] for of in SIDES if f"{of}_{kind}" in pick} for kind in ("top", "cluster"))
    return Decisions(pick["id"], top, cluster, pick["cosine"], np.flatnonzero(kept), embedding)


def _table(part: np.ndarray, inputs: Inputs, front: Front, keep: np.ndarray, tick: Callable[[int], Any]) -> pa.Table:
    """Decisions of one shard as a table; embeddings only where `keep` says so, empty lists elsewhere."""
    sides, rows, start = dict(zip(SIDES, (front.original, front.student))), [], 0
    files = {of: one.onnx for of, one in sides.items()}
    for values in runtime.run_batches(files, inputs(part), threads=front.threads, runtimes=_runtimes(front)):
        found = {of: frozen.answers(values[of], one.model.source, one.model.head) for of, one in sides.items()}
        count = len(found["original"]["embedding"])
        ids, kept, start = part[start : start + count], keep[start : start + count], start + count
        columns: dict[str, Any] = {"id": ids}
        for of, answer in found.items():
            if "logits" in answer:
                columns[f"{of}_top"] = answer["logits"].argmax(axis=1)
            columns[f"{of}_cluster"] = answer["cluster_probabilities"].argmax(axis=1)
            flat, width = answer["embedding"][kept].ravel(), answer["embedding"].shape[1]
            offsets = np.concatenate([[0], np.cumsum(kept) * width]).astype(np.int64)
            columns[f"{of}_embedding"] = pa.LargeListArray.from_arrays(offsets, pa.array(flat, pa.float32()))
        original, student = (found[of]["embedding"] for of in SIDES)
        columns["cosine"] = stats.cosine(original, student) if original.shape == student.shape else np.full(count, np.nan, np.float32)
        rows.append(pa.table(columns))
        tick(count)
    return pa.concat_tables(rows)


def _runtimes(front: Front) -> dict[str, str]:
    return {"original": front.original.runtime, "student": front.student.runtime}


def _placed(figure: Figure, front: Front) -> Figure:
    """A figure of the student's answers with the runtime that gave them, where that is not ONNX Runtime: it holds nowhere else."""
    place = runtime.where(front.student.runtime)
    return figure._replace(method=f"{figure.method} (student{place})") if place and figure.of == "student" and figure.split else figure


def _share(name: str, of: str, hits: np.ndarray, what: str) -> Figure:
    """The share of true hits (n,) with its exact interval."""
    n, count = len(hits), int(np.count_nonzero(hits))
    low, high = stats.share_interval(count, n)
    return Figure(name, of, count / n, low, high, n, "test", f"exact 95 %; {what}", "share")


def _mean(name: str, of: str, values: np.ndarray, what: str, job: Job, unit: str = "share") -> Figure:
    """The mean of values (n,) with its bootstrap interval."""
    low, high = stats.bootstrap(values, job.rng(name, of), repeats=REPEATS)
    return Figure(name, of, float(np.mean(values)), low, high, len(values), "test", f"bootstrap 95 %; {what}", unit)


def _decision(seen: Decisions) -> tuple[Mapping[str, np.ndarray], str]:
    return (seen.top, "same top-1 class as the original") if seen.top else (seen.cluster, "same most probable cluster as the original")


def _per_cluster(seen: Decisions, count: int) -> list[dict[str, Any]]:
    """Agreement in each cluster of the original's that test items fall in."""
    decision, _ = _decision(seen)
    rows = []
    for cluster in range(count):
        inside = seen.cluster["original"] == cluster
        if inside.any():
            value, low, high = stats.agreement(decision["original"][inside], decision["student"][inside])
            rows.append({"cluster": cluster, "n": int(inside.sum()), "value": value, "low": low, "high": high})
    return rows


def _agreement(seen: Decisions, per_cluster: list[dict[str, Any]]) -> Findings:
    decision, what = _decision(seen)
    figures = [_share("agreement", "student", decision["original"] == decision["student"], what)]
    large = [row for row in per_cluster if row["n"] >= SMALLEST_CLUSTER]
    notes = []
    if large:
        worst = min(large, key=lambda row: row["value"])
        # The lowest of k is low partly by chance: its interval holds only if those of all k hold together (Bonferroni).
        inside = seen.cluster["original"] == worst["cluster"]
        value, low, high = stats.agreement(decision["original"][inside], decision["student"][inside], 1 - 0.05 / len(large))
        method = f"exact 95 % for all clusters together; lowest of the {len(large)} clusters with at least {SMALLEST_CLUSTER} test items: cluster {worst['cluster']}"
        figures.append(Figure("agreement_worst_cluster", "student", value, low, high, worst["n"], "test", method, "share"))
    else:
        notes.append(f"agreement_worst_cluster was not measured: no cluster has {SMALLEST_CLUSTER} test items.")
    same = seen.cluster["original"] == seen.cluster["student"]
    figures.append(_share("cluster_agreement", "student", same, "same most probable cluster as the original"))
    return Findings(figures, notes)


def _among(seen: Decisions, count: int) -> str:
    return f"{count} test items" + (f" drawn from {len(seen.ids)}" if len(seen.sample) < len(seen.ids) else "")


def _embeddings(seen: Decisions, wanted: int, job: Job) -> Findings:
    """How alike the two embeddings are: the same neighbours, the same direction."""
    figures, notes, n = [], [], len(seen.sample)
    k = min(wanted, n - 1)
    if k > 0:
        with job.progress(2 * n, "comparing neighbours") as bar:
            overlap = stats.knn_overlap(seen.embedding["original"], seen.embedding["student"], k, bar.update)
        figures.append(_mean("knn_overlap", "student", overlap, f"common share of the {k} nearest by cosine among {_among(seen, n)}", job))
    else:
        notes.append("knn_overlap was not measured: it needs at least two test items.")
    if np.isnan(seen.cosine).any():
        widths = " and ".join(str(value.shape[1]) for value in seen.embedding.values())
        notes.append(f"embedding_cosine was not measured: the embeddings of original and student have different widths ({widths}).")
    else:
        figures.append(
            _mean("embedding_cosine", "student", seen.cosine, "mean cosine similarity to the original's embedding", job, "index")
        )
    return Findings(figures, notes)


def _costs(front: Front) -> Findings:
    """Size of the files, parameters and multiply-accumulates; and their ratios."""
    figures = []
    for name, unit in (("size", "bytes"), ("parameters", "count"), ("macs", "count")):
        sides = (front.original, front.student)
        values = [float(one.onnx.stat().st_size if name == "size" else one.figures[name]) for one in sides]
        figures += [Figure(name, of, value, value, value, 1, "", "count", unit) for of, value in zip(("original", "student"), values)]
        ratio = values[1] / max(values[0], 1)
        figures.append(Figure(f"{name}_ratio", "student", ratio, ratio, ratio, 1, "", "count; student / original", "ratio"))
    return Findings(figures, [])


def _threads(front: Front) -> str:
    return f"{front.threads} thread" + "s" * (front.threads > 1)


def _latency(front: Front, job: Job) -> Findings:
    """Milliseconds at batch 1; measured once, so that a resumed run keeps its figures."""
    files, places = {"original": front.original.onnx, "student": front.student.onnx}, _runtimes(front)
    if _opens(front):
        files["there"], places["there"] = front.original.onnx, front.student.runtime

    def measure() -> dict[str, list[float]]:
        with job.progress(ROUNDS, "measuring latency", "rounds") as bar:
            found = runtime.measure_latency(
                files, runtimes=places, threads=front.threads, rounds=ROUNDS, seed=job.seed, progress=bar.update
            )
        return {of: values.tolist() for of, values in found.items()}

    found = job.once("latency.json", measure)
    rounds = np.array([found[of] for of in SIDES]).T
    method = f"bootstrap 95 %; median of {len(rounds)} rounds; {_conditions(front)}"
    figures = []
    for of, values in zip(SIDES, rounds.T):
        bounds = stats.bootstrap(values, job.rng("latency", of), np.median, REPEATS)
        figures.append(Figure("latency_ms", of, float(np.median(values)), *bounds, len(rounds), "", method, "ms"))
    bounds = stats.bootstrap(rounds, job.rng("latency_ratio"), _median_ratio, REPEATS)
    paired = method.replace("median", "median ratio, paired by round,")
    figures.append(Figure("latency_ratio", "student", _median_ratio(rounds), *bounds, len(rounds), "", paired, "ratio"))
    notes = []
    if "there" in found:
        there, ratio = np.median(found["there"]), _median_ratio(np.array([found["there"], found["student"]]).T)
        name = runtime.NAMES[front.student.runtime]
        notes.append(f"In {name} the original itself takes {there:.3g} ms; in the same runtime the student has {ratio:.2f}x its latency.")
    return Findings(figures, notes)


def _conditions(front: Front) -> str:
    """How latency was measured, in words."""
    rest = f"on the CPU, {_threads(front)}, batch 1, files in turn in a process of their own"
    before, after = (runtime.said(place) for place in _runtimes(front).values())
    return f"{before} {rest}" if before == after else f"original in {before}, student in {after}, {rest} for each"


def _opens(front: Front) -> bool:
    """Whether the student's runtime is another than the original's and can run that too."""
    if front.student.runtime == front.original.runtime:
        return False
    try:
        runtime.open_session(front.original.onnx, runtime=front.student.runtime)
    except ModelError:
        return False
    return True


def _median_ratio(rounds: np.ndarray) -> float:
    """Median of student / original over rounds (n, 2)."""
    return float(np.median(rounds[:, 1] / rounds[:, 0]))


def _class_figures(seen: Decisions, labels: np.ndarray, model: Model, job: Job) -> Findings:
    """Accuracy, precision, recall and F1 against the labels, where they are the model's class names."""
    if not seen.top or not model.classes:
        return Findings([], ["accuracy, precision, recall and F1 were not measured: the model has no classes."])
    index = {name.strip().casefold(): number for number, name in enumerate(model.classes)}
    names = sorted({label for label in labels if label})
    known = [name for name in names if name.casefold() in index]
    unknown = [name for name in names if name.casefold() not in index]
    if len(known) < len(names) / 2:
        examples = f"labels such as {', '.join(unknown[:3])}; classes such as {', '.join(model.classes[:3])}"
        why = f"only {len(known)} of {len(names)} labels are class names of the model ({examples})"
        return Findings([], [f"accuracy, precision, recall and F1 were not measured: {why}."])
    truth = np.array([index.get(label.casefold(), -1) if label else -1 for label in labels])
    judged = truth >= 0
    notes = []
    if unknown:
        left = np.count_nonzero(labels) - judged.sum()
        notes.append(
            f"{left} labelled test items were not judged: {', '.join(unknown[:3])} … ({len(unknown)} labels) are no classes of the model."
        )
    truth, top = truth[judged], {of: values[judged] for of, values in seen.top.items()}
    figures = [_share("accuracy", of, values == truth, "top-1 class is the label") for of, values in top.items()]
    gain = (top["student"] == truth).astype(float) - (top["original"] == truth)
    figures.append(_mean("accuracy_difference", "student", gain, "student − original, paired by item", job))
    for of, values in top.items():
        figures += _class_scores(of, truth, values, model.classes, job)
    return Findings(figures, notes)


def _class_scores(of: str, truth: np.ndarray, top: np.ndarray, classes: tuple[str, ...], job: Job) -> list[Figure]:
    """Precision, recall and F1: macro, then of each class that a test item carries."""
    table = stats.crossing(truth, top, (len(classes), len(classes)))
    scores = stats.class_scores(table, table.counts)
    draws = np.stack([stats.class_scores(table, counts) for counts in stats.resample(table, job.rng("classes", of), REPEATS)])
    support = np.bincount(truth, minlength=len(classes))
    present = np.flatnonzero(support)
    macro, each = [], []
    for number, name in enumerate(("precision", "recall", "f1")):
        value, bounds = float(scores[number, present].mean()), stats.quantiles(np.nanmean(draws[:, number, present], axis=1))
        method = f"bootstrap 95 %; mean over the {len(present)} classes that labelled test items have"
        macro.append(Figure(name, of, value, *bounds, len(truth), "test", method, "share"))
        for one in present:
            bounds = stats.quantiles(draws[:, number, one])
            each.append(
                Figure(
                    f"{name}[{classes[one]}]", of, float(scores[number, one]), *bounds, int(support[one]), "test", "bootstrap 95 %", "share"
                )
            )
    return macro + each


def _label_figures(seen: Decisions, labels: np.ndarray, wanted: int, job: Job) -> Findings:
    """How well clusters and neighbours follow the labels, for any model."""
    labelled = labels != ""
    names, codes = np.unique(labels[labelled].astype(str), return_inverse=True)
    figures: list[Figure] = []
    if len(names) < 2:
        return Findings([], [f"clustering and nearest-neighbour figures were not measured: every labelled test item is {str(names[0])!r}."])
    inside = np.flatnonzero(labelled[seen.sample])  # rows of the kept embeddings whose item is labelled
    truth = np.searchsorted(names, labels[seen.sample[inside]].astype(str))
    k = min(wanted, len(inside) - 1)
    with job.progress(2 * REPEATS, "clusters against labels", "resamples") as bar:
        for of, clusters in seen.cluster.items():
            figures += _cluster_scores(of, codes, clusters[labelled], len(names), job, bar.update)
    if k < 1:
        return Findings(figures, ["knn_accuracy was not measured: it needs two labelled items."])
    with job.progress(2 * len(inside), "neighbours against labels") as bar:
        for of, embedding in seen.embedding.items():
            voted = stats.knn_vote(truth, stats.neighbours(embedding[inside], k, bar.update))
            what = f"leave-one-out vote of the {k} nearest by cosine among {_among(seen, len(inside))}"
            figures.append(_share("knn_accuracy", of, voted == truth, what))
    return Findings(figures, [])


def _cluster_scores(of: str, codes: np.ndarray, clusters: np.ndarray, labels: int, job: Job, tick: Callable[[int], Any]) -> list[Figure]:
    table = stats.crossing(codes, clusters)
    values, draws = stats.cluster_scores(table, table.counts), []
    for counts in stats.resample(table, job.rng("clusters", of), REPEATS):
        draws.append(stats.cluster_scores(table, counts))
        tick(1)
    method = f"value ± 1.96 bootstrap standard errors; most probable cluster against {labels} labels"
    figures = []
    for name, value, column, floor in zip(("clustering_acc", "nmi", "ari"), values, np.array(draws).T, (0, 0, -1)):
        bounds = stats.spread(float(value), column, floor)
        figures.append(
            Figure(name, of, float(value), *bounds, len(codes), "test", method, "share" if name == "clustering_acc" else "index")
        )
    return figures


def _headline(evidence: Evidence, front: Front) -> str:
    values = {(figure.name, figure.of): figure.value for figure in evidence.figures}
    size, latency = (values[name, "student"] for name in ("size_ratio", "latency_ratio"))
    before, after = (values["latency_ms", of] for of in SIDES)
    return (
        f"student gives the {evidence.certificate}, at {size:.2f}x the original's size and {latency:.2f}x its latency "
        f"({before:.2f} → {after:.2f} ms{runtime.where(front.student.runtime)}, {_threads(front)})"
    )
