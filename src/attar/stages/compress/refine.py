"""The weights of an int8 file, solved layer by layer from the first to the last, each given what the rounded layers before it do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from jaxtyping import Float
from torch import Tensor

from attar.stages.compress.graph import Graph, attributes, plain_gemm
from attar.stages.compress.rounding import Moments, partners, solve

KINDS = ("Conv", "Gemm", "MatMul")
POSITIONS = 64
"""Places of a feature map looked at per item; more adds cost and little information, neighbours being alike."""
ROWS = 16
"""Rows per input of a layer that its moments are taken over, where the items suffice."""
ITEMS = 64, 512
"""Items looked at for one layer, at least and at most."""


class Layer(NamedTuple):
    """A layer of an int8 file: tensors and constants by name."""

    name: str
    kind: str
    given: dict[str, Any]  # the node's attributes
    source: str  # its input in the int8 file, as float
    output: str  # its output in the float32 file, before an activation function
    step: str  # scale of its input
    weight: str
    scale: str
    bias: str  # "" where it has none
    bias_scale: str
    exact: tuple[str, ...]  # weight and bias in the float32 file

    @property
    def transposed(self) -> bool:
        """Whether outputs are the weights' last axis."""
        return self.kind == "MatMul" or (self.kind == "Gemm" and not self.given.get("transB", 0))

    @property
    def groups(self) -> int:
        return int(self.given.get("group", 1))


def layers(quantised: Graph, exact: Graph) -> list[Layer]:
    """Layers whose input and weights are 8-bit and whose weights nothing else reads, in the order they run."""
    found = []
    for node in quantised.nodes:
        made = [quantised.made.get(name) for name in node.input]
        if (
            node.op_type not in KINDS
            or node.name not in exact.named
            or any(one is None or one.op_type != "DequantizeLinear" for one in made)
        ):
            continue
        source, weight, *bias = (one.input for one in made)  # type: ignore[union-attr]
        own = [name for one in (weight, *bias) for name in one[:2]]
        shared = any(len(quantised.readers[name]) > 1 for name in (*own, *node.input[1:]))
        if source[0] in quantised.constants or any(name not in quantised.constants for name in own) or shared or not _plain(node):
            continue
        if quantised.constants[weight[1]].ndim != 1:
            continue  # one scale for all outputs
        twin = exact.named[node.name]
        found.append(
            Layer(
                name=node.name,
                kind=node.op_type,
                given=attributes(node),
                source=node.input[0],
                output=twin.output[0],
                step=source[1],
                weight=weight[0],
                scale=weight[1],
                bias=bias[0][0] if bias else "",
                bias_scale=bias[0][1] if bias else "",
                exact=tuple(twin.input[1:]),
            )
        )
    return found


def _plain(node: onnx.NodeProto) -> bool:
    """Whether a node is of the ordinary kind: a two-dimensional convolution with its padding written out, or a linear layer."""
    if node.op_type == "Conv":
        given = attributes(node)
        return given.get("auto_pad", b"NOTSET") == b"NOTSET" and len(given.get("kernel_shape", (1, 1))) == 2
    return node.op_type == "MatMul" or plain_gemm(node)


def refine(quantised: Graph, exact: Graph, items: np.ndarray) -> None:
    """Solves every layer's weights and bias, in place; `items` are normalised inputs (n, …)."""
    for layer in layers(quantised, exact):
        weight = exact.constants[layer.exact[0]]
        matrix = torch.from_numpy(np.array(weight.T if layer.transposed else weight, np.float64))
        shape, outputs = matrix.shape, len(matrix)
        matrix = matrix.reshape(layer.groups, outputs // layer.groups, -1)
        pairs = _pairs(layer, weight, matrix.shape[2])
        if layer.bias:
            bias = torch.from_numpy(exact.constants[layer.exact[1]].astype(np.float64))
            matrix = torch.cat([matrix, bias.reshape(layer.groups, -1, 1)], 2)
        solved = solve(matrix, gather(quantised, exact, layer, weight.shape, items), pairs)
        whole = solved.whole.reshape(shape).numpy().astype(np.int8)
        quantised.put(layer.weight, whole.T if layer.transposed else whole)
        quantised.put(layer.scale, solved.scale.flatten().float().numpy())
        if layer.bias:
            put_bias(quantised, layer, solved.rest.flatten().numpy())


def put_bias(quantised: Graph, layer: Layer, bias: Float[np.ndarray, " outputs"]) -> None:
    """Writes a bias as 32-bit integers in steps of input scale times weight scale."""
    step = float(quantised.constants[layer.step]) * np.broadcast_to(quantised.constants[layer.scale], bias.shape).astype(np.float64)
    quantised.put(layer.bias, np.rint(bias / step).clip(-(2**31) + 1, 2**31 - 1).astype(np.int32))
    quantised.put(layer.bias_scale, step.astype(np.float32))


def _pairs(layer: Layer, weight: np.ndarray, inputs: int) -> Tensor:
    """Which inputs share a 16-bit sum; none in depthwise convolutions, whose kernels widen every product to 32 bits."""
    if layer.kind != "Conv":
        return partners(inputs, 1)
    if weight.shape[1] == 1 and len(weight) == layer.groups:
        return torch.full((1, inputs), -1)
    return partners(weight.shape[1], math.prod(weight.shape[2:]))


def gather(quantised: Graph, exact: Graph, layer: Layer, shape: Sequence[int], items: np.ndarray) -> tuple[Moments, Moments]:
    """A layer's moments on every other batch, and on the rest."""
    (example,) = next(iter(exact.run([layer.output], [items[:1]])))
    inputs = math.prod(shape[1:]) if layer.kind == "Conv" else shape[0] if layer.transposed else shape[1]
    per_item = min(POSITIONS, math.prod(example.shape[2:]) if layer.kind == "Conv" else math.prod(example.shape[1:-1]))
    wanted = min(len(items), int(np.clip(-(-ROWS * inputs // per_item), *ITEMS)))
    some = items[np.arange(wanted) * len(items) // wanted]
    size = max(1, min(8, wanted // 2))
    batches = [some[start : start + size] for start in range(0, wanted, size)]
    generator = torch.Generator().manual_seed(0)
    halves: list[list[Any]] = [[0, 0, 0], [0, 0, 0]]
    for turn, ((x,), (y,)) in enumerate(zip(quantised.run([layer.source], batches), exact.run([layer.output], batches))):
        rows, targets = rows_of(layer, shape, torch.from_numpy(x), torch.from_numpy(y), generator)
        if layer.bias:
            rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
        rows, targets = rows.transpose(0, 1), targets.transpose(0, 1)
        for place, part in enumerate((rows.mT @ rows, targets.mT @ rows)):
            halves[turn % 2][place] = halves[turn % 2][place] + part.double()
        halves[turn % 2][2] += rows.shape[1]
    first, second = halves if halves[1][2] else (halves[0], halves[0])
    return Moments(*first), Moments(*second)


def rows_of(
    layer: Layer, shape: Sequence[int], x: Tensor, y: Tensor, generator: torch.Generator
) -> tuple[Float[Tensor, "rows groups inputs"], Float[Tensor, "rows groups outputs"]]:
    """Inputs of a layer and its outputs, row by row, at POSITIONS random places per item."""
    if layer.kind != "Conv":
        x, y = x.reshape(len(x), -1, x.shape[-1]), y.reshape(len(y), -1, y.shape[-1])
        some = torch.randperm(x.shape[1], generator=generator)[:POSITIONS]
        return x[:, some].flatten(0, 1)[:, None], y[:, some].flatten(0, 1)[:, None]
    (kernel_y, kernel_x), (stride_y, stride_x) = shape[2:], layer.given.get("strides", (1, 1))
    (step_y, step_x), (top, left, bottom, right) = layer.given.get("dilations", (1, 1)), layer.given.get("pads", (0, 0, 0, 0))
    padded = torch.nn.functional.pad(x, (left, right, top, bottom))
    some = torch.randperm(y.shape[2] * y.shape[3], generator=generator)[:POSITIONS]
    first_y, first_x = some // y.shape[3] * stride_y, some % y.shape[3] * stride_x
    at_y = first_y[:, None, None] + torch.arange(kernel_y)[:, None] * step_y
    at_x = first_x[:, None, None] + torch.arange(kernel_x)[None, :] * step_x
    rows = padded[:, :, at_y, at_x].transpose(1, 2)  # (items, places, channels, kernel_y, kernel_x)
    targets = y.flatten(2)[:, :, some].transpose(1, 2)
    return rows.reshape(-1, layer.groups, math.prod(shape[1:])), targets.reshape(-1, layer.groups, shape[0] // layer.groups)
