from __future__ import annotations

import itertools
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.errors import DataError, UsageError
from attar.stages.curate.pairs import EDGE, LEAF, Pairs, box_order, groups, make_plan, norms, shadows, similar_pairs, slack

MODULE = "attar.stages.curate.pairs"


def brute(rows: np.ndarray, threshold: float, other: np.ndarray | None = None) -> dict[tuple[int, int], float]:
    """The definition, written slowly: every pair in float64."""
    a = rows.astype(np.float64)
    b = a if other is None else other.astype(np.float64)
    cosine = (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)
    wanted = cosine >= threshold - EDGE
    if other is None:
        wanted &= np.triu(np.ones_like(wanted), 1)
    return {(int(i), int(j)): float(cosine[i, j]) for i, j in zip(*np.nonzero(wanted))}


def found(rows: np.ndarray, threshold: float, other: np.ndarray | None = None, **options: int) -> dict[tuple[int, int], float]:
    pieces = list(similar_pairs(rows, threshold, other, **options))
    out = {(int(i), int(j)): float(c) for piece in pieces for i, j, c in zip(*piece)}
    assert len(out) == sum(len(piece.left) for piece in pieces), "no pair twice"
    return out


def made(kind: str, count: int, dim: int, seed: int) -> np.ndarray:
    """Unit vectors of several characters, with near and exact copies planted."""
    rng = np.random.default_rng(seed)
    if kind == "even":
        rows = rng.normal(size=(count, dim))
    elif kind == "clustered":
        rows = rng.normal(size=(7, dim))[rng.integers(0, 7, count)] + 0.3 * rng.normal(size=(count, dim))
    elif kind == "flat":  # two dimensions of many: nothing is cut off
        rows = rng.normal(size=(count, 2)) @ rng.normal(size=(2, dim))
    else:  # few distinct rows
        rows = rng.normal(size=(3, dim))[rng.integers(0, 3, count)]
    planted = rng.integers(0, count, count // 5)
    noise = 10.0 ** rng.uniform(-6, -1, (len(planted), 1)) * rng.normal(size=(len(planted), dim))
    rows[rng.integers(0, count, len(planted))] = rows[planted] + noise
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@given(
    st.sampled_from(["even", "clustered", "flat", "copies"]),
    st.integers(2, 300),
    st.sampled_from([1, 2, 3, 12, 40, 130]),
    st.integers(0, 10**6),
    st.sampled_from([1.0, 0.999999, 0.97, 0.9, 0.5, 0.0, -1.0]),
    st.sampled_from([np.float16, np.float32]),
)
@settings(max_examples=40, deadline=None)
def test_all_pairs_are_those_of_brute_force(kind, count, dim, seed, threshold, dtype):
    rows = made(kind, count, dim, seed).astype(dtype)
    if not np.linalg.norm(rows, axis=1).all():  # an underflow of the maker
        return
    expected, got = brute(rows, threshold), found(rows, threshold)
    edge = {pair for pair in expected.keys() ^ got.keys()}
    assert all(abs(brute(rows, -1)[pair] - threshold) < 3e-12 for pair in edge), "only where float64 itself cannot tell"
    for pair in expected.keys() & got.keys():
        assert got[pair] == pytest.approx(expected[pair], abs=1e-7)


@pytest.mark.parametrize("kind", ["even", "clustered", "flat", "copies"])
def test_many_boxes_lose_nothing(kind, monkeypatch):
    monkeypatch.setattr(sys.modules[MODULE], "LEAF", 64)
    monkeypatch.setattr(sys.modules[MODULE], "STRIP", 3)
    rows = made(kind, 700, 48, 1).astype(np.float16)
    assert found(rows, 0.95).keys() == brute(rows, 0.95).keys()
    assert found(rows[:130], 0.95, rows[100:]).keys() == brute(rows[:130], 0.95, rows[100:]).keys()


def test_two_sets(monkeypatch):
    rows, other = made("clustered", 900, 64, 2).astype(np.float32), made("clustered", 700, 64, 3).astype(np.float16)
    other[:50] = rows[200:250]
    expected = brute(rows, 0.9, other)
    assert len(expected) >= 50
    assert found(rows, 0.9, other).keys() == expected.keys()
    assert list(similar_pairs(rows, 0.9, other[:0])) == []
    assert list(similar_pairs(rows[:0], 0.9)) == []


@pytest.mark.parametrize("memory", [0, 9 * 8 * 800, 1 << 30])
def test_any_memory_and_any_number_of_workers_give_the_same(memory):
    rows = made("clustered", 800, 96, 4).astype(np.float16)
    expected = brute(rows, 0.93)
    assert len(expected) > 100
    one = list(similar_pairs(rows, 0.93, memory_bytes=memory))
    two = list(similar_pairs(rows, 0.93, memory_bytes=memory, workers=2))
    assert {(i, j) for piece in one for i, j in zip(piece.left.tolist(), piece.right.tolist())} == expected.keys()
    for a, b in zip(one, two, strict=True):
        assert all((x == y).all() for x, y in zip(a, b, strict=True))


def test_a_threshold_on_the_edge_is_reached():
    # 3-4-5 triangles: cosines are exactly 24/25 in any arithmetic, thousands of times
    rows = np.array([[3, 4], [4, 3]], np.float16)[np.arange(600) % 2] * np.float16(2)
    assert len(found(rows, 0.96)) == 600 * 599 // 2
    assert len(found(rows, 0.9600000001)) == 2 * (300 * 299 // 2)
    twins = made("even", 40, 384, 0).astype(np.float16)
    assert found(np.r_[twins, twins], 1.0).keys() == {(i, i + 40) for i in range(40)}


def test_mapped_files_and_lengths_of_rows_make_no_difference(tmp_path):
    rows = made("clustered", 500, 64, 5).astype(np.float32)
    rows[::2] *= 7
    rows.tofile(tmp_path / "rows")
    mapped = np.memmap(tmp_path / "rows", np.float32, "r").reshape(500, 64)
    assert found(mapped, 0.9) == found(rows, 0.9)
    assert found(mapped, 0.9).keys() == brute(rows, 0.9).keys()


@given(st.integers(0, 10**6), st.integers(3, 60), st.integers(1, 30))
@settings(max_examples=50, deadline=None)
def test_bounds_are_never_below_the_cosine(seed, dim, width):
    rows = made("clustered", 40, dim, seed).astype(np.float32)
    axes = np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0][:, : min(width, dim)]
    bound = shadows(rows, norms(rows), axes)
    exact = rows.astype(np.float64) @ rows.T.astype(np.float64)
    exact /= np.outer(norms(rows), norms(rows))
    product = bound @ bound.T
    assert product.dtype == np.float32
    assert (product + slack(bound.shape[1]) >= exact).all()


def test_plans_prune_where_they_can_and_give_up_where_they_cannot():
    steep = np.random.default_rng(0).normal(size=(1000, 384)) * 0.93 ** np.arange(384)
    plan = make_plan(steep / np.linalg.norm(steep, axis=1, keepdims=True), 0.97)
    assert 0 < plan.coarse <= 48
    assert plan.axes is not None
    np.testing.assert_allclose(plan.axes.T @ plan.axes, np.eye(plan.axes.shape[1]), atol=1e-12)
    assert make_plan(made("even", 500, 100, 0), 0.1).axes is None
    assert make_plan(made("even", 500, 2, 0), 0.9).axes is None
    assert make_plan(steep, 0.97, widest=4).axes is None, "no memory for bounds"


@given(st.integers(1, 3000), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_box_order_is_a_permutation(count, seed):
    points = np.random.default_rng(seed).normal(size=(count, 3)).astype(np.float32)
    assert sorted(box_order(points, 64).tolist()) == list(range(count))


def test_boxes_of_separate_clusters_are_not_multiplied(monkeypatch):
    rng = np.random.default_rng(0)
    rows = (np.eye(64)[np.arange(4 * LEAF) % 4] + 0.01 * rng.normal(size=(4 * LEAF, 64))).astype(np.float32)
    seen: list[int] = []
    survivors = sys.modules[MODULE]._survivors

    def counted(bounds, *rest):
        seen.append(bounds.size)
        return survivors(bounds, *rest)

    monkeypatch.setattr(sys.modules[MODULE], "_survivors", counted)
    assert sum(len(piece.left) for piece in similar_pairs(rows, 0.97)) == 4 * LEAF * (LEAF - 1) // 2
    assert len(seen) == 4, "each box with itself alone"


def test_memory_is_bounded_though_all_pairs_are_alike():
    rows = np.ones((3000, 32), np.float16)
    list(similar_pairs(rows[:600], 0.9))  # compiled
    tracemalloc.start()
    total = sum(len(piece.left) for piece in similar_pairs(rows, 0.9))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 3000 * 2999 // 2
    assert peak < 8192 * 512 * 20 * 4, "a piece of work, not all pairs twice over"


# Groups


@given(st.integers(0, 10**6), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_groups_are_connected_components(seed, count):
    rng = np.random.default_rng(seed)
    left, right = rng.integers(0, count, (2, rng.integers(0, 2 * count)))
    cuts = np.sort(rng.integers(0, len(left) + 1, 3))
    pieces = [Pairs(a, b, np.ones(len(a), np.float32)) for a, b in zip(np.split(left, cuts), np.split(right, cuts))]
    priority = rng.integers(0, 3, count).astype(float)
    of = list(range(count))
    for a, b in zip(left.tolist(), right.tolist()):  # slowly: relabel everything
        of = [of[a] if label == of[b] else label for label in of]
    expected = [min((-priority[i], i) for i in range(count) if of[i] == of[row])[1] for row in range(count)]
    assert groups(count, pieces, priority).tolist() == expected
    first = [of.index(of[row]) for row in range(count)]
    assert groups(count, pieces).tolist() == first


# Bad input


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, r"row 3 of the vectors holds NaN or infinite values \(1 such rows of 8\)"),
        (np.inf, "NaN or infinite"),
        (0, "row 3 .* is zero"),
    ],
)
def test_rows_without_a_direction_are_refused(value, message):
    rows = made("even", 8, 4, 0).astype(np.float16)
    rows[3] = value
    with pytest.raises(DataError, match=message):
        next(similar_pairs(rows, 0.9))
    with pytest.raises(DataError, match="vectors to compare with"):
        next(similar_pairs(rows[:2], 0.9, rows))


def test_what_cannot_be_compared_is_refused():
    rows = made("even", 8, 4, 0).astype(np.float32)
    with pytest.raises(DataError, match="4 dimensions, those they are compared with 3; make both with the same encoder"):
        next(similar_pairs(rows, 0.9, rows[:, :3]))
    with pytest.raises(UsageError, match=r"threshold: 1.5; expected a cosine similarity, -1 to 1"):
        next(similar_pairs(rows, 1.5))
    for wrong in (rows[0], rows[:, :0], rows.astype(np.int32)):
        with pytest.raises(DataError, match="expected \\(items, dimensions\\) of float16 or float32"):
            next(similar_pairs(wrong, 0.9))


def test_any_pair_counts_once_in_each_order():
    rows = made("copies", 60, 12, 0).astype(np.float32)
    pairs = found(rows, 0.9)
    assert all(i < j for i, j in pairs)
    for a, b in itertools.islice(pairs, 50):
        both = found(rows[[a]], 0.9, rows[[b]])
        assert both == {(0, 0): pairs[a, b]}
