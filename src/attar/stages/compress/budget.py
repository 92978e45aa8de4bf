"""The budget: what the small model must meet, as text and as constraints."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from attar.errors import UsageError

UNITS = {
    "size": {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20},
    "latency": {"ms": 1, "s": 1e3, "us": 1e-3},
    "macs": {"": 1, "k": 1e3, "m": 1e6, "g": 1e9},
    "parameters": {"": 1, "k": 1e3, "m": 1e6},
    "agreement": {"": 1, "%": 0.01},
}


class Constraint(NamedTuple):
    metric: str  # a key of UNITS
    limit: float  # bytes, ms, MACs, parameters or a share; a ratio to the original when relative
    relative: bool

    def value(self, figures: Mapping[str, float]) -> float:
        """The figure a candidate is judged by. Agreement counts one standard error below what n items showed, so that the best of a dozen
        candidates is not one that was merely lucky on a small validation split."""
        value = figures[f"{self.metric}_ratio" if self.relative else self.metric]
        return value - math.sqrt(value * (1 - value) / figures["n"]) if self.metric == "agreement" else value

    def met(self, figures: Mapping[str, float]) -> bool:
        value = self.value(figures)
        return value >= self.limit if self.metric == "agreement" else value <= self.limit

    def shortfall(self, figures: Mapping[str, float]) -> float:
        """By what factor the limit is missed; 1 or less when met."""
        value = self.value(figures)
        return (1 - value) / max(1 - self.limit, 1e-9) if self.metric == "agreement" else value / max(self.limit, 1e-30)

    def __str__(self) -> str:
        return f"{self.metric}{'>=' if self.metric == 'agreement' else '<='}{self.limit:g}{'x' if self.relative else 'ms' if self.metric == 'latency' else ''}"


def excess(constraints: Iterable[Constraint], figures: Mapping[str, float]) -> float:
    """By what factor the worst of several limits is missed; 1 or less when all are met, 0 when there are none."""
    return max((constraint.shortfall(figures) for constraint in constraints), default=0.0)


def parse_budget(text: str) -> tuple[Constraint, ...]:
    """Constraints of a budget such as "latency<=0.5x, agreement>=0.98"; raises UsageError naming the part that cannot be read.

    >>> [str(c) for c in parse_budget("size<=3MB, latency<=0.5x, agreement>=0.98")]
    ['size<=3e+06', 'latency<=0.5x', 'agreement>=0.98']
    """
    constraints = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        match = re.fullmatch(r"(\w+)\s*(<=|>=|<|>|=)\s*([0-9]*\.?[0-9]+(?:e[+-]?\d+)?)\s*(\S*)", part, re.IGNORECASE)
        if not match or match[1].lower() not in UNITS:
            raise UsageError(
                f"cannot read {part!r}; expected parts like size<=3MB, latency<=0.5x, macs<=0.5x, parameters<=1M or agreement>=0.98"
            )
        metric, sign, number, unit = match[1].lower(), match[2], float(match[3]), match[4].lower()
        wanted = ">=" if metric == "agreement" else "<="
        if sign[0] != wanted[0]:
            raise UsageError(f"{part!r}: {metric} is bounded with {wanted}")
        relative = unit == "x" and metric != "agreement"
        if not relative and unit not in UNITS[metric]:
            known = ", ".join(filter(None, UNITS[metric])) or "a plain number"
            raise UsageError(
                f"{part!r}: unknown unit {match[4]!r} for {metric}; expected {known}{'' if metric == 'agreement' else ', or x for a ratio to the original'}"
            )
        limit = number if relative else number * UNITS[metric][unit]
        if metric == "agreement" and not 0 <= limit <= 1:
            raise UsageError(f"{part!r}: agreement is a share, 0 to 1")
        constraints.append(Constraint(metric, limit, relative))
    return tuple(constraints)
