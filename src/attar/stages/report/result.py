"""What the model costs and keeps: the result sentence, the key figures, the Pareto charts and the tables of evidence."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from attar.records import Evidence, Figure, Front
from attar.runtime import where
from attar.stages.compress.budget import parse_budget
from attar.stages.report import charts, words

COSTS: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "size": ("smaller", "larger", words.size),
    "parameters": ("fewer", "more", words.count),
    "macs": ("fewer", "more", words.count),
    "latency": ("faster", "slower", words.milliseconds),
}
NAMES = {"size": ("size",), "latency": ("latency_ms", "latency"), "parameters": ("parameters",), "macs": ("macs",)}


class Key(NamedTuple):
    """One of the figures at the head of the page."""

    value: str
    label: str
    detail: str


class Change(NamedTuple):
    """One row of the before/after table."""

    label: str
    original: words.Cell | None
    student: words.Cell | None
    change: str
    interval: str  # of the change
    note: str


def cost(front: Front, evidence: Evidence, name: str, of: str) -> Figure | None:
    """A cost as evaluation measured it, else as the compression loop did."""
    for known in NAMES[name]:
        if found := evidence.get(known, of):
            return found
    candidate = front.original if of == "original" else front.student
    value = candidate.figures.get(name)
    units = {"size": "bytes", "latency": "ms"}
    return None if value is None else Figure(name, of, value, value, value, 1, "", "", units.get(name, "count"))


def _compare(front: Front, evidence: Evidence, name: str) -> str:
    """How the student's cost compares: by the measured ratio where there is one, else by the two figures."""
    better, worse, _ = COSTS[name]
    if ratio := evidence.get(f"{name}_ratio"):
        return words.times(1.0, ratio.value, better, worse)
    before, after = (cost(front, evidence, name, of) for of in ("original", "student"))
    return words.times(before.value, after.value, better, worse) if before and after else ""


def _compared(evidence: Evidence, name: str) -> str:
    """The interval of a measured ratio, said the way `_compare` says its value."""
    ratio = evidence.get(f"{name}_ratio")
    if ratio is None or ratio.low == ratio.high or ratio.low <= 0:
        return ""
    low, high = (1 / ratio.high, 1 / ratio.low) if ratio.value <= 1 else (ratio.low, ratio.high)
    return f"{low:.2g}–{high:.2g}×" if low < 10 else f"{low:.0f}–{high:.0f}×"


def agreement_words(figure: Figure, classes: bool) -> str:
    """What agreement means for this model, in a clause."""
    share, rest = words.percent(figure.value), words.interval(figure.low, figure.high, figure.unit)
    within = f" (95 % interval {rest.removesuffix(' %')})" if rest else ""
    what = f"agrees with it on {share} of" if classes else f"puts {share} of"
    ending = "" if classes else " in the same cluster as the original does"
    return f"{what} {figure.n:,} unseen items{ending}{within}"


def _conditions(front: Front) -> str:
    place = where(front.student.runtime)
    said = f"{front.threads} thread{'s' if front.threads != 1 else ''}, batch 1"
    return f"{said}; this one{place}, the original in ONNX Runtime" if place else said


def sentence(front: Front, evidence: Evidence, classes: bool) -> str:
    """The result in one sentence with its figures; when the budget was missed, that comes first."""
    missed = "" if front.met else f"The budget was not met ({shortfall(front)}). "
    size, agreement = cost(front, evidence, "size", "student"), evidence.get("agreement")
    model = f"{words.size(size.value)} {front.student.precision} model" if size else f"{front.student.precision} model"
    if front.chosen == front.original.name:
        return f"{missed}No smaller model was good enough: what you get is the original, {_article(model)} {model}."
    compared = " and ".join(filter(None, (_compare(front, evidence, name) for name in ("size", "latency"))))
    start = f"The best found is {_article(model)}" if missed else _article(model).capitalize()
    than = f", {compared} than the original ({_conditions(front)})" if compared else ""
    keeps = f", that {agreement_words(agreement, classes)}" if agreement else ""
    return f"{missed}{start} {model}{than}{keeps}{_worst(evidence)}{_fallen(front, agreement)}."


def _worst(evidence: Evidence) -> str:
    """The agreement in the worst cluster, so that a small group that broke is seen at once."""
    worst = evidence.get("agreement_worst_cluster")
    if worst is None or evidence.get("agreement") is None:
        return ""
    within = words.interval(worst.low, worst.high, worst.unit).removesuffix(" %")
    return f"; in the worst cluster on {words.percent(worst.value)} of {worst.n:,}" + (f" (95 % interval {within})" if within else "")


def _fallen(front: Front, agreement: Figure | None) -> str:
    """That the test items bear out less agreement than the budget asks, though the validation items met it."""
    asked = max((constraint.limit for constraint in parse_budget(front.budget) if constraint.metric == "agreement"), default=0.0)
    if not front.met or agreement is None or agreement.value >= asked:
        return ""
    return f", less than the {words.percent(asked)} asked, which it met on the validation items it was chosen on"


def shortfall(front: Front) -> str:
    """Which constraints the delivered model misses, and by how much, by the figures it was chosen on."""
    missed = []
    for constraint in parse_budget(front.budget):
        name, figures = constraint.metric, front.student.figures
        if constraint.met(figures):
            continue
        unit = words.percent if name == "agreement" else _relative if constraint.relative else COSTS[name][2]
        value = constraint.value(figures)
        sign = "≥" if name == "agreement" else "≤"
        missed.append(f"{name} {unit(value)}, asked {sign} {unit(constraint.limit)}")
    return "; ".join(missed) or words.plain(front.budget)


def _relative(value: float) -> str:
    return f"{value:.2g}×"


def _article(text: str) -> str:
    """The article: "an" before what is said with a vowel: 8…, 11 and 18."""
    figure = text.split(" ")[0].split(".")[0]
    return "an" if figure.startswith("8") or figure in ("11", "18") else "a"


def keys(front: Front, evidence: Evidence, classes: bool) -> list[Key]:
    """Three or four figures: what it keeps, what it costs, and how right it is where labels were given."""
    found = []
    if agreement := evidence.get("agreement"):
        name = "agreement with the original" if classes else "in the same cluster as with the original"
        found.append(Key(words.percent(agreement.value), name, _basis(agreement, f"{agreement.n:,} {agreement.split} items")))
    for name, what in (("latency", "per item"), ("size", "to ship")):
        figure = cost(front, evidence, name, "student")
        if figure:
            basis = _basis(figure, _conditions(front)) if name == "latency" else ""
            ratio = _compare(front, evidence, name)
            found.append(Key(COSTS[name][2](figure.value), f"{what}, {ratio}" if ratio else what, basis))
    extra = evidence.get("accuracy") or evidence.get("knn_overlap")
    if extra:
        before = evidence.get(extra.name, "original")
        name = words.label(extra.name) + (f", original {words.in_unit(before.value, extra.unit)}" if before else "")
        found.append(Key(words.in_unit(extra.value, extra.unit), name, _basis(extra, f"{extra.n:,} {extra.split} items")))
    elif macs := cost(front, evidence, "macs", "student"):
        found.append(Key(words.count(macs.value), "multiply-accumulates per item", _compare(front, evidence, "macs")))
    return found


def _basis(figure: Figure, rest: str) -> str:
    within = words.interval(figure.low, figure.high, figure.unit)
    return ", ".join(part for part in (f"95 % interval {within}" if within else "", rest) if part)


def pareto(front: Front) -> list[dict[str, Any]]:
    """Agreement on validation against latency and against size: every candidate, the original, the budget's limits."""
    limits = parse_budget(front.budget)
    least = max((c.limit for c in limits if c.metric == "agreement"), default=None)
    found = []
    for metric in ("latency", "size"):
        original, dots = front.original.figures.get(metric), _dots(front, metric)
        if not original or len(dots) < 2:
            continue
        unit, scale = ("ms", 1.0) if metric == "latency" else ("MB", 1e6) if original >= 1e6 else ("KB", 1e3)
        most = min((c.limit * (original if c.relative else 1) / scale for c in limits if c.metric == metric), default=None)
        scaled = [dot._replace(cost=dot.cost / scale) for dot in dots]
        title = f"{'latency' if metric == 'latency' else 'file size'}, {unit}"
        found.append({"svg": charts.pareto(scaled, title=title, most=most, least=least), "title": title})
    return found


def _dots(front: Front, metric: str) -> list[charts.Dot]:
    """The original and every candidate that has both figures; the original agrees with itself."""
    dots = []
    for candidate in (front.original, *front.candidates):
        own = candidate is front.original
        keeps, spent = candidate.figures.get("agreement", 1.0 if own else None), candidate.figures.get(metric)
        if keeps is not None and spent is not None:
            says = f"{COSTS[metric][2](spent)}, agreement {words.percent(keeps)}{where(candidate.runtime)}"
            kind = "original" if own else candidate.precision
            dots.append(charts.Dot(words.plain(candidate.name), spent, keeps, kind, candidate.name == front.chosen, says))
    return dots


def candidates(front: Front) -> list[dict[str, Any]]:
    """Every candidate with its figures, the original first."""
    rows = []
    for candidate in (front.original, *front.candidates):
        figures = candidate.figures
        rows.append(
            {
                "name": words.plain(candidate.name),
                "precision": candidate.precision + where(candidate.runtime),
                **{name: unit(figures[name]) if name in figures else "–" for name, (_, _, unit) in COSTS.items()},
                "agreement": words.percent(figures["agreement"]) if "agreement" in figures else "–",
                "n": f"{figures['n']:,.0f}" if figures.get("n") else "",
                "chosen": candidate.name == front.chosen,
            }
        )
    return rows


def changes(front: Front, evidence: Evidence) -> tuple[list[Change], list[Change]]:
    """The before/after table: costs first, then every figure of the evidence; figures of single classes apart."""
    rows: list[Change] = []
    single: list[Change] = []
    for name in COSTS:
        before, after = (cost(front, evidence, name, of) for of in ("original", "student"))
        if before or after:
            rows.append(_change(name, before, after, _compare(front, evidence, name), _compared(evidence, name)))
    costs = {known for names in NAMES.values() for known in names}
    for name in dict.fromkeys(figure.name for figure in evidence.figures):
        if name in costs or name.endswith(("_ratio", "_difference")) or _repeats(evidence, name):
            continue
        before, after = evidence.get(name, "original"), evidence.get(name)
        (single if "[" in name else rows).append(_change(name, before, after, *_difference(evidence, name)))
    return rows, single


def _repeats(evidence: Evidence, name: str) -> bool:
    """Whether it is the agreement again: for an encoder, agreeing is choosing the same cluster."""
    main, other = evidence.get("agreement"), evidence.get(name)
    return name != "agreement" and main is not None and other is not None and main._replace(name=name) == other


def _difference(evidence: Evidence, name: str) -> tuple[str, str]:
    """Student − original in points, with its interval where it was measured as a difference."""
    measured, before, after = evidence.get(f"{name}_difference"), evidence.get(name, "original"), evidence.get(name)
    if measured:
        return _points(measured.value) + " points", f"{_points(measured.low)} to {_points(measured.high)}"
    if before and after and after.unit == "share":
        return _points(after.value - before.value) + " points", ""
    return "", ""


def _points(share: float) -> str:
    text = f"{abs(100 * share):.1f}"
    return text if float(text) == 0 else f"{'+' if share > 0 else words.MINUS}{text}"


def _change(name: str, before: Figure | None, after: Figure | None, change: str, interval: str) -> Change:
    """A row; n stands with the method when it is the same on both sides, else with each value."""
    cells = [words.cell(figure) for figure in (before, after)]
    counts = {cell.n for cell in cells if cell}
    note = next((cell.note for cell in reversed(cells) if cell), "")
    if len(counts) == 1 and (n := counts.pop()):
        cells = [cell and cell._replace(n=0) for cell in cells]
        note = f"n = {n:,}; {note}"
    return Change(words.label(name), cells[0], cells[1], change, interval, note)


def per_cluster(evidence: Evidence) -> dict[str, Any]:
    """Agreement in each cluster with its interval, placed in per cent of an axis that starts at a round share below all of them.

    `broken` marks a cluster whose whole interval lies below the overall figure.
    """
    overall = evidence.get("agreement")
    start = min((math.floor(10 * float(row["low"])) / 10 for row in evidence.per_cluster), default=0.0)
    start = min(start, 0.9)

    def at(share: float) -> float:
        return round(100 * (share - start) / (1 - start), 2)

    rows = []
    for row in evidence.per_cluster:
        value, low, high = (float(row[key]) for key in ("value", "low", "high"))
        rows.append(
            {
                "cluster": int(row["cluster"]),
                "n": int(row["n"]),
                "text": words.percent(value),
                "interval": words.interval(low, high, "share"),
                "at": at(value),
                "low": at(low),
                "span": round(at(high) - at(low), 2),
                "broken": overall is not None and high < overall.value,
            }
        )
    return {"rows": rows, "start": f"{100 * start:.0f} %", "overall": at(overall.value) if overall and overall.value >= start else None}


def emphasised(text: str) -> Markup:
    """The sentence with its three figures (size, ratios, share kept) marked for the page's accent, and its asides for a lighter tone."""
    said = re.sub(r"\([^()]*\d[^()]*\)", lambda aside: f"<i>{aside[0]}</i>", str(escape(text)))
    parts = re.split(r"(<i>.*?</i>)", said)
    figures = r"\b\d[\d.,]*(?:×| (?:B|KB|MB|GB|%)(?!\w))"
    return Markup("".join(part if part.startswith("<i>") else re.sub(figures, lambda found: f"<b>{found[0]}</b>", part) for part in parts))


def checks(values: Mapping[str, float]) -> list[tuple[str, str]]:
    """How far the delivered file is from the model it was made from."""
    return [(words.label(name), words.percent(value) if name == "equal_decisions" else f"{value:.6g}") for name, value in values.items()]
