"""embed: every item becomes a vector, from a given model or from an encoder learned on the items themselves."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from attar import config, formats
from attar.modalities.image import Loader
from attar.models import sources
from attar.models.network import Network
from attar.records import Items, Model, Vectors
from attar.stages.augment.engine import normalise
from attar.stages.augment.policy import starting_policy
from attar.stages.train import contrastive, default_steps
from attar.workspace import Job

SHARD = 4096
BATCH = 64


def embed(items: Items, choice: config.ModelChoice, settings: config.Embed, augmentation: config.Augment, job: Job) -> Vectors:
    """Vectors (float16) of all items, shard by shard; a `self` encoder is trained first, on the training split alone."""
    model, network = sources.resolve(choice, items, settings.self_width, job), None
    signals: tuple[dict[str, float], ...] = ()
    if choice.model == "self":
        network = sources.network(model)
        ids = items.ids("train")
        steps = settings.self_steps or default_steps(len(ids), settings.batch_size)
        policy = starting_policy(items, augmentation, job)
        signals = contrastive(network, items, ids, model.preprocess, policy, None, steps, settings, job)
        _verdict(signals, network_dim(network, model), job)
        lineage = (*model.lineage, f"{int(signals[-1]['step'])} contrastive steps (NT-Xent) on {len(ids)} training items")
        model = replace(model, state=network.state_dict(), lineage=lineage)
    network = network or sources.network(model)
    ids = items.ids()
    parts = [ids[start : start + SHARD] for start in range(0, len(ids), SHARD)]
    with Loader(items, model.preprocess, workers=job.workers) as loader, job.progress(len(ids), "encoding", "items") as bar:
        for number, part in enumerate(parts):
            job.shard(number, functools.partial(_encode, network, model, loader, part, bar))
            bar.update(sum(map(len, parts[: number + 1])) - bar.n)  # a shard that was there already
    shards = [functools.partial(formats.read_shard, job.folder / f"shard-{number:05d}.parquet") for number in range(len(parts))]
    return Vectors(shards=shards, count=len(ids), dim=network_dim(network, model), model=model, signals=signals)


def _encode(network: Network, model: Model, loader: Loader, ids: np.ndarray, bar: tqdm) -> pa.Table:
    """One shard of vectors as a table."""
    made = []
    for _, images in loader.stream(ids[start : start + BATCH] for start in range(0, len(ids), BATCH)):
        views = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            made.append(network(normalise(views, model.preprocess.mean, model.preprocess.std))[0].half().numpy())
        bar.update(len(images))
    return formats.shard_table(ids, np.concatenate(made))


def network_dim(network: torch.nn.Module, model: Model) -> int:
    """Length of the embedding."""
    with torch.no_grad():
        return network(sources.example_input(model))[0].shape[1]


def _verdict(signals: tuple[dict[str, float], ...], dim: int, job: Job) -> None:
    """Says in plain words whether the encoder learned."""
    first, last = signals[0], signals[-1]
    rank, better = last["effective_rank"], first["validation_loss"] - last["validation_loss"]
    state = "collapsed" if rank < 2 else "learned" if better > 0.02 * first["validation_loss"] else "hardly learned"
    job.say(
        f"the encoder {state}: validation loss {first['validation_loss']:.2f} → {last['validation_loss']:.2f}, "
        f"effective rank {rank:.0f} of {dim}, {int(last['step'])} steps"
    )
