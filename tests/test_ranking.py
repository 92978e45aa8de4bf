"""Ranking: the contenders, the rounds, the scores and the verdict, on made readings."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attar.records import Dial, Policy
from attar.stages.augment import ranking as r
from attar.stages.augment.catalogue import NAMES, POLICIES, as_policy


def test_sixteen_policies_or_more_contend_trivial_among_them() -> None:
    found = r.contenders()
    assert len(found) >= 16
    assert {"none", "default", "simclr", "trivial"} <= set(found)
    assert found["trivial"] == POLICIES["trivial"]
    distinct = {(tuple(policy.families.items()), policy.pick) for policy in found.values()}
    assert len(distinct) == len(found), "two of them are one policy"
    for policy in found.values():
        assert as_policy(policy) == policy, "every dial is in range and every name known"
        assert set(policy.families) <= set(NAMES)


def test_where_mirroring_changes_the_items_nobody_mirrors() -> None:
    flipping, still = r.contenders(), r.contenders(flips=False)
    assert len(still) >= 16
    assert any("flip" in policy.families for policy in flipping.values())
    for name, policy in still.items():
        assert not {"flip", "horizontal_flip"} & set(policy.families)
        assert {key: dial for key, dial in flipping[name].families.items() if key != "flip"} == policy.families
        assert policy.pick == flipping[name].pick
    distinct = {(tuple(policy.families.items()), policy.pick) for policy in still.values()}
    assert len(distinct) == len(still)
    assert r.scaled(flipping["default"], strength=0.5).families["flip"].strength == 1.0, "there or not"


@given(st.floats(0, 3), st.floats(0, 3))
def test_scaled_dials_stay_in_range(strength: float, frequency: float) -> None:
    policy = Policy(families={"colour": Dial(0.6, 0.5)}, pick=2, method="m")
    made = r.scaled(policy, strength, frequency)
    assert made.families["colour"] == pytest.approx((min(1, 0.6 * strength), min(1, 0.5 * frequency)))
    assert made.pick == 2
    assert r.scaled(policy, pick=3).pick == 3


@given(st.integers(1, 60))
def test_rounds_halve_and_every_seed_is_new(count: int) -> None:
    rounds = r.rounds(count)
    seeds = [seed for one in rounds for seed in one.seeds]
    assert seeds == list(range(sum(r.SEEDS)))
    assert rounds[0].entering == count
    for one, following in itertools.pairwise(rounds):
        assert one.leaving == following.entering
        assert min(count, r.FINALISTS) <= one.leaving <= max(r.FINALISTS, -(-one.entering // 2))
    assert rounds[-1].leaving == rounds[-1].entering, "the last round decides, it drops nobody"
    assert r.trials(count) == sum(len(one.seeds) * one.entering for one in rounds)


def _readings(levels: dict[str, float], seeds: int = 3, noise: float = 0.0) -> dict[str, list[dict[str, float]]]:
    rng = np.random.default_rng(0)
    return {
        name: [{"a": level + noise * rng.normal(), "b": 10 * level + 5, "same": 1.0} for _ in range(seeds)]
        for name, level in levels.items()
    }


def test_scores_are_weighted_means_in_spreads_of_the_first_round() -> None:
    found = _readings({"x": 0.0, "y": 1.0, "z": 2.0})
    scale = r.scale_of(found)
    spread = float(np.std([0, 1, 2]))
    for name, level in (("x", -1.0), ("y", 0.0), ("z", 1.0)):
        assert r.scores(found[name], scale, {"a": 1.0, "b": 3.0, "same": 2.0}) == pytest.approx(np.full(3, level / spread))
    later = [{"a": 4.0, "b": 5.0}]
    assert r.scores(later, scale, {"a": 1.0, "b": 1.0}) == pytest.approx([(3 / spread - 1 / spread) / 2])
    assert r.scores(found["x"], scale, {"same": 1.0}).tolist() == [0, 0, 0], "what all agree on does not count"
    assert r.scores(found["x"], scale, {"a": 1.0, "absent": 5.0}) == pytest.approx(r.scores(found["x"], scale, {"a": 1.0}))


def test_the_better_half_goes_on_and_the_collapsed_do_not() -> None:
    scores = {name: np.array([value, value]) for name, value in (("a", 3.0), ("b", 2.0), ("c", 1.0), ("d", 0.0))}
    ranks = {"a": 1.0, "b": 20.0, "c": 22.0, "d": 25.0}
    on, out = r.leaving(scores, ranks, 2)
    assert on == ["b", "c"]
    assert out == {"a": ", collapsed", "d": ""}
    assert r.leaving(scores, dict.fromkeys("abcd", 20.0), 4) == (["a", "b", "c", "d"], {})
    assert r.leaving({"a": scores["a"]}, {"a": 5.0}, 1) == (["a"], {})


def _found(**levels: float) -> dict[str, np.ndarray]:
    """Scores of seven seeds that all share, with a little noise of their own."""
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 1, 7)
    return {name: shared + level + 0.05 * rng.normal(size=7) for name, level in levels.items()}


def test_a_clear_winner_wins_whatever_it_costs() -> None:
    found = r.decide(_found(good=1.0, cheap=0.0, free=-1.0), {"good": 9.0, "cheap": 2.0, "free": 1.0})
    assert (found.winner, found.best, found.equals) == ("good", "good", ("good",))
    assert set(found.against) == {"cheap", "free"}
    for name, level in (("cheap", -1.0), ("free", -2.0)):
        row = found.against[name]
        assert row["low"] < row["difference"] < row["high"] < 0
        assert row["difference"] == pytest.approx(level, abs=0.1)
        assert row["p"] < r.LEVEL


def test_without_a_measurable_difference_the_cheaper_wins() -> None:
    scores = _found(dear=0.0, cheap=0.0, bad=-1.0)
    found = r.decide(scores, {"dear": 5.0, "cheap": 2.0, "bad": 1.0})
    assert set(found.equals) == {"dear", "cheap"}
    assert found.winner == "cheap"
    assert all(found.against[name]["p"] >= r.LEVEL for name in found.equals if name != found.best)
    same = r.decide(scores, {"dear": 2.1, "cheap": 2.0, "bad": 1.0})
    assert same.winner == same.best, "equal costs are decided by the score"


def test_a_lack_of_evidence_is_no_equality() -> None:
    noisy = {"good": np.array([1.0, -0.2]), "free": np.array([-0.9, 0.9])}
    found = r.decide(noisy, {"good": 5.0, "free": 1.0})
    assert found.against["free"]["p"] > r.LEVEL, "two seeds prove nothing"
    assert (found.winner, found.equals) == ("good", ("good",))


def test_the_correction_counts_all_comparisons() -> None:
    """A difference that one comparison would call measurable is none among many."""
    rng = np.random.default_rng(5)
    wrong = 0
    for _ in range(200):
        scores = {str(name): rng.normal(size=7) for name in range(6)}
        truth = {name: float(values.mean()) for name, values in scores.items()}
        found = r.decide(scores, dict.fromkeys(scores, 1.0))
        assert found.winner == max(truth, key=lambda name: truth[name])
        wrong += any(row["p"] < r.LEVEL for row in found.against.values())
    assert wrong / 200 < 0.15  # chosen as the best of six, it is a little better than its level says


def test_one_contender_wins_without_a_comparison() -> None:
    found = r.decide({"only": np.array([1.0, 2.0])}, {"only": 1.0})
    assert found == ("only", "only", ("only",), {})


@pytest.mark.parametrize("change", [lambda v: 3 * v, lambda v: v + 10])
def test_verdicts_do_not_depend_on_units(change: Callable[[Any], Any]) -> None:
    scores, costs = _found(a=0.0, b=0.02, c=-0.5), {"a": 1.0, "b": 2.0, "c": 1.0}
    one, other = r.decide(scores, costs), r.decide({name: change(values) for name, values in scores.items()}, costs)
    assert one[:3] == other[:3]
    assert [row["p"] for row in one.against.values()] == pytest.approx([row["p"] for row in other.against.values()])
