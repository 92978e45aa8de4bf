"""The learned head: what it is trained on, against slow references, and when it is taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from test_cluster import make_items, run
from test_cluster_methods import blobs

from attar.errors import DataError, UsageError
from attar.stages.cluster.learned import FEWEST, learned, neighbour_agreement, together
from attar.stages.cluster.methods import kmeans
from attar.stages.cluster.space import head_probabilities


def test_together_is_the_count_of_a_double_loop() -> None:
    points, _ = blobs([9, 8, 7], spread=3)
    ours = together(points, 3, np.random.default_rng(0), fits=5)
    rng, counts = np.random.default_rng(0), np.zeros((24, 24))
    for _ in range(5):
        half = points[rng.permutation(24)[:12]]
        clusters = int(rng.integers(4, 7))  # 1.25 to 1.75 times 3, rounded up
        labels = KMeans(clusters, n_init=1, random_state=int(rng.integers(2**31))).fit(half).predict(points)
        for i in range(24):
            for j in range(24):
                counts[i, j] += labels[i] == labels[j]
    np.testing.assert_allclose(ours, counts / 5, atol=1e-6)
    assert (np.diag(ours) == 1).all()


@given(st.integers(0, 10**6), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_neighbour_agreement_is_kappa_of_a_slow_reference(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    points, labels = rng.normal(size=(40, 3)).astype(np.float32), rng.integers(0, k, 40)
    alike = []
    for i in range(40):
        cosine = [-np.inf if i == j else points[i] @ points[j] / np.linalg.norm(points[i]) / np.linalg.norm(points[j]) for j in range(40)]
        alike += [labels[i] == labels[j] for j in np.argsort(cosine)[::-1][:10]]
    chance = sum(np.mean(labels == one) ** 2 for one in range(k))
    expected = (np.mean(alike) - chance) / (1 - chance) if len(set(labels)) > 1 else 0
    assert neighbour_agreement(points, labels) == pytest.approx(expected, abs=1e-6)
    renumbered = neighbour_agreement(points, rng.permutation(k)[labels])
    assert renumbered == pytest.approx(neighbour_agreement(points, labels), abs=1e-9)


@pytest.mark.slow
def test_the_head_finds_groups_of_very_different_sizes_that_kmeans_cuts() -> None:
    points, truth = blobs([600, 60, 60, 60], spread=3.2, seed=2)
    plain = [adjusted_rand_score(kmeans(points, 4, np.random.default_rng(seed)).place(points), truth) for seed in range(2)]
    ours = [adjusted_rand_score(learned(points, 4, np.random.default_rng(seed)).place(points), truth) for seed in range(2)]
    assert min(ours) > 0.85 > 0.8 > max(plain)
    found = learned(points, 4, np.random.default_rng(0))
    assert found.weights is not None
    assert found.weights.shape == (8, 4)
    again = learned(points, 4, np.random.default_rng(0))
    assert (found.weights == again.weights).all()
    assert (found.bias == again.bias).all()


def test_the_stage_delivers_the_learned_head(tmp_path: Path) -> None:
    values, truth = blobs([500, 40, 40], spread=2.5)
    found = run(values, tmp_path, cluster_method="learned", clusters=3)
    assert adjusted_rand_score(found.column("cluster"), truth) > 0.9
    assert found.head.weights is not None
    assert (head_probabilities(values, found.head).argmax(1) == found.column("cluster")).all()
    assert (np.diff(np.bincount(found.column("cluster"))) <= 0).all()
    assert "learned head" in found.method
    again = run(values, tmp_path / "again", cluster_method="learned", clusters=3)
    assert again.table.equals(found.table)
    assert (again.head.weights == found.head.weights).all()
    other = run(values, tmp_path / "seed", cluster_method="learned", clusters=3, seed=1)
    assert adjusted_rand_score(other.column("cluster"), found.column("cluster")) > 0.9


def test_auto_takes_kmeans_unless_neighbours_agree_more_on_the_learned_head(tmp_path: Path) -> None:
    even, _ = blobs([100, 100, 100])
    found = run(even, tmp_path / "even", cluster_method="auto", clusters=3)
    assert found.head.weights is None
    assert "near neighbours agree" in found.method
    few = run(even[:100], tmp_path / "few", cluster_method="auto", clusters=3)
    assert few.method == "k-means, 3 clusters: as asked for"
    assert FEWEST > 80
    uneven, truth = blobs([600, 60, 60, 60], spread=3.2, seed=2)
    found = run(uneven, tmp_path / "uneven", cluster_method="auto", clusters=4)
    plain = run(uneven, tmp_path / "plain", clusters=4)
    assert found.head.weights is not None
    assert adjusted_rand_score(found.column("cluster"), truth) > adjusted_rand_score(plain.column("cluster"), truth) + 0.03


def test_bad_vectors_are_refused_by_the_learned_head_too(tmp_path: Path) -> None:
    values, _ = blobs([150, 150])
    broken = values.copy()
    broken[[3, 5]] = np.nan
    with pytest.raises(DataError, match=r"2 of 300 vectors have no direction .* photo 3.png"):
        run(broken, tmp_path, cluster_method="learned")
    with pytest.raises(DataError, match=r"the encoder gives all 240 training images the same vector"):
        run(np.ones((300, 4), np.float32), tmp_path, cluster_method="learned")
    with pytest.raises(DataError, match=r"training images: 240, different ones among them: 1"):
        run(values, tmp_path, make_items(300, content=["one"] * 300), cluster_method="learned")
    with pytest.raises(UsageError, match=r"clusters: 17; there are 16 different training items"):
        run(values[:20], tmp_path, cluster_method="learned", clusters=17)


def test_as_many_clusters_as_items_and_repeated_places(tmp_path: Path) -> None:
    values, _ = blobs([12], dim=8, spread=4)
    found = run(values, tmp_path / "all", make_items(12, split=["train"] * 12), cluster_method="learned", clusters=12)
    assert 2 <= found.count <= 12
    repeated = np.repeat(np.eye(3, 8, dtype=np.float32), 10, 0)
    found = run(repeated, tmp_path / "few", make_items(30, split=["train"] * 30), cluster_method="learned", clusters=5)
    assert adjusted_rand_score(found.column("cluster"), np.repeat(np.arange(3), 10)) > 0.5
