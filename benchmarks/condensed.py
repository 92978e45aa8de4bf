"""Does a condensed set train a student as well as all of it? Distillation without labels; hidden labels only judge.

    python benchmarks/condensed.py [--cifar FOLDER --model resnet_cifar.py:resnet56 --weights resnet56.safetensors] [--clothing FOLDER --hf FOLDER]
        [--sets cifar tail copies clothing] [--shares 0.5 0.1] [--methods k-centre …] [--seeds 5] [--items 4000] [--judged 3000] [--steps 1000]
        [--lengths steps epochs] [--cache FOLDER] [--threads 1] [--out FILE.json]

cifar: as many images of every class, from FOLDER/train/CLASS, judged on images of FOLDER/test. tail: a long tail of them, class sizes falling
geometrically to a fiftieth. copies: a third of the images, each in up to eight forms: moved, re-encoded, darker. clothing: a folder with photos/ and
labels.csv, a third of it judged on. The teacher of the first three is `--model`, that of clothing a transformers folder.

attar runs on the training images as on any folder, and curates them. A student (attar's small encoder, 32 x 32, with linear maps to the teacher's
embedding and logits) learns the teacher's answers on moved and mirrored views by attar's distillation loss. Arms:

- all: every training item of the run;
- the core set of the share, by each method, drawn by its weights as attar draws: half by weight, half evenly over clusters;
- half: as many items as the share allows, drawn at random;
- each for as many steps as `all`, and for as many epochs, that is for a share of the steps.

The seed decides the student's first weights, the batches, the core set and the random subset; the arms share it. Judged on the held-out images: by
hidden labels (the student's class; for clothing the vote of the ten training items nearest in its embedding) and by the distillation loss.
Differences are paired by seed and item; their 95 % intervals count both as drawn at random (stats.crossed). Seconds are of training alone.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import workloads
from environment import record
from PIL import Image, ImageChops, ImageEnhance
from torch import Tensor, nn

import attar
from attar import config
from attar.modalities.image import Loader
from attar.models import sources
from attar.models.objectives import distillation
from attar.models.students import Encoder
from attar.records import Preprocess, Selection
from attar.stages.compress.feed import drawing_share, nudged
from attar.stages.curate.coreset import METHODS
from attar.stages.curate.curate import curate
from attar.stats import crossed, knn_vote
from attar.workspace import Job

SIDE, WIDTH, BATCH, RATE = 32, 16, 64, 2e-3
STEM_SIDE = 48  # the encoder as it is for this side: its strided stem makes a step four times cheaper
TAIL, COPIES, NEIGHBOURS = 50, 8, 10


class Answered(NamedTuple):
    """Images at the student's size, with the teacher's answers and the hidden labels."""

    images: Tensor  # (n, 3, SIDE, SIDE)
    embedding: Tensor
    logits: Tensor
    labels: np.ndarray

    def rows(self, index: np.ndarray) -> Answered:
        chosen = torch.from_numpy(index)
        return Answered(self.images[chosen], self.embedding[chosen], self.logits[chosen], self.labels[index])


class Workload(NamedTuple):
    name: str
    run: Any  # attar's, on the training images
    train: Answered  # in the order of the run's items
    held: Answered
    by_vote: bool  # judged by neighbours in the embedding, as the teacher's classes are not those of the labels


def write_files(pairs: Sequence[tuple[Path, str]], folder: Path, forms: Mapping[int, Sequence[int]] | None = None) -> None:
    """Links to the files as folder/NUMBER CLASS.jpg; `forms` says in which forms a file is to be there, by default as it is (form 0)."""
    folder.mkdir(parents=True)
    for number, (path, label) in enumerate(pairs):
        for form in (forms or {}).get(number, (0,)):
            name = folder / f"{number:06d}-{form} {label}.jpg"
            if form:
                image = Image.open(path).convert("RGB")
                image = ImageChops.offset(image, form % 3 - 1, form // 3 - 1)
                ImageEnhance.Brightness(image).enhance(1 - 0.02 * form).save(name, quality=95 - form)
            else:
                name.symlink_to(path.resolve())


def cifar_files(
    name: str, folder: Path, items: int, rng: np.random.Generator
) -> tuple[list[tuple[Path, str]], dict[int, list[int]] | None]:
    """Training files with their class, and the forms in which each is there."""
    classes = sorted(path.name for path in (folder / "train").iterdir())
    files = {label: rng.permutation(sorted((folder / "train" / label).glob("*.jpg"))).tolist() for label in classes}
    counts = np.full(len(classes), items / len(classes) / (3 if name == "copies" else 1))
    if name == "tail":
        counts = TAIL ** (-np.arange(len(classes)) / (len(classes) - 1))
        counts *= items / counts.sum()
    pairs = [(path, label) for label, count in zip(classes, counts) for path in files[label][: round(count)]]
    if name != "copies":
        return pairs, None
    repeats = np.minimum(rng.geometric(1 / 3, len(pairs)), COPIES)
    return pairs, {number: list(range(repeat)) for number, repeat in enumerate(repeats.tolist())}


def prepare(name: str, given: argparse.Namespace, until: str = "cluster") -> Workload:
    """The files of a set in the cache, attar's run on them to the stage `until`, and what the teacher says."""
    rng, home = np.random.default_rng(0), given.cache / f"condensed-{name}-{given.items}-{given.judged}"
    if not home.exists():
        part = home.with_suffix(".part")
        forms = None
        if name == "clothing":
            with (given.clothing / "labels.csv").open(encoding="utf-8") as stream:
                pairs = [(given.clothing / "photos" / row["path"], row["label"].replace("/", " ")) for row in csv.DictReader(stream)]
            pairs = [pairs[row] for row in rng.permutation(len(pairs))]
            held, pairs = pairs[: len(pairs) // 3], pairs[len(pairs) // 3 :]
        else:
            pairs, forms = cifar_files(name, given.cifar, given.items, rng)
            tests = sorted((given.cifar / "test").glob("*/*.jpg"))
            held = [(tests[row], tests[row].parent.name) for row in rng.permutation(len(tests))[: given.judged]]
        write_files(pairs, part / "train", forms)
        write_files(held, part / "held")
        part.rename(home)
    model = {"model": f"hf:{given.hf}"} if name == "clothing" else {"model": given.model, "weights": str(given.weights)}
    shares = {"test_share": 0.01, "validation_share": 0.01, "workers": given.threads}  # others are judged on: nearly all is to learn from
    run = attar.run(home / "train", until=until, out=str(home / "run"), **model, **shares)
    seen = attar.run(home / "held", until="embed", out=str(home / "seen"), **model, **shares)
    classes = sorted({path.stem.split(" ", 1)[1] for part in ("train", "held") for path in (home / part).iterdir()})
    return Workload(name, run, answered(run, classes), answered(seen, classes), name == "clothing")


def answered(run: Any, classes: Sequence[str]) -> Answered:
    items, vectors = run["scan"], run["embed"]
    with Loader(items, Preprocess(size=(SIDE, SIDE), resize_shortest=SIDE)) as loader:
        pixels = np.concatenate([images for _, images in loader.stream(np.array_split(items.ids(), -(-len(items) // 256)))])
    network = sources.network(vectors.model)
    layer = network.body.get_submodule(network.classifier)
    embedding = torch.from_numpy(vectors.rows(items.ids()))
    with torch.no_grad():
        logits = layer(embedding)
    labels = np.array([classes.index(Path(path).stem.split(" ", 1)[1]) for path in items.column("path")])
    return Answered(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, embedding, logits, labels)


class Student(nn.Module):
    def __init__(self, embedding: int, logits: int) -> None:
        super().__init__()
        self.encoder = Encoder(STEM_SIDE, WIDTH)
        self.match, self.top = (nn.Linear(self.encoder.dim, width) for width in (embedding, logits))

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.encoder(views)
        return self.match(seen), self.top(seen)


Lesson = Callable[[np.ndarray, np.random.Generator], tuple[Tensor, tuple[Tensor, Tensor]]]
"""From rows of the training items to views (n, 3, SIDE, SIDE) of them and the teacher's (embedding, logits)."""


def moved(data: Answered) -> Lesson:
    """Moved and mirrored views, with the teacher's answers to the items as they are."""

    def lesson(rows: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        batch = data.rows(rows)
        return nudged(batch.images, True, rng), (batch.embedding, batch.logits)

    return lesson


def learn(data: Answered, share: np.ndarray, steps: int, seed: int, lesson: Lesson | None = None) -> tuple[Student, float]:
    """A student of the items drawn by `share`, taught by `lesson` (by default `moved`), and the seconds it took."""
    lesson = lesson or moved(data)
    torch.manual_seed(seed)
    student = Student(data.embedding.shape[1], data.logits.shape[1]).to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(student.parameters(), lr=RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, steps, pct_start=0.1)
    started = time.perf_counter()
    for step in range(steps):
        rng = np.random.default_rng([seed, step])
        views, answers = lesson(rng.choice(len(share), BATCH, p=share), rng)
        loss = distillation(student(views), answers)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimiser.step()
        schedule.step()
    return student.eval(), time.perf_counter() - started


def outputs(student: Student, images: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        parts = [student(part) for part in images.split(256)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def judge(student: Student, work: Workload) -> dict[str, np.ndarray]:
    """Of every held-out item: whether the student's decision is the hidden label, and its distillation loss."""
    embedding, logits = outputs(student, work.held.images)
    difference = logits - work.held.logits
    loss = 0.5 * (difference - difference.mean(1, keepdim=True)).square().mean(1) + 1 - F.cosine_similarity(embedding, work.held.embedding)
    loss += (embedding - work.held.embedding).square().mean(1) / work.held.embedding.square().mean()
    decision = logits.argmax(1).numpy()
    if work.by_vote:
        known, seen = (F.normalize(part, dim=1) for part in (outputs(student, work.train.images)[0], embedding))
        decision = knn_vote(work.train.labels, (seen @ known.T).topk(NEIGHBOURS).indices.numpy())
    return {"accuracy": (decision == work.held.labels).astype(float), "loss": loss.numpy().astype(float)}


def select(work: Workload, share: float, method: str, seed: int, folder: Path) -> Selection:
    """attar's curation of the run, with a seed of its own."""
    count = int((work.run["scan"].column("split") == "train").sum())
    settings = config.Curate(keep_items=round(share * count), core_method=method)
    job = Job("curate", folder / f"{work.name}-{share}-{method}-{seed}", seed=seed, quiet=True)
    return curate(work.run["scan"], work.run["embed"], work.run["cluster"], settings, job)


def spread_over(weight: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    """How often every item is drawn, by attar's rule; 0 for items of weight 0."""
    share = np.zeros(len(weight))
    share[weight > 0] = drawing_share(weight[weight > 0], cluster[weight > 0])
    return share


def arms(work: Workload, given: argparse.Namespace, seed: int, folder: Path) -> dict[tuple[float, str], np.ndarray]:
    """Weights of the items, by share and arm."""
    train = work.run["scan"].column("split") == "train"
    found = {(1.0, "all"): train.astype(float)}
    for share in given.shares:
        for method in given.methods:
            chosen = select(work, share, method, seed, folder)
            found[share, method] = np.where(train, chosen.column("weight"), 0.0)
        half = np.random.default_rng([seed, 1]).permutation(np.flatnonzero(train))[: round(share * train.sum())]
        found[share, "half"] = np.isin(np.arange(len(train)), half).astype(float)
    return found


def compare(work: Workload, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Every arm: figures by seed, and its paired differences to `all` and to the random subset of its share and steps."""
    cluster = work.run["cluster"].column("cluster")
    found: dict[tuple[float, str, int], list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(given.seeds):
            for (share, arm), weight in arms(work, given, seed, Path(folder)).items():
                lengths = {"steps": given.steps, "epochs": round(share * given.steps)}
                for steps in dict.fromkeys(lengths[name] for name in given.lengths):
                    student, seconds = learn(work.train, spread_over(weight, cluster), steps, seed)
                    judged = judge(student, work) | {"seconds": seconds, "kept": int((weight > 0).sum())}
                    found.setdefault((share, arm, steps), []).append(judged)
                    said = f"accuracy {100 * judged['accuracy'].mean():.2f}, loss {judged['loss'].mean():.3f}"
                    workloads.say(f"{work.name}, seed {seed}, {arm} of {share:g}, {steps} steps: {said}, {seconds:.0f} s")
    rows = []
    for (share, arm, steps), own in found.items():
        row: dict[str, Any] = {"set": work.name, "arm": arm, "share": share, "steps": steps, "kept": [one["kept"] for one in own]}
        row["seconds"] = [one["seconds"] for one in own]
        for figure in ("accuracy", "loss"):
            row[figure] = [float(one[figure].mean()) for one in own]
            for name, other in (("all", found[1.0, "all", given.steps]), ("half", found.get((share, "half", steps)))):
                if other is not None and other is not own and len(own) > 1:
                    row[f"{figure} - {name}"] = crossed(np.stack([a[figure] - b[figure] for a, b in zip(own, other)]))
        rows.append(row)
    return rows


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    def interval(row: Mapping[str, Any], key: str, scale: float, digits: int) -> str:
        return "{:+.{d}f} ({:+.{d}f} … {:+.{d}f})".format(*(scale * value for value in row[key]), d=digits) if key in row else "–"

    return workloads.table(
        [
            {
                "set": row["set"],
                "arm": f"{row['arm']} {row['share']:g}",
                "kept": f"{np.mean(row['kept']):.0f}",
                "steps": row["steps"],
                "seconds": workloads.shown(row["seconds"], 1),
                "accuracy %": workloads.shown([100 * value for value in row["accuracy"]]),
                "against all": interval(row, "accuracy - all", 100, 2),
                "against half": interval(row, "accuracy - half", 100, 2),
                "loss": workloads.shown(row["loss"], 3),
                "loss against all": interval(row, "loss - all", 1, 3),
                "loss against half": interval(row, "loss - half", 1, 3),
            }
            for row in rows
        ]
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--cifar", type=Path, help="folder with train/CLASS/*.jpg and test/CLASS/*.jpg")
    arguments.add_argument("--model", help="FILE.py:BUILDER of the teacher for it")
    arguments.add_argument("--weights", type=Path)
    arguments.add_argument("--clothing", type=Path, help="folder with photos/ and labels.csv (columns path,label)")
    arguments.add_argument("--hf", type=Path, help="transformers folder of the teacher for it")
    arguments.add_argument(
        "--sets", nargs="+", choices=("cifar", "tail", "copies", "clothing"), default=["cifar", "tail", "copies", "clothing"]
    )
    arguments.add_argument("--shares", nargs="+", type=float, default=[0.5])
    arguments.add_argument("--methods", nargs="+", choices=list(METHODS), default=[config.Curate().core_method])
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("--items", type=int, default=4000)
    arguments.add_argument("--judged", type=int, default=3000)
    arguments.add_argument("--steps", type=int, default=1000)
    arguments.add_argument("--lengths", nargs="+", choices=("steps", "epochs"), default=["steps", "epochs"])
    arguments.add_argument("--cache", type=Path, default=workloads.CACHE)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    given.cache.mkdir(parents=True, exist_ok=True)
    rows = [row for name in given.sets for row in compare(prepare(name, given), given)]
    print(report(rows))
    record(given, rows=rows)


if __name__ == "__main__":
    main()
