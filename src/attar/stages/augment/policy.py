"""The policy: how strong and how often, found from the data without labels.

Two questions are put to the data. Does mirroring keep an item plausible? A linear probe that tells thumbnails from their
mirror images says no (digits, text) when it succeeds. How far can a family be turned up before items change their nature?
As far as most augmented views of a cluster's items still fall into that cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from attar import config
from attar.modalities.image import Loader
from attar.models import sources
from attar.models.network import ClusterHead
from attar.records import Clusters, Dial, Items, Policy, Selection, Vectors
from attar.stages.augment.engine import apply, normalise
from attar.stages.augment.plan import FAMILIES, sample
from attar.workspace import Job

DEFAULTS = {
    "geometry": Dial(0.8, 0.9),
    "flip": Dial(1.0, 0.5),
    "colour": Dial(0.5, 0.8),
    "blur": Dial(0.5, 0.2),
    "erase": Dial(0.5, 0.1),
}
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
KEPT = 0.85
"""Share of augmented views that must stay in their item's cluster for a strength to be allowed."""
MIRROR_LIMIT = 0.6
"""Accuracy of the mirror probe above which mirroring is taken to change what an item is; 0.5 is chance."""
COMPUTE = 5e11
"""Multiply-accumulates spent on trying strengths: bounds the number of items looked at, by the size of the model."""
OFF = Dial(0.0, 0.0)


def mirror_accuracy(thumbs: np.ndarray, rng: np.random.Generator) -> float:
    """Held-out accuracy of a linear probe that tells 16 × 16 grey thumbnails (n, 256) from their mirror images; 0.5 is chance."""
    images = thumbs[rng.permutation(len(thumbs))[:2000]].reshape(-1, 16, 16).astype(np.float64)
    half = len(images) // 2
    both = [np.concatenate([part, part[:, :, ::-1]]).reshape(-1, 256) for part in (images[:half], images[half:])]
    labels = [np.repeat([0, 1], len(rows) // 2) for rows in both]
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200)).fit(both[0], labels[0])
    return float(probe.score(both[1], labels[1]))


def starting_policy(items: Items, settings: config.Augment, job: Job) -> Policy:
    """The policy before anything is known of the clusters: the defaults, without the mirror where mirroring changes the items."""
    thumbs = np.frombuffer(b"".join(items.table["thumb"].to_pylist()), np.uint8).reshape(-1, 256)
    accuracy = mirror_accuracy(thumbs[items.column("split") == "train"], job.rng("mirror"))
    families = dict(DEFAULTS)
    if accuracy > MIRROR_LIMIT:
        families["flip"] = OFF
        job.say(f"mirror images are told from originals with {accuracy:.0%} accuracy: no flips")
    evidence = {"family": "flip", "signal": "mirror probe accuracy", "value": accuracy, "limit": MIRROR_LIMIT}
    return pinned(Policy(families=families, method="defaults, mirror probe", evidence=(evidence,)), settings)


def pinned(policy: Policy, settings: config.Augment) -> Policy:
    """The policy with the dials the user set by hand; a flip that was found to be wrong stays off."""
    if settings.strength is None and settings.frequency is None:
        return policy

    def pin(dial: Dial) -> Dial:
        strength = dial.strength if settings.strength is None else settings.strength
        return dial if dial == OFF else Dial(strength, dial.frequency if settings.frequency is None else settings.frequency)

    families = {name: pin(dial) for name, dial in policy.families.items()}
    clusters = tuple({name: pin(dial) for name, dial in dials.items()} for dials in policy.clusters)
    return Policy(families=families, clusters=clusters, method=f"{policy.method}; pinned by hand", evidence=policy.evidence)


def augment(items: Items, vectors: Vectors, clusters: Clusters, selection: Selection, settings: config.Augment, job: Job) -> Policy:
    """Strength per family and cluster: the largest at which at least KEPT of the augmented views stay in their item's cluster.

    A cluster's share is drawn towards the share of all items by the weight of ten items, so that small clusters do not decide by chance.
    """
    start = starting_policy(items, settings, job)
    if settings.strength is not None:
        return start
    keep = selection.column("keep") & (items.column("split") == "train")
    candidates = items.column("id")[keep]
    count = int(np.clip(COMPUTE / (vectors.model.macs * (1 + len(FAMILIES) * len(STRENGTHS))), 64, 512))
    ids = np.sort(job.rng("sample").permutation(candidates)[:count])
    measured = job.once("views.json", lambda: _measure(items, vectors, clusters, ids, job))
    own = np.asarray(measured["own"])
    rows, found = [], {family: np.full(clusters.count, start.families[family].strength) for family in FAMILIES}
    overall = {family: start.families[family].strength for family in FAMILIES}
    for family in FAMILIES:
        if family == "flip" or start.families[family] == OFF:
            continue
        shares = [np.asarray(measured[family][str(strength)]) == own for strength in STRENGTHS]
        rows += [{"family": family, "strength": s, "kept": float(kept.mean()), "n": len(own)} for s, kept in zip(STRENGTHS, shares)]
        overall[family] = _largest([float(kept.mean()) for kept in shares])
        for cluster in range(clusters.count):
            mine = own == cluster
            smooth = [(kept[mine].sum() + 10 * kept.mean()) / (mine.sum() + 10) for kept in shares]
            found[family][cluster] = _largest(smooth)
    frequency = {family: start.families[family].frequency for family in FAMILIES}
    families = {family: Dial(overall[family], frequency[family]) for family in FAMILIES}
    per_cluster = tuple({family: Dial(float(found[family][c]), frequency[family]) for family in FAMILIES} for c in range(clusters.count))
    method = f"largest strength at which {KEPT:.0%} of the views of {len(own)} items stay in their cluster; mirror probe for flips"
    job.say("strengths found: " + ", ".join(f"{family} {overall[family]:.1f}" for family in FAMILIES))
    return pinned(Policy(families=families, clusters=per_cluster, method=method, evidence=(*start.evidence, *rows)), settings)


def _largest(shares: Sequence[float]) -> float:
    """The largest strength up to which every share is high enough; half the smallest strength when none is."""
    allowed = STRENGTHS[0] / 2
    for strength, share in zip(STRENGTHS, shares):
        if share < KEPT:
            break
        allowed = strength
    return allowed


def _measure(items: Items, vectors: Vectors, clusters: Clusters, ids: np.ndarray, job: Job) -> Mapping[str, Any]:
    """Cluster of each item, and of its views under each family alone at each strength."""
    network, head, preprocess = sources.network(vectors.model), ClusterHead(clusters.head), vectors.model.preprocess
    families = [family for family in FAMILIES if family != "flip"]
    found: dict[str, Any] = {"own": []} | {family: {str(strength): [] for strength in STRENGTHS} for family in families}

    def assign(views: torch.Tensor) -> list[int]:
        return head(network(normalise(views, preprocess.mean, preprocess.std))[0]).argmax(1).tolist()

    chunks = [ids[start : start + 64] for start in range(0, len(ids), 64)]
    total = len(ids) * (1 + len(families) * len(STRENGTHS))
    with Loader(items, preprocess, workers=job.workers) as loader, job.progress(total, "trying strengths", "views") as bar, torch.no_grad():
        for number, (_, images) in enumerate(loader.stream(chunks)):
            found["own"] += assign(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
            bar.update(len(images))
            for family in families:
                for strength in STRENGTHS:
                    dials = [{name: OFF for name in FAMILIES} | {family: Dial(strength, 1.0)}] * len(images)
                    found[family][str(strength)] += assign(apply(images, sample(dials, job.rng(family, strength, number))))
                    bar.update(len(images))
    return found
