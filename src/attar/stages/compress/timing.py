"""Where the time of a model goes on this machine: milliseconds of each layer in ONNX Runtime, so that cuts are made where they gain time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import onnx

from attar.runtime import kernel_times

PRODUCTS = ("Conv", "Gemm", "MatMul")
SUFFIX = re.compile(r"(_nchwc|_nchw|_token_\d+|_output_\d+|/\w+Fusion.*)+$")
"""What the runtime's optimiser appends to the name of a node that it rewrote or fused; fused nodes are named after the last output."""


def layer_times(file: Path) -> dict[str, float]:
    """Milliseconds of one inference at batch 1 by layer, as torch names it inside the network; time of what is not a layer's is left out."""
    nodes = onnx.load(file, load_external_data=False).graph.node
    by_name = {node.name: node for node in nodes}
    by_output = {output: node for node in nodes for output in node.output}

    def product(name: str) -> onnx.NodeProto | None:
        """The convolution or matrix product that a node of the optimised graph goes back to."""
        node = by_name.get(SUFFIX.sub("", name))
        while node is not None and node.op_type not in PRODUCTS:
            behind = [by_output[source] for source in node.input if source in by_output and by_output[source].op_type != "Constant"]
            node = behind[0] if len(behind) == 1 or (behind and node.op_type == "Add") else None
        return node

    found: dict[str, float] = {}
    for name, milliseconds in kernel_times(file).items():
        node = product(name)
        if node is not None:
            layer = layer_of(node.name)
            found[layer] = found.get(layer, 0.0) + milliseconds
    return found


def layer_of(node: str) -> str:
    """Torch's name of the layer a node was exported from.

    >>> layer_of("/network/body/layer1/layer1.0/conv2/Conv")
    'body.layer1.0.conv2'
    """
    parts: list[str] = []
    for part in node.strip("/").split("/")[:-1]:
        if parts and part.startswith(parts[-1] + "."):  # children of a Sequential carry its name
            parts[-1] = part
        else:
            parts.append(part)
    return ".".join(parts).removeprefix("network.")


def covered(times: Mapping[str, float], layers: set[str]) -> bool:
    """Whether the times are of most of the layers: else the file's names are not the network's, and MACs have to do."""
    return bool(layers) and len(layers & set(times)) >= 0.8 * len(layers)
