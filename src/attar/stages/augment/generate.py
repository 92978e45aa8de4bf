"""Generated items (opt-in): a small GAN learns the kept training items, its samples are filtered, and a check says whether they help a student.

Training is exact under interruption: what a step draws depends on the seed and the step alone, and a checkpoint holds networks, optimisers and
the augmentation's strength.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, UInt8
from PIL import Image

from attar import config, formats
from attar.errors import DataError, ModelError
from attar.modalities.image import Loader
from attar.models import sources
from attar.models.network import Network
from attar.records import Clusters, Items, Policy, Preprocess, Selection, Vectors
from attar.stages.augment.benefit import Lessons, check, check_steps, encoded
from attar.stages.augment.generator import Gan, Generator, adapted, generate, overfitting, scaled, settle, take_step
from attar.stages.augment.samples import (
    ACCEPTED,
    BESIDE,
    COLLAPSED,
    SAMPLE_SCHEMA,
    TABLE,
    Known,
    Verdicts,
    accepted,
    contact_sheet,
    diversity,
    known,
    resized,
    to_input,
)
from attar.stages.compress.feed import drawing_share
from attar.stages.train import CHECKPOINT_SECONDS
from attar.stats import share_interval
from attar.workspace import Job

BATCH = 32
FEWEST = 32
"""Kept training items below which there is nothing to learn a distribution from."""
MEMORY = 256 << 20
"""Bytes of the decoded items a generator learns from; of more items a random part is taken."""
HELD = 512
"""Held-out items, at most, that overfitting and students are judged on."""
ADAPT_EVERY = 4
"""Steps between two looks at the overfitting signal."""
RISE = 0.25
"""Share of the training in which the strength of the augmentation could go from 0 to 1."""
SMOOTHING = 0.9
"""Decay of the running mean of the overfitting signal."""
USABLE = "enough to check"
DRAWN = 4
"""Samples drawn, at most, for each one that is wanted."""
USED = 0.05
"""Accepted share of the samples below which the generator is no good yet, and its samples are not used."""
TRAINING = 0.5
"""Share of the minutes that training gets; benefit.CHECKING is the check's, the rest is for reading, drawing and filtering."""


class Generated(NamedTuple):
    folder: Path
    """Accepted samples as NUMBER.png, samples.parquet (every sample drawn, SAMPLE_SCHEMA), sheet.png for people, training.json."""
    evidence: tuple[Mapping[str, Any], ...]
    """Rows for the policy: diversity, accepted share, and what the check found where it was made."""


class Material(NamedTuple):
    """What a generator and its check learn from and are judged on."""

    ids: np.ndarray  # kept training items
    own: np.ndarray  # their clusters
    share: np.ndarray  # how often each is drawn, summing to 1
    held: np.ndarray  # ids of held-out items
    flips: bool  # whether a mirror image is as good as the item


def material(items: Items, clusters: Clusters, selection: Selection, policy: Policy, job: Job) -> Material:
    """The kept items by their parts; raises DataError when there are too few."""
    split, kept, ids = items.column("split"), selection.column("keep"), items.column("id")
    train = kept & (split == "train")
    held = ids[kept & ~selection.column("leak") & (split == "validation")]
    if train.sum() < FEWEST or not len(held):
        raise DataError(
            f"generate: {train.sum()} kept training items and {len(held)} validation items; a generator needs at least {FEWEST} and 1; "
            "add items, or leave out --generate-minutes and --generate-steps"
        )
    held, own = np.sort(job.rng("held out").permutation(held)[:HELD]), clusters.column("cluster")[train]
    mirrors = [dial for name, dial in policy.families.items() if name in ("flip", "horizontal_flip")]
    flips = any(dial.strength > 0 and dial.frequency > 0 for dial in mirrors)
    return Material(ids[train], own, drawing_share(selection.column("weight")[train], own), held, flips)


def lessons(given: Material, network: Network, preprocess: Preprocess, loader: Loader, images: np.ndarray) -> Lessons:
    """The check's material, with these images (m, h, w, 3) as samples."""
    return Lessons(network, preprocess, lambda rows: loader.batch(given.ids[rows]), given.share, images, given.flips)


def generated(
    items: Items, vectors: Vectors, clusters: Clusters, selection: Selection, policy: Policy, settings: config.Generate, job: Job
) -> Generated | None:
    """Samples of a generator trained on the kept training items, with the evidence on them; None where none are asked for.

    Raises DataError for too few items, ModelError when training diverges.
    """
    if settings.generate_minutes is None and settings.generate_steps is None:
        return None
    given, network, preprocess = material(items, clusters, selection, policy, job), sources.network(vectors.model), vectors.model.preprocess
    side = settings.generate_side or fitting_side(items, preprocess)
    with Loader(items, preprocess, workers=job.workers) as loader:
        held, pool = loader.batch(given.held), np.sort(job.rng("pool").permutation(len(given.ids))[: MEMORY // (3 * side * side)])
        images, share = _read(loader, given.ids[pool], side, job), given.share[pool] / given.share[pool].sum()
        steps = _training_steps(settings, side, len(images), job)
        gan, curve = fit(images, resized(held, side), share, given.flips, steps, job)
        settle(gan.average, job.rng("settle"))
        real = known(vectors.rows(given.ids), clusters.head, job.rng("known"))
        samples, verdicts, diverse = select(gan.average, network, preprocess, real, settings.generate_count, job)
        beside = {number: loader.batch(given.ids[given.own == number][:BESIDE]) for number in np.unique(given.own).tolist()}
        folder = job.build("generated", lambda path: _write(path, samples, verdicts, given.ids, beside, curve))
        rows, good = _rows(verdicts, diverse), verdicts.mask
        if rows[-1]["verdict"] == USABLE:
            taught = lessons(given, network, preprocess, loader, to_input(samples[good], preprocess))
            rows.append(check(taught, held, check_steps(settings, taught, job), job))
    _say(rows, side, steps, curve, verdicts, job)
    return Generated(folder, tuple(rows))


def fitting_side(items: Items, preprocess: Preprocess) -> int:
    """The power of two, 32 to 128, at or above both the items' median shorter side and the encoder's input, whichever is less."""
    shorter = float(np.median(np.minimum(items.column("width"), items.column("height"))))
    return int(np.clip(2 ** math.ceil(math.log2(min(shorter, *preprocess.size))), 32, 128))


def _read(loader: Loader, ids: np.ndarray, side: int, job: Job) -> np.ndarray:
    """The items a generator learns from, as the encoder sees them, in its size."""
    parts: list[np.ndarray] = []
    with job.progress(len(ids), "reading items to generate from") as bar:
        for _, images in loader.stream(ids[start : start + 64] for start in range(0, len(ids), 64)):
            parts.append(resized(images, side))
            bar.update(len(images))
    return np.concatenate(parts)


# training


def fit(
    images: UInt8[np.ndarray, "n s s 3"],
    held: UInt8[np.ndarray, "m s s 3"],
    share: Float[np.ndarray, " n"],
    flips: bool,
    steps: int,
    job: Job,
) -> tuple[Gan, list[dict[str, Any]]]:
    """Trains a GAN for so many steps, from the last checkpoint if there is one; returns it with its curve.

    `share` (n,) is how often each image is drawn, summing to 1; where `flips`, half of the images are mirrored. Raises ModelError when a loss is
    not finite.
    """
    with torch.random.fork_rng():
        torch.manual_seed(job.seed)
        gan = Gan(images.shape[1])
    optimisers = gan.optimisers()
    state: dict[str, Any] = job.recall("generator.pt") or {"step": 0, "strength": 0.0, "signal": 0.0, "curve": []}
    if "gan" in state:
        gan.load_state_dict(state["gan"])
        for name, optimiser in optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
    strength, signal, curve, saved = state["strength"], state["signal"], list(state["curve"]), time.monotonic()
    with job.progress(steps, "training a generator", "steps", done=state["step"]) as bar:
        for step in range(state["step"], steps):
            rng = job.rng("generator", step)
            real = scaled(_mirrored(images[rng.choice(len(images), BATCH, p=share)], flips, rng))
            losses = take_step(gan, optimisers, real, strength, step, rng)
            if not all(map(math.isfinite, losses.values())):
                raise ModelError(
                    f"generator: {losses} at step {step}; its training diverged: take another --seed or fewer --generate-steps, or leave "
                    "--generate-minutes and --generate-steps out"
                )
            if step % ADAPT_EVERY == 0:
                others = scaled(_mirrored(held[rng.integers(0, len(held), BATCH)], flips, rng))
                signal = SMOOTHING * signal + (1 - SMOOTHING) * overfitting(gan, real, others, strength, rng)
                strength = adapted(strength, signal, ADAPT_EVERY / (RISE * steps))
            if (step + 1) % max(1, steps // 40) == 0 or step + 1 == steps:
                curve.append({"step": step + 1, **losses, "overfitting": signal, "strength": strength})
                bar.set_postfix({name: f"{value:.2f}" for name, value in curve[-1].items() if name != "step"}, refresh=False)
            bar.update(1)
            if step + 1 == steps or time.monotonic() - saved > CHECKPOINT_SECONDS:
                kept = {"gan": gan.state_dict(), "optimisers": {name: each.state_dict() for name, each in optimisers.items()}}
                job.remember("generator.pt", {"step": step + 1, "strength": strength, "signal": signal, "curve": curve} | kept)
                saved = time.monotonic()
    return gan, curve


def _mirrored(images: np.ndarray, flips: bool, rng: np.random.Generator) -> np.ndarray:
    turned = (rng.random(len(images)) < 0.5) & flips
    return np.where(turned[:, None, None, None], images[:, :, ::-1], images)


def _training_steps(settings: config.Generate, side: int, count: int, job: Job) -> int:
    """Steps as asked; else what fits the minutes at the measured pace, fixed once."""
    if settings.generate_steps is not None:
        return settings.generate_steps

    def fitting() -> int:
        with torch.random.fork_rng():
            gan = Gan(side)
        optimisers, seconds = gan.optimisers(), []
        real = torch.zeros(min(BATCH, count), 3, side, side)
        for step in range(4):
            start = time.perf_counter()
            take_step(gan, optimisers, real, 0.5, step, job.rng("pace", step))
            if step % ADAPT_EVERY == 0:
                overfitting(gan, real, real, 0.5, job.rng("pace"))
            seconds.append(time.perf_counter() - start)
        assert settings.generate_minutes is not None
        return max(1, int(TRAINING * 60 * settings.generate_minutes / min(seconds)))

    return int(job.once("generator-steps.json", fitting))


# samples


def select(
    model: Generator, network: Network, preprocess: Preprocess, judged: Known, wanted: int, job: Job
) -> tuple[np.ndarray, Verdicts, float]:
    """Samples drawn until so many are accepted, DRAWN times as many at most; verdicts on all of them, and their diversity.

    Of a generator that has collapsed nothing is accepted.
    """
    samples, embeddings = np.empty((0, 0, 0, 3), np.uint8), np.empty((0, 0), np.float32)
    for block in range(math.ceil(DRAWN * wanted / 256)):
        fresh = generate(model, min(256, DRAWN * wanted - len(samples)), job.rng("samples", block))
        vectors = encoded(network, to_input(fresh, preprocess), preprocess)
        samples, embeddings = (np.concatenate([samples, fresh]), np.concatenate([embeddings, vectors])) if block else (fresh, vectors)
        verdicts = accepted(embeddings, judged)
        if verdicts.mask.sum() >= wanted:
            break
    diverse = diversity(embeddings, judged, job.rng("diversity"))
    if diverse < COLLAPSED:
        verdicts = verdicts._replace(verdict=np.full(len(samples), "the generator collapsed", object))
    return samples, verdicts, diverse


def _write(
    folder: Path, samples: np.ndarray, verdicts: Verdicts, ids: np.ndarray, real: Mapping[int, np.ndarray], curve: list[dict[str, Any]]
) -> None:
    """The folder of Generated; the sheet shows what was accepted, or where nothing was, what was drawn."""
    folder.mkdir()
    good = verdicts.mask
    for number in np.flatnonzero(good):
        Image.fromarray(samples[number]).save(folder / f"{number:06d}.png")
    columns = verdicts._asdict() | {"sample": np.arange(len(samples)), "neighbour": ids[verdicts.neighbour]}
    arrays = [pa.array(columns[field.name], from_pandas=False).cast(field.type) for field in SAMPLE_SCHEMA]
    formats.write_table(folder / TABLE, pa.table(arrays, schema=SAMPLE_SCHEMA))
    shown = good if good.any() else np.ones(len(samples), bool)
    contact_sheet(samples[shown], verdicts.cluster[shown], real).save(folder / "sheet.png")
    formats.write_json(folder / "training.json", curve)


def _rows(verdicts: Verdicts, diverse: float) -> list[dict[str, Any]]:
    """Diversity and accepted share as evidence."""
    good, count = int(verdicts.mask.sum()), len(verdicts.verdict)
    low, high = share_interval(good, count)
    word = "collapsed" if diverse < COLLAPSED else "too few to use" if good < USED * count else USABLE
    return [
        {"generated": "effective rank of the samples, as a share of the items'", "value": diverse, "limit": COLLAPSED},
        {"generated": "accepted share of the samples", "value": good / count, "low": low, "high": high, "n": count, "verdict": word},
    ]


# what is said


def _say(rows: list[dict[str, Any]], side: int, steps: int, curve: list[dict[str, Any]], verdicts: Verdicts, job: Job) -> None:
    """The outcome in plain words."""
    last, count = curve[-1], len(verdicts.verdict)
    job.say(
        f"a generator of {side} × {side} images: {steps} steps, augmentation strength {last['strength']:.2f} at the end, samples of "
        f"{rows[0]['value']:.0%} of the items' effective rank"
    )
    if rows[0]["value"] < COLLAPSED:
        job.say(
            f"the generator collapsed: its samples are all alike (limit {COLLAPSED:.0%}); none are used; more --generate-minutes, more items or another --seed may help"
        )
        return
    refused = ", ".join(f"{number} {reason}" for reason, number in Counter(verdicts.verdict.tolist()).most_common() if reason != ACCEPTED)
    job.say(f"{int(verdicts.mask.sum())} of {count} generated samples accepted; refused: {refused or 'none'}")
    if len(rows) < 3:
        job.say(f"fewer than {USED:.0%} of the samples are accepted: they are not used; more --generate-minutes may help")
        return
    found = rows[2]
    said = {
        "helps": "generated samples help; distillation may use them",
        "worse": "generated samples make a student worse; they are not used",
        "no measurable difference": "generated samples do not measurably help; they are not used",
    }
    job.say(
        f"{said[found['verdict']]}: a student's loss on held-out items changes by {-found['value']:+.1%} (95 % interval {-found['high']:+.1%} "
        f"to {-found['low']:+.1%}, {found['n']} seeds)"
    )
