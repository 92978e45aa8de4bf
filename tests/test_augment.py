"""Augmentation: plans against operations done one by one, the engine against slow references, and the policy's questions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import make_image
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from PIL import Image
from scipy.ndimage import gaussian_filter

from attar.config import Augment, Cluster, Curate, Embed, ModelChoice
from attar.records import Dial, Items, Policy
from attar.stages.augment import policy as policies
from attar.stages.augment.engine import apply, augment, normalise, preview
from attar.stages.augment.plan import FAMILIES, LUMA, Plan, sample
from attar.stages.cluster import cluster
from attar.stages.curate import curate
from attar.stages.embed import embed
from attar.workspace import Job

OFF = {family: Dial(0.0, 0.0) for family in FAMILIES}


def _dials(count: int, strength: float = 1.0, frequency: float = 1.0, only: str | None = None) -> list[dict[str, Dial]]:
    names = FAMILIES if only is None else (only,)
    return [OFF | {name: Dial(strength, frequency) for name in names}] * count


def _images(count: int, width: int = 24, height: int = 20) -> np.ndarray:
    return np.stack([np.asarray(make_image(("stripes", "discs")[i % 2], i, width, height)) for i in range(count)])


def _identity(count: int, **parts: np.ndarray) -> Plan:
    plain = sample([OFF] * count, np.random.default_rng(0))
    return plain._replace(**parts)


# plan


@given(st.integers(0, 1000), st.sampled_from([Dial(0.0, 1.0), Dial(1.0, 0.0), Dial(0.0, 0.0)]))
def test_dials_at_zero_are_the_identity_exactly(seed: int, dial: Dial) -> None:
    plan = sample([dict.fromkeys(FAMILIES, dial)] * 5, np.random.default_rng(seed))
    assert np.array_equal(plan.geometry, np.broadcast_to(np.eye(2, 3, dtype=np.float32), (5, 2, 3)))
    assert np.array_equal(plan.colour, np.broadcast_to(np.eye(3, 4, dtype=np.float32), (5, 3, 4)))
    assert not plan.blur.any()
    assert (plan.erase[:, 0] == plan.erase[:, 2]).all()
    assert (plan.erase[:, 1] == plan.erase[:, 3]).all()


@pytest.mark.parametrize("frequency", [0.1, 0.5, 0.9])
def test_families_are_drawn_with_their_frequency_and_apart_from_each_other(frequency: float) -> None:
    count = 4000
    plan = sample(_dials(count, 1.0, frequency), np.random.default_rng(0))
    drawn = np.stack(
        [
            np.abs(np.linalg.det(plan.geometry[:, :, :2])) < 1 - 1e-6,
            np.linalg.det(plan.geometry[:, :, :2]) < 0,
            (plan.colour != np.eye(3, 4, dtype=np.float32)).any((1, 2)),
            plan.blur > 0,
            plan.erase[:, 2] > plan.erase[:, 0],
        ]
    )
    error = 4 * np.sqrt(frequency * (1 - frequency) / count)
    np.testing.assert_allclose(drawn.mean(1), frequency, atol=error)
    assert np.abs(np.corrcoef(drawn) - np.eye(len(FAMILIES))).max() < 4 / np.sqrt(count)


@settings(max_examples=30)
@given(st.integers(0, 1000), st.floats(0.05, 1))
def test_plans_stay_in_the_range_their_strength_gives(seed: int, strength: float) -> None:
    plan = sample(_dials(40, strength), np.random.default_rng(seed))
    area = np.abs(np.linalg.det(plan.geometry[:, :, :2].astype(np.float64)))
    assert (area >= (1 - 0.92 * strength) * 0.7).all()  # capping a side at the image's own takes a little more
    assert (area <= 1 + 1e-6).all()
    assert plan.blur.max() <= 0.03 * strength + 1e-7
    assert ((plan.erase >= 0) & (plan.erase <= 1 + 1e-6)).all()
    boxes = (plan.erase[:, 2] - plan.erase[:, 0]) * (plan.erase[:, 3] - plan.erase[:, 1])
    assert boxes.max() <= 0.25 * strength + 1e-6
    grey = plan.colour[:, :, :3].sum(2) * 0.5 + plan.colour[:, :, 3]  # hue and saturation leave grey grey
    np.testing.assert_allclose(grey, grey[:, :1].repeat(3, 1), atol=5e-3)
    assert (np.abs(grey[:, 0] - 0.5) <= 0.4 * strength + 5e-3).all()


def test_plans_are_bit_equal_under_a_seed() -> None:
    first, second, other = (sample(_dials(20, 0.7, 0.5), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second))
    assert not np.array_equal(first.geometry, other.geometry)


def test_a_plan_for_dials_without_a_family_names_it() -> None:
    with pytest.raises(KeyError, match="erase"):
        sample([{family: Dial(1.0, 1.0) for family in FAMILIES if family != "erase"}], np.random.default_rng(0))


def test_colour_is_its_operations_one_by_one() -> None:
    """Hue, saturation, contrast and brightness done on every pixel with the parameters drawn in the documented order."""
    count, strength = 6, 0.6
    plan = sample(_dials(count, strength, only="colour"), np.random.default_rng(3))
    rng = np.random.default_rng(3)
    rng.random((count, len(FAMILIES)))
    for _ in range(5):  # geometry: area, aspect, x, y, angle
        rng.random(count)
    turns = 0.2 * strength * rng.uniform(-1, 1, count)
    brightness, contrast, saturation = 1 + 0.8 * strength * rng.uniform(-1, 1, (3, count))
    pixels = np.random.default_rng(9).random((50, 3))
    for view in range(count):
        ours = pixels @ plan.colour[view, :, :3].T + plan.colour[view, :, 3]
        y = pixels @ LUMA
        i = pixels @ [0.596, -0.274, -0.322]
        q = pixels @ [0.211, -0.523, 0.312]
        angle = 2 * np.pi * turns[view]
        i, q = i * np.cos(angle) - q * np.sin(angle), i * np.sin(angle) + q * np.cos(angle)
        rgb = np.stack([y + 0.956 * i + 0.621 * q, y - 0.272 * i - 0.647 * q, y - 1.106 * i + 1.703 * q], 1)
        grey = (rgb @ LUMA)[:, None]
        rgb = grey + saturation[view] * (rgb - grey)
        rgb = 0.5 + contrast[view] * (rgb - 0.5)
        np.testing.assert_allclose(ours, rgb * brightness[view], atol=0.01)  # the printed YIQ inverse has three digits


@pytest.mark.parametrize("seed", range(4))
def test_geometry_is_rotation_and_crop_done_by_pil(seed: int) -> None:
    """Low strengths; within two grey levels of 255 on average, PIL's border and rounding being its own."""
    y, x = np.mgrid[:64, :64] / 10
    image = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], 2) * 100 + 128
    image = image.astype(np.uint8)
    plan = sample(_dials(1, 0.3, only="geometry"), np.random.default_rng(seed))
    (a, b, c), (d, e, f) = plan.geometry[0].astype(float)
    # from [−1, 1] at the edges to pixels whose centres PIL puts at + 0.5
    half = 32
    coefficients = (a, b, half * (1 + c - a - b), d, e, half * (1 + f - d - e))
    theirs = np.asarray(Image.fromarray(image).transform((64, 64), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR))
    ours = (apply(image[None], plan)[0].permute(1, 2, 0) * 255).numpy()
    inside = theirs.min(2) > 0  # PIL leaves black what lies outside, we reflect
    assert inside.mean() > 0.8
    assert np.abs(ours - theirs)[inside].mean() < 2


# engine


def test_the_identity_returns_the_pixels() -> None:
    images = _images(3)
    views = apply(images, _identity(3))
    np.testing.assert_allclose(views.numpy(), images.transpose(0, 3, 1, 2) / 255, atol=2e-6)


def test_a_flip_is_the_mirror_image() -> None:
    images = _images(3)
    plan = sample(_dials(3, only="flip"), np.random.default_rng(0))
    np.testing.assert_allclose(apply(images, plan).numpy(), images[:, :, ::-1].transpose(0, 3, 1, 2) / 255, atol=2e-6)


def test_colour_of_every_pixel_is_its_matrix() -> None:
    images, plan = _images(2, 6, 5), sample(_dials(2, only="colour"), np.random.default_rng(1))
    views = apply(images, plan).numpy()
    for view in range(2):
        for row in range(5):
            for column in range(6):
                rgb = images[view, row, column] / 255
                expected = [sum(plan.colour[view, c, k] * rgb[k] for k in range(3)) + plan.colour[view, c, 3] for c in range(3)]
                np.testing.assert_allclose(views[view, :, row, column], np.clip(expected, 0, 1), atol=1e-5)


@pytest.mark.parametrize("share", [0.02, 0.045, 0.11])
def test_blur_is_scipys(share: float) -> None:
    images = _images(2, 40, 32)
    views = apply(images, _identity(2, blur=np.array([share, 0], np.float32))).numpy()
    sigma = share * 32
    radius = max(1, int(np.ceil(2.5 * sigma)))
    expected = [gaussian_filter(images[0, :, :, c] / 255, sigma, mode="mirror", radius=radius) for c in range(3)]
    np.testing.assert_allclose(views[0], expected, atol=1e-5)
    np.testing.assert_allclose(views[1], images[1].transpose(2, 0, 1) / 255, atol=2e-6)


def test_an_erased_box_is_grey_and_the_rest_is_untouched() -> None:
    images = _images(1, 20, 10)
    boxes = np.array([[0.25, 0.2, 0.5, 0.6]], np.float32)
    expected = images[0] / 255
    expected[2:6, 5:10] = 0.5
    np.testing.assert_allclose(apply(images, _identity(1, erase=boxes))[0].permute(1, 2, 0).numpy(), expected, atol=2e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 1))
def test_views_are_in_range_and_an_item_depends_on_its_own_row_of_the_plan_alone(seed: int, strength: float) -> None:
    images, plan = _images(4), sample(_dials(4, strength), np.random.default_rng(seed))
    views = apply(images, plan)
    assert float(views.min()) >= 0
    assert float(views.max()) <= 1
    alone = torch.cat([apply(images[i : i + 1], Plan(*(part[i : i + 1] for part in plan))) for i in range(4)])
    torch.testing.assert_close(alone, views, rtol=0, atol=2e-6)


def test_views_are_bit_equal_under_a_seed_and_the_images_are_left_as_they_were() -> None:
    images = _images(4)
    kept, policy = images.copy(), Policy(families=policies.DEFAULTS)
    first, second, other = (augment(images, policy, None, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert np.array_equal(images, kept)


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
    shown = preview(images, Policy(families=policies.DEFAULTS), np.zeros(2, np.int64), np.random.default_rng(0), 3)
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


def test_images_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(TypeCheckError, match="images"):
        apply(_images(2).astype(np.float32), _identity(2))
    with pytest.raises(TypeCheckError, match="images"):
        apply(_images(2).transpose(0, 3, 1, 2), _identity(2))


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
