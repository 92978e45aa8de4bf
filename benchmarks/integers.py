"""An int8 ONNX file in exact integer arithmetic, as two kinds of processor compute it.

    wide         products are added in 32 bits (VNNI, dot-product instructions of ARM): the exact sum
    saturating   pairs of products are added in 16 bits first, which clips at −32,768 and 32,767 (`vpmaddubsw` of AVX2 and AVX-512 without VNNI)

The order of the pairs is that of ONNX Runtime's matrix kernels (MLAS packs four inputs at a time) and of oneDNN's: inputs 2i and 2i + 1 of the
reduction, which for a convolution goes over kernel positions row by row and over the channels of a group within each. Padding holds the zero point.
Depthwise convolutions widen every product and never saturate. A layer is integer where its input and weights come from DequantizeLinear of 8-bit
values and its output goes to QuantizeLinear alone (requantised in float32, rounded half to even) or stays float32; everything else is computed in
float32, convolutions by torch, other operations by ONNX's reference evaluator.

    python benchmarks/integers.py FILE.onnx INPUTS.npy     how far both kinds are from each other and from ONNX Runtime on this machine
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

LOW, HIGH = -(2**15), 2**15 - 1
LAYERS = ("Conv", "Gemm", "MatMul")


def pair_excess(codes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What saturation takes away: Σ over pairs of (s − clip(s)), s = a₂ᵢ w₂ᵢ + a₂ᵢ₊₁ w₂ᵢ₊₁.

    uint8 codes (rows, inputs), int8 weights (outputs, inputs) → int64 (rows, outputs). Only pairs that can leave 16 bits are looked at.
    """
    if codes.shape[1] % 2:
        codes, weights = (np.pad(values, ((0, 0), (0, 1))) for values in (codes, weights))
    excess = np.zeros((len(codes), len(weights)), np.int64)
    first, second = (weights[:, start::2].astype(np.int64) for start in (0, 1))
    highest = 255 * (first.clip(0) + second.clip(0))
    lowest = 255 * (first.clip(None, 0) + second.clip(None, 0))
    for output, pair in zip(*np.nonzero((highest > HIGH) | (lowest < LOW))):
        total = codes[:, 2 * pair].astype(np.int64) * first[output, pair] + codes[:, 2 * pair + 1].astype(np.int64) * second[output, pair]
        excess[:, output] += total - total.clip(LOW, HIGH)
    return excess


def accumulate(codes: np.ndarray, zero: int, weights: np.ndarray, saturating: bool) -> np.ndarray:
    """Σ (a − zero) w in 32 bits: uint8 (rows, inputs) and int8 (outputs, inputs) → int64 (rows, outputs).

    The kernels sum raw codes and take zero · Σ w off afterwards, so it is the raw codes that saturate.

    >>> codes, weights = np.full((1, 2), 255, np.uint8), np.full((1, 2), 127, np.int8)
    >>> [int(accumulate(codes, 0, weights, kind)[0, 0]) for kind in (False, True)]
    [64770, 32767]
    """
    wide = codes.astype(np.float64) @ weights.T.astype(np.float64)  # exact: below 2⁵³
    total = wide.astype(np.int64) - zero * weights.astype(np.int64).sum(1)
    return total - pair_excess(codes, weights) if saturating else total


def requantise(total: np.ndarray, multiplier: np.ndarray, zero: int) -> np.ndarray:
    """32-bit sums to uint8 codes: times input scale · weight scale / output scale in float32, rounded half to even, clipped."""
    return (np.rint(total.astype(np.float32) * multiplier.astype(np.float32)) + zero).clip(0, 255).astype(np.uint8)


class Integers:
    """The executor of one file of one input."""

    def __init__(self, file: Path) -> None:
        model = onnx.load(file)
        self.opset = model.opset_import
        self.constants = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
        self.nodes = list(model.graph.node)
        self.entry = next(value.name for value in model.graph.input if value.name not in self.constants)
        self.outputs = [value.name for value in model.graph.output]
        self.made = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def run(self, batch: np.ndarray, *, saturating: bool = False) -> dict[str, np.ndarray]:
        """The graph's outputs for a float32 batch."""
        values: dict[str, np.ndarray] = {**self.constants, self.entry: batch}
        for node in self.nodes:
            if node.op_type in LAYERS and self._integer(node):
                total, scale = self._layer(node, values, saturating)
                self._write(node, total, scale, values)
            elif not self._settled(node, values):
                values.update(zip(node.output, self._float(node, values)))
        return {name: values[name] for name in self.outputs}

    def _settled(self, node: onnx.NodeProto, values: dict[str, np.ndarray]) -> bool:
        """Whether a node needs no computing of its own: codes that a layer wrote, real values that integer layers alone would read."""
        if node.op_type == "QuantizeLinear":
            return node.output[0] in values
        readers = self.readers.get(node.output[0], [])
        alone = all(reader.op_type in LAYERS and self._integer(reader) for reader in readers)
        return node.op_type == "DequantizeLinear" and node.output[0] not in self.outputs and alone

    def _integer(self, node: onnx.NodeProto) -> bool:
        made = [self.made.get(name) for name in node.input[:2]]
        if any(one is None or one.op_type != "DequantizeLinear" for one in made):
            return False
        weights = self.constants.get(made[1].input[0])  # type: ignore[union-attr]
        if weights is None or weights.dtype != np.int8 or made[0].input[0] in self.constants:  # type: ignore[union-attr]
            return False
        if self.constants[made[0].input[1]].size > 1:  # type: ignore[union-attr]
            return False  # a scale per input channel does not go through an integer sum
        zeros = self.constants[made[1].input[2]]  # type: ignore[union-attr]
        if np.any(zeros):
            raise ValueError(f"{node.name}: weights with zero point {zeros.ravel()[:3]}; expected symmetric weights")
        return True

    def _layer(self, node: onnx.NodeProto, values: dict[str, np.ndarray], saturating: bool) -> tuple[np.ndarray, np.ndarray]:
        """32-bit sums, and the real value of one step per output, with the output channels where the result has them.

        An 8-bit layer's bias is 32-bit and in the same steps; a float32 one is added as the nearest number of steps.
        """
        source, weight = (self.made[name].input for name in node.input[:2])
        codes, zero = _unsigned(values[source[0]], self.constants[source[2]])
        weights, step = self.constants[weight[0]], self.constants[source[1]] * self.constants[weight[1]]
        given = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        if node.op_type == "Conv":
            total = _convolve(codes, zero, weights, given, saturating)
            shape: tuple[int, ...] = (-1, *[1] * (total.ndim - 2))
        else:
            matrix = weights if given.get("transB", 0) else weights.T
            total = accumulate(codes.reshape(-1, codes.shape[-1]), zero, matrix, saturating).reshape(*codes.shape[:-1], len(matrix))
            shape = (-1,)
        step = step.reshape(shape) if step.size > 1 else step
        if len(node.input) > 2:
            bias = self.made.get(node.input[2])
            steps = self.constants[bias.input[0]].reshape(shape) if bias else np.rint(values[node.input[2]].reshape(shape) / step)
            total = total + steps.astype(np.int64)
        return total, step

    def _write(self, node: onnx.NodeProto, total: np.ndarray, step: np.ndarray, values: dict[str, np.ndarray]) -> None:
        """Codes where the result is rounded at once, float32 where something else reads it."""
        name = node.output[0]
        readers = self.readers.get(name, [])
        if (
            name not in self.outputs
            and len(readers) == 1
            and readers[0].op_type == "QuantizeLinear"
            and self.constants[readers[0].input[1]].size == 1
        ):
            _, scale, zero = readers[0].input
            low = 128 if self.constants[zero].dtype == np.int8 else 0
            codes = requantise(total, step / self.constants[scale], int(self.constants[zero].item()) + low)
            values[readers[0].output[0]] = (codes.astype(np.int16) - low).astype(self.constants[zero].dtype)
        else:
            values[name] = total.astype(np.float32) * step.astype(np.float32)

    def _float(self, node: onnx.NodeProto, values: dict[str, np.ndarray]) -> list[np.ndarray]:
        if node.op_type == "Conv":
            return [_float_convolution(node, values)]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            return [_round(node, *(values[name] for name in node.input))]
        own = [name for name in dict.fromkeys(node.input) if name]
        graph = helper.make_graph(
            [node],
            "one",
            [helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(values[name].dtype), None) for name in own],
            [helper.make_tensor_value_info(name, onnx.TensorProto.UNDEFINED, None) for name in node.output],
        )
        one = helper.make_model(graph, opset_imports=self.opset)
        return ReferenceEvaluator(one).run(None, {name: values[name] for name in own})  # type: ignore[return-value]


def _unsigned(codes: np.ndarray, zero: np.ndarray) -> tuple[np.ndarray, int]:
    """Activation codes as the kernels take them: signed ones are moved up by 128, zero point and all."""
    if codes.dtype == np.int8:
        return (codes.astype(np.int16) + 128).astype(np.uint8), int(zero.item()) + 128
    return codes, int(zero.item())


def _convolve(codes: np.ndarray, zero: int, weights: np.ndarray, given: dict[str, Any], saturating: bool) -> np.ndarray:
    """A two-dimensional convolution's 32-bit sums: uint8 (n, C, h, w), int8 (O, C/groups, ky, kx) → int64 (n, O, h', w')."""
    groups, (ky, kx) = given.get("group", 1), weights.shape[2:]
    (sy, sx), (dy, dx) = given.get("strides", (1, 1)), given.get("dilations", (1, 1))
    top, left, bottom, right = given.get("pads", (0, 0, 0, 0))
    padded = np.pad(codes, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=zero)
    lines = (padded.shape[2] - dy * (ky - 1) - 1) // sy + 1
    columns = (padded.shape[3] - dx * (kx - 1) - 1) // sx + 1
    views = [
        padded[:, :, y * dy : y * dy + sy * (lines - 1) + 1 : sy, x * dx : x * dx + sx * (columns - 1) + 1 : sx]
        for y in range(ky)
        for x in range(kx)
    ]
    # (positions, n, C, h', w') → rows (n, h', w') of (groups, positions, channels of a group)
    taps = np.stack(views).transpose(1, 3, 4, 2, 0).reshape(-1, groups, codes.shape[1] // groups, ky * kx).swapaxes(2, 3)
    kernels = weights.reshape(groups, len(weights) // groups, weights.shape[1], ky * kx).swapaxes(2, 3)
    if weights.shape[1] == 1 and len(weights) == groups:  # depthwise: no pairs
        total = np.einsum("rgk,gk->rg", taps[:, :, :, 0].astype(np.float64), kernels[:, 0, :, 0].astype(np.float64)).astype(np.int64)
        total -= zero * kernels.astype(np.int64).sum((1, 2, 3))
    else:
        parts = [
            accumulate(taps[:, g].reshape(len(taps), -1), zero, kernels[g].reshape(len(kernels[g]), -1), saturating) for g in range(groups)
        ]
        total = np.concatenate(parts, 1)
    return total.reshape(len(codes), lines, columns, -1).transpose(0, 3, 1, 2)


def _round(node: onnx.NodeProto, x: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """QuantizeLinear or DequantizeLinear; with a scale per channel along the node's axis."""
    axis = next((one.i for one in node.attribute if one.name == "axis"), 1)
    if scale.ndim:
        scale, zero = (one.reshape(-1, *[1] * (x.ndim - 1 - axis % x.ndim)) for one in (scale, zero))
    if node.op_type == "DequantizeLinear":
        return (x.astype(np.int64) - zero).astype(np.float32) * scale
    bounds = np.iinfo(zero.dtype)
    return (np.rint(x / scale) + zero.astype(np.float32)).clip(bounds.min, bounds.max).astype(zero.dtype)


def _float_convolution(node: onnx.NodeProto, values: dict[str, np.ndarray]) -> np.ndarray:
    given = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    x, weight, *bias = (torch.from_numpy(np.array(values[name])) for name in node.input if name)
    top, left, bottom, right = given.get("pads", (0, 0, 0, 0))
    padded = torch.nn.functional.pad(x, (left, right, top, bottom))
    strides, dilations = given.get("strides", (1, 1)), given.get("dilations", (1, 1))
    return torch.nn.functional.conv2d(padded, weight, bias[0] if bias else None, strides, 0, dilations, given.get("group", 1)).numpy()


def compare(file: Path, inputs: np.ndarray, output: str) -> dict[str, Any]:
    """One output of a file on all inputs, by both kinds of processor: equal decisions and the largest difference."""
    model, found = Integers(file), {}
    for kind in (False, True):
        found[kind] = np.concatenate([model.run(inputs[i : i + 1], saturating=kind)[output] for i in range(len(inputs))])
    return {
        "wide": found[False],
        "saturating": found[True],
        "equal": float((found[False].argmax(1) == found[True].argmax(1)).mean()),
        "largest": float(np.abs(found[False] - found[True]).max()),
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("file", type=Path)
    arguments.add_argument("inputs", type=Path, help="normalised float32 inputs (n, …)")
    arguments.add_argument("--output", default="logits")
    given = arguments.parse_args()
    inputs = np.load(given.inputs)
    found = compare(given.file, inputs, given.output)
    session = ort.InferenceSession(str(given.file), providers=["CPUExecutionProvider"])
    here = session.run([given.output], {session.get_inputs()[0].name: inputs})[0]
    same = (here.argmax(1) == found["wide"].argmax(1)).mean()
    print(f"wide and saturating: {found['equal']:.2%} of {len(inputs):,} decisions equal, outputs at most {found['largest']:.3g} apart")
    print(f"wide and ONNX Runtime here: {same:.2%} equal, outputs at most {np.abs(here - found['wide']).max():.3g} apart")


if __name__ == "__main__":
    main()
