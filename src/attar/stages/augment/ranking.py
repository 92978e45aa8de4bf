"""Ranking policies without labels: who contends, who goes on to the next round, and whom the evidence calls best. Pure kernels.

Choosing is a statistical act. Contenders are compared seed by seed, on encoders that start from the same weights and see the same items in the same
order, so that only the policy differs. What is not measurably worse than the best, after a correction for the number of comparisons, is as good as
the best; of those the cheapest wins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from attar.records import Dial, Policy
from attar.stages.augment.catalogue import POLICIES
from attar.stats import blocked, holm

SEEDS = (2, 2, 3)
"""Further seeds of each round; all contenders meet in the first (two at least: seeds must agree), the best half goes on."""
FINALISTS = 4
"""At least so many reach the last round."""
WEIGHTS = {"rotation": 3.0, "agreement": 2.0}
"""What each yardstick counts in the score. The two go wrong in different places: over 19 and 20 policies on MNIST, clothing photos and CIFAR, seven
seeds (benchmarks/policies.py), Spearman's correlation with hidden labels is 0.43, 0.93, 0.74 for rotation, 0.94, -0.18, 0.72 for agreement, and
0.82, 0.86, 0.97 for both together. The other yardsticks stand in the table."""
LEVEL = 0.05
"""Probability, over all comparisons together, of calling a policy worse that is not."""
MARGIN = 0.1
"""Difference in score, in spreads of the contenders, above which a policy is no equal of the best even where too few seeds prove it."""
COLLAPSED = 0.4
"""Share of the median effective rank under which an encoder counts as collapsed, and its policy is out."""
SAME_COST = 1.1
"""Costs within this factor of the cheapest are equal: timings are no finer."""
MIRRORS = ("flip", "horizontal_flip")


def scaled(policy: Policy, strength: float = 1.0, frequency: float = 1.0, **rest: Any) -> Policy:
    """A policy with all its strengths and frequencies multiplied, at most 1; a transform that is there or not keeps its strength."""
    families = {
        name: Dial(dial.strength if name in MIRRORS else min(1.0, dial.strength * strength), min(1.0, dial.frequency * frequency))
        for name, dial in policy.families.items()
    }
    said = [f"{name} × {factor:g}" for name, factor in (("strength", strength), ("frequency", frequency)) if factor != 1]
    said += [f"{name} {value}" for name, value in rest.items()]
    return Policy(families=families, pick=rest.get("pick", policy.pick), method=", ".join([policy.method, *said]))


def _only(**families: Dial) -> Policy:
    return Policy(families=families, method="a part alone: " + ", ".join(families))


def contenders(flips: bool = True) -> dict[str, Policy]:
    """The policies that meet, by name: the named ones, each at other strengths and frequencies, and single families.

    Without `flips` (mirroring was found to change the items) none of them mirrors. The bare ones are not there to win: what a transform contributes
    is seen against policies without it.
    """
    default, simclr, trivial = (POLICIES[name] for name in ("default", "simclr", "trivial"))
    found = {
        **POLICIES,
        "default, half as strong": scaled(default, strength=0.5),
        "default, stronger": scaled(default, strength=1.25),
        "default, half as often": scaled(default, frequency=0.5),
        "default, without flips": _unmirrored(default),
        "simclr, half as strong": scaled(simclr, strength=0.5),
        "simclr, three quarters as strong": scaled(simclr, strength=0.75),
        "simclr, half as often": scaled(simclr, frequency=0.5),
        "trivial, half as strong": scaled(trivial, strength=0.5),
        "trivial, two at once": scaled(trivial, pick=2),
        "trivial, three at once": scaled(trivial, pick=3),
        "crops": _only(resized_crop=Dial(0.8, 1.0)),
        "small crops": _only(resized_crop=Dial(1.0, 1.0)),
        "colour": _only(colour=Dial(0.8, 0.8)),
        "crops and colour": _only(resized_crop=Dial(0.8, 1.0), colour=Dial(0.8, 0.8)),
    }
    return found if flips else {name: _unmirrored(policy) for name, policy in found.items() if name != "default, without flips"}


def _unmirrored(policy: Policy) -> Policy:
    kept = {name: dial for name, dial in policy.families.items() if name not in MIRRORS}
    return policy if len(kept) == len(policy.families) else replace(policy, families=kept, method=f"{policy.method}, without flips")


class Round(NamedTuple):
    """One round: which seeds are new in it, and how many go on after it."""

    seeds: range
    entering: int
    leaving: int


def rounds(count: int, seeds: Sequence[int] | None = None) -> tuple[Round, ...]:
    """Successive halving (Jamieson & Talwalkar 2016) over seeds: half of the contenders go on after each round, the last decides."""
    seeds, found, first = seeds or SEEDS, [], 0
    for place, more in enumerate(seeds):
        left = count if place + 1 == len(seeds) else min(count, max(FINALISTS, math.ceil(count / 2)))
        found.append(Round(range(first, first + more), count, left))
        first, count = first + more, left
    return tuple(found)


def trials(count: int) -> int:
    """Encoders that are trained in all rounds together."""
    return sum(len(one.seeds) * one.entering for one in rounds(count))


class Scale(NamedTuple):
    """Mean and spread of each yardstick over all contenders of the first round: the units of later scores."""

    mean: Mapping[str, float]
    spread: Mapping[str, float]


def scale_of(readings: Mapping[str, Sequence[Mapping[str, float]]]) -> Scale:
    """The scale of {policy: readings by seed}; a yardstick all agree on has no spread and does not count."""
    rows = [row for found in readings.values() for row in found]
    values = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    means = {name: np.array([np.mean([row[name] for row in found]) for found in readings.values()]) for name in rows[0]}
    return Scale({name: float(v.mean()) for name, v in values.items()}, {name: float(v.std()) for name, v in means.items()})


def scores(readings: Sequence[Mapping[str, float]], scale: Scale, weights: Mapping[str, float] | None = None) -> np.ndarray:
    """Score of a policy by seed: weighted mean of its yardsticks, each in spreads from the mean of all contenders."""
    used = {name: weight for name, weight in (weights or WEIGHTS).items() if scale.spread.get(name, 0.0) > 1e-9}
    total = sum(used.values())
    if not used:
        return np.zeros(len(readings))
    parts = [[weight * (row[name] - scale.mean[name]) / scale.spread[name] for name, weight in used.items()] for row in readings]
    return np.sum(parts, axis=1) / total


def collapsed(ranks: Mapping[str, float]) -> set[str]:
    """Policies whose encoders fill a much smaller effective rank than the median."""
    limit = COLLAPSED * float(np.median(list(ranks.values())))
    return {name for name, rank in ranks.items() if rank < limit}


def leaving(scores: Mapping[str, np.ndarray], ranks: Mapping[str, float], keep: int) -> tuple[list[str], dict[str, str]]:
    """Who goes on after a round, best first, and who drops out with what to say of it; collapse is decided before the score."""
    fallen = collapsed(ranks)
    order = sorted(scores, key=lambda name: (name in fallen, -float(scores[name].mean()), name))
    on = [name for name in order[:keep] if name not in fallen] or order[:1]
    return on, {name: ", collapsed" if name in fallen else "" for name in order if name not in on}


class Verdict(NamedTuple):
    """Who won, against whom, and how surely."""

    winner: str
    best: str  # highest mean score
    equals: tuple[str, ...]  # not measurably worse than the best, itself among them
    against: Mapping[str, Mapping[str, float]]  # of every other finalist to the best: difference, low, high, p


def decide(found: Mapping[str, np.ndarray], costs: Mapping[str, float]) -> Verdict:
    """The verdict on the finalists' scores (seeds,) by name: the cheapest of those not measurably worse than the best, nor worse by more than MARGIN.

    The margin keeps a lack of evidence from passing for equality: with two seeds hardly anything is measurable, and the cheapest policy does nothing.

    Paired by seed, with the error pooled over the finalists (stats.blocked), so that few seeds do not make everything equal; corrected for as many
    comparisons as there are others (stats.holm). Equal costs are decided by the score.
    """
    best = max(found, key=lambda name: (float(found[name].mean()), name))
    others = [name for name in found if name != best]
    names = list(found)
    pairs = dict(zip(names, blocked(np.stack([found[name] for name in names]), names.index(best)))) if others else {}
    adjusted = dict(zip(others, holm(np.array([pairs[name].p for name in others])).tolist()))
    equals = (best, *(name for name in others if adjusted[name] >= LEVEL and pairs[name].difference >= -MARGIN))
    limit = SAME_COST * min(costs[name] for name in equals)
    winner = max((name for name in equals if costs[name] <= limit), key=lambda name: (float(found[name].mean()), name))
    against = {name: {**pair._asdict(), "p": adjusted[name]} for name, pair in pairs.items() if name != best}
    return Verdict(winner, best, equals, against)
