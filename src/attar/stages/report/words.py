"""Figures and names as people read them: units, intervals, comparisons, and file names that cannot hurt the page."""

from __future__ import annotations

import unicodedata
from typing import Any, NamedTuple

from attar.records import Figure

MINUS = "−"
LABELS = {
    "agreement": "agreement with the original",
    "agreement_worst_cluster": "agreement, lowest cluster",
    "cluster_agreement": "same cluster",
    "knn_overlap": "nearest neighbours shared",
    "knn_accuracy": "accuracy of a nearest-neighbour vote",
    "embedding_cosine": "cosine of the embeddings",
    "embedding_largest_difference": "largest difference in an embedding",
    "items": "items checked",
    "latency": "latency, one item",
    "size": "file size",
    "macs": "multiply-accumulates",
    "f1": "F1",
    "clustering_acc": "clustering accuracy",
    "nmi": "clustering NMI",
    "ari": "clustering ARI",
    "loss": "loss",
}


class Cell(NamedTuple):
    """One figure ready for a table: the value, its interval and what it rests on."""

    value: str
    interval: str
    n: int  # 0 for what is only counted
    note: str


def plain(text: Any) -> str:
    """Text without what could break or disguise a line: control characters, direction overrides and lone surrogates become �.

    >>> plain("a\\nb")
    'a�b'
    """
    return "".join(
        "\ufffd" if unicodedata.category(c) in ("Cc", "Cs") or c in "\u202a\u202b\u202d\u202e\u2066\u2067\u2068" else c for c in str(text)
    )


def closed(text: Any) -> str:
    """Words of a record as a sentence.

    >>> closed("3 of 9 candidates meet it")
    '3 of 9 candidates meet it.'
    """
    said = plain(text).strip().rstrip(".")
    return f"{said[:1].upper()}{said[1:]}." if said else ""


def middle(text: Any, limit: int = 36) -> str:
    """Text of at most `limit` characters: what is too long loses its middle, as beginnings and endings tell files apart.

    >>> middle("holiday/2019/IMG_0001.jpeg", 15)
    'holiday…01.jpeg'
    """
    whole = plain(text)
    if len(whole) <= limit:
        return whole
    tail = (limit - 1) // 2
    head = limit - 1 - tail
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
    """Parameters or operations.

    >>> count(1_320_000), count(48_000), count(640)
    ('1.32 M', '48.0 k', '640')
    """
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= max(scale, 1e4):
            return f"{_three(value / scale)} {unit}"
    return number(value)


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def size(value: float) -> str:
    """Bytes in KB or MB of 1,000 and 1,000,000, as the budget counts them.

    >>> size(421_337), size(48_000)
    ('0.42 MB', '48.0 KB')
    """
    for scale, least, unit in ((1e9, 1e9, "GB"), (1e6, 1e5, "MB"), (1e3, 1e3, "KB")):
        if value >= least:
            return f"{_three(value / scale)} {unit}"
    return f"{value:.0f} B"


def milliseconds(value: float) -> str:
    return f"{_three(value)} ms" if value >= 0.1 else f"{value:.2g} ms"


def seconds(value: float) -> str:
    """A duration as a person says it.

    >>> seconds(0.42), seconds(75), seconds(4000)
    ('0.4 s', '1 min 15 s', '1 h 6 min')
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


def score(value: float) -> str:
    """A figure without a unit, such as a cosine or an index."""
    return f"{value:.3f}".replace("-", MINUS) if abs(value) < 10 else number(value)


UNITS = {
    "share": percent,
    "ms": milliseconds,
    "bytes": size,
    "count": count,
    "ratio": lambda value: f"{number(value)}×",
}


def in_unit(value: float, unit: str) -> str:
    """A value in the unit its record names; a unit that is not one of measure ("cosine", "index") is not repeated."""
    return UNITS.get(unit, score)(value)


def interval(low: float, high: float, unit: str) -> str:
    """Both ends of an interval, the unit said once; empty for an exact figure."""
    if low == high:
        return ""
    first, last = in_unit(low, unit), in_unit(high, unit)
    if low < 0:  # a dash would read as a second minus
        return f"{first} to {last}"
    start, _, unit_low = first.partition(" ")
    return f"{start if last.endswith(' ' + unit_low) and unit_low else first}–{last}".replace("×–", "–")


def cell(figure: Figure | None) -> Cell | None:
    """A figure for a table; what is only counted (a size, a number of parameters) has neither interval nor n."""
    if figure is None:
        return None
    exact = figure.low == figure.high and figure.n <= 1
    return Cell(
        in_unit(figure.value, figure.unit),
        interval(figure.low, figure.high, figure.unit),
        *((0, "") if exact else (figure.n, note(figure))),
    )


def note(figure: Figure) -> str:
    return "; ".join(plain(part) for part in (figure.split and f"{figure.split} split", figure.method) if part)


def label(name: str) -> str:
    """A figure's name in words; "f1[cat]" is the F1 of the class cat."""
    base, bracket, inside = plain(name).partition("[")
    text = LABELS.get(base, base.replace("_", " "))
    return f"{text}, {inside.removesuffix(']')}" if bracket else text


def times(original: float, student: float, better: str, worse: str) -> str:
    """How two costs compare: "6.1× smaller"; within 2 % they are the same.

    >>> times(6.0, 2.0, "smaller", "larger"), times(1.0, 2.0, "faster", "slower")
    ('3.0× smaller', '2.0× slower')
    """
    if original <= 0 or student <= 0:
        return ""
    ratio = original / student
    if abs(ratio - 1) < 0.02:
        return f"no {better}"
    return f"{_ratio(ratio)}× {better}" if ratio > 1 else f"{_ratio(1 / ratio)}× {worse}"


def _ratio(value: float) -> str:
    return f"{value:.0f}" if value >= 19.95 else f"{value:.2f}" if value < 1.095 else f"{value:.1f}"


def setting(value: Any) -> str:
    """A setting's value as one writes it in attar.toml."""
    if value is None or value == "":
        return "not set"
    if isinstance(value, list | tuple):
        return ", ".join(f"{part:g}" if isinstance(part, float) else plain(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else plain(value)


def value(item: Any) -> str:
    """One value of a row of measurements, whatever it is."""
    return number(item) if isinstance(item, int | float) and not isinstance(item, bool) else middle(item, 60)
