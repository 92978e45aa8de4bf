from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits, make_blobs
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score

from attar import config, records
from attar.errors import DataError, UsageError
from attar.stages.cluster.cluster import cluster
from attar.stages.cluster.count import best_count, candidate_counts, score_count, separation
from attar.stages.cluster.density import density_groups, neighbour_distances, outlier_scores
from attar.stages.cluster.kmeans import fit_centroids
from attar.stages.cluster.space import head_probabilities, principal_axes, project, squared_distances, unit
from attar.workspace import Job


def make_items(
    count: int,
    *,
    content: Sequence[str] | None = None,
    split: Sequence[str] | None = None,
    thumbs: np.ndarray | None = None,
    **columns: Sequence,
) -> records.Items:
    """Items of 8 × 8 images; every tenth is for validation, every tenth for the test, thumbnails are noise unless given."""
    rng = np.random.default_rng(0)
    thumbs = rng.integers(0, 256, (count, 256), np.uint8) if thumbs is None else thumbs
    body = {
        "id": range(count),
        "path": [f"photo {number}.png" for number in range(count)],
        "modality": ["image"] * count,
        "content": content or [f"content {number}" for number in range(count)],
        "bytes": [100] * count,
        "width": [8] * count,
        "height": [8] * count,
        "format": ["PNG"] * count,
        "frame_time": [None] * count,
        "split": split or [{8: "validation", 9: "test"}.get(number % 10, "train") for number in range(count)],
        "note": [""] * count,
        "thumb": [row.tobytes() for row in thumbs],
        "blur": [0.3] * count,
    } | columns
    return records.Items(root="/data", table=pa.table(body, records.ITEM_SCHEMA), quarantine=records.QUARANTINE_SCHEMA.empty_table())


def make_vectors(values: np.ndarray, rows: int = 100) -> records.Vectors:
    """Vectors in shards of that many rows."""
    starts = range(0, len(values), rows)
    shards = [functools.partial(records.Shard, np.arange(a, min(a + rows, len(values))), values[a : a + rows]) for a in starts]
    model = records.Model(source={}, state={}, preprocess=records.Preprocess(size=(8, 8)))
    return records.Vectors(shards=shards, count=len(values), dim=values.shape[1], model=model)


def job(folder: Path, name: str = "cluster", seed: int = 0) -> Job:
    return Job(name, folder, seed=seed, quiet=True)


def run(values: np.ndarray, folder: Path, items: records.Items | None = None, seed: int = 0, **options: Any) -> records.Clusters:
    """The stage, by k-means unless another method is asked for."""
    chosen = config.Cluster(**{"cluster_method": "kmeans", **options})
    return cluster(items or make_items(len(values)), make_vectors(values), chosen, job(folder, seed=seed))


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return data.data.astype(np.float32), data.target


# Kernels


def test_principal_axes_are_those_of_a_reference(digits):
    values = unit(digits[0]).astype(np.float64)
    ours = principal_axes(np.cov(values.T), 10)
    theirs = PCA(10, svd_solver="full").fit(values).components_.T
    assert np.abs(np.abs((ours * theirs).sum(0)) - 1).max() < 1e-5
    assert (ours[np.abs(ours).argmax(0), np.arange(10)] > 0).all()


def test_principal_axes_stop_at_the_rank():
    rng = np.random.default_rng(0)
    flat = rng.normal(size=(50, 3)) @ rng.normal(size=(3, 20))
    assert principal_axes(np.cov(flat.T), 10).shape == (20, 3)


@given(st.integers(0, 10**6), st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_probabilities_follow_the_formula_and_peak_at_the_nearest_centroid(seed, k):
    rng = np.random.default_rng(seed)
    vectors, mean = rng.normal(size=(20, 7)).astype(np.float32), rng.normal(size=7).astype(np.float32) * 0.1
    head = records.Head(
        mean=mean,
        projection=rng.normal(size=(7, 4)).astype(np.float32),
        centroids=rng.normal(size=(k, 4)).astype(np.float32),
        temperature=float(rng.uniform(0.5, 5)),
    )
    points = (vectors.astype(float) / np.linalg.norm(vectors.astype(float), axis=1)[:, None] - mean) @ head.projection
    squared = cdist(points, head.centroids, "sqeuclidean")
    weights = np.exp(-squared / head.temperature)
    found = head_probabilities(vectors, head)
    assert found.dtype == np.float32
    assert found.shape == (20, k)
    np.testing.assert_allclose(project(vectors, head), points, atol=1e-5)
    np.testing.assert_allclose(squared_distances(project(vectors, head), head.centroids), squared, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found, weights / weights.sum(1, keepdims=True), atol=1e-4)
    assert (found.argmax(1) == squared.argmin(1)).all()


def test_unit_vectors_survive_half_precision_extremes():
    rows = unit(np.array([[60000, 60000], [6e-8, 0], [0, 0], [np.nan, 1], [np.inf, 1]], np.float16))
    np.testing.assert_allclose(rows[:2], [[0.5**0.5, 0.5**0.5], [1, 0]], rtol=1e-6)
    assert not np.isfinite(rows[2:]).all(1).any()


def test_centroids_of_fewer_places_than_asked_for_are_distinct():
    points = np.repeat(np.eye(3, dtype=np.float32), 5, 0)
    found = fit_centroids(points, 5, np.random.default_rng(0))
    np.testing.assert_allclose(found[found.argmax(1).argsort()], np.eye(3), atol=1e-6)


@given(st.integers(2, 500))
def test_candidate_counts_ascend_to_the_largest(most):
    counts = candidate_counts(most)
    assert counts[: min(most, 12) - 1] == list(range(2, min(most, 12) + 1))
    assert counts[-1] == most
    assert sorted(set(counts)) == counts
    assert len(counts) < 45


def fit_labels(points: np.ndarray, k: int) -> np.ndarray:
    return cdist(points, fit_centroids(points, k, np.random.default_rng(0))).argmin(1)


@pytest.mark.parametrize(("natural", "others"), [(3, (2, 4, 6)), (8, (4, 7, 9, 12))])
def test_score_is_highest_at_the_natural_number(natural, others):
    points = make_blobs(600, 8, centers=natural, cluster_std=1.5, random_state=natural)[0].astype(np.float32)
    score = {k: score_count(points[100:], points[:100], k, np.random.default_rng(0)) for k in (natural, *others)}
    assert max(score, key=lambda k: score[k]["score"]) == natural
    for row in score.values():
        assert 0 < row["score"] == pytest.approx((row["silhouette"] * row["stability"]) ** 0.5)
    assert score[natural]["stability"] == 1 > score[others[-1]]["stability"] > 0.3
    assert separation(points, fit_labels(points, natural)) == pytest.approx(score[natural]["silhouette"], abs=0.05)
    assert score[natural] == score_count(points[100:], points[:100], natural, np.random.default_rng(0))


def test_separation_is_zero_where_it_is_undefined():
    points = np.eye(3, dtype=np.float32)
    assert separation(points, np.zeros(3, int)) == separation(points, np.arange(3)) == 0
    assert separation(np.array([[0, 0], [0, 1e-3], [9, 9], [9, 9]], np.float32), np.array([0, 0, 1, 1])) > 0.99


def test_neighbour_distances_are_those_of_a_slow_reference():
    rng = np.random.default_rng(0)
    points, labels = rng.normal(size=(120, 3)).astype(np.float32), rng.integers(0, 3, 120)
    labels[7] = 3  # alone in its cluster
    content = np.arange(120)
    points[20:30], labels[20:30], content[20:30] = points[19], labels[19], content[19]  # copies
    pool = np.ones(120, bool)
    pool[20:30] = pool[100:] = False
    found = neighbour_distances(points, labels, content, pool)
    for item in range(120):
        near = [
            np.linalg.norm(points[item].astype(float) - points[other])
            for other in range(120)
            if pool[other] and labels[other] == labels[item] and content[other] != content[item]
        ]
        expected = np.mean(sorted(near)[:10]) if near else np.inf
        assert found[item] == pytest.approx(expected, rel=1e-4)
    assert found[7] == np.inf


@given(st.integers(0, 10**6), st.integers(0, 79), st.floats(1.01, 100), st.floats(0.001, 1000))
@settings(max_examples=50, deadline=None)
def test_outlier_scores_rise_with_distance_and_ignore_the_unit(seed, item, factor, scale):
    rng = np.random.default_rng(seed)
    reach, residual, labels, pool = rng.lognormal(size=80), rng.lognormal(size=80), rng.integers(0, 3, 80), rng.random(80) < 0.8
    score = outlier_scores(reach, residual, labels, pool)
    assert score.dtype == np.float32
    assert (score >= 0).all()
    assert (score <= 1).all()
    np.testing.assert_allclose(outlier_scores(reach * scale, residual * scale, labels, pool), score, atol=1e-5)
    pool[item] = False  # so that what is typical stays the same
    further = reach.copy()
    further[item] *= factor
    assert outlier_scores(further, residual, labels, pool)[item] >= outlier_scores(reach, residual, labels, pool)[item]


def test_outlier_score_is_the_formula():
    reach = np.exp(np.r_[np.linspace(-1, 1, 101), 3.0])
    score = outlier_scores(reach, np.ones(102), np.zeros(102, int), np.arange(102) < 101)
    z = 3.0 / (0.5 / 0.6745)  # the median is 0, the upper quartile 0.5
    assert score[101] == pytest.approx(math.erf(z / 1.5 / 2**0.5))
    assert score[:51].max() == 0


def test_density_groups_inside_a_cluster():
    rng = np.random.default_rng(0)
    points = np.r_[rng.normal(size=(3500, 2)), rng.normal(size=(3500, 2)) + 12].astype(np.float32)
    fitted = rng.random(7000) < 0.9  # more than are looked at
    labels = density_groups(points, fitted, 300, np.random.default_rng(1))
    inside = labels >= 0
    assert inside.mean() > 0.7
    assert adjusted_rand_score(labels[inside], (np.arange(7000) >= 3500)[inside]) == 1
    assert (labels == density_groups(points, fitted, 300, np.random.default_rng(1))).all()
    assert (density_groups(points[:200], fitted[:200], 30, rng) == -1).all()  # one group
    assert (density_groups(points[:30], fitted[:30], 30, rng) == -1).all()  # too few for two


# The stage


@pytest.mark.parametrize("natural", [2, 5, 13])
def test_the_number_of_blobs_is_found(tmp_path, natural):
    values, truth = make_blobs(natural * 40, 12, centers=natural, random_state=natural)
    found = run(values.astype(np.float32), tmp_path, max_clusters=16)
    assert found.count == natural
    assert adjusted_rand_score(found.column("cluster"), truth) == 1
    assert max(found.curve, key=lambda row: row["score"])["k"] == natural


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ({2: 0.51, 3: 0.584, 4: 0.54, 8: 0.564, 9: 0.55, 10: 0.581, 11: 0.566}, 10),  # MNIST, a seed: groups of groups are as natural
        ({2: 0.4, 3: 0.584, 4: 0.54, 9: 0.5, 10: 0.55, 11: 0.5}, 3),
        ({2: 0.1, 3: 0.5, 4: 0.499, 5: 0.498}, 3),  # no peak of their own
        ({2: 0.0, 3: 0.0, 4: 0.0}, 2),
        ({2: 0.1, 3: 0.2, 4: 0.3}, 4),
        ({2: 0.3}, 2),
    ],
)
def test_of_equal_peaks_the_finest_is_the_number_of_clusters(scores: dict[int, float], best: int) -> None:
    rows = [{"k": k, "score": score} for k, score in scores.items()]
    assert best_count(rows) == best_count(rows[::-1]) == best


def test_digits(tmp_path, digits):
    values, truth = digits
    rng = np.random.default_rng(0)
    noise = rng.uniform(0, 16, (10, 64)).astype(np.float32)
    found = run(np.r_[values, noise], tmp_path, max_clusters=16)
    assert 8 <= found.count <= 13
    assert found.count == best_count(found.curve)
    assert adjusted_rand_score(found.column("cluster")[:1797], truth) > 0.5
    assert found.separation == pytest.approx(0.2, abs=0.05)
    outlier = found.column("outlier")
    assert (outlier[1797:] > 0.98).all()
    assert (outlier[:1797] > 0.98).mean() < 0.01
    confidence = head_probabilities(values, found.head).max(1)
    assert 0.7 < confidence.mean() < 0.97
    inside = found.column("subcluster")
    parents = [set(found.column("cluster")[inside == number]) for number in range(inside.max() + 1)]
    assert parents
    assert all(len(parent) == 1 for parent in parents)


def test_held_out_items_of_a_tiny_folder_are_not_strange_but_a_stranger_is(tmp_path, digits):
    """32 axes through 51 items leave every other item far outside."""
    noise = np.random.default_rng(0).uniform(0, 16, (1, 64)).astype(np.float32)
    split = ["train"] * 51 + ["test"] * 15
    found = run(np.r_[digits[0][:65], noise], tmp_path, make_items(66, split=split), clusters=5)
    outlier = found.column("outlier")
    assert found.head.projection.shape == (64, 32), "clusters are found in all of them"
    assert outlier[65] > 0.98
    assert (outlier[:65] > 0.98).mean() < 0.04


def test_table_head_and_medoids_agree(tmp_path, digits):
    values = digits[0][:600]
    items = make_items(600)
    found = run(values, tmp_path, items, clusters=7)
    points, label = project(values, found.head), found.column("cluster")
    distance = np.linalg.norm(points[:, None].astype(float) - found.head.centroids, axis=2)
    train = items.column("split") == "train"
    assert found.table.schema.equals(records.CLUSTER_SCHEMA)
    assert (found.column("id") == items.ids()).all()
    assert (head_probabilities(values, found.head).argmax(1) == label).all()
    assert (distance.argmin(1) == label).all()
    np.testing.assert_allclose(found.column("distance"), distance[np.arange(600), label], atol=1e-5)
    sizes = np.bincount(label[train])
    assert (np.diff(sizes) <= 0).all()
    assert len(sizes) == found.count == 7
    for number, medoid in enumerate(found.medoids):
        assert items.column("split")[medoid] == "train"
        assert distance[medoid, number] == pytest.approx(distance[train][:, number].min(), abs=1e-6)
    assert "asked for" in found.method


def test_same_seed_same_bits_however_it_was_interrupted(tmp_path, digits):
    values = digits[0][:400]
    whole = run(values, tmp_path / "a", max_clusters=8)
    kept = sorted((tmp_path / "a").glob("count-*.json"))
    assert len(kept) == 7
    for path in kept[3:]:
        path.unlink()
    resumed, again = run(values, tmp_path / "a", max_clusters=8), run(values, tmp_path / "b", max_clusters=8)
    for other in (resumed, again):
        assert other.table.equals(whole.table)
        assert other.curve == whole.curve
        assert all((getattr(other.head, key) == getattr(whole.head, key)).all() for key in ("mean", "projection", "centroids"))
    assert not run(values, tmp_path / "c", seed=1, max_clusters=8).table.equals(whole.table)


def test_copies_pull_nothing_towards_themselves(tmp_path, digits):
    values = digits[0][:200]
    split = ["train"] * 200
    once = run(values, tmp_path / "a", make_items(200, split=split), clusters=4)
    many = np.r_[values, np.repeat(values[:1], 300, 0)]
    content = [f"content {number if number < 200 else 0}" for number in range(500)]
    often = run(many, tmp_path / "b", make_items(500, split=["train"] * 500, content=content), clusters=4)
    assert adjusted_rand_score(once.column("cluster"), often.column("cluster")[:200]) == 1
    assert set(once.medoids) == set(often.medoids)
    np.testing.assert_allclose(np.sort(once.column("outlier")), np.sort(often.column("outlier")[:200]), atol=1e-4)


def test_two_items_and_as_many_clusters_as_items(tmp_path, digits):
    found = run(digits[0][:2], tmp_path / "two", make_items(2, split=["train", "train"]))
    assert found.count == 2
    assert (found.column("outlier") == 1).all()
    found = run(digits[0][:12], tmp_path / "twelve", make_items(12, split=["train"] * 12), clusters=12)
    assert sorted(found.column("cluster")) == list(range(12))
    assert np.isfinite(head_probabilities(digits[0][:12], found.head)).all()


def test_vectors_without_a_direction_are_named(tmp_path, digits):
    values = digits[0][:50].copy()
    values[[3, 17, 20, 40]] = [[0], [np.nan], [np.inf], [0]]
    with pytest.raises(DataError, match=r"4 of 50 vectors .* first of photo 3.png, photo 17.png, photo 20.png; .* --model"):
        run(values, tmp_path)


def test_identical_images_and_a_collapsed_encoder_are_told_apart(tmp_path, digits):
    same = np.repeat(digits[0][:1], 50, 0)
    with pytest.raises(DataError, match=r"training images: 40, different ones among them: 1; .* at least 2 .* add other images"):
        run(same, tmp_path, make_items(50, content=["one"] * 50))
    with pytest.raises(DataError, match=r"gives all 40 training images the same vector .* collapsed; .* --self-steps"):
        run(same.astype(np.float16), tmp_path)


def test_more_clusters_than_items_are_refused(tmp_path, digits):
    with pytest.raises(UsageError, match=r"clusters: 30; there are 16 different training items, .* at most 16, or 0"):
        run(digits[0][:20], tmp_path, clusters=30)
