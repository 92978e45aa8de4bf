"""Does a ranking without labels find what labels would? Every policy trains encoders from scratch; hidden labels only judge.

    python benchmarks/policies.py mnist=MNIST.npz cifar=CIFAR/train clothing=CLOTHING [--steps 100] [--seeds 2 1 1] [--items 3000]
        [--judged 2000] [--side 32] [--out FILE.json]

A data set is NAME=PATH: an .npz file with images and labels, a folder of class folders, or a folder with photos/ and labels.csv (columns
path,label). Every policy of the search gets all the seeds, so that each has a truth: the mean of a linear and a 10-nearest-neighbour probe with the
labels, on items the encoder never saw. From the same encoders: Spearman's correlation of each yardstick with the truth, over the policies; and the
search as it is run, round by round, whose pick is compared with the best by labels. Beside them what a yardstick could
reach that knew the policies without error, since the truth, taken from a few encoders, is noisy itself.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import workloads
from environment import record
from PIL import Image
from scipy.stats import spearmanr

from attar.stages.augment import ranking, search, yardsticks
from attar.stages.augment.policy import MIRROR_LIMIT, mirror_accuracy
from attar.stats import bootstrap, knn_vote


class Labelled(NamedTuple):
    """Images (n, side, side, 3) uint8 and labels (n,) from 0: to learn from and, unseen by the encoders, to judge on."""

    train: np.ndarray
    train_labels: np.ndarray
    held: np.ndarray
    held_labels: np.ndarray


def square(file: Path, side: int) -> np.ndarray:
    """The middle square of a file at a side."""
    with Image.open(file) as image:
        image.draft("RGB", (2 * side, 2 * side))
        rgb = image.convert("RGB")
    short = min(rgb.size)
    left, top = (rgb.width - short) // 2, (rgb.height - short) // 2
    return np.asarray(rgb.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.BILINEAR))


def read(path: Path, side: int, items: int, judged: int, seed: int = 0) -> Labelled:
    """At most `items` to learn from and `judged` others; a third of a small set is judged on."""
    rng = np.random.default_rng(seed)
    if path.suffix == ".npz":
        with np.load(path) as found:
            arrays = [found[name] for name in found.files]
        images = next(array for array in arrays if array.ndim >= 2)
        names = next(array for array in arrays if array.ndim == 1 and len(array) == len(images))
        chosen = rng.permutation(len(images))[: items + judged]
        shape = images.shape[1:3] if images.ndim > 2 else (round(images.shape[1] ** 0.5),) * 2
        grey = images[chosen].reshape(len(chosen), *shape, -1)
        pictures = np.stack([np.asarray(Image.fromarray(np.repeat(one, 3 // one.shape[2], 2)).resize((side, side), 2)) for one in grey])
        names = names[chosen]
    else:
        table = path / "labels.csv"
        if table.is_file():
            with table.open(encoding="utf-8") as stream:
                pairs = [(path / "photos" / row["path"], row["label"]) for row in csv.DictReader(stream)]
            pairs = [pair for pair in pairs if pair[0].is_file()]
        else:
            pairs = [(file, file.parent.name) for file in sorted(path.glob("*/*")) if file.suffix.lower() in (".jpg", ".png")]
        if not pairs:
            raise SystemExit(f"{path}: neither an .npz file, nor CLASS/*.jpg inside, nor photos/ and labels.csv")
        pairs = [pairs[index] for index in rng.permutation(len(pairs))[: items + judged]]
        pictures = np.stack([square(file, side) for file, _ in pairs])
        names = np.array([name for _, name in pairs])
    labels = np.unique(names, return_inverse=True)[1]
    cut = min(items, len(labels) - min(judged, len(labels) // 3))
    return Labelled(pictures[:cut], labels[:cut], pictures[cut:], labels[cut:])


def truth(network: Any, data: Labelled) -> dict[str, float]:
    """Accuracy of both probes on the held-out items, fitted to at most 2,000 of the others."""
    known, labels = search.embed(network, data.train[:2000]).numpy(), data.train_labels[:2000]
    asked = search.embed(network, data.held).numpy()
    unit = [values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-9) for values in (asked, known)]
    near = np.argsort(-(unit[0] @ unit[1].T), axis=1, kind="stable")[:, :10]
    nearest = float((knn_vote(labels, near) == data.held_labels).mean())
    linear = yardsticks.linear_probe(known, labels, asked, data.held_labels)
    return {"linear": linear, "nearest": nearest, "truth": (linear + nearest) / 2}


def trained(
    data: Labelled, policies: dict[str, Any], steps: int, seeds: int, cache: Path
) -> tuple[dict[str, dict[int, Any]], dict[str, list[dict[str, float]]]]:
    """What the yardsticks need of every policy and seed, and the truth of each; encoders are kept in `cache`, so that a run goes on where it stopped."""
    looks: dict[str, dict[int, Any]] = {}
    truths: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        for name, policy in policies.items():
            file = cache / f"{name.replace(' ', '-').replace(',', '')}-{seed}.pt"
            start, fresh = time.perf_counter(), not file.exists()
            network = search.fit(data.train, policy, seed, steps if fresh else 0)
            if fresh:
                cache.mkdir(parents=True, exist_ok=True)
                part = file.with_suffix(".part")
                torch.save(network.state_dict(), part)
                part.rename(file)
            network.load_state_dict(torch.load(file, weights_only=True))
            truths.setdefault(name, []).append(truth(network, data))
            looks.setdefault(name, {})[seed] = {
                key: value.half().float().numpy() for key, value in search.look(network, data.held[: search.JUDGED_ON]).items()
            }
            if fresh:
                workloads.say(f"{name}, seed {seed}: {truths[name][-1]['truth']:.1%} by labels, {time.perf_counter() - start:.1f} s")
    return looks, truths


def thumbs(data: Labelled) -> np.ndarray:
    """Grey thumbnails (n, 16, 16) of the images learned from."""
    return np.stack([np.asarray(Image.fromarray(image).convert("L").resize((16, 16), Image.Resampling.BOX)) for image in data.train[:2000]])


def ceiling(truths: np.ndarray) -> float:
    """Correlation with the mean over seeds of the truth (policies, seeds) that a yardstick without error would have: √ of the mean's reliability.

    That is the rank correlation of the means of two halves of the seeds, over all halvings, taken to all seeds (Spearman 1910, Brown 1910). NaN for one seed.
    """
    seeds = truths.shape[1]
    if seeds < 2:
        return float("nan")
    halves = [(list(one), [seed for seed in range(seeds) if seed not in one]) for one in itertools.combinations(range(seeds), seeds // 2)]
    found = float(np.mean([spearmanr(truths[:, one].mean(1), truths[:, other].mean(1))[0] for one, other in halves]))
    return float(np.sqrt(max(0.0, 2 * found / (1 + found))))


def judge(looks: Any, truths: Any, policies: dict[str, Any], data: Labelled, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Correlations over the policies, and what the pick loses against the best by labels."""
    facing = yardsticks.orientation(thumbs(data))
    found = search.readings(looks, facing.meaningful)
    scale = ranking.scale_of(found)
    scores = {name: ranking.scores(found[name], scale) for name in policies}
    right = np.array([np.mean([row["truth"] for row in truths[name]]) for name in policies])
    columns = {key: np.array([np.mean([row[key] for row in found[name]]) for name in policies]) for key in next(iter(found.values()))[0]}
    columns |= {"score": np.array([scores[name].mean() for name in policies])}
    rng = np.random.default_rng(0)
    correlations = {}
    for key, values in columns.items():
        rows = np.stack([values, right], 1)
        interval = bootstrap(rows, rng, lambda drawn: float(spearmanr(drawn[:, 0], drawn[:, 1])[0]), 500)
        correlations[key] = {"spearman": float(spearmanr(values, right)[0]), "low": interval[0], "high": interval[1]}
    prices = search.costs(data.train, policies)
    played = search.play(policies, lambda name, seed: looks[name][seed], facing.meaningful, seeds)
    verdict = ranking.decide({name: played.scores[name] for name in played.alive}, prices)
    by_name = dict(zip(policies, right.tolist()))
    best = max(by_name, key=lambda name: by_name[name])
    return {
        "orientation": facing._asdict(),
        "correlations": correlations,
        "ceiling": ceiling(np.array([[row["truth"] for row in truths[name]] for name in policies])),
        "picked": verdict.winner,
        "highest": verdict.best,
        "best_by_labels": best,
        "loss_points": 100 * (by_name[best] - by_name[verdict.winner]),
        "loss_points_highest": 100 * (by_name[best] - by_name[verdict.best]),
        "loss_points_default": 100 * (by_name[best] - by_name["default"]),
        "loss_points_trivial": 100 * (by_name[best] - by_name["trivial"]),
        "eliminated": played.out,
        "policies": {
            name: {"truth": by_name[name], "cost": prices[name], **{key: float(columns[key][place]) for key in columns}}
            for place, name in enumerate(policies)
        },
    }


def parse() -> argparse.Namespace:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("data", nargs="+", help="NAME=PATH")
    arguments.add_argument("--steps", type=int, default=100, help="contrastive steps of an encoder")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[2, 1, 1], help="seeds that are new in each round")
    arguments.add_argument("--items", type=int, default=3000)
    arguments.add_argument("--judged", type=int, default=2000)
    arguments.add_argument("--side", type=int, default=32)
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "attar-policies", help="trained encoders' outputs")
    arguments.add_argument("--out", type=Path)
    return arguments.parse_args()


def main() -> None:
    given = parse()
    torch.set_num_threads(given.threads)
    results = {}
    for entry in given.data:
        name, _, path = entry.partition("=")
        data = read(Path(path), given.side, given.items, given.judged)
        mirrored = mirror_accuracy(thumbs(data).reshape(-1, 256), np.random.default_rng(0))
        policies = ranking.contenders(flips=mirrored <= MIRROR_LIMIT)
        cache = given.cache / f"{name}-{given.side}-{given.items}-{given.steps}"
        looks, truths = trained(data, policies, given.steps, sum(given.seeds), cache)
        results[name] = judge(looks, truths, policies, data, tuple(given.seeds)) | {
            "items": len(data.train),
            "judged": len(data.held),
            "mirror": mirrored,
        }
        rows = [
            {"policy": policy, **{key: f"{value:.3f}" for key, value in row.items()}} for policy, row in results[name]["policies"].items()
        ]
        print(
            f"\n## {name}: {len(data.train)} images learned from, {len(data.held)} judged on, {given.steps} steps, {sum(given.seeds)} seeds\n"
        )
        print(workloads.table(sorted(rows, key=lambda row: -float(row["truth"]))))
        print("\n" + "; ".join(f"{key} {row['spearman']:+.2f}" for key, row in results[name]["correlations"].items()))
        print("picked {picked}, best by labels {best_by_labels}: {loss_points:.2f} points lost".format(**results[name]))
    keys = [key for key in dict.fromkeys(key for found in results.values() for key in found["correlations"])]
    print("\n## Spearman with the truth, and points lost\n")
    lines = []
    for name, found in results.items():
        cells = {key: f"{found['correlations'][key]['spearman']:+.2f}" if key in found["correlations"] else "-" for key in keys}
        losses = {
            f"lost by {who}": f"{found[key]:.2f}"
            for who, key in (("the pick", "loss_points"), ("default", "loss_points_default"), ("trivial", "loss_points_trivial"))
        }
        lines.append({"data": name, **cells, "at most": f"{found['ceiling']:+.2f}", **losses})
    print(workloads.table(lines))
    scores = [found["correlations"]["score"]["spearman"] for found in results.values()]
    most = np.mean([found["ceiling"] for found in results.values()])
    print(
        f"\nmean Spearman of the score {np.mean(scores):.3f} (at most {most:.3f}); mean loss of the pick {np.mean([f['loss_points'] for f in results.values()]):.2f} points"
    )
    record(given, results=results)


if __name__ == "__main__":
    main()
