"""The policy: how strong and how often, found from the data without labels, or named by the user.

Two questions are put to the data. Does mirroring keep an item plausible? A linear probe that tells thumbnails from their
mirror images says no (digits, text) when it succeeds. How far can a family be turned up before items change their nature?
As far as most augmented views of a cluster's items still fall into that cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from attar import config
from attar.errors import UsageError
from attar.modalities.image import Loader
from attar.models import sources
from attar.models.network import ClusterHead
from attar.records import Clusters, Dial, Items, Policy, Selection, Vectors
from attar.stages.augment.catalogue import DEFAULTS, FAMILIES, POLICIES, as_policy
from attar.stages.augment.dials import OFF
from attar.stages.augment.engine import augment as views_of
from attar.stages.augment.engine import normalise
from attar.workspace import Job, file_digest

STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
KEPT = 0.85
"""Share of augmented views that must stay in their item's cluster for a strength to be allowed."""
MIRROR_LIMIT = 0.6
"""Accuracy of the mirror probe above which mirroring is taken to change what an item is; 0.5 is chance."""
COMPUTE, MOST_COMPUTE = 5e11, 2e12
"""Multiply-accumulates spent on trying strengths: bounds the number of items looked at, by the size of the model. Where the fewest that tell something take
more than the second, none are tried: compression shows its items nearly as they are and does not wait for it."""
TRIED = (64, 512)
"""The fewest and the most items that strengths are tried on."""


def mirror_accuracy(thumbs: np.ndarray, rng: np.random.Generator) -> float:
    """Held-out accuracy of a linear probe that tells 16 × 16 grey thumbnails (n, 256) from their mirror images; 0.5 is chance."""
    images = thumbs[rng.permutation(len(thumbs))[:2000]].reshape(-1, 16, 16).astype(np.float64)
    half = len(images) // 2
    both = [np.concatenate([part, part[:, :, ::-1]]).reshape(-1, 256) for part in (images[:half], images[half:])]
    labels = [np.repeat([0, 1], len(rows) // 2) for rows in both]
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=200)).fit(both[0], labels[0])
    return float(probe.score(both[1], labels[1]))


def starting_policy(items: Items, settings: config.Augment, job: Job) -> Policy:
    """The policy before anything is known of the clusters: the one that was named, or the defaults, without the mirror where that changes the items."""
    if settings.policy:
        return pinned(as_policy(settings.policy), settings)
    thumbs = np.frombuffer(b"".join(items.table["thumb"].to_pylist()), np.uint8).reshape(-1, 256)
    accuracy = mirror_accuracy(thumbs[items.column("split") == "train"], job.rng("mirror"))
    families = dict(DEFAULTS)
    if accuracy > MIRROR_LIMIT:
        families["flip"] = OFF
        job.say(f"mirror images are told from originals with {accuracy:.0%} accuracy: no flips")
    evidence = {"family": "flip", "signal": "mirror probe accuracy", "value": accuracy, "limit": MIRROR_LIMIT}
    return pinned(Policy(families=families, method="defaults, mirror probe", evidence=(evidence,)), settings)


def policy_fingerprint(settings: config.Augment) -> list[str]:
    """Hash of the policy file that was named, so that a changed one is noticed."""
    return [file_digest(Path(settings.policy))] if settings.policy and settings.policy not in POLICIES else []


def pinned(policy: Policy, settings: config.Augment) -> Policy:
    """The policy with the dials the user set by hand or holds, which evidence says; a flip that was found to be wrong stays off."""
    by_hand = {name: value for name, value in (("strength", settings.strength), ("frequency", settings.frequency)) if value is not None}
    held = {name: "as found" for name in ("strength", "frequency") if settings.dials == "held" and name not in by_hand}
    if not by_hand and not held:
        return policy

    def pin(dial: Dial) -> Dial:
        strength = dial.strength if settings.strength is None else settings.strength
        return dial if dial == OFF else Dial(strength, dial.frequency if settings.frequency is None else settings.frequency)

    families = {name: pin(dial) for name, dial in policy.families.items()}
    clusters = tuple({name: pin(dial) for name, dial in dials.items()} for dials in policy.clusters)
    measured = [row for row in policy.evidence if "pinned" not in row]
    evidence = (*measured, *({"pinned": name, "value": value} for name, value in (by_hand | held).items()))
    method = f"{policy.method}; pinned by hand" if by_hand else policy.method
    return replace(policy, families=families, clusters=clusters, method=method, evidence=evidence)


def augment(items: Items, vectors: Vectors, clusters: Clusters, selection: Selection, settings: config.Augment, job: Job) -> Policy:
    """Strength per family and cluster: the largest at which at least KEPT of the augmented views stay in their item's cluster.

    A policy that was named is taken as it is; raises UsageError when its dials are for another number of clusters.
    A cluster's share is drawn towards the share of all items by the weight of ten items, so that small clusters do not decide by chance.
    """
    start = starting_policy(items, settings, job)
    if start.clusters and len(start.clusters) != clusters.count:
        raise UsageError(
            f"policy: {settings.policy}: has dials for {len(start.clusters)} clusters, the items fall into {clusters.count}; "
            f'leave out its "clusters", or cluster as before with --clusters {len(start.clusters)}'
        )
    if settings.strength is not None or settings.policy:
        return start
    each = vectors.model.macs * (1 + len(FAMILIES) * len(STRENGTHS))
    if each * TRIED[0] > MOST_COMPUTE:
        job.say(
            f"strengths are not tried, the model is too large ({vectors.model.macs / 1e9:.1f} G multiply-accumulates an item): the defaults stay"
        )
        return replace(start, method=f"{start.method}; strengths not tried, the model is too large")
    keep = selection.column("keep") & (items.column("split") == "train")
    candidates = items.column("id")[keep]
    count = int(np.clip(COMPUTE / each, *TRIED))
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
                    alone = Policy(families={name: OFF for name in FAMILIES} | {family: Dial(strength, 1.0)})
                    found[family][str(strength)] += assign(views_of(images, alone, None, job.rng(family, strength, number)))
                    bar.update(len(images))
    return found
