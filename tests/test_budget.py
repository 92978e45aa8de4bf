"""The budget: text in, constraints out."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attar.errors import UsageError
from attar.stages.compress.budget import UNITS, Constraint, parse_budget

AMOUNT = st.integers(1, 10**6).map(lambda number: number / 1000)
METRIC = st.sampled_from(sorted(set(UNITS) - {"agreement"}))


@given(st.lists(st.tuples(METRIC, AMOUNT, st.booleans()), max_size=5), st.sampled_from([",", ", ", " ,  "]))
def test_text_of_constraints_is_read_back(parts: list[tuple[str, float, bool]], comma: str) -> None:
    wanted = [Constraint(metric, float(f"{limit:g}"), relative) for metric, limit, relative in parts]
    text = comma.join(map(str, wanted))
    assert parse_budget(text) == tuple(wanted)


@given(METRIC, AMOUNT, st.data())
def test_every_unit_scales(metric: str, amount: float, data: st.DataObject) -> None:
    unit = data.draw(st.sampled_from(sorted(UNITS[metric])))
    for written in (unit, unit.upper()):
        (constraint,) = parse_budget(f"{metric} <= {amount!r} {written}")
        assert constraint == Constraint(metric, pytest.approx(amount * UNITS[metric][unit]), False)


@given(st.integers(0, 1000))
def test_agreement_is_a_share_or_percent(permille: int) -> None:
    (share,) = parse_budget(f"agreement>={permille / 1000!r}")
    (percent,) = parse_budget(f"agreement>={permille / 10!r}%")
    assert share.limit == pytest.approx(percent.limit)


@given(METRIC, AMOUNT, AMOUNT)
def test_met_is_no_shortfall(metric: str, limit: float, value: float) -> None:
    constraint = Constraint(metric, limit, True)
    figures = {f"{metric}_ratio": value, metric: -1.0}
    assert constraint.met(figures) == (value <= limit)
    assert (constraint.shortfall(figures) <= 1) == constraint.met(figures)


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 10**6))
def test_agreement_counts_one_standard_error_below_what_was_seen(limit: float, value: float, n: int) -> None:
    constraint, figures = Constraint("agreement", limit, False), {"agreement": value, "n": float(n)}
    sure = value - np.sqrt(value * (1 - value) / n)
    assert constraint.met(figures) == (sure >= limit)
    if limit - sure > 1e-6:
        assert constraint.shortfall(figures) > 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("size<=3MB", Constraint("size", 3e6, False)),
        ("size<=3MiB", Constraint("size", 3 * 2**20, False)),
        ("size<3000", Constraint("size", 3000, False)),
        ("SIZE <= 1.5kB", Constraint("size", 1500, False)),
        ("latency<=2ms", Constraint("latency", 2, False)),
        ("latency<=.5X", Constraint("latency", 0.5, True)),
        ("latency<=0.01 s", Constraint("latency", 10, False)),
        ("macs<=3e+06", Constraint("macs", 3e6, False)),
        ("macs<=1G", Constraint("macs", 1e9, False)),
        ("parameters<=250k", Constraint("parameters", 250e3, False)),
        ("agreement>=98%", Constraint("agreement", 0.98, False)),
        ("agreement>0.98", Constraint("agreement", 0.98, False)),
    ],
)
def test_forms(text: str, expected: Constraint) -> None:
    (made,) = parse_budget(text)
    assert made == (expected.metric, pytest.approx(expected.limit), expected.relative)


def test_an_empty_budget_binds_nothing() -> None:
    assert parse_budget("") == parse_budget(" , ") == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("beauty>=1", "cannot read 'beauty>=1'; expected parts like size<=3MB"),
        ("small", "cannot read 'small'; expected parts like"),
        ("size<=-3MB", "cannot read 'size<=-3MB'"),
        ("size<=", "cannot read 'size<='"),
        ("size<=3 MB please", "cannot read 'size<=3 MB please'"),
        ("size<=3;macs<=1", "unknown unit ';macs<=1' for size"),
        ("size>=3MB", "'size>=3MB': size is bounded with <="),
        ("size=3MB", "'size=3MB': size is bounded with <="),
        ("agreement<=0.9", "'agreement<=0.9': agreement is bounded with >="),
        ("size<=3parsec", "unknown unit 'parsec' for size; expected b, kb, mb, gb, kib, mib, or x for a ratio to the original"),
        ("latency<=3", "unknown unit '' for latency; expected ms, s, us, or x"),
        ("agreement>=0.9x", "unknown unit 'x' for agreement; expected %"),
        ("agreement>=98", "'agreement>=98': agreement is a share, 0 to 1"),
        ("size<=3MB, agreement>=101%", "'agreement>=101%': agreement is a share, 0 to 1"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_budget(text)
    assert expected in str(caught.value)


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert all(constraint.metric in UNITS for constraint in parse_budget(text))
