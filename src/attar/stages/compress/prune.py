"""Structure: which channels can go together, what each cut saves, and cutting them.

A *group* here is the output channels of one layer that end inside a block: one producer (convolution or linear layer), what is tied to
it channel by channel (norms, depthwise convolutions, activations), and the layers that consume it. Their removal leaves every other
shape as it is, and the consumers can be repaired in closed form. Channels of a residual stream are left alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch_pruning as tp
from torch import Tensor, nn

from attar.models.network import Network

TIED = (nn.modules.batchnorm._BatchNorm,)


@dataclass(frozen=True, kw_only=True)
class Group:
    producer: str
    """Name of the layer whose output channels the group is."""
    width: int
    consumers: tuple[str, ...]
    tied: tuple[str, ...]
    """Depthwise convolutions between producer and consumers, whose cost falls with the width."""


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups > 1 and module.groups == module.in_channels == module.out_channels


def _graph(network: nn.Module, example: Tensor) -> tp.DependencyGraph:
    with warnings.catch_warnings(), torch.enable_grad():  # the graph is read from autograd's, also for a caller that infers
        warnings.simplefilter("ignore")
        made = tp.DependencyGraph()
        return made.build_dependency(
            network, example, output_transform=lambda outputs: [o for o in outputs if o is not None], verbose=False
        )


def find_groups(network: Network, example: Tensor) -> list[Group]:
    """The groups that can be cut and repaired, in the order in which the graph lists them; others are left alone.

    The embedding keeps its length, so that what was built on it (clusters, an index) goes on to fit: what a classifier reads is not cut.
    """
    graph = _graph(network, example)
    names = {module: name for name, module in network.named_modules()}
    found = (_as_group(group, names) for group in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]))
    last = f"body.{network.classifier}"
    unique = {group.producer: group for group in found if group is not None and last not in (group.producer, *group.consumers)}
    return list(unique.values())


def _as_group(group: tp.Group, names: Mapping[nn.Module, str]) -> Group | None:
    """A dependency group as a Group, or None when something in it is not understood well enough to repair."""
    producers: list[str] = []
    consumers: list[str] = []
    tied: list[str] = []
    width = len(group[0].idxs)
    for dependency, idxs in group.items:
        module = dependency.target.module
        if not isinstance(module, nn.Module) or module not in names:
            if isinstance(module, nn.Parameter):
                return None
            continue  # elementwise operations of the graph
        if list(idxs) != list(range(width)):
            return None  # channels are re-ordered, repeated or flattened on the way
        consumes = dependency.handler.__name__ == "prune_in_channels"
        if _is_depthwise(module):
            tied.append(names[module])
        elif isinstance(module, nn.Conv2d | nn.Linear):
            if isinstance(module, nn.Conv2d) and (module.groups != 1 or isinstance(module.padding, str) or module.padding_mode != "zeros"):
                return None
            whole = module.weight.shape[1 if consumes else 0] == width
            if not whole:
                return None
            (consumers if consumes else producers).append(names[module])
        elif not isinstance(module, TIED):
            return None  # a layer norm over the channels, an embedding, …: cutting would change its statistics
    if len(producers) != 1 or not consumers:
        return None
    return Group(producer=producers[0], width=width, consumers=tuple(sorted(set(consumers))), tied=tuple(sorted(set(tied))))


class Costs:
    """Multiply-accumulates of a network as a function of its groups' widths."""

    def __init__(self, network: Network, example: Tensor, groups: Sequence[Group]) -> None:
        self.layers = _layer_macs(network, example)
        self.groups = groups

    def total(self, widths: Mapping[str, int]) -> float:
        """MACs when each producer keeps so many channels (its full width where it is not named)."""
        share = {name: 1.0 for name in self.layers}
        for group in self.groups:
            kept = widths.get(group.producer, group.width) / group.width
            for layer in (group.producer, *group.consumers, *group.tied):
                share[layer] *= kept
        return sum(share[name] * macs for name, macs in self.layers.items())

    def per_channel(self, group: Group) -> float:
        """MACs that one channel of a group costs when nothing else is cut."""
        return sum(self.layers[layer] for layer in (group.producer, *group.consumers, *group.tied)) / group.width


def _layer_macs(network: Network, example: Tensor) -> dict[str, float]:
    found: dict[str, float] = {}
    hooks = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            found[name] = 0.0

            def add(module: nn.Module, _: object, output: Tensor, name: str = name) -> None:
                found[name] += output[0].numel() * module.weight[0].numel()  # type: ignore[operator, union-attr, index]

            hooks.append(module.register_forward_hook(add))
    with torch.no_grad():
        network(example[:1])
    for hook in hooks:
        hook.remove()
    return found


def granularity(width: int) -> int:
    """Widths are kept at multiples of this: vector units work on 8 (AVX2 float32) or 16 lanes, and ragged widths waste them."""
    return 8 if width >= 32 else 4 if width >= 8 else 1


def allocate(groups: Sequence[Group], damage: Mapping[str, np.ndarray], costs: Costs, target: float) -> dict[str, int]:
    """Widths whose MACs are at most `target` (a share of the whole) at the least summed damage.

    `damage[producer][m]` is the loss of removing m channels, in units that compare between groups. For a price λ each group takes
    the width that minimises damage + λ·MACs (Lagrange); λ is bisected until the target is just met.
    """
    whole = costs.total({})

    def at(price: float) -> dict[str, int]:
        widths = {}
        for group in groups:
            step, curve = granularity(group.width), damage[group.producer]
            allowed = np.arange(step, group.width + 1, step) if group.width % step == 0 else np.arange(1, group.width + 1)
            total = curve[group.width - allowed] + price * allowed * costs.per_channel(group) / whole
            # the wider one of equals, so that a price of zero cuts nothing
            widths[group.producer] = int(allowed[len(allowed) - 1 - np.argmin(total[::-1])])
        return widths

    low, high = 0.0, 1.0
    while costs.total(at(high)) > target * whole and high < 1e12:
        high *= 4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if costs.total(at(middle)) > target * whole else (low, middle)
    return at(high)


def replay(network: Network, cuts: Sequence[tuple[str, Sequence[int]]], example: Tensor) -> None:
    """Removes channels in place: for each (producer, channels) the channels of its whole group."""
    graph = _graph(network, example)
    for name, channels in cuts:
        module = network.get_submodule(name)
        pruner = graph.get_pruner_of_module(module)
        graph.get_pruning_group(module, pruner.prune_out_channels, list(channels)).prune(record_history=False)
    for parameter in network.parameters():
        parameter.grad = None
