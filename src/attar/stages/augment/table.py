"""Tables: noise in the column's scale, values swapped within a cluster, rows between neighbours, masking; types and ranges are respected.

What the transforms do to a row at strength 1, each amount drawn evenly up to it for every row (frequency: how many rows they are drawn for):

| name | at strength 1 |
|---|---|
| interpolate | the row moves to one of its k nearest neighbours of the same cluster, anywhere up to it: numbers by that share of the way, anything else is taken from the neighbour with that probability (after SMOTE-NC, Chawla et al. 2002) |
| swap | up to 1/2 of the row's values change places with values of the same column in other such rows of the cluster: a column keeps its values |
| noise | numbers get Gaussian noise of up to 1/2 of the column's robust standard deviation (1.4826 · median absolute deviation) |
| mask | up to 1/2 of the row's values become null, or what the column is masked with |

Whole numbers are rounded and stay of their type; noise stays within the column's smallest and largest value; booleans, texts, categories, dates and
whole numbers that span more than 2^53 (hashes) are never averaged; nulls, NaN and infinities stay what they are unless masked.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int

from attar.errors import DataError, UsageError
from attar.records import Policy
from attar.stages.augment import dials
from attar.stages.augment.mix import as_rows, neighbour

Table: TypeAlias = Any
"""dict[str, np.ndarray] or pyarrow.Table; what is neither is refused with more to say than its type."""
TRANSFORMS = ("interpolate", "swap", "noise", "mask")
EXACT = 2.0**53
"""Whole numbers up to here are exact in float64."""


class Column(NamedTuple):
    """What the transforms have to know of a column."""

    kind: Literal["number", "integer", "category", "fixed"]  # fixed: never touched
    low: float = 0.0  # smallest and largest finite value
    high: float = 0.0
    centre: float = 0.0  # median
    scale: float = 0.0  # robust standard deviation, in the column's unit; 0 where it is constant
    mask: Any = None  # what masks a value; None for null


class _Part(NamedTuple):
    """A column in the making."""

    values: np.ndarray  # as given; of an Arrow column of numbers with 0 in place of nulls, of any other Arrow column the row numbers
    missing: Bool[np.ndarray, " rows"]  # null; of numbers also what is not finite


def describe(
    table: Table,
    *,
    categorical: Collection[str] = (),
    fixed: Collection[str] = (),
    masks: Mapping[str, Any] | None = None,
) -> dict[str, Column]:
    """Kind, range and scale of each column; of the whole table, once, for augment_table to be given with every batch of its rows.

    `categorical` names columns of numbers that are codes and must not be averaged, `fixed` those to be left alone (identifiers, targets), `masks`
    what masks a column's values in place of null. The scale is 1.4826 · the median absolute deviation, or of the mean one (1.2533) where more than
    half of the values are equal. Raises UsageError for columns there are not and DataError for a table that is none.
    """
    _rows(table)
    masks = masks or {}
    for name in (*categorical, *fixed, *masks):
        if name not in _names(table):
            raise UsageError(f"there is no column {name!r}; the table has {', '.join(_names(table))}")
    if both := set(fixed) & {*categorical, *masks}:
        raise UsageError(f"column {min(both)!r} is fixed, and so neither categorical nor masked; name it once")
    found = {}
    for name in _names(table):
        kind: Any = "fixed" if name in fixed else "category" if name in categorical else _kind(table[name])
        column = Column(kind, mask=masks.get(name))
        if kind in ("number", "integer"):
            part = _part(table[name], kind)
            column = _measured(column, part.values[~part.missing])
        found[name] = column
    return found


def augment_table(
    table: Table,
    policy: Policy | Mapping[str, Any],
    rng: np.random.Generator,
    *,
    clusters: Any = None,
    columns: Mapping[str, Column] | None = None,
    vectors: Any = None,
    neighbours: int = 5,
) -> Any:
    """Rows changed under a policy, in the type they came in: a dict of arrays (rows,), or an Arrow table with its schema.

    `clusters` holds a number per row (one cluster where None; below 0: of none, so neither swapped nor interpolated) and chooses the dials of a policy
    that has them per cluster. `columns` is what describe(whole_table) found; by default it is made of these rows. Neighbours are near by `vectors`
    (rows, d), or by the columns of numbers in units of their scale. Raises UsageError for unknown transforms, dials and columns and where null is
    asked for in a column that cannot hold it, DataError for lengths that do not fit.

    >>> table = {"age": np.array([20, 30, 40]), "name": np.array(["a", "b", "c"])}
    >>> {name: values.tolist() for name, values in augment_table(table, {"noise": 0.0}, np.random.default_rng(0)).items()}
    {'age': [20, 30, 40], 'name': ['a', 'b', 'c']}
    """
    wanted = dials.read(policy, TRANSFORMS, "tables")
    rows, found = _rows(table), columns or describe(table)
    if set(found) != set(_names(table)):
        raise UsageError(
            f"columns describes {sorted(found)}; the table has {sorted(_names(table))}: use describe on a table with the same columns"
        )
    strength = dict(zip(TRANSFORMS, dials.strengths(wanted, TRANSFORMS, rows, clusters, rng).T))
    numbers = dials.of_clusters(clusters, rows)
    parts = {name: _part(table[name], column.kind) for name, column in found.items() if column.kind != "fixed"}
    if strength["interpolate"].any():
        space = _space(parts, found, rows) if vectors is None else as_rows(vectors, rows)
        partner = neighbour(space, numbers, neighbours, rng)
        share = strength["interpolate"] * rng.random(rows)
        parts = {name: _interpolated(part, found[name], partner, share, rng) for name, part in parts.items()}
    if strength["swap"].any():
        rate = 0.5 * strength["swap"] * rng.random(rows)
        parts = {name: _swapped(part, numbers, rng.random(rows) < rate, rng) for name, part in parts.items()}
    if strength["noise"].any():
        amount = 0.5 * strength["noise"] * rng.random(rows)
        parts = {name: _noisy(part, found[name], amount, rng) for name, part in parts.items()}
    rate = 0.5 * strength["mask"] * rng.random(rows)
    masked = {name: rng.random(rows) < rate for name in parts}
    if any(own.get("mask", (0, 0))[0] > 0 for own in (wanted.families, *wanted.clusters)):
        for name in parts:
            _check_mask(table, name, found[name].mask)
    if isinstance(table, pa.Table):
        made = {name: _arrow(table[name], found[name], parts[name], masked[name]) for name in parts}
        return pa.Table.from_arrays([made.get(name, table[name]) for name in table.column_names], schema=table.schema)
    return {name: _plain(parts[name], found[name].mask, masked[name]) if name in parts else table[name] for name in table}


def _names(table: Any) -> list[str]:
    return table.column_names if isinstance(table, pa.Table) else list(table)


def _rows(table: Any) -> int:
    """How many rows a table has; raises DataError for what is no table."""
    if isinstance(table, pa.Table):
        if len(set(table.column_names)) < table.num_columns:
            raise DataError(f"two columns of one name among {table.column_names}; rename one")
        return table.num_rows
    if not isinstance(table, Mapping) or not all(isinstance(values, np.ndarray) for values in table.values()):
        raise DataError(f"a table of type {type(table).__name__}; expected a dict of name → numpy array, or a pyarrow Table")
    shapes = {name: values.shape for name, values in table.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise DataError(f"columns of shapes {shapes}; expected one value per row in each, all of one length")
    return next(iter(shapes.values()), (0,))[0]


def _kind(values: Any) -> Literal["number", "integer", "category"]:
    """What a column is by its type; whole numbers that span too much to be exact are taken as hashes."""
    if isinstance(values, pa.ChunkedArray):
        kind = "number" if pa.types.is_floating(values.type) else "integer" if pa.types.is_integer(values.type) else "category"
    else:
        kind = {"f": "number", "i": "integer", "u": "integer"}.get(values.dtype.kind, "category")
    if kind == "integer":
        part = _part(values, kind)
        held = part.values[~part.missing]
        if len(held) and int(held.max()) - int(held.min()) > EXACT:
            return "category"
    return kind  # type: ignore[return-value]


def _part(values: Any, kind: str) -> _Part:
    if isinstance(values, pa.ChunkedArray):
        missing = values.is_null().to_numpy().astype(bool)
        if kind == "category":
            return _Part(np.arange(len(values)), missing)
        plain = pc.fill_null(values, pa.scalar(0, values.type)) if missing.any() else values
        array = plain.to_numpy().copy()
    else:
        array, missing = values.copy(), np.zeros(len(values), bool)
        if kind == "category":
            return _Part(array, _null(values))
    return _Part(array, missing | ~np.isfinite(array))


def _null(values: np.ndarray) -> np.ndarray:
    """Where an array of no numbers holds None, NaN or NaT."""
    if values.dtype.kind == "O":
        return np.array([value is None or value != value for value in values], bool)
    return np.isnat(values) if values.dtype.kind in "mM" else values != values


def _measured(column: Column, held: np.ndarray) -> Column:
    if not len(held):
        return column
    low, high = held.min(), held.max()
    away = held.astype(np.float64)
    centre = float(np.median(away))
    distance = np.abs(away - centre)
    scale = 1.4826 * float(np.median(distance)) or 1.2533 * float(distance.mean())
    bounds = (int(low), int(high)) if column.kind == "integer" else (float(low), float(high))
    return column._replace(low=bounds[0], high=bounds[1], centre=centre, scale=scale)


def _space(parts: Mapping[str, _Part], columns: Mapping[str, Column], rows: int) -> Float[np.ndarray, "rows dim"]:
    """Rows as vectors: the columns of numbers about their median, in units of their scale; what is missing at the median."""
    scaled = [
        np.where(parts[name].missing, 0.0, (parts[name].values.astype(np.float64) - column.centre) / column.scale)
        for name, column in columns.items()
        if column.kind in ("number", "integer") and column.scale > 0
    ]
    return np.nan_to_num(np.stack(scaled, 1)) if scaled else np.zeros((rows, 0))


def _interpolated(
    part: _Part, column: Column, partner: Int[np.ndarray, " rows"], share: Float[np.ndarray, " rows"], rng: np.random.Generator
) -> _Part:
    chance = rng.random(len(share))
    both = ~part.missing & ~part.missing[partner] & (share > 0)
    if column.kind == "category":
        taken = both & (chance < share)
        return part._replace(values=np.where(taken, part.values[partner], part.values))
    own, other = part.values[both], part.values[partner][both]
    low, high = np.minimum(own, other), np.maximum(own, other)
    way = share[both] * (other.astype(np.float64) - own.astype(np.float64))
    return part._replace(values=_put(part.values, both, _moved(own, way, low, high)))


def _moved(values: np.ndarray, step: Float[np.ndarray, " some"], low: Any, high: Any) -> np.ndarray:
    """values + step between two bounds, in the values' type; of whole numbers rounded, exact as far as their steps are."""
    if values.dtype.kind == "f":
        return np.clip((values.astype(np.float64) + step), low, high).astype(values.dtype)
    wide = np.uint64 if values.dtype == np.uint64 else np.int64
    start, bottom, top = (np.asarray(part).astype(wide) for part in (values, low, high))
    step = np.clip(np.rint(step), -(start - bottom).astype(np.float64), (top - start).astype(np.float64))
    up, down = np.maximum(step, 0).astype(wide), np.maximum(-step, 0).astype(wide)
    return (start + up - down).astype(values.dtype)


def _put(values: np.ndarray, where: np.ndarray, made: np.ndarray) -> np.ndarray:
    out = values.copy()
    out[where] = made
    return out


def _swapped(part: _Part, clusters: np.ndarray, chosen: Bool[np.ndarray, " rows"], rng: np.random.Generator) -> _Part:
    """The chosen values of a column (nulls stay) each at the place of the next of their cluster, in a drawn order: none stays where it was."""
    values = part.values.copy()
    for places in map(rng.permutation, dials.members(np.where(chosen & ~part.missing, clusters, -1))):
        values[places] = part.values[np.roll(places, 1)]
    return part._replace(values=values)


def _noisy(part: _Part, column: Column, amount: Float[np.ndarray, " rows"], rng: np.random.Generator) -> _Part:
    draw = rng.standard_normal(len(amount))
    if column.kind not in ("number", "integer") or column.scale == 0:
        return part
    # A value that lies outside the range described stays: it may be of a row the description has not seen.
    held = ~part.missing & (amount > 0) & (part.values >= column.low) & (part.values <= column.high)
    step = amount[held] * column.scale * draw[held]
    return part._replace(values=_put(part.values, held, _moved(part.values[held], step, column.low, column.high)))


def _check_mask(table: Any, name: str, mask: Any) -> None:
    """Raises UsageError where a column cannot hold what is to mask it."""
    arrow = isinstance(table, pa.Table)
    kind = table.schema.field(name).type if arrow else table[name].dtype
    if mask is None:
        if not (table.schema.field(name).nullable if arrow else kind.kind in "fcOmM"):
            raise UsageError(
                f"mask: column {name!r} of type {kind} cannot hold a null; give describe(…, masks={{{name!r}: VALUE}}), or name it in fixed"
                + ("" if arrow else ", or use a pyarrow Table")
            )
    elif not (_fits_arrow(mask, kind) if arrow else kind.kind == "O" or _fits(mask, kind)):
        raise UsageError(f"mask: {mask!r} does not fit column {name!r} of type {kind}; give a value of that type")


def _fits(value: Any, dtype: np.dtype) -> bool:
    """Whether a value keeps its worth in a type."""
    try:
        made = np.array([value]).astype(dtype)[0]
        return bool(made == value or (made != made and value != value))
    except (TypeError, ValueError, OverflowError):
        return False


def _fits_arrow(value: Any, kind: pa.DataType) -> bool:
    try:
        return len(pa.array([value], kind)) == 1
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return False


def _plain(part: _Part, mask: Any, masked: Bool[np.ndarray, " rows"]) -> np.ndarray:
    values = part.values
    if masked.any():
        null: Any = {"O": None, "m": np.timedelta64("NaT"), "M": np.datetime64("NaT")}.get(values.dtype.kind, np.nan)
        values[masked] = null if mask is None else mask
    return values


def _arrow(values: pa.ChunkedArray, column: Column, part: _Part, masked: Bool[np.ndarray, " rows"]) -> pa.Array:
    """A column in its own type, nulls where they were, masked."""
    null = values.is_null().to_numpy().astype(bool) | (masked & (column.mask is None))
    if column.kind == "category":
        made = values.combine_chunks().take(pa.array(part.values, pa.int64(), mask=null))
    else:
        made = pa.array(part.values, values.type, mask=null)
    if column.mask is None or not masked.any():
        return made
    pool = pa.concat_arrays([made, pa.array([column.mask], values.type)])
    return pool.take(pa.array(np.where(masked, len(made), np.arange(len(made)))))
