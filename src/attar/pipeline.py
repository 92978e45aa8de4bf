"""THE SPINE: from a folder of unlabelled items to a small model and its evidence, one stage after the other.

    scan → embed → cluster → curate → augment → train → compress → evaluate → export → report

Each line of SPINE says what makes a stage, from which records and which settings. The run folder decides what is done
already; everything else is in the stages.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attar import labels as judging
from attar import records as r
from attar import runtime
from attar.config import Augment, Compress, Config, Generate, build_config, flatten, read_toml
from attar.data import absolute
from attar.errors import BudgetNotReached, UsageError
from attar.formats import NAMES, read_json
from attar.models import sources
from attar.stages.augment.catalogue import POLICIES
from attar.stages.augment.generate import generated
from attar.stages.augment.policy import augment, policy_fingerprint
from attar.stages.cluster import listing
from attar.stages.cluster.cluster import cluster
from attar.stages.cluster.naming import carry_names, set_name
from attar.stages.compress.feed import ItemFeed
from attar.stages.compress.search import compress
from attar.stages.curate.curate import curate
from attar.stages.embed import embed
from attar.stages.evaluate import evaluate
from attar.stages.export import export
from attar.stages.report.page import report
from attar.stages.scan import fingerprint, scan
from attar.stages.signals import require_board
from attar.stages.train import train
from attar.workspace import Job, Stage, Workspace, status


def _augment(
    items: r.Items, vectors: r.Vectors, clusters: r.Clusters, selection: r.Selection, settings: Augment, asked: Generate, job: Job
) -> r.Policy:
    """The policy, and where they are asked for, generated items with what they are worth."""
    policy = augment(items, vectors, clusters, selection, settings, job)
    made = generated(items, vectors, clusters, selection, policy, asked, job)
    return policy if made is None else dataclasses.replace(policy, evidence=(*policy.evidence, *made.evidence), generated=made.folder)


def _compress(
    items: r.Items, clusters: r.Clusters, selection: r.Selection, policy: r.Policy, model: r.Model, settings: Compress, job: Job
) -> r.Front:
    """Compression sees the run folder's items through a feed, and nothing else of them."""
    return compress(ItemFeed(items, clusters, selection, policy, model.preprocess, job), model, settings, job)


def _export(items: r.Items, clusters: r.Clusters, model: r.Model, front: r.Front, evidence: r.Evidence, job: Job) -> r.Export:
    """The file goes out with the names people gave to the clusters."""
    return export(items, model, front, evidence, job, clusters.names)


def _report(*given: Any) -> r.Page:
    """The report is told everything: the records of all stages, all settings, and how the stages went."""
    needs = len(SPINE["report"].needs)
    sections, job = given[needs:-1], given[-1]
    settings = {"seed": job.seed} | {key: value for section in sections for key, value in dataclasses.asdict(section).items()}
    return report(*given[:needs], settings, job.history, job)  # type: ignore[call-arg]


SPINE: dict[str, Stage] = {
    "scan": Stage(make=scan, record=r.Items, settings=("data",), fingerprint=fingerprint),
    "embed": Stage(
        make=embed,
        record=r.Vectors,
        needs=("scan",),
        settings=("model", "embed", "augment"),
        fingerprint=lambda model, embed, augment: [*sources.fingerprint(model), *policy_fingerprint(augment)],
    ),
    "cluster": Stage(make=cluster, record=r.Clusters, needs=("scan", "embed"), settings=("cluster",)),
    "curate": Stage(make=curate, record=r.Selection, needs=("scan", "embed", "cluster"), settings=("curate",)),
    "augment": Stage(
        make=_augment,
        record=r.Policy,
        needs=("scan", "embed", "cluster", "curate"),
        settings=("augment", "generate"),
        fingerprint=lambda augment, generate: policy_fingerprint(augment),
    ),
    "train": Stage(make=train, record=r.Model, needs=("scan", "embed", "cluster", "curate", "augment"), settings=("train", "embed")),
    "compress": Stage(
        make=_compress,
        record=r.Front,
        needs=("scan", "cluster", "curate", "augment", "train"),
        settings=("compress",),
        fingerprint=sources.student_fingerprint,
    ),
    "evaluate": Stage(
        make=evaluate,
        record=r.Evidence,
        needs=("scan", "cluster", "curate", "train", "compress"),
        settings=("evaluate",),
        fingerprint=judging.fingerprint,
    ),
    "export": Stage(make=_export, record=r.Export, needs=("scan", "cluster", "train", "compress", "evaluate"), reads=(NAMES,)),
    "report": Stage(
        make=_report,
        record=r.Page,
        needs=("scan", "embed", "cluster", "curate", "augment", "train", "compress", "evaluate", "export"),
        settings=tuple(item.name for item in dataclasses.fields(Config) if item.name != "setup"),
        reads=(NAMES,),
    ),
}


class Run:
    """A run folder as Python sees it: `run.sentence`, and every record under the name of its stage, `run["clusters"]`."""

    def __init__(self, root: str | Path, ran: tuple[str, ...] = ()) -> None:
        self.root = Path(root)
        self.ran = ran
        """Stages that did work in the call that returned this."""

    def __getitem__(self, stage: str) -> Any:
        """The record of a finished stage; raises WorkspaceError when it is not finished, UsageError when there is no such stage."""
        if stage not in SPINE:
            raise UsageError(f"{stage!r} is not a stage; the stages are {', '.join(SPINE)}")
        return Workspace(self.root, SPINE).load(stage)

    @property
    def sentence(self) -> str:
        """The result in one sentence with its figures."""
        return self["report"].sentence

    def __repr__(self) -> str:
        return f"Run({str(self.root)!r})"


def run_config(config: Config, *, until: str = "report", quiet: bool = False) -> Run:
    """Takes a run to a stage; what is finished and unchanged is not done again.

    Raises BudgetNotReached, after everything else is done, when no candidate met the budget.
    """
    config = _anchored(config)
    stages = list(SPINE)[: list(SPINE).index(until) + 1]
    if "compress" in stages:
        runtime.require(config.compress.runtime)  # before the long part, so that a missing extra is told at once
    if config.setup.tensorboard:
        require_board()
    with Workspace(config.out, SPINE) as space:
        space.claim(config.data.data, flatten(config))
        for name in stages:
            made = space.run(name, config, quiet=quiet)
            if name == "cluster":
                _carry(space, made, quiet)
        front: r.Front | None = space.load("compress") if "compress" in stages else None
    run = Run(config.out, tuple(space.ran))
    if front is not None and not front.met:
        raise BudgetNotReached(f"budget {front.budget!r} not reached: {front.reason}. The best result is in {config.out}", run)
    return run


def _carry(space: Workspace, clusters: r.Clusters, quiet: bool) -> None:
    """Names of clusters that are made again go with their items; what becomes of them is told."""
    for text in carry_names(space.root, space.load("scan"), clusters):
        if not quiet:
            print(f"cluster: {text}", file=sys.stderr)


def name_cluster(run: str | Path, number: int, name: str, *, quiet: bool = False) -> dict[int, str]:
    """Names a cluster of a run folder; an export and report that only lack the name are brought up to date. Returns all names by number."""
    known = status(run)  # a folder that is none of attar's is refused here, and not marked as one
    with Workspace(Path(run), SPINE) as space:
        names = set_name(space.root, space.load("scan"), space.load("cluster"), number, name)
        config = _anchored(continue_config(run, {}))
        for row in known["stages"]:
            if SPINE[row["stage"]].reads and row["state"] == "done" and _settled(space, row["stage"], config):
                space.run(row["stage"], config, quiet=quiet)
    return names


def _settled(space: Workspace, stage: str, config: Config) -> bool:
    """Whether all that a stage is made of is as it would be made now."""
    found = {need: space.manifest(need) for need in SPINE[stage].needs}
    return all(body and body["key"] == space.key(need, config) and _settled(space, need, config) for need, body in found.items())


def list_clusters(run: str | Path, *, links: str | Path | None = None, table: str | Path | None = None) -> list[dict[str, Any]]:
    """The clusters of a run folder, one row each; on request every item as a link in its cluster's folder, or as a line of a CSV file."""
    items, clusters, vectors = (Run(run)[stage] for stage in ("scan", "cluster", "embed"))
    other, margin = listing.margins(clusters, vectors)
    if table is not None:
        listing.write_table(Path(table), items, clusters, other, margin)
    if links is not None:
        listing.write_links(Path(links), items, clusters)
    return listing.summary(items, clusters, margin)


def _anchored(config: Config) -> Config:
    """The settings with absolute paths, so that a run can be continued from any folder; raises UsageError for an unknown model source."""
    weights, labels, student, named = config.model.weights, config.evaluate.labels, config.compress.student, config.augment.policy
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, data=absolute(config.data.data)),
        model=dataclasses.replace(
            config.model,
            model=_anchored_source(config.model.model),
            weights=weights and absolute(weights),
            pretrained=config.model.pretrained and _anchored_source(config.model.pretrained),
        ),
        augment=dataclasses.replace(config.augment, policy=named if named in POLICIES else named and absolute(named)),
        compress=dataclasses.replace(config.compress, student=student and _anchored_source(student)),
        evaluate=dataclasses.replace(config.evaluate, labels=labels if labels == "folders" else labels and absolute(labels)),
    )


def _anchored_source(source: str) -> str:
    kind = sources.kind_of(source)
    if kind in ("file", "onnx"):
        return absolute(source)
    return f"hf:{absolute(source[3:])}" if kind == "hf" and Path(source[3:]).expanduser().is_dir() else source


def continue_config(run: str | Path, given: Mapping[str, Any], file: str | Path | None = None) -> Config:
    """Settings for a verb on a run folder: those of its last command, under those of a file, under those given."""
    settings = Path(run) / "settings.json"
    known = read_json(settings) if settings.is_file() else {}
    if not known and "data" not in given and file is None:
        raise UsageError(f"{run}: is not a run folder (no settings.json); name an existing one, or what to read with --data")
    if file is not None:
        known |= read_toml(Path(file))
    return build_config(known | dict(given) | {"out": str(run)})
