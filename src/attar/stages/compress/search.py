"""compress: the loop from the original to the model that meets the budget, every candidate kept.

    original → whole int8 → cuts of several sizes, repaired, not trained (cheap: they show what each size costs)
             → the cut the costs call for, distilled → further cuts while the budget leaves room → the front

Every candidate is built and measured once and kept as a folder, so an interrupted loop goes on where it was. Which cuts are tried depends
on the settings, on agreement and on exact costs; measured latency decides only where the budget speaks of latency.
"""

from __future__ import annotations

import copy
import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from attar import config, formats
from attar.modalities.image import Loader
from attar.models import sources
from attar.models.network import Network, count_macs, count_parameters
from attar.models.objectives import distillation
from attar.records import Candidate, Clusters, Front, Items, Model, Policy, Selection
from attar.runtime import measure_latency, run_items
from attar.stages.augment.engine import augment, normalise
from attar.stages.compress import prune, repair
from attar.stages.compress.budget import Constraint, parse_budget
from attar.stages.compress.quantise import quantise
from attar.stages.compress.rounding import round_network, roundable
from attar.stages.export import write_onnx
from attar.stages.train import distil
from attar.workspace import Job

SHARES = (0.75, 0.5, 0.35, 0.25)
"""Shares of the original's MACs that cuts aim at."""
ROUNDS = 2
"""Distillations at most."""
COMPUTE = 1e13
"""Multiply-accumulates of one distillation when no time is given: minutes on a laptop, and the same steps on every machine."""
SLOWER = 1.1
"""A candidate slower than the original by more than this is not delivered unless the budget asks for its other virtues alone."""


class Bench:
    """What building and measuring candidates needs: the original, the items, and the figures to compare with."""

    def __init__(
        self, items: Items, clusters: Clusters, selection: Selection, policy: Policy, model: Model, settings: config.Compress, job: Job
    ) -> None:
        self.items, self.clusters, self.policy, self.model, self.settings, self.job = items, clusters, policy, model, settings, job
        split, ids = items.column("split"), items.column("id")
        kept = selection.column("keep")
        self.train = np.flatnonzero(kept & (split == "train"))
        self.weight = selection.column("weight")
        self.calibration = np.sort(job.rng("calibration").permutation(ids[self.train])[: settings.calibration_items])
        judged = kept & ~selection.column("leak") & (split == "validation")
        self.validation = ids[judged] if judged.any() else items.ids("validation")
        self.example = sources.example_input(model)
        self.bar = job.progress(2 + 2 * (len(SHARES) + ROUNDS), "candidates", "candidates")

    @functools.cached_property
    def network(self) -> Network:
        return sources.network(self.model)

    def images(self, ids: np.ndarray, size: int) -> list[torch.Tensor]:
        """Normalised batches of some items; only ever called with the few that calibrate."""
        preprocess = self.model.preprocess
        with Loader(self.items, preprocess, workers=self.job.workers) as loader:
            chunks = [ids[start : start + size] for start in range(0, len(ids), size)]
            views = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 for _, images in loader.stream(chunks))
            return [normalise(view, preprocess.mean, preprocess.std) for view in views]

    def decisions(self, file: Path) -> np.ndarray:
        """What a file decides on the validation items: class, or cluster where there are no classes."""
        chunks = [self.validation[start : start + 32] for start in range(0, len(self.validation), 32)]
        with Loader(self.items, self.model.preprocess, workers=self.job.workers) as loader:
            made = run_items(file, loader.stream(chunks), self.model.preprocess, threads=torch.get_num_threads())
        return made["logits" if self.model.classes else "cluster_probabilities"].argmax(1)

    def write(self, name: str, model: Model, precision: str, target: Path, original: Candidate | None) -> None:
        """Builds one candidate as a folder: file, weights and figures."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "float32.onnx"
            model = self.rounded(model) if precision == "int8" else model
            write_onnx(model, file)
            if precision == "int8":
                exact, file = file, Path(folder) / "int8.onnx"
                quantise(exact, file, [batch.numpy() for batch in self.images(self.calibration, 16)])
            figures = self.measure(file, model, original)
            formats.save_candidate(target, Candidate(name=name, model=model, onnx=file, precision=precision, figures=figures))

    def rounded(self, model: Model) -> Model:
        """A model whose weights lie on the grid that int8 will use, so that quantising them changes nothing more."""
        network = sources.network(model)
        moments = repair.gather(network, self.images(self.calibration, 32), roundable(network), self.job.seed)
        round_network(network, moments)
        step = f"weights rounded to 7 bits with compensation on {len(self.calibration)} training items"
        return replace(model, state=network.state_dict(), lineage=(*model.lineage, step))

    def measure(self, file: Path, model: Model, original: Candidate | None) -> dict[str, float]:
        """Figures of a file, absolute and as ratios to the original's; the original is timed beside it, so that drift hits both."""
        decided = self.decisions(file)
        expected = np.asarray(self.job.once("decisions.json", lambda: decided.tolist()))
        files = {"original": original.onnx, "this": file} if original else {"this": file}
        times = measure_latency(files, threads=self.settings.threads)
        figures = {
            "size": float(file.stat().st_size),
            "parameters": float(model.parameters),
            "macs": float(model.macs),
            "latency": float(np.median(times["this"])),
            "agreement": float((decided == expected).mean()),
            "n": float(len(decided)),
        }
        whole = original.figures if original else figures
        ratios = {f"{key}_ratio": figures[key] / max(whole[key], 1e-12) for key in ("size", "parameters", "macs")}
        return figures | ratios | {"latency_ratio": float(np.median(times["this"] / times["original"])) if original else 1.0}

    def candidate(self, name: str, model: Callable[[], Model], precision: str, original: Candidate | None = None) -> Candidate:
        """A candidate, built and measured unless it is there already."""
        folder = self.job.build(name, lambda target: self.write(name, model(), precision, target, original))
        made = formats.load_candidate(folder)
        self.bar.update(1)
        f = made.figures
        self.job.say(
            f"{name:24} {f['size'] / 1e6:7.3f} MB ({f['size_ratio']:.2f}x)  {f['macs'] / 1e6:8.1f} M MACs ({f['macs_ratio']:.2f}x)  "
            f"{f['latency']:7.2f} ms ({f['latency_ratio']:.2f}x)  agreement {f['agreement']:.3f} of {int(f['n'])}"
        )
        return made


class Cutter:
    """Cuts of any size from one gathering of statistics."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.groups = prune.find_groups(bench.network, bench.example)
        self.costs = prune.Costs(bench.network, bench.example, self.groups)

    @functools.cached_property
    def plan(self) -> tuple[dict[str, repair.Moments], dict[str, list[int]], dict[str, np.ndarray]]:
        """Moments of every consumer, and each group's order of removal and damage."""
        bench, consumers = self.bench, sorted({name for group in self.groups for name in group.consumers})
        moments = repair.gather(bench.network, bench.images(bench.calibration, 32), consumers, bench.job.seed)
        order, damage = {}, {}
        with bench.job.progress(len(self.groups), "ordering channels", "groups") as bar:
            for group in self.groups:
                layers = [(repair.weights_of(bench.network.get_submodule(name)), moments[name]) for name in group.consumers]
                order[group.producer], damage[group.producer] = repair.eliminate(layers, group.width)
                bar.update(1)
        return moments, order, damage

    def cut(self, share: float) -> Model:
        """The original cut to a share of its MACs and repaired; not trained."""
        bench = self.bench
        moments, order, damage = self.plan
        widths = prune.allocate(self.groups, damage, self.costs, share)
        cuts: list[tuple[str, list[int]]] = []
        fresh: dict[str, torch.Tensor] = {}
        for group in self.groups:
            gone = sorted(order[group.producer][: group.width - widths[group.producer]])
            if gone:
                cuts.append((group.producer, gone))
                fresh |= repair.repaired_weights(bench.network, group, sorted(set(range(group.width)) - set(gone)), moments)
        network = sources.network(bench.model)
        prune.replay(network, cuts, bench.example)
        gone_of = dict(cuts)
        for name, matrix in fresh.items():  # a layer may lose inputs to one group and outputs to another
            rows = sorted(set(range(len(matrix))) - set(gone_of.get(name, [])))
            repair.write_back(network.get_submodule(name), matrix[rows])
        removed = sum(len(gone) for _, gone in cuts)
        step = f"cut {removed} channels of {len(cuts)} layers, repaired on {len(bench.calibration)} training items"
        return replace(
            bench.model,
            state=network.state_dict(),
            cuts=tuple(cuts),
            parameters=count_parameters(network),
            macs=count_macs(network, bench.example),
            lineage=(*bench.model.lineage, step),
        )


def compress(
    items: Items,
    clusters: Clusters,
    selection: Selection,
    policy: Policy,
    model: Model,
    settings: config.Compress,
    job: Job,
) -> Front:
    """The front of candidates and the one that meets the budget; which was chosen, and what binds when none meets it."""
    constraints = parse_budget(settings.budget)
    bench = Bench(items, clusters, selection, policy, model, settings, job)
    original = bench.candidate("original", lambda: model, "float32")
    made = [bench.candidate("whole-int8", lambda: model, "int8", original)]
    cutter = Cutter(bench)
    if not cutter.groups:
        job.say("no channels of this model can be followed from producer to consumer; it is quantised, not cut")
    shares = [share for share in SHARES if cutter.groups and share >= _floor(cutter)]
    for share in shares:
        made += _pair(bench, share, "", functools.cache(functools.partial(cutter.cut, share)), original)
    for _ in range(ROUNDS):
        following = _next_share(shares, made, constraints, settings)
        if following is None:
            break
        made += _pair(bench, following, "-distilled", functools.cache(functools.partial(_distilled, bench, cutter, following)), original)
    bench.bar.close()
    return _front(original, made, constraints, settings)


def _floor(cutter: Cutter) -> float:
    """The smallest share of MACs that cutting every group to its least width reaches."""
    least = {group.producer: prune.granularity(group.width) for group in cutter.groups}
    return cutter.costs.total(least) / cutter.costs.total({})


def _pair(bench: Bench, share: float, how: str, model: Callable[[], Model], original: Candidate) -> list[Candidate]:
    return [bench.candidate(f"cut{round(100 * share)}{how}-{precision}", model, precision, original) for precision in ("float32", "int8")]


def _next_share(
    shares: Sequence[float], made: Sequence[Candidate], constraints: Sequence[Constraint], settings: config.Compress
) -> float | None:
    """The share of MACs to distil next, or None when nothing is left that is worth its time.

    With bounds on cost: the largest cut that meets them (agreement falls with the cut), a smaller one only if its distilled form misses them.
    With a bound on agreement alone: half the MACs; then the smallest cut if the bound was met, the largest share if not.
    """
    by_name = {candidate.name: candidate for candidate in made}

    def meets(share: float, how: str, wanted: Sequence[Constraint]) -> bool:
        forms = [by_name.get(f"cut{round(100 * share)}{how}-{precision}") for precision in ("float32", "int8")]
        return any(form is not None and all(constraint.met(form.figures) for constraint in wanted) for form in forms)

    costs = [constraint for constraint in constraints if constraint.metric != "agreement"]
    done = [share for share in shares if f"cut{round(100 * share)}-distilled-int8" in by_name]
    left = [share for share in shares if share not in done]
    if not left:
        return None
    if costs:
        if done:
            return left[-1] if left[-1] < done[-1] and not meets(done[-1], "-distilled", costs) else None
        if settings.minutes is None and all(constraint.met(by_name["whole-int8"].figures) for constraint in constraints):
            return None
        return next((share for share in left if meets(share, "", costs)), left[-1])
    if len(done) > 1:
        return None
    if not done:
        return 0.5 if 0.5 in left else left[0]
    return left[-1] if meets(done[0], "-distilled", constraints) else left[0] if left[0] > done[0] else None


def _distilled(bench: Bench, cutter: Cutter, share: float) -> Model:
    """A cut, trained to follow the original on augmented training items, clusters drawn evenly."""
    job, settings, cut = bench.job, bench.settings, cutter.cut(share)
    student, teacher = sources.network(cut), bench.network
    ids, own = bench.items.column("id")[bench.train], bench.clusters.column("cluster")[bench.train]
    weight = np.maximum(bench.weight[bench.train].astype(np.float64), 1e-6)
    # Half by the items' own weight, half evenly over clusters: small groups are seen, large ones are not starved.
    even = weight / np.bincount(own, weight, bench.clusters.count)[own]
    probability = 0.5 * weight / weight.sum() + 0.5 * even / even.sum()
    label, steps = f"distilling to {share:.0%}", _steps(bench, cut, student)
    curve: tuple[dict[str, float], ...] = ()
    if steps:
        size = min(settings.distil_batch, len(ids))
        curve = distil(student, teacher, bench.items, ids, probability, cut.preprocess, bench.policy, own, steps, size, job, label)
    step = f"distilled from the original: {steps} steps of {settings.distil_batch} on {len(ids)} unlabelled training items"
    return replace(cut, state=student.state_dict(), lineage=(*cut.lineage, step), signals=curve)


def _steps(bench: Bench, cut: Model, student: Network) -> int:
    """Steps of a distillation: as asked; else what fits the minutes at the measured pace, fixed once; else from the models' size alone."""
    settings = bench.settings
    if settings.distil_steps is not None:
        return settings.distil_steps
    if settings.minutes is None:
        return int(np.clip(COMPUTE / (settings.distil_batch * (3 * cut.macs + bench.model.macs)), 100, 2000))
    only_agreement = all(constraint.metric == "agreement" for constraint in parse_budget(settings.budget))
    seconds = 0.7 * 60 * settings.minutes / (2 if only_agreement else 1)  # the rest builds and measures
    return bench.job.once(f"steps-{cut.macs}.json", lambda: max(1, int(seconds / _pace(bench, student))))


def _pace(bench: Bench, student: Network) -> float:
    """Seconds of one distillation step, the best of three on a copy."""
    settings, trial, seconds = bench.settings, copy.deepcopy(student), []
    batch = torch.cat(bench.images(bench.calibration, 64)[: -(-settings.distil_batch // 64)])[: settings.distil_batch]
    for _ in range(3):
        start = time.perf_counter()
        views = augment(np.zeros((len(batch), *bench.model.preprocess.size, 3), np.uint8), bench.policy, None, np.random.default_rng(0))
        with torch.no_grad():
            target = bench.network(normalise(views, bench.model.preprocess.mean, bench.model.preprocess.std))
        distillation(trial(batch), target).backward()  # type: ignore[no-untyped-call]
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _front(original: Candidate, made: Sequence[Candidate], constraints: Sequence[Constraint], settings: config.Compress) -> Front:
    """The candidate to deliver. Those that meet the budget compete in agreement when it bounds cost, in size when it bounds agreement alone."""
    costs = any(constraint.metric != "agreement" for constraint in constraints)
    timed = any(constraint.metric == "latency" for constraint in constraints)
    fit = [candidate for candidate in made if all(constraint.met(candidate.figures) for constraint in constraints)]
    if not timed:  # smaller but slower helps nobody, where something that is not slower serves too
        fit = [candidate for candidate in fit if candidate.figures["latency_ratio"] <= SLOWER] or fit
    if fit:
        best = max(fit, key=lambda c: (c.figures["agreement"], -c.figures["size"])) if costs else min(fit, key=lambda c: c.figures["size"])
        reason = f"{len(fit)} of {len(made)} candidates meet it; delivered is the {'one that agrees most' if costs else 'smallest'}"
    else:
        best = min(made, key=lambda c: max(constraint.shortfall(c.figures) for constraint in constraints))
        binding = max(constraints, key=lambda constraint: constraint.shortfall(best.figures))
        short = " one standard error below what its validation items showed" if binding.metric == "agreement" else ""
        reason = f"none of {len(made)} candidates meets it; {binding} binds: the nearest, {best.name}, has {binding.value(best.figures):.3g}{short}"
    return Front(
        original=original,
        candidates=tuple(made),
        chosen=best.name,
        budget=settings.budget,
        met=bool(fit),
        reason=reason,
        threads=settings.threads,
    )
