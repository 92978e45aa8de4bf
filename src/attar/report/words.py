"""Figures and names as people read them: units, intervals, comparisons, and file names that cannot hurt the page."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any, NamedTuple

from attar.records import Figure

MINUS = "−"
LABELS = {
    "agreement": "agreement",
    "top1_agreement": "agreement (top-1)",
    "cluster_agreement": "same cluster",
    "knn_overlap": "nearest neighbours shared",
    "latency": "latency",
    "latency_ms": "latency",
    "size": "file size",
    "size_bytes": "file size",
    "parameters": "parameters",
    "macs": "multiply-accumulates",
    "f1_macro": "F1, mean of the classes",
    "precision_macro": "precision, mean of the classes",
    "recall_macro": "recall, mean of the classes",
    "clustering_acc": "clustering accuracy",
    "acc": "clustering accuracy",
    "nmi": "clustering NMI",
    "ari": "clustering ARI",
}


class Cell(NamedTuple):
    """One figure ready for a table: the value, its interval and what it rests on."""

    value: str
    interval: str
    n: str
    note: str


def plain(text: Any) -> str:
    """Text without what could break or disguise a line: control characters, direction overrides and lone surrogates become �.

    >>> plain("a\\nb")
    'a�b'
    """
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") or c in "\u202a\u202b\u202d\u202e\u2066\u2067\u2068" else c for c in str(text))


def middle(text: Any, limit: int = 36) -> str:
    """Text of at most `limit` characters: what is too long loses its middle, as beginnings and endings tell files apart.

    >>> middle("holiday/2019/IMG_0001.jpeg", 15)
    'holiday…01.jpeg'
    """
    whole = plain(text)
    if len(whole) <= limit:
        return whole
    head = (limit - 1) // 2 + (limit - 1) % 2
    head, tail = (head, limit - 1 - head)
    return f"{whole[:head]}…{whole[len(whole) - tail :]}"


def number(value: float) -> str:
    """A plain number with three significant digits, thousands separated."""
    if value != value or value in (float("inf"), float("-inf")):
        return "–"
    if value < 0:
        return MINUS + number(-value)
    if value == int(value) or value >= 1000:
        return f"{round(value):,}"
    return f"{value:.3g}" if value >= 1e-3 or value == 0 else f"{value:.1e}".replace("e-0", "e-").replace("-", MINUS)


def count(value: float) -> str:
    """Parameters or operations: 1.32 million is "1.32 M"."""
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")):
        if value >= limit:
            scaled = value / limit if unit != " k" else value / 1e3
            return f"{_three(scaled)}{unit}"
    return number(value)


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def size(value: float) -> str:
    """Bytes in KB or MB of 1,000 and 1,000,000, as the budget counts them.

    >>> size(421_337), size(48_000)
    ('0.42 MB', '48.0 KB')
    """
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if value >= limit / (10 if unit == "MB" else 1):
            return f"{_three(value / limit)} {unit}"
    return f"{value:.0f} B"


def milliseconds(value: float) -> str:
    return f"{_three(value)} ms" if value >= 0.1 else f"{value:.2g} ms"


def seconds(value: float) -> str:
    """A duration as a person says it.

    >>> seconds(0.42), seconds(75), seconds(4000)
    ('0.4 s', '1 min 15 s', '1 h 7 min')
    """
    if value < 59.5:
        return f"{value:.1f} s" if value < 9.95 else f"{value:.0f} s"
    whole = round(value)
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def percent(share: float) -> str:
    """A share as per cent with one decimal; more where one decimal would round it to a whole that it is not."""
    value = 100 * share
    digits = 1
    while digits < 4 and 0 < share < 1 and float(f"{value:.{digits}f}") in (0.0, 100.0):
        digits += 1
    return f"{value:.{digits}f} %"


def in_unit(value: float, unit: str) -> str:
    """A value in the unit its record names."""
    known = {"share": percent, "ms": milliseconds, "bytes": size, "count": count, "macs": count, "parameters": count}
    if unit in known:
        return known[unit](value)
    if unit in ("ratio", "x"):
        return f"{number(value)}×"
    return f"{number(value)} {unit}" if unit and unit not in ("score", "index", "1", "number") else f"{value:.3f}" if abs(value) < 10 else number(value)


def interval(low: float, high: float, unit: str) -> str:
    """Both ends of an interval, the unit said once; empty for an exact figure."""
    if low == high:
        return ""
    first, last = in_unit(low, unit), in_unit(high, unit)
    start, _, unit_low = first.partition(" ")
    return f"{start if last.endswith(' ' + unit_low) and unit_low else first}–{last}".replace("×–", "–")


def cell(figure: Figure | None) -> Cell | None:
    if figure is None:
        return None
    unit = _unit(figure)
    return Cell(
        in_unit(figure.value, unit),
        interval(figure.low, figure.high, unit),
        f"n = {figure.n:,}" if figure.n > 1 or figure.low != figure.high else "",
        ", ".join(part for part in (figure.split and f"{figure.split} split", figure.method) if part),
    )


def _unit(figure: Figure) -> str:
    """The record's unit, with the quantities that are counted shown as such."""
    return figure.name if figure.name in ("parameters", "macs") else figure.unit


def label(name: str) -> str:
    return LABELS.get(name, plain(name).replace("_", " "))


def times(original: float, student: float, better: str, worse: str) -> str:
    """How two costs compare: "6.1× smaller"; within 2 % they are the same.

    >>> times(6.0, 2.0, "smaller", "larger"), times(1.0, 2.0, "faster", "slower")
    ('3.0× smaller', '2.0× slower')
    """
    if original <= 0 or student <= 0:
        return ""
    ratio = original / student
    if abs(ratio - 1) < 0.02:
        return {"smaller": "no smaller", "faster": "no faster"}.get(better, f"not {better}")
    return f"{_ratio(ratio)}× {better}" if ratio > 1 else f"{_ratio(1 / ratio)}× {worse}"


def _ratio(value: float) -> str:
    return f"{value:.0f}" if value >= 19.95 else f"{value:.2f}" if value < 1.095 else f"{value:.1f}"


def setting(value: Any) -> str:
    """A setting's value as one writes it in attar.toml; "default" words for the absent."""
    if value is None or value == "":
        return "automatic"
    if isinstance(value, list | tuple):
        return ", ".join(f"{part:g}" if isinstance(part, float) else plain(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else plain(value)


def measurement(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of measurements of any shape as text."""
    return {
        key: number(value) if isinstance(value, int | float) and not isinstance(value, bool) else middle(value, 60) for key, value in row.items()
    }
