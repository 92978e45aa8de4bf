"""Whether samples help: pairs of small students follow the encoder, one of each with samples in its batches, judged on held-out items.

No label and nothing of the samples' making is looked at, so "no measurable difference" and "worse" come out as readily as "helps".
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from attar import config
from attar.models.network import Network, count_macs
from attar.models.students import Encoder
from attar.records import Preprocess
from attar.stages.augment.mix import mix
from attar.stages.augment.samples import with_samples
from attar.stages.compress.distil import MIXED_FROM
from attar.stages.compress.feed import nudged
from attar.stages.encode import as_input
from attar.stats import crossed
from attar.workspace import Job

BATCH = 32
SEEDS = 5
"""Pairs of students."""
STUDENT_WIDTH, STUDENT_RATE = 8, 2e-3
CHECKING = 0.4
"""Share of the minutes of a generator that its check gets."""
COMPUTE = 2e12
"""Multiply-accumulates of a check without minutes."""


def encoded(network: Network, images: UInt8[np.ndarray, "n h w 3"], preprocess: Preprocess) -> Float[np.ndarray, "n d"]:
    """Embeddings of a model's inputs in bytes."""
    network.eval()
    with torch.no_grad():
        parts = [network(as_input(images[start : start + 64], preprocess))[0].numpy() for start in range(0, len(images), 64)]
    return np.concatenate(parts)


class Lessons(NamedTuple):
    """What the students of a check learn from."""

    teacher: Network
    preprocess: Preprocess
    pictures: Callable[[np.ndarray], np.ndarray]  # rows (b,) of the training items → their inputs (b, h, w, 3) uint8
    share: np.ndarray  # (n,) how often each training item is drawn, summing to 1
    samples: np.ndarray  # (m, h, w, 3) uint8, as inputs
    flips: bool


def check(lessons: Lessons, held: UInt8[np.ndarray, "m h w 3"], steps: int, job: Job) -> dict[str, Any]:
    """Whether samples help a small student follow the encoder: by how much its loss on held-out items falls, as a share, with a 95 % interval.

    Pairs of students start alike and see the same batches in the same views, but for the SHARE that samples take of one's. "helps" and "worse"
    are said where the interval leaves 0 out, "no measurable difference" where it does not.
    """
    target = encoded(lessons.teacher, held, lessons.preprocess)
    with job.progress(SEEDS * steps, "checking whether the samples help", "steps") as bar:
        losses = np.array([_kept_losses(lessons, held, target, steps, seed, job, bar) for seed in range(SEEDS)])  # seeds, arms, items
    gain, low, high = crossed((losses[:, 0] - losses[:, 1]) / losses[:, 0].mean())
    verdict = "helps" if low > 0 else "worse" if high < 0 else "no measurable difference"
    name = f"share of a student's loss on {len(held)} held-out items that the samples save in {steps} steps"
    return {"generated": name, "value": gain, "low": low, "high": high, "n": SEEDS, "verdict": verdict}


def _kept_losses(lessons: Lessons, held: np.ndarray, target: np.ndarray, steps: int, seed: int, job: Job, bar: Any) -> list[list[float]]:
    return job.once(f"check-{seed}.json", lambda: _losses(lessons, held, target, steps, seed, job, bar.update).tolist())


def _losses(
    lessons: Lessons, held: np.ndarray, target: np.ndarray, steps: int, seed: int, job: Job, tick: Callable[[int], object]
) -> Float[np.ndarray, "2 items"]:
    """Held-out loss per item of a student taught without samples and of its twin taught with them."""
    students = _twins(min(held.shape[1:3]), target.shape[1], job.rng("student", seed))
    optimisers = [torch.optim.AdamW(student.parameters(), STUDENT_RATE, weight_decay=1e-4) for student in students]
    warm, mixing = max(1, steps // 10), steps * BATCH >= MIXED_FROM * len(lessons.share)
    for step in range(steps):
        images = lessons.pictures(job.rng("check", seed, step).choice(len(lessons.share), BATCH, p=lessons.share))
        arms = images, with_samples(images, lessons.samples, job.rng("check samples", seed, step))
        for student, optimiser, arm in zip(students, optimisers, arms):
            for group in optimiser.param_groups:
                group["lr"] = STUDENT_RATE * min(1, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))
            views = nudged(as_input(arm, lessons.preprocess), lessons.flips, job.rng("check view", seed, step))
            views = mix(views, job.rng("check mix", seed, step)) if mixing else views
            with torch.no_grad():
                wanted = lessons.teacher(views)[0]
            loss = item_losses(student.train()(views)[0], wanted).mean()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        tick(1)
    answers = [torch.from_numpy(encoded(student, held, lessons.preprocess)) for student in students]
    return torch.stack([item_losses(answer, torch.from_numpy(target)) for answer in answers]).numpy()


def _twins(side: int, width: int, rng: np.random.Generator) -> list[Network]:
    """Two small encoders of equal weights whose embedding is as wide as the teacher's."""
    made, start = [], int(rng.integers(2**31))
    with torch.random.fork_rng():
        for _ in range(2):
            torch.manual_seed(start)
            encoder = Encoder(side, STUDENT_WIDTH)
            made.append(Network(nn.Sequential(encoder, nn.Linear(encoder.dim, width))))
    return made


def item_losses(answer: Float[Tensor, "items dim"], target: Float[Tensor, "items dim"]) -> Float[Tensor, " items"]:
    """Per item what objectives.distillation averages for embeddings: squared error over the targets' mean square, plus 1 − cosine."""
    error = (answer - target).square().mean(1) / target.square().mean().clamp_min(1e-12)
    return error + 1 - F.cosine_similarity(answer, target)


def check_steps(settings: config.Generate, lessons: Lessons, job: Job) -> int:
    """Steps of each pair of students: what the minutes leave at the measured pace, fixed once; else from the networks' size alone."""
    example = torch.zeros(1, 3, *lessons.preprocess.size)
    width = lessons.teacher(example)[0].shape[1]
    if settings.generate_minutes is None or settings.generate_steps is not None:
        student = _twins(min(lessons.preprocess.size), width, job.rng("size"))[0]
        macs = 2 * BATCH * (count_macs(lessons.teacher, example) + 3 * count_macs(student.eval(), example))
        return int(np.clip(COMPUTE / (SEEDS * macs), 20, 400))

    def fitting() -> int:
        held, seconds = lessons.samples[:2], []
        for _ in range(2):
            start = time.perf_counter()
            _losses(lessons, held, np.zeros((len(held), width), np.float32), 2, SEEDS, job, lambda _: None)
            seconds.append((time.perf_counter() - start) / 2)
        assert settings.generate_minutes is not None
        return int(np.clip(CHECKING * 60 * settings.generate_minutes / (SEEDS * min(seconds)), 20, 1000))

    return int(job.once("check-steps.json", fitting))
