"""A teacher that is an ONNX file: it can be followed, not trained or cut, and is run by ONNX Runtime as it is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from attar.config import ModelChoice
from attar.errors import ModelError, UsageError
from attar.models.network import Network, plain
from attar.models.preprocessing import per_channel
from attar.records import Head, Model, Preprocess
from attar.runtime import input_size, open_session, outputs

LOGITS = ("logits", "scores", "probabilities", "probs", "output_probability")
EMBEDDING = ("embedding", "embeddings", "features", "pooler_output", "last_hidden_state")
"""Names that outputs go by."""


class Ends(NamedTuple):
    """Which outputs of a file are what; an empty name for what it has not."""

    embedding: str
    logits: str
    softmax: bool  # the "logits" are probabilities: their logarithm is taken


def find_ends(path: Path, output: str) -> Ends:
    """The ends of a file: by the names of its outputs, else (one output) by `output` and by the node that makes it.

    Raises ModelError naming the outputs when they cannot be told apart.
    """
    graph = onnx.load(path, load_external_data=False).graph
    names = [value.name for value in graph.output]
    embedding = next((name for name in names if name.lower() in EMBEDDING), "")
    logits = next((name for name in names if name.lower() in LOGITS), "") if output != "embedding" else ""
    maker = {name: node.op_type for node in graph.node for name in node.output}
    if len(names) == 1 and not embedding and not logits:
        classifies = output == "logits" or (output == "auto" and maker.get(names[0]) in ("Gemm", "MatMul", "Add", "Softmax"))
        embedding, logits = ("", names[0]) if classifies else (names[0], "")
    if not (logits or (embedding and output != "logits")):
        raise ModelError(
            f"{path}: its outputs are {', '.join(names)}; expected one named embedding or logits (or a single one): rename them in the file"
        )
    return Ends(embedding, logits, maker.get(logits) == "Softmax")


class Frozen(Network):
    """An ONNX file as a Network: images → (embedding, logits or None). Where it has logits alone, they are the embedding too."""

    def __init__(self, path: str | Path, ends: Ends, threads: int | None = None) -> None:
        """`threads` inside an operator, by default all of torch's."""
        super().__init__(nn.Identity())
        self.threads = threads or torch.get_num_threads()
        self.session, self.ends = open_session(path, self.threads), ends

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        embedding, logits = _named(outputs(self.session, x.detach().numpy()), self.ends)
        return torch.from_numpy(embedding), None if logits is None else torch.from_numpy(logits)


def _named(values: Mapping[str, np.ndarray], ends: Ends) -> tuple[np.ndarray, np.ndarray | None]:
    """Embedding (n, d) and logits (n, c) or None, float32, of a file's outputs."""

    def vector(name: str) -> np.ndarray:
        return plain(torch.from_numpy(values[name].astype(np.float32))).numpy()

    logits = vector(ends.logits) if ends.logits else None
    if logits is not None and ends.softmax:
        logits = np.log(np.maximum(logits, 1e-7))
    embedding = vector(ends.embedding) if ends.embedding else logits
    assert embedding is not None  # find_ends finds one of them
    return embedding, logits


def answers(values: Mapping[str, np.ndarray], source: Mapping[str, Any], head: Head | None) -> dict[str, np.ndarray]:
    """Outputs, float32, under the names attar's own files give them; the clusters of a foreign file are computed from its embedding."""
    if source.get("kind") != "onnx":
        return {name: value.astype(np.float32, copy=False) for name, value in values.items()}
    from attar.stages.cluster.space import head_probabilities

    assert head is not None  # the cluster stage comes before
    embedding, logits = _named(values, Ends(*source["ends"]))
    found = {"embedding": embedding, "cluster_probabilities": head_probabilities(embedding, head)}
    return found if logits is None else found | {"logits": logits}


def count_parameters(path: Path) -> int:
    """Numbers held by a file's initialisers."""
    return sum(math.prod(tensor.dims) for tensor in onnx.load(path, load_external_data=False).graph.initializer)


def count_macs(path: Path) -> int:
    """Multiply-accumulates of one item in the convolutions and matrix products of a file; 0 when shapes cannot be inferred."""
    model = onnx.load(path)
    first = model.graph.input[0].type.tensor_type.shape.dim[0]
    first.Clear()
    first.dim_value = 1
    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except onnx.shape_inference.InferenceError:
        return 0
    sizes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.output, *graph.input)
    }
    sizes |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    total = 0
    for node in graph.node:
        if node.op_type == "Conv":
            total += math.prod(sizes.get(node.output[0], [0])) * math.prod(sizes[node.input[1]][1:])
        elif node.op_type in ("Gemm", "MatMul"):
            left = sizes.get(node.input[0], [0])
            turned = any(one.name == "transA" and one.i for one in node.attribute)
            total += math.prod(sizes.get(node.output[0], [0])) * left[0 if turned else -1]
    return total


def metadata(path: Path) -> dict[str, Any]:
    """What attar's export wrote into a file; empty for other files."""
    found = {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}
    try:
        body = json.loads(found.get("attar", "{}"))
    except ValueError:
        body = {}
    return body if isinstance(body, dict) else {}


def resolve(choice: ModelChoice) -> Model:
    """A frozen file: its size and metadata from the file, normalisation from the flags where it carries none."""
    path = Path(choice.model)
    if choice.weights:
        raise UsageError(f"weights: {choice.weights}: only FILE.py:BUILDER and timm: models take --weights; {choice.model} brings its own")
    session = open_session(path, torch.get_num_threads())
    size, known = input_size(session), metadata(path)
    said = known.get("preprocess") or {}
    asked = [name for name in ("mean", "std") if getattr(choice, name) is None and name not in said]
    if asked:
        raise ModelError(f"{path}: does not say how its images are normalised; give {' and '.join(f'--{name}' for name in asked)}")
    if choice.input_size and (choice.input_size,) * 2 != size:
        raise ModelError(f"{path}: takes images of {size[0]} × {size[1]} pixels, not --input-size {choice.input_size}; leave it out")
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
    fields |= {name: per_channel(value) for name in ("mean", "std") if (value := getattr(choice, name)) is not None}
    fields.setdefault("resize_shortest", size[0] if size[0] == size[1] else None)
    preprocess = Preprocess(**fields | {"size": size, "origin": f"{path}" + ("" if said else " and flags")})
    ends = find_ends(path, choice.output)
    _, logits = Frozen(path, ends)(torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)))
    names = tuple(known.get("classes") or ())
    count = 0 if logits is None else logits.shape[1]
    return Model(
        source={"kind": "onnx", "path": str(path.resolve()), "ends": list(ends), "classifier": None},
        state={},
        preprocess=preprocess,
        classes=names if len(names) == count else tuple(f"class {index}" for index in range(count)),
        parameters=count_parameters(path),
        macs=count_macs(path),
        lineage=(f"source {choice.model}, frozen",),
    )
