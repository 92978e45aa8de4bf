"""int8 files: they run, no pair of weights can saturate, what must stay exact does, and decisions survive. And float16 files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from networks import SIDE, Residual, images, made
from onnx import numpy_helper
from torch import nn

from attar.models.network import Network, Shipped, find_classifier
from attar.records import Head
from attar.runtime import open_session, outputs
from attar.stages.compress import quantise as module
from attar.stages.compress.graph import Graph
from attar.stages.compress.quantise import CHANNELS, distance, entrance, half, layer_costs, prepared, quantise
from attar.stages.compress.refine import gather, layers, rows_of
from attar.stages.compress.rounding import LARGEST, PAIR, partners


def _classes(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of seven classes that differ in colour and in the direction of their stripes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 7
    x = torch.arange(SIDE) / SIDE * 6.3
    angle = labels[:, None, None] * 0.45
    wave = torch.sin(3 * (x[None, None, :] * torch.cos(angle) + x[None, :, None] * torch.sin(angle)))
    tint = torch.eye(7)[labels][:, :3, None, None]
    return wave[:, None] + tint + 0.5 * torch.randn(count, 3, SIDE, SIDE, generator=generator), labels


CALIBRATION = [_classes(16, seed)[0].numpy() for seed in range(100, 106)]


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
    quantise(folder / "float32.onnx", folder / "int8.onnx", CALIBRATION)
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


def test_no_pair_of_weights_can_saturate(files: tuple[Path, Path]) -> None:
    """Any two weights that meet in a 16-bit sum, times the largest activations, stay inside 16 bits."""
    graph = Graph(onnx.load(files[1]))
    found = layers(graph, prepared(files[0]))
    assert [layer.kind for layer in found] == ["Conv"] * 5 + ["Gemm"], "all but the first convolution, which reads pixels"
    for layer in found:
        weight = graph.constants[layer.weight].astype(int)
        assert weight.max() <= LARGEST
        assert weight.min() >= -LARGEST
        flat = weight.reshape(len(weight), -1)
        for layout in partners(weight.shape[1], flat.shape[1] // weight.shape[1]).numpy():
            both = flat * (layout >= 0) + flat[:, layout] * (layout >= 0)
            same = flat * flat[:, layout] > 0
            assert np.abs(both[same]).max(initial=0) <= PAIR
            assert 255 * np.abs(both[same]).max(initial=0) <= 2**15 - 1
        assert graph.constants[layer.scale].shape == (len(weight),), "one scale per output channel"
        assert not graph.constants[graph.made[graph.named[layer.name].input[1]].input[2]].any(), "symmetric"
    assert max(np.abs(graph.constants[layer.weight].astype(int)).max() for layer in found) > 64, "more than seven bits where that is safe"


def test_the_first_convolution_and_the_outputs_are_not_rounded(files: tuple[Path, Path]) -> None:
    graph = Graph(onnx.load(files[1]))
    first = next(node for node in graph.nodes if node.op_type == "Conv")
    assert first.input[0] == "image"
    assert graph.constants[first.input[1]].dtype == np.float32
    assert graph.constants[first.input[1]].shape[1] <= CHANNELS
    assert graph.made["logits"].op_type == "Gemm"
    assert graph.made["embedding"].op_type == "ReduceMean"
    logits = outputs(open_session(files[1]), _classes(64, 3)[0].numpy())["logits"]
    assert len(np.unique(logits)) > 256, "more values than eight bits hold"


def test_the_cluster_head_stays_in_float(files: tuple[Path, Path]) -> None:
    graph = onnx.load(files[1]).graph
    made = {output: node.op_type for node in graph.node for output in node.output}
    head = [node for node in graph.node if "/head/" in node.name and node.op_type == "MatMul"]
    assert head
    assert all(made.get(name) != "DequantizeLinear" for node in head for name in node.input)


def test_the_same_calibration_gives_the_same_bytes(files: tuple[Path, Path], tmp_path: Path) -> None:
    chosen = [quantise(files[0], tmp_path / "again.onnx", CALIBRATION) for _ in range(2)]
    assert chosen[0] == chosen[1]
    assert (tmp_path / "again.onnx").read_bytes() == files[1].read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.onnx"]


def test_the_int8_file_is_smaller(files: tuple[Path, Path]) -> None:
    weights = sum(numpy_helper.to_array(value).nbytes for value in onnx.load(files[0]).graph.initializer)
    small = sum(numpy_helper.to_array(value).nbytes for value in onnx.load(files[1]).graph.initializer)
    assert small < 0.45 * weights


def test_solving_the_weights_beats_rounding_them(files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same structure and ranges, with the weights as the library rounds them: to seven bits, each for itself."""
    monkeypatch.setattr(module, "refine", lambda *_: None)
    quantise(files[0], tmp_path / "plain.onnx", CALIBRATION)
    batch = _classes(200, 7)[0].numpy()
    exact, solved, plain = (list(outputs(open_session(file), batch).values()) for file in (*files, tmp_path / "plain.onnx"))
    assert distance(exact, solved) < 0.7 * distance(exact, plain)


def test_more_may_stay_in_float_at_the_entrance(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Up to half of the multiply-accumulates: layers from the front, never one behind a rounded one."""
    graph = prepared(files[0])
    costs = layer_costs(graph, CALIBRATION[0][:1])
    torch_macs = {"conv": 3 * 9 * 8 * 32 * 32, "a1": 8 * 9 * 16 * 32 * 32, "fc": 16 * 7}
    for name, macs in torch_macs.items():
        assert [cost for node, cost in costs.items() if f"/{name}/" in node] == [macs]
    kept = [name for name in entrance(graph, costs, 0.5) if name in costs]
    assert kept == list(costs)[: len(kept)]
    assert 0 < sum(costs[name] for name in kept) <= 0.5 * sum(costs.values())
    chosen = quantise(files[0], tmp_path / "half.onnx", CALIBRATION, leading=0.5)
    assert chosen.leading == len(kept)
    assert chosen.layers == len([name for name in costs if "/head/" not in name]) - len(kept)
    quantised = Graph(onnx.load(tmp_path / "half.onnx"))
    assert all(quantised.constants[quantised.named[name].input[1]].dtype == np.float32 for name in kept)


class Uneven(nn.Module):
    """Channels of very different size, one scale undone by the next layer: what equalisation is for."""

    def __init__(self) -> None:
        super().__init__()
        self.body = made("residual").body
        stretch = torch.logspace(-1.5, 1.5, 16)
        with torch.no_grad():
            self.body.n1.weight.mul_(stretch)
            self.body.n1.bias.mul_(stretch)
            self.body.a2.weight.div_(stretch[None, :, None, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def test_uneven_channels_are_equalised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"input_names": ["image"], "output_names": ["logits"], "dynamic_axes": {"image": {0: "items"}, "logits": {0: "items"}}}
    torch.onnx.export(Uneven().eval(), (images(2),), str(tmp_path / "uneven.onnx"), opset_version=17, dynamo=False, **arguments)
    batches = [images(16, seed=seed).numpy() for seed in range(4)]
    chosen = quantise(tmp_path / "uneven.onnx", tmp_path / "even.onnx", batches, leading=0)
    assert chosen.groups == 3
    monkeypatch.setattr(module, "equalised", lambda graph, _: (graph, 0))
    without = quantise(tmp_path / "uneven.onnx", tmp_path / "plain.onnx", batches, leading=0)
    assert without.groups == 0
    fresh = images(64, seed=99).numpy()
    exact, even, plain = ([outputs(open_session(tmp_path / f"{name}.onnx"), fresh)["logits"]] for name in ("uneven", "even", "plain"))
    assert distance(exact, even) < 0.5 * distance(exact, plain)


@pytest.mark.parametrize("kind", ["residual", "inverted"])
def test_rows_are_the_inputs_of_each_output(kind: str, tmp_path: Path) -> None:
    """Weights times rows are the layer's outputs, for strides, dilation, padding, depthwise and 1 × 1 convolutions and linear layers."""
    names = {"input_names": ["image"], "output_names": ["logits"], "dynamic_axes": {"image": {0: "items"}, "logits": {0: "items"}}}
    torch.onnx.export(made(kind).body.eval(), (images(2),), str(tmp_path / "f.onnx"), opset_version=17, dynamo=False, **names)
    quantise(tmp_path / "f.onnx", tmp_path / "q.onnx", [images(8).numpy()], leading=0)
    exact, found = prepared(tmp_path / "f.onnx"), layers(Graph(onnx.load(tmp_path / "q.onnx")), prepared(tmp_path / "f.onnx"))
    assert len(found) == {"residual": 6, "inverted": 4}[kind]
    for layer in found:
        weight, bias = (torch.from_numpy(np.array(exact.constants[name])) for name in layer.exact)
        ((x, y),) = exact.run([exact.named[layer.name].input[0], layer.output], [images(3).numpy()])
        rows, targets = rows_of(layer, weight.shape, torch.from_numpy(x), torch.from_numpy(y), torch.Generator().manual_seed(0))
        result = torch.einsum("rgi,goi->rgo", rows, weight.reshape(layer.groups, -1, rows.shape[2])) + bias.reshape(layer.groups, -1)
        torch.testing.assert_close(result, targets, rtol=1e-4, atol=1e-4)


def test_moments_are_sums_over_both_halves(files: tuple[Path, Path]) -> None:
    exact, quantised = prepared(files[0]), Graph(onnx.load(files[1]))
    layer = layers(quantised, exact)[-1]
    items = np.concatenate(CALIBRATION)
    one, other = gather(quantised, exact, layer, exact.constants[layer.exact[0]].shape, items)
    assert one.rows + other.rows == len(items)
    (x,), (y,) = (next(iter(graph.run([name], [items]))) for graph, name in ((quantised, layer.source), (exact, layer.output)))
    rows = np.concatenate([x, np.ones((len(x), 1), np.float32)], 1).astype(np.float64)
    np.testing.assert_allclose((one.gram + other.gram)[0], rows.T @ rows, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose((one.cross + other.cross)[0], y.T.astype(np.float64) @ rows, rtol=1e-4, atol=1e-2)


def test_without_calibration_items_it_says_so(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"float32\.onnx: no calibration batches; expected at least one"):
        quantise(files[0], tmp_path / "none.onnx", [])
    assert not (tmp_path / "none.onnx").exists()


def test_one_item_is_enough_to_write_a_file(files: tuple[Path, Path], tmp_path: Path) -> None:
    quantise(files[0], tmp_path / "one.onnx", [CALIBRATION[0][:1]])
    assert np.isfinite(outputs(open_session(tmp_path / "one.onnx"), CALIBRATION[1])["logits"]).all()


def test_float16_halves_the_size_and_keeps_the_decisions(files: tuple[Path, Path], tmp_path: Path) -> None:
    half(files[0], tmp_path / "half.onnx")
    stored = [value.data_type for value in onnx.load(tmp_path / "half.onnx").graph.initializer]
    assert onnx.TensorProto.FLOAT16 in stored
    sizes = [
        sum(numpy_helper.to_array(value).nbytes for value in onnx.load(file).graph.initializer)
        for file in (files[0], tmp_path / "half.onnx")
    ]
    assert sizes[1] < 0.52 * sizes[0]
    onnx.checker.check_model(onnx.load(tmp_path / "half.onnx"), full_check=True)
    batch = _classes(140, 999)[0].numpy()
    exact, small = (outputs(open_session(file), batch) for file in (files[0], tmp_path / "half.onnx"))
    assert all(value.dtype == np.float32 for value in small.values())
    assert (exact["logits"].argmax(1) == small["logits"].argmax(1)).mean() > 0.98
    assert 0 < np.abs(exact["logits"] - small["logits"]).max() < 0.05


def test_weights_beyond_float16_stay(tmp_path: Path) -> None:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight[0, 0] = 1e6
    torch.onnx.export(layer, (torch.zeros(1, 3),), str(tmp_path / "big.onnx"), input_names=["image"], dynamo=False)
    half(tmp_path / "big.onnx", tmp_path / "half.onnx")
    stored = {value.name: value.data_type for value in onnx.load(tmp_path / "half.onnx").graph.initializer}
    assert stored == {"weight": onnx.TensorProto.FLOAT, "bias": onnx.TensorProto.FLOAT}


def test_between_the_layers_of_a_transformer_nothing_is_rounded(tmp_path: Path) -> None:
    """Attention, additions and norms stay in float32; the linear layers with constant weights do not."""
    axes = {name: {0: "items"} for name in ("image", "embedding", "logits")}
    names = {"input_names": ["image"], "output_names": ["embedding", "logits"], "dynamic_axes": axes}
    torch.onnx.export(made("transformer"), (images(2),), str(tmp_path / "f.onnx"), opset_version=17, dynamo=False, **names)
    chosen = quantise(tmp_path / "f.onnx", tmp_path / "q.onnx", [images(16, seed=seed).numpy() for seed in range(4)], leading=0)
    graph = Graph(onnx.load(tmp_path / "q.onnx"))
    assert chosen.layers == 5, "query-key-value, projection, two of the MLP, a classifier that is called head"
    for node in graph.nodes:
        if node.op_type == "DequantizeLinear" and node.input[0] not in graph.constants:
            assert {reader.op_type for reader in graph.readers[node.output[0]]} <= {"MatMul", "Gemm"}
    products = [node for node in graph.nodes if node.op_type == "MatMul"]
    assert sum(graph.made[node.input[1]].op_type != "DequantizeLinear" for node in products) == 2, "both products of attention"
    fresh = images(64, seed=99).numpy()
    exact, small = ([outputs(open_session(tmp_path / name), fresh)["logits"]] for name in ("f.onnx", "q.onnx"))
    assert 0 < distance(exact, small) < 0.01
