"""Feeds: what compression sees of a run folder's images and of plain tensors, and that it never sees a test item."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from networks import images
from torch import Tensor

from attar.modalities.image import Loader
from attar.records import CLUSTER_SCHEMA, SELECTION_SCHEMA, Clusters, Dial, Head, Items, Policy, Preprocess, Selection
from attar.runtime import normalise
from attar.stages.compress.feed import WATCHED, Feed, ItemFeed, TensorFeed, drawing_share, erased, is_image, may_flip, nudged
from attar.workspace import Job

PREPROCESS = Preprocess(size=(16, 16), resize_shortest=16)
POLICY = Policy(families={name: Dial(0.5, 0.5) for name in ("geometry", "flip", "colour", "blur", "erase")})
Make = Callable[..., Job]


def item_feed(items: Items, job: Job, dropped: tuple[int, ...] = (), leaks: tuple[int, ...] = ()) -> ItemFeed:
    count = len(items)
    cluster = np.arange(count) % 3
    table = {"id": items.ids(), "cluster": cluster, "subcluster": np.full(count, -1)} | {
        key: np.zeros(count) for key in ("distance", "density", "outlier")
    }
    head = Head(
        mean=np.zeros(4, np.float32), projection=np.eye(4, dtype=np.float32), centroids=np.eye(3, 4, dtype=np.float32), temperature=1.0
    )
    clusters = Clusters(
        table=pa.table(table).cast(CLUSTER_SCHEMA), head=head, medoids=np.zeros(3, np.int64), curve=(), separation=0.5, method="given"
    )
    rows = {
        "id": items.ids(),
        "keep": ~np.isin(items.ids(), dropped),
        "reason": [""] * count,
        "witness": np.full(count, -1),
        "similarity": np.zeros(count),
        "weight": np.ones(count),
        "leak": np.isin(items.ids(), leaks),
        "flag": [""] * count,
    }
    selection = Selection(table=pa.table(rows).cast(SELECTION_SCHEMA), thresholds={})
    return ItemFeed(items, clusters, selection, POLICY, PREPROCESS, job)


def tensor_feed(job: Job, tensors: Tensor | None = None) -> TensorFeed:
    """Items whose values tell their split: train below 1000, validation below 2000, test above."""
    tensors = torch.arange(3000).float()[:, None].expand(-1, 4).contiguous() if tensors is None else tensors
    split = np.array(["train", "validation", "test"])[np.arange(len(tensors)) * 3 // len(tensors)]
    return TensorFeed(tensors, split, np.arange(len(tensors)) % 2, job)


@given(hnp.arrays(np.float64, st.integers(1, 60), elements=st.floats(0, 50)), st.integers(1, 5))
def test_drawing_is_half_by_weight_and_half_even_over_clusters(weight: np.ndarray, clusters: int) -> None:
    cluster = np.arange(len(weight)) % min(clusters, len(weight))
    share = drawing_share(weight, cluster)
    assert share.sum() == pytest.approx(1)
    assert (share > 0).all()
    for one in np.unique(cluster):
        by_weight = np.maximum(weight, 1e-6)[cluster == one].sum() / np.maximum(weight, 1e-6).sum()
        assert share[cluster == one].sum() == pytest.approx(0.5 * by_weight + 0.5 / len(np.unique(cluster)))


def both(items: Items, job: Make) -> dict[str, Feed]:
    return {"items": item_feed(items, job("items")), "tensors": tensor_feed(job("tensors"))}


@pytest.mark.parametrize("kind", ["items", "tensors"])
def test_every_feed_keeps_the_contract(kind: str, items: Items, job: Make) -> None:
    feed = both(items, job)[kind]
    example = feed.example(2)
    assert len(example) == 2
    assert not example.any()
    calibration = feed.calibration(11, 4)
    assert [len(batch) for batch in calibration] == [4, 4, 3]
    assert calibration[0].shape[1:] == example.shape[1:]
    assert calibration[0].dtype == example.dtype
    assert all(torch.equal(a, b) for a, b in zip(calibration, feed.calibration(11, 4), strict=True))
    assert sum(map(len, feed.calibration(10**6, 32))) == feed.count
    assert sum(map(len, feed.inputs(7))) == feed.count
    judged = list(feed.validation())
    assert max(map(len, judged)) <= 32
    assert feed.clusters is not None
    assert len(feed.clusters) == sum(map(len, judged))
    assert all(torch.equal(a, b) for a, b in zip(judged, feed.validation(), strict=True))
    assert 0 < len(feed.held_out()) <= WATCHED
    assert torch.equal(feed.held_out(), feed.held_out())


@pytest.mark.parametrize("kind", ["items", "tensors"])
def test_a_training_batch_depends_on_its_step_alone(kind: str, items: Items, job: Make) -> None:
    whole = dict(both(items, job)[kind].training(range(6), 8))
    resumed = dict(both(items, job)[kind].training(range(4, 6), 8))
    assert list(whole) == list(range(6))
    assert all(torch.equal(whole[step], views) for step, views in resumed.items())
    assert not torch.equal(whole[4], whole[5])
    assert all(len(views) == 8 for views in whole.values())


def test_test_items_are_never_seen(job: Make) -> None:
    feed = tensor_feed(job())
    train = torch.cat([*feed.inputs(100), *feed.calibration(500, 100), *(views for _, views in feed.training(range(20), 64))])
    judged = torch.cat([*feed.validation(), feed.held_out()])
    assert train.max() < 1000
    assert 1000 <= judged.min() <= judged.max() < 2000


def test_items_are_the_kept_ones_prepared_as_the_model_takes_them(items: Items, job: Make) -> None:
    train, validation = items.ids("train"), items.ids("validation")
    feed = item_feed(items, job(), dropped=tuple(train[:3]), leaks=tuple(validation[:1]))
    assert feed.count == len(train) - 3
    with Loader(items, PREPROCESS) as loader:
        wanted = normalise(loader.batch(train[3:]), PREPROCESS)
        judged = normalise(loader.batch(validation[1:]), PREPROCESS)
    np.testing.assert_allclose(torch.cat(list(feed.inputs(9))).numpy(), wanted, atol=1e-5)
    np.testing.assert_allclose(torch.cat(list(feed.validation())).numpy(), judged, atol=1e-5)
    every = item_feed(items, job(), leaks=tuple(validation))
    assert sum(map(len, every.validation())) == len(validation), "where all are leaks, they are better than nothing"


def test_what_is_an_image() -> None:
    assert is_image(torch.zeros(2, 3, 16, 20))
    assert is_image(torch.zeros(2, 1, 28, 28))
    for other in (torch.zeros(2, 3, 8, 8), torch.zeros(2, 12, 32, 32), torch.zeros(2, 3), torch.zeros(2, 3, 32, 32, dtype=torch.int64)):
        assert not is_image(other)


def test_tables_and_tokens_are_not_augmented(job: Make) -> None:
    tokens = torch.arange(300 * 6).reshape(300, 6)
    known = set(map(tuple, tokens[:100].tolist()))
    for _, views in tensor_feed(job(), tokens).training(range(5), 16):
        assert views.dtype == torch.int64
        assert set(map(tuple, views.tolist())) <= known


def test_flips_are_allowed_only_where_mirror_images_cannot_be_told(job: Make) -> None:
    same = images(200)
    assert may_flip(same, job("symmetric"))
    ramp = torch.linspace(-3, 3, 32).expand(200, 3, 32, 32) + 0.1 * same
    assert not may_flip(ramp, job("ramp"))


@pytest.mark.parametrize("flips", [False, True])
def test_a_nudged_image_is_a_window_of_the_reflected_one(flips: bool) -> None:
    plain, rng = torch.rand(40, 3, 16, 24), np.random.default_rng(0)
    views = nudged(plain, flips, rng)
    padded = torch.nn.functional.pad(plain, (3, 3, 2, 2), mode="reflect")
    mirrored = 0
    for image, view in zip(padded, views):
        windows = [image[:, y : y + 16, x : x + 24] for y in range(5) for x in range(7)]
        straight = any(torch.equal(view, window) for window in windows)
        turned = any(torch.equal(view, window.flip(2)) for window in windows)
        assert straight or turned
        mirrored += not straight
    assert (10 <= mirrored <= 30) if flips else mirrored == 0
    assert torch.equal(nudged(plain, flips, np.random.default_rng(0)), views)


def test_half_of_the_images_lose_a_square_of_the_right_size_to_the_mean() -> None:
    views = torch.rand(400, 3, 40, 32, generator=torch.Generator().manual_seed(0)) + 5
    first, again = (erased(views, np.random.default_rng(3)) for _ in range(2))
    assert torch.equal(first, again)
    changed = (first != views).any(1)
    assert 0.4 < float(changed.flatten(1).any(1).float().mean()) < 0.6
    assert torch.allclose(first[changed[:, None].expand_as(first)].reshape(3, -1).mean(1), views.mean((0, 2, 3)), atol=1e-2)
    rows, columns = changed.any(2).sum(1), changed.any(1).sum(1)
    assert torch.equal(rows, columns), "squares"
    assert torch.equal(changed.flatten(1).sum(1), rows * columns), "of one piece"
    sides = rows[rows > 0].float() / 32
    assert float(sides.min()) >= 0.18
    assert 0.4 < float(sides.max()) <= 0.47
