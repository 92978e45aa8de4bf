"""An ONNX graph as the quantiser sees it: who makes and who reads each tensor, its constants, and sessions on any of its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper


class Graph:
    """Look-ups into a model of one input. Nodes are looked up as they were when the graph was made; constants may be changed by `put`."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.nodes = model, list(model.graph.node)
        self.constants = {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}
        self.made = {output: node for node in self.nodes for output in node.output}
        self.named = {node.name: node for node in self.nodes}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self.readers.setdefault(name, []).append(node)
        self.outputs = [value.name for value in model.graph.output]
        self.input = next(value.name for value in model.graph.input if value.name not in self.constants)
        self._place = {value.name: index for index, value in enumerate(model.graph.initializer)}

    def put(self, name: str, value: np.ndarray) -> None:
        """Replaces a constant."""
        self.constants[name] = value
        self.model.graph.initializer[self._place[name]].CopyFrom(numpy_helper.from_array(np.array(value, order="C"), name))

    def copy(self) -> Graph:
        """A graph whose model may be changed without changing this one."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        return Graph(model)

    def data(self, node: onnx.NodeProto) -> list[str]:
        """A node's inputs that are not constants."""
        return [name for name in node.input if name and name not in self.constants]

    def run(self, tensors: Sequence[str], batches: Iterable[np.ndarray], *, optimise: bool = True) -> Iterable[list[np.ndarray]]:
        """Some tensors' values, batch by batch; nothing is computed that they do not need.

        `optimise` off keeps the arithmetic as it is written: the optimiser rounds constant weights between quantised tensors to int8.
        """
        wanted, kept = set(tensors), []
        for node in reversed(self.nodes):
            if wanted.intersection(node.output):
                kept.append(node)
                wanted.update(node.input)
        part = onnx.ModelProto(ir_version=self.model.ir_version, opset_import=self.model.opset_import)
        part.graph.name = "part"
        part.graph.node.extend(reversed(kept))
        part.graph.initializer.extend(value for value in self.model.graph.initializer if value.name in wanted)
        part.graph.input.extend(value for value in self.model.graph.input if value.name in wanted)
        part.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in tensors)
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        if not optimise:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return (session.run(None, {self.input: batch}) for batch in batches)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes by name."""
    return {one.name: helper.get_attribute_value(one) for one in node.attribute}


def plain_gemm(node: onnx.NodeProto) -> bool:
    """Whether a Gemm is an ordinary linear layer, x Wᵀ + b or x W + b."""
    given = attributes(node)
    return not given.get("transA", 0) and given.get("alpha", 1.0) == given.get("beta", 1.0) == 1.0
