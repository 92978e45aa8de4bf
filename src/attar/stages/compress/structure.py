"""Groups of units as a network's flow shows them, and the surgery that removes units from every tensor they are in."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from attar.models.network import Network
from attar.stages.compress.flow import LAYERS, Flow, forget

COUNTS = re.compile("head|group")
"""Attributes with such names, that hold a group's width, count its units."""
WIDTHS = re.compile("head|dim|embed|hidden|inner|channel")
"""Attributes with such names, that hold width × outputs per unit, are lengths that fall with it."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Units that several layers share and that can go from all of them at once."""

    name: str
    """Name of the first producer that runs; it identifies the group."""
    producers: tuple[str, ...]
    """Every layer whose outputs go: several for residual streams, gates of squeeze-excite, queries, keys and values."""
    width: int
    """Units that can be removed: channels, attention heads, groups of a grouped convolution."""
    consumers: tuple[str, ...]
    """Layers whose inputs go; unit u is their inputs u·b … (u+1)·b − 1 with b = inputs / width."""
    tied: tuple[str, ...]
    """Depthwise and grouped convolutions in between, whose cost falls with the width."""
    removable: bool = False
    """Whether the network runs on when no unit stays and the consumers' outputs are constant: the whole branch may go."""
    unit: int = 1
    """Outputs of the first producer that make one unit: 1 for channels, more for heads and groups of channels."""


class Part(NamedTuple):
    """Where the units of a group are in one parameter or buffer: the factor at `place` among the factors of an axis."""

    tensor: str
    axis: int
    factors: tuple[int, ...]
    place: int


class Candidate(NamedTuple):
    """A group and all that its units are in."""

    group: Group
    factor: int
    parts: tuple[Part, ...]


class Items:
    """How many items the network was given: a hook before its forward pass, read where a layer is gone."""

    count: int | Tensor = 1

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.count = inputs[0].shape[0]


class _OnePerChannel(torch.autograd.Function):
    """Constants at every place; in an exported file one value per channel, which broadcasts there (and lets what follows be folded)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, shape: Sequence[int]) -> Tensor:  # type: ignore[override]
        return values.expand(*shape).clone()

    @staticmethod
    def symbolic(graph: Any, values: Any, shape: Any) -> Any:
        return graph.op("Identity", values)


class Constant(nn.Module):
    """What is left of a consumer of which every input is gone: its bias at every place. Its input is not looked at, not even for its shape,
    so that an exporter drops all that came before."""

    def __init__(self, layer: nn.Module, shape: Sequence[int], items: Items, spread: bool) -> None:
        """`shape` is that of the layer's output for one item; `spread` says that a file may hold one value per channel instead."""
        super().__init__()
        weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
        self.bias = nn.Parameter(weight.new_zeros(len(weight)) if bias is None else bias.detach().clone())
        self.axis = 1 if isinstance(layer, nn.Conv2d) else len(shape) - 1
        self.shape, self.items, self.spread = tuple(shape), items, spread
        _describe_as(self, layer)

    def forward(self, x: Tensor) -> Tensor:
        values = self.bias.reshape([-1 if place == self.axis else 1 for place in range(len(self.shape))])
        shape: list[Any] = [-1 if place == self.axis else size for place, size in enumerate(self.shape)]
        shape[0] = self.items.count if shape[0] == 1 else self.items.count * shape[0]
        if self.spread and torch.onnx.is_in_onnx_export():
            return _OnePerChannel.apply(values, [int(size) for size in shape])
        return values.expand(shape).clone()


class Absent(nn.Module):
    """What is left of a layer whose outputs nobody reads: zeros in the shape of one unit, so that the code around it still runs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.outputs = len(cast(Tensor, layer.weight))
        self.window: list[tuple[int, int]] = []
        """By how much the kernel shortens each axis after padding, and the stride."""
        if isinstance(layer, nn.Conv2d):
            reaches = [step * (size - 1) for size, step in zip(layer.kernel_size, layer.dilation)]
            padded = _padding(layer)
            self.window = [(reach - both, stride) for reach, both, stride in zip(reaches, padded, layer.stride)]
        _describe_as(self, layer)

    def forward(self, x: Tensor) -> Tensor:
        if not self.window:
            return x.new_zeros(()).expand(*x.shape[:-1], self.outputs)
        space = [(size - less - 1) // stride + 1 for size, (less, stride) in zip(x.shape[2:], self.window)]
        return x.new_zeros(()).expand(x.shape[0], self.outputs, *space)


def _describe_as(replacement: nn.Module, layer: nn.Module) -> None:
    """Strides, kernel sizes and the like that code outside a layer may read."""
    for key in cast("list[str]", layer.__constants__):
        setattr(replacement, key, getattr(layer, key, None))


def _padding(layer: nn.Conv2d) -> list[int]:
    """Rows and columns that a convolution adds in all, at both ends."""
    if layer.padding == "same":
        return [step * (size - 1) for size, step in zip(layer.kernel_size, layer.dilation)]
    return [0, 0] if layer.padding == "valid" else [2 * int(pad) for pad in layer.padding]


def padding(layer: nn.Conv2d) -> tuple[int, int] | None:
    """Zeros that a convolution adds at each end of its rows and columns; None where it pads with something else or by unequal numbers."""
    height, width = _padding(layer)
    return None if layer.padding_mode != "zeros" or height % 2 or width % 2 else (height // 2, width // 2)


def candidates(network: Network, flow: Flow) -> tuple[list[Candidate], dict[str, str]]:
    """What the flow lets go, in the order in which it runs and before any proof; and why layers were refused for who reads them."""
    parts: dict[int, list[Part]] = {}
    for tensor, axes in flow.weights.items():
        for axis, factors in enumerate(axes):
            for place, factor in enumerate(factors):
                if factor not in flow.fixed:
                    parts.setdefault(factor, []).append(Part(tensor, axis, factors, place))
    found: dict[str, Candidate] = {}
    refused: dict[str, str] = {}
    for factor, own in parts.items():
        group = _as_group(network, flow, factor, own)
        if isinstance(group, str):
            refused |= {part.tensor.removesuffix(".weight"): group for part in own if part.axis == 0}
        elif group is not None and group.width > (found[group.name].group.width if group.name in found else 1):
            found[group.name] = Candidate(group, factor, tuple(own))
    return list(found.values()), refused


def _as_group(network: Network, flow: Flow, factor: int, parts: Sequence[Part]) -> Group | str | None:
    """The group of a factor; why it cannot be one; or None where no layer makes it."""
    producers: dict[str, Part] = {}
    consumers: list[str] = []
    tied: list[str] = []
    for part in parts:
        name, _, leaf = part.tensor.rpartition(".")
        layer = network.get_submodule(name)
        if part.factors.count(factor) > 1:
            return "channels are repeated"
        if leaf != "weight" or not isinstance(layer, LAYERS):
            continue
        if part.axis == 0 and factor in flow.split.get(part.tensor, ()):
            tied.append(name)
        elif part.axis == 0:
            producers[name] = part
        elif isinstance(layer, nn.Conv2d) and layer.groups > 1:
            return "grouped convolution"
        elif isinstance(layer, nn.Conv2d) and padding(layer) is None:
            return "read by a convolution that does not pad evenly with zeros"
        elif part.place > 0:
            return "channels are not contiguous where they are read"
        else:
            consumers.append(name)
    if not producers:
        return None
    if not consumers:
        return "no layer that could be repaired reads it"
    if set(producers) & {*consumers, *tied}:
        return "a layer is used twice"
    first, width = next(iter(producers)), flow.sizes[factor]
    rows = math.prod(flow.sizes[other] for other in producers[first].factors)
    return Group(name=first, producers=tuple(producers), width=width, consumers=tuple(consumers), tied=tuple(tied), unit=rows // width)


def closed(groups: Iterable[Group], gone: Iterable[str]) -> set[str]:
    """Names of the branches that go when some do: also those that only layers of these would read."""
    found, groups = set(gone), list(groups)
    while True:
        deaf = {layer for group in groups if group.name in found for layer in (*group.producers, *group.tied, *group.consumers)}
        more = {group.name for group in groups if deaf.issuperset(group.consumers)} - found
        if not more:
            return found
        found |= more


def apply(
    network: Network, flow: Flow, known: Sequence[Candidate], cuts: Sequence[tuple[str, Sequence[int]]]
) -> dict[tuple[str, int], Tensor]:
    """Removes units in place; returns, for each tensor and axis that lost entries, those that stayed.

    Raises AttributeError for a group that the network does not have.
    """
    by_name = {candidate.group.name: candidate for candidate in known}
    wanted = {name: set(units) for name, units in cuts}
    for name in wanted:
        if name not in by_name:
            raise AttributeError(f"{name}: the network has no group of this name; it has {', '.join(by_name) or 'none'}")
    groups = [candidate.group for candidate in known]
    branches = closed(groups, (name for name, units in wanted.items() if len(units) == by_name[name].group.width))
    forget(network)
    sizes = dict(flow.sizes)
    stayed: dict[tuple[str, int], Tensor] = {}
    for group, factor, parts in known:
        gone = set(range(1, group.width)) if group.name in branches else wanted.get(group.name, set())
        if not gone:
            continue
        keep = torch.tensor([unit for unit in range(group.width) if unit not in gone])
        blocks = {math.prod(sizes[other] for other in part.factors) // group.width for part in parts}
        for part in parts:
            before = [sizes[other] for other in part.factors]
            index = torch.arange(math.prod(before)).reshape(before).index_select(part.place, keep).flatten()
            _keep(network, part, index)
            place = part.tensor, part.axis
            stayed[place] = stayed[place][index] if place in stayed else index
        sizes[factor] = len(keep)
        if group.unit > 1:
            _scale_attributes(network, group, blocks, len(keep))
    for name in dict.fromkeys(part.tensor.rpartition(".")[0] for candidate in known for part in candidate.parts):
        _resize(network.get_submodule(name), [sizes[factor] for factor in flow.split.get(f"{name}.weight", ())])
    _remove(network, flow, [group for group in groups if group.name in branches])
    return stayed


def _keep(network: Network, part: Part, index: Tensor) -> None:
    owner, _, leaf = part.tensor.rpartition(".")
    module = network.get_submodule(owner)
    tensor = cast(Tensor, getattr(module, leaf))
    kept = tensor.detach().index_select(part.axis, index.to(tensor.device))
    setattr(module, leaf, nn.Parameter(kept, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept)


def _resize(module: nn.Module, split: Sequence[int]) -> None:
    """The numbers that layers keep beside their tensors."""
    if isinstance(module, nn.Conv2d):
        module.groups = math.prod(split)
        module.out_channels, module.in_channels = len(module.weight), module.weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = len(cast(Tensor, module.weight if module.weight is not None else module.running_mean))


def _scale_attributes(network: Network, group: Group, blocks: set[int], keep: int) -> None:
    """Numbers of heads and their lengths that the code of the module around a group's layers holds, by their names and values."""
    owners = [layer.split(".")[:-1] for layer in (*group.producers, *group.consumers)]
    around = [words[0] for words in itertools.takewhile(lambda words: len(set(words)) == 1, zip(*owners))]
    lengths = {group.width * block: keep * block for block in blocks if block > 1}
    for module in network.get_submodule(".".join(around)).modules():
        if isinstance(module, LAYERS | nn.modules.batchnorm._NormBase):
            continue
        for key, value in list(vars(module).items()):
            if type(value) is int and value == group.width and COUNTS.search(key) and not re.search("dim|size", key):
                setattr(module, key, keep)
            elif type(value) is int and value in lengths and WIDTHS.search(key):
                setattr(module, key, lengths[value])


def _remove(network: Network, flow: Flow, gone: Sequence[Group]) -> None:
    """Replaces the layers of branches that are gone."""
    unread = {layer for group in gone for layer in (*group.producers, *group.tied)}
    items = Items()
    if gone:
        network.register_forward_pre_hook(items)
    constant = {layer for group in gone for layer in group.consumers} - unread
    for name in unread | constant:
        owner, _, leaf = name.rpartition(".")
        layer = network.get_submodule(name)
        left = (
            Absent(layer)
            if name in unread
            else Constant(layer, flow.shapes[name], items, flow.spread.get(name, constant).isdisjoint(constant))
        )
        setattr(network.get_submodule(owner), leaf, left)
