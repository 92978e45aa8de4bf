from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from test_cluster import job, make_items, make_vectors

from attar import config, records
from attar.stages.cluster.space import project, unit
from attar.stages.curate.curate import curate, near_duplicates, pick_leaders, resolve, thumbnails_agree


def make_clusters(values: np.ndarray, items: records.Items, k: int, outlier: np.ndarray | None = None) -> records.Clusters:
    """Clusters around the first k training items, without outliers unless given."""
    train = np.flatnonzero(items.column("split") == "train")
    mean, projection = np.zeros(values.shape[1], np.float32), np.eye(values.shape[1], dtype=np.float32)
    head = records.Head(mean=mean, projection=projection, centroids=unit(values[train[:k]]), temperature=1.0)
    distance = np.linalg.norm(project(values, head)[:, None] - head.centroids, axis=2)
    label = distance.argmin(1)
    columns = {
        "id": items.ids(),
        "cluster": label,
        "subcluster": np.full(len(items), -1),
        "distance": distance.min(1).astype(np.float32),
        "density": np.ones(len(items), np.float32),
        "outlier": np.zeros(len(items), np.float32) if outlier is None else np.asarray(outlier, np.float32),
    }
    table = pa.table({name: pa.array(column).cast(records.CLUSTER_SCHEMA.field(name).type) for name, column in columns.items()})
    return records.Clusters(table=table, head=head, medoids=train[:k], curve=(), separation=0.0, method="by hand")


def decide(values: np.ndarray, folder: Path, items: records.Items, k: int = 2, outlier: np.ndarray | None = None, **options: float):
    clusters = make_clusters(values, items, k, outlier)
    work = job(folder, "curate")
    return curate(items, make_vectors(values, 64), clusters, config.Curate(**options), work), work.notes


def similar(a: np.ndarray, b: np.ndarray, thumb_a: np.ndarray, thumb_b: np.ndarray, threshold: float) -> bool:
    """The definition of a near duplicate for one pair, written slowly."""
    a, b, thumb_a, thumb_b = (row.astype(float) for row in (a, b, thumb_a, thumb_b))
    if min(thumb_a.std(), thumb_b.std()) < 2:
        same = np.abs(thumb_a - thumb_b).mean() <= 2
    else:
        same = np.corrcoef(thumb_a, thumb_b)[0, 1] >= threshold - 1e-6
    return bool(same and a @ b / np.linalg.norm(a) / np.linalg.norm(b) >= threshold - 1e-6)


def family(seed: int, count: int, variants: int) -> tuple[np.ndarray, np.ndarray]:
    """(count, 6) vectors and (count, 256) thumbnails that vary a few originals by different amounts; some thumbnails are flat."""
    rng = np.random.default_rng(seed)
    base, thumbs = rng.normal(size=(variants, 6)), rng.integers(0, 256, (variants, 256))
    thumbs[0] = 120
    pick, amount = rng.integers(0, variants, count), rng.choice([0, 0.05, 0.3, 1.0], count)[:, None]
    grey = thumbs[pick] + amount * rng.normal(size=(count, 256)) * 20
    return (base[pick] + amount * rng.normal(size=(count, 6)) * 0.5).astype(np.float32), np.clip(grey, 0, 255).astype(np.uint8)


# Kernels


@given(st.integers(0, 10**6), st.sampled_from([0.5, 0.9, 0.97, 1.0]))
@settings(max_examples=30, deadline=None)
def test_near_duplicates_are_those_of_a_slow_reference(seed, threshold):
    values, thumbs = family(seed, 30, 4)
    rows = unit(values)
    found = near_duplicates(rows[:12], rows[12:], thumbs[:12], thumbs[12:], threshold)
    for i, j in itertools.product(range(12), range(18)):
        assert (found[i, j] > -2) == similar(values[i], values[12 + j], thumbs[i], thumbs[12 + j], threshold)
        assert found[i, j] == -2 or found[i, j] == pytest.approx(rows[i] @ rows[12 + j], abs=1e-5)


def test_flat_thumbnails_are_compared_by_level():
    noise = np.random.default_rng(0).integers(0, 256, (1, 256)).astype(np.uint8)
    thumbs = np.r_[np.full((1, 256), 100), np.full((1, 256), 101), np.full((1, 256), 104), noise].astype(np.uint8)
    agree = thumbnails_agree(thumbs, thumbs, 0.97)
    assert agree.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


def test_a_chain_is_not_collapsed_into_one_leader():
    chain = np.where(np.abs(np.subtract.outer(range(5), range(5))) <= 1, np.float32(0.98), np.float32(-2))
    assert pick_leaders(chain, np.ones(5, bool)).tolist() == [True, False, True, False, True]
    assert pick_leaders(chain, np.array([False, True, True, True, True])).tolist() == [False, True, False, True, False]


def test_resolve_follows_chains_to_their_end():
    assert resolve(np.array([-1, 0, 1, 2, -1, 4])).tolist() == [0, 0, 0, 0, 4, 4]


# The stage


@given(st.integers(0, 10**6), st.sampled_from([1.0, 0.5, 0.1]), st.sampled_from([0.9, 0.97]))
@settings(max_examples=25, deadline=None)
def test_invariants(tmp_path_factory, seed, share, threshold):
    rng = np.random.default_rng(seed)
    count = int(rng.integers(20, 90))
    values, thumbs = family(seed, count, int(rng.integers(2, 30)))
    original = np.where(rng.random(count) < 0.2, rng.integers(0, count, count), np.arange(count))
    values, thumbs = values[original], thumbs[original]
    split = rng.choice(["train", "train", "train", "validation", "test"], count)
    split[:3] = "train"
    items = make_items(
        count, content=[f"c{number}" for number in original], split=list(split), thumbs=thumbs, width=rng.integers(8, 11, count)
    )
    outlier = rng.random(count) ** 0.2
    selection, _ = decide(values, tmp_path_factory.mktemp("run"), items, 3, outlier, keep_share=share, near_duplicate=threshold)
    keep, reason, witness, weight, leak = (selection.column(name) for name in ("keep", "reason", "witness", "weight", "leak"))
    train = split == "train"

    assert selection.table.schema.equals(records.SELECTION_SCHEMA)
    assert (keep == (reason == "")).all()
    assert (witness[keep] == -1).all()
    assert keep[witness[~keep]].all()
    assert (split[witness[~keep]] == split[~keep]).all()
    assert (weight[keep] >= 1).all()
    assert (weight[~keep] == 0).all()
    for name in records.SPLITS:
        assert weight[split == name].sum() == (split == name).sum() - ((split == name) & (reason == "outlier")).sum()
    rows = unit(values)
    np.testing.assert_allclose(selection.column("similarity")[~keep], (rows[~keep] * rows[witness[~keep]]).sum(1), atol=1e-5)
    assert (selection.column("similarity")[keep] == 1).all()

    near = np.array([[similar(values[i], values[j], thumbs[i], thumbs[j], threshold) for j in range(count)] for i in range(count)])
    twins = near & keep[:, None] & keep & (split[:, None] == split) & ~np.eye(count, dtype=bool)
    assert not twins.any()
    assert leak[~train & near[:, train].any(1)].all()
    assert not leak[train].any()
    stands = {name: {item for item in np.flatnonzero(split == name) if keep[item] and leak[item]} for name in ("validation", "test")}
    for item in np.flatnonzero(leak):  # a leak has a near duplicate in train, or shares a witness with one that has
        group = np.flatnonzero((np.where(keep, np.arange(count), witness) == (item if keep[item] else witness[item])) & ~train)
        assert near[np.ix_(group, np.flatnonzero(train))].any()
        assert (item if keep[item] else witness[item]) in stands[split[item]]
    assert set(reason[~train]) <= {"", "exact duplicate", "near duplicate"}
    assert (reason == "outlier").sum() <= 0.05 * train.sum()


def test_exact_duplicates_have_the_lowest_id_as_witness(tmp_path):
    values = np.eye(8, dtype=np.float32)[[0, 1, 2, 0, 0, 3, 4, 4, 5, 4]]
    content = ["a", "b", "c", "a", "a", "d", "e", "e", "f", "e"]
    split = ["train"] * 6 + ["test"] * 3 + ["train"]
    selection, notes = decide(values, tmp_path, make_items(10, content=content, split=split))
    assert selection.column("reason").tolist() == ["", "", "", *["exact duplicate"] * 2, "", "", "exact duplicate", "", ""]
    assert selection.column("witness")[[3, 4, 7]].tolist() == [0, 0, 6]
    assert selection.column("weight").tolist() == [3, 1, 1, 0, 0, 1, 2, 0, 1, 1]
    assert selection.column("leak").tolist() == [False] * 6 + [True, True, False, False]  # content e is in train too
    assert notes[-1] == (
        "train 7 → exact duplicates 2 → near duplicates 0 → outliers 0 → redundant 0 → kept 5; validation and test 3: duplicates 1, leaks 2"
    )


def test_of_near_duplicates_the_largest_image_stays(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(6, 16)).astype(np.float32)
    values[3] = values[1] * 2 + 0.001
    values[5] = values[1] + 0.001
    thumbs = rng.integers(0, 256, (6, 256)).astype(np.uint8)
    thumbs[[3, 5]] = thumbs[1]
    sizes = {"width": [8, 8, 8, 20, 8, 8], "bytes": [100, 100, 100, 50, 100, 900]}
    selection, _ = decide(values, tmp_path, make_items(6, split=["train"] * 6, thumbs=thumbs, **sizes))
    assert selection.column("reason").tolist() == ["", "near duplicate", "", "", "", "near duplicate"]
    assert selection.column("witness")[[1, 5]].tolist() == [3, 3]
    assert (selection.column("similarity")[[1, 5]] > 0.99).all()
    thumbs[5] = rng.integers(0, 256, 256)  # the vector alone is not enough
    selection, _ = decide(values, tmp_path / "b", make_items(6, split=["train"] * 6, thumbs=thumbs, **sizes))
    assert selection.column("reason").tolist() == ["", "near duplicate", "", "", "", ""]


def test_outliers_are_capped_with_their_copies_and_never_empty_a_cluster(tmp_path):
    values = unit(np.random.default_rng(0).normal(size=(60, 16)))
    values[41] = values[40]
    content = [f"c{number if number != 41 else 40}" for number in range(60)]
    score = np.zeros(60)
    score[[0, 40, 41, 50, 51]] = [1, 0.999, 0.999, 0.997, 0.99]  # item 0 is a medoid
    items = make_items(60, content=content, split=["train"] * 60)
    selection, notes = decide(values, tmp_path, items, outlier=score)
    assert np.flatnonzero(selection.column("reason") == "outlier").tolist() == [40, 41, 50]  # 5 % of 60
    assert "4 training items have an outlier score above 0.98, more than the 5% of the split" in notes[0]
    assert selection.column("keep")[[0, 51]].all()
    assert set(selection.column("witness")[[40, 41, 50]]) <= {0, 1}
    selection, notes = decide(values, tmp_path / "b", items, outlier=score, outlier_cut=0.998)
    assert np.flatnonzero(selection.column("reason") == "outlier").tolist() == [40, 41]
    assert len(notes) == 1


def test_the_core_set_is_balanced(tmp_path):
    rng = np.random.default_rng(0)
    centre = np.eye(16)[np.r_[0, 1, np.zeros(78, int), np.ones(20, int)]]
    values = (centre + rng.normal(size=(100, 16)) * 0.1).astype(np.float32)
    items = make_items(100, split=["train"] * 100)
    clusters = make_clusters(values, items, 2)
    sizes = np.bincount(clusters.column("cluster"))
    assert sizes.tolist() == [79, 21]
    selection, _ = decide(values, tmp_path, items, keep_share=0.5, core_method="k-centre")
    kept = clusters.column("cluster")[selection.column("keep")]
    assert np.bincount(kept).tolist() == [29, 21]
    points = project(values, clusters.head)
    redundant = np.flatnonzero(selection.column("reason") == "redundant")
    same = np.flatnonzero(selection.column("keep") & (clusters.column("cluster") == 0))
    nearest = same[np.linalg.norm(points[redundant][:, None] - points[same], axis=2).argmin(1)]
    assert (selection.column("witness")[redundant] == nearest).all()
    assert selection.column("keep")[0]  # the item nearest its centroid
    least, _ = decide(values, tmp_path / "b", items, keep_share=0.001)
    assert least.column("keep").sum() == 2


def test_thousands_of_alike_images_and_any_block_give_the_same(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    values = (np.repeat(rng.normal(size=(2, 8)), 1500, 0) + rng.normal(size=(3000, 8)) * 0.01).astype(np.float32)
    thumbs = np.repeat(rng.integers(0, 256, (2, 256)), 1500, 0).astype(np.uint8)
    items = make_items(3000, thumbs=thumbs)
    whole, _ = decide(values, tmp_path / "a", items)
    assert whole.column("keep").sum() == 6  # two things, each in three splits
    assert whole.column("leak").sum() == 600
    monkeypatch.setattr(sys.modules["attar.stages.curate.curate"], "BLOCK", 70)
    small, _ = decide(values, tmp_path / "b", items)
    for name in ("keep", "reason", "witness", "weight", "leak"):
        assert (small.column(name) == whole.column(name)).all()


def test_same_bits_however_it_was_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["attar.stages.curate.curate"], "BLOCK", 100)
    values = load_digits().data[:500].astype(np.float32)
    thumbs = np.random.default_rng(0).integers(0, 256, (500, 256)).astype(np.uint8)
    thumbs[::3] = 100
    items = make_items(500, thumbs=thumbs)
    whole, _ = decide(values, tmp_path / "a", items, 4, keep_share=0.6, near_duplicate=0.95)
    assert set(whole.column("reason")) == {"", "near duplicate", "redundant"}
    assert whole.column("leak").any()
    shards = sorted((tmp_path / "a").glob("shard-*.parquet"))
    cores = sorted((tmp_path / "a").glob("core-*.parquet"))
    assert len(shards) == 6
    assert len(cores) > 1
    for path in (*shards[2:], cores[0]):
        path.unlink()
    resumed, _ = decide(values, tmp_path / "a", items, 4, keep_share=0.6, near_duplicate=0.95)
    assert resumed.table.equals(whole.table)
    again, _ = decide(values, tmp_path / "b", items, 4, keep_share=0.6, near_duplicate=0.95)
    assert again.table.equals(whole.table)
    monkeypatch.setattr(sys.modules["attar.stages.curate.curate"], "BLOCK", 13)
    other, _ = decide(values, tmp_path / "c", items, 4, keep_share=0.6, near_duplicate=0.95)
    assert all((other.column(name) == whole.column(name)).all() for name in ("keep", "reason", "witness", "weight", "leak"))


def test_without_validation_and_test_items(tmp_path):
    values = np.eye(5, dtype=np.float32)
    selection, notes = decide(values, tmp_path, make_items(5, split=["train"] * 5))
    assert selection.column("keep").all()
    assert selection.thresholds == {"near_duplicate": 0.97, "outlier_cut": 0.98, "keep_share": 1.0, "outlier_cap": 0.05}
    assert notes[-1].endswith("kept 5; validation and test 0: duplicates 0, leaks 0")
