"""Structure: which units (channels, attention heads, groups of channels) can go together, what each cut saves, and cutting them.

A *group* is a set of units that several layers share: *producers* whose outputs they are, what is tied to them one by one (norms, depthwise
convolutions, scales, tables of relative positions), and *consumers* that read them and can be repaired in closed form. A residual stream is
a group of many producers; query, key and value of an attention are the producers of its heads. Where groups are is read from one watched
pass (flow.py); whether they may be cut is proved on the model itself: cutting must give what masking gives.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from attar.models.network import Network
from attar.stages.compress.flow import LAYERS, Flow, follow, undone
from attar.stages.compress.structure import Candidate, Constant, Group, apply, candidates, closed

CLOSE = 1e-4
"""Largest difference between cut and masked, as a share of the largest value: float32 sums in another order differ by less."""
ROUNDS = 10
"""Rounds over the groups at one price; two or three settle."""


def find_groups(network: Network, example: Tensor) -> list[Group]:
    """The groups that can be cut and repaired, each proved on the model, in the order in which their first producers run."""
    return survey(network, example)[0]


def survey(network: Network, example: Tensor) -> tuple[list[Group], dict[str, str]]:
    """The groups, and for each convolution and linear layer whose outputs are left alone the reason in a few words.

    The embedding keeps its length, so that what was built on it (clusters, an index) goes on to fit.
    """
    with torch.inference_mode(False), torch.no_grad():  # also for a caller that infers
        flow = follow(network, example)
        known, refused = candidates(network, flow)
        proved, failed = _Proof(network, flow, known, example).groups()
    owner = {candidate.factor: candidate.group.name for candidate in known}
    left = {}
    for tensor, axes in flow.weights.items():
        layer = tensor.removesuffix(".weight")
        if layer == tensor or not isinstance(network.get_submodule(layer), LAYERS):
            continue
        names = [owner[factor] for factor in axes[0] if factor in owner]
        if not any(name in proved for name in names):
            fixed = [flow.fixed[factor] for factor in axes[0] if factor in flow.fixed]
            left[layer] = [*(failed[name] for name in names), *fixed, refused.get(layer, "no layer that could be repaired reads it")][0]
    return list(proved.values()), left


def described(left: Mapping[str, str]) -> str:
    """What was left alone in one line, as '12 layers left alone: layer norm over the channels (8), channels are sliced (4)'."""
    reasons = ", ".join(f"{reason} ({count})" for reason, count in Counter(left.values()).most_common())
    return f"{len(left)} layer{'s' if len(left) != 1 else ''} left alone{': ' if left else ''}{reasons}"


def replay(network: Network, cuts: Sequence[tuple[str, Sequence[int]]], example: Tensor) -> None:
    """Removes units in place: for each (name of a group, units) from all its layers; all units remove the branch.

    A branch that is gone leaves its consumers' biases as constants, and its layers compute nothing. Raises AttributeError for a group that
    the network does not have.
    """
    flow = follow(network, example)
    apply(network, flow, candidates(network, flow)[0], cuts)


def merged(before: Sequence[tuple[str, Sequence[int]]], after: Sequence[tuple[str, Sequence[int]]]) -> list[tuple[str, list[int]]]:
    """Two cuts as one of the original: the units of the second are counted in what the first left.

    >>> merged([("a", [0, 2])], [("a", [0, 1]), ("b", [5])])
    [('a', [0, 1, 2, 3]), ('b', [5])]
    """
    gone = {name: set(units) for name, units in before}
    for name, units in after:
        first = gone.get(name, set())
        left = [unit for unit in range(len(first) + max(units) + 1) if unit not in first]
        gone[name] = first | {left[unit] for unit in units}
    return [(name, sorted(units)) for name, units in gone.items()]


def kept(network: Network, cuts: Sequence[tuple[str, Sequence[int]]], example: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rows and columns (input channels) of each convolution's and linear layer's weight that cuts leave; the network is not changed.

    Of a layer that lost all its inputs, and is a constant afterwards, no columns are left.
    """
    flow = follow(network, example)
    trial = copy.deepcopy(network)
    stayed = apply(trial, flow, candidates(network, flow)[0], cuts)
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, LAYERS)}
    found = [
        {name: stayed.get((f"{name}.weight", axis), torch.arange(layer.weight.shape[axis])) for name, layer in layers.items()}
        for axis in (0, 1)
    ]
    gone = {name: torch.arange(0) for name in layers if isinstance(trial.get_submodule(name), Constant)}
    return found[0], found[1] | gone


class _Proof:
    """Tries cuts on a copy, against the network with the same units masked."""

    def __init__(self, network: Network, flow: Flow, known: Sequence[Candidate], example: Tensor) -> None:
        tensors = {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()]}
        self.network = copy.deepcopy(network, tensors)  # modules of its own, the same tensors: cuts replace them and leave them as they are
        self.flow, self.known = flow, known
        generator = torch.Generator().manual_seed(0)
        shape = (2, *example.shape[1:])  # of whole numbers only the first two are known to be in the vocabulary
        whole = not example.is_floating_point()
        self.images = (torch.randint(2, shape, generator=generator) if whole else torch.randn(shape, generator=generator)).to(example)
        self.units: dict[str, list[int]] = {}
        for group in (candidate.group for candidate in known):  # the first and the last: code that counts from an end shows
            some = [0, group.width - 1, int(torch.randint(group.width, (), generator=generator))]
            self.units[group.name] = sorted(set(some[: group.width - 1]))
        self.failed: dict[str, str] = {}

    def groups(self) -> tuple[dict[str, Group], dict[str, str]]:
        """The groups that hold, by name, and why the others do not."""
        held = self._holding([candidate.group for candidate in self.known])
        free = self._removable(held)
        names = {group.name for group in free}
        proved = {group.name: replace(group, removable=group.name in names) for group in held}
        return proved, self.failed

    def _holding(self, groups: list[Group]) -> list[Group]:
        """Those that lose some units without harm: all at once, or in halves where that fails."""
        reason = self._fault(groups, self.units) if groups else None
        if reason is None:
            return groups
        if len(groups) == 1:
            self.failed[groups[0].name] = reason
            return []
        half = len(groups) // 2
        held = self._holding(groups[:half]) + self._holding(groups[half:])
        return held if not held or self._fault(held, self.units) is None else self._one_by_one(held)

    def _one_by_one(self, groups: list[Group]) -> list[Group]:
        """Groups that hold apart but not together: each is kept if it holds with those before it."""
        held: list[Group] = []
        for group in groups:
            reason = self._fault([*held, group], self.units)
            if reason is None:
                held.append(group)
            else:
                self.failed[group.name] = reason
        return held

    def _removable(self, groups: list[Group]) -> list[Group]:
        """Those whose branch may go, alone and together with the others."""
        whole = {group.name: range(group.width) for group in groups}
        free = [group for group in groups if self._fault([group], whole) is None]
        if not free or self._fault(free, whole) is None:
            return free
        held: list[Group] = []
        for group in free:
            if self._fault([*held, group], whole) is None:
                held.append(group)
        return held

    def _fault(self, groups: Sequence[Group], units: Mapping[str, Sequence[int]]) -> str | None:
        """What is wrong when some groups lose units: it does not run, or it gives other values than masking; None where nothing is."""
        branch = len(units[groups[0].name]) == groups[0].width
        layers = [] if branch else [name for group in groups for name in group.consumers]
        with undone(self.network):
            for group in groups:
                for name in group.consumers:
                    _mask(self.network.get_submodule(name), group.width, units[group.name])
            wanted = _values(self.network, layers, self.images)
        try:
            with undone(self.network), torch.set_grad_enabled(branch):
                stayed = apply(self.network, self.flow, self.known, [(group.name, units[group.name]) for group in groups])
                images = self.images.clone().requires_grad_(branch)
                found = _values(self.network, layers, images)
                shapes = (
                    [output[:1].shape for output in found[""]] if branch else [o.shape for o in _values(self.network, [], images[:1])[""]]
                )
                lost = branch and not _depends(found[""][0], images)
        except Exception as error:  # whatever the model's own code raises
            return f"does not run with fewer channels ({type(error).__name__})"
        for name, values in wanted.items():
            rows = stayed.get((f"{name}.weight", 0))
            dim = 1 if name in layers and isinstance(self.network.get_submodule(name), nn.Conv2d) else -1
            same = [_close(value if rows is None else value.index_select(dim, rows), own) for value, own in zip(values, found[name])]
            if not all(same) or len(values) != len(found[name]):
                return "cutting is not masking"
        if shapes != [output[:1].shape for output in wanted[""]]:
            return "cutting is not masking"
        return "nothing is left" if lost else None


def _mask(layer: nn.Module, width: int, units: Sequence[int]) -> None:
    """Zeroes the weights with which a consumer reads some units."""
    weight = layer.weight.detach().clone()  # type: ignore[operator, union-attr]
    weight.unflatten(1, (width, -1))[:, list(units)] = 0
    layer.weight = nn.Parameter(weight)


def _values(network: Network, layers: Sequence[str], images: Tensor) -> dict[str, list[Tensor]]:
    """What some layers and, under the name "", the network itself give."""
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    hooks = [
        network.get_submodule(name).register_forward_hook(lambda _m, _i, output, name=name: found[name].append(output)) for name in layers
    ]
    outputs = network(images)
    for hook in hooks:
        hook.remove()
    return found | {"": [output for output in outputs if output is not None]}


def _close(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and bool((one - two).abs().max() <= CLOSE * one.abs().max() + 1e-12)


def _depends(output: Tensor, inputs: Tensor) -> bool:
    """Whether an output still says anything about the inputs: its gradient is not all zero."""
    if not output.requires_grad:
        return False
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    (gradient,) = torch.autograd.grad((output * weight).sum(), inputs, allow_unused=True)
    return gradient is not None and bool(gradient.any())


class Costs:
    """Multiply-accumulates, or measured times, of a network as a function of its groups' widths."""

    def __init__(
        self,
        network: Network,
        example: Tensor,
        groups: Sequence[Group],
        layers: Mapping[str, float] | None = None,
        lanes: int | None = None,
    ) -> None:
        """Counts the MACs of one item, or takes a cost per layer (as measured milliseconds; layers that are not named cost nothing).

        With `lanes` widths are multiples of it, and only those: what the kernels compute at once.
        """
        self.groups, self.lanes = list(groups), lanes
        self.place = {group.name: place for place, group in enumerate(self.groups)}
        if layers is None:
            flow = follow(network, example)
            factors = [next(c.factor for c in candidates(network, flow)[0] if c.group.name == group.name) for group in self.groups]
            terms = [(float(macs), [factor in own for factor in factors]) for macs, own in flow.products]
        else:
            touched = [{*group.producers, *group.consumers, *group.tied} for group in self.groups]
            terms = [(float(cost), [name in own for own in touched]) for name, cost in layers.items()]
        self.cost = np.array([cost for cost, _ in terms])
        self.shared = np.array([own for _, own in terms], bool).reshape(len(terms), len(self.groups))
        """Which costs (rows) are proportional to which groups' widths (columns)."""

    def total(self, widths: Mapping[str, int]) -> float:
        """Cost when each group keeps so many units (all where it is not named); nothing is paid for branches that are gone."""
        return float(self._each(self._shares(widths)).sum())

    def per_unit(self, group: Group, widths: Mapping[str, int]) -> float:
        """What one unit of a group costs while the other groups have these widths."""
        shares = self._shares(dict(widths) | {group.name: group.width})
        return float(self._each(shares)[self.shared[:, self.place[group.name]]].sum()) / group.width

    def _shares(self, widths: Mapping[str, int]) -> np.ndarray:
        gone = [name for name, width in widths.items() if width == 0]
        dead = closed(self.groups, gone) if gone else ()
        return np.array([0 if group.name in dead else widths.get(group.name, group.width) / group.width for group in self.groups])

    def _each(self, shares: np.ndarray) -> np.ndarray:
        return self.cost * np.where(self.shared, shares, 1).prod(1)


def granularity(width: int) -> int:
    """Widths are kept at multiples of this: vector units work on 8 (AVX2 float32) or 16 lanes, and ragged widths waste them."""
    return 8 if width >= 32 else 4 if width >= 8 else 1


def choices(group: Group, lanes: int | None = None) -> list[int]:
    """Widths a group may get, ascending: multiples of `lanes` or of its granularity (any number of heads), and 0 where the branch may go."""
    step = 1 if group.unit > 1 else math.gcd(group.width, lanes) if lanes else granularity(group.width)
    step = step if group.width % step == 0 else 1
    return [*([0] if group.removable else []), *range(step, group.width + 1, step)]


def allocate(groups: Sequence[Group], damage: Mapping[str, np.ndarray], costs: Costs, target: float) -> dict[str, int]:
    """Widths whose cost is at most `target` (a share of the whole) at the least summed damage.

    `damage[name][m]` is the loss of removing m units, in units that compare between groups; its last entry, where the branch may go, that of
    removing all. For a price λ the widths minimise damage + λ·cost (Lagrange), group by group at the widths of the others until nothing
    changes, as groups share layers; λ is bisected until the target is just met. Where no widths meet it, the least are returned.
    """
    whole = costs.total({})

    def at(price: float) -> dict[str, int]:
        widths = {group.name: group.width for group in groups}
        for _ in range(ROUNDS):
            before = dict(widths)
            for group in groups:
                widths[group.name] = _best(group, damage[group.name], costs, widths, price / whole)
            if widths == before:
                break
        return widths

    low, high = 0.0, 1.0
    while costs.total(at(high)) > target * whole and high < 1e12:
        high *= 4
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if costs.total(at(middle)) > target * whole else (low, middle)
    # Between the two prices widths jump where damage is not convex: the gap is closed from both sides, step by step.
    ends = [
        _stepped(groups, damage, costs, _stepped(groups, damage, costs, at(price), target * whole, False), target * whole, True)
        for price in (low, high)
    ]
    fit = [widths for widths in ends if costs.total(widths) <= target * whole] or [at(high)]
    return min(fit, key=lambda widths: sum(damage[group.name][group.width - widths[group.name]] for group in groups))


def _stepped(
    groups: Sequence[Group], damage: Mapping[str, np.ndarray], costs: Costs, start: Mapping[str, int], budget: float, widen: bool
) -> dict[str, int]:
    """One width after another changed: narrowed, least damage per cost saved first, until the cost is within a budget; or widened, most
    damage undone per cost first, while it stays within."""
    widths = dict(start)
    while widen or costs.total(widths) > budget:
        best = None
        spare = budget - costs.total(widths)
        for group in groups:
            curve, now = damage[group.name], widths[group.name]
            allowed = np.array([w for w in _allowed(group, curve, costs.lanes) if (w > now if widen else w < now)], int)
            if not len(allowed):
                continue
            spent = _spent(group, allowed, costs, widths) - _spent(group, np.array([now]), costs, widths)[0]
            gain = curve[group.width - now] - curve[group.width - allowed]
            possible = (spent <= spare) & (gain > 0) if widen else spent < 0
            ratio = np.where(possible, gain / np.abs(spent).clip(1e-12), -np.inf)
            if best is None or ratio.max() > best[0]:
                best = ratio.max(), group.name, int(allowed[ratio.argmax()])
        if best is None or best[0] == -np.inf:
            break
        widths[best[1]] = best[2]
    return widths


def _allowed(group: Group, damage: np.ndarray, lanes: int | None) -> list[int]:
    return [width for width in choices(group, lanes) if group.width - width < len(damage)]


def _spent(group: Group, allowed: np.ndarray, costs: Costs, widths: Mapping[str, int]) -> np.ndarray:
    """Cost of a group's widths while the others keep theirs, up to a constant."""
    spent = allowed * costs.per_unit(group, widths)
    if 0 in allowed:  # with a branch go those that only it would read
        one = costs.total({**widths, group.name: 1})
        spent[allowed == 0] = costs.total({**widths, group.name: 0}) - one + costs.per_unit(group, widths)
    return spent


def _best(group: Group, damage: np.ndarray, costs: Costs, widths: Mapping[str, int], price: float) -> int:
    """The width of least damage + price · cost while the others keep theirs; the wider one of equals, so that a price of zero cuts nothing."""
    allowed = np.array(_allowed(group, damage, costs.lanes)[::-1])
    return int(allowed[np.argmin(damage[group.width - allowed] + price * _spent(group, allowed, costs, widths))])
