"""embed: every item becomes a vector, from a given model or from an encoder learned on the items themselves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from attar import config, formats
from attar.errors import UsageError
from attar.modalities.image import Loader
from attar.models import sources
from attar.models.choice import choose
from attar.models.network import Network
from attar.records import Items, Model, Vectors
from attar.scale.local import Tick
from attar.stages import again
from attar.stages.augment.policy import starting_policy
from attar.stages.compress.distil import live_norms
from attar.stages.encode import compiled, encode
from attar.stages.signals import closing
from attar.stages.train import default_steps, learn, retrieval
from attar.workspace import Job

SHARD = 4096


def embed(items: Items, choice: config.ModelChoice, settings: config.Embed, augmentation: config.Augment, job: Job) -> Vectors:
    """Vectors (float16) of all items, shard by shard; a `self` encoder is trained first, on the training split alone."""
    choice, why = choose(choice, items)
    if why:
        job.say(why)
    model = sources.resolve(choice, items, settings.self_width, job)
    if settings.adapt_steps:
        refuse_adapting(model, choice)
    signals: tuple[dict[str, float], ...] = ()
    if model.source["kind"] == "self" or settings.adapt_steps:
        learn = functools.partial(_learned if model.source["kind"] == "self" else _adapted, model, items, settings, augmentation, job)
        model, signals = again.learned(items, choice, settings, augmentation, job, learn)
    network = sources.network(model)
    dim = network_dim(network, model)
    encoding = functools.partial(job.shards, Encoding(items, model, network), label="encoding")
    shards = again.vectors(items, model, choice, dim, SHARD, job, encoding)
    return Vectors(shards=shards, count=len(items), dim=dim, model=model, signals=signals)


def _learned(
    model: Model, items: Items, settings: config.Embed, augmentation: config.Augment, job: Job
) -> tuple[Model, tuple[dict[str, float], ...]]:
    """The `self` encoder after each objective in turn, trained in place on the training split; its record and the curve of the last."""
    network = sources.network(model)
    ids, policy = items.ids("train"), starting_policy(items, augmentation, job)
    steps = settings.self_steps or default_steps(len(ids), settings.batch_size)
    curve: tuple[dict[str, float], ...] = ()
    for objective in settings.objectives:
        curve = learn(network, items, ids, model.preprocess, policy, None, steps, settings, job, objective)
        job.say(closing(curve, network_dim(network, model)))
        taken = f"{int(curve[-1]['step'])} steps ({objective}) on {len(ids)} training items"
        model = replace(model, lineage=(*model.lineage, taken))
    return replace(model, state=network.state_dict()), curve


ADAPT_RATE = 1e-4
"""Peak learning rate of a given encoder that learns on: a twentieth of that from scratch."""
ADAPT_COMPUTE = 1e10
"""Multiply-accumulates of the items of a batch for which a given encoder may be asked: what it keeps for the gradient grows with them."""


def refuse_adapting(model: Model, choice: config.ModelChoice) -> None:
    """Raises UsageError for a model that cannot learn on."""
    why = {
        "self": "it learns from these items anyway; give --self-steps",
        "onnx": "it is a frozen file without gradients; name the model in the form it was trained in",
        "descriptors": "it has no weights",
    }.get(model.source["kind"])
    if model.classes:
        why = "its classes were learned for the embeddings it gives now; take it as an encoder with --output embedding"
    if why:
        raise UsageError(f"adapt_steps: {choice.model} cannot be adapted: {why}, or leave out --adapt-steps")


def _adapted(
    model: Model, items: Items, settings: config.Embed, augmentation: config.Augment, job: Job
) -> tuple[Model, tuple[dict[str, float], ...]]:
    """A given encoder after learning on from the training items, if it then finds more held-out items by another view of them; else as it came."""
    network = sources.network(model)
    ids, policy, objective = items.ids("train"), starting_policy(items, augmentation, job), settings.objectives[-1]
    settings = replace(settings, batch_size=int(np.clip(ADAPT_COMPUTE / max(model.macs, 1), 16, settings.batch_size)))
    norms = live_norms(network, settings.batch_size)

    def wake() -> None:
        network.eval()  # no dropout, and norms that were folded away stay so
        for norm in norms:
            norm.train()

    before = retrieval(network, items, model.preprocess, policy, job)
    curve = learn(network, items, ids, model.preprocess, policy, None, settings.adapt_steps, settings, job, objective, ADAPT_RATE, wake)
    after = retrieval(network, items, model.preprocess, policy, job)
    said = f"held-out items found by another view of themselves: {before:.1%} before, {after:.1%} after {int(curve[-1]['step'])} steps ({objective})"
    if after <= before:
        job.say(f"learning on from these items did not help ({said}); the encoder stays as it came")
        return model, ()
    job.say(f"the encoder learned on from these items; {said}")
    return replace(model, state=network.state_dict(), lineage=(*model.lineage, f"adapted: {said}")), curve


@dataclass(frozen=True)
class Encoding:
    """Work of an engine: the vectors of some items. Elsewhere the network is built again from the model's record."""

    items: Items
    model: Model
    network: Network | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Encoding, (self.items, self.model)

    @contextmanager
    def open(self, workers: int) -> Iterator[Callable[[np.ndarray, Tick], pa.Table]]:
        """The function of one shard."""
        preprocess = self.model.preprocess
        network = compiled(self.network or sources.network(self.model), preprocess, len(self.items))
        with Loader(self.items, preprocess, workers=workers) as loader:
            yield lambda ids, tick: formats.shard_table(ids, encode(network, preprocess, loader, ids, tick))


def network_dim(network: torch.nn.Module, model: Model) -> int:
    """Length of the embedding."""
    with torch.no_grad():
        return network(sources.example_input(model))[0].shape[1]
