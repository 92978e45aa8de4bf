"""Distillation: a student is trained to give its teacher's outputs on augmented, erased and mixed, unlabelled inputs.

The views come round again: the teacher is asked about each once, in the first lap, and its answers are kept, for it often costs more than the
student. In that lap the student is taught the teacher's maps between blocks as well; their weight falls to nothing, but for the last map, which is
part of the answer. What is delivered is the mean of the weights over the last steps.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from attar import config
from attar.models.network import Network
from attar.models.objectives import distillation
from attar.stages.augment.mix import mix
from attar.stages.compress.clock import Clock
from attar.stages.compress.feed import Feed, erased, is_image, piece
from attar.stages.compress.mimicry import Taps, comparable, feature_distance
from attar.stages.train import optimise
from attar.workspace import Job

Answer = tuple[Tensor, Tensor | None]
"""Embeddings and, of a classifier, logits."""
LIVE_RATE, FOLDED_RATE = 2e-3, 3e-4
"""Peak learning rates of AdamW: where batch norms keep the student steady, and where there are none to do so."""
FULL_RATE_FROM = 400
"""Steps from which on the rate with batch norms may be the full one; below, it falls with their root: a high rate first undoes what the repair gave, and a few steps do not bring it back."""
FULL_RATE_AT = 0.2
"""Share of the teacher's variance that the student misses from which on the rate may be the full one; below, it falls with the share, to LEAST_RATE: what is nearly right is not thrown away."""
LEAST_RATE = 0.1
"""Share of the full rate that is left to the shortest training and the best student."""
MIXED_FROM = 100
"""Times every item is seen from which on mixtures are asked about as well: a few items want variety, of many there is enough."""
MIXED_UNTIL = 0.8
"""Share of the steps after which there are no mixtures any more: the student ends on items as they are."""
ERASED_FROM = 20
"""Times every item is seen from which on a square of half of the images is erased: more variety than moving and mirroring can give."""
LAPS = 3
"""Times each view is shown."""
AVERAGED = 0.1
"""Share of the steps that the mean of the weights goes back."""
KEPT_BYTES = 1 << 30
"""What the teacher's answers may take; about views beyond that it is asked again. The last maps are kept where there is room for all of them."""
LEAST_BATCH = 16
"""Items below which the statistics of a batch are too rough to normalise with."""


class Said(NamedTuple):
    """What the teacher said of some views."""

    answer: Answer
    last: Tensor | None
    """Its last comparable map, where that is kept, in bfloat16, which holds numbers of any size."""


class Sayings:
    """What a teacher says of views, asked once for each key as long as there is room to keep it."""

    def __init__(self, teacher: Network, maps: Mapping[str, Tensor], last: str | None, room: int) -> None:
        """`maps` are the teacher's of its last pass; `room` is the number of views."""
        self._teacher, self._maps, self._last, self._room = teacher, maps, last, room
        self._known: dict[Any, Said] = {}

    def __call__(self, key: Any, views: Tensor) -> Said:
        if (found := self._known.get(key)) is None:
            with torch.no_grad():
                answer = self._teacher(views)
            found = Said(answer, self._maps[self._last].bfloat16() if self._last else None)
            if len(views) <= self._room:
                self._known[key], self._room = found, self._room - len(views)
        return found


def answer_of(network: Network, inputs: Tensor, size: int) -> Answer:
    """What a network gives for inputs, computed in pieces of at most `size`."""
    made = [network(part) for part in pieces(inputs, size)]
    logits = [part[1] for part in made if part[1] is not None]
    return torch.cat([part[0] for part in made]), torch.cat(logits) if logits else None


def piece_of(feed: Feed, size: int, norms: Sequence[nn.Module]) -> int:
    """Items of a batch of `size` that are computed at once: where norms learn from them, enough for that."""
    return max(piece(feed.example(), size), min(size, LEAST_BATCH) if norms else 1)


def pieces(views: Tensor, size: int) -> tuple[Tensor, ...]:
    """A batch in pieces of about equal size, at most `size`."""
    return views.chunk(-(-len(views) // size))


def live_norms(student: nn.Module, size: int) -> list[nn.modules.batchnorm._BatchNorm]:
    """Batch norms that may go on learning their statistics from batches of `size` items.

    Models from the hub come with norms that were folded away (mean 0, variance 1): statistics of a batch would destroy them.
    """
    norms = [layer for layer in student.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is not None]
    folded = all(float(norm.running_mean.abs().max()) < 1e-6 for norm in norms)  # type: ignore[union-attr]
    return [] if folded or size < LEAST_BATCH else norms


def settle(network: nn.Module, norms: Sequence[nn.modules.batchnorm._BatchNorm], batches: Iterable[Tensor]) -> None:
    """Gives batch norms the statistics that their inputs have in batches of inputs, and weights with which the network computes what it did.

    A cut that was repaired is a function of its old statistics. In training the norms take those of the batch: where these differ, the first
    step would begin from another function, and the repair would be lost.
    """
    seen: dict[nn.modules.batchnorm._BatchNorm, list[Tensor]] = {norm: [] for norm in norms if norm.affine}

    def note(norm: nn.modules.batchnorm._BatchNorm, given: tuple[Tensor, ...]) -> None:
        rows = given[0].movedim(1, 0).flatten(1).double()
        seen[norm].append(torch.stack([rows.mean(1), rows.square().mean(1)]))

    handles = [norm.register_forward_pre_hook(note) for norm in seen]
    with torch.no_grad():
        for batch in batches:
            network(batch)
        for handle in handles:
            handle.remove()
        for norm, parts in seen.items():
            old_mean, old_variance = norm.running_mean, norm.running_var
            if not parts or old_mean is None or old_variance is None:
                continue
            mean, square = torch.stack(parts).mean(0)
            variance = (square - mean.square()).clamp_min(0)
            old = (old_variance.double() + norm.eps).sqrt()
            norm.bias.add_(norm.weight * (mean - old_mean) / old)
            norm.weight.mul_((variance + norm.eps).sqrt() / old)
            old_mean.copy_(mean)
            old_variance.copy_(variance)


def missed(student: Answer, teacher: Answer) -> float:
    """Share of the variance of the teacher's logits, (n, k), of its embeddings where it has none, that the student does not give: 0 where it gives all.

    >>> logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> missed((logits, logits), (logits, logits)), missed((logits, torch.full((2, 2), 0.5)), (logits, logits))
    (0.0, 1.0)
    """
    given, wanted = (student[1], teacher[1]) if student[1] is not None and teacher[1] is not None else (student[0], teacher[0])
    return float((given - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum().clamp_min(1e-12))


def peak_rate(steps: int, share: float) -> float:
    """Peak learning rate with live batch norms, by the number of steps and the share of the teacher that the student misses before the first.

    >>> peak_rate(400, 0.5), peak_rate(100, 0.5), peak_rate(3000, 0.05), peak_rate(3000, 0.0)
    (0.002, 0.001, 0.0005, 0.0002)
    """
    return LIVE_RATE * max(LEAST_RATE, min(1.0, math.sqrt(steps / FULL_RATE_FROM), share / FULL_RATE_AT))


def distil(
    student: Network,
    teacher: Network,
    feed: Feed,
    steps: int,
    settings: config.Compress,
    job: Job,
    label: str,
    clock: Clock | None = None,
) -> tuple[dict[str, float], ...]:
    """Trains a student in place to give its teacher's outputs on training inputs, augmented by the feed and mixed here.

    Everything but the batch norms stays in evaluation mode (no dropout). `clock`, where given, says at every look how many steps there are
    in all, from `steps` on. Returns the curve: step, loss, validation loss.
    """
    student.eval()
    size = min(settings.distil_batch, feed.count)
    held, norms = feed.held_out(), live_norms(student, size)
    at_once = piece_of(feed, size, norms)
    if norms:
        settle(student, norms, feed.calibration(settings.calibration_items, at_once))
    names = comparable(student, teacher, feed.example(2))
    ours, theirs = Taps(student, names), Taps(teacher, names)
    with torch.no_grad():
        target = answer_of(teacher, held, at_once)
        rate = peak_rate(steps, missed(answer_of(student, held, at_once), target)) if norms else FOLDED_RATE
    looks, momenta, lap = steps * size / feed.count, [norm.momentum for norm in norms], first_lap(steps)
    mixing, erasing = MIXED_UNTIL if looks >= MIXED_FROM else 0.0, looks >= ERASED_FROM and is_image(held)
    answer = sum(part[:1].nbytes for part in target if part is not None)
    last = sum(2 * theirs.maps[name][:1].numel() for name in names[-1:])
    lasting = bool(names) and lap * size * (answer + last) <= KEPT_BYTES
    ask = Sayings(teacher, theirs.maps, names[-1] if lasting else None, KEPT_BYTES // max(1, answer + last * lasting))

    def loss_on(views: Tensor, said: Said, step: int) -> Tensor:
        loss = distillation(student(views), said.answer)
        if names and step < lap:
            maps = [[taps.maps[name] for name in names] for taps in (ours, theirs)]
            loss = loss + (1 - step / lap) * feature_distance(*maps)
        if said.last is not None:
            loss = loss + feature_distance([ours.maps[names[-1]]], [said.last.float()])
        return loss

    def loss_of(step: int, _: np.ndarray, views: np.ndarray | Tensor) -> Tensor:
        assert isinstance(views, Tensor)
        place, mixed = step % lap, step < mixing * (clock.total(step) if clock else steps)
        plain = erased(views, job.rng("erase", place)) if erasing else views
        asked = mix(plain, job.rng("mix", place)) if mixed else plain
        for norm, momentum in zip(norms, momenta):
            norm.train()
            norm.momentum = momentum if asked is plain else 0.0  # what is normal is learned from items, not from mixtures
        total = torch.zeros(())
        for number, part in enumerate(parts := pieces(asked, at_once)):
            loss = len(part) / len(asked) * loss_on(part, ask((place, mixed, number), part), step)
            if number + 1 < len(parts):  # the loop does the last one
                loss.backward()  # type: ignore[no-untyped-call]
                loss = loss.detach()
            total = total + loss
        return total

    def look() -> dict[str, float]:
        student.eval()
        with torch.no_grad():
            return {"validation_loss": round(float(distillation(answer_of(student, held, at_once), target)), 5)}

    def stream(wanted: range) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        for start in range(wanted.start // lap * lap, wanted.stop, lap):
            places = range(max(wanted.start - start, 0), min(wanted.stop - start, lap))
            for place, views in feed.training(places, size):
                yield start + place, np.empty(0), views  # type: ignore[misc]

    try:
        return optimise(
            nn.ModuleDict({"student": student}), rate, steps, stream, loss_of, look, job, label, recount=clock, averaged=AVERAGED
        )
    finally:
        student.eval()
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        ours.close()
        theirs.close()


def first_lap(steps: int) -> int:
    """Steps in which views are shown for the first time."""
    return max(1, -(-steps // LAPS))


def pace(student: Network, teacher: Network, feed: Feed, settings: config.Compress) -> tuple[float, float]:
    """Seconds of one distillation step in the first lap and of one after it, when the teacher is not asked any more: each part the best of eight
    on a copy; reading the inputs is part of both."""
    size = min(settings.distil_batch, feed.count)
    trial, parts, start = copy.deepcopy(student), [], time.perf_counter()
    norms = live_norms(trial, size)
    at_once = piece_of(feed, size, norms)
    for norm in norms:
        norm.train()
    for _, views in feed.training(range(8), size):
        read = time.perf_counter()
        with torch.no_grad():
            wanted = [teacher(part) for part in pieces(views, at_once)]
        asked = time.perf_counter()
        for part, answer in zip(pieces(views, at_once), wanted):
            distillation(trial(part), answer).backward()  # type: ignore[no-untyped-call]
        end = time.perf_counter()
        parts.append((end - asked + read - start, asked - read))
        start = end
    learning, asking = (min(part) for part in zip(*parts))
    return learning + asking, learning
