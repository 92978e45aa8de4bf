"""Reconstruction: the layers of a cut network re-fitted one after the other, each on the inputs it really gets now.

Repair fits a consumer to the original's inputs; in the cut network everything before it has changed too. Front to back, each layer gets

    min over W of Σ ‖y + (o − o')/a − W x'‖² + ridge ‖W − W₀‖²

with x' its inputs in the cut network, y its outputs in the original, W₀ the repaired weights. Where its output (times a channel-wise scale a: batch
norm, layer scale) is added to something that was there before (a residual stream), o and o' are that in the original and in the cut network: the layer
makes up for what the stream has lost so far, so that errors do not pile up from block to block. Sequential, asymmetric reconstruction is
that of Zhang et al. 2016 and He et al. 2017; the target on the stream is what makes it work for residual networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from attar.models.network import Network
from attar.stages.compress.repair import RIDGE, patches, positions_of, refittable, some, weights_of, with_one, write_back

ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
CARRIERS = {"batch_norm", "dropout", "mul", "__mul__", "__rmul__", "mul_", "permute", "transpose", "contiguous", "clone", "view", "reshape"}
"""Functions that may lie between a layer and the sum its output goes into; that they scale each channel and no more is checked on numbers."""
STRAIGHT = 1e-3
"""Largest deviation from a channel-wise scale, as a share of the largest value."""


class Landing(NamedTuple):
    """The sum that a layer's output goes into."""

    number: int  # of the sum, in the order in which a forward pass takes them
    side: int  # which of the two operands comes from the layer
    scale: Tensor  # (outputs,): operand = scale · output + constant, channel by channel
    last: bool  # whether the operand has its channels in the last dimension


class _Enough(Exception):
    """A forward pass has come far enough."""


class _Sums(TorchFunctionMode):
    """Shows the operands of every sum of two tensors of equal rank, before it is taken."""

    def __init__(self, see: Callable[[int, Sequence[Tensor]], None], made: Callable[[str, Sequence[Any], Any], None] | None = None) -> None:
        """`made` is told of every function called: its name, its first two arguments and its result."""
        super().__init__()
        self.see, self.made, self.number = see, made, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = args[:2]
        if func in ADDITIONS and [type(one) for one in operands] == [Tensor, Tensor] and operands[0].dim() == operands[1].dim():
            self.see(self.number, operands)
            self.number += 1
        result = func(*args, **(kwargs or {}))
        if self.made:
            self.made(getattr(func, "__name__", ""), operands, result)
        return result


def _in_rows(tensor: Tensor, last: bool) -> Tensor:
    """(n, …, c) or (n, c, …) → (n, positions, c)."""
    moved = tensor if last or tensor.dim() == 2 else tensor.movedim(1, -1)
    return moved.reshape(len(moved), -1, moved.shape[-1])


def channels_last(layer: nn.Module) -> bool:
    return not isinstance(layer, nn.Conv2d)


class Route(NamedTuple):
    """The refittable layers of a network that run once in a pass, in their order, and where their outputs land."""

    order: tuple[str, ...]
    positions: Mapping[str, int]  # output positions of an item
    landings: Mapping[str, Landing]


def route(network: Network, batch: Tensor) -> Route:
    """Watches one pass over a batch of real inputs."""
    order: list[str] = []
    started: dict[str, int] = {}
    positions: dict[str, int] = {}
    outputs: dict[str, Tensor] = {}
    origin: dict[int, str] = {}
    born: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no identity is used twice
    landings: dict[str, Landing] = {}

    def note(tensor: Tensor) -> None:
        born.setdefault(id(tensor), len(alive))
        alive.append(tensor)

    def see(number: int, operands: Sequence[Tensor]) -> None:
        for side, (own, other) in enumerate(zip(operands, reversed(operands))):
            name = origin.get(id(own))
            # Only what was there before the layer ran can be made up for by it.
            if name is not None and name not in landings and born.get(id(other), -1) < started[name]:
                landing = _landing(number, side, outputs[name], own, channels_last(network.get_submodule(name)))
                if landing is not None:
                    landings[name] = landing

    def made(function: str, operands: Sequence[Any], result: Any) -> None:
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                note(tensor)
                before = [origin[id(one)] for one in operands if id(one) in origin]
                if function in CARRIERS and before:
                    origin[id(tensor)] = before[0]

    def start(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            order.append(name)
            started[name], positions[name] = len(alive), positions_of(inputs[0], layer)

        return hook

    def end(name: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Tensor) -> None:
            outputs[name] = output.clone()
            origin[id(output)] = name

        return hook

    layers = {name: layer for name, layer in network.named_modules() if refittable(layer)}
    handles = [layer.register_forward_pre_hook(start(name)) for name, layer in layers.items()]
    handles += [layer.register_forward_hook(end(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad(), _Sums(see, made):
            network(batch)
    finally:
        for handle in handles:
            handle.remove()
    once = tuple(name for name in order if order.count(name) == 1)
    return Route(once, positions, {name: landing for name, landing in landings.items() if name in once})


def _landing(number: int, side: int, output: Tensor, operand: Tensor, last: bool) -> Landing | None:
    """How an operand follows from a layer's output, or None when it is not by a scale and a constant per channel."""
    rows = _in_rows(output, last)
    for form in dict.fromkeys((last, not last)):
        seen = _in_rows(operand, form)
        if seen.shape != rows.shape:
            continue
        x, y = rows.flatten(0, 1).double(), seen.flatten(0, 1).double()
        centred = x - x.mean(0)
        scale = (centred * y).sum(0) / centred.square().sum(0).clamp_min(1e-30)
        rest = (y - y.mean(0)) - scale * centred
        if float(rest.abs().max()) <= STRAIGHT * float(y.abs().max()):
            return Landing(number, side, scale, form)
    return None


class _Seen(NamedTuple):
    """What one pass over a batch shows of a layer, at the chosen positions: rows of inputs, outputs, and of the other operand of its sum."""

    inputs: Tensor  # (n · positions, inputs)
    outputs: Tensor  # (n, positions, outputs)
    other: Tensor | None  # (n, positions, outputs)


def _look(network: Network, name: str, last: bool, landing: Landing | None, batch: Tensor, chosen: Tensor) -> _Seen:
    """Runs a network on a batch as far as a layer, whose outputs have their channels in the last dimension or in the second, and the sum it lands in."""
    layer = network.get_submodule(name)
    found: dict[str, Tensor] = {}

    def at_layer(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found["outputs"] = _in_rows(output, last)[:, chosen]
        # What is left of a branch that is gone has no inputs, only a bias.
        found["inputs"] = (
            patches(inputs[0], layer, chosen) if refittable(layer) else output.new_zeros(found["outputs"].shape[:2].numel(), 0)
        )
        if landing is None:
            raise _Enough

    def at_sum(number: int, operands: Sequence[Tensor]) -> None:
        if landing is not None and number == landing.number and "inputs" in found:
            found["other"] = _in_rows(operands[1 - landing.side], landing.last)[:, chosen]
            raise _Enough

    handle = layer.register_forward_hook(at_layer)
    try:
        with torch.no_grad(), _Sums(at_sum):
            network(batch)
    except _Enough:
        pass
    finally:
        handle.remove()
    return _Seen(found["inputs"], found["outputs"], found.get("other"))


def _target(seen: _Seen, now: _Seen, landing: Landing | None, kept: Tensor) -> Tensor:
    """What a layer's outputs should be: the original's, and on a stream also what the stream lacks; (n, positions, kept outputs)."""
    wanted = seen.outputs[:, :, kept]
    if landing is None or seen.other is None or now.other is None:
        return wanted
    scale = landing.scale[kept]
    usable = scale.abs() > 1e-3 * scale.abs().max()
    lacking = (seen.other[:, :, kept] - now.other) / torch.where(usable, scale, torch.ones_like(scale)).float()
    return wanted + torch.where(usable, lacking, torch.zeros_like(lacking))


def reconstruct(
    student: Network,
    teacher: Network,
    names: Sequence[str],
    along: Route,
    kept: Mapping[str, Tensor],
    batches: Sequence[Tensor],
    seed: int,
    advance: Callable[[], object],
) -> None:
    """Re-fits the named layers of a cut and repaired network in place, in the order given.

    `kept` has the outputs that stay of each layer (indices into the original's). `advance` is called after each layer. Memory: the moments of one layer.
    """
    generator = torch.Generator().manual_seed(seed)
    for name in names:
        layer, landing, last = student.get_submodule(name), along.landings.get(name), channels_last(teacher.get_submodule(name))
        gram, cross, rows = torch.zeros(()), torch.zeros(()), 0
        for batch in batches:
            chosen = some(along.positions[name], generator)
            seen, now = (_look(network, name, last, landing, batch, chosen) for network in (teacher, student))
            inputs = with_one(now.inputs)
            wanted = _target(seen, now, landing, kept[name]).flatten(0, 1)
            gram, cross, rows = gram + (inputs.T @ inputs).double(), cross + (inputs.T @ wanted).double(), rows + len(inputs)
        gram, cross = gram / rows, cross / rows
        if not refittable(layer):
            with torch.no_grad():
                layer.bias.copy_(cross[-1].float())  # type: ignore[union-attr, operator]
        else:
            hold = torch.zeros_like(gram)
            hold.diagonal()[:-1] = RIDGE * gram.diagonal()[:-1].mean() + 1e-10
            write_back(layer, torch.linalg.solve(gram + hold, cross + hold @ weights_of(layer).T).T)
        advance()
