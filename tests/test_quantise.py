"""int8 files: they run, their weights fit in seven bits, the cluster head stays exact, and decisions survive."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from networks import SIDE, Residual, images
from onnx import numpy_helper
from torch import nn

from attar.models.network import Network, Shipped, find_classifier
from attar.records import Head
from attar.runtime import open_session, outputs
from attar.stages.compress.quantise import quantise


def _classes(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of seven classes that differ in colour and in the direction of their stripes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 7
    x = torch.arange(SIDE) / SIDE * 6.3
    angle = labels[:, None, None] * 0.45
    wave = torch.sin(3 * (x[None, None, :] * torch.cos(angle) + x[None, :, None] * torch.sin(angle)))
    tint = torch.eye(7)[labels][:, :3, None, None]
    return wave[:, None] + tint + 0.5 * torch.randn(count, 3, SIDE, SIDE, generator=generator), labels


@pytest.fixture(scope="module")
def trained() -> Shipped:
    """A small classifier that knows its task, with a cluster head."""
    torch.manual_seed(0)
    body = Residual()
    optimiser = torch.optim.AdamW(body.parameters(), 5e-3)
    for step in range(40):
        batch, labels = _classes(35, step)
        loss = nn.functional.cross_entropy(body(batch), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    body.eval()
    network = Network(body, find_classifier(body, images(2))).eval()
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=shape).astype(np.float32) for shape in (16, (16, 4), (5, 4))]
    return Shipped(network, Head(mean=0.1 * parts[0], projection=parts[1], centroids=parts[2], temperature=1.0)).eval()


@pytest.fixture(scope="module")
def files(trained: Shipped, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The float32 file and its int8 version."""
    folder = tmp_path_factory.mktemp("files")
    names = ["embedding", "cluster_probabilities", "logits"]
    axes = {name: {0: "items"} for name in ("image", *names)}
    arguments = {"input_names": ["image"], "output_names": names, "dynamic_axes": axes, "opset_version": 17, "dynamo": False}
    torch.onnx.export(trained, (images(2),), str(folder / "float32.onnx"), **arguments)
    quantise(folder / "float32.onnx", folder / "int8.onnx", [_classes(16, seed)[0].numpy() for seed in (100, 101)])
    return folder / "float32.onnx", folder / "int8.onnx"


def test_the_int8_file_decides_like_the_float_file(files: tuple[Path, Path]) -> None:
    batch, labels = _classes(140, 999)
    exact, small = (outputs(open_session(file), batch.numpy()) for file in files)
    assert (exact["logits"].argmax(1) == labels.numpy()).mean() > 0.9, "the task is learned, so that agreement means something"
    assert (exact["logits"].argmax(1) == small["logits"].argmax(1)).mean() > 0.95
    cosine = (exact["embedding"] * small["embedding"]).sum(1) / np.linalg.norm(exact["embedding"], axis=1)
    assert (cosine / np.linalg.norm(small["embedding"], axis=1)).mean() > 0.98
    np.testing.assert_allclose(small["cluster_probabilities"].sum(1), 1, atol=1e-5)
    assert not np.array_equal(exact["embedding"], small["embedding"])


def test_any_number_of_items_is_taken(files: tuple[Path, Path]) -> None:
    session, batch = open_session(files[1]), _classes(5, 0)[0].numpy()
    whole = outputs(session, batch)["logits"]
    alone = np.concatenate([outputs(session, batch[i : i + 1])["logits"] for i in range(5)])
    np.testing.assert_allclose(alone, whole, atol=1e-5)


def test_weights_fit_in_seven_bits_and_convolutions_are_eight_bit(files: tuple[Path, Path]) -> None:
    graph = onnx.load(files[1]).graph
    arrays = {value.name: numpy_helper.to_array(value) for value in graph.initializer}
    weights = [array for name, array in arrays.items() if array.dtype == np.int8 and array.ndim == 4]
    kernels = [node for node in graph.node if node.op_type == "Conv"]
    assert len(weights) == len(kernels) == 6
    assert max(int(np.abs(array.astype(int)).max()) for array in weights) <= 64
    made = {output: node.op_type for node in graph.node for output in node.output}
    assert all(made[node.input[0]] == made[node.input[1]] == "DequantizeLinear" for node in kernels)
    scales = [arrays[node.input[1]] for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in arrays]
    assert any(scale.size > 1 for scale in scales), "one scale per output channel"


def test_the_cluster_head_stays_in_float(files: tuple[Path, Path]) -> None:
    graph = onnx.load(files[1]).graph
    made = {output: node.op_type for node in graph.node for output in node.output}
    head = [node for node in graph.node if "/head/" in node.name and node.op_type == "MatMul"]
    assert head
    assert all(made.get(name) != "DequantizeLinear" for node in head for name in node.input)


def test_the_same_calibration_gives_the_same_bytes(files: tuple[Path, Path], tmp_path: Path) -> None:
    quantise(files[0], tmp_path / "again.onnx", [_classes(16, seed)[0].numpy() for seed in (100, 101)])
    assert (tmp_path / "again.onnx").read_bytes() == files[1].read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.onnx"]


def test_the_int8_file_is_smaller(tmp_path: Path, files: tuple[Path, Path]) -> None:
    weights = sum(numpy_helper.to_array(value).nbytes for value in onnx.load(files[0]).graph.initializer)
    small = sum(numpy_helper.to_array(value).nbytes for value in onnx.load(files[1]).graph.initializer)
    assert small < 0.45 * weights


def test_without_calibration_items_it_says_so(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no calibration batches; expected at least one"):
        quantise(files[0], tmp_path / "none.onnx", [])
    assert not (tmp_path / "none.onnx").exists()
