"""Repair against numpy's least squares and torch's unfold, channel by channel; and that it repairs."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from networks import BODIES, images, made
from torch import nn

from attar.models.network import Network
from attar.stages.compress import prune, repair
from attar.stages.compress.repair import Moments

CONVOLUTIONS = [
    pytest.param(lambda: nn.Conv2d(4, 5, 3), id="plain"),
    pytest.param(lambda: nn.Conv2d(4, 5, 3, stride=2, padding=1), id="stride and padding"),
    pytest.param(lambda: nn.Conv2d(4, 5, 3, padding=2, dilation=2, bias=False), id="dilation, no bias"),
    pytest.param(lambda: nn.Conv2d(4, 5, (1, 3), stride=(1, 2), padding=(0, 1)), id="not square"),
    pytest.param(lambda: nn.Conv2d(4, 5, 1, bias=False), id="1 × 1"),
]


def _random(rows: int, inputs: int, outputs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Correlated inputs with the constant 1 last (rows, inputs + 1), and weights (outputs, inputs + 1)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, inputs)) @ rng.normal(size=(inputs, inputs)) + rng.normal(size=inputs)
    return np.concatenate([x, np.ones((rows, 1))], 1), rng.normal(size=(outputs, inputs + 1))


def _moments(x: np.ndarray) -> Moments:
    return Moments(torch.from_numpy(x.T @ x / len(x)), len(x))


def _least_squares(x: np.ndarray, weight: np.ndarray, keep: list[int]) -> tuple[np.ndarray, float]:
    """Weights on the kept inputs and the error, from numpy's solver on the data itself; the ridge is written as further rows of data."""
    ridge = repair.RIDGE * (x[:, :-1] ** 2).mean() + 1e-10
    rows = np.concatenate([x / np.sqrt(len(x)), np.sqrt(ridge) * np.eye(x.shape[1])[:-1]])
    found = np.linalg.lstsq(rows[:, keep], rows @ weight.T, rcond=None)[0].T
    return found, float(((rows @ weight.T - rows[:, keep] @ found.T) ** 2).sum())


@pytest.mark.parametrize("make", CONVOLUTIONS)
def test_patches_are_those_of_unfold(make) -> None:
    layer, x = make(), torch.rand(3, 4, 7, 7, generator=torch.Generator().manual_seed(0))
    rows = repair.patches(x, layer, torch.Generator().manual_seed(5))
    unfolded = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2)
    chosen = torch.randperm(unfolded.shape[1], generator=torch.Generator().manual_seed(5))[: repair.POSITIONS]
    assert torch.equal(rows, unfolded[:, chosen].flatten(0, 1))
    weights = repair.weights_of(layer)
    ours = (torch.cat([rows, torch.ones(len(rows), 1)], 1).double() @ weights.T).float()
    theirs = layer(x).flatten(2).transpose(1, 2)[:, chosen].flatten(0, 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_patches_of_large_maps_and_long_sequences_are_bounded() -> None:
    generator = torch.Generator().manual_seed(0)
    assert repair.patches(torch.rand(2, 4, 40, 40), nn.Conv2d(4, 5, 3), generator).shape == (2 * repair.POSITIONS, 36)
    tokens = torch.arange(2 * 100 * 3.0).reshape(2, 100, 3)
    rows = repair.patches(tokens, nn.Linear(3, 4), generator)
    assert rows.shape == (2 * repair.POSITIONS, 3)
    assert {tuple(row) for row in rows.tolist()} <= {tuple(row) for row in tokens.flatten(0, 1).tolist()}
    assert torch.equal(repair.patches(tokens[:, :9], nn.Linear(3, 4), generator), tokens[:, :9].flatten(0, 1))


def test_gathered_moments_are_the_mean_over_all_batches() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    batches = [torch.randn(size, 3) for size in (5, 7)]
    moments = repair.gather(Network(body), batches, ["body.2"], seed=0)["body.2"]
    hidden = body[:2](torch.cat(batches)).detach().double()
    rows = torch.cat([hidden, torch.ones(12, 1).double()], 1)
    assert moments.rows == 12
    torch.testing.assert_close(moments.gram, rows.T @ rows / 12, rtol=1e-5, atol=1e-6)
    assert not body[2]._forward_pre_hooks


@given(st.integers(0, 500), st.integers(1, 3))
@settings(deadline=None, max_examples=25)
def test_refit_is_numpys_least_squares(seed: int, block: int) -> None:
    width = 5
    x, weight = _random(60, width * block, 3, seed)
    channels = sorted(np.random.default_rng(seed).permutation(width)[:3].tolist())
    keep = repair.inputs_kept(channels, width, width * block + 1)
    assert keep.tolist() == [c * block + i for c in channels for i in range(block)] + [width * block]
    ours = repair.refit(torch.from_numpy(weight), _moments(x), keep)
    np.testing.assert_allclose(ours.numpy(), _least_squares(x, weight, keep.tolist())[0], rtol=1e-5, atol=1e-7)


def test_refit_with_everything_kept_changes_nothing() -> None:
    x, weight = _random(50, 6, 3, 0)
    np.testing.assert_allclose(repair.refit(torch.from_numpy(weight), _moments(x), torch.arange(7)).numpy(), weight, atol=1e-9)


@given(st.integers(0, 500), st.integers(1, 3), st.integers(1, 2))
@settings(deadline=None, max_examples=25)
def test_damage_is_the_least_squares_error_of_the_channels_removed(seed: int, block: int, consumers: int) -> None:
    width = 5
    data = [_random(80, width * block, 3, seed + 1000 * number) for number in range(consumers)]
    order, damage = repair.eliminate([(torch.from_numpy(weight), _moments(x)) for x, weight in data], width)

    def error(removed: list[int]) -> float:
        keep = repair.inputs_kept([c for c in range(width) if c not in removed], width, width * block + 1).tolist()
        return sum(_least_squares(x, weight, keep)[1] / (x @ weight.T).var(0).sum() for x, weight in data)

    assert len(order) == len(set(order)) == width - 1
    for removed in range(width):
        assert damage[removed] == pytest.approx(error(order[:removed]), rel=1e-4, abs=1e-8)
    assert (np.diff(damage) >= -1e-9).all()
    for step in range(width - 1):  # each step takes the channel that costs least
        rest = [c for c in range(width) if c not in order[:step]]
        best = min(error([*order[:step], c]) for c in rest)
        assert error(order[: step + 1]) == pytest.approx(best, rel=1e-4, abs=1e-8)


def test_a_channel_that_others_replace_goes_first_at_no_damage() -> None:
    weight = _random(1, 4, 3, 0)[1]
    x = np.concatenate([np.random.default_rng(0).normal(size=(200, 4)), np.ones((200, 1))], 1)
    x[:, 2] = 0.5 * x[:, 0] - x[:, 1] + 2
    order, damage = repair.eliminate([(torch.from_numpy(weight), _moments(x))], 4)
    assert order[0] in (0, 1, 2)
    assert damage[1] < 0.01 < damage[2]


def test_order_and_damage_are_bit_equal_when_repeated() -> None:
    x, weight = _random(80, 12, 4, 3)
    (one, first), (two, second) = (repair.eliminate([(torch.from_numpy(weight), _moments(x))], 6) for _ in range(2))
    assert one == two
    assert np.array_equal(first, second)


def _halved(kind: str, repaired: bool) -> tuple[nn.Module, list[str]]:
    """A network with half of each group's channels gone, the cheapest first."""
    network, example = made(kind), images(1)
    groups = prune.find_groups(network, example)
    names = sorted({name for group in groups for name in group.consumers})
    moments = repair.gather(network, [images(32, seed=seed) for seed in range(100, 106)], names, 0)
    cut, fresh, cuts = copy.deepcopy(network), {}, []
    for group in groups:
        layers = [(repair.weights_of(network.get_submodule(name)), moments[name]) for name in group.consumers]
        gone = sorted(repair.eliminate(layers, group.width)[0][: group.width // 2])
        cuts.append((group.producer, gone))
        fresh |= repair.repaired_weights(network, group, sorted(set(range(group.width)) - set(gone)), moments)
    prune.replay(cut, cuts, example)
    for name, matrix in fresh.items() if repaired else ():
        repair.write_back(cut.get_submodule(name), matrix)
    return cut, names


def _distance(kind: str, network: nn.Module) -> float:
    with torch.no_grad():
        ours, theirs = (net(images(64, seed=999))[0] for net in (network, made(kind)))
    return float((ours - theirs).square().mean() / theirs.var(0).mean())


@pytest.mark.parametrize("kind", sorted(BODIES))
def test_repaired_networks_are_nearer_to_the_original_on_images_not_seen(kind: str) -> None:
    repaired, names = _halved(kind, repaired=True)
    assert _distance(kind, repaired) < 0.8 * _distance(kind, _halved(kind, repaired=False)[0])
    assert all(repaired.get_submodule(name).bias is not None for name in names)


@pytest.mark.parametrize("make", CONVOLUTIONS)
def test_write_back_is_the_inverse_of_weights_of(make) -> None:
    torch.manual_seed(0)
    layer, other = make(), make()
    repair.write_back(other, repair.weights_of(layer))
    x = torch.rand(2, 4, 9, 9)
    torch.testing.assert_close(other(x), layer(x), rtol=1e-6, atol=1e-6)
    assert torch.equal(other.weight, layer.weight)


def test_moments_of_the_wrong_shape_are_refused() -> None:
    with pytest.raises(TypeCheckError, match="weight"):
        repair.refit(torch.ones(3), Moments(torch.eye(3), 3), torch.arange(2))
    with pytest.raises(RuntimeError):
        repair.refit(torch.ones(2, 4), Moments(torch.eye(3), 3), torch.arange(2))
