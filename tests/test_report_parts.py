"""The parts of the report: words people read, and charts."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attar.stages.report import charts, words

HOSTILE = """a"b'<script>alert(1)<&amp;>é日本.png"""


@pytest.mark.parametrize("module", [words, charts])
def test_worked_examples(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0.0 %"), (1.0, "100.0 %"), (0.978, "97.8 %"), (0.9996, "99.96 %"), (0.99999, "99.999 %"), (0.0001, "0.01 %")],
)
def test_percent_never_rounds_to_a_whole_it_is_not(share: float, text: str) -> None:
    assert words.percent(share) == text


@given(st.text(max_size=120), st.integers(3, 60))
def test_middle_keeps_both_ends(text: str, limit: int) -> None:
    short, whole = words.middle(text, limit), words.plain(text)
    assert len(short) <= max(limit, 0)
    assert short == whole or (short[0] == whole[0] and short[-1] == whole[-1] and "…" in short)
    short.encode("utf-8")  # lone surrogates are gone


@pytest.mark.parametrize(
    ("low", "high", "unit", "text"),
    [
        (0.952, 0.99, "share", "95.2–99.0 %"),
        (3.4, 3.71, "ms", "3.40–3.71 ms"),
        (5, 5, "ms", ""),
        (90_000, 120_000, "bytes", "90.0 KB–0.12 MB"),
        (-0.1, 0.25, "index", "−0.100 to 0.250"),
    ],
)
def test_interval(low: float, high: float, unit: str, text: str) -> None:
    assert words.interval(low, high, unit) == text


dots = st.lists(
    st.tuples(st.integers(1, 9), st.integers(0, 9)).map(lambda pair: charts.Dot("c", pair[0], pair[1] / 10, "int8", False, "")), min_size=1
)


@given(dots)
def test_front_is_what_no_other_beats(found: list[charts.Dot]) -> None:
    def beaten(dot: charts.Dot) -> bool:
        return any(o.cost <= dot.cost and o.keeps >= dot.keeps and (o.cost, o.keeps) != (dot.cost, dot.keeps) for o in found)

    slow = {(dot.cost, dot.keeps) for dot in found if not beaten(dot)}
    assert [(dot.cost, dot.keeps) for dot in charts.front_of(found)] == sorted(slow)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 8))
def test_ticks_are_inside_and_evenly_apart(low: float, span: float, wanted: int) -> None:
    marks = charts.ticks(low, low + span, wanted)
    slack = 1e-6 * max(abs(low), span, 1)
    assert all(low - slack <= mark <= low + span + slack for mark in marks)
    assert len(marks) <= wanted + 1
    assert np.ptp(np.diff(marks)) <= slack if len(marks) > 2 else True


@given(st.integers(1, 60), st.floats(1, 30), st.integers(0, 2**31))
def test_placed_photos_keep_their_distance(count: int, gap: float, seed: int) -> None:
    points = np.random.default_rng(seed).uniform(0, 100, (count, 2))
    kept = charts.place(points, [count - 1], gap, 20)
    assert kept[0] == count - 1
    apart = np.abs(points[kept][:, None] - points[kept]).max(2) + 1e9 * np.eye(len(kept))
    assert apart.min(initial=1e9) >= gap
    if len(kept) < 20:  # no room was left
        assert all(np.abs(points[kept] - point).max(1).min() < gap or row in kept for row, point in enumerate(points))


def test_chart_text_is_escaped() -> None:
    svg = str(charts.pareto([charts.Dot(HOSTILE, 1, 0.5, "int8", True, "<b>")], title="<i>", most=None, least=None))
    assert "<script>" not in svg
    assert "<b>" not in svg
    assert "<i>" not in svg
