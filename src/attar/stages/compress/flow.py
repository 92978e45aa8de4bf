"""Where channels flow: one forward pass, watched operation by operation, tells which axes of which weights are the same channels.

Every axis of every tensor is a product of *factors*, the major one first: an axis of 384 that is viewed as 6 heads × 64 becomes two
factors. Operations that work element by element make factors equal (union-find), views split them, and operations that mix their
entries (norms over channels, softmax, concatenation, …) fix them, with the reason. What is not known fixes all that it touches. A factor
that nothing fixed can lose entries in all weights at once without a change of meaning.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from attar.stages.compress.operations import RULES, batch_norm, elementwise, permute

Axis = tuple[int, ...]
"""Factors of an axis, major first; none for an axis of size one."""
LAYERS = nn.Conv2d | nn.Linear


@dataclass(frozen=True, kw_only=True)
class Flow:
    """What one pass showed; factors are numbers."""

    sizes: dict[int, int]
    fixed: dict[int, str]
    """Why a factor cannot lose entries."""
    weights: dict[str, tuple[Axis, ...]]
    """Axes of the parameters and buffers that the pass read, in the order in which it read them."""
    split: dict[str, Axis]
    """Grouped convolutions: the factors that number their groups."""
    products: list[tuple[int, frozenset[int]]]
    """Multiply-accumulates of each operation on one item, and the factors they are proportional to."""
    shapes: dict[str, tuple[int, ...]]
    """Outputs of convolutions and linear layers for one item."""
    spread: dict[str, frozenset[str]]
    """Layers whose outputs, after steps that work channel by channel, meet (are added to, …) others as large and nothing else: were they
    constant, one value per channel would do, unless the layers named here, whose outputs they meet, were constant too."""


class Factors:
    """Union-find over factors, any of which may have been split in two."""

    def __init__(self) -> None:
        self.size: list[int] = []
        self.parent: list[int] = []
        self.halves: dict[int, tuple[int, int]] = {}
        self.fixed: dict[int, str] = {}

    def fresh(self, size: int) -> Axis:
        if size == 1:
            return ()
        self.size.append(size)
        self.parent.append(len(self.parent))
        return (len(self.parent) - 1,)

    def flat(self, axis: Iterable[int]) -> list[int]:
        """The factors of an axis as they now are: representatives that are not split."""
        found: list[int] = []
        for factor in axis:
            while self.parent[factor] != factor:
                factor = self.parent[factor]
            found += self.flat(self.halves[factor]) if factor in self.halves else [factor]
        return found

    def fix(self, axis: Iterable[int], reason: str) -> None:
        for factor in self.flat(axis):
            self.fixed.setdefault(factor, reason)

    def cleave(self, factor: int, major: int) -> None:
        """Splits a factor into `major` × the rest."""
        self.halves[factor] = cast(tuple[int, int], self.fresh(major) + self.fresh(self.size[factor] // major))
        if factor in self.fixed:
            self.fix((factor,), self.fixed[factor])

    def unify(self, one: Iterable[int], two: Iterable[int]) -> None:
        """Makes two axes of one length the same, splitting the coarser factors."""
        left, right = self.flat(one), self.flat(two)
        while left and right:
            a, b = left[0], right[0]
            if self.size[a] == self.size[b]:
                self.parent[b] = a
                if b in self.fixed:
                    self.fixed.setdefault(a, self.fixed[b])
                left, right = left[1:], right[1:]
            elif max(self.size[a], self.size[b]) % min(self.size[a], self.size[b]) == 0:
                self.cleave(max(a, b, key=self.size.__getitem__), min(self.size[a], self.size[b]))
            else:
                break
            left, right = self.flat(left), self.flat(right)
        self.fix(left + right, "channels are regrouped")

    def regroup(self, axes: Iterable[Axis], shape: Iterable[int]) -> list[Axis]:
        """Axes of a view: the same factors in the same order, cut at other places; what cannot be cut there is fixed."""
        left = self.flat(factor for axis in axes for factor in axis)
        made: list[Axis] = []
        for size in shape:
            taken: list[int] = []
            while left and size > math.prod(self.size[factor] for factor in taken):
                need = size // math.prod(self.size[factor] for factor in taken)
                if self.size[left[0]] > need and need > 1 and self.size[left[0]] % need == 0:
                    self.cleave(left[0], need)
                    left = self.flat(left)
                taken, left = [*taken, left[0]], left[1:]
            if math.prod(self.size[factor] for factor in taken) == size:
                made.append(tuple(taken))
                continue
            self.fix([*taken, *left], "channels are regrouped")
            made.append(self.fresh(size))
            self.fix(made[-1], "channels are regrouped")
            left = []
        return made


class Watch(TorchDispatchMode):
    """Follows the factors through every operation of a pass."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.factors = Factors()
        self.axes: dict[int, list[Axis]] = {}
        self.alive: list[Tensor] = []  # ids name tensors only while they live
        self.names: dict[int, str] = {}
        self.matrices: set[int] = set()
        """Weights of convolutions and linear layers, and views of them."""
        self.read: dict[str, list[Axis]] = {}
        self.split: dict[str, Axis] = {}
        self.products: list[tuple[int, list[int]]] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.source: dict[int, str] = {}
        """Tensors made from one layer's outputs channel by channel, with nothing but weights, and that layer."""
        self.met: dict[str, set[str] | None] = {}
        """Layers that each layer's outputs met; None where it met anything but others as large."""
        modules = dict(network.named_modules())
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            self.names[id(tensor)] = name
            owner, _, leaf = name.rpartition(".")
            if leaf == "weight" and isinstance(modules[owner], LAYERS):
                self.matrices.add(id(tensor))

    def of(self, tensor: Tensor) -> list[Axis]:
        """Axes of a tensor; one seen for the first time gets its own."""
        if id(tensor) not in self.axes:
            self.put(tensor, [self.factors.fresh(size) for size in tensor.shape])
        if id(tensor) in self.names:
            self.read.setdefault(self.names[id(tensor)], self.axes[id(tensor)])
        return self.axes[id(tensor)]

    def put(self, tensor: Tensor, axes: Sequence[Axis]) -> None:
        size = self.factors.size
        found = [math.prod(size[factor] for factor in self.factors.flat(axis)) for axis in axes]
        if found != list(tensor.shape):  # a rule that does not hold for these arguments: nothing of it is used
            self.factors.fix((factor for axis in axes for factor in axis), "not followed")
            axes = [self.factors.fresh(size) for size in tensor.shape]
            self.factors.fix((factor for axis in axes for factor in axis), "not followed")
        self.axes[id(tensor)] = list(axes)
        self.alive.append(tensor)

    def fix(self, tensor: Tensor, reason: str) -> None:
        self.factors.fix((factor for axis in self.of(tensor) for factor in axis), reason)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args)) | (kwargs or {})
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        rule = next((rule for pattern, rule in RULES if re.fullmatch(pattern, name)), None)
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = elementwise
        self._meet(rule in (elementwise, batch_norm, permute), tensors, outputs[:1])
        if rule is not None:
            for tensor, axes in zip(outputs, rule(self, given, outputs)):
                self.put(tensor, axes)
        elif tensors:
            for tensor in [*tensors, *outputs]:
                self.fix(tensor, name.strip("_").replace("_", " "))
        macs = None
        if func._overloadpacket in flop_registry:
            macs = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out) // 2
        elif name.startswith("_scaled_dot_product"):  # torch does not count its fused attention on the CPU
            macs = sdpa_flop_count(*(given[part].shape for part in ("query", "key", "value"))) // 2
        if macs is not None:
            self.products.append((macs, [factor for tensor in tensors for axis in self.of(tensor) for factor in axis]))
        return out

    def layer(self, name: str, output: Tensor) -> None:
        """Notes what a convolution or linear layer gave."""
        self.shapes[name] = tuple(output.shape)
        self.met[name] = None if name in self.met else set()  # run twice, it would have to be followed twice
        self.source[id(output)] = name

    def _meet(self, by_channel: bool, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        layers = {self.source[id(tensor)] for tensor in tensors if id(tensor) in self.source}
        others = [tensor for tensor in tensors if id(tensor) not in self.names]
        alone = by_channel and len(layers) == 1 and all(id(tensor) in self.source for tensor in others)
        large = by_channel and (len(others) == 1 or all(tensor.shape == outputs[0].shape for tensor in others))
        for layer in layers:
            before = self.met[layer]
            self.met[layer] = None if before is None or not large else before | layers - {layer}
        for output in outputs:
            self.source.pop(id(output), None)  # in place: another tensor now
            if alone:
                self.source[id(output)] = next(iter(layers))

    def end(self, outputs: Sequence[Tensor]) -> None:
        """Fixes what the network gives."""
        for output in outputs:
            self.fix(output, "the embedding and the classes keep their number")
        self._meet(False, outputs, ())

    def done(self) -> Flow:
        """What was seen, every factor by its final number."""
        flat = self.factors.flat
        return Flow(
            sizes=dict(enumerate(self.factors.size)),
            fixed=dict(self.factors.fixed),
            weights={name: tuple(tuple(flat(axis)) for axis in axes) for name, axes in self.read.items()},
            split={name: tuple(flat(axis)) for name, axis in self.split.items()},
            products=[(macs, frozenset(flat(factors))) for macs, factors in self.products],
            shapes=self.shapes,
            spread={name: frozenset(others) for name, others in self.met.items() if others is not None},
        )


@contextmanager
def undone(network: nn.Module) -> Iterator[None]:
    """Takes back what is done to the modules inside: attributes, parameters, buffers, modules and hooks that are replaced or added."""
    kept = [
        (module, dict(vars(module)), [(held, dict(held)) for held in vars(module).values() if isinstance(held, dict)])
        for module in network.modules()
    ]
    try:
        yield
    finally:
        for module, attributes, dictionaries in kept:
            vars(module).clear()
            vars(module).update(attributes)
            for held, before in dictionaries:
                held.clear()
                held.update(before)


def forget(network: nn.Module) -> None:
    """Modules that keep what they computed in evaluation mode (as tables of biases) drop it when they are sent to training."""
    if not any(module.training for module in network.modules()):
        network.train().eval()


def follow(network: nn.Module, example: Tensor) -> Flow:
    """Watches one item through a network that returns a tensor or several; the axes of its inputs and outputs are fixed."""
    forget(network)
    watch = Watch(network)
    hooks = [
        module.register_forward_hook(lambda _m, _i, output, name=name: watch.layer(name, output))
        for name, module in network.named_modules()
        if isinstance(module, LAYERS)
    ]
    try:
        with torch.inference_mode(False), torch.no_grad(), undone(network), watch:
            item = example[:1].clone()
            watch.fix(item, "the input")
            outputs = [tensor for tensor in tree_leaves(network(item)) if isinstance(tensor, Tensor)]
            watch.end(outputs)
    finally:
        for hook in hooks:
            hook.remove()
    return watch.done()
