"""Kernels of attar.stats against slow references, under seeds, under transformations, and on bad input."""

from __future__ import annotations

import numpy as np
import pytest
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError, jaxtyped
from scipy.stats import binomtest, ttest_rel
from scipy.stats import t as student
from sklearn import metrics
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from attar import stats

decisions = st.integers(2, 60).flatmap(
    lambda n: st.tuples(*(st.lists(st.integers(0, 6), min_size=n, max_size=n).map(np.array) for _ in range(2)))
)


def _pair(seed: int = 0, n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Labels of 5 classes and decisions that follow them three times in four."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, n)
    return labels, np.where(rng.random(n) < 0.75, (labels + 2) % 5, rng.integers(0, 7, n))


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (1, 7), (95, 100), (4321, 9000)])
def test_the_interval_of_a_share_is_scipys_exact_one(successes: int, n: int) -> None:
    expected = binomtest(successes, n).proportion_ci(0.95, method="exact")
    assert stats.share_interval(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@given(st.integers(0, 200), st.integers(0, 200))
def test_the_interval_holds_the_share_and_shrinks_with_n(successes: int, failures: int) -> None:
    n = successes + failures
    low, high = stats.share_interval(successes, n)
    assert 0 <= low <= high <= 1
    if n:
        assert low <= successes / n <= high
        tighter = stats.share_interval(10 * successes, 10 * n)
        assert tighter[1] - tighter[0] < high - low


def test_the_interval_of_nothing_says_nothing() -> None:
    assert stats.share_interval(0, 0) == (0.0, 1.0)


def test_the_interval_refuses_impossible_counts() -> None:
    with pytest.raises(ValueError, match="11 successes of 10; expected 0 to n"):
        stats.share_interval(11, 10)
    with pytest.raises(ValueError, match="confidence: 95; expected above 0, below 1"):
        stats.share_interval(1, 10, confidence=95)


def test_agreement_counts_equal_decisions() -> None:
    a, b = _pair()
    slow = sum(int(x == y) for x, y in zip(a, b))
    assert stats.agreement(a, b) == (slow / len(a), *stats.share_interval(slow, len(a)))
    with pytest.raises(ValueError, match="3 and 2 rows; expected as many"):
        stats.agreement(np.zeros(3), np.zeros(2))


def test_bootstrap_mean_matches_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = stats.bootstrap(values, np.random.default_rng(0), repeats=4000)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)


def test_bootstrap_is_fixed_by_its_seed() -> None:
    values = np.random.default_rng(1).random(50)
    runs = [stats.bootstrap(values, np.random.default_rng(seed)) for seed in (7, 7, 8)]
    assert runs[0] == runs[1] != runs[2]


@given(st.floats(-100, 100), st.floats(0.1, 10))
@settings(max_examples=20)
def test_bootstrap_follows_shift_and_scale(shift: float, scale: float) -> None:
    values = np.random.default_rng(2).random(30)
    low, high = stats.bootstrap(values, np.random.default_rng(0), repeats=100)
    moved = stats.bootstrap(values * scale + shift, np.random.default_rng(0), repeats=100)
    assert moved == pytest.approx((low * scale + shift, high * scale + shift))


def test_bootstrap_keeps_pairs_together() -> None:
    original = np.random.default_rng(3).uniform(1, 9, 40)
    rows = np.stack([original, original / 4], axis=1)
    ratio = stats.bootstrap(rows, np.random.default_rng(0), lambda r: float(np.median(r[:, 1] / r[:, 0])))
    assert ratio == (0.25, 0.25)


def test_bootstrap_refuses_no_rows() -> None:
    with pytest.raises(ValueError, match="no rows to resample"):
        stats.bootstrap(np.empty(0), np.random.default_rng(0))


def test_spread_is_centred_on_the_value_and_clipped() -> None:
    draws = np.random.default_rng(0).normal(0.7, 0.1, 5000)  # inflated draws, as those of NMI are
    low, high = stats.spread(0.5, draws, floor=0.0)
    assert (low, high) == pytest.approx((0.5 - 0.196, 0.5 + 0.196), abs=0.01)
    assert stats.spread(0.98, draws, floor=0.0)[1] == 1.0
    assert stats.spread(0.01, draws, floor=0.0)[0] == 0.0


def test_neighbours_are_sklearns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats, "BLOCK_BYTES", 4 * 200 * 17)  # blocks of 17 rows, so that blocks and their ends are met
    x = np.random.default_rng(0).normal(size=(200, 12))
    expected = NearestNeighbors(n_neighbors=6, metric="cosine", algorithm="brute").fit(x).kneighbors(return_distance=False)
    done: list[int] = []
    np.testing.assert_array_equal(stats.neighbours(x, 6, done.append), expected)
    assert sum(done) == 200
    assert max(done) == 17


def test_knn_overlap_is_the_share_of_common_neighbours() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(80, 10))
    b = a + rng.normal(size=a.shape)
    near = [NearestNeighbors(n_neighbors=7, metric="cosine").fit(x).kneighbors(return_distance=False) for x in (a, b)]
    slow = [len(set(one) & set(other)) / 7 for one, other in zip(*near)]
    np.testing.assert_allclose(stats.knn_overlap(a, b, 7), slow)
    np.testing.assert_array_equal(stats.knn_overlap(a, b, 7), stats.knn_overlap(a, b, 7))


@given(st.integers(0, 1000), st.integers(1, 29))
@settings(max_examples=25)
def test_knn_overlap_ignores_rotation_and_scale(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, 30, 5))
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    assert stats.knn_overlap(a, 3 * a @ turn, k).mean() > 0.99  # a near-tie may fall either way in float32
    overlap = stats.knn_overlap(a, b, k)
    assert np.all((overlap >= 0) & (overlap <= 1))
    np.testing.assert_array_equal(overlap, stats.knn_overlap(b, a, k))


def test_knn_overlap_refuses_more_neighbours_than_items() -> None:
    with pytest.raises(ValueError, match="5 neighbours of 5 items; expected 1 to n − 1"):
        stats.knn_overlap(np.eye(5), np.eye(5), 5)


def test_knn_vote_is_leave_one_out_knn() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 60)
    x = np.eye(4)[labels] + rng.normal(0, 0.4, (60, 4))
    voted = stats.knn_vote(labels, stats.neighbours(x, 5))
    for i in range(60):
        others = np.delete(np.arange(60), i)
        model = KNeighborsClassifier(5, metric="cosine", weights="uniform").fit(x[others], labels[others])
        share = model.predict_proba(x[i : i + 1])[0]
        assert share[model.classes_ == voted[i]] == share.max()


def test_knn_vote_gives_a_tie_to_the_nearer() -> None:
    labels = np.array([3, 1, 2, 2, 1])
    assert stats.knn_vote(labels, np.array([[1, 2, 3, 4], [2, 1, 4, 3]])).tolist() == [1, 2]


def test_resamples_count_like_drawn_items() -> None:
    a, b = _pair()
    table = stats.crossing(a, b)
    drawn = np.stack(list(stats.resample(table, np.random.default_rng(0), 4000)))
    assert np.all(drawn.sum(axis=1) == len(a))
    rng = np.random.default_rng(1)
    hits = [np.mean((a == b)[rng.integers(0, len(a), len(a))]) for _ in range(4000)]
    counted = drawn[:, table.rows == table.columns].sum(axis=1) / len(a)
    assert (counted.mean(), counted.std()) == pytest.approx((np.mean(hits), np.std(hits)), rel=0.1, abs=0.002)
    np.testing.assert_array_equal(drawn, list(stats.resample(table, np.random.default_rng(0), 4000)))


@given(decisions)
def test_class_scores_are_sklearns(pair: tuple[np.ndarray, np.ndarray]) -> None:
    truth, predicted = pair
    scores = stats.class_scores(table := stats.crossing(truth, predicted), table.counts)
    present = np.unique(truth)
    expected = metrics.precision_recall_fscore_support(truth, predicted, labels=present, zero_division=0)
    np.testing.assert_allclose(scores[:, present], expected[:3])
    assert np.isnan(np.delete(scores, present, axis=1)).all()


@given(decisions)
def test_cluster_scores_are_sklearns(pair: tuple[np.ndarray, np.ndarray]) -> None:
    labels, clusters = pair
    table = stats.crossing(labels, clusters)
    _, nmi, ari = stats.cluster_scores(table, table.counts)
    # Where both sides are one single group sklearn calls NMI 1, as here.
    assert nmi == pytest.approx(metrics.normalized_mutual_info_score(labels, clusters), abs=1e-9)
    assert ari == pytest.approx(metrics.adjusted_rand_score(labels, clusters), abs=1e-9)


def test_clustering_accuracy_tries_every_matching() -> None:
    from itertools import permutations

    rng = np.random.default_rng(0)
    for _ in range(10):
        labels, clusters = rng.integers(0, 4, 25), rng.integers(0, 5, 25)
        slow = max(np.mean(np.array(order)[clusters] == labels) for order in permutations(range(5)))
        assert stats.clustering_accuracy(labels, clusters) == pytest.approx(slow)


@given(decisions, st.permutations(range(7)))
def test_cluster_scores_ignore_the_numbering(pair: tuple[np.ndarray, np.ndarray], order: list[int]) -> None:
    labels, clusters = pair
    tables = [stats.crossing(labels, one) for one in (clusters, np.array(order)[clusters])]
    plain, renamed = (stats.cluster_scores(table, table.counts) for table in tables)
    np.testing.assert_allclose(plain, renamed, atol=1e-12)


def test_cluster_scores_refuse_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="2 and 3 rows; expected as many"):
        stats.clustering_accuracy(np.array([0, 1]), np.array([0, 1, 1]))


def test_cosine_is_that_of_paired_rows() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 20, 5))
    slow = [x @ y / np.sqrt(x @ x) / np.sqrt(y @ y) for x, y in zip(a, b)]
    np.testing.assert_allclose(stats.cosine(a, b), slow)
    np.testing.assert_array_equal(stats.cosine(a, np.zeros_like(a)), 0)


def test_shapes_are_those_the_signatures_name() -> None:
    checked = {name: jaxtyped(typechecker=beartype)(getattr(stats, name)) for name in ("neighbours", "knn_overlap", "knn_vote", "cosine")}
    x = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    near = checked["neighbours"](x, 3)
    assert checked["knn_vote"](np.arange(12) % 2, near).shape == (12,)
    assert checked["knn_overlap"](x, x[:, :2], 3).shape == (12,)
    with pytest.raises(TypeCheckError):
        checked["cosine"](x, x[:, :2])


@given(st.integers(0, 200), st.integers(2, 12))
def test_paired_differences_are_scipys_paired_test(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0.3, 1, n), rng.normal(0, 1, n)
    found, expected = stats.paired(a, b), ttest_rel(a, b)
    interval = expected.confidence_interval(0.95)
    assert found == pytest.approx((float((a - b).mean()), interval.low, interval.high, expected.pvalue), abs=1e-9)
    swapped = stats.paired(b, a)
    assert swapped == pytest.approx((-found.difference, -found.high, -found.low, found.p), abs=1e-9)
    shared = rng.normal(0, 50, n)  # what both have in common does not matter
    assert stats.paired(a + shared, b + shared) == pytest.approx(found, abs=1e-6)


def test_pairs_without_spread() -> None:
    a = np.array([1.0, 2.0, 5.0])
    assert stats.paired(a, a) == (0.0, 0.0, 0.0, 1.0)
    assert stats.paired(a + 1, a) == (1.0, 1.0, 1.0, 0.0)


def test_one_pair_says_nothing() -> None:
    with pytest.raises(ValueError, match="1 pair; expected at least two"):
        stats.paired(np.array([1.0]), np.array([2.0]))
    with pytest.raises(ValueError, match="2 and 3 rows"):
        stats.paired(np.zeros(2), np.zeros(3))


@given(st.integers(0, 200), st.integers(2, 6), st.integers(2, 6))
def test_blocks_pool_the_error_as_an_analysis_of_variance_does(seed: int, k: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(k, n)) + 10 * rng.normal(size=n)
    rows, freedom = [], (k - 1) * (n - 1)
    for candidate in range(k):  # the residuals one by one
        for block in range(n):
            fitted = values[candidate].mean() + values[:, block].mean() - values.mean()
            rows.append((values[candidate, block] - fitted) ** 2)
    error = np.sqrt(2 * sum(rows) / freedom / n)
    for candidate, found in enumerate(stats.blocked(values, 0)):
        mean = values[candidate].mean() - values[0].mean()
        expected = 2 * student.sf(abs(mean) / error, freedom)
        assert found.difference == pytest.approx(mean)
        assert found.p == pytest.approx(expected, abs=1e-9)
        assert found.high - found.low == pytest.approx(2 * error * student.ppf(0.975, freedom))
    if k == 2:
        assert stats.blocked(values, 0)[1] == pytest.approx(stats.paired(values[1], values[0]))


def test_blocks_need_two_of_each() -> None:
    with pytest.raises(ValueError, match="1 candidates in 3 blocks; expected at least two of each"):
        stats.blocked(np.zeros((1, 3)), 0)
    assert [row.p for row in stats.blocked(np.array([[1.0, 2.0], [1.0, 2.0]]), 0)] == [1.0, 1.0]


def _holm_slow(p: list[float]) -> list[float]:
    """Step down by hand: each rank in turn, its factor, and never under the one before."""
    adjusted, last = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda place: p[place])):
        last = max(last, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = last
    return adjusted


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_is_the_step_down_procedure(p: list[float]) -> None:
    adjusted = stats.holm(np.array(p))
    assert adjusted == pytest.approx(_holm_slow(p))
    assert (adjusted >= np.array(p)).all()
    assert (adjusted <= np.minimum(1, len(p) * np.array(p)) + 1e-12).all(), "never stricter than Bonferroni"


def test_holm_refuses_what_is_no_probability() -> None:
    with pytest.raises(ValueError, match=r"p-values \[0.5, 1.5\]; expected 0 to 1"):
        stats.holm(np.array([0.5, 1.5]))
