"""k-means of vectors read in blocks: against scikit-learn and plain Lloyd iterations, in every form they may be kept in."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans, kmeans_plusplus
from sklearn.datasets import make_blobs

from attar import records
from attar.errors import DataError, UsageError
from attar.stages.cluster import kmeans as doors
from attar.stages.cluster import lloyd
from attar.stages.cluster.kmeans import fit_centroids, kmeans, minibatch
from attar.stages.cluster.lloyd import Bounded, Form, sums_of
from attar.stages.cluster.rows import BLOCK, Rows, rows_of


def points_of(count: int, dim: int = 12, centers: int = 9, seed: int = 0, spread: float = 2.0) -> np.ndarray:
    return make_blobs(count, dim, centers=centers, cluster_std=spread, random_state=seed)[0].astype(np.float32)


def shards_of(values: np.ndarray, rows: int = 700) -> records.Vectors:
    starts = range(0, len(values), rows)
    shards = [functools.partial(records.Shard, np.arange(a, min(a + rows, len(values))), values[a : a + rows]) for a in starts]
    model = records.Model(source={}, state={}, preprocess=records.Preprocess(size=(8, 8)))
    return records.Vectors(shards=shards, count=len(values), dim=values.shape[1], model=model)


def slow_lloyd(points: np.ndarray, centroids: np.ndarray, iterations: int) -> list[np.ndarray]:
    """The centroids before each of some plain Lloyd iterations, in float64."""
    out = [centroids.astype(np.float64)]
    for _ in range(iterations):
        label = cdist(points, out[-1]).argmin(1)
        out.append(
            np.stack([points[label == k].mean(0, dtype=np.float64) if (label == k).any() else out[-1][k] for k in range(len(centroids))])
        )
    return out


def inertia_of(points: np.ndarray, centroids: np.ndarray) -> float:
    return float((cdist(points.astype(np.float64), centroids) ** 2).min(1).sum())


PLAIN = Form(np.zeros(12, np.float32), False)


@pytest.mark.parametrize(("bounds", "groups"), [(16 * 5000, 2), (lloyd.BOUNDS, 4)])
@pytest.mark.parametrize("dense", [0.0, 0.4, 1.1], ids=["never by group", "as it is", "always by group"])
def test_bounds_change_nothing(bounds: int, groups: int, dense: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Iteration after iteration the sums are those of plain Lloyd, though later ones look at few of the rows."""
    monkeypatch.setattr(lloyd, "BOUNDS", bounds)
    monkeypatch.setattr(lloyd, "DENSE", dense)
    points = points_of(5000)
    reference = slow_lloyd(points, points[:64], 12)
    rows, looked = rows_of(points), []
    blocks = [lambda number=number: looked.append(number) or rows.blocks[number]() for number in range(len(rows.blocks))]
    step = Bounded(Rows(rows.count, rows.dim, blocks), PLAIN, points[:64], 1)
    assert len(step._edges) - 1 == groups
    for centroids in reference:
        found, plain = step(centroids.astype(np.float32)), sums_of(rows, PLAIN, centroids.astype(np.float32))
        label = cdist(points, centroids.astype(np.float32)).argmin(1)
        assert (found.counts != np.bincount(label, minlength=64)).sum() <= 2  # ties within float noise
        np.testing.assert_array_equal(found.counts, plain.counts)
        np.testing.assert_allclose(found.totals, plain.totals, atol=1e-3)
        assert found.inertia(centroids) == pytest.approx(inertia_of(points, centroids), rel=1e-6)
    looked.clear()
    step(reference[-1].astype(np.float32))
    assert not looked, "nothing moved, so nothing is read"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 9), st.booleans())
def test_any_walk_of_the_centroids_is_followed(seed: int, k: int, dim: int, duplicated: bool) -> None:
    """Bounds hold whatever the centroids do: jumps, rests, and points that lie on one another."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(300, dim)).astype(np.float32)
    points = np.repeat(points[:30], 10, 0) if duplicated else points
    form, centroids = Form(points.mean(0), False), points[rng.choice(300, k)]
    step = Bounded(rows_of(points), form, centroids, 1)
    for scale in (0, 0.01, 1.0, 0, 0.1):
        centroids = (centroids + scale * rng.normal(size=centroids.shape)).astype(np.float32)
        found = step(centroids)
        assert found.inertia(centroids) == pytest.approx(inertia_of(points - form.shift, centroids), rel=1e-4, abs=1e-3)
        assert found.counts.sum() == 300


def test_as_good_as_scikit_learn() -> None:
    points = points_of(20_000, centers=30)
    ours = kmeans(points, 30, np.random.default_rng(0), tolerance=0)
    theirs = KMeans(30, n_init=4, random_state=0).fit(points)
    assert ours.inertia <= 1.001 * theirs.inertia_
    assert ours.inertia == pytest.approx(inertia_of(points, ours.centroids), rel=1e-5)
    assert sorted(ours.history, reverse=True) == list(ours.history)
    again = KMeans(30, init=ours.centroids, n_init=1, tol=0).fit(points)
    np.testing.assert_allclose(again.cluster_centers_, ours.centroids, atol=1e-2)  # a fixed point of theirs, too
    np.testing.assert_array_equal(np.bincount(cdist(points, ours.centroids).argmin(1)), ours.sizes)


def test_the_same_from_memory_file_and_shards(tmp_path: Path) -> None:
    points = points_of(30_000).astype(np.float16)
    np.save(tmp_path / "points.npy", points)
    mapped = np.load(tmp_path / "points.npy", mmap_mode="r")
    fits = [
        kmeans(source, 20, np.random.default_rng(0)) for source in (points, mapped, mapped[:], points.astype(np.float64), shards_of(points))
    ]
    for fit in fits[1:]:
        np.testing.assert_allclose(fit.centroids, fits[0].centroids, atol=1e-3)
    assert np.array_equal(fits[0].centroids, fits[1].centroids)
    assert not any(isinstance(block(), np.memmap) for block in rows_of(mapped).blocks), "mapped pages would count as memory"
    assert all(len(block()) <= BLOCK for block in rows_of(mapped).blocks)


def test_equal_bits_on_any_number_of_threads() -> None:
    points = points_of(30_000)
    one, again, three = (kmeans(points, 40, np.random.default_rng(3), threads=threads) for threads in (1, 1, 3))
    assert np.array_equal(one.centroids, again.centroids)
    assert np.array_equal(one.centroids, three.centroids)
    assert not np.array_equal(one.centroids, kmeans(points, 40, np.random.default_rng(4)).centroids)


@pytest.mark.parametrize("fit", [functools.partial(kmeans, spherical=True), functools.partial(minibatch, spherical=True)])
def test_spherical_centroids_are_directions(fit: functools.partial) -> None:
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(12, 8)))[0].T
    label = rng.integers(0, 8, 20_000)
    points = (directions[label] + 0.1 * rng.normal(size=(20_000, 12))) * rng.uniform(0.1, 30, (20_000, 1))
    found = fit(points.astype(np.float16), 8, np.random.default_rng(0)).centroids
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    cosine = directions @ found.T
    assert sorted(cosine.argmax(1)) == list(range(8))
    assert cosine.max(1).min() > 0.995
    plain = kmeans(points.astype(np.float32), 8, np.random.default_rng(0)).centroids
    assert (directions @ (plain / np.linalg.norm(plain, axis=1, keepdims=True)).T).max(1).min() < 0.995, "lengths would have decided"


def test_mini_batches_come_close() -> None:
    points = points_of(40_000, centers=25, spread=3)
    points = points[np.argsort(cdist(points, points[:1])[:, 0])]  # neighbours in the file are alike
    parts, whole = minibatch(points, 25, np.random.default_rng(0), passes=2), kmeans(points, 25, np.random.default_rng(0))
    assert 0.999 * whole.inertia <= parts.inertia <= 1.02 * whole.inertia  # both from the same start
    assert parts.inertia == pytest.approx(inertia_of(points, parts.centroids), rel=1e-5)
    assert parts.sizes.sum() == 40_000


def test_clusters_that_run_empty_begin_again(monkeypatch: pytest.MonkeyPatch) -> None:
    points = points_of(20_000, centers=6, spread=0.1)

    def all_in_one_place(x: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
        return np.repeat(x[:1], k, 0)

    monkeypatch.setattr(doors, "seeds", all_in_one_place)
    found = kmeans(points, 6, np.random.default_rng(0))
    assert len(found.centroids) == 6
    assert found.inertia == pytest.approx(20_000 * 12 * 0.01, rel=0.05), "one centroid in each group"


def test_seeds_are_as_far_apart_as_scikit_learns() -> None:
    points = points_of(6000, centers=200, spread=0.3)
    ours = [inertia_of(points, doors.seeds(points, 200, np.random.default_rng(seed))) for seed in range(3)]
    theirs = [inertia_of(points, kmeans_plusplus(points, 200, random_state=seed)[0]) for seed in range(3)]
    at_random = points[np.random.default_rng(0).choice(6000, 200, replace=False)]
    assert np.mean(ours) < 1.1 * np.mean(theirs) < 0.5 * inertia_of(points, at_random)
    assert doors.seeds(np.repeat(points[:5], 9, 0), 12, np.random.default_rng(0)).shape == (12, 12)


def test_fewer_places_than_clusters_and_constant_vectors() -> None:
    points = np.repeat(np.eye(3, 12, dtype=np.float32), 20_000, 0)
    for found in (fit_centroids(points, 5, np.random.default_rng(0)), kmeans(points, 5, np.random.default_rng(0)).centroids):
        np.testing.assert_allclose(found[found.argmax(1).argsort()], np.eye(3, 12), atol=1e-6)
    same = kmeans(np.full((500, 4), 7, np.float16), 3, np.random.default_rng(0))
    np.testing.assert_allclose(same.centroids, [[7, 7, 7, 7]])
    assert same.sizes.tolist() == [500]
    every = kmeans(points_of(8), 8, np.random.default_rng(0))
    assert sorted(every.sizes) == [1] * 8


def test_above_the_exact_limit_the_door_takes_the_bounded_form() -> None:
    points = points_of(doors.EXACT + 1, 4, centers=5, spread=0.5)
    found = fit_centroids(points, 5, np.random.default_rng(0))
    best = KMeans(5, n_init=2, random_state=0).fit(points)
    assert found.dtype == np.float32
    assert inertia_of(points, found) <= 1.0001 * best.inertia_


def test_it_ends_when_told() -> None:
    points, seen = points_of(12_000, centers=50, spread=4), list[float]()
    assert len(kmeans(points, 50, np.random.default_rng(0), iterations=3, tolerance=0).history) == 3
    watched = kmeans(points, 50, np.random.default_rng(0), tolerance=0, watch=lambda inertia: bool(seen.append(inertia)) or len(seen) == 2)
    assert watched.history == tuple(seen)
    loose, tight = (kmeans(points, 50, np.random.default_rng(0), tolerance=tolerance) for tolerance in (1e-2, 1e-5))
    assert len(loose.history) < len(tight.history)
    assert loose.inertia >= tight.inertia


def test_more_rows_than_bounds_allow_are_looked_at_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    points = points_of(15_000)
    bounded = kmeans(points, 12, np.random.default_rng(0))
    monkeypatch.setattr(doors, "BOUNDS", 1000)
    plain = kmeans(points, 12, np.random.default_rng(0))
    np.testing.assert_allclose(plain.centroids, bounded.centroids, atol=1e-3)


def test_bad_input_is_named() -> None:
    points, rng = points_of(3000), np.random.default_rng(0)
    with pytest.raises(UsageError, match="clusters: 3001; there are 3000 vectors, so choose 1 to 3000"):
        kmeans(points, 3001, rng)
    broken = points.copy()
    broken[2500, 3] = np.nan
    with pytest.raises(DataError, match="1 of 3000 vectors that were read together hold NaN or infinite values: leave"):
        kmeans(broken, 4, rng)
    broken[2500] = 0
    with pytest.raises(DataError, match="NaN, infinite values or nothing but zeros"):
        kmeans(broken, 4, rng, spherical=True)
    mixed = shards_of(points)
    other = records.Shard(np.arange(5), np.zeros((5, 7), np.float16))
    mixed = records.Vectors(shards=[*mixed.shards, lambda: other], count=3005, dim=12, model=mixed.model)
    with pytest.raises(DataError, match=r"block 5 of the vectors has shape \(5, 7\), expected \(rows, 12\)"):
        kmeans(mixed, 4, rng)
    cut = records.Vectors(shards=mixed.shards[:4], count=3000, dim=12, model=mixed.model)
    with pytest.raises(DataError, match="the vectors have 2800 rows, expected 3000: a shard is missing or cut"):
        kmeans(cut, 4, rng)
