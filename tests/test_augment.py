"""Augmentation for users and for the stages: what goes in, what comes out, what is refused; and the policy's questions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import make_image
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from PIL import Image

import attar
from attar.config import Augment, Cluster, Curate, Embed, ModelChoice, build_config
from attar.errors import DataError, UsageError
from attar.records import Dial, Items, Policy
from attar.stages.augment import policy as policies
from attar.stages.augment import reference
from attar.stages.augment.catalogue import DEFAULTS, FAMILIES, POLICIES
from attar.stages.augment.controller import Controller, pins
from attar.stages.augment.engine import apply, augment, normalise, preview
from attar.stages.augment.plan import Plan, sample
from attar.stages.cluster.cluster import cluster
from attar.stages.curate.curate import curate
from attar.stages.embed import embed
from attar.workspace import Job

OFF = {family: Dial(0.0, 0.0) for family in FAMILIES}


def _images(count: int, width: int = 24, height: int = 20) -> np.ndarray:
    return np.stack([np.asarray(make_image(("stripes", "discs")[i % 2], i, width, height)) for i in range(count)])


def _mixed() -> list[np.ndarray]:
    return [np.asarray(make_image("discs", i, width, height)) for i, (width, height) in enumerate([(30, 20), (24, 40), (1, 1), (50, 50)])]


def _plan(count: int, height: int, width: int, **parts: np.ndarray) -> Plan:
    return sample([{}] * count, np.random.default_rng(0), [(height, width)] * count, (height, width))._replace(**parts)


# attar.Augment


def test_a_batch_is_the_normalised_views_of_the_plan() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    aug = attar.Augment("default", (16, 20), mean=mean, std=std, seed=3)
    views, plan = aug(_mixed(), return_plan=True)
    assert (views.shape, views.dtype) == ((4, 3, 16, 20), torch.float32)
    assert plan.size == (16, 20)
    np.testing.assert_allclose(views.numpy(), reference.render(_mixed(), plan, mean, std), atol=0.05)


def test_a_view_depends_on_seed_step_and_number_alone() -> None:
    images, aug = _mixed(), attar.Augment("strong", 16, seed=3)
    first, second = aug(images), aug(images)
    assert not torch.equal(first, second)
    assert torch.equal(first, aug(images, step=0))
    assert torch.equal(second, aug(images, step=1))
    assert torch.equal(second, attar.Augment("strong", 16, seed=3, threads=2)(images, step=1))
    assert not torch.equal(second, attar.Augment("strong", 16, seed=4)(images, step=1))
    assert torch.equal(first[:2], aug(images[:2], step=0))  # whatever comes after them


def test_views_of_an_image_lie_next_to_each_other() -> None:
    views, plan = attar.Augment({"flip": (1.0, 0.5)}, 20)(_images(10, 20, 20), views=3, step=0, return_plan=True)
    assert plan.source.tolist() == np.repeat(np.arange(10), 3).tolist()
    flipped = np.isfinite(plan.drawn["horizontal_flip"][:, 0])
    assert 5 < flipped.sum() < 25
    plain = attar.Augment("none", 20)(_images(10, 20, 20))
    for number, view in enumerate(views):
        expected = plain[number // 3].flip(2) if flipped[number] else plain[number // 3]
        torch.testing.assert_close(view, expected, rtol=0, atol=2e-6)


def test_a_plan_needs_no_pixels() -> None:
    aug, images = attar.Augment("strong", 16), _mixed()
    _, plan = aug(images, step=7, views=2, return_plan=True)
    without = aug.plan([image.shape[:2] for image in images], step=7, views=2)
    assert all(np.array_equal(a, b) for a, b in zip(plan[:-1], without[:-1]))


def test_all_ways_to_give_images_mean_the_same() -> None:
    images = _images(3)
    aug = attar.Augment("default", 16, seed=1)
    expected = aug(images, step=0)
    first = torch.from_numpy(images).permute(0, 3, 1, 2)
    for given_as in (
        list(images),
        tuple(images),
        [Image.fromarray(image) for image in images],
        [torch.from_numpy(image) for image in images],
        first,
        first.contiguous(),
        first.float() / 255,
        (first.double() / 255),
        images.astype(np.float32) / 255,
        images / 255,
        np.concatenate([images, images[:, :, :, :1]], 3),
    ):
        assert torch.equal(aug(given_as, step=0), expected)


def test_grey_and_palette_images() -> None:
    grey = _images(2)[:, :, :, :1]
    aug = attar.Augment("none", (20, 24))
    expected = aug(grey.repeat(3, 3))
    for given_as in (grey, list(grey), [image[:, :, 0] for image in grey], [Image.fromarray(image[:, :, 0]) for image in grey]):
        assert torch.equal(aug(given_as), expected)
    palette = Image.fromarray(_images(1)[0]).quantize(16)
    assert torch.equal(aug([palette]), aug([palette.convert("RGB")]))


def test_each_cluster_has_its_own_dials_for_users_too() -> None:
    policy = Policy(families={}, clusters=({}, {"flip": Dial(1.0, 1.0)}))
    aug, images = attar.Augment(policy, (20, 24), mean=(0.0,) * 3, std=(1.0,) * 3), _images(4)
    views = aug(images, clusters=[0, 1, 0, 1]).numpy()
    plain = images.transpose(0, 3, 1, 2) / 255
    np.testing.assert_allclose(views[[0, 2]], plain[[0, 2]], atol=2e-6)
    np.testing.assert_allclose(views[[1, 3]], plain[[1, 3]][..., ::-1], atol=2e-6)
    np.testing.assert_allclose(aug(images).numpy(), plain, atol=2e-6)


@pytest.mark.parametrize("name", POLICIES)
def test_policies_with_a_name_run(name: str) -> None:
    views = attar.Augment(name, 16, mean=0.0, std=1.0)(_mixed(), views=2)
    assert views.shape == (8, 3, 16, 16)
    assert float(views.min()) >= 0
    assert float(views.max()) <= 1


def test_a_huge_and_a_long_image() -> None:
    huge = np.zeros((4000, 4000, 3), np.uint8)
    huge[:, 2000:] = 200
    thin = np.full((1, 40_000, 3), 100, np.uint8)
    views = attar.Augment("none", 8, mean=(0.0,) * 3, std=(1.0,) * 3)([huge, thin])
    np.testing.assert_allclose(views[0, :, :, :4], 0, atol=1e-6)
    np.testing.assert_allclose(views[0, :, :, 4:], 200 / 255, atol=1e-6)
    np.testing.assert_allclose(views[1], 100 / 255, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "defalt"}, "no policy 'defalt'.*Did you mean 'default'"),
        ({"policy": {"rotate": 2}}, "rotate: strength 2 is outside 0 … 1"),
        ({"size": 0}, r"size is 0\. Expected a side, or \(height, width\), in pixels from 1 to 32768"),
        ({"size": (3, 4, 5)}, r"size is \(3, 4, 5\)"),
        ({"size": 10.5}, "size is 10.5"),
        ({"mean": (0.5, 0.5)}, r"mean is \(0.5, 0.5\)\. Expected three numbers"),
        ({"mean": "grey"}, "mean is 'grey'"),
        ({"std": (1, 1, 0)}, "std is .*Expected positive numbers"),
        ({"std": (1, 1, float("nan"))}, "std is .*Expected three finite numbers"),
        ({"fill": 128}, r"fill is \(128.0, .*Expected numbers in \[0, 1\]"),
        ({"dtype": "int8"}, "dtype is 'int8'. Expected one of float32, float16, bfloat16"),
        ({"layout": "nhwc"}, "layout is 'nhwc'. Expected one of contiguous, channels_last"),
        ({"border": "wrap"}, "border is 'wrap'. Expected one of reflect, edge, constant"),
        ({"seed": -1}, "seed is -1. Expected a whole number from 0"),
        ({"seed": True}, "seed is True"),
        ({"threads": 0}, "threads is 0. Expected a whole number from 1"),
        ({"device": "gpu"}, "device is 'gpu'. Expected what torch.device takes"),
    ],
)
def test_settings_that_are_wrong_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        attar.Augment(**options)


IMAGE = np.zeros((4, 5, 3), np.uint8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "There are no images: the list is empty"),
        ("photo.jpg", "Images of type str are not understood. Expected a list of uint8 arrays"),
        (7, "Images of type int are not understood"),
        (IMAGE, r"type ndarray of shape \(4, 5, 3\) are not understood.*One image alone goes in as \[image\]"),
        (["photo.jpg"], "Image 0 is of type str"),
        ([IMAGE, IMAGE.astype(np.float32)], r"Image 1 is of float32\. Expected uint8: \(image \* 255\)\.round\(\)\.astype\(np\.uint8\)"),
        ([IMAGE.astype(np.int64)], "Image 0 is of int64. Expected uint8: image.astype"),
        ([np.zeros((4, 5, 2), np.uint8)], r"Image 0 has shape \(4, 5, 2\)\. Expected \(height, width\) or \(height, width, 1, 3 or 4\)\.$"),
        ([IMAGE.transpose(2, 0, 1)], r"Image 0 has shape \(3, 4, 5\).*goes in as image.transpose\(1, 2, 0\)"),
        ([np.zeros((4, 0, 3), np.uint8)], r"Image 0 has shape \(4, 0, 3\): there are no pixels"),
        (np.zeros((2, 3, 4, 5), np.uint8), r"shape \(2, 3, 4, 5\): 5 channels.*goes in as batch.transpose\(0, 2, 3, 1\)"),
        (torch.zeros((2, 4, 5, 3), dtype=torch.uint8).permute(0, 2, 1, 3), r"5 channels.*goes in as batch.permute\(0, 3, 1, 2\)"),
        (np.zeros((0, 4, 5, 3), np.uint8), "there are no pixels"),
        (torch.zeros((2, 3, 0, 5)), "there are no pixels"),
        (torch.zeros((2, 3, 4, 5), dtype=torch.int64), "The batch is of torch.int64. Expected uint8, or floats"),
        (np.zeros((2, 4, 5, 3), np.int32), "The batch is of int32. Expected uint8, or floats"),
        (torch.full((2, 3, 4, 5), 255.0), r"goes from 255 to 255\. Expected values in \[0, 1\].*batch / 255"),
        (np.full((2, 4, 5, 3), -0.1), r"goes from -0\.1 to -0\.1"),
        (torch.full((2, 3, 4, 5), float("nan")), "goes from nan to nan"),
    ],
)
def test_images_that_are_wrong_are_refused(images: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        attar.Augment("none", 8)(images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clusters": [0]}, r"clusters have shape \(1,\).*Expected one whole number for each of 2 images"),
        ({"clusters": [0.0, 1.0]}, "type float64. Expected one whole number"),
        ({"clusters": [0, 2]}, "clusters go from 0 to 2. Expected 0 to 1: the policy has dials for 2"),
        ({"clusters": [-1, 0]}, "clusters go from -1 to 0"),
        ({"step": -1}, "step is -1. Expected a whole number from 0"),
        ({"views": 0}, "views is 0. Expected a whole number from 1"),
    ],
)
def test_calls_that_are_wrong_are_refused(options: dict[str, Any], message: str) -> None:
    aug = attar.Augment(Policy(families={}, clusters=({}, {})), 8)
    with pytest.raises(UsageError, match=message):
        aug([IMAGE, IMAGE], **options)


def test_a_policy_file_of_a_run_is_taken(tmp_path: Path) -> None:
    from attar.formats import FORMATS

    FORMATS[Policy].save(tmp_path, Policy(families=DEFAULTS, clusters=(DEFAULTS, {"flip": Dial(1.0, 1.0)})))
    aug = attar.Augment(tmp_path / "policy.json", 8)
    assert aug.policy.families == DEFAULTS
    assert aug(_images(2), clusters=[0, 1]).shape == (2, 3, 8, 8)


# for the stages


def test_the_identity_returns_the_pixels() -> None:
    images = _images(3)
    for given_as in (images, torch.from_numpy(images), list(images)):
        views = apply(given_as, _plan(3, 20, 24))
        np.testing.assert_allclose(views.numpy(), images.transpose(0, 3, 1, 2) / 255, atol=2e-6)


def test_colour_of_every_pixel_is_its_matrix() -> None:
    images = _images(2, 6, 5)
    plan = sample([{"colour": Dial(1.0, 1.0)}] * 2, np.random.default_rng(1), [(5, 6)] * 2, (5, 6))
    views = apply(images, plan).numpy()
    for view in range(2):
        for row in range(5):
            for column in range(6):
                rgb = images[view, row, column] / 255
                expected = [sum(plan.colour[view, c, k] * rgb[k] for k in range(3)) + plan.colour[view, c, 3] for c in range(3)]
                np.testing.assert_allclose(views[view, :, row, column], np.clip(expected, 0, 1), atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_geometry_is_rotation_and_crop_done_by_pil(seed: int) -> None:
    """Low strengths; within two grey levels of 255 on average, PIL's border and rounding being its own."""
    y, x = np.mgrid[:64, :64] / 10
    image = (np.stack([np.sin(x), np.cos(y), np.sin(x + y)], 2) * 100 + 128).astype(np.uint8)
    plan = sample([{"geometry": Dial(0.3, 1.0)}], np.random.default_rng(seed), [(64, 64)], (64, 64))
    theirs = Image.fromarray(image).transform((64, 64), Image.Transform.AFFINE, plan.matrix[0, :2].ravel(), Image.Resampling.BILINEAR)
    theirs = np.asarray(theirs)
    ours = (apply(image[None], plan)[0].permute(1, 2, 0) * 255).numpy()
    inside = theirs.min(2) > 0  # PIL leaves black what lies outside, we reflect
    assert inside.mean() > 0.8
    assert np.abs(ours - theirs)[inside].mean() < 2


def test_an_erased_box_is_grey_and_the_rest_is_untouched() -> None:
    images = _images(1, 20, 10)
    expected = images[0] / 255
    expected[2:6, 5:10] = 0.5
    views = apply(images, _plan(1, 10, 20, erase=np.array([[0.25, 0.2, 0.5, 0.6]], np.float32)))
    np.testing.assert_allclose(views[0].permute(1, 2, 0).numpy(), expected, atol=2e-6)


def test_views_are_bit_equal_under_a_seed_and_the_images_are_left_as_they_were() -> None:
    images = _images(4)
    kept, policy = images.copy(), Policy(families=DEFAULTS)
    first, second, other = (augment(images, policy, None, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert np.array_equal(images, kept)


def test_a_policy_that_picks_gives_the_stages_one_transform_each() -> None:
    images = np.full((200, 8, 8, 3), 100, np.uint8)
    policy = Policy(families={"invert": Dial(1.0, 1.0), "blur": Dial(1.0, 1.0)}, pick=1)
    inverted = augment(images, policy, None, np.random.default_rng(0)).amax((1, 2, 3)) > 0.5
    assert 70 < int(inverted.sum()) < 130


def test_each_cluster_has_its_own_dials() -> None:
    images = _images(4)
    flips = OFF | {"flip": Dial(1.0, 1.0)}
    policy = Policy(families=OFF, clusters=(OFF, flips))
    views = augment(images, policy, np.array([0, 1, 0, 1]), np.random.default_rng(0)).numpy()
    plain = images.transpose(0, 3, 1, 2) / 255
    np.testing.assert_allclose(views[[0, 2]], plain[[0, 2]], atol=2e-6)
    np.testing.assert_allclose(views[[1, 3]], plain[[1, 3]][..., ::-1], atol=2e-6)
    np.testing.assert_allclose(augment(images, policy, None, np.random.default_rng(0)).numpy(), plain, atol=2e-6)


def test_previews_are_bytes_of_different_views() -> None:
    images = _images(2)
    shown = preview(images, Policy(families=DEFAULTS), np.zeros(2, np.int64), np.random.default_rng(0), 3)
    assert shown.shape == (2, 3, *images.shape[1:])
    assert shown.dtype == np.uint8
    assert not np.array_equal(shown[:, 0], shown[:, 1])
    same = preview(images, Policy(families=OFF), np.zeros(2, np.int64), np.random.default_rng(0), 1)
    assert np.array_equal(same[:, 0], images)


def test_normalise_is_per_channel() -> None:
    views = torch.rand(2, 3, 4, 5)
    found = normalise(views, (0.1, 0.2, 0.3), (0.5, 0.25, 2.0))
    for channel, (mean, std) in enumerate([(0.1, 0.5), (0.2, 0.25), (0.3, 2.0)]):
        torch.testing.assert_close(found[:, channel], (views[:, channel] - mean) / std)


def test_images_of_the_wrong_kind_are_refused_by_the_stages() -> None:
    with pytest.raises(TypeCheckError, match="images"):
        apply(_images(2).astype(np.float32), _plan(2, 20, 24))
    with pytest.raises(TypeCheckError, match="images"):
        apply(_images(2).transpose(0, 3, 1, 2), _plan(2, 20, 24))


# policy


def _thumbs(count: int, symmetric: bool) -> np.ndarray:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 120, (count, 16, 16))
    images[:, 3:13, 2:6] += 100  # a bar on the left
    if symmetric:
        images[:, 3:13, 10:14] += 100
    return images.astype(np.uint8).reshape(count, 256)


def test_the_mirror_probe_tells_images_with_a_handedness_from_those_without() -> None:
    assert policies.mirror_accuracy(_thumbs(200, symmetric=False), np.random.default_rng(0)) > 0.95
    assert policies.mirror_accuracy(_thumbs(200, symmetric=True), np.random.default_rng(0)) < policies.MIRROR_LIMIT
    once, again = (policies.mirror_accuracy(_thumbs(100, symmetric=False), np.random.default_rng(1)) for _ in range(2))
    assert once == again


def test_the_mirror_probe_refuses_thumbnails_of_another_size() -> None:
    with pytest.raises(ValueError, match="cannot reshape"):
        policies.mirror_accuracy(np.zeros((10, 100), np.uint8), np.random.default_rng(0))


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=5, max_size=5))
def test_the_largest_strength_is_the_last_before_the_first_failure(shares: list[float]) -> None:
    found = policies._largest(shares)
    passed = [strength for strength, share in zip(policies.STRENGTHS, shares) if share >= policies.KEPT]
    if shares[0] < policies.KEPT:
        assert found == policies.STRENGTHS[0] / 2
    else:
        assert found in passed
        assert all(share >= policies.KEPT for strength, share in zip(policies.STRENGTHS, shares) if strength <= found)
    better = [min(1.0, share + 0.1) for share in shares]
    assert policies._largest(better) >= found


def test_pins_replace_the_dials_but_do_not_bring_back_what_is_wrong() -> None:
    start = Policy(families=policies.DEFAULTS | {"flip": policies.OFF}, clusters=(policies.DEFAULTS,), method="found")
    assert policies.pinned(start, Augment()) is start
    both = policies.pinned(start, Augment(strength=0.3, frequency=0.4))
    assert both.families["colour"] == both.clusters[0]["colour"] == Dial(0.3, 0.4)
    assert both.families["flip"] == policies.OFF
    assert both.clusters[0]["flip"] == Dial(0.3, 0.4)
    assert both.method == "found; pinned by hand"
    one = policies.pinned(start, Augment(strength=0.3))
    assert one.families["geometry"] == Dial(0.3, policies.DEFAULTS["geometry"].frequency)
    assert Controller(one, pins(one)).live


def test_dials_can_be_held_as_they_were_found() -> None:
    start = Policy(families=policies.DEFAULTS, clusters=(policies.DEFAULTS,), method="found")
    held = policies.pinned(start, Augment(dials="held"))
    assert (held.families, held.clusters, held.method) == (start.families, start.clusters, "found")
    assert Controller(start, pins(start)).live
    assert not Controller(held, pins(held)).live
    again = policies.pinned(held, Augment(dials="held", frequency=0.4))
    assert again.families["colour"] == Dial(policies.DEFAULTS["colour"].strength, 0.4)
    assert again.evidence == ({"pinned": "frequency", "value": 0.4}, {"pinned": "strength", "value": "as found"})
    with pytest.raises(UsageError, match="dials: 'still'; expected live or held"):
        build_config({"data": "photos", "dials": "still"})


def test_the_starting_policy_switches_flips_off_where_images_have_a_handedness(items: Items, job: Callable[..., Job]) -> None:
    thumbs = pa.array([bytes(row) for row in _thumbs(len(items), symmetric=False)], pa.binary(256))
    place = items.table.column_names.index("thumb")
    handed = Items(root=items.root, quarantine=items.quarantine, table=items.table.set_column(place, "thumb", thumbs))
    made = job("augment")
    found = policies.starting_policy(handed, Augment(), made)
    assert found.families["flip"] == policies.OFF
    assert found.families["colour"] == policies.DEFAULTS["colour"]
    assert any("no flips" in note for note in made.notes)
    assert policies.starting_policy(handed, Augment(strength=1.0), job("other")).families["flip"] == policies.OFF


def test_the_policy_has_dials_for_every_cluster_with_the_measurements_behind_them(items: Items, job: Callable[..., Job]) -> None:
    vectors = embed(items, ModelChoice(), Embed(self_steps=5, self_width=8), Augment(), job("embed"))
    clusters = cluster(items, vectors, Cluster(clusters=3), job("cluster"))
    selection = curate(items, vectors, clusters, Curate(), job("curate"))
    stage = policies.augment
    found = stage(items, vectors, clusters, selection, Augment(), job("augment"))
    assert len(found.clusters) == clusters.count == 3
    grid = {policies.STRENGTHS[0] / 2, *policies.STRENGTHS}
    for dials in (found.families, *found.clusters):
        assert set(dials) == set(FAMILIES)
        assert all(dials[family].strength in grid for family in ("geometry", "colour", "blur", "erase"))
    rows = [row for row in found.evidence if row["family"] == "colour"]
    assert [row["strength"] for row in rows] == list(policies.STRENGTHS)
    assert found.families["colour"].strength == policies._largest([row["kept"] for row in rows])
    again = stage(items, vectors, clusters, selection, Augment(), Job("augment", job("elsewhere").folder, quiet=True))
    assert again == found
    pinned = stage(items, vectors, clusters, selection, Augment(strength=0.3), job("pinned"))
    assert pinned.families["colour"] == Dial(0.3, policies.DEFAULTS["colour"].frequency)
    assert pinned.clusters == ()
