"""The integer executor: its convolution against a slow loop, its worst case by hand, its wide mode against ONNX Runtime."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import images, made
from onnx import helper, numpy_helper
from torch import nn

from attar.runtime import open_session, outputs
from attar.stages.compress.quantise import quantise

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import int8
import integers


def slowly(codes: np.ndarray, zero: int, weights: np.ndarray, saturating: bool) -> np.ndarray:
    """Sums pair by pair in plain Python integers."""
    found = np.zeros((len(codes), len(weights)), np.int64)
    for row in range(len(codes)):
        for output in range(len(weights)):
            products = [int(a) * int(w) for a, w in zip(codes[row], weights[output])]
            pairs = [sum(products[at : at + 2]) for at in range(0, len(products), 2)]
            found[row, output] = sum(max(-32768, min(32767, pair)) if saturating else pair for pair in pairs)
            found[row, output] -= zero * int(weights[output].astype(int).sum())
    return found


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 9), st.booleans())
def test_sums_are_those_of_a_slow_loop(seed: int, inputs: int, saturating: bool) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(100, 256, (5, inputs)).astype(np.uint8)
    weights = rng.choice([-127, -90, 0, 90, 127], (4, inputs)).astype(np.int8)
    zero = int(rng.integers(0, 256))
    np.testing.assert_array_equal(integers.accumulate(codes, zero, weights, saturating), slowly(codes, zero, weights, saturating))


def linear_file(path: Path, weight: np.ndarray, scale: float) -> Path:
    """x → 8 bits (0 … 255 for 0 … 1) → linear layer → float32."""
    constants = {
        "x_scale": np.float32(1 / 255),
        "x_zero": np.uint8(0),
        "weight": weight.astype(np.int8),
        "w_scale": np.full(len(weight), scale, np.float32),
        "w_zero": np.zeros(len(weight), np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "x_scale", "x_zero"], ["real"]),
        helper.make_node("DequantizeLinear", ["weight", "w_scale", "w_zero"], ["matrix"], axis=0),
        helper.make_node("Gemm", ["real", "matrix"], ["logits"], transB=1),
    ]
    shapes = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", size])
        for name, size in (("x", weight.shape[1]), ("logits", len(weight)))
    ]
    initialisers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "linear", shapes[:1], shapes[1:], initialisers), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 8
    onnx.save(model, path)
    return path


def test_the_worst_case_loses_half_with_full_weights_and_nothing_with_seven_bits(tmp_path: Path) -> None:
    """Sixty-four inputs of 1 and weights of 1: 64. Every pair is 255 · 254 with eight-bit weights and clipped to 32,767; 255 · 128 with seven."""
    ones = np.ones((1, 64), np.float32)
    full = integers.Integers(linear_file(tmp_path / "full.onnx", np.full((1, 64), 127), 1 / 127))
    seven = integers.Integers(linear_file(tmp_path / "seven.onnx", np.full((1, 64), 64), 1 / 64))
    assert full.run(ones)["logits"][0, 0] == pytest.approx(64)
    assert full.run(ones, saturating=True)["logits"][0, 0] == pytest.approx(32 * 32767 / (255 * 127))  # 32.38
    assert seven.run(ones)["logits"][0, 0] == seven.run(ones, saturating=True)["logits"][0, 0] == pytest.approx(64)


def test_a_float32_bias_is_added_in_steps(tmp_path: Path) -> None:
    path = linear_file(tmp_path / "bias.onnx", np.array([[64, -64], [0, 32]]), 1 / 64)
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.array([0.25, -3.0], np.float32), "bias"))
    model.graph.node[-1].input.append("bias")
    onnx.save(model, path)
    x = np.array([[0.2, 1.0]], np.float32)
    found = integers.Integers(path).run(x)["logits"]
    np.testing.assert_allclose(found, [[0.2 - 1 + 0.25, 0.5 - 3]], atol=1 / 255 / 64)


def test_pairs_of_two_signs_do_not_saturate(tmp_path: Path) -> None:
    weight = np.tile([127, -127], (1, 32))
    model = integers.Integers(linear_file(tmp_path / "signs.onnx", weight, 1 / 127))
    noise = np.random.default_rng(0).random((20, 64), np.float32)
    np.testing.assert_array_equal(model.run(noise)["logits"], model.run(noise, saturating=True)["logits"])


@pytest.mark.parametrize(
    ("channels", "outputs", "groups", "kernel", "stride", "dilation", "padding"),
    [(3, 5, 1, 3, 2, 1, 1), (4, 6, 2, 3, 1, 2, 2), (6, 6, 6, 3, 1, 1, 1), (5, 7, 1, 1, 2, 1, 0), (2, 3, 1, (2, 3), (1, 2), 1, (0, 1))],
)
def test_convolutions_are_torch_s(
    channels: int, outputs: int, groups: int, kernel: object, stride: object, dilation: int, padding: object
) -> None:
    """Against torch on doubles, which hold these sums exactly."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (2, channels, 9, 8)).astype(np.uint8)
    layer = nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, groups, bias=False).double()  # type: ignore[arg-type]
    weights = rng.integers(-127, 128, layer.weight.shape).astype(np.int8)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weights))
        expected = layer(torch.from_numpy(codes.astype(np.float64) - 37)).numpy()
    pads = [*layer.padding, *layer.padding]
    given = {"group": groups, "strides": list(layer.stride), "dilations": list(layer.dilation), "pads": pads}
    np.testing.assert_array_equal(integers._convolve(codes, 37, weights, given, saturating=False), expected.astype(np.int64))


def test_a_convolution_s_pairs_go_over_channels_first() -> None:
    """Channels 0 and 1 of one place meet; two places of one channel do not."""
    codes = np.full((1, 2, 2, 2), 255, np.uint8)
    across, along = np.zeros((1, 2, 2, 2), np.int8), np.zeros((1, 2, 2, 2), np.int8)
    across[0, :, 0, 0] = 127
    along[0, 0, 0, :] = 127
    lost = [
        int((integers._convolve(codes, 0, weights, {}, False) - integers._convolve(codes, 0, weights, {}, True)).sum())
        for weights in (across, along)
    ]
    assert lost == [2 * 255 * 127 - 32767, 0]


def test_rounding_is_half_to_even_and_clipped() -> None:
    totals = np.array([1, 3, 5, -3, 10_000, -10_000])
    assert integers.requantise(totals, np.array(0.5), 10).tolist() == [10, 12, 12, 8, 255, 0]


@pytest.mark.parametrize("kind", ["residual", "inverted", "transformer"])
def test_wide_is_what_onnx_runtime_computes(kind: str, tmp_path: Path) -> None:
    """The graph as it is written, and for convolutions also the integer kernels that the optimiser puts in its place."""
    names = {"input_names": ["image"], "output_names": ["logits"], "dynamic_axes": {"image": {0: "items"}, "logits": {0: "items"}}}
    torch.onnx.export(made(kind).body.eval(), (images(2),), str(tmp_path / "f.onnx"), opset_version=17, dynamo=False, **names)
    quantise(tmp_path / "f.onnx", tmp_path / "q.onnx", [images(16, seed=seed).numpy() for seed in range(2)])
    batch = images(40, seed=9).numpy()
    model = integers.Integers(tmp_path / "q.onnx")
    assert sum(node.op_type in integers.LAYERS and model._integer(node) for node in model.nodes) >= 3
    wide, saturating = (model.run(batch, saturating=kind_)["logits"] for kind_ in (False, True))
    np.testing.assert_array_equal(wide, saturating)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = ort.InferenceSession(str(tmp_path / "q.onnx"), options, providers=["CPUExecutionProvider"]).run(["logits"], {"image": batch})[0]
    kernels = [plain] if kind == "transformer" else [plain, outputs(open_session(tmp_path / "q.onnx"), batch)["logits"]]
    for there in kernels:
        # Integer sums agree exactly; float32 in between (additions, pooling) may fall on the other side of a half.
        assert np.abs(wide - there).mean() < 0.002 * np.abs(there).max()
        assert np.abs(wide - there).max() < 0.02 * np.abs(there).max()
        assert (wide.argmax(1) == there.argmax(1)).mean() >= 0.95


def test_weights_with_a_zero_point_are_refused(tmp_path: Path) -> None:
    model = onnx.load(linear_file(tmp_path / "odd.onnx", np.ones((1, 4)), 1.0))
    place = next(at for at, value in enumerate(model.graph.initializer) if value.name == "w_zero")
    model.graph.initializer[place].CopyFrom(numpy_helper.from_array(np.array([3], np.int8), "w_zero"))
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(ValueError, match=r"weights with zero point \[3\]; expected symmetric weights"):
        integers.Integers(tmp_path / "odd.onnx").run(np.ones((1, 4), np.float32))


def test_the_table_of_quantisers_joins_seeds() -> None:
    """Mean shortfalls of 80 and of 4 points make attar 20 times closer; what was not computed in integers is a dash."""
    row = {"runtime": "onnxruntime", "low": 90.0, "high": 99.0, "megabytes": 3.0, "milliseconds": 2.0, "ratio": 0.5}
    rows = [
        row | {"contender": name, "agreement": value, "saturating": changed}
        for name, values, changed in (
            ("float32", (100.0, 100.0), None),
            ("onnxruntime defaults", (10.0, 30.0), 20.0),
            ("attar, 8 photos", (95.0, 97.0), 0.0),
        )
        for value in values
    ]
    lines = int8.summary(rows)
    assert [line["agreement %"] for line in lines] == ["100.00 ± 0.00", "20.00 ± 14.14", "96.00 ± 1.41"]
    assert [line["changed by saturation %"] for line in lines] == ["–", "20.00 ± 0.00", "0.00 ± 0.00"]
    assert int8.closer(rows) == ["attar, 8 photos: 20.0 times closer to 100 % than ONNX Runtime's"]
