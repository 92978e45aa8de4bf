"""Yardsticks on made embeddings: against slow references, at their ends, and that a better encoder reads higher."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import make_image
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import eigh
from sklearn.linear_model import Ridge

from attar.stages.augment import yardsticks as y


def _groups(noise: float, seed: int = 0, count: int = 120, dim: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of four groups with so much noise, in random order, and the groups."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % 4)
    return (np.eye(4, dim)[labels] + noise * rng.normal(size=(count, dim))).astype(np.float32), labels


def test_the_linear_probe_is_ridge_regression_to_one_hot() -> None:
    values, labels = _groups(0.6)
    mean, spread = values[:80].mean(0), values[:80].std(0)
    x = (values - mean) / spread
    slow = Ridge(alpha=80 * y.RIDGE).fit(x[:80], np.eye(4)[labels[:80]])
    expected = float((slow.predict(x[80:]).argmax(1) == labels[80:]).mean())
    assert y.linear_probe(values[:80], labels[:80], values[80:], labels[80:]) == pytest.approx(expected)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 10))
def test_probes_do_not_see_scale_or_shift(seed: int, factor: float) -> None:
    values, labels = _groups(0.5, seed)
    moved = values * factor + 3
    assert y.learnability(values, labels) == pytest.approx(y.learnability(moved.astype(np.float32), labels), abs=0.02)


def test_columns_that_say_nothing_do_no_harm() -> None:
    values, labels = _groups(0.2)
    padded = np.concatenate([values, np.full((120, 3), 5.0, np.float32)], 1)
    assert y.learnability(padded, labels) == y.learnability(values, labels)
    assert y.learnability(np.zeros((120, 4), np.float32), labels) < 0.4, "a collapsed encoder teaches nothing"


def test_less_noise_reads_higher() -> None:
    """Of encoders of one world, each with more noise than the one before, every yardstick ranks them so."""
    worlds = [0.05, 0.6, 2.0]
    pairs = [(_groups(noise, 1)[0], _groups(noise, 2)[0]) for noise in worlds]
    labels = [_groups(noise, 1)[1] for noise in worlds]
    assert [y.learnability(one, own) for (one, _), own in zip(pairs, labels)] == sorted(
        (y.learnability(one, own) for (one, _), own in zip(pairs, labels)), reverse=True
    )
    base, rng = np.random.default_rng(3).normal(size=(100, 8)), np.random.default_rng(4)
    views = [[(base + noise * rng.normal(size=base.shape)).astype(np.float32) for _ in range(2)] for noise in worlds]
    found = [y.retrieval(*two) for two in views]
    assert found == sorted(found, reverse=True)
    assert found[0] == 1.0
    common = [y.common_neighbours([y.near(one, 5) for one in two]) for two in views]
    assert common == sorted(common, reverse=True)
    assert y.common_neighbours([y.near(base, 5)] * 2) == 1.0


def test_common_neighbours_by_hand() -> None:
    near = [np.array([[1, 2], [0, 2]]), np.array([[2, 1], [3, 4]]), np.array([[1, 5], [0, 2]])]
    # pairs (1, 0): 2 and 0 of 2; (2, 0): 1 and 2; (2, 1): 1 and 0
    assert y.common_neighbours(near) == pytest.approx(((2 + 0) + (1 + 2) + (1 + 0)) / 4 / 3)


def test_the_rotation_probe_reads_turns_from_embeddings() -> None:
    rng = np.random.default_rng(0)
    content = rng.normal(size=(1, 60, 6)).astype(np.float32)
    told = np.concatenate([np.repeat(content, 4, 0), np.tile(3 * np.eye(4, dtype=np.float32)[:, None], (1, 60, 1))], 2)
    assert y.rotation_probe(told) == 1.0
    blind = np.repeat(rng.normal(size=(1, 60, 10)), 4, 0).astype(np.float32)
    assert y.rotation_probe(blind) == pytest.approx(y.CHANCE, abs=1e-9), "what does not turn cannot be told"


def _thumbs(kind: str, count: int = 200) -> np.ndarray:
    rng = np.random.default_rng(0)
    if kind == "sky above ground":
        ramp = np.linspace(220, 30, 16)[None, :, None] + rng.normal(0, 25, (count, 16, 16))
        return ramp.clip(0, 255).astype(np.uint8)
    if kind == "texture":
        return rng.integers(0, 256, (count, 16, 16)).astype(np.uint8)
    middle = np.hypot(*np.mgrid[-7.5:8, -7.5:8])  # the same from every side
    return (np.where(middle < rng.uniform(3, 7, (count, 1, 1)), 200, 20) + rng.integers(0, 2, (count, 1, 1))).astype(np.uint8)


def _views(noise: float, seed: int = 0, count: int = 400, dim: int = 6) -> list[np.ndarray]:
    """Two views of items: what an item is, standard normal, plus noise of its own in each."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(count, dim))
    return [(base + noise * rng.normal(size=base.shape)).astype(np.float32) for _ in range(2)]


def test_information_is_that_of_the_generalised_eigenvalues() -> None:
    first, second = _views(0.5)
    within = np.cov(((first - second).astype(np.float64) / np.sqrt(2)).T, bias=True)
    between = np.cov(((first + second).astype(np.float64) / 2).T, bias=True) - within / 2
    within += y.RIDGE * np.trace(within) / 6 * np.eye(6)
    slow = sum(0.5 * np.log(1 + max(0.0, value)) for value in eigh(between, within, eigvals_only=True))
    assert y.information(first, second) == pytest.approx(slow, rel=1e-5)


def test_information_is_the_capacity_of_gaussian_channels() -> None:
    for noise in (0.3, 1.0):
        assert y.information(*_views(noise, count=20_000)) == pytest.approx(6 * 0.5 * np.log(1 + 1 / noise**2), rel=0.03)
    strangers = np.random.default_rng(0).normal(size=(2, 20_000, 6))
    assert y.information(*strangers) < 0.1, "views of nothing in common"
    assert y.information(np.zeros((50, 6)), np.zeros((50, 6))) == 0.0, "a collapsed encoder"


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_information_does_not_depend_on_the_axes(seed: int) -> None:
    first, second = _views(0.5)
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(6, 6)))[0]
    assert y.information(first @ turn * 3 + 1, second @ turn * 3 + 1) == pytest.approx(y.information(first, second), rel=1e-5)
    assert y.information(second, first) == pytest.approx(y.information(first, second))
    assert y.information(first[:, :3], second[:, :3]) < y.information(first, second), "missing directions count"


def test_steadiness_is_one_where_views_change_nothing() -> None:
    calm, rough = _views(0.1), _views(1.0)
    order = [y.steadiness(y.near(first, 5), y.near(second, 5)) for first, second in (calm, rough)]
    assert 1 > order[0] > order[1] > 0
    assert y.steadiness(y.near(calm[0], 5), y.near(calm[0], 5)) == 1.0


@pytest.mark.parametrize(("kind", "meaningful"), [("sky above ground", True), ("texture", False), ("disc", False)])
def test_whether_orientation_means_anything_is_found_without_labels(kind: str, meaningful: bool) -> None:
    found = y.orientation(_thumbs(kind))
    assert found.meaningful is meaningful
    assert found.low <= found.accuracy
    assert (found.changed < y.CHANGED) == (kind == "disc")
    assert y.orientation(_thumbs(kind)) == found


def test_pseudo_labels_find_the_groups_and_repeat() -> None:
    values, labels = _groups(0.05)
    once, again = (y.pseudo_labels(values, 4, np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(once, again)
    assert len({(a, b) for a, b in zip(once.tolist(), labels.tolist())}) == 4
    assert y.pseudo_labels(np.ones((10, 3), np.float32), 4, np.random.default_rng(0)).max() == 0, "all the same: one group"


def test_real_pictures_have_an_orientation_where_they_should() -> None:
    stripes = np.stack([np.asarray(make_image("stripes", seed, 16, 16).convert("L")) for seed in range(150)])
    assert y.orientation(stripes).changed > y.CHANGED
