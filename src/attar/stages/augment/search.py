"""attar augment search: small encoders trained from scratch under each policy, judged without labels, losers dropped early.

Every trial (a policy and a seed) is kept as soon as it is done, so that an interrupted search goes on where it stopped and ends with the same
figures. The budget is a number of training steps; from `--minutes` it is fixed once, by a measured pace.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

from attar import config
from attar.config import flatten
from attar.data import absolute
from attar.errors import DataError, UsageError
from attar.modalities.image import Loader
from attar.models.network import Network
from attar.models.objectives import effective_rank, nt_xent
from attar.models.students import Encoder, input_side
from attar.records import Dial, Items, Policy, Preprocess, Ranking
from attar.stages.augment import ranking, yardsticks
from attar.stages.augment.engine import augment, normalise
from attar.stages.augment.policy import MIRROR_LIMIT, mirror_accuracy
from attar.stats import bootstrap
from attar.workspace import Job, Stage, Workspace

WIDTH, BUILT_FOR, BATCH, RATE, TEMPERATURE = 8, 64, 64, 2e-3, 0.2
"""The encoders of the search: channels of the first stage, the side they are built for (its strided stem costs a third of one at full resolution, so
that as much time trains three times as many steps), items of a batch, peak learning rate, temperature of the loss."""
LEARNED_FROM, JUDGED_ON, FEWEST = 4096, 1024, 24
"""Most items learned from, most and fewest held-out items judged on."""
STEPS, LEAST = 150, 20
"""Steps of one encoder where no budget is given, and the fewest that tell anything."""
NEIGHBOURS = 10
NEUTRAL = Policy(
    families={"geometry": Dial(0.5, 1.0), "colour": Dial(0.5, 1.0), "blur": Dial(0.5, 0.5), "erase": Dial(0.5, 0.5)},
    method="the common augmentation all encoders are asked about",
)
PREPROCESS = {"mean": (0.5,) * 3, "std": (0.25,) * 3}


def listing(rows: Sequence[Mapping[str, Any]]) -> str:
    """A ranking's rows for a terminal: the policies, best first, and where they dropped out."""
    names = [name for name in rows[0] if not name.endswith(("_low", "_high"))]
    cells = [names, *([_cell(row, name) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)


def _cell(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if value is None or isinstance(value, str | int):
        return str(value if value is not None else "-")
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    return f"{value:.3f}" if low is None else f"{value:.3f} ({low:.3f} to {high:.3f})"


def fit(
    images: UInt8[np.ndarray, "items side side 3"], policy: Policy, seed: int, steps: int, tick: Callable[[], object] = lambda: None
) -> Network:
    """An encoder trained contrastively (NT-Xent) from scratch under a policy; weights, batches and draws follow from the seed.

    Two policies with one seed start alike and see the same items in the same order.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = Encoder(BUILT_FOR, WIDTH)
        network = Network(body)
        projector = nn.Sequential(nn.Linear(body.dim, body.dim), nn.ReLU(), nn.Linear(body.dim, 64))
    weights = [*network.parameters(), *projector.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=RATE, weight_decay=1e-4)
    draw, size, warm = np.random.default_rng([seed, 0]), min(BATCH, len(images)), max(1, steps // 10)
    network.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))
        batch = images[draw.choice(len(images), size, replace=False)]
        views = [augment(batch, policy, None, np.random.default_rng([seed, 1, step, view])) for view in (0, 1)]
        first, second = projector(network(_prepared(torch.cat(views)))[0]).chunk(2)
        optimiser.zero_grad(set_to_none=True)
        nt_xent(first, second, TEMPERATURE).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, 5.0)
        optimiser.step()
        tick()
    return network.eval()


def _prepared(views: Tensor) -> Tensor:
    return normalise(views, PREPROCESS["mean"], PREPROCESS["std"])


def embed(network: Network, images: UInt8[np.ndarray, "items side side 3"], policy: Policy | None = None, seed: int = 0) -> Tensor:
    """Embeddings (items, dim) float32 of images as they are, or of one view of each under a policy."""
    made = []
    with torch.no_grad():
        for start in range(0, len(images), 256):
            part = np.ascontiguousarray(images[start : start + 256])
            plain = torch.from_numpy(part).permute(0, 3, 1, 2).float() / 255
            views = plain if policy is None else augment(part, policy, None, np.random.default_rng([seed, start]))
            made.append(network(_prepared(views))[0])
    return torch.cat(made)


def look(network: Network, images: UInt8[np.ndarray, "items side side 3"]) -> dict[str, Tensor]:
    """All that the yardsticks need of one encoder: embeddings of held-out images as they are, turned, and in two views of NEUTRAL."""
    turned = [embed(network, np.rot90(images, turn, (1, 2))) for turn in range(yardsticks.TURNS)]
    views = [embed(network, images, NEUTRAL, view) for view in (1, 2)]
    return {"turned": torch.stack(turned), "views": torch.stack(views)}


def pictures(items: Items, job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Images to learn from and held-out images to judge on, (n, side, side, 3) uint8: of the training and the validation split, drawn by the seed.

    The held-out ones are in the order they were drawn in: yardsticks fit probes to one half and ask the other, and by path the halves would be of
    other folders, and so of other kinds.

    Where the validation split is small, training images that are then not learned from are judged on as well. Raises DataError for too few.
    """
    train, held = (job.rng("items", split).permutation(items.ids(split)) for split in ("train", "validation"))
    missing = max(0, min(JUDGED_ON, len(items) // 5) - len(held))
    held, train = np.concatenate([held[:JUDGED_ON], train[:missing]]), train[missing:][:LEARNED_FROM]
    if len(held) < FEWEST or len(train) < 2 * FEWEST:
        raise DataError(
            f"{items.root}: {len(train)} images to learn from and {len(held)} to judge on; ranking policies needs {2 * FEWEST} and {FEWEST}: "
            "name a folder with more images, or a policy with --policy"
        )
    side = input_side(int(np.median(np.minimum(items.column("width"), items.column("height")))))
    preprocess = Preprocess(size=(side, side), resize_shortest=side)
    with Loader(items, preprocess, workers=job.workers) as loader, job.progress(len(train) + len(held), "reading", "items") as bar:
        parts = []
        for ids in (np.sort(train), np.sort(held)):
            made = [images for _, images in loader.stream(np.array_split(ids, -(-len(ids) // 128))) if bar.update(len(images)) is not False]
            parts.append(np.concatenate(made))
    return parts[0], parts[1][np.argsort(np.argsort(held))]


def costs(images: np.ndarray, policies: Mapping[str, Policy]) -> dict[str, float]:
    """Time of a view under each policy as a multiple of the cheapest's: least of several turns, in turn about, so that a busy machine hurts all alike."""
    batch, found = images[:BATCH], {name: math.inf for name in policies}
    for turn in range(5):
        for name, policy in policies.items():
            rng, start = np.random.default_rng(turn), time.perf_counter()
            augment(batch, policy, None, rng)
            found[name] = min(found[name], time.perf_counter() - start)
    least = min(found.values())
    return {name: round(spent / least, 2) for name, spent in found.items()}


def steps_of(settings: config.Search, images: np.ndarray, count: int) -> int:
    """Steps of one encoder that the budget allows; raises UsageError when they tell nothing."""
    if settings.search_steps is not None:
        steps, said = settings.search_steps // ranking.trials(count), f"search_steps: {settings.search_steps}"
    elif settings.search_minutes is not None:
        fit(images, ranking.POLICIES["default"], 0, 2)  # compiles and loads
        start = time.perf_counter()
        fit(images, ranking.POLICIES["default"], 0, 10)
        pace = (time.perf_counter() - start) / 10
        steps, said = (
            int(0.85 * 60 * settings.search_minutes / (pace * ranking.trials(count))),
            f"search_minutes: {settings.search_minutes:g}",
        )
    else:
        return STEPS
    if steps < LEAST:
        raise UsageError(
            f"{said}: {steps} steps for each of {ranking.trials(count)} encoders; at least {LEAST} are needed: give {math.ceil(LEAST / max(steps, 1))} times as much"
        )
    return steps


Looks = Mapping[str, Mapping[int, Mapping[str, np.ndarray]]]
"""policy → seed → what `look` gave."""


class Played(NamedTuple):
    """What the rounds brought."""

    found: Mapping[str, Sequence[Mapping[str, float]]]  # readings by seed
    scores: Mapping[str, np.ndarray]  # by seed
    alive: Sequence[str]  # who reached the end, best first
    out: Mapping[str, str]  # of the others, when and why they dropped out


def play(
    policies: Sequence[str] | Mapping[str, Policy],
    trial: Callable[[str, int], Mapping[str, np.ndarray]],
    rotation: bool,
    seeds: Sequence[int] | None = None,
    after: Callable[[Sequence[str]], object] = lambda alive: None,
) -> Played:
    """The rounds: `trial` gives the look of a policy and a seed; `after` is told who is left."""
    alive, scale = list(policies), None
    out: dict[str, str] = {}
    looks: dict[str, dict[int, Mapping[str, np.ndarray]]] = {name: {} for name in policies}
    for number, one in enumerate(ranking.rounds(len(alive), seeds), 1):
        for seed in one.seeds:
            for name in alive:
                looks[name][seed] = trial(name, seed)
        found = readings(looks, rotation)
        scale = scale or ranking.scale_of(found)
        scores = {name: ranking.scores(found[name], scale) for name in policies}
        ranks = {name: float(np.mean([row["effective_rank"] for row in found[name]])) for name in alive}
        alive, lost = ranking.leaving({name: scores[name] for name in alive}, ranks, one.leaving)
        out |= {name: f"round {number}{why}" for name, why in lost.items()}
        after(alive)
    return Played(found, scores, alive, out)


def readings(looks: Looks, rotation: bool) -> dict[str, list[dict[str, float]]]:
    """Every yardstick of every trial: {policy: one reading per seed}, seeds ascending.

    `rotation` says whether the rotation probe means anything. Agreement is with the other seeds of the policy.
    """
    plain = {(name, seed): looks[name][seed]["turned"][0] for name in looks for seed in looks[name]}
    clusters = int(np.clip(len(next(iter(plain.values()))) // 20, 2, 16))
    near = {key: yardsticks.near(values, NEIGHBOURS) for key, values in plain.items()}
    labels = {key: yardsticks.pseudo_labels(values, clusters, np.random.default_rng(key[1])) for key, values in plain.items()}
    found: dict[str, list[dict[str, float]]] = {}
    for name in looks:
        found[name] = []
        for seed in sorted(looks[name]):
            seen, key = looks[name][seed], (name, seed)
            twins = [near[name, other] for other in looks[name] if other != seed]
            row = {
                "learnability": yardsticks.learnability(plain[key], labels[key]),
                "information": yardsticks.information(*seen["views"]),
                "retrieval": yardsticks.retrieval(*seen["views"]),
                "steadiness": yardsticks.steadiness(near[key], yardsticks.near(seen["views"][0], NEIGHBOURS)),
                "agreement": float(np.mean([yardsticks.common_neighbours([near[key], twin]) for twin in twins])),
                "effective_rank": effective_rank(torch.from_numpy(plain[key])),
            }
            found[name].append(row | ({"rotation": yardsticks.rotation_probe(seen["turned"])} if rotation else {}))
    return found


def search(items: Items, settings: config.Search, job: Job) -> Ranking:
    """Ranks ranking.contenders() on the items; see the texts of ranking, yardsticks and this module for how.

    Raises DataError for too few images, UsageError for a budget that is too small to tell anything.
    """
    thumbs = _thumbs(items, job.rng("thumbs"))
    mirrored = mirror_accuracy(thumbs.reshape(-1, 256), job.rng("mirror"))
    policies = ranking.contenders(flips=mirrored <= MIRROR_LIMIT)
    train, held = pictures(items, job)
    facing = yardsticks.orientation(thumbs)
    if mirrored > MIRROR_LIMIT:
        job.say(f"mirror images are told from originals with {mirrored:.0%} accuracy: no policy flips")
    job.say(
        f"quarter turns of thumbnails are told with {facing.accuracy:.0%} accuracy (chance 25%): "
        + ("orientation has a meaning, the rotation probe counts" if facing.meaningful else "orientation has no meaning, no rotation probe")
    )
    prices = job.once("costs.json", lambda: costs(train, policies))
    steps = job.once("steps.json", lambda: steps_of(settings, train, len(policies)))
    with job.progress(ranking.trials(len(policies)) * steps, "ranking", "steps") as bar:

        def trial(name: str, seed: int) -> Mapping[str, np.ndarray]:
            return _trial(name, policies[name], seed, steps, train, held, bar, job)

        played = play(
            policies, trial, facing.meaningful, after=lambda alive: bar.set_postfix(left=len(alive), best=alive[0], refresh=False)
        )
    scores = played.scores
    verdict = ranking.decide({name: scores[name] for name in played.alive}, prices)
    rows = table(played, verdict, prices, job.rng("intervals"))
    return Ranking(policy=_chosen(policies[verdict.winner], verdict, rows, steps), rows=rows, verdict=said(verdict, prices))


def _thumbs(items: Items, rng: np.random.Generator) -> np.ndarray:
    """Grey thumbnails (n, 16, 16) uint8 of at most 2,000 training items, drawn: the first would often be those of one folder, and so of one kind."""
    chosen = rng.permutation(items.ids("train"))[:2000]
    return np.frombuffer(b"".join(items.table["thumb"].take(chosen).to_pylist()), np.uint8).reshape(-1, 16, 16)


def _trial(
    name: str, policy: Policy, seed: int, steps: int, train: np.ndarray, held: np.ndarray, bar: Any, job: Job
) -> dict[str, np.ndarray]:
    """What one encoder shows, trained once and kept as float16."""
    before = bar.n
    # The seed of the run shifts the seeds of the trials, the same for all policies.
    make = functools.partial(_trained, train, held, policy, (job.seed * 1009 + seed) % 2**31, steps, lambda: bar.update(1))
    kept = job.once(f"{name.replace(' ', '-').replace(',', '')}-{seed}.pt", make)
    bar.update(before + steps - bar.n)  # a trial that was there already
    return {key: value.float().numpy() for key, value in kept.items()}


def _trained(train: np.ndarray, held: np.ndarray, policy: Policy, seed: int, steps: int, tick: Callable[[], object]) -> dict[str, Tensor]:
    return {key: value.half() for key, value in look(fit(train, policy, seed, steps, tick), held).items()}


def table(played: Played, verdict: ranking.Verdict, prices: Mapping[str, float], rng: np.random.Generator) -> tuple[dict[str, Any], ...]:
    """A row per policy, the winner first, then finalists by score, then the others by how far they came: figures with bootstrap intervals over seeds."""
    found, scores, out = played.found, played.scores, played.out
    order = sorted(found, key=lambda name: (name != verdict.winner, name in out, -len(found[name]), -scores[name].mean()))
    rows = []
    for place, name in enumerate(order, 1):
        row: dict[str, Any] = {
            "rank": place,
            "policy": name,
            "eliminated": out.get(name, ""),
            "seeds": len(found[name]),
            "cost": prices[name],
        }
        columns = {"score": scores[name]} | {key: np.array([one[key] for one in found[name]]) for key in found[name][0]}
        for key, values in columns.items():
            low, high = bootstrap(values, rng)
            row |= {key: round(float(values.mean()), 4), f"{key}_low": round(low, 4), f"{key}_high": round(high, 4)}
        against = verdict.against.get(name)
        row |= {key: None if against is None else round(against[key], 4) for key in ("difference", "low", "high", "p")}
        rows.append(row)
    return tuple(rows)


def said(verdict: ranking.Verdict, prices: Mapping[str, float]) -> str:
    """The verdict in a sentence."""
    others = [name for name in verdict.equals if name != verdict.winner]
    if not others:
        sure = all(row["p"] < ranking.LEVEL for row in verdict.against.values())
        how = (
            "measurably better than every other finalist"
            if sure
            else "best of the finalists, though not measurably better than all of them"
        )
        return f"{verdict.winner}: {how} (paired over seeds, Holm-corrected, {ranking.LEVEL:.0%})."
    reason = (
        "the cheapest of them"
        if prices[verdict.winner] * ranking.SAME_COST < min(prices[name] for name in others)
        else "taken for cost and score"
    )
    return f"{verdict.winner}: no measurable difference to {', '.join(others)}; {reason} ({prices[verdict.winner]:.2f}× the time of the cheapest policy)."


def _chosen(policy: Policy, verdict: ranking.Verdict, rows: Sequence[Mapping[str, Any]], steps: int) -> Policy:
    """The winner as a policy that says how it was found."""
    evidence = tuple({key: row[key] for key in ("policy", "eliminated", "seeds", "cost", "score", "p")} for row in rows)
    method = f"{verdict.winner} ({policy.method}), ranked first of {len(rows)} without labels, {steps} steps an encoder"
    return Policy(families=policy.families, pick=policy.pick, method=method, evidence=evidence)


STAGE = Stage(make=search, record=Ranking, needs=("scan",), settings=("search",))
"""Beside the spine: it needs the scan alone, and no stage needs it."""


def search_config(config: config.Config, *, quiet: bool = False) -> Ranking:
    """The search in a run folder, which is scanned first where it was not; a finished search is not done again."""
    from attar.pipeline import SPINE

    data = replace(config.data, data=absolute(config.data.data))
    config = replace(config, data=data)
    with Workspace(config.out, SPINE | {"search": STAGE}) as space:
        space.claim(data.data, flatten(config))
        space.run("scan", config, quiet=quiet)
        return space.run("search", config, quiet=quiet)
