"""Training on unlabelled items: the loop that distillation shares, and learning an encoder by any of the objectives.

Both are exact under interruption: a step's batch and augmentation depend on the seed and the step number alone, and a
checkpoint holds weights, optimiser and step, so a resumed run takes the same steps as one that was never stopped.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attar import config
from attar.errors import ModelError
from attar.modalities.image import Loader
from attar.models import sources
from attar.models.learners import Learner, Seen, learner
from attar.models.network import Network
from attar.models.objectives import effective_rank, spread
from attar.records import Clusters, Items, Model, Policy, Preprocess, Selection, Vectors
from attar.stages.augment.controller import Controller, pins
from attar.stages.augment.engine import augment, normalise
from attar.stages.cluster.head import refit_head
from attar.stages.encode import as_input
from attar.stages.signals import Curve, Recorder, collapsed, has_collapsed, plateaued, verdict
from attar.workspace import Job

RATE = 2e-3
"""Peak learning rate of AdamW, from scratch."""
CHECKPOINT_SECONDS = 20.0


def batches(ids: np.ndarray, size: int, steps: range, draw: Callable[[int], np.random.Generator]) -> Iterator[np.ndarray]:
    """Ids of the batch of each step, by epochs of a fresh permutation."""
    per_epoch, epoch, order = max(1, len(ids) // size), -1, ids
    for step in steps:
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            order = draw(epoch).permutation(ids)
        place = step % per_epoch * size
        yield order[place : place + size]


Stream = Callable[[range], Iterator[tuple[int, np.ndarray, np.ndarray]]]
"""For a range of steps: step, ids and uint8 images (n, height, width, 3) of its batch."""


def never(curve: Curve) -> bool:
    """Training goes on to its last step."""
    return False


def optimise(
    modules: nn.ModuleDict,
    rate: float,
    steps: int,
    stream: Stream,
    loss_of: Callable[[int, np.ndarray, np.ndarray], Tensor],
    look: Callable[[], dict[str, float]],
    job: Job,
    label: str,
    stops: Callable[[Curve], bool] = never,
    recount: Callable[[int], int] | None = None,
    averaged: float = 0.0,
) -> tuple[dict[str, float], ...]:
    """Takes the steps with AdamW under a cosine rate after a short warm-up, from the last checkpoint if there is one, until `stops` says so.

    `look` measures on held-out items before the first step and about forty times on the way; its figures, with step and loss, are the curve that
    is returned, and are written down as they come. After each look `recount`, where given, says how many steps there are in all. The modules end
    as they were when the validation loss was least and they had not collapsed, so that training never leaves them worse than it found them. With
    `averaged`, a share of the steps, the running mean of the weights over that share is looked at last, and the rate falls to that share of its
    peak alone, so that there is something to average (Polyak and Juditsky 1992). Raises ModelError when the loss is not finite.
    """
    label = label.replace(" ", "-")
    name, optimiser = f"{label}.pt", _optimiser(modules, rate)
    kept: dict[str, Any] = job.recall(name) or {"step": 0, "curve": [{"step": 0} | look()], "best": copy.deepcopy(modules.state_dict())}
    every, warm = max(5, steps // 40), max(1, min(100, steps // 10))
    if "modules" in kept:
        modules.load_state_dict(kept["modules"])
        optimiser.load_state_dict(kept["optimiser"])
        steps = kept["steps"]
    mean = kept.get("mean") or ([tensor.clone() for tensor in _floating(modules)] if averaged else [])
    start, curve, best, saved, done = kept["step"], list(kept["curve"]), kept["best"], time.monotonic(), kept.get("done", False)
    with Recorder(job, label, curve) as record, job.progress(steps, label, "steps", done=start) as bar:
        for step, ids, images in stream(range(0) if done else range(start, sys.maxsize if recount else steps)):
            for group in optimiser.param_groups:
                cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
                group["lr"] = rate * min(1, (step + 1) / warm) * (averaged + (1 - averaged) * cosine)
            optimiser.zero_grad(set_to_none=True)
            loss = loss_of(step, ids, images)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(modules.parameters(), 5.0)
            optimiser.step()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise ModelError(f"{label}: the loss is {value} at step {step}; the model or its preprocessing (--mean, --std) is not sane")
            bar.update(1)
            if averaged:
                torch._foreach_lerp_(mean, _floating(modules), 1 / max(1.0, min(step + 1, averaged * steps)))
            looks = (step + 1) % every == 0
            if recount and looks:
                bar.total = steps = max(step + 1, recount(step + 1))
            done = step + 1 >= steps
            if averaged and done:
                torch._foreach_copy_(_floating(modules), mean)
            if looks or done:
                curve.append({"step": step + 1, "loss": round(value, 5)} | look())
                record(curve[-1])
                if _is_best(curve):
                    best = copy.deepcopy(modules.state_dict())
                shown = {key: f"{figure:.3f}" for key, figure in curve[-1].items() if key != "step" and "[" not in key}
                bar.set_postfix({"verdict": verdict(curve).state} | shown, refresh=False)
                done = done or stops(curve)
            if done or time.monotonic() - saved > CHECKPOINT_SECONDS:
                state = {"modules": modules.state_dict(), "optimiser": optimiser.state_dict()}
                job.remember(name, {"step": step + 1, "steps": steps, "curve": curve, "best": best, "mean": mean, "done": done} | state)
                saved = time.monotonic()
            if done:
                break
    modules.load_state_dict(best)
    return tuple(curve)


def _floating(modules: nn.Module) -> list[Tensor]:
    """Weights and statistics, without counters; views of them, not copies."""
    return [tensor for tensor in modules.state_dict().values() if tensor.is_floating_point()]


def _is_best(curve: Curve) -> bool:
    """Whether the last look is sound and saw the least validation loss of all sound looks."""
    sound = [seen["validation_loss"] for seen in curve if not collapsed(seen)]
    return not collapsed(curve[-1]) and sound[-1] <= min(sound)


def _optimiser(modules: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW, without decay on biases and norms."""
    decay = [parameter for parameter in modules.parameters() if parameter.dim() > 1]
    rest = [parameter for parameter in modules.parameters() if parameter.dim() <= 1]
    return torch.optim.AdamW([{"params": decay, "weight_decay": 1e-4}, {"params": rest, "weight_decay": 0.0}], lr=rate)


def _streamer(loader: Loader, ids: np.ndarray, size: int, job: Job) -> Stream:
    def stream(wanted: range) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        drawn = batches(ids, size, wanted, lambda number: job.rng("batch", number))
        for step, (batch, images) in zip(wanted, loader.stream(drawn)):
            yield step, batch, images

    return stream


def held_out(items: Items, job: Job) -> np.ndarray:
    """At most 256 validation ids on which training is watched."""
    ids = items.ids("validation")
    return np.sort(job.rng("held out").permutation(ids)[:256])


def _views(images: np.ndarray, policy: Policy, clusters: np.ndarray | None, preprocess: Preprocess, job: Job, *key: Any) -> list[Tensor]:
    """Two augmented, normalised views of each image, drawn by seed and key."""
    made = [augment(images, policy, clusters, job.rng("view", *key, view)) for view in (0, 1)]
    return [normalise(view, preprocess.mean, preprocess.std) for view in made]


def learn(
    network: Network,
    items: Items,
    ids: np.ndarray,
    preprocess: Preprocess,
    policy: Policy,
    clusters: np.ndarray | None,
    steps: int,
    settings: config.Embed,
    job: Job,
    objective: str = "nt-xent",
    rate: float = RATE,
    wake: Callable[[], object] | None = None,
) -> tuple[dict[str, float], ...]:
    """Trains an encoder in place on two views per item by an objective, to the last step, a plateau or a collapse, under live dials.

    `clusters` is the cluster of every item by id, where the policy has dials per cluster. `wake` puts the network into the mode it trains in,
    by default training mode. Returns the curve: step, loss, and on held-out items validation loss (under the policy as given, so that looks
    compare), effective rank, spread, and what moved the dials and where to. The dials end, as the weights do, as they were when the validation
    loss was least.
    """
    size = int(min(settings.batch_size, max(4, len(ids) // 2)))
    with torch.random.fork_rng():
        torch.manual_seed(job.seed)
        dim = network(torch.zeros(2, 3, *preprocess.size))[0].shape[1]
        teacher = learner(objective, dim, preprocess.size, len(ids), settings.self_kinds, steps, settings.temperature, job.seed)
    modules, dials = nn.ModuleDict({"network": network, "learner": teacher}), Controller(policy, pins(policy))
    live = dials.live and teacher.moves_dials
    if live:
        modules["dials"] = dials  # its state is in the checkpoints with the weights

    def loss_of(step: int, batch: np.ndarray, images: np.ndarray) -> Tensor:
        teacher.prepare(step, lambda: torch.from_numpy(embeddings_of(network.eval(), items, ids, preprocess, job)))
        modules.train()
        if wake:
            wake()
        own = None if clusters is None else clusters[batch]
        views = _views(images, dials.policy(), own, preprocess, job, step)
        seen: Seen = teacher(network, *views, np.searchsorted(ids, batch), job.rng("hidden", step))
        if live:
            dials.saw(*seen.projected, settings.temperature, own)
        return seen.loss

    with Loader(items, preprocess, workers=job.workers) as loader:
        held = held_out(items, job)
        images, own = loader.batch(held), None if clusters is None else clusters[held]
        pair = _views(images, policy, None, preprocess, job, "held out")

        def look() -> dict[str, float]:
            modules.eval()
            with torch.no_grad():
                seen = teacher(network, *pair, np.full(len(held), -1), job.rng("hidden", "held out"))
                found = {
                    "validation_loss": float(seen.loss),
                    "effective_rank": effective_rank(seen.embeddings[0]),
                    "spread": spread(seen.embeddings[0]),
                }
                found = {name: round(value, 5) for name, value in found.items()} | teacher.figures()
                return found | (_steer(dials, network, teacher, images, own, preprocess, settings.temperature, job) if live else {})

        def stops(curve: Curve) -> bool:
            return has_collapsed(curve) or teacher.settled() or (teacher.watches_plateau and plateaued(curve))

        curve = optimise(modules, rate, steps, _streamer(loader, ids, size, job), loss_of, look, job, f"{objective} training", stops)
    network.eval()
    return (*curve[:-1], dict(curve[-1]) | dials.by_cluster()) if live else curve


def _steer(
    dials: Controller,
    network: Network,
    teacher: Learner,
    images: np.ndarray,
    clusters: np.ndarray | None,
    preprocess: Preprocess,
    temperature: float,
    job: Job,
) -> dict[str, float]:
    """Shows held-out items (n, height, width, 3) to the network under the present dials, and lets the controller act on what it sees."""
    turn = int(dials.turn)
    views = _views(images, dials.policy(), clusters, preprocess, job, "live", turn)
    alone = _views(images, dials.alone(), clusters, preprocess, job, "alone", turn)[0]
    plain = as_input(images, preprocess)
    first, second, changed, still = (network(view)[0] for view in (*views, alone, plain))
    projected = teacher.project(first), teacher.project(second)
    return dials.act((first, second), projected, (still, changed), temperature, effective_rank(first), clusters)


def default_steps(count: int, batch: int) -> int:
    """Training steps for so many items: a hundred epochs, at least 300 and at most 3,000 steps."""
    return int(np.clip(100 * count // max(1, min(batch, count // 2)), 300, 3000))


def train(
    items: Items,
    vectors: Vectors,
    clusters: Clusters,
    selection: Selection,
    policy: Policy,
    settings: config.Train,
    learning: config.Embed,
    job: Job,
) -> Model:
    """The original: the model every later figure is measured against.

    A given model is taken as it is. The `self` encoder learns on from the curated items with the policy found for them, and is kept
    only when it tells held-out items apart at least as well as before (label-free: retrieval of an item by another view of it).
    """
    model = replace(vectors.model, head=clusters.head)
    steps = settings.train_steps
    if model.source["kind"] != "self":
        return model
    kept = selection.column("keep") & (items.column("split") == "train")
    ids, groups = items.column("id")[kept], clusters.column("cluster")
    own = groups[kept]
    if steps is None:
        steps = (learning.self_steps or default_steps(len(ids), learning.batch_size)) // 2
    if not steps:
        return model
    network, preprocess = sources.network(model), model.preprocess
    objective = learning.objectives[-1]
    before = retrieval(network, items, preprocess, policy, job)
    curve = learn(network, items, ids, preprocess, policy, groups, steps, learning, job, objective)
    after = retrieval(network, items, preprocess, policy, job)
    said = f"held-out items found by another view of themselves: {before:.1%} before, {after:.1%} after"
    if after < before:
        job.say(f"training on with the found policy did not help ({said}); the first encoder is kept")
        return model
    job.say(said)
    step = f"{steps} further steps ({objective}) on {len(ids)} curated items ({said})"
    head = refit_head(embeddings_of(network, items, ids, preprocess, job), own, clusters.head)
    return replace(model, state=network.state_dict(), head=head, lineage=(*model.lineage, step), signals=curve)


def embeddings_of(network: Network, items: Items, ids: np.ndarray, preprocess: Preprocess, job: Job) -> np.ndarray:
    """Embeddings (n, d) float32 of items as they are."""
    with Loader(items, preprocess, workers=job.workers) as loader, torch.no_grad():
        stream = loader.stream(np.array_split(ids, -(-len(ids) // 128)))
        return np.concatenate([network(as_input(images, preprocess))[0].numpy() for _, images in stream])


def retrieval(network: Network, items: Items, preprocess: Preprocess, policy: Policy, job: Job) -> float:
    """Share of held-out items whose nearest neighbour (cosine) among other views of all of them is a view of themselves."""
    with Loader(items, preprocess, workers=job.workers) as loader:
        pair = _views(loader.batch(held_out(items, job)), policy, None, preprocess, job, "retrieval")
    with torch.no_grad():
        first, second = (torch.nn.functional.normalize(network(view)[0], dim=1) for view in pair)
    return float(((first @ second.T).argmax(1) == torch.arange(len(first))).float().mean())
