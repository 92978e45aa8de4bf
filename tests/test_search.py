"""The budget loop: what it tries, when it stops, what it delivers; on a small network and the real bench."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Residual, images
from torch import Tensor

from attar import config
from attar.errors import ModelError, UsageError
from attar.models import sources
from attar.records import SPLITS, Candidate, Front, Head, Model, Preprocess
from attar.stages.compress import bench, search
from attar.stages.compress.bench import HEADER, PRECISIONS, ratios, row
from attar.stages.compress.budget import parse_budget
from attar.stages.compress.feed import TensorFeed
from attar.workspace import Job

NOTHING = Model(source={}, state={}, preprocess=Preprocess(size=(8, 8)))


def candidate(
    name: str,
    *,
    agreement: float = 0.9,
    divergence: float = 0.1,
    size: float = 0.5,
    latency: float = 0.5,
    macs: float = 0.5,
    n: int = 10**5,
) -> Candidate:
    ratio = {"size_ratio": size, "latency_ratio": latency, "macs_ratio": macs, "parameters_ratio": size}
    kept = {"agreement": agreement, "divergence": divergence, "n": n}
    figures = kept | {"size": 1e6 * size, "latency": 10 * latency, "macs": 1e8 * macs, "parameters": 1e5} | ratio
    return Candidate(name=name, model=NOTHING, onnx=Path("none"), precision="float32", figures=figures)


# the size a bound on cost allows


@given(st.floats(0.01, 1.2), st.floats(0.0, 0.3), st.floats(0.05, 0.4), st.floats(0.02, 1.0))
def test_the_share_found_is_within_the_bound_and_near_it(limit: float, base: float, floor: float, start: float) -> None:
    """Costs that are base + (1 − base) · share, as of sizes with a part that is never cut."""

    def excess(share: float) -> float:
        assert floor - 0.001 <= share <= 1
        return (base + (1 - base) * share) / limit

    found = search.largest_share(excess, floor, start)
    exact = (limit - base) / (1 - base)
    if exact >= math.ceil(1000 * floor) / 1000 + 0.03:
        assert excess(found) <= 1
        assert found >= min(exact, 1) - max(search.CLOSE, 0.06)
    elif exact < floor:
        assert found == pytest.approx(floor, abs=0.0011), "the smallest there is"


def test_a_bound_on_macs_is_aimed_at_exactly() -> None:
    tried: list[float] = []

    def excess(share: float) -> float:
        tried.append(share)
        return share * 0.8 / 0.37  # widths are whole: a cut comes out below what was asked

    assert search.largest_share(excess, 0.1, 0.37, close=1.0) == 0.37
    assert tried == [0.37]


def test_names_tell_shares_apart() -> None:
    assert [search.name_of(share) for share in (0.5, 0.375, 0.333, 0.05, 1.0)] == ["cut50", "cut37.5", "cut33.3", "cut5", "cut100"]


# what is delivered

CUT = candidate("cut50-distilled-float32", agreement=0.97, size=0.5)
SMALL = candidate("cut50-distilled-int8", agreement=0.94, size=0.15, n=400)
SLOW = candidate("whole-int8", agreement=0.99, size=0.26, latency=1.5, macs=1.0)


@pytest.mark.parametrize(
    ("budget", "made", "chosen", "met"),
    [
        ("size<=0.6x", [CUT, SMALL], CUT, True),  # the one that agrees most
        ("agreement>=0.9", [CUT, SMALL], SMALL, True),  # the smallest
        ("agreement>=0.96", [CUT, SMALL], CUT, True),
        ("size<=0.3x", [SMALL, SLOW], SMALL, True),  # slower helps nobody
        ("size<=0.3x", [CUT, SLOW], SLOW, True),  # unless nothing else is small enough
        ("latency<=2x", [CUT, SLOW], SLOW, True),  # or the budget says how slow it may be
        ("size<=0.1x", [CUT, SMALL, SLOW], SMALL, False),  # the nearest
        ("macs<=0.6x, agreement>=0.999", [CUT, SLOW], SLOW, False),
    ],
)
def test_what_is_delivered(budget: str, made: list[Candidate], chosen: Candidate, met: bool) -> None:
    best, fits, reason = search.choose(made, parse_budget(budget))
    assert (best, fits) == (chosen, met)
    assert ("binds: the nearest, " + chosen.name in reason) is not met


def test_what_agreement_cannot_tell_apart_divergence_does_and_then_size() -> None:
    untrained = candidate("cut50-float32", agreement=0.96, divergence=0.2, n=50)
    trained = candidate("cut50-distilled-float32", agreement=0.94, divergence=0.1, n=50)
    rough = candidate("cut50-distilled-int8", agreement=0.96, divergence=0.12, size=0.2, n=50)
    fine = candidate("cut50-distilled-float16", agreement=0.94, divergence=0.101, size=0.3, n=50)
    assert search.choose([untrained, trained, rough], parse_budget("macs<=0.5x"))[0] is trained
    assert search.choose([untrained, trained, rough, fine], parse_budget("macs<=0.5x"))[0] is fine
    few = [candidate("a", agreement=59 / 60, divergence=0.2, n=60), candidate("b", agreement=58 / 60, divergence=0.1, n=60)]
    assert search.choose(few, parse_budget("macs<=0.5x"))[0] is few[1]
    sure = [
        candidate("cut50-float32", agreement=0.96, divergence=0.2, n=5000),
        candidate("cut50-distilled-float32", agreement=0.94, n=5000),
    ]
    assert search.choose(sure, parse_budget("macs<=0.5x"))[0] is sure[0]


def test_an_untrained_cut_gives_way_to_what_training_made_of_it() -> None:
    untrained = candidate("cut50-float32", agreement=0.98, divergence=0.05, n=60)
    trained = candidate("cut50-distilled-float32", agreement=0.95, divergence=0.08, n=60)
    assert search.choose([untrained, trained], parse_budget("macs<=0.5x"))[0] is trained, "60 items do not tell them apart"
    broken = replace(trained, figures=trained.figures | {"agreement": 0.8})
    assert search.choose([untrained, broken], parse_budget("macs<=0.5x"))[0] is untrained, "these they do"
    for name, precision in (("cut50-distilled-int8", "int8"), ("cut40-distilled-float32", "float32")):
        other = replace(trained, name=name, precision=precision)
        assert search.choose([untrained, other], parse_budget("macs<=0.5x"))[0] is untrained, "another precision or cut is another matter"


def test_the_constraint_that_binds_is_the_one_missed_most() -> None:
    _, met, reason = search.choose([candidate("a", agreement=0.9, size=0.55, n=10**8)], parse_budget("size<=0.5x, agreement>=0.99"))
    assert not met
    assert reason == (
        "none of 1 candidates meets it; agreement>=0.99 binds: the nearest, a, has 0.9 one standard error below what its validation items showed"
    )
    _, _, reason = search.choose([candidate("a", agreement=0.9, size=5.5)], parse_budget("size<=0.5x, agreement>=0.89"))
    assert reason == "none of 1 candidates meets it; size<=0.5x binds: the nearest, a, has 5.5"


def test_costs_that_could_not_be_counted_are_no_saving() -> None:
    assert ratios({"size": 2.0, "macs": 0.0, "parameters": 3.0}, {"size": 4.0, "macs": 0.0, "parameters": 6.0}) == {
        "size_ratio": 0.5,
        "macs_ratio": 1.0,
        "parameters_ratio": 0.5,
    }


def test_the_table_s_rows_stand_under_their_header() -> None:
    for made in (CUT, SMALL, candidate("cut37.5-distilled-float32", agreement=1.0, size=12.45, latency=9.9)):
        assert len(row(made)) == len(HEADER)
    assert row(SMALL).split()[0] == "cut50-distilled-int8"
    assert "( 0.15x)" in row(SMALL)
    assert row(SMALL).endswith("94.0% of     400")


# the loop, for real


def made_of(tensors: Tensor, job: Job) -> tuple[TensorFeed, Model]:
    """A feed of tensors in three splits and two clusters, and a small residual classifier as the original."""
    torch.manual_seed(0)
    source = sources.hold(Residual())
    model = sources.resolve_module(source, tensors[:2], "auto", job)
    network = sources.network(model)
    with torch.no_grad():
        embedding = torch.nn.functional.normalize(network(tensors)[0]).numpy()
    cluster = (embedding[:, 0] > np.median(embedding[:, 0])).astype(np.int32)
    centroids = np.stack([embedding[cluster == one].mean(0) for one in (0, 1)])
    head = Head(mean=np.zeros(16, np.float32), projection=np.eye(16, dtype=np.float32), centroids=centroids, temperature=0.1)
    split = np.array([SPLITS[number % 5 % 3] for number in range(len(tensors))])
    return TensorFeed(tensors, split, cluster, job), replace(model, head=head)


def hunt(job: Job, budget: str, **settings: Any) -> Front:
    feed, model = made_of(images(100), job)
    given = {"distil_steps": 8, "calibration_items": 32, "budget": budget} | settings
    return search.compress(feed, model, config.Compress(**given), job)


Make = Callable[..., Job]


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Front, Job]:
    """The loop under a bound on MACs."""
    job = Job("one", tmp_path_factory.mktemp("bounded") / "job", quiet=True)
    return hunt(job, "macs<=0.6x"), job


def test_a_bound_on_macs_gives_one_cut_at_the_bound_and_its_distillation(bounded: tuple[Front, Job]) -> None:
    front, _ = bounded
    names = [f"{cut}-{precision}" for cut in ("cut60", "cut60-distilled") for precision in PRECISIONS]
    assert [one.name for one in front.candidates] == names, "no precision of the whole could meet it"
    assert front.met
    by_name = {one.name: one for one in front.candidates}
    assert 0.4 < by_name["cut60-float32"].figures["macs_ratio"] <= 0.6
    assert front.original.figures["agreement"] == 1
    steps = "distilled from the original: 8 steps of 40 on 40 unlabelled training items"
    assert steps in by_name["cut60-distilled-int8"].model.lineage
    agrees = max(one.figures["agreement"] for one in search.serving(front.candidates, parse_budget("macs<=0.6x")) or front.candidates[1:])
    assert front.student.figures["agreement"] == agrees


def test_the_loop_stops_at_the_first_that_meets_a_budget_with_agreement(job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "SLOWER", math.inf)  # how long a network this small takes is the machine's mood
    front = hunt(job(), "macs<=0.8x, agreement>=0.01")
    assert [one.name for one in front.candidates] == [f"cut80-{one}" for one in PRECISIONS]
    assert front.met


@pytest.mark.slow
def test_what_is_aimed_at_is_met_and_not_by_far(job: Make) -> None:
    front = hunt(job(), "size<=0.6x, macs<=0.9x, parameters<=0.8x")
    assert front.met
    distilled = [one for one in front.candidates if "distilled" in one.name]
    assert min(search.excess(parse_budget("size<=0.6x, macs<=0.9x, parameters<=0.8x"), one.figures) for one in distilled) <= 1
    assert len({one.name for one in front.candidates}) == len(front.candidates)


def test_a_budget_on_agreement_alone_looks_at_a_ladder_and_distils_two(job: Make) -> None:
    front = hunt(job(), "agreement>=0.05")
    names = [one.name for one in front.candidates]
    assert names[:5] == [*(f"whole-{one}" for one in PRECISIONS[1:]), *(f"cut75-{one}" for one in PRECISIONS)]
    assert len({name.rpartition("-")[0] for name in names if "distilled" in name}) == 2
    assert front.student.figures["size"] == min(
        one.figures["size"] for one in search.serving(front.candidates, parse_budget("agreement>=0.05")) or front.candidates
    )


def test_out_of_reach_the_smallest_cut_is_still_made(job: Make) -> None:
    front = hunt(job(), "macs<=0.0001x")
    assert not front.met
    assert "macs<=0.0001x binds" in front.reason
    assert front.student.figures["macs_ratio"] == min(one.figures["macs_ratio"] for one in front.candidates)


def test_a_seed_gives_the_same_front_and_a_finished_candidate_is_not_built_again(bounded: tuple[Front, Job], tmp_path: Path) -> None:
    one, job = bounded
    again = hunt(job, "macs<=0.6x")
    assert [c.figures for c in again.candidates] == [c.figures for c in one.candidates], "kept, latency included"
    two = hunt(Job("one", tmp_path / "elsewhere", quiet=True), "macs<=0.6x")
    for a, b in zip(one.candidates, two.candidates, strict=True):
        assert (a.name, a.figures["agreement"], a.figures["size"]) == (b.name, b.figures["agreement"], b.figures["size"])
        assert a.onnx.read_bytes() == b.onnx.read_bytes()


@pytest.mark.slow
def test_a_deep_cut_goes_by_way_of_a_trained_one(job: Make) -> None:
    given = job()
    front = hunt(given, "macs<=0.36x", distil_steps=10)
    by_name = {one.name: one for one in front.candidates}
    untrained, trained = by_name["cut36-float32"], by_name["cut36-distilled-float32"]
    assert max(untrained.figures["macs_ratio"], trained.figures["macs_ratio"]) <= 0.36
    kinds = [step.split()[0] for step in trained.model.lineage if step.split()[0] in ("cut", "distilled")]
    assert kinds == ["cut", "distilled", "cut", "distilled"]
    steps = [step for step in trained.model.lineage if step.startswith("distilled")]
    assert [step.split()[4] for step in steps] == ["3", "10"]
    again = sources.network(trained.model)  # the two cuts, replayed on the original as one
    assert all(torch.equal(value, trained.model.state[name]) for name, value in again.state_dict().items())
    assert by_name["cut36-float32"].model.cuts != trained.model.cuts


def test_minutes_become_seconds_and_steps_once(job: Make, tmp_path: Path) -> None:
    given = job("timed")
    feed, model = made_of(images(60), given)
    settings = config.Compress(minutes=0.4, calibration_items=32, budget="macs<=0.6x", distil_batch=8)
    loop = search.Search(feed, model, settings, given)
    network = sources.network(model)
    steps, clock = loop._steps(model, network, "cut60", 1)
    assert clock is not None
    assert clock.total(0) == steps >= 1
    kept = given.recall("minutes-cut60.json")
    assert 0 < kept["seconds"] < 60 * 0.4
    given.remember("minutes-cut60.json", kept | {"steps": 17})
    assert loop._steps(model, network, "cut60", 1)[0] == 17, "kept, whatever the pace is now"
    assert loop._steps(model, network, "cut50", 1000)[0] < steps, "the time is shared"
    late = Job("late", tmp_path / "late", quiet=True)
    late.remember("seconds.json", 3600.0)  # an interrupted attempt used more than there was
    assert search.Search(feed, model, settings, late)._steps(model, network, "cut60", 1)[0] == 1


def test_a_training_with_minutes_says_how_many_steps_it_took(job: Make) -> None:
    given = job("fooled")
    given.remember("minutes-cut60.json", {"seconds": 0.5, "steps": 2000, "later": 1.0})  # faster than any machine is
    front = hunt(given, "macs<=0.6x", distil_steps=None, minutes=0.1, distil_batch=8)
    trained = next(one for one in front.candidates if one.name == "cut60-distilled-float32")
    taken = trained.model.signals[-1]["step"]
    assert 1 <= taken < 1000
    assert f"{taken:.0f} steps of" in trained.model.lineage[-1]


def test_minutes_are_not_spent_where_fewer_bits_are_enough(job: Make) -> None:
    given = job()
    front = hunt(given, "size<=0.95x", minutes=5)
    assert front.met
    assert {one.name for one in front.candidates} <= {"whole-float16", "whole-int8"}
    assert "the whole model in fewer bits meets the budget, so nothing is cut, and the minutes are not needed" in given.notes


def test_without_minutes_steps_follow_from_sizes_alone(job: Make) -> None:
    given = job()
    feed, model = made_of(images(60), given)
    loop = search.Search(feed, model, config.Compress(calibration_items=32), given)
    network = sources.network(model)
    steps = [loop._steps(replace(model, macs=macs), network, "a", 1)[0] for macs in (10**5, 10**8, 10**12)]
    assert steps == sorted(steps, reverse=True)
    assert (steps[0], steps[-1]) == (2000, 100)


def test_an_int8_form_that_cannot_be_made_is_left_out_and_said(job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no such operator")

    monkeypatch.setattr(bench, "quantise", refuse)
    given = job()
    front = hunt(given, "macs<=0.6x")
    left = [one.name for one in front.candidates if not one.name.endswith("float16")]
    assert left == ["cut60-float32", "cut60-distilled-float32"]
    assert any("cut60-int8 cannot be made (ValueError: no such operator); left out" in note for note in given.notes)


def test_a_wrong_student_is_told_before_anything_is_built(job: Make) -> None:
    given = job()
    with pytest.raises(UsageError, match="'nowhere' is not a known source"):
        hunt(given, "macs<=0.6x", student="nowhere")
    assert not (given.folder / "original").exists()


def test_a_module_of_another_process_is_asked_for_again() -> None:
    with pytest.raises(ModelError, match=r"module:0: the module was handed over in another process; hand it over again"):
        sources.network(replace(NOTHING, source={"kind": "module", "key": "module:0", "classifier": None}))
