"""stages.curate.coreset: quotas, covers, and core sets that keep size, balance and weight whatever the method."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from test_cluster import job, make_items
from test_curate import decide, make_clusters

from attar import config
from attar.errors import UsageError
from attar.stages.curate import coreset
from attar.stages.curate.coreset import (
    IN_PROPORTION,
    METHODS,
    cells,
    condense,
    core_set,
    coverage,
    farthest_first,
    proportional,
    stand_for,
    water_fill,
)

SIZES = st.lists(st.integers(0, 40), min_size=1, max_size=8)
every_method = pytest.mark.parametrize("method", METHODS)


def cloud(seed: int, sizes: tuple[int, ...] = (300, 40, 3), dim: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clusters of those sizes about corners: points, labels, distance to the centre."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    offsets = rng.normal(size=(len(labels), dim)) * 0.3
    return (np.eye(len(sizes), dim)[labels] + offsets).astype(np.float32), labels, np.linalg.norm(offsets, axis=1)


# Kernels


@given(SIZES, st.integers(0, 250))
def test_water_fill_pours_one_by_one(sizes: list[int], total: int) -> None:
    quotas = np.zeros(len(sizes), int)
    for _ in range(min(total, sum(sizes))):
        room = [(quotas[i], i) for i in range(len(sizes)) if quotas[i] < sizes[i]]
        quotas[min(room)[1]] += 1
    assert water_fill(np.array(sizes), total).tolist() == quotas.tolist()


@given(SIZES, st.integers(0, 250))
def test_proportional_quotas_are_within_one_of_the_share_of_what_one_each_leaves(sizes: list[int], total: int) -> None:
    quotas, held = proportional(np.array(sizes), total), np.array(sizes)
    total, groups = min(total, int(held.sum())), int((held > 0).sum())
    assert quotas.sum() == total
    assert (quotas <= held).all()
    assert ((quotas > 0) == (held > 0)).all() or total < groups
    if groups <= total < held.sum():
        rest = np.maximum(held - 1, 0)
        assert (np.abs(quotas - (held > 0) - (total - groups) * rest / rest.sum()) < 1).all()


@given(st.integers(0, 10**6), st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_farthest_first_is_a_cover_within_twice_the_best(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    points = np.round(rng.normal(size=(9, 2))).astype(np.float32)  # rounded: ties and equal points occur
    nearest = farthest_first(points, count, 4)
    chosen = np.unique(nearest)
    distance = np.linalg.norm(points[:, None].astype(float) - points, axis=2)
    assert len(chosen) == count
    assert 4 in chosen
    assert (nearest[chosen] == chosen).all()
    np.testing.assert_allclose(distance[np.arange(9), nearest], distance[:, chosen].min(1), atol=1e-6)
    best = min(distance[:, list(other)].min(1).max() for other in itertools.combinations(range(9), count))
    assert distance[:, chosen].min(1).max() <= 2 * best + 1e-6


def test_every_point_has_the_nearest_kept_one(monkeypatch: pytest.MonkeyPatch) -> None:
    points = np.round(cloud(0)[0], 1)
    kept = np.array([3, 50, 51, 320])
    whole = stand_for(points, kept)
    slow = [
        min(kept, key=lambda other, row=row: (np.sum((points[row].astype(float) - points[other]) ** 2), other))
        for row in range(len(points))
    ]
    assert (np.delete(whole, kept) == np.delete(slow, kept)).all()
    assert (whole[kept] == kept).all()
    monkeypatch.setattr(coreset, "CELL", 17)
    assert (stand_for(points, kept) == whole).all()


def test_dense_places_are_thinned() -> None:
    rng = np.random.default_rng(0)
    points = np.r_[rng.normal(size=(400, 3)) * 0.05, rng.normal(size=(400, 3)) + 9].astype(np.float32)
    kept = np.unique(METHODS["density"](points, 400, 0, np.random.default_rng(1)))
    assert len(kept) == 400
    assert (kept >= 400).sum() > 300  # the wide half
    assert (kept < 400).any()


def test_the_hierarchy_keeps_more_of_small_groups_than_their_share() -> None:
    points, labels, _ = cloud(0, (1000, 60, 60), 3)
    points = points + 10 * np.eye(3, dtype=np.float32)[labels]
    kept = [labels[np.unique(METHODS["hierarchical"](points, 120, 0, np.random.default_rng(seed)))] for seed in range(5)]
    assert all(len(own) == 120 for own in kept)
    assert np.mean([(own > 0).sum() for own in kept]) > 30  # their share would be 13


def test_strata_keep_one_of_copies_and_their_share_of_everything_else() -> None:
    rng = np.random.default_rng(0)
    seen, copied = rng.normal(size=(400, 8)), rng.normal(size=(100, 8))
    points = np.r_[seen, np.repeat(copied, 6, 0) + 0.02 * rng.normal(size=(600, 8))].astype(np.float32)
    source = np.r_[np.arange(400), np.repeat(np.arange(400, 500), 6)]
    nearest = METHODS["stratified"](points, 500, 0, np.random.default_rng(1))
    kept = np.unique(nearest)
    at_random = np.unique(source[rng.permutation(1000)[:500]])
    assert len(kept) == 500
    assert len(np.unique(source[kept])) > len(at_random) + 50
    weight = np.bincount(nearest)[kept]
    assert (weight <= 3).all(), "in each stratum all stand for two, or one for one more than another"
    means = [points[rows].mean(0) for rows in (kept, rng.permutation(1000)[:500])]
    off = [np.linalg.norm(mean - np.average(points, 0)) for mean in means]
    assert off[0] < 2 * off[1], "the kept ones lie as all do"


def test_what_is_apart_is_drawn_at_random_and_the_rest_by_distance() -> None:
    distance = cdist(x := np.array([[0.0], [0.01], [5], [9], [14], [14.1]]), x)
    drawn = [coreset._spread(distance, 4, np.random.default_rng(seed)).tolist() for seed in range(40)]
    assert all(len(set(one) & {0, 1}) == len(set(one) & {4, 5}) == 1 for one in drawn), "never both of a pair"
    assert len({tuple(sorted(one)) for one in drawn}) == 4, "either of a pair"
    assert sorted(coreset._spread(distance, 5, np.random.default_rng(0))[4:]) in ([4], [5]), (
        "the farther of the repeats is the first to be added"
    )
    assert coreset._shared_out(distance, np.array([0, 4])).tolist() == [0, 0, 0, 4, 4, 4]


def test_cells_are_small_and_near(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coreset, "CELL", 50)
    points = np.r_[cloud(1)[0], np.ones((500, 4), np.float32)]  # and as many equal ones, which no centroids part
    found = cells(points, np.random.default_rng(0))
    assert np.bincount(found).max() <= 50
    assert (np.bincount(found) > 0).all()
    own = [points[found == one] for one in np.unique(found)]
    inside = sum(((part - part.mean(0)) ** 2).sum() for part in own)
    assert inside < 0.5 * ((points - points.mean(0)) ** 2).sum()


# Core sets


@every_method
@pytest.mark.parametrize("cell", [40, 4096])
@given(st.integers(0, 10**6), st.integers(1, 350))
@settings(max_examples=6, deadline=None)
def test_size_balance_and_weights_hold(tmp_path_factory: pytest.TempPathFactory, method: str, cell: int, seed: int, total: int) -> None:
    points, labels, distance = cloud(seed)
    points[20:60] = points[20]  # equal points stand for each other
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coreset, "CELL", cell)
        nearest = core_set(points, labels, distance, total, method, job(tmp_path_factory.mktemp("core"), "curate"))
    kept = np.unique(nearest)
    weight = np.bincount(nearest, minlength=len(points))
    assert len(kept) == min(max(total, 3), len(points))
    assert weight.sum() == len(points)
    assert (weight[kept] >= 1).all()
    assert (nearest[kept] == kept).all()
    assert (labels[nearest] == labels).all()
    assert set(labels[kept]) == {0, 1, 2}
    if method not in IN_PROPORTION:
        assert np.bincount(labels[kept]).tolist() == water_fill(np.array([300, 40, 3]), max(total, 3)).tolist()


@every_method
def test_a_core_set_is_a_function_of_the_seed_and_resumes(tmp_path: Path, method: str) -> None:
    points, labels, distance = cloud(2)
    first = core_set(points, labels, distance, 100, method, job(tmp_path / "a", "curate"))
    assert (core_set(points, labels, distance, 100, method, job(tmp_path / "b", "curate")) == first).all()
    made = sorted((tmp_path / "a").glob("core-*.parquet"))
    made[0].unlink()
    assert (core_set(points, labels, distance, 100, method, job(tmp_path / "a", "curate")) == first).all()


@every_method
def test_the_most_is_asked_of_one_cell_and_the_least_of_many(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    points, _, distance = cloud(3, (200,))
    monkeypatch.setattr(coreset, "CELL", 20)
    one = condense(points, 1, distance, method, np.random.default_rng(0))
    assert len(np.unique(one)) == 1
    few = condense(points, 5, distance, method, np.random.default_rng(0))
    kept = np.unique(few)
    assert len(kept) == 5
    distances = cdist(points, points[kept])
    empty = np.flatnonzero(cells(points, np.random.default_rng(0)) >= 5)  # of cells that keep none: the nearest of the cluster
    if method not in IN_PROPORTION:
        np.testing.assert_allclose(distances[empty].min(1), np.linalg.norm(points[empty] - points[few[empty]], axis=1), atol=1e-6)


def test_the_cover_is_measured_beside_random_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    points, labels, _ = cloud(4)
    kept = np.unique(farthest_first(points, 100, 0))
    found = coverage(points, labels, kept, np.random.default_rng(0))
    reach = cdist(points, points[kept]).min(1)
    assert found.mean == pytest.approx(reach.mean(), abs=1e-6)
    assert found.farthest == pytest.approx(reach.max(), abs=1e-6)
    assert found.farthest < found.random_farthest
    assert found.least == np.bincount(labels[kept]).min()
    assert coverage(points, labels, np.arange(len(points)), np.random.default_rng(0))[:2] == (0, 0)
    assert str(found).startswith(f"an item lies {found.mean:.3g} from the nearest kept one on average")
    monkeypatch.setattr(coreset, "LOOKED_AT", 100)
    assert coverage(points, labels, kept, np.random.default_rng(0)).mean == pytest.approx(found.mean, rel=0.3)


# The stage


@every_method
def test_a_number_of_items_is_kept_and_its_cover_is_told(tmp_path: Path, method: str) -> None:
    values = np.random.default_rng(0).normal(size=(120, 16)).astype(np.float32)
    items = make_items(120, split=["train"] * 100 + ["validation"] * 20)
    selection, notes = decide(values, tmp_path, items, 3, keep_items=30, core_method=method)
    keep, weight = selection.column("keep"), selection.column("weight")
    assert keep[:100].sum() == 30
    assert keep[100:].all()
    assert weight[:100].sum() == 100
    assert set(make_clusters(values, items, 3).column("cluster")[:100][keep[:100]]) == {0, 1, 2}
    assert notes[-2].startswith(f"core set ({method}): 30 of 100 items; an item lies ")
    whole, notes = decide(values, tmp_path / "b", items, 3, keep_items=1000, core_method=method)
    assert whole.column("keep").all()
    assert not any("core set" in note for note in notes)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"keep_items": 0}, "keep_items: 0; expected at least 1"),
        ({"core_method": "best"}, "core_method: 'best'; expected stratified, hierarchical, k-centre, density or random"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: dict[str, object], told: str) -> None:
    with pytest.raises(UsageError, match=r"core|keep") as error:
        config.build_config({"data": "photos"} | given)
    assert told in str(error.value)


def test_the_methods_of_the_settings_are_those_there_are() -> None:
    for method in METHODS:
        assert not list(config.Curate(core_method=method).faults())
