"""Equalisation: the channels of a tensor are scaled to like ranges before they share one 8-bit grid, and scaled back in the next layer.

Between layers only channel-wise, positively homogeneous operations are allowed (ReLU, addition, pooling), so a scale s > 0 per channel goes into the
weights of every layer that makes the tensor and 1/s into those of every layer that reads it (Nagel et al. 2019, section 4.1; there
the weights' ranges were balanced, here the activations': weights have a scale per channel anyway). Under ReLU6 a channel may only grow, and only
so far that the clipping at 6 is well above everything seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx
from jaxtyping import Float

from attar.stages.compress.graph import Graph, attributes, plain_gemm

MOST = 8.0
"""Largest scale of one channel against another: a channel hardly ever seen active is not trusted to stay so."""
HEADROOM = 1.25
"""Largest value that is left room for under a ceiling, over the largest seen."""
FOLLOWED = ("Relu", "LeakyRelu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "Pad", "Add", "Identity", "Flatten")


class Group(NamedTuple):
    """Tensors whose channels must be scaled alike, the layers that make them and those that read them."""

    tensors: tuple[str, ...]
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    ceiling: float | None  # where ReLU6 and its kind clip


def groups(graph: Graph) -> list[Group]:
    """Groups that can be scaled: made by convolutions and linear layers alone, read by them alone, no graph input or output among them."""
    root: dict[str, str] = {}

    def find(name: str) -> str:
        while root.setdefault(name, name) != name:
            name = root[name]
        return name

    for node in graph.nodes:
        touched = [*graph.data(node), *node.output]
        for name in touched:
            find(name)
            if node.op_type in FOLLOWED:
                root[find(name)] = find(touched[0])
    members: dict[str, list[str]] = {}
    for name in root:
        members.setdefault(find(name), []).append(name)
    found = [_group(graph, tensors) for tensors in members.values()]
    return [group for group in found if group is not None]


def _group(graph: Graph, tensors: Sequence[str]) -> Group | None:
    """The group of some connected tensors; None where something in it cannot be scaled."""
    producers: dict[str, None] = {}
    consumers: dict[str, None] = {}
    ceilings = set()
    for tensor in tensors:
        maker = graph.made.get(tensor)
        if maker is None or tensor in graph.outputs:
            return None
        if _layer(graph, maker):
            producers[maker.name] = None
        elif not _follows(graph, maker):
            return None
        if maker.op_type == "Clip":
            ceilings.add(float(graph.constants[maker.input[2]]))
        for reader in graph.readers.get(tensor, []):
            if _layer(graph, reader) and reader.input[0] == tensor:
                consumers[reader.name] = None
            elif not _follows(graph, reader):
                return None
    if not producers or not consumers or len(ceilings) > 1:
        return None
    return Group(tuple(tensors), tuple(producers), tuple(consumers), ceilings.pop() if ceilings else None)


def _layer(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether a node is a layer with constant weights that nothing else reads."""
    constant = len(graph.data(node)) == 1 and all(len(graph.readers[name]) == 1 for name in node.input[1:])
    return constant and (node.op_type == "Conv" or (node.op_type == "Gemm" and plain_gemm(node)))


def _follows(graph: Graph, node: onnx.NodeProto) -> bool:
    """Whether an operation treats every channel by itself and lets a positive scale through."""
    constants = [graph.constants.get(name) for name in node.input[1:]]
    if node.op_type == "Clip":
        return len(constants) == 2 and all(value is not None for value in constants) and float(constants[0]) == 0  # type: ignore[arg-type]
    if node.op_type == "Pad":
        return len(constants) < 2 or constants[1] is None or not np.any(constants[1])
    return node.op_type in FOLLOWED and all(value is None for value in constants)


def channel_extremes(
    graph: Graph, tensors: Sequence[str], batches: Sequence[np.ndarray]
) -> dict[str, tuple[Float[np.ndarray, " channels"], Float[np.ndarray, " channels"]]]:
    """Least and largest value of every channel (axis 1) of some tensors over all items."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for values in graph.run(tensors, batches):
        for name, value in zip(tensors, values):
            axes = tuple(axis for axis in range(value.ndim) if axis != 1)
            low, high = value.min(axes), value.max(axes)
            before = found.get(name, (low, high))
            found[name] = np.minimum(before[0], low), np.maximum(before[1], high)
    return found


def equalised(graph: Graph, batches: Sequence[np.ndarray]) -> tuple[Graph, int]:
    """A copy whose channels have like ranges on the items in `batches`, and the number of groups that were scaled.

    The copy computes the same, but for values beyond those seen under ReLU6.
    """
    graph = graph.copy()
    scalable = groups(graph)
    seen = channel_extremes(graph, sorted({name for group in scalable for name in group.tensors}), batches) if scalable else {}
    done = 0
    for group in scalable:
        reach = [np.maximum(-seen[name][0], seen[name][1]) for name in group.tensors if not _clipped(graph, name)]
        sizes = {len(one) for one in reach} | {_width(graph, name, 0) for name in group.producers}
        if sizes | {_width(graph, name, 1) for name in group.consumers} != {len(reach[0])}:
            continue  # channels became something else on the way
        scale = channel_scales(np.stack(reach), group.ceiling)
        for name in group.producers:
            _scale_outputs(graph, graph.named[name], scale)
        for name in group.consumers:
            _scale_inputs(graph, graph.named[name], 1 / scale)
        done += 1
    return graph, done


def channel_scales(reach: Float[np.ndarray, "tensors channels"], ceiling: float | None) -> Float[np.ndarray, " channels"]:
    """The scale of every channel from its largest magnitude in each tensor of a group.

    Under a ceiling: what takes HEADROOM times the largest value to it. Else the geometric mean over the tensors of the scales that would make
    all channels of each alike, itself 1 on geometric average. Between any two channels at most MOST.

    >>> channel_scales(np.array([[6.0, 2.4, 0.0]]), 6.0).tolist(), channel_scales(np.array([[1.0, 4.0]]), None).tolist()
    ([1.0, 2.0, 8.0], [2.0, 0.5])
    """
    if ceiling is not None:
        return np.clip(ceiling / np.maximum(HEADROOM * reach.max(0), 1e-12), 1, MOST)
    share = reach / np.maximum(reach.max(1, keepdims=True), 1e-12)
    scale = np.exp(-np.log(np.maximum(share, 1 / MOST)).mean(0))
    return scale / np.exp(np.log(scale).mean())


def _clipped(graph: Graph, name: str) -> bool:
    """Whether a tensor is only seen through its activation function."""
    return any(reader.op_type in ("Clip", "Relu") for reader in graph.readers.get(name, []))


def _transposed(node: onnx.NodeProto) -> bool:
    return node.op_type == "Gemm" and not attributes(node).get("transB", 0)


def _width(graph: Graph, name: str, side: int) -> int:
    """Output (side 0) or input (side 1) channels of a layer."""
    node = graph.named[name]
    shape = graph.constants[node.input[1]].shape
    axis = 1 - side if _transposed(node) else side
    return shape[axis] * (attributes(node).get("group", 1) if side else 1)


def _scale_outputs(graph: Graph, node: onnx.NodeProto, scale: np.ndarray) -> None:
    weight = graph.constants[node.input[1]]
    shape = (1, -1) if _transposed(node) else (-1, *[1] * (weight.ndim - 1))
    graph.put(node.input[1], (weight * scale.reshape(shape)).astype(np.float32))
    if len(node.input) > 2:
        graph.put(node.input[2], (graph.constants[node.input[2]] * scale).astype(np.float32))


def _scale_inputs(graph: Graph, node: onnx.NodeProto, scale: np.ndarray) -> None:
    weight = graph.constants[node.input[1]]
    if _transposed(node):
        factor = scale[:, None]
    else:
        count = attributes(node).get("group", 1)
        factor = scale.reshape(count, -1).repeat(len(weight) // count, 0).reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
    graph.put(node.input[1], (weight * factor).astype(np.float32))
