"""Feature space: hooks that come and go, each transform against its definition, gradients, what is not for such features."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import affine_transform
from torch import Tensor, nn

from attar.errors import ModelError, UsageError
from attar.records import Policy
from attar.stages.augment.features import MISSING, TRANSFORMS, augment_features, feature_augment

SHAPES = {"maps": (8, 6, 9, 7), "tokens": (8, 10, 6), "embeddings": (8, 12)}
PAIRS = [(kind, name) for kind, shape in SHAPES.items() for name in TRANSFORMS if name not in MISSING[len(shape)]]


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Conv2d(3, 4, 3, padding=1)
        self.layer2 = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU())
        self.top = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(self.layer2(self.layer1(x)).mean((2, 3)))


def features(kind: str, seed: int = 0) -> Tensor:
    return torch.randn(SHAPES[kind], generator=torch.Generator().manual_seed(seed))


def changed(kind: str, policy: dict, seed: int = 0) -> Tensor:
    return augment_features(features(kind), policy, np.random.default_rng(seed))


# every transform


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_strength_zero_is_the_identity_and_full_strength_is_not(kind: str, name: str) -> None:
    x = features(kind)
    assert torch.equal(changed(kind, {name: 0.0}), x)
    assert torch.equal(changed(kind, {name: (1.0, 0.0)}), x)
    made = changed(kind, {name: 1.0})
    assert made.shape == x.shape
    assert made.dtype == x.dtype
    assert (made != x).flatten(1).any(1).all()
    assert torch.equal(made, changed(kind, {name: 1.0}))
    assert name in ("horizontal_flip", "vertical_flip") or not torch.equal(made, changed(kind, {name: 1.0}, seed=1))


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_a_frequency_leaves_the_other_items_to_the_bit_and_gradients_flow(kind: str, name: str) -> None:
    x = features(kind).requires_grad_()
    made = augment_features(x, {name: (1.0, 0.5)}, np.random.default_rng(3))
    same = (made == x).flatten(1).all(1)
    assert 0 < same.sum() < len(x)
    made.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert torch.allclose(x.grad[same], 2 * x.detach()[same])
    assert (x.grad[~same].flatten(1) != 0).any(1).all()


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_type_of_floats_comes_back_as_it_was(kind: str, dtype: torch.dtype) -> None:
    names = {name: 1.0 for name in TRANSFORMS if name not in MISSING[len(SHAPES[kind])]}
    made = augment_features(features(kind).to(dtype), names, np.random.default_rng(0))
    assert made.dtype == dtype
    assert made.isfinite().all()
    assert torch.allclose(made.double(), changed(kind, names).double(), atol=0.1, rtol=0.1)


def test_the_smallest_features_survive() -> None:
    for shape in ((1, 1, 1, 1), (1, 1, 1), (1, 1), (0, 3, 2, 2), (0, 4)):
        names = {name: 1.0 for name in TRANSFORMS if name not in MISSING[len(shape)]}
        assert augment_features(torch.ones(shape), names, np.random.default_rng(0)).isfinite().all()


# what they mean


def test_mirrors_are_exact() -> None:
    x = features("maps")
    assert torch.equal(changed("maps", {"horizontal_flip": 0.3}), x.flip(3))
    assert torch.equal(changed("maps", {"vertical_flip": 1.0}), x.flip(2))


def test_a_turned_map_is_a_rotation_in_pixels_not_in_half_sides() -> None:
    """Each item equals scipy's rotation about the centre by some angle up to 30°, found by trying; the map is wider than high."""
    x = torch.nn.functional.avg_pool2d(torch.rand(4, 1, 24, 40, generator=torch.Generator().manual_seed(0)), 5, 1)
    made = augment_features(x, {"rotate": 1.0}, np.random.default_rng(0))
    height, width = x.shape[2:]
    centre = np.array([(height - 1) / 2, (width - 1) / 2])
    inner = (slice(7, -7), slice(12, -12))
    found = []
    for before, after in zip(x[:, 0].numpy(), made[:, 0].numpy()):
        errors = {}
        for degrees in np.arange(-31, 31.01, 0.25):
            c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
            turn = np.array([[c, s], [-s, c]])
            errors[degrees] = np.abs(affine_transform(before, turn, centre - turn @ centre, order=1)[inner] - after[inner]).max()
        found.append(min(errors, key=errors.get))
        assert min(errors.values()) < 0.02
    assert np.ptp(found) > 5
    assert np.abs(found).max() <= 30


def test_a_window_of_a_ramp_is_a_gentler_ramp_inside_it() -> None:
    x = torch.arange(20.0).expand(50, 1, 20, 20).contiguous()
    slope = augment_features(x, {"resized_crop": 1.0}, np.random.default_rng(0))[:, 0, 10, 2:-2].diff(dim=1)
    assert torch.allclose(slope, slope[:, :1].expand_as(slope), atol=1e-4)
    assert 0.5 <= slope.min() < 0.6
    assert 0.9 < slope.max() <= 1
    tokens = torch.arange(40.0)[None, :, None].expand(60, 40, 1).contiguous()
    made = augment_features(tokens, {"resized_crop": 1.0}, np.random.default_rng(0))
    slope = made[:, 4:-4, 0].diff(dim=1)
    assert torch.allclose(slope, slope[:, :1].expand_as(slope), atol=1e-4)
    assert 0.25 <= slope.min() < 0.35
    assert 0.9 < slope.max() <= 1
    assert made.min() >= 0
    assert made.max() <= 39


def test_zoom_is_up_to_the_square_root_of_two_both_ways_and_gain_as_well() -> None:
    x = torch.arange(21.0).expand(200, 1, 21, 21).contiguous()
    slope = augment_features(x, {"scale": 1.0}, np.random.default_rng(0))[:, 0, 10, 8:13].diff(dim=1).mean(1)
    assert 2**-0.5 - 1e-3 <= slope.min() < 0.75
    assert 1.35 < slope.max() <= 2**0.5 + 1e-3
    gain = augment_features(torch.ones(200, 4), {"scale": 1.0}, np.random.default_rng(0))
    assert (gain == gain[:, :1]).all()
    assert 2**-0.5 <= gain.min() < 0.75
    assert 1.35 < gain.max() <= 2**0.5 + 1e-6


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.sampled_from([2, 6, 7]), st.floats(0.1, 1))
def test_a_rotation_of_embeddings_keeps_lengths_and_products_and_turns_each_by_one_angle(seed: int, width: int, strength: float) -> None:
    x = torch.randn(3, 5, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    made = augment_features(x, {"rotate": strength}, np.random.default_rng(seed))
    assert torch.allclose(made @ made.mT, x @ x.mT)
    cosine = (made * x).sum(2) / x.square().sum(2)
    assert (cosine >= np.cos(np.deg2rad(30) * strength) - 1e-9).all()
    if width % 2 == 0:
        assert torch.allclose(cosine, cosine[:, :1].expand_as(cosine))


def test_noise_is_in_units_of_the_item_and_dropout_keeps_the_mean() -> None:
    rng = np.random.default_rng(0)
    x = torch.randn(400, 500) * torch.logspace(-2, 2, 400)[:, None]
    ratio = (augment_features(x, {"noise": 1.0}, rng) - x).std(1) / x.std(1)
    assert ratio.max() < 0.56
    assert ratio.max() > 0.45
    assert ratio.min() < 0.05
    assert 0.22 < ratio.mean() < 0.28
    maps = torch.ones(300, 64, 2, 2)
    made = augment_features(maps, {"dropout": 1.0}, rng)
    assert (made == made[:, :, :1, :1]).all()
    zero = (made[:, :, 0, 0] == 0).double().mean(1)
    assert 0.2 < zero.mean() < 0.3
    assert zero.max() < 0.72
    assert made.mean().item() == pytest.approx(1, abs=0.02)
    tokens = augment_features(torch.ones(5, 7, 64), {"dropout": 1.0}, rng)
    assert (tokens == tokens[:, :1]).all()
    assert (tokens == 0).any()


def test_a_policy_that_picks_one_changes_each_item_by_one_of_them() -> None:
    picked = Policy(families={"horizontal_flip": 1.0, "vertical_flip": 1.0, "noise": 0.0}, pick=1)
    x = features("maps")
    made = augment_features(x, picked, np.random.default_rng(1))
    sides = (made == x.flip(3)).flatten(1).all(1), (made == x.flip(2)).flatten(1).all(1)
    assert (sides[0] ^ sides[1]).all()
    assert sides[0].any()
    assert sides[1].any()


# the hook


def test_a_layer_is_augmented_in_training_mode_inside_the_block_only() -> None:
    torch.manual_seed(0)
    network, x, rng = Body(), torch.rand(4, 3, 8, 8), np.random.default_rng(0)
    plain = network(x)
    with feature_augment(network, "layer2", {"noise": 1.0}, rng):
        first, second = network(x), network(x)
        network.eval()
        quiet = network(x)
        network.train()
    assert not torch.equal(first, plain)
    assert not torch.equal(first, second)
    assert torch.equal(quiet, plain)
    assert torch.equal(network(x), plain)
    with feature_augment(network, "layer2", {"noise": 1.0}, np.random.default_rng(0)):
        assert torch.equal(network(x), first)


def test_what_the_layer_gives_is_what_is_changed_and_gradients_reach_the_layers_before_it() -> None:
    torch.manual_seed(0)
    network, x = Body(), torch.rand(4, 3, 8, 8)
    wanted = augment_features(network.layer2(network.layer1(x)), {"rotate": 1.0}, np.random.default_rng(5))
    with feature_augment(network, "layer2", {"rotate": 1.0}, np.random.default_rng(5)):
        made = network(x)
    assert torch.allclose(made, network.top(wanted.mean((2, 3))))
    made.sum().backward()
    assert network.layer1.weight.grad.abs().sum() > 0


def test_hooks_go_also_when_the_block_is_left_by_an_error() -> None:
    network = Body()
    for failing in (lambda: 1 / 0, lambda: network(torch.rand(4, 2, 8, 8))):
        with (
            pytest.raises((ZeroDivisionError, RuntimeError)),
            feature_augment(network, "layer2.0", {"noise": 1.0}, np.random.default_rng(0)),
        ):
            failing()
        assert not any(module._forward_hooks for module in network.modules())


class Pair(NamedTuple):
    first: Tensor
    second: str


class Several(nn.Module):
    def __init__(self, make: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.inner, self.make = nn.Identity(), make
        self.inner.register_forward_hook(lambda _m, _i, output: make(output))

    def forward(self, x: Tensor) -> object:
        return self.inner(x)


@pytest.mark.parametrize("make", [lambda x: (x, "rest"), lambda x: [x, "rest"], lambda x: Pair(x, "rest")])
def test_of_several_outputs_the_first_is_changed_and_their_kind_stays(make: Callable[[Tensor], object]) -> None:
    network, x = Several(make), torch.randn(4, 6)
    with feature_augment(network, "inner", {"noise": 1.0}, np.random.default_rng(0)):
        made = network(x)
    assert type(made) is type(make(x))
    assert made[1] == "rest"
    assert not torch.equal(made[0], x)


@pytest.mark.parametrize(
    ("layer", "policy", "error", "message"),
    [
        ("layer3", {"noise": 1.0}, UsageError, "Body has no layer 'layer3'; close to it are ['layer2', 'layer1'"),
        ("qqq", {"noise": 1.0}, UsageError, "Body has no layer 'qqq'; close to it are ['layer1', 'layer2'"),
        (
            "layer2",
            {"rotat": 1.0},
            UsageError,
            "there is no transform 'rotat' of features. Did you mean 'rotate'? Known are: resized_crop, rotate",
        ),
        ("layer2", {"noise": 2.0}, UsageError, "noise: strength 2.0 is outside 0 … 1"),
        (
            "top",
            {"horizontal_flip": 1.0},
            UsageError,
            "layer 'top' gives embeddings (n, d), for which there is no horizontal_flip: take it out of the policy",
        ),
        ("top", {"resized_crop": 0.1}, UsageError, "layer 'top' gives embeddings (n, d), for which there is no resized_crop"),
    ],
)
def test_what_does_not_fit_is_named(layer: str, policy: dict, error: type[Exception], message: str) -> None:
    network = Body()
    with pytest.raises(error) as caught, feature_augment(network, layer, policy, np.random.default_rng(0)):
        network(torch.rand(2, 3, 8, 8))
    assert message in str(caught.value)
    assert not any(module._forward_hooks for module in network.modules())


def test_a_layer_that_gives_no_tensor_or_an_odd_one_is_named() -> None:
    rng = np.random.default_rng(0)
    network = Several(lambda x: {"out": x})
    with (
        pytest.raises(ModelError, match="layer 'inner' gives dict; expected a tensor, or a tuple that starts with one"),
        feature_augment(network, "inner", {"noise": 1.0}, rng),
    ):
        network(torch.rand(2, 3))
    with pytest.raises(UsageError, match=r"the input gives features of shape \(2, 3, 4, 5, 6\); expected embeddings"):
        augment_features(torch.rand(2, 3, 4, 5, 6), {"noise": 1.0}, rng)
