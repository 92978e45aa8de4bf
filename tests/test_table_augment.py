"""Tables: types, ranges and nulls are respected, clusters never mixed; numpy and Arrow alike."""

from __future__ import annotations

import datetime
import doctest
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.errors import AttarError, DataError, UsageError
from attar.records import Dial, Policy
from attar.stages.augment import table as tables
from attar.stages.augment.table import TRANSFORMS, Column, augment_table, describe

ROWS = 60
ALL = dict.fromkeys(TRANSFORMS, 1.0)
MASKS = {"small": -1, "wide": 0, "flag": False, "name": "?", "hash": 0}


def plain(seed: int = 0, rows: int = ROWS) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    floats = rng.standard_normal(rows).astype(np.float32)
    floats[::7], floats[1::20] = np.nan, np.inf
    return {
        "float": floats,
        "double": rng.exponential(1e6, rows),
        "small": rng.integers(-100, 100, rows).astype(np.int8),
        "wide": (2**63 + rng.integers(0, 1000, rows).astype(np.uint64)).astype(np.uint64),
        "hash": rng.integers(-(2**63), 2**63 - 1, rows),
        "flag": rng.random(rows) < 0.3,
        "name": rng.choice(["ab", "c", "def"], rows),
        "object": np.array([None if k % 5 == 0 else f"word{k}" for k in range(rows)], object),
        "day": np.datetime64("2020-01-01") + rng.integers(0, 900, rows),
        "constant": np.full(rows, 3),
    }


def arrow(seed: int = 0, rows: int = ROWS) -> pa.Table:
    rng, base = np.random.default_rng(seed), plain(seed, rows)
    holes = rng.random((12, rows)) < 0.2
    columns = {
        "float": pa.array(base["float"], pa.float32(), mask=holes[0]),
        "half": pa.array(rng.random(rows).astype(np.float16), pa.float16(), mask=holes[1]),
        "small": pa.array(base["small"], pa.int8(), mask=holes[2]),
        "wide": pa.array(base["wide"], pa.uint64(), mask=holes[3]),
        "flag": pa.array(base["flag"], pa.bool_(), mask=holes[4]),
        "name": pa.array(base["name"].tolist(), pa.string(), mask=holes[5]),
        "kind": pa.array(base["name"].tolist(), pa.string(), mask=holes[6]).dictionary_encode(),
        "day": pa.array(base["day"].astype("datetime64[D]"), pa.date32(), mask=holes[7]),
        "money": pa.array([Decimal(int(k)) / 4 for k in rng.integers(0, 99, rows)], pa.decimal128(10, 2), mask=holes[8]),
        "list": pa.array([[k, k + 1] for k in range(rows)], pa.list_(pa.int32()), mask=holes[9]),
        "pair": pa.array([{"a": k % 100} for k in range(rows)], pa.struct([("a", pa.int8())])),
    }
    table = pa.table(columns).replace_schema_metadata({"made": "here"})
    return pa.concat_tables([table.slice(0, rows // 3), table.slice(rows // 3)])  # in chunks, as tables from files are


def clusters(rows: int = ROWS) -> np.ndarray:
    return np.r_[np.arange(rows - 2) % 3, 7, -1][-rows:]


def run(table: object, policy: object, seed: int = 0, **more: object) -> object:
    return augment_table(
        table, policy, np.random.default_rng(seed), **{"clusters": clusters(), "columns": describe(table, masks={}), **more}
    )


def same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.array([x is y or x == y or (x != x and y != y) for x, y in zip(a.tolist(), b.tolist())])


# what holds for all


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("off", [0.0, (1.0, 0.0)])
def test_strength_or_frequency_zero_is_the_identity(name: str, off: float) -> None:
    table = plain()
    made = run(table, {name: off}, columns=describe(table, masks=MASKS | {"constant": 0}))
    assert all(same(made[key], table[key]).all() and made[key].dtype == table[key].dtype for key in table)
    also, before = run(arrow(), {name: off}), arrow()
    assert also.schema.equals(before.schema, check_metadata=True)
    assert str(also.to_pydict()) == str(before.to_pydict())


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_generator_decides_and_the_input_is_not_touched(name: str) -> None:
    table, columns = plain(), describe(plain(), masks=MASKS | {"constant": 0})
    first, again, other = (run(table, {name: 1.0}, seed, columns=columns) for seed in (1, 1, 2))
    assert all(same(first[key], again[key]).all() for key in table)
    assert not all(same(first[key], other[key]).all() for key in table)
    assert all(same(table[key], plain()[key]).all() for key in table)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1000), st.floats(0.05, 1))
def test_types_ranges_values_and_nulls_are_respected(seed: int, strength: float) -> None:
    table = plain(seed)
    made = run(table, dict.fromkeys(("interpolate", "swap", "noise"), strength), seed)
    assert list(made) == list(table)
    for key, values in table.items():
        assert made[key].dtype == values.dtype
        if key in ("float", "double", "small", "wide"):
            held = np.isfinite(values)
            assert np.array_equal(np.isfinite(made[key]), held)
            assert made[key][held].min() >= values[held].min()
            assert made[key][held].max() <= values[held].max()
            assert same(made[key][~held], values[~held]).all() or key == "float"
        else:
            assert set(made[key].tolist()) <= set(values.tolist())
            assert [value is None for value in made[key].tolist()] == [value is None for value in values.tolist()]


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000))
def test_an_arrow_table_keeps_schema_nulls_and_the_values_of_what_is_no_number(seed: int) -> None:
    table = arrow(seed)
    made = run(table, {"interpolate": 1.0, "swap": 1.0, "noise": 1.0}, seed)
    made.validate(full=True)
    assert made.schema.equals(table.schema, check_metadata=True)
    for key in table.column_names:
        before, after = table[key].to_pylist(), made[key].to_pylist()
        assert [value is None for value in before] == [value is None for value in after]
        if key in ("flag", "name", "kind", "day", "money", "list", "pair"):
            assert {str(value) for value in after} <= {str(value) for value in before}
        assert key in ("pair", "flag", "name", "kind") or any(str(a) != str(b) for a, b in zip(after, before)), key


def test_arrow_and_numpy_give_the_same_numbers() -> None:
    table = {key: plain()[key] for key in ("double", "small", "flag")}
    made = run(table, {"interpolate": 1.0, "swap": 1.0, "noise": 1.0})
    also = run(pa.table(table), {"interpolate": 1.0, "swap": 1.0, "noise": 1.0})
    assert all(also[key].to_pylist() == made[key].tolist() for key in table)


# one by one


def test_noise_is_gaussian_in_units_of_the_robust_scale() -> None:
    rng = np.random.default_rng(0)
    values = np.r_[rng.normal(50, 2, 4000), np.full(200, 1e6)]  # outliers blow up a plain deviation
    found = describe({"x": values})["x"]
    assert found.scale == pytest.approx(2, rel=0.1)
    made = run({"x": values}, {"noise": 1.0}, clusters=None)["x"]
    step = (made - values)[:4000]
    # amount u/2 · scale · N(0,1), u even in 0 … 1: second moment scale² / 12
    assert step.std() == pytest.approx(found.scale / np.sqrt(12), rel=0.06)
    assert 0.4 < (run({"x": values}, {"noise": (1.0, 0.5)}, clusters=None)["x"] != values).mean() < 0.6


def test_columns_that_hardly_vary_or_not_at_all() -> None:
    mostly = np.r_[np.zeros(90), np.arange(1.0, 11)]
    assert describe({"x": mostly})["x"].scale == pytest.approx(1.2533 * mostly.mean())
    assert describe({"x": np.full(9, 4)})["x"] == Column("integer", 4, 4, 4.0, 0.0)
    assert (run({"x": np.full(9, 4)}, {"noise": 1.0}, clusters=None)["x"] == 4).all()
    assert describe({"x": np.array([np.nan, np.inf])})["x"] == Column("number")


def test_what_describe_found_of_the_whole_table_bounds_a_batch() -> None:
    columns = describe({"age": np.arange(101)})
    batch = {"age": np.array([0, 100, 120] * 300)}
    made = run(batch, {"noise": 1.0}, columns=columns, clusters=None)["age"]
    assert made.min() == 0
    assert made.reshape(-1, 3)[:, :2].max() == 100
    assert (made.reshape(-1, 3)[:, 2] == 120).all()
    assert (made.reshape(-1, 3)[:, 0] > 10).any()


@pytest.mark.parametrize("given", ["plain", "arrow"])
def test_a_swap_keeps_each_cluster_s_values_of_each_column(given: str) -> None:
    table = plain() if given == "plain" else arrow()
    made = run(table, {"swap": 1.0}, 3)
    moved = 0
    for key in table if given == "plain" else table.column_names:
        before, after = (
            np.array([str(value) for value in side[key].tolist()] if given == "plain" else [str(v) for v in side[key].to_pylist()])
            for side in (table, made)
        )
        for cluster in (0, 1, 2):
            own = clusters() == cluster
            assert sorted(before[own]) == sorted(after[own])
            moved += (before[own] != after[own]).sum()
        assert (before[-2:] == after[-2:]).all()  # alone in its cluster, and of none
    assert moved > 50


def test_interpolated_rows_lie_between_a_row_and_a_near_one_of_its_cluster() -> None:
    rng, rows = np.random.default_rng(0), 90
    kind = np.arange(rows) % 3
    table = {
        "x": rng.normal(kind * 100, 1, rows),
        "y": (rng.normal(kind * 100, 5, rows)).astype(np.int32),
        "label": np.array(["a", "b", "c"])[kind],
    }
    vectors = np.stack([table["x"], table["y"]], 1)
    made = run(table, {"interpolate": 1.0}, clusters=kind, vectors=vectors, neighbours=2)
    assert (made["label"] == table["label"]).all()
    for row in range(rows):
        others = [other for other in np.flatnonzero(kind == kind[row]) if other != row]
        nearest = sorted(others, key=lambda other: np.linalg.norm(vectors[other] - vectors[row]))[:2]
        shares = [(made["x"][row] - table["x"][row]) / (table["x"][other] - table["x"][row]) for other in nearest]
        wanted = [round(table["y"][row] + share * (float(table["y"][other]) - table["y"][row])) for share, other in zip(shares, nearest)]
        assert any(0 <= share <= 1 and abs(goal - made["y"][row]) <= 1 for share, goal in zip(shares, wanted))
    assert (made["x"] != table["x"]).mean() > 0.9


def test_categories_come_from_the_neighbour_as_often_as_its_share_and_codes_are_never_averaged() -> None:
    rows = 4000
    table = {"x": np.arange(rows) % 2 * 1.0, "code": np.arange(rows) % 2 * 10, "id": np.arange(rows)}
    columns = describe(table, categorical=["code"], fixed=["id"])
    made = run(table, {"interpolate": 1.0}, clusters=None, columns=columns, vectors=np.zeros((rows, 0)))
    assert set(made["code"].tolist()) == {0, 10}
    assert (made["id"] == np.arange(rows)).all()
    assert (made["code"] != table["code"]).mean() == pytest.approx(
        0.25, abs=0.03
    )  # half have another partner, half of their share on average
    assert np.abs(made["x"] - table["x"]).mean() == pytest.approx(0.25, abs=0.03)
    bare = {"name": np.array(["a", "b"] * 50)}
    assert (run(bare, {"interpolate": 1.0}, clusters=None)["name"] != bare["name"]).any()


def test_masking_gives_null_or_what_the_column_is_masked_with() -> None:
    table, rows = arrow(rows=600), 600
    made = run(table, {"mask": 1.0}, clusters=None, columns=describe(table, masks={"small": 99, "kind": "none", "name": "?", "flag": True}))
    for key in table.column_names:
        before, after = table[key].to_pylist(), made[key].to_pylist()
        mask = {"small": 99, "kind": "none", "name": "?", "flag": True}.get(key)
        changed = np.array([str(a) != str(b) for a, b in zip(before, after)])
        assert all(after[k] == mask for k in np.flatnonzero(changed))
        assert 0.1 < changed.sum() / rows < 0.3
    assert made.schema.equals(table.schema)
    base = plain()
    also = run(base, {"mask": 1.0}, clusters=None, columns=describe(base, masks=MASKS, fixed=["constant"]))
    assert np.isnan(also["double"]).any()
    assert np.isnat(also["day"]).any()
    assert (also["small"] == -1).any()
    assert (also["name"] == "?").any()
    assert all(also[key].dtype == base[key].dtype for key in base)


def test_clusters_choose_the_dials() -> None:
    table = {"x": np.arange(300.0)}
    policy = Policy(families={"noise": Dial(0.0, 1.0)}, clusters=({"noise": Dial(1.0, 1.0)}, {"noise": Dial(0.0, 0.0)}))
    number = np.arange(300) % 3
    changed = augment_table(table, policy, np.random.default_rng(0), clusters=number)["x"] != table["x"]
    assert changed[number == 0].mean() > 0.95
    assert not changed[number != 0].any()


def test_no_rows_and_one_row_survive() -> None:
    for rows in (0, 1):
        table = {key: values[:rows] for key, values in plain().items() if key not in MASKS and key != "constant"}
        assert all(len(values) == rows for values in augment_table(table, ALL, np.random.default_rng(0)).values())
        assert augment_table(arrow().slice(0, rows), ALL, np.random.default_rng(0)).num_rows == rows
    assert augment_table({}, ALL, np.random.default_rng(0)) == {}


@pytest.mark.parametrize(
    ("table", "policy", "more", "error", "message"),
    [
        ({"x": np.arange(3)}, {"nose": 1.0}, {}, UsageError, "there is no transform 'nose' of tables. Did you mean 'noise'? Known are: interpolate, swap"),
        ({"x": np.arange(3)}, {"noise": -0.1}, {}, UsageError, "noise: strength -0.1 is outside 0 … 1"),
        ({"x": np.arange(3), "y": np.arange(4)}, {}, {}, DataError, "columns of shapes {'x': (3,), 'y': (4,)}; expected one value per row in each"),
        ({"x": np.zeros((3, 2))}, {}, {}, DataError, "columns of shapes {'x': (3, 2)}"),
        ([1, 2], {}, {}, DataError, "a table of type list; expected a dict of name → numpy array, or a pyarrow Table"),
        ({"x": np.arange(3)}, {}, {"clusters": [0]}, DataError, "clusters of shape (1,) for 3 items"),
        ({"x": np.arange(3)}, {"interpolate": 1.0}, {"vectors": np.zeros((2, 2))}, DataError, "2 vectors for 3 items"),
        ({"x": np.arange(3)}, {}, {"columns": {"y": Column("number")}}, UsageError, "columns describes ['y']; the table has ['x']: use describe"),
        ({"x": np.arange(3)}, {"mask": 0.1}, {}, UsageError, "mask: column 'x' of type int64 cannot hold a null; give describe(…, masks={'x': VALUE})"),
        ({"x": np.arange(3)}, {"mask": 0.1}, {"columns": {"x": Column("integer", mask=0.5)}}, UsageError, "mask: 0.5 does not fit column 'x' of type int64"),
        ({"x": np.array(["ab"])}, {"mask": 0.1}, {"columns": {"x": Column("category", mask="abc")}}, UsageError, "mask: 'abc' does not fit column 'x'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(table: object, policy: dict, more: dict, error: type[AttarError], message: str) -> None:
    with pytest.raises(error) as caught:
        augment_table(table, policy, np.random.default_rng(0), **more)
    assert message in str(caught.value)


def test_arrow_columns_that_cannot_hold_the_mask_and_columns_there_are_not() -> None:
    strict = pa.table({"x": pa.array([1, 2])}, pa.schema([pa.field("x", pa.int64(), nullable=False)]))
    with pytest.raises(UsageError, match="mask: column 'x' of type int64 cannot hold a null; give describe"):
        augment_table(strict, {"mask": 0.1}, np.random.default_rng(0))
    with pytest.raises(UsageError, match="mask: 'a' does not fit column 'x' of type int64; give a value of that type"):
        augment_table(strict, {"mask": 0.1}, np.random.default_rng(0), columns=describe(strict, masks={"x": "a"}))
    with pytest.raises(UsageError, match="there is no column 'z'; the table has x"):
        describe(strict, fixed=["z"])
    with pytest.raises(UsageError, match="column 'x' is fixed, and so neither categorical nor masked; name it once"):
        describe(strict, fixed=["x"], masks={"x": 0})
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], ["x", "x"])
    with pytest.raises(DataError, match="two columns of one name"):
        describe(twice)


def test_dates_and_the_example_in_the_docs() -> None:
    made = run({"day": np.array([datetime.date(2020, 1, k + 1) for k in range(9)], object)}, {"swap": 1.0, "mask": 1.0}, clusters=None)
    assert made["day"].dtype == object
    assert doctest.testmod(tables).failed == 0
    assert doctest.testmod(tables).attempted
