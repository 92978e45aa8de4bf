"""The ways to find clusters, what places further items, and what is said where a method finds nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits, make_moons
from sklearn.metrics import adjusted_rand_score
from test_cluster import job, make_items, make_vectors, run

from attar import config, formats, records
from attar.errors import DataError, UsageError
from attar.models.network import ClusterHead
from attar.stages.cluster.choose import DENSE, score_density
from attar.stages.cluster.count import round_groups
from attar.stages.cluster.head import NEVER, middles, refit_head, regress
from attar.stages.cluster.methods import NUMBERED, anchored, fit_of, linear_of, nearest_of, reordered, spherical
from attar.stages.cluster.space import head_probabilities


def blobs(sizes: list[int], dim: int = 8, spread: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Round groups about well separated places on a sphere, as float32, in random order, and which group each point is of."""
    rng = np.random.default_rng(seed)
    places = 10 * np.linalg.qr(rng.normal(size=(dim, dim)))[0][: len(sizes)]
    truth = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return (places[truth] + spread * rng.normal(size=(len(truth), dim))).astype(np.float32), truth


def moons(count: int = 600) -> tuple[np.ndarray, np.ndarray]:
    """Two half circles that no flat border tells apart, as unit vectors in space."""
    flat, truth = make_moons(count, noise=0.04, random_state=0)
    return np.c_[flat, np.full(count, 3.0)].astype(np.float32), truth


@pytest.mark.parametrize("name", NUMBERED)
def test_every_method_finds_plain_groups_and_places_the_rest(name: str) -> None:
    points, truth = blobs([60, 60, 60, 60])
    found = fit_of(name)(points[:160], 4, np.random.default_rng(0))
    assert found.clusters == 4
    assert adjusted_rand_score(found.place(points), truth) == 1
    again = fit_of(name)(points[:160], 4, np.random.default_rng(0))
    assert (found.place(points) == again.place(points)).all()


@pytest.mark.parametrize("name", NUMBERED)
def test_every_method_survives_fewer_places_than_clusters(name: str) -> None:
    points = np.repeat(np.eye(3, dtype=np.float32), 7, 0)
    labels = fit_of(name)(points, 5, np.random.default_rng(0)).place(points)
    assert adjusted_rand_score(labels, np.repeat(np.arange(3), 7)) == 1 or name in ("ward", "agglomerative")
    assert (labels >= 0).all()


def test_spherical_follows_direction_and_not_length() -> None:
    rng = np.random.default_rng(0)
    angle = np.repeat([0.2, 1.4], 100) + 0.05 * rng.normal(size=200)
    points = (np.c_[np.cos(angle), np.sin(angle)] * rng.uniform(0.1, 10, (200, 1))).astype(np.float32)
    found = spherical(points, 2, np.random.default_rng(0))
    assert adjusted_rand_score(found.place(points), np.repeat([0, 1], 100)) == 1
    assert (found.place(points * 7) == found.place(points)).all()
    cosine = 1 - cdist(points, found.weights.T, "cosine")
    assert (found.place(points) == cosine.argmax(1)).all()


def test_partitions_are_renumbered() -> None:
    points, truth = blobs([30, 40, 50], dim=3)
    centres = middles(points, truth, 3)
    order = np.array([2, 0, 1])
    for part in (nearest_of(centres), linear_of(2 * centres.T, -(centres**2).sum(1)), anchored(points, truth)):
        before, after = part.place(points), reordered(part, order).place(points)
        assert (before == truth).all()
        assert (order[after] == before).all()


def test_anchored_partitions_follow_the_nearest_labelled_point() -> None:
    rng = np.random.default_rng(0)
    points, labels = rng.normal(size=(90, 2)).astype(np.float32), rng.integers(-1, 3, 90)
    asked = rng.normal(size=(40, 2)).astype(np.float32)
    found = anchored(points, labels)
    distance = cdist(asked, points)
    inside = np.flatnonzero(labels >= 0)
    assert (found.place(asked) == labels[inside[distance[:, inside].argmin(1)]]).all()
    assert found.noise is not None
    assert (found.noise(asked) == (labels[distance.argmin(1)] < 0)).all()
    assert anchored(points[inside], labels[inside]).noise is None


# heads


def test_a_regressed_head_has_the_borders_of_the_labels() -> None:
    points, truth = blobs([50, 50, 50])
    weights, bias = regress(points, truth * 2, 6)  # clusters 1, 3 and 5 have no items
    assert weights.shape == (8, 6)
    assert bias.dtype == np.float32
    assert ((points @ weights + bias).argmax(1) == truth * 2).all()
    assert (bias[[1, 3, 5]] == NEVER).all()
    two = regress(points[truth < 2], truth[truth < 2], 2)
    assert ((points[truth < 2] @ two[0] + two[1]).argmax(1) == truth[truth < 2]).all()
    one = regress(points[:5], np.zeros(5, int), 3)
    assert ((points @ one[0] + one[1]).argmax(1) == 0).all()


@pytest.mark.parametrize("linear", [False, True])
def test_a_head_is_refitted_to_other_embeddings_and_misses_clusters_without_items(linear: bool) -> None:
    points, truth = blobs([40, 40, 40])
    weights = {"weights": np.zeros((4, 5), np.float32), "bias": np.zeros(5, np.float32)} if linear else {}
    old = records.Head(
        mean=points[0, :4], projection=np.eye(4, dtype=np.float32), centroids=np.zeros((5, 4), np.float32), temperature=1.0, **weights
    )
    head = refit_head(points, truth + 1, old)
    assert (head.weights is not None) == linear
    assert (head_probabilities(points, head).argmax(1) == truth + 1).all()
    assert head_probabilities(points, head)[:, [0, 4]].max() < 0.01


def test_a_linear_head_is_the_same_in_numpy_torch_and_on_disk(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"mean": 6, "projection": (6, 3), "centroids": (4, 3), "weights": (3, 4), "bias": 4}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    head = records.Head(**arrays, temperature=0.5)
    vectors = rng.normal(size=(9, 6)).astype(np.float32)
    e = vectors[0] / np.linalg.norm(vectors[0])
    logits = (e - head.mean) @ head.projection @ head.weights + head.bias
    np.testing.assert_allclose(head_probabilities(vectors, head)[0], np.exp(logits) / np.exp(logits).sum(), rtol=1e-4)
    np.testing.assert_allclose(ClusterHead(head)(torch.from_numpy(vectors)).numpy(), head_probabilities(vectors, head), atol=1e-6)
    model = records.Model(source={}, state={}, preprocess=records.Preprocess(size=(8, 8)), head=head)
    formats.save_model(tmp_path, model, "model")
    kept = formats.load_model(tmp_path, "model").head
    assert kept is not None
    assert all((getattr(kept, name) == arrays[name]).all() for name in shapes)


def test_a_nearest_centroid_head_is_a_linear_one_in_other_words() -> None:
    rng = np.random.default_rng(0)
    vectors, centroids = rng.normal(size=(30, 5)).astype(np.float32), rng.normal(size=(3, 5)).astype(np.float32)
    near = records.Head(mean=np.zeros(5, np.float32), projection=np.eye(5, dtype=np.float32), centroids=centroids, temperature=0.3)
    same = records.Head(
        mean=near.mean, projection=near.projection, centroids=centroids, temperature=0.3,
        weights=(2 * centroids.T / 0.3), bias=-(centroids**2).sum(1) / np.float32(0.3),
    )  # fmt: skip
    np.testing.assert_allclose(head_probabilities(vectors, same), head_probabilities(vectors, near), atol=1e-5)


# the stage


@pytest.mark.parametrize("name", NUMBERED)
def test_the_stage_by_every_method_of_a_number(name: str, tmp_path: Path) -> None:
    values, truth = blobs([90, 70, 50, 40])
    found = run(values, tmp_path, cluster_method=name, max_clusters=6)
    assert found.count == 4
    assert adjusted_rand_score(found.column("cluster"), truth) == 1
    assert (np.diff(np.bincount(found.column("cluster"))) <= 0).all()
    assert (head_probabilities(values, found.head).argmax(1) == found.column("cluster")).all()
    assert [row["k"] for row in found.curve] == [2, 3, 4, 5, 6]
    assert (found.column("cluster")[found.medoids] == np.arange(4)).all()


@pytest.mark.parametrize("name", DENSE)
def test_density_methods_find_shapes_that_are_not_round(name: str, tmp_path: Path) -> None:
    values, truth = moons()
    found = run(values, tmp_path, cluster_method=name)
    inside = found.column("outlier") < 0.9
    assert inside.mean() > 0.9
    assert adjusted_rand_score(found.column("cluster")[inside], truth[inside]) > 0.99
    assert found.method.startswith(name)
    assert "places" in found.method
    assert {row["k"] for row in found.curve} >= {2}
    again = run(values, tmp_path / "again", cluster_method=name)
    assert again.table.equals(found.table)


def test_noise_counts_to_the_nearest_cluster_and_looks_strange(tmp_path: Path) -> None:
    values, _ = blobs([150, 150], dim=3, spread=0.3)
    rng = np.random.default_rng(1)
    noise = 10 * rng.normal(size=(12, 3)).astype(np.float32)
    items = make_items(312, split=["train"] * 312)
    found = run(np.r_[values, noise], tmp_path, items, cluster_method="dbscan")
    assert found.count == 2
    assert set(found.column("cluster")) == {0, 1}
    marked = found.column("outlier") >= 0.9
    assert marked[300:].mean() > 0.7
    assert marked[:300].mean() < 0.1
    assert (found.column("subcluster")[marked & (found.column("density") < 1)] == -1).all()


def test_round_groups_inside_a_density_cluster() -> None:
    points, truth = blobs([60, 80])
    labels = round_groups(points, np.ones(140, bool), 10, np.random.default_rng(0))
    assert adjusted_rand_score(labels, truth) == 1
    one, _ = blobs([140])
    assert (round_groups(one, np.ones(140, bool), 10, np.random.default_rng(0)) == -1).all()
    assert (round_groups(points[:30], np.ones(30, bool), 10, np.random.default_rng(0)) == -1).all()


def test_a_density_score_is_the_formula_and_nothing_below_two_clusters() -> None:
    points, _ = blobs([80, 80], dim=3)
    row = score_density("dbscan", points, points, 1.5, 10, np.random.default_rng(0))
    assert row["score"] == pytest.approx((row["stability"] * row["placed"]) ** 0.5)
    assert row["k"] == 2
    assert row["stability"] == 1
    assert score_density("dbscan", points, points, 100.0, 10, np.random.default_rng(0))["score"] == 0


@pytest.mark.parametrize("name", DENSE)
def test_a_density_method_without_groups_says_what_to_do(name: str, tmp_path: Path) -> None:
    values, _ = blobs([20, 20])
    with pytest.raises(DataError, match=rf"{name}: finds no two clusters or more .* --cluster-method kmeans .* --min-subcluster"):
        run(values, tmp_path, make_items(40, split=["train"] * 40), cluster_method=name, min_subcluster=25)


def test_a_number_no_density_gives_is_refused(tmp_path: Path) -> None:
    values, _ = blobs([100, 100, 100])
    assert run(values, tmp_path / "three", cluster_method="dbscan", clusters=3).count == 3
    with pytest.raises(DataError, match=r"dbscan: finds no 7 clusters .*numbers found .*3"):
        run(values, tmp_path, cluster_method="dbscan", clusters=7)


def test_large_groups_are_not_split_and_small_ones_not_swallowed(tmp_path: Path) -> None:
    for number, sizes in enumerate(([1000, 50], [1000, 50, 50], [1000, 200, 50, 50])):
        values, truth = blobs(sizes, seed=number)
        found = run(values, tmp_path / str(number), max_clusters=8)
        assert found.count == len(sizes)
        assert adjusted_rand_score(found.column("cluster"), truth) == 1


def test_an_unknown_method_is_refused() -> None:
    assert set(config.METHODS) >= {*NUMBERED, *DENSE}
    with pytest.raises(UsageError, match=r"cluster_method: 'kmean'; expected one of .*kmeans.*hdbscan"):
        config.build_config({"data": "x", "cluster_method": "kmean"})


def test_the_outcome_does_not_depend_on_shards(tmp_path: Path) -> None:
    values = load_digits().data[:300].astype(np.float32)
    made = [run_in(values, rows, tmp_path / str(rows)).table for rows in (17, 300)]
    assert made[0]["cluster"].equals(made[1]["cluster"])


def run_in(values: np.ndarray, rows: int, folder: Path) -> records.Clusters:
    from attar.stages.cluster.cluster import cluster

    return cluster(make_items(len(values)), make_vectors(values, rows), config.Cluster(cluster_method="ward", clusters=6), job(folder))
