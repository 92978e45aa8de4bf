"""Rounding with compensation: on the grid, nearer in output than plain rounding, and found again by the quantiser."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import made
from torch import Tensor, nn

from attar.stages.compress.repair import Moments
from attar.stages.compress.rounding import LEVELS, round_network, round_weights, roundable


def case(seed: int, outputs: int = 6, inputs: int = 12) -> tuple[Tensor, Moments, Tensor]:
    """Weights with a bias column, moments of correlated inputs with the constant last, and those inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    rows = torch.randn(400, inputs, generator=generator, dtype=torch.float64) @ mix + 0.5
    rows = torch.cat([rows, torch.ones(400, 1, dtype=torch.float64)], 1)
    weight = torch.randn(outputs, inputs + 1, generator=generator, dtype=torch.float64)
    return weight, Moments(rows.T @ rows / len(rows), len(rows)), rows


def plainly(weight: Tensor) -> Tensor:
    scale = weight[:, :-1].abs().amax(1, keepdim=True) / LEVELS
    return torch.cat([(weight[:, :-1] / scale).round() * scale, weight[:, -1:]], 1)


def error(weight: Tensor, other: Tensor, rows: Tensor) -> float:
    return float(((rows @ (weight - other).T) ** 2).mean())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_weights_lie_on_the_grid_and_the_largest_stays(seed: int) -> None:
    weight, moments, _ = case(seed)
    rounded = round_weights(weight, moments)
    scale = weight[:, :-1].abs().amax(1, keepdim=True) / LEVELS
    whole = rounded[:, :-1] / scale
    assert torch.allclose(whole, whole.round(), atol=1e-6)
    assert torch.allclose(whole.abs().amax(1), torch.full((len(weight),), float(LEVELS), dtype=torch.float64))
    again = plainly(rounded)  # a quantiser that takes its scale from the range rounds nothing
    torch.testing.assert_close(again, rounded, rtol=0, atol=1e-9)


def test_outputs_are_nearer_than_with_plain_rounding() -> None:
    better = [error(w, round_weights(w, m), x) < error(w, plainly(w), x) for w, m, x in map(case, range(20))]
    assert sum(better) >= 19
    total = sum(error(w, round_weights(w, m), x) / error(w, plainly(w), x) for w, m, x in map(case, range(20))) / 20
    assert total < 0.7  # 0.61 when it was written


def test_uncorrelated_inputs_leave_nothing_to_compensate() -> None:
    weight, _, _ = case(3)
    identity = Moments(torch.eye(weight.shape[1], dtype=torch.float64), 1)
    torch.testing.assert_close(round_weights(weight, identity), plainly(weight))


def test_a_row_of_zeros_stays_zero() -> None:
    weight, moments, _ = case(4)
    weight[2] = 0
    assert float(round_weights(weight, moments)[2].abs().max()) < 1e-9


@pytest.mark.parametrize("name", ["residual", "inverted"])
def test_depthwise_layers_are_left_alone(name: str) -> None:
    network = made(name)
    layers = dict(network.named_modules())
    chosen = roundable(network)
    assert chosen
    assert all(getattr(layers[layer], "groups", 1) == 1 for layer in chosen)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    layer = layers[chosen[0]]
    size = layer.weight[0].numel() + 1  # type: ignore[union-attr, index, operator]
    round_network(network, {chosen[0]: Moments(torch.eye(size, dtype=torch.float64), 1)})
    changed = {key for key, value in network.state_dict().items() if key not in before or not torch.equal(value, before[key])}
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    assert changed <= {f"{chosen[0]}.weight", f"{chosen[0]}.bias"}
    assert f"{chosen[0]}.weight" in changed
