"""Charts as inline SVG: numbers in, markup out. Colours and type come from style.css, so light, dark and print need nothing here."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup, escape

from attar.stages.report import words

LOG_FROM = 12.0  # costs that differ by more than this factor are drawn on a logarithmic axis
GOLDEN = 0.6180339887  # successive multiples keep hues apart however many there are


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """An element with escaped text and attributes; `_` in attribute names stands for `-`, and numbers are rounded to a tenth."""
    parts = "".join(
        f' {key.strip("_").replace("_", "-")}="{escape(_round(value) if isinstance(value, float) else value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{parts}>{''.join(escape(child) for child in children)}</{name}>")


def _round(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def hue(cluster: int) -> str:
    """The colour of a cluster as CSS variables: hue in degrees, and a step of lightness so that neighbours in hue still differ."""
    return f"--h:{round(360 * ((0.02 + cluster * GOLDEN) % 1))};--s:{cluster % 3}"


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high].

    >>> ticks(0, 1, 5)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    raw = (high - low) / max(wanted, 1)
    if raw <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round((first + i) * step, 12) for i in range(math.floor(high / step + 1e-9) - first + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [m * 10.0**p for p in powers for m in (1, 2, 5)]
    inside = [mark for mark in marks if low <= mark <= high]
    return inside if len(inside) <= 7 else [mark for mark in inside if f"{mark:e}"[0] == "1"]


class Axis(NamedTuple):
    low: float
    high: float
    start: float  # pixels
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return self.start + (value - low) / ((high - low) or 1) * (self.end - self.start)

    def ticks(self, wanted: int = 5) -> list[float]:
        return _log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high, wanted)


def _frame(x: Axis, y: Axis, across: Callable[[float], str], up: Callable[[float], str], title: str) -> list[Markup]:
    """Hairlines and labels of both axes; the vertical axis has no line of its own."""
    parts = []
    for value in y.ticks(4):
        at = y(value)
        parts.append(tag("line", x1=x.start, x2=x.end, y1=at, y2=at, class_="grid"))
        parts.append(tag("text", up(value), x=x.start - 8, y=at + 4, class_="tick end"))
    for value in x.ticks():
        parts.append(tag("text", across(value), x=x(value), y=y.start + 20, class_="tick mid"))
    parts.append(tag("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="axis"))
    parts.append(tag("text", title, x=x.end, y=y.start + 40, class_="name end"))
    return parts


def _svg(width: int, height: int, label: str, children: Sequence[Markup], kind: str = "") -> Markup:
    return tag("svg", *children, viewBox=f"0 0 {width} {height}", role="img", aria_label=label, class_=f"chart {kind}".strip())


def line(
    points: Sequence[tuple[float, float]],
    *,
    title: str,
    across: str,
    marked: float | None = None,
    mark: str = "",
    second: tuple[str, Sequence[tuple[float, float]]] | None = None,
    width: int = 400,
    height: int = 220,
) -> Markup:
    """A curve of (x, y) points with one x marked; `second` is a further curve on the same axes, dashed and named."""
    every = [*points, *(second[1] if second else ())]
    xs, ys = [p[0] for p in every], [p[1] for p in every]
    pad = (max(ys) - min(ys)) * 0.1 or abs(max(ys)) * 0.1 or 1.0
    x = Axis(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, 48, width - 14)
    y = Axis(min(ys) - pad, max(ys) + pad, height - 48, 14)
    parts = _frame(x, y, words.number, words.number, across)
    if second:
        parts.append(tag("path", d=_path(second[1], x, y), class_="curve second"))
        end = max(second[1])
        parts.append(tag("text", second[0], x=x(end[0]), y=y(end[1]) - 8, class_="note end"))
    parts.append(tag("path", d=_path(points, x, y), class_="curve"))
    if len(points) <= 40:
        parts += [
            tag("circle", tag("title", f"{words.number(a)}: {words.number(b)}"), cx=x(a), cy=y(b), r=2.5, class_="dot") for a, b in points
        ]
    chosen = next((p for p in points if p[0] == marked), None)
    if chosen:
        at, side = x(chosen[0]), "end" if x(chosen[0]) > width * 0.6 else ""
        parts.append(tag("line", x1=at, x2=at, y1=y.start, y2=y.end, class_="mark"))
        parts.append(tag("circle", cx=at, cy=y(chosen[1]), r=5, class_="chosen"))
        parts.append(tag("text", mark, x=at + (-10 if side else 10), y=y.end + 12, class_=f"strong {side}".strip()))
    return _svg(width, height, f"{title} by {across}", parts, "line")


def _path(points: Sequence[tuple[float, float]], x: Axis, y: Axis) -> str:
    return "M" + "L".join(f"{_round(x(a))},{_round(y(b))}" for a, b in sorted(points))


class Dot(NamedTuple):
    """One candidate on the Pareto chart."""

    name: str
    cost: float  # in the unit of the axis
    keeps: float  # agreement, a share
    kind: str  # "original", "float32", "float16", "int8"
    chosen: bool
    says: str  # its figures in words


def front_of(dots: Sequence[Dot]) -> list[Dot]:
    """The dots that no other beats: none costs less (or the same) and keeps more (or the same)."""
    best, kept = -math.inf, []
    for dot in sorted(dots, key=lambda d: (d.cost, -d.keeps)):
        if dot.keeps > best:
            kept.append(dot)
            best = dot.keeps
    return kept


def pareto(dots: Sequence[Dot], *, title: str, most: float | None, least: float | None, width: int = 420, height: int = 330) -> Markup:
    """Agreement against a cost, both bounded by the budget (`most` cost, `least` agreement) where it says so; better is up and left."""
    costs = [d.cost for d in dots] + ([most] if most else [])
    keeps = [d.keeps for d in dots] + ([least] if least is not None else [])
    log = min(costs) > 0 and max(costs) / min(costs) > LOG_FROM
    x = Axis(min(costs) / 1.35 if log else 0.0, max(costs) * (1.35 if log else 1.1), 56, width - 16, log)
    span = max(max(keeps) - min(keeps), 0.01)
    y = Axis(max(min(keeps) - 0.12 * span, 0.0), max(keeps) + 0.12 * span, height - 56, 16)
    parts = _frame(x, y, words.number, lambda v: f"{100 * v:.3g} %", title)
    if most:
        parts.append(tag("line", x1=x(most), x2=x(most), y1=y.start, y2=y.end, class_="limit"))
    if least is not None:
        parts.append(tag("line", x1=x.start, x2=x.end, y1=y(least), y2=y(least), class_="limit"))
    best = front_of(dots)
    stairs = f"M{_round(x(best[0].cost))},{_round(y(best[0].keeps))}" + "".join(
        f"H{_round(x(d.cost))}V{_round(y(d.keeps))}" for d in best[1:]
    )
    parts.append(tag("path", d=stairs, class_="front"))
    for dot in sorted(dots, key=lambda d: d.chosen):
        parts += _dot(dot, x, y, dot in best)
    return _svg(width, height, f"agreement by {title}", parts, "pareto")


def _dot(dot: Dot, x: Axis, y: Axis, best: bool) -> list[Markup]:
    cx, cy = x(dot.cost), y(dot.keeps)
    text = tag("title", f"{dot.name}: {dot.says}")
    kind = f"{dot.kind}{' best' if best else ''}{' chosen' if dot.chosen else ''}"
    if dot.kind == "original" and not dot.chosen:
        parts = [tag("rect", text, x=cx - 5, y=cy - 5, width=10, height=10, class_=kind)]
    else:
        parts = [tag("circle", text, cx=cx, cy=cy, r=7 if dot.chosen else 4.5, class_=kind)]
    if dot.chosen or dot.kind == "original":
        # Up and left of a candidate that no other beats there is nothing, so that is where its name goes if the axis leaves room.
        side = "end" if cx - x.start > 90 else ""
        name = "chosen: the original" if dot.chosen and dot.kind == "original" else "chosen" if dot.chosen else "original"
        parts.append(
            tag("text", name, x=cx + (-8 if side else 8), y=cy - 10, class_=f"strong {side} {'accent' if dot.chosen else ''}".strip())
        )
    return parts


class Picture(NamedTuple):
    """A photo on the map."""

    row: int  # of the map's points
    uri: str
    title: str


def place(points: np.ndarray, first: Sequence[int], gap: float, limit: int) -> list[int]:
    """Rows of (n, 2) points that lie at least `gap` apart (larger of the two coordinate differences), those of `first` before all others.

    Greedy, in row order; at most `limit` rows.
    """
    kept: list[int] = []
    for row in (*first, *range(len(points))):
        if len(kept) == limit:
            break
        if not kept or np.abs(points[kept] - points[row]).max(axis=1).min() >= gap:
            kept.append(row)
    return kept


def fit(points: np.ndarray, width: int, height: int, margin: int) -> np.ndarray:
    """(n, 2) coordinates moved and scaled into a frame."""
    low, high = points.min(axis=0), points.max(axis=0)
    unit = (points - low) / np.where(high > low, high - low, 1)
    return margin + unit * (np.array([width, height]) - 2 * margin)


def cluster_map(
    spots: np.ndarray,
    clusters: np.ndarray,
    ids: Sequence[int],
    titles: Sequence[str],
    pictures: Sequence[Picture],
    side: int,
    width: int,
    height: int,
) -> Markup:
    """Items at their spots (n, 2) in cluster colours, some as photos of `side` pixels, each cluster's number at its median."""
    parts = [
        tag("circle", tag("title", title), cx=float(x), cy=float(y), r=3.2, style=hue(int(c)), data_i=i)
        for (x, y), c, i, title in zip(spots, clusters, ids, titles)
    ]
    for picture in pictures:
        (x, y), c = spots[picture.row], int(clusters[picture.row])
        box = {"x": float(x - side / 2), "y": float(y - side / 2), "width": side, "height": side}
        parts.append(
            tag(
                "g",
                tag("image", href=picture.uri, preserveAspectRatio="xMidYMid slice", **box),
                tag("rect", tag("title", picture.title), rx=3, **box),
                style=hue(c),
                data_i=ids[picture.row],
            )
        )
    for cluster in sorted(set(map(int, clusters))):
        x, y = np.median(spots[clusters == cluster], axis=0)
        parts.append(
            tag(
                "g",
                tag("circle", cx=float(x), cy=float(y), r=14),
                tag("text", cluster, x=float(x), y=float(y + 5)),
                style=hue(cluster),
                class_="number",
            )
        )
    return _svg(width, height, "map of the items, coloured by cluster", parts, "map")


def signals(rows: Sequence[Mapping[str, float]], across: str = "step") -> list[tuple[str, Markup]]:
    """One small chart per quantity of a training curve, validation drawn on the axes of what it validates."""
    names = [name for name in dict.fromkeys(key for row in rows for key in row) if name != across]
    series = {name: [(float(row[across]), float(row[name])) for row in rows if across in row and _finite(row.get(name))] for name in names}
    charts = []
    for name, points in series.items():
        base = name.removeprefix("validation").strip("_ ")
        if len(points) < 2 or (base != name and len(series.get(base, ())) >= 2):
            continue
        partner = next((other for other in names if other != name and other.removeprefix("validation").strip("_ ") == name), None)
        second = ("validation", series[partner]) if partner and len(series[partner]) >= 2 else None
        charts.append((words.label(name), line(points, title=words.label(name), across=words.label(across), second=second)))
    return charts


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
