"""int8: a float32 ONNX file becomes one with 8-bit weights and activations that decides alike on every processor, from unlabelled items alone.

    norms folded → channels equalised, where that helps → the layers at the entrance kept in float32, where that helps
                 → activation ranges → every layer's weights and bias solved in turn (refine.py)

Processors without VNNI add pairs of products in 16 bits, which full-range weights overflow, silently; here the sum of any two weights that meet
is bounded (rounding.py). What helps is decided by how far the file's outputs are from the float32 file's. Graph outputs, the cluster head
and a first convolution that reads pixels are never rounded.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, MutableSequence, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from jaxtyping import Float
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from attar.stages.compress.equalise import equalised
from attar.stages.compress.graph import Graph, attributes
from attar.stages.compress.refine import ITEMS, KINDS, layers, put_bias, refine

WIDTHS = (0.0, 0.25, 0.5, 1.0)
"""Activation ranges tried: between the mean of the items' extremes (0) and the widest seen (1)."""
LEADING = (0.1, 0.2)
"""Shares of the multiply-accumulates tried for the layers at the entrance that stay in float32."""
WORTH = 2.0
"""A share of the work stays in float32 if the error falls by this many times as much."""
EVEN = 0.5
"""Channels are equalised if the error falls to less than this: what it does to the weights' rounding is not in the error."""
JUDGED = 64
"""Items on which outputs are compared."""
CHANNELS = 4
"""A first convolution with at most so many input channels reads pixels: rounding them costs accuracy and saves no time."""

Extremes = Mapping[str, tuple[Float[np.ndarray, " items"], Float[np.ndarray, " items"]]]


class Quantised(NamedTuple):
    """What was chosen for a file."""

    layers: int  # with 8-bit weights and inputs
    leading: int  # layers at the entrance left in float32
    groups: int  # groups of channels equalised
    width: float  # of the activation ranges, as in WIDTHS
    error: float  # of the outputs with exact weights and rounded activations, as `distance` has it


class _Batches(CalibrationDataReader):
    def __init__(self, entry: str, batches: Sequence[np.ndarray]) -> None:
        self._entry, self._left = entry, iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._left, None)
        return None if batch is None else {self._entry: batch}


def quantise(source: Path, target: Path, batches: Sequence[np.ndarray], *, leading: float | None = None) -> Quantised:
    """Writes the int8 version of an ONNX file; `batches` are normalised float32 inputs (n, …), some hundreds of items in all.

    `leading` fixes the share of the multiply-accumulates that may stay in float32 at the entrance; by default it is chosen. Raises ValueError when
    there are no batches.
    """
    if not batches:
        raise ValueError(f"{source.name}: no calibration batches; expected at least one")
    logging.getLogger().setLevel(logging.ERROR)  # the library advises on the root logger at every call
    exact = prepared(source)
    made, chosen = _designed(exact, batches, leading)
    refine(made.file, made.exact, evenly(batches, ITEMS[1]))
    onnx.save(made.file.model, target)
    return chosen


class Design(NamedTuple):
    """An int8 file whose activation ranges are set and whose weights are still to be solved, and the float32 graph it stands for."""

    file: Graph
    exact: Graph
    groups: int
    leading: int
    share: float  # of the multiply-accumulates that stay in float32
    width: float
    error: float


def _designed(exact: Graph, batches: Sequence[np.ndarray], leading: float | None) -> tuple[Design, Quantised]:
    """The structure that loses least: ranges first, then equalisation, then float32 at the entrance."""
    costs = layer_costs(exact, batches[0][:1])
    best = _design(exact, batches, costs, leading or 0.0, WIDTHS)
    even, groups = equalised(exact, batches)
    if groups and _design(even, batches, costs, leading or 0.0, (best.width,)).error < EVEN * best.error:
        best = _design(even, batches, costs, leading or 0.0, WIDTHS)._replace(groups=groups)
    if leading is None:
        whole = best
        for share in LEADING:
            other = _design(whole.exact, batches, costs, share, (whole.width,))._replace(groups=whole.groups)
            if other.leading > best.leading and other.error <= whole.error * (1 - WORTH * (other.share - whole.share)):
                best = other
    return best, Quantised(len(layers(best.file, best.exact)), best.leading, best.groups, best.width, best.error)


def _design(exact: Graph, batches: Sequence[np.ndarray], costs: Mapping[str, int], share: float, widths: Sequence[float]) -> Design:
    """The int8 file that keeps a share of the work in float32, with the best of some widths of its ranges."""
    kept = entrance(exact, costs, share)
    file = skeleton(exact, batches[0][:1], kept)
    found = extremes(exact, [name for names in _ranged(file, exact).values() for name in names], batches)
    judged = evenly(batches, JUDGED)
    some = [judged[start : start + 8] for start in range(0, len(judged), 8)]
    wanted = _outputs(exact, exact.outputs, some)
    errors = {}
    for width in widths:
        set_ranges(file, exact, found, width)
        errors[width] = distance(wanted, _outputs(with_exact_weights(file, exact), exact.outputs, some))
    width = min(errors, key=errors.__getitem__)
    set_ranges(file, exact, found, width)
    leading = [name for name in kept if name in costs]
    return Design(file, exact, 0, len(leading), sum(costs[name] for name in leading) / sum(costs.values()), width, errors[width])


def evenly(batches: Sequence[np.ndarray], count: int) -> np.ndarray:
    """At most so many items, evenly spaced over all batches.

    >>> evenly([np.arange(3), np.arange(3, 8)], 4).tolist()
    [0, 2, 4, 6]
    """
    ends = np.cumsum([len(batch) for batch in batches])
    wanted = np.arange(min(count, ends[-1])) * ends[-1] // min(count, ends[-1])
    homes = np.searchsorted(ends, wanted, "right")
    return np.stack([batches[home][place - ends[home]] for home, place in zip(homes, wanted)])


def prepared(source: Path) -> Graph:
    """The file with its norms folded into the layers, its constants as initialisers and all its nodes named."""
    with tempfile.TemporaryDirectory() as folder:
        quant_pre_process(str(source), str(Path(folder) / "prepared.onnx"), skip_symbolic_shape=True)
        model = onnx.load(Path(folder) / "prepared.onnx")
    nodes = []
    for place, node in enumerate(model.graph.node):
        given = attributes(node)
        if node.op_type == "Constant" and "value" in given:
            model.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(given["value"]), node.output[0]))
            continue
        node.name = node.name or f"{node.op_type}_{place}"
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return Graph(model)


def layer_costs(graph: Graph, item: np.ndarray) -> dict[str, int]:
    """Multiply-accumulates of every layer with constant weights, by node, in the order they run."""
    found = [node for node in graph.nodes if node.op_type in KINDS and len(node.input) > 1 and node.input[1] in graph.constants]
    (values,) = graph.run([node.output[0] for node in found], [item])
    weights = [graph.constants[node.input[1]] for node in found]
    per_output = [
        weight[0].size if node.op_type == "Conv" else weight.size // value.shape[-1] for node, weight, value in zip(found, weights, values)
    ]
    return {node.name: int(value.size) * each for node, value, each in zip(found, values, per_output)}


def entrance(graph: Graph, costs: Mapping[str, int], share: float) -> list[str]:
    """Nodes from the graph's input on that stay in float32: layers up to a share of all multiply-accumulates, and what lies between them.

    A first convolution that reads pixels is among them whatever it costs.
    """
    exact, kept, spent, full = {graph.input}, [], 0, False
    for node in graph.nodes:
        keep = set(graph.data(node)) <= exact
        if keep and node.name in costs:
            pixels = node.op_type == "Conv" and node.input[0] == graph.input and graph.constants[node.input[1]].shape[1] <= CHANNELS
            spent += costs[node.name]
            full = full or spent > share * sum(costs.values())
            keep = pixels or not full
        if keep:
            exact.update(node.output)
            kept.append(node.name)
    return kept


def exit_nodes(graph: Graph) -> list[str]:
    """Pooling and reshaping right before a graph output: in float32 they average the rounding away instead of adding to it."""
    kept, wanted = [], set(graph.outputs)
    for node in reversed(graph.nodes):
        if wanted.intersection(node.output) and node.op_type in ("Flatten", "Reshape", "Squeeze", "GlobalAveragePool", "ReduceMean"):
            kept.append(node.name)
            wanted.add(node.input[0])
    return kept


def skeleton(exact: Graph, item: np.ndarray, kept: Sequence[str]) -> Graph:
    """The int8 structure of a graph as ONNX Runtime's quantiser makes it, from one item; `kept` nodes stay in float32.

    Of networks with layer norms the layers alone are quantised, their outputs are not: what lies between has to be float32 anyway.
    Layers that `refine` does not solve are left as they come: 7-bit weights, 8-bit ones where the convolution is depthwise.
    """
    normed = any(node.op_type == "LayerNormalization" for node in exact.nodes)
    between = [node.name for node in exact.nodes if normed and not (node.op_type in KINDS and node.input[1] in exact.constants)]
    head = [node.name for node in exact.nodes if node.name.startswith("/head/") and "cluster_probabilities" in exact.outputs]
    depthwise = [node.input[1] for node in exact.nodes if node.op_type == "Conv" and attributes(node).get("group", 1) > 1]
    whole_range = {"quant_type": QuantType.QInt8, "axis": 0, "symmetric": True, "reduce_range": False}
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(exact.model, Path(folder) / "exact.onnx")
        quantize_static(
            str(Path(folder) / "exact.onnx"),
            str(Path(folder) / "int8.onnx"),
            _Batches(exact.input, [item]),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=sorted({*kept, *exit_nodes(exact), *head, *between}),
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={
                "TensorQuantOverrides": {name: [whole_range] for name in depthwise},
                "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"] if normed else [],
            },
        )
        return _exact_outputs(Graph(onnx.load(Path(folder) / "int8.onnx")))


def _exact_outputs(graph: Graph) -> Graph:
    """The graph without the rounding of its outputs, which would make near-equal logits equal; what reads an output still gets it rounded."""
    nodes = graph.model.graph.node
    for output in graph.outputs:
        last = graph.made[output]
        if last.op_type != "DequantizeLinear" or last.input[0] not in graph.made:
            continue
        rounded = graph.made[last.input[0]]
        source = rounded.input[0]
        for reader in graph.readers.get(output, []):
            _rename(reader.input, output, f"{output}_rounded")
        _rename(last.output, output, f"{output}_rounded")
        for node in (graph.made[source], *graph.readers[source]):
            _rename(node.input, source, output)
            _rename(node.output, source, output)
        if not graph.readers.get(output):
            nodes.remove(last)
            if len(graph.readers[rounded.output[0]]) == 1:
                nodes.remove(rounded)
    read = {name for node in nodes for name in node.input}
    for value in [value for value in graph.model.graph.initializer if value.name not in read]:
        graph.model.graph.initializer.remove(value)
    return Graph(graph.model)


def _rename(names: MutableSequence[str], old: str, new: str) -> None:
    for place, name in enumerate(names):
        names[place] = new if name == old else name


def _ranged(file: Graph, exact: Graph) -> dict[tuple[str, str], list[str]]:
    """Names of scale and zero point → float32 tensors rounded with them. Fixed ranges (of softmax, sigmoid) are not among them."""
    found: dict[tuple[str, str], list[str]] = {}
    for node in file.nodes:
        if node.op_type == "QuantizeLinear":
            found.setdefault((node.input[1], node.input[2]), []).append(node.input[0])
    known = {name for name, maker in exact.made.items() if maker.op_type not in ("Softmax", "Sigmoid")} | {exact.input}
    return {names: tensors for names, tensors in found.items() if known.issuperset(tensors)}


def extremes(graph: Graph, tensors: Sequence[str], batches: Sequence[np.ndarray]) -> Extremes:
    """Least and largest value of some tensors, per item."""
    tensors, found = sorted(set(tensors)), []
    for values in graph.run(tensors, batches):
        flat = [value.reshape(len(value), -1) for value in values]
        found.append([(value.min(1), value.max(1)) for value in flat])
    return {name: tuple(np.concatenate(parts) for parts in zip(*(one[place] for one in found))) for place, name in enumerate(tensors)}  # type: ignore[misc]


def set_ranges(file: Graph, exact: Graph, found: Extremes, width: float) -> None:
    """Scale and zero point of every activation from its items' extremes; zero stays exact."""
    for (scale, zero), tensors in _ranged(file, exact).items():
        low = min(0.0, *(_between(found[name][0], found[name][0].min(), width) for name in tensors))
        high = max(0.0, *(_between(found[name][1], found[name][1].max(), width) for name in tensors))
        step = np.float32(max((high - low) / 255, 1e-9))
        file.put(scale, np.asarray(step))
        file.put(zero, np.asarray(np.clip(round(-low / float(step)), 0, 255), np.uint8))
    for layer in layers(file, exact):
        if layer.bias:
            put_bias(file, layer, exact.constants[layer.exact[1]].astype(np.float64))


def _between(values: np.ndarray, end: float, width: float) -> float:
    return float((1 - width) * values.mean() + width * end)


def with_exact_weights(file: Graph, exact: Graph) -> Graph:
    """An int8 file with float32 weights: what rounding the activations alone does."""
    copy = file.copy()
    own = {}
    for layer in layers(copy, exact):
        node = copy.named[layer.name]
        for place, name in enumerate(layer.exact, start=1):
            node.input[place] = f"{name}_exact"
            own[f"{name}_exact"] = exact.constants[name]
    copy.model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in own.items())
    return Graph(copy.model)


def distance(wanted: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """Squared error of outputs over their variance across items, averaged over the outputs.

    >>> round(distance([np.array([[0.0], [2.0]])], [np.array([[0.5], [2.0]])]), 3)
    0.125
    """
    return float(np.mean([np.square(b - a).sum() / max(np.square(a - a.mean(0)).sum(), 1e-12) for a, b in zip(wanted, found)]))


def _outputs(graph: Graph, names: Sequence[str], batches: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [np.concatenate(parts) for parts in zip(*graph.run(names, batches, optimise=False))]


def half(source: Path, target: Path) -> None:
    """Writes the float16 version of an ONNX file: weights stored in 16 bits and widened when the file is loaded.

    Half the size; it computes in float32, at the same speed. Vectors (biases, which are few and reach far) and weights beyond the range of float16
    stay as they are.
    """
    model = onnx.load(source)
    widened: list[onnx.NodeProto] = []
    for value in model.graph.initializer:
        weights = numpy_helper.to_array(value)
        if weights.dtype != np.float32 or weights.ndim < 2 or np.abs(weights).max(initial=0) > np.finfo(np.float16).max:
            continue
        name = value.name
        value.CopyFrom(numpy_helper.from_array(weights.astype(np.float16), f"{name}_half"))
        widened.append(helper.make_node("Cast", [f"{name}_half"], [name], name=f"{name}_widen", to=onnx.TensorProto.FLOAT))
    nodes = [*widened, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, target)
