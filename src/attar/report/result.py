"""What the model costs and keeps: the result sentence, the key figures, the Pareto charts and the tables of evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from attar.compress.budget import parse_budget
from attar.records import Candidate, Evidence, Figure, Front
from attar.report import charts, words

COSTS: dict[str, tuple[str, str, Callable[[float], str]]] = {
    "size": ("smaller", "larger", words.size),
    "parameters": ("fewer", "more", words.count),
    "macs": ("fewer", "more", words.count),
    "latency": ("faster", "slower", words.milliseconds),
}
NAMES = {"size": ("size", "size_bytes", "bytes"), "latency": ("latency_ms", "latency"), "parameters": ("parameters",), "macs": ("macs",)}


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
    before, after = (cost(front, evidence, name, of) for of in ("original", "student"))
    better, worse, _ = COSTS[name]
    return words.times(before.value, after.value, better, worse) if before and after else ""


def agreement_words(figure: Figure, classes: bool) -> str:
    """What agreement means for this model, in a clause."""
    share, rest = words.percent(figure.value), words.interval(figure.low, figure.high, figure.unit)
    within = f" (95 % interval {rest.removesuffix(' %')})" if rest else ""
    what = f"agrees with it on {share} of" if classes else f"puts {share} of"
    ending = "" if classes else " in the same cluster as it does"
    return f"{what} {figure.n:,} unseen items{ending}{within}"


def _conditions(front: Front) -> str:
    return f"{front.threads} thread{'s' if front.threads != 1 else ''}, batch 1"


def sentence(front: Front, evidence: Evidence, classes: bool) -> str:
    """The result in one sentence with its figures; when the budget was missed, that comes first."""
    student = front.student
    size, agreement = cost(front, evidence, "size", "student"), evidence.get("agreement")
    head = f"{words.size(size.value) if size else 'A'} {student.precision} model".removeprefix("A ")
    if front.chosen == front.original.name:
        body = f"No smaller model was good enough: what you get is the original, {head}"
    else:
        compared = [text for text in (_compare(front, evidence, "size"), _compare(front, evidence, "latency")) if text]
        joined = " and ".join(compared)
        if compared and "no " in joined and joined.count("no ") == len(compared) == 2:
            joined = "no smaller and no faster"
        than = f", {joined} than the original ({_conditions(front)})" if joined else ""
        body = f"{_article(head)} {head}{than}"
        if agreement:
            body += f", that {agreement_words(agreement, classes)}"
    if front.met:
        return body + "."
    return f"The budget ({words.plain(front.budget)}) was not met. {_lead(body)}."


def _lead(body: str) -> str:
    return body if body.startswith("No ") else f"The best found is {body[0].lower()}{body[1:]}"


def _article(text: str) -> str:
    """"An" before what is said with a vowel: 8…, 11 and 18."""
    figure = text.split(" ")[0].split(".")[0]
    return "An" if figure.startswith("8") or figure in ("11", "18") else "A"


def keys(front: Front, evidence: Evidence, classes: bool) -> list[Key]:
    """Three or four figures: what it keeps, what it costs, and how right it is where labels were given."""
    found = []
    if agreement := evidence.get("agreement"):
        name = "agreement with the original" if classes else "in the same cluster as the original has them"
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
    for metric, title in (("latency", "latency, ms"), ("size", "file size")):
        original = front.original.figures.get(metric)
        dots = [dot for candidate in (front.original, *front.candidates) if (dot := _dot(front, candidate, metric))]
        if not original or len(dots) < 2:
            continue
        most = min((c.limit * (original if c.relative else 1) for c in limits if c.metric == metric), default=None)
        unit = (lambda value: f"{value:.3g}") if metric == "latency" else words.size
        found.append({"svg": charts.pareto(dots, title=title, unit=unit, most=most, least=least), "title": title})
    return found


def _dot(front: Front, candidate: Candidate, metric: str) -> charts.Dot | None:
    own = candidate is front.original
    keeps, spent = candidate.figures.get("agreement", 1.0 if own else None), candidate.figures.get(metric)
    if keeps is None or spent is None:
        return None
    return charts.Dot(candidate.name, spent, keeps, "original" if own else candidate.precision, candidate.name == front.chosen)


def candidates(front: Front) -> list[dict[str, Any]]:
    """Every candidate with its figures, the original first; `best` marks those no other beats in both size and latency."""
    dots = {metric: [d for c in (front.original, *front.candidates) if (d := _dot(front, c, metric))] for metric in ("latency", "size")}
    best = {metric: {d.name for d in charts.front_of(found)} for metric, found in dots.items() if found}
    rows = []
    for candidate in (front.original, *front.candidates):
        figures = candidate.figures
        keeps = figures.get("agreement")
        rows.append(
            {
                "name": words.plain(candidate.name),
                "precision": candidate.precision,
                **{name: unit(figures[name]) if name in figures else "–" for name, (_, _, unit) in COSTS.items()},
                "agreement": words.percent(keeps) if keeps is not None else "–",
                "n": f"{figures['n']:,.0f}" if figures.get("n") else "",
                "best": [metric for metric in best if candidate.name in best[metric]],
                "chosen": candidate.name == front.chosen,
                "original": candidate is front.original,
            }
        )
    return rows


def changes(front: Front, evidence: Evidence) -> tuple[list[Change], list[Change]]:
    """The before/after table: costs first, then every figure of the evidence; figures of single classes apart."""
    rows, single = [], []
    for name in COSTS:
        before, after = (cost(front, evidence, name, of) for of in ("original", "student"))
        if before or after:
            rows.append(_change(words.label(name), before, after, _compare(front, evidence, name)))
    costs = {known for names in NAMES.values() for known in names}
    for name in dict.fromkeys(figure.name for figure in evidence.figures):
        if name in costs:
            continue
        before, after = evidence.get(name, "original"), evidence.get(name)
        change = ""
        if before and after and after.unit == "share":
            points = 100 * (after.value - before.value)
            change = f"{'+' if points > 0 else words.MINUS if points < 0 else '±'}{abs(points):.1f} points"
        (single if any(mark in name for mark in "[:/") else rows).append(_change(words.label(name), before, after, change))
    return rows, single


def _change(label: str, before: Figure | None, after: Figure | None, change: str) -> Change:
    cells = words.cell(before), words.cell(after)
    note = next((cell.note for cell in reversed(cells) if cell), "")
    return Change(label, *cells, change, note)


def per_cluster(evidence: Evidence) -> list[dict[str, Any]]:
    """Agreement in each cluster with its interval, in per cent of the axis; `broken` where the whole interval lies below the overall figure."""
    overall = evidence.get("agreement")
    rows = []
    for row in evidence.per_cluster:
        value, low, high = (float(row[key]) for key in ("value", "low", "high"))
        rows.append(
            {
                "cluster": int(row["cluster"]),
                "n": int(row["n"]),
                "text": words.percent(value),
                "interval": words.interval(low, high, "share"),
                "at": round(100 * value, 2),
                "low": round(100 * low, 2),
                "span": round(100 * (high - low), 2),
                "broken": overall is not None and high < overall.value,
            }
        )
    return rows


def emphasised(text: str) -> Markup:
    """The sentence with its figures marked for the page's accent."""
    import re

    return Markup(re.sub(r"\d[\d.,]*(?:[×%]| (?:KB|MB|GB|%))?", lambda match: f"<b>{match[0]}</b>", str(escape(text))))


def checks(values: Mapping[str, float]) -> list[tuple[str, str]]:
    return [(words.label(name), words.number(value)) for name, value in values.items()]
