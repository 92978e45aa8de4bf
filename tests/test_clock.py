"""The clock of a training with minutes: steps fit what is left, whatever the machine's speed does, and are said again after an interruption."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from attar.stages.compress.clock import Clock
from attar.workspace import Job


@pytest.fixture
def job(tmp_path) -> Job:
    return Job("compress", tmp_path / "job", quiet=True)


def _run(job: Job, seconds: float, steps: int, speed: Callable[[int], float], later: float = 1.0, until: int = 10**9) -> tuple[int, float]:
    """Steps taken, a look every ten, and the seconds they took, of a training in which step number i takes speed(i)."""
    time = [0.0]
    clock, total = Clock(seconds, steps, steps // 3, later, job, "cut50", now=lambda: time[0]), steps
    for step in itertools.count():
        if step >= min(total, until):
            return step, time[0]
        time[0] += speed(step)
        if (step + 1) % 10 == 0:
            total = max(step + 1, clock(step + 1))
    raise AssertionError("counts for ever")


@pytest.mark.parametrize("factor", [0.4, 0.8, 1.0, 1.5, 3.0])
def test_a_pace_that_was_measured_wrong_is_put_right(factor: float, job: Job) -> None:
    steps, took = _run(job, 100.0, 400, lambda _: 0.25 * factor)
    assert took == pytest.approx(100.0, rel=0.05)
    assert steps == pytest.approx(400 / factor, rel=0.05)


@pytest.mark.parametrize("slow", [range(100, 10**6), range(300, 10**6), range(50, 90)])
def test_a_machine_that_slows_down_ends_in_time_with_fewer_steps(slow: range, job: Job) -> None:
    steps, took = _run(job, 100.0, 400, lambda step: 0.5 if step in slow else 0.25)
    assert took == pytest.approx(100.0, rel=0.05)
    assert steps < 400


def test_the_first_lap_may_cost_more(job: Job) -> None:
    """After 100 steps of 0.5 seconds the other half of the time is enough for 200 of a quarter."""
    steps, took = _run(job, 100.0, 300, lambda step: 0.5 if step < 100 else 0.25, later=0.5)
    assert steps == 300
    assert took == pytest.approx(100.0)


def test_late_gains_do_not_raise_the_rate_again(job: Job) -> None:
    steps, took = _run(job, 100.0, 400, lambda step: 0.25 if step < 350 else 0.05)
    assert steps == 400
    assert took == pytest.approx(350 * 0.25 + 50 * 0.05)


def test_an_interrupted_training_is_told_the_same_steps(job: Job) -> None:
    _run(job, 100.0, 400, lambda _: 0.3, until=155)
    resumed = Clock(100.0, 400, 133, 1.0, job, "cut50", now=lambda: 0.0)
    said = [resumed.total(step) for step in range(0, 151, 10)]
    assert said[0] == 400
    assert said[-1] < 350
    assert [resumed(step) for step in range(10, 151, 10)] == said[1:]
    other = Clock(100.0, 400, 133, 1.0, job, "cut25", now=lambda: 0.0)
    assert other.total(150) == 400, "another training's"


def test_time_that_is_over_ends_it_at_the_next_look(job: Job) -> None:
    steps, _ = _run(job, -5.0, 400, lambda _: 0.25)
    assert steps == 10
