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
from attar.stages.compress.cutter import repaired
from attar.stages.compress.reconstruct import reconstruct, route
from attar.stages.compress.repair import Consumer, Moments

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
    unfolded = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2)
    assert repair.positions_of(x, layer) == unfolded.shape[1]
    chosen = torch.randperm(unfolded.shape[1], generator=torch.Generator().manual_seed(5))[:20]
    rows = repair.patches(x, layer, chosen)
    assert torch.equal(rows, unfolded[:, chosen].flatten(0, 1))
    weights = repair.weights_of(layer)
    ours = (torch.cat([rows, torch.ones(len(rows), 1)], 1).double() @ weights.T).float()
    theirs = layer(x).flatten(2).transpose(1, 2)[:, chosen].flatten(0, 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_patches_of_tokens_are_the_tokens() -> None:
    tokens, layer = torch.arange(2 * 10 * 3.0).reshape(2, 10, 3), nn.Linear(3, 4)
    assert repair.positions_of(tokens, layer) == 10
    assert torch.equal(repair.patches(tokens, layer, torch.tensor([7, 2])), tokens[:, [7, 2]].flatten(0, 1))
    assert repair.positions_of(tokens[:, 0], layer) == 1
    assert torch.equal(repair.patches(tokens[:, 0], layer, torch.tensor([0])), tokens[:, 0])


def test_positions_looked_at_are_bounded_and_different() -> None:
    chosen = repair.some(1000, torch.Generator().manual_seed(0))
    assert len(chosen) == len(set(chosen.tolist())) == repair.POSITIONS
    assert sorted(repair.some(9, torch.Generator().manual_seed(0)).tolist()) == list(range(9))


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
    keep = repair.inputs_kept(torch.tensor(channels), width, width * block + 1)
    assert keep.tolist() == [c * block + i for c in channels for i in range(block)] + [width * block]
    ours = repair.refit(torch.from_numpy(weight), _moments(x), keep)
    np.testing.assert_allclose(ours.numpy(), _least_squares(x, weight, keep.tolist())[0], rtol=1e-5, atol=1e-7)


def test_refit_with_everything_kept_changes_nothing() -> None:
    x, weight = _random(50, 6, 3, 0)
    np.testing.assert_allclose(repair.refit(torch.from_numpy(weight), _moments(x), torch.arange(7)).numpy(), weight, atol=1e-9)


def _consumer(x: np.ndarray, weight: np.ndarray, sensitivity: np.ndarray | None = None) -> Consumer:
    metric = np.eye(len(weight)) if sensitivity is None else sensitivity
    return Consumer(torch.from_numpy(weight), _moments(x), torch.from_numpy(metric))


@given(st.integers(0, 500), st.integers(1, 3), st.integers(1, 2))
@settings(deadline=None, max_examples=25)
def test_damage_is_half_the_least_squares_error_in_the_metric_of_the_outputs(seed: int, block: int, consumers: int) -> None:
    width = 5
    data = [_random(80, width * block, 3, seed + 1000 * number) for number in range(consumers)]
    roots = [np.random.default_rng(seed + number).normal(size=(3, 3)) for number in range(consumers)]
    order, damage = repair.eliminate([_consumer(x, weight, root.T @ root) for (x, weight), root in zip(data, roots)], width)

    def error(removed: list[int]) -> float:
        channels = torch.tensor([c for c in range(width) if c not in removed], dtype=torch.long)
        keep = repair.inputs_kept(channels, width, width * block + 1).tolist()
        return sum(_least_squares(x, root @ weight, keep)[1] / 2 for (x, weight), root in zip(data, roots))

    assert sorted(order) == list(range(width))
    for removed in range(width + 1):
        assert damage[removed] == pytest.approx(error(order[:removed]), rel=1e-4, abs=1e-6)
    assert (np.diff(damage) >= -1e-9).all()
    for step in range(width):  # each step takes the channel that costs least
        rest = [c for c in range(width) if c not in order[:step]]
        best = min(error([*order[:step], c]) for c in rest)
        assert error(order[: step + 1]) == pytest.approx(best, rel=1e-4, abs=1e-6)


def test_a_channel_that_others_replace_goes_first_at_no_damage() -> None:
    weight = _random(1, 4, 3, 0)[1]
    x = np.concatenate([np.random.default_rng(0).normal(size=(200, 4)), np.ones((200, 1))], 1)
    x[:, 2] = 0.5 * x[:, 0] - x[:, 1] + 2
    order, damage = repair.eliminate([_consumer(x, weight)], 4)
    assert order[0] in (0, 1, 2)
    assert damage[1] < 0.01 < damage[2]


def test_channels_that_only_feed_outputs_nobody_minds_go_first() -> None:
    x, weight = _random(80, 4, 2, 0)
    weight[0, 2:4], weight[1, :2] = 0, 0  # output 0 reads channels 0 and 1, output 1 the others
    assert set(repair.eliminate([_consumer(x, weight, np.diag([1.0, 1e-6]))], 4)[0][:2]) == {2, 3}
    assert set(repair.eliminate([_consumer(x, weight, np.diag([1e-6, 1.0]))], 4)[0][:2]) == {0, 1}


def test_order_and_damage_are_bit_equal_when_repeated() -> None:
    x, weight = _random(80, 12, 4, 3)
    (one, first), (two, second) = (repair.eliminate([_consumer(x, weight)], 6) for _ in range(2))
    assert one == two
    assert np.array_equal(first, second)


def test_sensitivity_of_a_classifiers_logits_is_the_covariance_of_its_decisions() -> None:
    """Of logits z the Fisher information is E[diag(p) − p pᵀ], p = softmax(z)."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 4))
    network = Network(body, "0")
    batches = [torch.randn(4000, 3) for _ in range(3)]
    found = repair.sensitivities(network, batches, ["body.0"], seed=0)["body.0"]
    chances = body(torch.cat(batches)).softmax(1).detach().double()
    expected = (torch.diag_embed(chances) - chances[:, :, None] * chances[:, None, :]).mean(0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)
    again = repair.sensitivities(network, batches, ["body.0"], seed=0)["body.0"]
    assert torch.equal(found, again)


def test_sensitivity_sums_over_positions_and_sees_in_place_activations_through() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    in_place = copy.deepcopy(plain)
    in_place[1] = nn.ReLU(inplace=True)
    batches = [images(8), images(5, seed=1)]
    one, two = (repair.sensitivities(Network(body, "4"), batches, ["body.0"], seed=3)["body.0"] for body in (plain, in_place))
    assert torch.equal(one, two)
    assert float(one.trace()) > 0
    encoder = repair.sensitivities(Network(plain), batches, ["body.0"], seed=3)["body.0"]
    assert torch.equal(encoder, encoder.T)


def _halved(kind: str, how: str) -> tuple[nn.Module, list[str]]:
    """A network with half of each group's units gone, the cheapest first; as cut, repaired, or reconstructed as well."""
    network, example = made(kind), images(1)
    groups = prune.find_groups(network, example)
    names = sorted({name for group in groups for name in group.consumers})
    batches = [images(32, seed=seed) for seed in range(100, 106)]
    moments, metric = repair.gather(network, batches, names, 0), repair.sensitivities(network, batches, names, 0)
    cuts = []
    for group in groups:
        layers = [Consumer(repair.weights_of(network.get_submodule(name)), moments[name], metric[name]) for name in group.consumers]
        cuts.append((group.name, sorted(repair.eliminate(layers, group.width)[0][: group.width // 2])))
    cut = copy.deepcopy(network)
    prune.replay(cut, cuts, example)
    if how != "cut":
        lost, rows = repaired(cut, network, cuts, example, moments)
        assert set(lost) <= set(names)
        if how == "reconstructed":
            along = route(network, batches[0])
            order = [name for name in along.order if repair.refittable(cut.get_submodule(name))]
            reconstruct(cut, network, order, along, rows, batches, 0, lambda: None)
    return cut, names


def _distance(kind: str, network: nn.Module) -> float:
    with torch.no_grad():
        ours, theirs = (net(images(64, seed=999))[0] for net in (network, made(kind)))
    return float((ours - theirs).square().mean() / theirs.var(0).mean())


@pytest.mark.parametrize("kind", sorted(BODIES))
def test_repaired_networks_are_nearer_to_the_original_on_images_not_seen(kind: str) -> None:
    cut, mended, again = (_distance(kind, _halved(kind, how)[0]) for how in ("cut", "repaired", "reconstructed"))
    assert mended < 0.8 * cut
    assert again < 1.05 * mended
    network, names = _halved(kind, "repaired")
    assert all(network.get_submodule(name).bias is not None for name in names)


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
