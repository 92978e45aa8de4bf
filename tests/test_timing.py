"""Time by layer: the file's names lead back to the network's, and all its layers are found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import BODIES, images, made
from torch import nn

from attar.stages.compress.timing import covered, layer_of, layer_times


@pytest.mark.parametrize("kind", sorted(BODIES))
def test_every_layer_that_mixes_channels_gets_its_time(kind: str, tmp_path: Path) -> None:
    network, file = made(kind), tmp_path / "net.onnx"

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x)[0]

    torch.onnx.export(Named(), (images(1),), str(file), dynamo=False, opset_version=17, input_names=["image"])
    times = layer_times(file)
    inner = {name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    inner -= {f"body.{network.classifier}"}  # the embedding does not need it
    assert inner <= set(times)
    assert all(time >= 0 for time in times.values())
    assert covered(times, inner)


def test_names_of_children_of_a_sequential_are_taken_apart() -> None:
    assert layer_of("/network/body/up/up.0/Conv") == "body.up.0"
    assert layer_of("/network/body/encoder/stages.0/layers.1/attention/query/MatMul") == "body.encoder.stages.0.layers.1.attention.query"


def test_times_of_another_file_do_not_count() -> None:
    assert not covered({"a": 1.0}, {"b", "c"})
    assert not covered({}, set())
