"""Which channels are cut together, which are left alone, what a cut saves, and that any cut gives a network that runs."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import BODIES, CLASSES, hf_folder, images, made
from torch import Tensor, nn

from attar.models.network import Network, count_macs, find_classifier
from attar.stages.compress.prune import Costs, Group, allocate, find_groups, granularity, replay

EXPECTED = {
    "residual": [
        Group(producer="body.a1", width=16, consumers=("body.a2",), tied=()),
        Group(producer="body.b1", width=16, consumers=("body.b2",), tied=()),
    ],
    "inverted": [Group(producer="body.up.0", width=32, consumers=("body.down.0",), tied=("body.depthwise.0",))],
    "transformer": [Group(producer="body.fc1", width=32, consumers=("body.fc2",), tied=())],
}


def _groups(body: nn.Module) -> list[Group]:
    body.eval()
    return find_groups(Network(body, find_classifier(body, images(2))).eval(), images(1))


@pytest.mark.parametrize("kind", sorted(BODIES))
def test_groups_are_the_channels_inside_blocks(kind: str) -> None:
    found = find_groups(made(kind), images(1))
    assert sorted(found, key=lambda group: group.producer) == EXPECTED[kind]
    assert find_groups(made(kind), images(1)) == found


class Chain(nn.Module):
    """conv a → something in between → conv b → pool → linear: what is in between decides whether a can be cut."""

    def __init__(self, between: nn.Module, inputs: int = 8) -> None:
        super().__init__()
        self.a, self.between, self.b = nn.Conv2d(3, 8, 3, 1, 1), between, nn.Conv2d(inputs, 8, 3, 1, 1)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(F.relu(self.between(self.a(x)))).mean((2, 3)))


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], 1)


class Shared(nn.Module):
    """One layer used twice: its inputs and outputs are the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.b(F.relu(self.b(F.relu(self.a(x)))))).mean((2, 3)))


def test_a_chain_of_convolutions_can_be_cut() -> None:
    assert [group.producer for group in _groups(Chain(nn.BatchNorm2d(8)))] == ["body.a"]
    assert _groups(Chain(nn.Conv2d(8, 8, 3, 1, 1, groups=8)))[0].tied == ("body.between",)


@pytest.mark.parametrize(
    ("between", "inputs"),
    [
        pytest.param(nn.GroupNorm(2, 8), 8, id="group norm"),
        pytest.param(nn.Conv2d(8, 8, 3, 1, 1, groups=2), 8, id="grouped convolution"),
        pytest.param(nn.Conv2d(8, 16, 3, 1, 1, groups=8), 16, id="depth multiplier"),
        pytest.param(Double(), 16, id="channels repeated"),
        pytest.param(nn.PixelUnshuffle(2), 32, id="channels re-ordered"),
    ],
)
def test_what_is_not_understood_is_left_alone(between: nn.Module, inputs: int) -> None:
    assert _groups(Chain(between, inputs)) == []


def test_consumers_that_cannot_be_repaired_and_shared_layers_are_left_alone() -> None:
    assert _groups(Shared()) == []
    for replacement in (nn.Conv2d(8, 8, 3, padding="same"), nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")):
        chain = Chain(nn.ReLU())
        chain.b = replacement
        assert _groups(chain) == []
    flattened = nn.Sequential(nn.Conv2d(3, 4, 3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 5))
    assert _groups(flattened) == []


def test_the_channels_of_the_embedding_stay() -> None:
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))
    assert _groups(body) == []


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(BODIES)), st.data())
def test_costs_are_those_counted_after_any_cut_and_the_network_keeps_its_outputs_shapes(kind: str, data: st.DataObject) -> None:
    network, example = made(kind), images(1)
    groups = find_groups(network, example)
    costs = Costs(network, example, groups)
    assert costs.total({}) == count_macs(network, example)
    gone = {
        group.producer: sorted(data.draw(st.sets(st.integers(0, group.width - 1), max_size=group.width - 1), label=group.producer))
        for group in groups
    }
    before = [output.shape for output in network(images(2))]
    cut = copy.deepcopy(network)
    replay(cut, [(name, channels) for name, channels in gone.items() if channels], example)
    assert costs.total({group.producer: group.width - len(gone[group.producer]) for group in groups}) == pytest.approx(
        count_macs(cut, example)
    )
    with torch.no_grad():
        assert [output.shape for output in cut(images(2))] == before


def test_the_price_of_a_channel_is_what_removing_it_saves() -> None:
    network, example = made("inverted"), images(1)
    (group,) = groups = find_groups(network, example)
    costs = Costs(network, example, groups)
    assert costs.per_channel(group) == pytest.approx(costs.total({}) - costs.total({group.producer: group.width - 1}))


@pytest.mark.parametrize("kind", sorted(BODIES))
def test_a_cut_keeps_the_weights_of_the_channels_that_stay(kind: str) -> None:
    network, example = made(kind), images(1)
    for group in find_groups(network, example):
        cut = copy.deepcopy(network)
        keep = list(range(0, group.width, 2))
        replay(cut, [(group.producer, list(range(1, group.width, 2)))], example)
        assert torch.equal(cut.get_submodule(group.producer).weight, network.get_submodule(group.producer).weight[keep])
        for name in group.consumers:
            assert torch.equal(cut.get_submodule(name).weight, network.get_submodule(name).weight[:, keep])
        for name in group.tied:
            assert torch.equal(cut.get_submodule(name).weight, network.get_submodule(name).weight[keep])


@pytest.mark.parametrize("kind", ["resnet", "bottleneck", "vit", "mobilenet", "convnext", "dinov2"])
def test_transformers_models_have_groups_and_run_after_the_cut(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    body = AutoModelForImageClassification.from_pretrained(hf_folder(tmp_path / kind, kind, classifier=True)).eval()
    network, example = Network(body, find_classifier(body, images(2))).eval(), images(1)
    groups = find_groups(network, example)
    assert groups
    costs = Costs(network, example, groups)
    embedding = network(example)[0].shape
    replay(network, [(group.producer, list(range(group.width // 2))) for group in groups], example)
    with torch.no_grad():
        found = network(images(2))
    assert (found[0].shape[1:], found[1].shape) == (embedding[1:], (2, CLASSES))
    assert count_macs(network, example) == pytest.approx(costs.total({group.producer: group.width - group.width // 2 for group in groups}))


def _made_up(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Increasing damage curves for the groups of the residual network."""
    return {group.producer: np.concatenate([[0], rng.exponential(size=group.width - 1).cumsum()]) for group in EXPECTED["residual"]}


@pytest.fixture(scope="module")
def costs() -> Costs:
    return Costs(made("residual"), images(1), EXPECTED["residual"])


def test_allocation_is_the_best_of_all_that_a_price_can_reach(costs: Costs) -> None:
    groups, damage = EXPECTED["residual"], _made_up(np.random.default_rng(0))
    widths = allocate(groups, damage, costs, 0.7)

    def loss(widths: dict[str, int]) -> float:
        return sum(damage[group.producer][group.width - widths[group.producer]] for group in groups)

    allowed = [4, 8, 12, 16]  # every multiple of granularity(16)
    every = [{"body.a1": a, "body.b1": b} for a in allowed for b in allowed]
    assert costs.total(widths) <= 0.7 * costs.total({})
    assert loss(widths) == min(loss(other) for other in every if costs.total(other) <= costs.total(widths))


@given(st.integers(0, 1000), st.floats(0.3, 1.0), st.floats(0.3, 1.0))
def test_allocation_meets_its_target_and_a_smaller_target_never_widens(costs: Costs, seed: int, one: float, two: float) -> None:
    groups, damage = EXPECTED["residual"], _made_up(np.random.default_rng(seed))
    least = costs.total({group.producer: 4 for group in groups})
    small, large = (allocate(groups, damage, costs, share) for share in sorted((one, two)))
    for widths, share in ((small, min(one, two)), (large, max(one, two))):
        assert costs.total(widths) <= max(share * costs.total({}), least) + 1e-6
        assert all(width % granularity(16) == 0 for width in widths.values())
    assert all(small[name] <= large[name] for name in small)


def test_nothing_is_cut_for_the_whole_and_everything_for_nothing(costs: Costs) -> None:
    groups, damage = EXPECTED["residual"], _made_up(np.random.default_rng(1))
    assert allocate(groups, damage, costs, 1.0) == {"body.a1": 16, "body.b1": 16}
    assert allocate(groups, damage, costs, 0.0) == {"body.a1": 4, "body.b1": 4}
    assert allocate(groups, damage, costs, 0.5) == allocate(groups, damage, costs, 0.5)


def test_granularity_follows_the_lanes() -> None:
    assert [granularity(width) for width in (1, 7, 8, 31, 32, 512)] == [1, 1, 4, 4, 8, 8]


def test_a_cut_of_a_layer_that_is_not_there_names_it() -> None:
    with pytest.raises(AttributeError, match="nowhere"):
        replay(made("residual"), [("body.nowhere", [0])], images(1))
