"""Mixing: against plain loops, who was mixed with whom, whole numbers and lonely items left alone."""

from __future__ import annotations

import doctest
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attar.errors import DataError, UsageError
from attar.records import Dial
from attar.stages.augment import mix as mixing
from attar.stages.augment.mix import PLAIN, Mixed, cutmix, extrapolate, interpolate, mix, mixup, mosaic, neighbour, resample

CLUSTERS = np.array([0, 1, 0, 1, 0, 2, -1, 1, 0])
VECTORS = np.random.default_rng(5).standard_normal((9, 3))


def near(function: Callable[..., Mixed]) -> Callable[..., Mixed]:
    """A function of neighbours as one of the batch, the generator and the dial alone."""
    return lambda inputs, rng, *dial: function(inputs, VECTORS[: len(inputs)], CLUSTERS[: len(inputs)], rng, *dial)


WAYS: dict[str, Callable[..., Mixed]] = {
    "mixup": mixup, "cutmix": cutmix, "mosaic": mosaic, "resample": resample, "interpolate": near(interpolate), "extrapolate": near(extrapolate),
}  # fmt: skip


def images(count: int = 9, height: int = 10, width: int = 14, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("off", [0.0, (0.0, 1.0), Dial(1.0, 0.0)])
def test_strength_or_frequency_zero_is_the_identity_to_the_bit(name: str, off: float) -> None:
    batch = images()
    batch[3, 0, 0, 0] = torch.nan
    mixed = WAYS[name](batch, np.random.default_rng(1), off)
    assert torch.equal(mixed.inputs.nan_to_num(7), batch.nan_to_num(7))
    assert torch.equal(mixed.follow(torch.eye(9)), torch.eye(9))


@pytest.mark.parametrize("name", WAYS)
def test_shares_sum_to_one_and_the_generator_decides_alone(name: str) -> None:
    first, again, other = (WAYS[name](images(), np.random.default_rng(seed), 1.0) for seed in (3, 3, 4))
    assert torch.equal(first.inputs, again.inputs)
    assert np.array_equal(first.sources, again.sources)
    assert not torch.equal(first.inputs, other.inputs)
    assert np.allclose(first.shares.sum(1), 1)
    assert first.sources.shape == first.shares.shape
    assert first.inputs.shape == images().shape
    assert (first.inputs != images()).flatten(1).any(1).sum() >= 5


@pytest.mark.parametrize("name", WAYS)
def test_frequency_is_the_share_of_items_that_are_mixed(name: str) -> None:
    rng, changed = np.random.default_rng(0), []
    for _ in range(60):
        mixed = WAYS[name](images(9, 4, 4), rng, (1.0, 0.4))
        changed.append((mixed.inputs != images(9, 4, 4)).flatten(1).any(1)[[0, 1, 2, 3, 4, 7, 8]].double().mean().item())
    assert 0.2 < np.mean(changed) < 0.45  # some are mixed with themselves, or by less than a pixel


@pytest.mark.parametrize("make", [mixup, near(interpolate), near(extrapolate)])
@pytest.mark.parametrize("shape", [(9, 3, 6, 5), (9, 7), (9, 4, 6)])
def test_blends_are_the_sum_of_their_sources_by_their_shares(make: Callable[..., Mixed], shape: tuple[int, ...]) -> None:
    batch = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mixed = make(batch, np.random.default_rng(2), 1.0)
    for item in range(9):
        wanted = sum(share * batch[source] for source, share in zip(mixed.sources[item], mixed.shares[item]))
        assert torch.allclose(mixed.inputs[item], wanted)
    assert torch.allclose(mixed.follow(batch), mixed.inputs)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 12), st.floats(0, 1))
def test_cutmix_shows_one_box_of_the_partner_and_counts_its_pixels(seed: int, height: int, width: int, strength: float) -> None:
    count = 6
    batch = torch.arange(float(count)).reshape(-1, 1, 1, 1).expand(-1, 2, height, width).contiguous()
    mixed = cutmix(batch, np.random.default_rng(seed), strength)
    for item, (own, other) in enumerate(mixed.sources):
        theirs = mixed.inputs[item, 0] == float(other)
        assert own == item
        assert ((mixed.inputs[item, 0] == item) | theirs).all()
        if other != item:
            assert theirs.double().mean().item() == pytest.approx(mixed.shares[item, 1], abs=1e-12)
            rows, columns = theirs.any(1), theirs.any(0)
            assert torch.equal(theirs, rows[:, None] & columns[None])
            assert rows.int().diff().abs().sum() <= 2
            assert columns.int().diff().abs().sum() <= 2


def test_cutmix_of_sequences_takes_a_stretch_of_time_and_of_bytes_stays_bytes() -> None:
    steps = torch.arange(6.0).reshape(-1, 1, 1).expand(-1, 20, 3).contiguous()
    mixed = cutmix(steps, np.random.default_rng(1))
    assert (mixed.inputs == mixed.inputs[:, :, :1]).all()
    assert ((mixed.inputs[:, 1:, 0] != mixed.inputs[:, :-1, 0]).sum(1) <= 2).all()
    share = (mixed.inputs[:, :, 0] != torch.arange(6.0)[:, None]).double().mean(1).numpy()
    others = mixed.sources[:, 1] != np.arange(6)
    assert np.allclose(share[others], mixed.shares[others, 1])
    pixels = (images() * 255).byte()
    assert cutmix(pixels, np.random.default_rng(1)).inputs.dtype == torch.uint8
    assert not torch.equal(cutmix(pixels, np.random.default_rng(1)).inputs, pixels)


def _mosaic_by_hand(batch: Tensor, mixed: Mixed, item: int) -> bool:
    """Whether some centre and some order of the four sources gives the mosaic, looked for one by one."""
    _, height, width = batch[item].shape
    for row in range(height + 1):
        for column in range(width + 1):
            boxes = [(0, row, 0, column), (0, row, column, width), (row, height, 0, column), (row, height, column, width)]
            for corner in range(4):
                order = [corner, corner ^ 1, corner ^ 2, corner ^ 3]
                shares = np.array([(boxes[k][1] - boxes[k][0]) * (boxes[k][3] - boxes[k][2]) for k in order]) / (height * width)
                if not np.allclose(shares, mixed.shares[item]):
                    continue
                made = torch.zeros_like(batch[item])
                for k, source in zip(order, mixed.sources[item]):
                    top, bottom, left, right = boxes[k]
                    if bottom > top and right > left:
                        size = (bottom - top, right - left)
                        part = (
                            F.interpolate(batch[source][None], size, mode="bilinear", antialias=True)[0]
                            if size != (height, width)
                            else batch[source]
                        )
                        made[:, top:bottom, left:right] = part
                if torch.allclose(made, mixed.inputs[item], atol=1e-6):
                    return True
    return False


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_a_mosaic_is_four_items_scaled_around_a_centre(strength: float) -> None:
    batch = images(6, 8, 9)
    mixed = mosaic(batch, np.random.default_rng(4), strength)
    assert all(_mosaic_by_hand(batch, mixed, item) for item in range(6))
    assert (mixed.shares[:, 0] >= (1 - 0.75 * strength) ** 2 - 0.15).all()
    assert (mixed.sources[:, 0] == np.arange(6)).all()


def test_the_own_part_of_a_mosaic_is_in_every_corner_by_turns_and_one_pixel_survives() -> None:
    batch = torch.arange(40.0).reshape(-1, 1, 1, 1).expand(-1, 1, 6, 6).contiguous()
    mixed = mosaic(batch, np.random.default_rng(0))
    corners = mixed.inputs[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]] == torch.arange(40.0)[:, None]
    assert (corners.sum(0) >= 4).all()
    tiny = images(3, 1, 1)
    assert torch.allclose(mosaic(tiny, np.random.default_rng(0)).inputs.sum(), tiny.sum())


def test_a_bootstrap_draws_evenly_and_within_clusters_only() -> None:
    batch, rng, count = torch.arange(9), np.random.default_rng(0), np.zeros((9, 9))
    for _ in range(600):
        mixed = resample(batch, rng, clusters=CLUSTERS)
        assert torch.equal(mixed.inputs, batch[torch.from_numpy(mixed.sources[:, 0])])
        count[np.arange(9), mixed.sources[:, 0]] += 1
    same = (CLUSTERS[:, None] == CLUSTERS) & (CLUSTERS >= 0)[:, None] | np.eye(9, dtype=bool)
    assert (count[~same] == 0).all()
    assert np.abs(count[same] / 600 - (1 / same.sum(1, keepdims=True) * same)[same]).max() < 0.1
    assert len(set(resample(torch.arange(50), rng).sources[:, 0])) < 45  # with replacement


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 20))
def test_neighbours_are_among_the_nearest_of_the_cluster_and_never_of_another(seed: int, k: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    vectors, clusters = rng.standard_normal((count, 2)), rng.integers(-1, 3, count)
    partner = neighbour(vectors, clusters, k, rng)
    for item, other in enumerate(partner):
        rest = [j for j in range(count) if j != item and clusters[j] == clusters[item] and clusters[item] >= 0]
        nearest = sorted(rest, key=lambda j: np.linalg.norm(vectors[j] - vectors[item]))[:k]
        assert other in (nearest or [item])


def test_every_near_neighbour_is_drawn_and_without_vectors_every_other() -> None:
    rng, clusters = np.random.default_rng(0), np.zeros(6, np.int64)
    line = np.array([[0.0], [1], [2.1], [3.3], [4.6], [6.0]])
    assert {int(neighbour(line, clusters, 2, rng)[0]) for _ in range(50)} == {1, 2}
    assert {int(neighbour(line[:, :0], clusters, 2, rng)[0]) for _ in range(100)} == {1, 2, 3, 4, 5}


def test_interpolation_stays_between_and_extrapolation_goes_beyond_by_half_at_most() -> None:
    batch, own = torch.tensor([[0.0], [1.0], [5.0]]).repeat(400, 1), np.arange(1200) // 3 * 2 + np.tile([0, 0, 1], 400)
    inner, outer = (make(batch, batch, own, np.random.default_rng(0)).inputs.reshape(400, 3) for make in (interpolate, extrapolate))
    assert 0 <= inner[:, :2].min() < 0.05
    assert 0.95 < inner[:, :2].max() <= 1
    assert -0.5 <= outer[:, 0].min() < -0.45
    assert 1.45 < outer[:, 1].max() <= 1.5
    assert (inner[:, 2] == 5).all()
    assert (outer[:, 2] == 5).all()


def test_whole_numbers_are_left_alone_wherever_they_would_be_averaged_or_cut() -> None:
    tokens = torch.arange(27).reshape(9, 3)
    for name in ("mixup", "cutmix", "interpolate", "extrapolate"):
        mixed = WAYS[name](tokens, np.random.default_rng(0), 1.0)
        assert torch.equal(mixed.inputs, tokens)
        assert (mixed.shares == 1).all()
        assert (mixed.sources[:, 0] == np.arange(9)).all()


def test_gradients_flow_to_both_sources() -> None:
    batch = images(4).requires_grad_()
    mixed = mixup(batch, np.random.default_rng(1))
    mixed.inputs.sum().backward()
    received = np.bincount(mixed.sources.ravel(), mixed.shares.ravel(), 4)
    assert np.allclose(batch.grad[:, 0, 0, 0].numpy(), received, atol=1e-6)


def _mix_as_first_written(inputs: Tensor, rng: np.random.Generator) -> Tensor:
    if not inputs.is_floating_point() or rng.random() < PLAIN:
        return inputs
    other = inputs[torch.from_numpy(rng.permutation(len(inputs)))]
    share, boxed = rng.random(), rng.random() < 0.5
    if inputs.dim() != 4 or not boxed:
        return (1 - share) * inputs + share * other
    height, width = inputs.shape[2:]
    tall, wide = round(height * share**0.5), round(width * share**0.5)
    top, left = rng.integers(0, height - tall + 1), rng.integers(0, width - wide + 1)
    mixed = inputs.clone()
    mixed[:, :, top : top + tall, left : left + wide] = other[:, :, top : top + tall, left : left + wide]
    return mixed


@pytest.mark.parametrize("seed", range(30))
def test_distillation_s_mixing_gives_the_same_bits_as_a_plain_one(seed: int) -> None:
    for batch in (images(), torch.randn(5, 8), torch.arange(6)):
        assert torch.equal(mix(batch, np.random.default_rng(seed)), _mix_as_first_written(batch, np.random.default_rng(seed)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda x, r: mixup(x, r, 1.5),
            UsageError,
            "mixup: strength 1.5 is outside 0 … 1; 0 leaves items as they are, 1 is the full range",
        ),
        (lambda x, r: mixup(x, r, (0.5, -1.0)), UsageError, "mixup: frequency -1.0 is outside 0 … 1"),
        (
            lambda x, r: mixup(x, r, (0.5, 0.5, 0.5)),
            UsageError,
            "mixup: (0.5, 0.5, 0.5) is no dial; give a strength, or strength and frequency",
        ),
        (
            lambda x, r: cutmix(x[:, 0, 0], r),
            DataError,
            "cutmix of inputs of shape (9, 14); expected images (n, c, h, w) or sequences (n, t, d)",
        ),
        (lambda x, r: interpolate(x, VECTORS[:4], CLUSTERS, r), DataError, "4 vectors for 9 items; expected one each"),
        (lambda x, r: interpolate(x, VECTORS[:, 0], CLUSTERS, r), DataError, "vectors of shape (9,); expected one vector per item"),
        (lambda x, r: interpolate(x, VECTORS / 0, CLUSTERS, r), DataError, "vectors of 9 items hold values that are not finite"),
        (lambda x, r: interpolate(x, VECTORS, CLUSTERS, r, neighbours=0), DataError, "neighbours 0; expected at least 1"),
        (
            lambda x, r: resample(x, r, clusters=[0, 1]),
            DataError,
            "clusters of shape (2,) for 9 items; expected one cluster number per item",
        ),
        (lambda x, r: resample(x, r, clusters=np.zeros(9)), DataError, "clusters of type float64; expected whole numbers"),
        (lambda x, r: mixup(x, r).follow(torch.eye(3)), DataError, "3 targets for 9 mixed items; expected one each"),
        (
            lambda x, r: mixup(x, r).follow(torch.arange(9)),
            DataError,
            "targets of type torch.int64 cannot be mixed; give floats, for classes",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_does_not_fit_is_named(make: Callable[..., object], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make(images(), np.random.default_rng(0))
    assert message in str(caught.value)


def test_an_empty_batch_stays_empty() -> None:
    for name, make in WAYS.items():
        assert len(make(torch.zeros(0, 3, 4, 4), np.random.default_rng(0), 1.0).inputs) == 0, name


def test_the_example_in_its_docs_runs() -> None:
    assert doctest.testmod(mixing).failed == 0
