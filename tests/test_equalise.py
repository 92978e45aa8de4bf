"""Equalisation: the function stays, the channels' ranges come together, and what cannot be followed is left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from networks import BODIES, images, made
from torch import Tensor, nn

from attar.stages.compress.equalise import HEADROOM, MOST, channel_extremes, channel_scales, equalised, groups
from attar.stages.compress.graph import Graph
from attar.stages.compress.quantise import prepared


def graph_of(module: nn.Module, folder: Path) -> Graph:
    axes = {name: {0: "items"} for name in ("image", "logits")}
    arguments = {"input_names": ["image"], "output_names": ["logits"], "dynamic_axes": axes, "opset_version": 17, "dynamo": False}
    torch.onnx.export(module, (images(2),), str(folder / "float32.onnx"), **arguments)
    return prepared(folder / "float32.onnx")


class Logits(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def logits(graph: Graph, batch: np.ndarray) -> np.ndarray:
    (values,) = graph.run(["logits"], [batch])
    return values[0]


BATCHES = [images(8, seed=seed).numpy() for seed in range(3)]


@pytest.mark.parametrize("kind", sorted(BODIES))
def test_the_function_stays(kind: str, tmp_path: Path) -> None:
    graph = graph_of(Logits(made(kind).body).eval(), tmp_path)
    even, count = equalised(graph, BATCHES)
    assert count == {"residual": 3, "inverted": 3, "transformer": 0}[kind]
    for batch in BATCHES:
        np.testing.assert_allclose(logits(even, batch), logits(graph, batch), rtol=2e-4, atol=2e-5)
    assert any(not np.array_equal(even.constants[name], graph.constants[name]) for name in graph.constants) == (count > 0)


def test_channels_come_to_like_ranges(tmp_path: Path) -> None:
    graph = graph_of(Logits(made("residual").body).eval(), tmp_path)
    even, _ = equalised(graph, BATCHES)
    alone = [group for group in groups(graph) if len(group.producers) == 1]
    assert alone
    for group in alone:
        shown = [name for name in group.tensors if not any(node.op_type == "Relu" for node in graph.readers[name])][:1]
        spreads = []
        for one in (graph, even):
            low, high = channel_extremes(one, shown, BATCHES)[shown[0]]
            reach = np.maximum(-low, high)
            spreads.append(reach.max() / reach.min())
        assert spreads[1] < min(1.01, spreads[0]) or spreads[0] > MOST


def test_under_a_ceiling_channels_only_grow_and_stay_below_it(tmp_path: Path) -> None:
    graph = graph_of(Logits(made("inverted").body).eval(), tmp_path)
    even, _ = equalised(graph, BATCHES)
    capped = [group for group in groups(graph) if group.ceiling == 6]
    assert capped
    for group in capped:
        for name in group.tensors:
            if graph.made[name].op_type == "Clip":
                before, after = (channel_extremes(one, [name], BATCHES)[name][1] for one in (graph, even))
                assert (after >= before - 1e-5).all()
                assert after.max() <= 6
                grown = after > before + 1e-4
                assert (after[grown] <= 6 / HEADROOM + 1e-4).all()


def test_scales_are_bounded() -> None:
    reach = np.array([[1e-9, 1.0, 100.0]])
    assert channel_scales(reach, 6.0).max() == MOST
    scale = channel_scales(reach, None)
    assert scale.max() / scale.min() == pytest.approx(MOST)
    assert np.log(scale).mean() == pytest.approx(0)


class Unfollowable(nn.Module):
    """A convolution whose output goes through a sigmoid, and one whose output is an output of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.sigmoid(self.a(x)) * self.b(x))


def test_what_cannot_be_followed_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = graph_of(Unfollowable().eval(), tmp_path)
    even, count = equalised(graph, BATCHES)
    assert count == 0
    assert all(np.array_equal(even.constants[name], value) for name, value in graph.constants.items())


def test_channels_that_become_features_are_left_alone(tmp_path: Path) -> None:
    """Flatten makes channel times place a feature: scales per channel no longer fit."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 8 * 8, 5)).eval()
    graph = graph_of(module, tmp_path)
    even, count = equalised(graph, BATCHES)
    assert count == 0
    np.testing.assert_array_equal(logits(even, BATCHES[0]), logits(graph, BATCHES[0]))
