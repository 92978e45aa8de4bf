"""compress: the loop from the original to the model that meets the budget, every candidate kept.

    original → the whole in int8 → the largest cut whose cost the budget allows (untrained: cheap cuts show what a size costs)
             → that cut, distilled → the front

A budget on agreement alone has no such size: a ladder of cuts is looked at, then two are distilled. With another architecture for a
student, that one is distilled instead. Every candidate is built and measured once and kept as a folder, so an interrupted loop goes on
where it was. What is tried depends on the settings, on agreement and on exact costs; measured latency decides only where the budget
speaks of latency, or against a file that is slower than the original.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from attar import config
from attar.errors import ModelError
from attar.models import sources
from attar.models.network import Network
from attar.records import Candidate, Front, Model
from attar.runtime import DEFAULT
from attar.stages.compress import student as students
from attar.stages.compress.bench import PRECISIONS, Bench, ratios
from attar.stages.compress.budget import Constraint, excess, parse_budget
from attar.stages.compress.clock import Clock
from attar.stages.compress.cutter import Cutter
from attar.stages.compress.distil import LAPS, distil, first_lap, pace
from attar.stages.compress.feed import Feed
from attar.stages.compress.timing import layer_times
from attar.workspace import Job

LADDER = (0.75, 0.5, 0.35, 0.25)
"""Shares of the original's MACs that are looked at where no bound on cost names one."""
ROUNDS = 2
"""Distillations under a budget on agreement alone."""
TRIALS = 7
"""Cuts that are tried, at most, to find the size a bound on cost allows."""
CLOSE = 0.03
"""How far below its bound a cost may stay, as a share of it, for the search for a size to end."""
COUNTED = ("macs", "parameters")
"""Costs that the weights' precision does not change."""
COMPUTE = 1e13
"""Multiply-accumulates of one distillation when no time is given: minutes on a laptop, and the same steps on every machine."""
LANES = 16
"""Channels that int8 kernels compute at once: where latency is bounded widths are multiples of it, and what is left to save are whole branches."""
TOLD = 1.96
"""Standard errors of an agreement within which a higher one is taken to be luck."""
CLOSEST = 1.1
"""Divergences from the original within this factor of the least are taken to be as good."""
SPARE = 0.05
"""Share of the minutes kept back for what a measured pace does not show."""
DEEP = 0.4
"""Share of the MACs up to which a cut is made of a trained one of the root of that share: what is cut from that was needed less."""
HALFWAY = 0.3
"""Share of a deep cut's training that goes to the one half-way."""
SLOWER = 1.1
"""A candidate slower than the original by more than this is not delivered unless the budget asks for its other virtues alone."""


def compress(feed: Feed, model: Model, settings: config.Compress, job: Job) -> Front:
    """The front of candidates and the one that meets the budget; which was chosen, and what binds when none meets it."""
    search = Search(feed, model, settings, job)
    if source := students.source_of(settings, model):
        search.follow(source)
    elif not search.whole():
        search.cut()
    return search.front()


class Search:
    """The candidates made so far, and what to try next."""

    def __init__(self, feed: Feed, model: Model, settings: config.Compress, job: Job) -> None:
        self.feed, self.model, self.settings, self.job = feed, model, settings, job
        self.constraints = parse_budget(settings.budget)
        self.costs = [constraint for constraint in self.constraints if constraint.metric != "agreement"]
        if source := students.source_of(settings, model):
            sources.kind_of(source)  # before the long part, so that a wrong one is told at once
        self.bench = Bench(feed, model, settings, job)
        self.original = self.bench.original
        self.made: list[Candidate] = []

    # what is tried

    def whole(self) -> bool:
        """The whole model in the smaller precisions, in float32 too where another runtime may gain; returns whether that is all the budget asks.

        Then nothing is cut, minutes or not: what is as small by fewer weights agrees less. Where the budget bounds counts alone no precision of the
        whole can meet it, and none is made.
        """
        if self.costs and all(constraint.metric in COUNTED for constraint in self.costs) and excess(self.costs, self.original.figures) > 1:
            return False
        made = self._forms("whole", lambda: self.model, PRECISIONS[self.settings.runtime == DEFAULT :])
        enough = bool(self.costs and serving(made, self.constraints))
        if enough and self.settings.minutes is not None:
            self.job.say("the whole model in fewer bits meets the budget, so nothing is cut, and the minutes are not needed")
        return enough

    def cut(self) -> None:
        """Cuts, the one or two that matter distilled."""
        lanes = LANES if any(constraint.metric == "latency" for constraint in self.costs) else None
        cutter = Cutter(self.bench.network, self.model, self.feed, self.settings, self.job, self._times(), lanes)
        if not cutter.groups:
            self.job.say("no channels of this model can be followed from producer to consumer; it is quantised, not cut")
            return
        cut = functools.cache(cutter.cut)
        if not self.costs:
            self._ladder(cutter, cut)
            return
        share = self._aim(cut, cutter.floor)
        untrained = self._forms(name_of(share), lambda: cut(share))
        asks_agreement = len(self.costs) < len(self.constraints)  # a bound on cost alone says nothing of quality: the cut is trained
        enough = asks_agreement and self.settings.minutes is None and serving(untrained, self.constraints)
        if share < 1 and not enough:
            self._distil(cutter, cut, share, 1)

    def _times(self) -> dict[str, float] | None:
        """Milliseconds of each layer, measured once, where latency is the only cost that is bounded: shares are then shares of time."""
        if any(constraint.metric != "latency" for constraint in self.costs) or not self.costs:
            return None
        return self.job.once("layers.json", lambda: layer_times(self.original.onnx))

    def follow(self, source: str) -> None:
        """Another architecture, distilled."""
        job, feed, teacher = self.job, self.feed, self.bench.network

        @functools.cache
        def model() -> Model:
            fresh = students.fresh(source, self.model, feed, job)
            network = sources.network(fresh)
            learner = students.follower(network, fresh, teacher, feed, self.settings, job)
            trained = self._trained(fresh, network, learner, "student", 1)
            return students.with_head(trained, network, teacher, feed)

        self._forms("student-distilled", model)

    def _ladder(self, cutter: Cutter, cut: Callable[[float], Model]) -> None:
        """For a budget on agreement alone, the smallest file that meets it: half the MACs first, then less or more, as that one did."""
        shares = [share for share in LADDER if share >= cutter.floor] or [round(cutter.floor, 3)]
        for share in shares if self.settings.minutes is None else ():  # minutes are worth more in training
            self._forms(name_of(share), functools.partial(cut, share))
        first = next((share for share in shares if share <= 0.5), shares[-1])
        made = self._distil(cutter, cut, first, ROUNDS)
        following = shares[-1] if serving(made, self.constraints) else shares[0]
        if following != first:
            self._distil(cutter, cut, following, 1)

    # steps on the way

    def _forms(self, name: str, model: Callable[[], Model], precisions: Sequence[str] = PRECISIONS) -> list[Candidate]:
        """A model's candidates, one of each precision that can be made of it; those that are there already are not made again."""
        known, found = {candidate.name: candidate for candidate in self.made}, []
        for precision in precisions:
            full = f"{name}-{precision}"
            try:
                found.append(known.get(full) or self.bench.candidate(full, model, precision))
            except ModelError as error:
                if precision == "float32":
                    raise
                self.job.say(f"{error}; left out")
        self.made += [candidate for candidate in found if candidate.name not in known]
        return found

    def _aim(self, cut: Callable[[float], Model], floor: float) -> float:
        """The largest share of the MACs at which an untrained cut, in one precision or another, meets the bounds on cost.

        int8 counts for that only where the whole model in int8 does not meet them: it is there already, and its cuts agree less.
        """
        counted = [constraint for constraint in self.costs if constraint.metric in COUNTED]
        forms = PRECISIONS[:1] if any(excess(self.costs, c.figures) <= 1 for c in self.made) else PRECISIONS
        share, whole = 1.0, self.original.figures

        def counts(share: float) -> float:
            made = cut(share)
            figures = {"macs": float(made.macs), "parameters": float(made.parameters)}
            return excess(counted, figures | ratios(figures, whole))

        if counted:
            exact = all(constraint.metric == "macs" for constraint in counted)  # a cut has at most the share asked: no trials above it
            share = largest_share(counts, floor, 1 / excess(counted, whole), 1.0 if exact else CLOSE)
        if len(counted) < len(self.costs):
            known = [self.original, *self.made] if len(forms) > 1 else [self.original]
            share = largest_share(
                lambda share: min(
                    excess(self.costs, one.figures)
                    for one in self._forms(name_of(share), functools.partial(cut, share))
                    if one.precision in forms
                ),
                floor,
                min(share, 1 / min(excess(self.costs, one.figures) for one in known)),
            )
        return share

    def _distil(self, cutter: Cutter, cut: Callable[[float], Model], share: float, rounds: int) -> list[Candidate]:
        """The candidates of a cut that was trained to follow the original; `rounds` distillations share the time that is left."""
        name = name_of(share)

        @functools.cache
        def model() -> Model:
            deep = share <= DEEP and not cutter.timed and self.settings.distil_steps != 0
            start = self._by_way(cut(math.sqrt(share)), share, rounds) if deep else cut(share)
            network = sources.network(start)
            return self._trained(start, network, network, name, rounds)

        return self._forms(f"{name}-distilled", model)

    def _by_way(self, between: Model, share: float, rounds: int) -> Model:
        """A deep cut, not trained yet, of one that is half-way to it and is trained here."""
        network = sources.network(between)
        trained = self._trained(between, network, network, f"{name_of(share)}-halfway", rounds, HALFWAY)
        return Cutter(network, trained, self.feed, self.settings, self.job).cut(share * self.model.macs / trained.macs)

    def _trained(self, model: Model, network: Network, learner: Network, name: str, rounds: int, part: float = 1.0) -> Model:
        """A model's record after its network has learned, inside the learner, to follow the original, for a part of the time that it may take."""
        settings, teacher = self.settings, self.bench.network
        steps, clock = self._steps(model, learner, name, rounds, part)
        curve = distil(learner, teacher, self.feed, steps, settings, self.job, f"distilling {name}", clock) if steps else ()
        network.eval()
        taken, size = curve[-1]["step"] if curve else 0, min(settings.distil_batch, self.feed.count)
        step = f"distilled from the original: {taken} steps of {size} on {self.feed.count} unlabelled training items"
        return replace(model, state=network.state_dict(), lineage=(*model.lineage, step), signals=tuple(curve))

    def _steps(self, model: Model, learner: Network, name: str, rounds: int, part: float = 1.0) -> tuple[int, Clock | None]:
        """Steps of a distillation: as asked; else what fits the minutes at the measured pace, and the clock that follows it; else from the models'
        size alone."""
        settings, bench = self.settings, self.bench
        if settings.distil_steps is not None:
            return math.ceil(part * settings.distil_steps), None
        if settings.minutes is None:
            macs = 3 * model.macs + self.model.macs
            return int(part * np.clip(COMPUTE / (settings.distil_batch * max(macs, 1)), 100, 2000)), None

        def fitting() -> dict[str, float]:
            first, later = pace(learner, bench.network, self.feed, settings)
            assert settings.minutes is not None
            left = part * (((1 - SPARE) * 60 * settings.minutes - bench.seconds()) / rounds - sum(bench.least.values()))
            return {"seconds": left, "steps": max(1, int(LAPS * left / (first + (LAPS - 1) * later))), "later": later / first}

        fits = self.job.once(f"minutes-{name}.json", fitting)
        steps = int(fits["steps"])
        return steps, Clock(fits["seconds"], steps, first_lap(steps), fits["later"], self.job, name)

    def front(self) -> Front:
        """All candidates, and the one that is delivered."""
        chosen, met, reason = choose(self.made or [self.original], self.constraints)
        budget, threads = self.settings.budget, self.settings.threads
        return Front(
            original=self.original,
            candidates=tuple(self.made),
            chosen=chosen.name,
            budget=budget,
            met=met,
            reason=reason,
            threads=threads,
        )


def bounds_cost(constraints: Sequence[Constraint]) -> bool:
    return any(constraint.metric != "agreement" for constraint in constraints)


def serving(made: Sequence[Candidate], constraints: Sequence[Constraint]) -> list[Candidate]:
    """Those that meet the budget and are not slower than the original, where it does not speak of latency: smaller but slower helps nobody."""
    timed = any(constraint.metric == "latency" for constraint in constraints)
    return [c for c in made if excess(constraints, c.figures) <= 1 and (timed or c.figures["latency_ratio"] <= SLOWER)]


def choose(made: Sequence[Candidate], constraints: Sequence[Constraint]) -> tuple[Candidate, bool, str]:
    """What is delivered, whether it meets the budget, and why: of those that meet it the one that agrees most when it bounds a cost, the
    smallest when it bounds agreement alone; slower ones only where nothing else meets it. The nearest where nothing does."""
    fit = serving(made, constraints) or [c for c in made if excess(constraints, c.figures) <= 1]
    if not fit:
        best = min(made, key=lambda c: excess(constraints, c.figures))
        return best, False, f"none of {len(made)} candidates meets it; {_binding(constraints, best)}"
    if bounds_cost(constraints):
        best, what = agreeing_most(fit), "one that agrees most"
    else:
        best, what = min(fit, key=lambda c: c.figures["size"]), "smallest"
    return best, True, f"{len(fit)} of {len(made)} candidates meet it; delivered is the {what}"


def agreeing_most(fit: Sequence[Candidate]) -> Candidate:
    """The candidate of the highest agreement. Those within TOLD standard errors of it cannot be told apart by agreement. Of these an untrained cut
    gives way to what training made of it: that was judged on the same items, and kept only what was better there. Of the rest the divergence from
    the original's probabilities decides: the smallest file of those whose divergence is at most CLOSEST of the least."""
    top = max(c.figures["agreement"] for c in fit)
    error = max(np.sqrt(c.figures["agreement"] * (1 - c.figures["agreement"]) / c.figures["n"]) for c in fit)
    alike = [c for c in fit if c.figures["agreement"] >= top - TOLD * error]
    alike = [c for c in alike if not any(goes_on(other, c) for other in alike)]
    least = min(c.figures["divergence"] for c in alike)
    return min((c for c in alike if c.figures["divergence"] <= CLOSEST * least), key=lambda c: c.figures["size"])


def goes_on(later: Candidate, earlier: Candidate) -> bool:
    """Whether one candidate is what training made of another's cut, in the same precision."""
    cut = earlier.name.removesuffix(f"-{earlier.precision}")
    return later.name == f"{cut}-distilled-{earlier.precision}"


def _binding(constraints: Sequence[Constraint], best: Candidate) -> str:
    """Which constraint the nearest candidate misses most, and what it has instead."""
    binding = max(constraints, key=lambda constraint: constraint.shortfall(best.figures))
    short = " one standard error below what its validation items showed" if binding.metric == "agreement" else ""
    return f"{binding} binds: the nearest, {best.name}, has {binding.value(best.figures):.3g}{short}"


def name_of(share: float) -> str:
    """A cut's name from its share of the MACs: cut50, cut37.5."""
    return f"cut{100 * share:.4g}"


def largest_share(excess_at: Callable[[float], float], floor: float, start: float, close: float = CLOSE) -> float:
    """The largest share found, floor … 1, whose cost is within its bound (excess ≤ 1): a few trials from `start`; the floor where none is.

    The search ends where the cost is within the share `close` of its bound. Costs fall about in proportion to the share, then along the line
    through the last two trials: the next trial is where that meets the bound, as long as it lies between the largest share known to be
    within it and the smallest known not to be; else in the middle of the two.
    """
    low, high, found, aim = floor, 1.0, False, 1 - close / 3
    last, share = (0.0, 0.0), float(np.clip(start, floor, 1.0))
    for _ in range(TRIALS):
        share = max(int(1000 * share + 1e-6) / 1000, 0.001)  # a name of three digits; never above what was asked
        value = excess_at(share)
        if value <= 1:
            low, found = share, True
        else:
            high = share
        if 1 - close <= value <= 1 or high - low < 0.01:
            break
        slope = (value - last[1]) / (share - last[0]) if share != last[0] else 0.0
        guess = share + (aim - value) / slope if slope > 0 else 0.0
        last, share = (share, value), guess if low + 0.005 < guess < high - 0.005 else (low + high) / 2
    return low if found else max(int(1000 * floor + 0.999) / 1000, 0.001)
