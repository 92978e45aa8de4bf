"""Cuts of any size from one gathering of statistics: which channels go, and what those that stay take over."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from attar import config
from attar.models import sources
from attar.models.network import Network, count_macs, count_parameters
from attar.records import Model
from attar.stages.compress import prune, repair
from attar.stages.compress.feed import Feed, piece
from attar.stages.compress.reconstruct import reconstruct, route
from attar.stages.compress.structure import Constant
from attar.stages.compress.timing import covered
from attar.workspace import Job

COMPUTE = 3e12
"""Multiply-accumulates of one reconstruction: bounds the items looked at, by the size of the model; under a minute on a laptop."""
FEWEST = 32
"""Items below which reconstruction would follow noise: then repair alone has to do."""


class Cutter:
    """Cuts of any size from one gathering of statistics."""

    def __init__(
        self,
        network: Network,
        model: Model,
        feed: Feed,
        settings: config.Compress,
        job: Job,
        times: Mapping[str, float] | None = None,
        lanes: int | None = None,
    ) -> None:
        """`times` are milliseconds of each layer; without them shares are shares of the MACs. Widths are multiples of `lanes` where given."""
        self.network, self.model, self.feed, self.settings, self.job = network, model, feed, settings, job
        self.example, self.timed = feed.example(), bool(times) or lanes is not None
        self.groups, left = prune.survey(network, self.example)
        layers = {name for group in self.groups for name in (*group.producers, *group.consumers)}
        self.costs = prune.Costs(network, self.example, self.groups, times if times and covered(times, layers) else None, lanes)
        if left:
            job.say(prune.described(left))

    @functools.cached_property
    def floor(self) -> float:
        """The smallest share that cutting every group to its least width reaches."""
        least = {group.name: prune.choices(group, self.costs.lanes)[0] for group in self.groups}
        return self.costs.total(least) / self.costs.total({})

    @functools.cached_property
    def plan(self) -> tuple[dict[str, repair.Moments], dict[str, list[int]], dict[str, np.ndarray]]:
        """Moments of every consumer, and each group's order of removal and damage."""
        consumers = sorted({name for group in self.groups for name in group.consumers})
        batches = self.feed.calibration(self.settings.calibration_items, piece(self.example, 32))
        moments = repair.gather(self.network, batches, consumers, self.job.seed)
        sensitivity = repair.sensitivities(self.network, batches, consumers, self.job.seed)
        order, damage = {}, {}
        with self.job.progress(len(self.groups), "ordering channels", "groups") as bar:
            for group in self.groups:
                layers = [
                    repair.Consumer(repair.weights_of(self.network.get_submodule(name)), moments[name], sensitivity[name])
                    for name in group.consumers
                ]
                order[group.name], damage[group.name] = repair.eliminate(layers, group.width)
                bar.update(1)
        return moments, order, damage

    def cut(self, share: float) -> Model:
        """The model cut to a share of its MACs (of its time, where that is known), repaired and reconstructed; not trained."""
        moments, order, damage = self.plan
        last = {group.name: group.width + group.removable for group in self.groups}
        widths = prune.allocate(self.groups, {name: damage[name][: last[name]] for name in damage}, self.costs, share)
        gone = {group.name: sorted(order[group.name][: group.width - widths[group.name]]) for group in self.groups}
        cuts = [(name, units) for name, units in gone.items() if units]
        network = sources.network(self.model)
        prune.replay(network, cuts, self.example)
        lost, rows = repaired(network, self.network, cuts, self.example, moments)
        used = self._reconstruct(network, lost, rows)
        removed, branches = sum(len(units) for units in gone.values()), sum(not width for width in widths.values())
        step = f"cut {removed} units of {len(cuts)} groups" + (f", {branches} of them branches that went whole" if branches else "")
        looked = min(self.settings.calibration_items, self.feed.count)
        step += f"; repaired on {looked} training items" + (f", reconstructed on {used}" if used else "")
        return replace(
            self.model,
            state=network.state_dict(),
            cuts=tuple(prune.merged(self.model.cuts, cuts)),
            parameters=count_parameters(network),
            macs=count_macs(network, self.example),
            lineage=(*self.model.lineage, step),
        )

    def _reconstruct(self, network: Network, lost: list[str], rows: Mapping[str, Tensor]) -> int:
        """Re-fits, front to back, the layers after the first cut; returns the number of items looked at."""
        along = route(self.network, self.feed.calibration(8, 8)[0])
        layers = {name: network.get_submodule(name) for name in along.order}
        touched = [name for name, layer in layers.items() if repair.refittable(layer) or isinstance(layer, Constant)]
        first = min((touched.index(name) for name in lost if name in touched), default=len(touched))
        names = touched[first:]
        passes = 0.5 * (self.model.macs + count_macs(network, self.example)) * max(len(names), 1)
        items = min(int(COMPUTE / passes), self.settings.calibration_items)
        if items < min(FEWEST, self.feed.count) or not names:
            return 0
        with self.job.progress(len(names), "reconstructing", "layers") as bar:
            batches = self.feed.calibration(items, piece(self.example, 64))
            reconstruct(network, self.network, names, along, rows, batches, self.job.seed, lambda: bar.update(1))
        return min(items, self.feed.count)


def repaired(
    cut: Network, original: Network, cuts: Sequence[tuple[str, Sequence[int]]], example: Tensor, moments: Mapping[str, repair.Moments]
) -> tuple[list[str], dict[str, Tensor]]:
    """Re-fits in place the layers of a cut network that lost inputs, to the original's activations; of one that lost all, the mean output stays.

    Returns the names of those layers, and of every layer the outputs that stay.
    """
    rows, columns = prune.kept(original, cuts, example)
    lost = [name for name, kept in columns.items() if name in moments and len(kept) < _width(original, name)]
    for name in lost:
        weight, layer = repair.weights_of(original.get_submodule(name)), cut.get_submodule(name)
        keep = repair.inputs_kept(columns[name], _width(original, name), weight.shape[1])
        matrix = repair.refit(weight, moments[name], keep)[rows[name]]
        if isinstance(layer, Constant):
            with torch.no_grad():
                layer.bias.copy_(matrix[:, -1].float())
        elif repair.refittable(layer):  # not one whose outputs nobody reads any more
            repair.write_back(layer, matrix)
    return lost, rows


def _width(network: Network, name: str) -> int:
    """Input channels of a convolution, inputs of a linear layer."""
    return network.get_submodule(name).weight.shape[1]  # type: ignore[union-attr, index, return-value]
