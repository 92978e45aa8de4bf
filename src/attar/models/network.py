"""The one shape in which every stage sees a model: images → (embedding, logits or None)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from attar.errors import ModelError
from attar.records import Head


def tensor_of(output: Any) -> Tensor:
    """The tensor that matters in what a model returns: a tensor itself, or the logits, pooled or last hidden state of a transformers output."""
    if isinstance(output, Mapping):
        keys = [key for key in ("logits", "pooler_output", "last_hidden_state") if output.get(key) is not None]
        if not keys:
            raise ModelError(f"the model returns {sorted(output)}; expected a tensor, or one of logits, pooler_output, last_hidden_state")
        output = output[keys[0]]
    elif isinstance(output, tuple | list):
        output = output[0]
    if not isinstance(output, Tensor):
        raise ModelError(f"the model returns {type(output).__name__}; expected a tensor (items, channels)")
    return output


def plain(output: Any) -> Tensor:
    """What a model returns as one vector per item: maps (n, c, h, w) are averaged over space, token sequences (n, t, d) over tokens."""
    output = tensor_of(output)
    return output.flatten(2).mean(2) if output.dim() == 4 else output.mean(1) if output.dim() == 3 else output


def memory_layout(body: nn.Module) -> torch.memory_format:
    """The layout a model computes in: channels last (up to twice as fast on CPUs), where that is safe.

    It is not where a strided 1 × 1 convolution reads fewer than 16 channels: its gradient writes outside its memory for some batch sizes
    (torch 2.13 on the CPU; Conv2d(8, 16, 1, stride=2) with 39 images of 40 × 40 corrupts the heap).
    """
    strided = (layer for layer in body.modules() if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.stride != (1, 1))
    return torch.contiguous_format if any(layer.in_channels < 16 for layer in strided) else torch.channels_last


class Network(nn.Module):
    """A model as inputs (images (n, 3, h, w), or whatever it takes) → (embedding (n, d), logits (n, c) or None).

    The embedding of a classifier is what enters its last linear layer, found by comparing every layer's output with the logits.
    """

    def __init__(self, body: nn.Module, classifier: str | None = None) -> None:
        super().__init__()
        self.body, self.classifier = body, classifier
        self.layout = memory_layout(body)
        self._tap: Tensor | None = None
        if classifier is not None:
            body.get_submodule(classifier).register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._tap = inputs[0]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        output = plain(self.body(x.contiguous(memory_format=self.layout) if x.dim() == 4 else x))
        if self.classifier is None:
            return output, None
        embedding, self._tap = self._tap, None
        return plain(embedding), output


def find_classifier(body: nn.Module, example: Tensor) -> str | None:
    """Name of the last linear (or 1 × 1 convolution) layer whose output is the model's output; None when there is none."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out))
        for name, module in body.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    try:
        with torch.no_grad():
            output = plain(body(example))
    finally:
        for hook in hooks:
            hook.remove()
    equal = [name for name, out in seen.items() if out.flatten(1).shape == output.shape and torch.equal(out.flatten(1), output)]
    return equal[-1] if equal else None


class Topped(nn.Module):
    """A body whose output, one vector per item, goes through a linear layer."""

    def __init__(self, body: nn.Module, width: int, outputs: int) -> None:
        super().__init__()
        self.body, self.top = body, nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.top(plain(self.body(x)))


def end_with(body: nn.Module, layer: str | None, width: int, outputs: int) -> nn.Module:
    """A body with other outputs: its last layer replaced by a fresh one of so many, or (0) left out; without one, a linear layer on top."""
    if layer is None:
        return Topped(body, width, outputs)
    convolves = isinstance(body.get_submodule(layer), nn.Conv2d)
    made = nn.Identity() if not outputs else nn.Conv2d(width, outputs, 1) if convolves else nn.Linear(width, outputs)
    body.set_submodule(layer, made)
    return body


def to_onnx(module: nn.Module, example: Tensor, path: Path, taken: str, outputs: Sequence[str]) -> None:
    """A module as an ONNX file with one input and any number of items; traced, so what it decides in Python is as for the example."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracer warnings about Python values that are constant here: the size is fixed
        torch.onnx.export(
            module.eval(),
            (example,),
            str(path),
            dynamo=False,  # one second instead of ten, readable node names, no further package
            opset_version=17,
            input_names=[taken],
            output_names=list(outputs),
            dynamic_axes={name: {0: "items"} for name in (taken, *outputs)},
        )


class Shipped(nn.Module):
    """What the exported file computes: embedding, cluster probabilities, and logits where the model has classes."""

    def __init__(self, network: Network, head: Head) -> None:
        super().__init__()
        self.network, self.head = network, ClusterHead(head)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        embedding, logits = self.network(x)
        outputs = embedding, self.head(embedding)
        return outputs if logits is None else (*outputs, logits)


class ClusterHead(nn.Module):
    """records.Head as a module: the same formula, differentiable and exportable."""

    mean: Tensor
    projection: Tensor
    centroids: Tensor
    weights: Tensor
    bias: Tensor

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.temperature, self.linear = head.temperature, head.weights is not None
        for name in ("mean", "projection", *(("weights", "bias") if self.linear else ("centroids",))):
            self.register_buffer(name, torch.as_tensor(getattr(head, name)))

    def forward(self, embedding: Tensor) -> Tensor:
        z = (F.normalize(embedding, dim=1) - self.mean) @ self.projection
        if self.linear:
            return F.softmax(z @ self.weights + self.bias, 1)
        # ‖z − c‖² without ‖z‖², which softmax cancels
        distances = self.centroids.square().sum(1) - 2 * z @ self.centroids.T
        return F.softmax(-distances / self.temperature, 1)


def count_macs(network: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one item (convolutions, linear layers, matrix products, attention), from torch's own counter."""
    # Fused attention is not counted on the CPU; taken apart into its products it is.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(example[:1])
    return counter.get_total_flops() // 2


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
