"""Dials: read and checked, whatever they turn; then drawn for each item of what is not an image. Pure numpy."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from attar.errors import DataError, UsageError
from attar.records import Dial, Policy

FULL, OFF = Dial(1.0, 1.0), Dial(0.0, 0.0)


def dial(value: Any, name: str) -> Dial:
    """A dial from a strength, from (strength, frequency) or as it is; both between 0 and 1, else a UsageError."""
    parts = (value, 1.0) if np.ndim(value) == 0 else tuple(value)
    if len(parts) != 2 or not all(isinstance(part, Real) and not isinstance(part, bool) for part in parts):
        raise UsageError(f"{name}: {value!r} is no dial; give a strength, or strength and frequency, each between 0 and 1")
    for part, number in zip(Dial._fields, parts):
        if not 0 <= number <= 1:  # also refuses NaN
            raise UsageError(f"{name}: {part} {str(number)[:20]} is outside 0 … 1; 0 leaves items as they are, 1 is the full range")
    return Dial(float(parts[0]), float(parts[1]))


def read(policy: Policy | Mapping[str, Any], known: Collection[str], what: str, where: str = "") -> Policy:
    """A policy with checked dials, from one or from {name: strength or (strength, frequency)}.

    `what` says whose transforms are known, `where` the file it was read from. Raises UsageError for what is not understood.
    """
    policy = policy if isinstance(policy, Policy) else Policy(families=policy, method="given")
    said = f"{where}: " if where else ""

    def checked(dials: Mapping[str, Any]) -> dict[str, Dial]:
        for name in dials:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, 1)
                meant = f" Did you mean {near[0]!r}?" if near else ""
                raise UsageError(f"{said}there is no transform {name!r} of {what}.{meant} Known are: {', '.join(known)}")
        return {name: dial(value, f"{said}{name}") for name, value in dials.items()}

    pick = policy.pick
    if pick is not None and (isinstance(pick, bool) or not isinstance(pick, int) or pick < 1):
        raise UsageError(f"{said}pick is {pick!r}; expected how many transforms each item gets, a whole number from 1, or None")
    return replace(policy, families=checked(policy.families), clusters=tuple(checked(dials) for dials in policy.clusters))


def of_clusters(clusters: Any, count: int) -> np.ndarray:
    """Cluster number of each of `count` items, all 0 where None is given; raises DataError for another number of them or for fractions."""
    if clusters is None:
        return np.zeros(count, np.int64)
    numbers = np.asarray(clusters)
    if numbers.shape != (count,):
        raise DataError(f"clusters of shape {numbers.shape} for {count} items; expected one cluster number per item, shape ({count},)")
    if count and numbers.dtype.kind not in "iu":
        raise DataError(f"clusters of type {numbers.dtype}; expected whole numbers (below 0: of no cluster)")
    return numbers.astype(np.int64)


def members(clusters: Int[np.ndarray, " items"]) -> list[Int[np.ndarray, " members"]]:
    """Numbers of the items of each cluster, in ascending order both; items of no cluster (below 0) are in none."""
    order = np.argsort(clusters, kind="stable")
    order = order[clusters[order] >= 0]
    return [part for part in np.split(order, np.flatnonzero(np.diff(clusters[order])) + 1) if len(part)]


def strengths(
    policy: Policy, names: Sequence[str], count: int, clusters: Any, rng: np.random.Generator
) -> Float[np.ndarray, "items transforms"]:
    """Strength of each transform for each item, 0 where it was not drawn.

    Each is drawn with its own frequency; or, where the policy picks k, k of those that are not off are drawn evenly. Items of a cluster without
    dials of its own, or of no cluster, have the global ones.
    """
    rows = [policy.families, *policy.clusters]
    table = np.array([[dials.get(name, (0.0, 0.0)) for name in names] for dials in rows], np.float64).reshape(len(rows), len(names), 2)
    numbers = of_clusters(clusters, count)
    known = (clusters is not None) & (numbers >= 0) & (numbers < len(policy.clusters))
    strength, frequency = np.moveaxis(table[np.where(known, numbers + 1, 0)], 2, 0)
    chance = rng.random((count, len(names)))
    if policy.pick is None:
        return np.where(chance < frequency, strength, 0.0)
    chance[(strength == 0) | (frequency == 0)] = np.inf
    first = np.argsort(np.argsort(chance, 1), 1) < policy.pick
    return np.where(first & np.isfinite(chance), strength, 0.0)
