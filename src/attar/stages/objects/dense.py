"""The last map of a model before it is pooled: which layer gives it, at which input sizes the model runs, and its values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.errors import ModelError
from attar.models.network import Network
from attar.records import Model, Preprocess

PREFIX = 8
"""Most leading tokens (class, distillation, registers) that are no patches."""
MARGIN = 64
"""Pixels, at most, an input of a convolutional model is continued by at its edges (mirrored) and its map cut by again: maps are spoilt near zeros."""
FEWEST = 24
"""Places across that a map should have: what is smaller than a few of them is not told apart."""
LONGEST = 3.0
"""Aspect ratio of an input at most; longer strips are squeezed to it."""
REMEDY = "name one that does with --objects-layer, or choose another --model"


class Layer(NamedTuple):
    """A layer whose output is spread over the image."""

    name: str
    stride: float  # pixels of the input between two places of the map
    prefix: int  # leading tokens that are no patches; -1 for a map (n, channels, rows, columns)
    channels: int

    @property
    def shown(self) -> str:
        kind = "tokens" if self.prefix >= 0 else "map"
        return f"{self.name or 'the output'} ({kind}, a place every {self.stride:g} pixels)"


class _Enough(Exception):
    """The map is there: what comes after it need not run, and could not where it expects another size."""


def _tensor(output: Any) -> Tensor | None:
    if isinstance(output, Mapping):
        output = output.get("last_hidden_state")
    elif isinstance(output, tuple | list):
        output = output[0] if output else None
    return output if isinstance(output, Tensor) else None


def _layer(name: str, values: Tensor, count: int, side: int) -> Layer | None:
    """What a layer is on square inputs, if its output is spread over them."""
    if len(values) != count or not values.is_floating_point():
        return None
    if values.dim() == 4 and min(values.shape[2:]) > 1 and values.shape[2] == values.shape[3]:
        return Layer(name, side / values.shape[2], -1, values.shape[1])
    if values.dim() == 3:
        places = math.isqrt(values.shape[1])
        prefix = values.shape[1] - places**2
        if places > 1 and prefix <= PREFIX and side % places == 0:
            return Layer(name, side / places, prefix, values.shape[2])
    return None


def layers(body: nn.Module, side: int) -> list[Layer]:
    """The layers whose output is spread over square inputs of a side, in the order in which they finish."""
    found: list[Layer] = []

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            values = _tensor(output)
            one = None if values is None else _layer(name, values, 2, side)
            if one is not None:
                found.append(one)

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in body.named_modules()]
    try:
        with torch.no_grad():
            body(torch.zeros(2, 3, side, side))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def choose(found: Sequence[Layer], named: str, side: int, said: str) -> Layer:
    """The layer that was named, else the last with a place every side / FEWEST pixels or closer (the finest where none is).

    Raises ModelError when there is none, saying which there are.
    """
    coarse = {one.stride: one for one in found}  # the last of each stride
    known = "; ".join(one.shown for one in coarse.values()) or "none"
    if named:
        match = [one for one in found if one.name == named]
        if not match:
            raise ModelError(f"objects_layer: {named!r} gives {said} no map over the image; the last layers of each size that do: {known}")
        return match[-1]
    if not found:
        raise ModelError(
            f"{said}: no layer's output is spread over the image (every one has a single place), so objects cannot be located; {REMEDY}"
        )
    limit = max(side / FEWEST, min(one.stride for one in found))
    return [one for one in found if one.stride <= limit][-1]


class Dense:
    """A network as inputs (n, 3, height, width) → dense features (n, rows, columns, channels) of one layer."""

    def __init__(self, network: Network, layer: Layer, extra: Mapping[str, Any], margin: int = MARGIN) -> None:
        self._network, self.layer, self._extra, self._margin = network, layer, dict(extra), margin

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        kept: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            values = _tensor(output)
            assert values is not None
            kept.append(values)
            raise _Enough

        body, pad = self._network.body, 0
        if self.layer.prefix < 0 and self._margin:
            pad = max(1, round(min(self._margin, min(inputs.shape[2:]) / 4) / self.layer.stride))
            inputs = F.pad(inputs, (round(pad * self.layer.stride),) * 4, mode="reflect")
        hook = body.get_submodule(self.layer.name).register_forward_hook(keep)
        try:
            body(inputs.contiguous(memory_format=self._network.layout), **self._extra)
        except _Enough:
            pass
        finally:
            hook.remove()
        values = kept[0]
        if self.layer.prefix < 0:
            rows, columns = (side - 2 * pad for side in values.shape[2:])
            return values[:, :, pad : pad + rows, pad : pad + columns].permute(0, 2, 3, 1)
        rows, columns = (round(side / self.layer.stride) for side in inputs.shape[2:])
        return values[:, self.layer.prefix :].reshape(len(values), rows, columns, -1)


class Sight(NamedTuple):
    """How images are looked at: the map, and the inputs that give it."""

    dense: Dense
    preprocess: Preprocess
    step: int  # sides of an input are multiples of this; 0: always the size of `preprocess`
    note: str  # what a person should know, or ""

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the input for an image of a size: its aspect ratio, the area of the square."""
        if not self.step:
            return self.preprocess.size
        aspect = math.sqrt(min(max(width / height, 1 / LONGEST), LONGEST))
        side = self.preprocess.size[0]
        tall, wide = (max(2, round(part / self.step)) * self.step for part in (side / aspect, side * aspect))
        return tall, wide


def sight(model: Model, network: Network, side: int, named: str) -> Sight:
    """How a model looks for objects at a side; its own where it takes no other, which is said.

    Whole images are shown, never crops. Raises ModelError for a model without inner layers or without a map over the image.
    """
    said = model.lineage[0].removeprefix("source ") if model.lineage else str(model.source["kind"])
    if model.source["kind"] == "onnx":
        raise ModelError(f"{said}: a frozen ONNX file shows none of its inner layers, so objects cannot be located; {REMEDY}")
    own = max(model.preprocess.size)
    layer = choose(layers(network.body, own), named, side, said)
    step = round(layer.stride)
    wanted = max(2, round(side / step)) * step
    for extra in ({}, {"interpolate_pos_encoding": True}):  # the latter is how transformers' ViTs take other sizes
        dense = Dense(network, layer, extra)
        if step == layer.stride and _runs(dense, (wanted, wanted)) and _runs(dense, (wanted, wanted + step)):
            return Sight(dense, _sized(model.preprocess, wanted), step, "")
    note = f"{said} takes no other size than {own} pixels: objects are looked for at that, {round(own / layer.stride)} places across"
    return Sight(Dense(network, layer, {}), _sized(model.preprocess, own), 0, note)


def _sized(preprocess: Preprocess, side: int) -> Preprocess:
    return Preprocess(size=(side, side), mean=preprocess.mean, std=preprocess.std, resample=preprocess.resample, origin=preprocess.origin)


def _runs(dense: Dense, size: tuple[int, int]) -> bool:
    """Whether a size gives a map with as many places as the stride says."""
    places = tuple(round(part / dense.layer.stride) for part in size)
    try:
        return tuple(dense(torch.zeros(1, 3, *size)).shape[1:3]) == places
    except (RuntimeError, ValueError, TypeError, AssertionError):  # what models raise for a size or a keyword they do not take
        return False
