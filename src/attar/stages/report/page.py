"""The report: one page that opens from disk with no network and says what came out, from what, and how surely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from attar.records import Clusters, Evidence, Export, Front, Items, Model, Page, Policy, Selection, Vectors
from attar.runtime import DEFAULT, where
from attar.stages.report import charts, folder, origin, pictures, result, words
from attar.workspace import Job

HERE = Path(__file__).parent
MEASURED = 200  # rows of measurements shown
TINY = 64  # pixels; smaller images are enlarged with sharp edges


def report(
    items: Items,
    vectors: Vectors,
    clusters: Clusters,
    selection: Selection,
    policy: Policy,
    model: Model,
    front: Front,
    evidence: Evidence,
    export: Export,
    settings: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    job: Job,
) -> Page:
    """The page of a finished run: what you get, from what, how it was made, and how sure each figure is.

    `settings` is name → value; `history` has one {"stage", "seconds", "notes"} per stage, in the order of the spine.
    The same records give the same bytes: nothing on the page tells the time it was written at.
    """
    classes = bool(model.classes)
    text = result.sentence(front, evidence, classes)
    body = {
        "sentence": result.emphasised(text),
        "root": words.plain(items.root),
        "front": front,
        "keys": result.keys(front, evidence, classes),
        "folder": folder.section(items, vectors, clusters, selection),
        **_pictured(items, vectors, clusters, selection, policy, model, job),
        "dials": dials(policy),
        "policy": policy,
        "policy_evidence": measurements(policy),
        "live": live(vectors.signals, model.signals),
        "pareto": result.pareto(front),
        "candidates": result.candidates(front),
        "changes": result.changes(front, evidence),
        "per_cluster": result.per_cluster(evidence),
        "overall": evidence.get("agreement"),
        "notes": evidence.notes,
        "checks": result.checks(export.checks),
        **_use(items, export),
        "settings": origin.settings(settings),
        "seed": job.seed,
        "versions": origin.versions(front, export),
        "stages": origin.stages(history),
        "lineage": front.student.model.lineage,
    }
    return Page(html=_environment().get_template("template.html").render(body), sentence=text)


def _pictured(
    items: Items, vectors: Vectors, clusters: Clusters, selection: Selection, policy: Policy, model: Model, job: Job
) -> dict[str, Any]:
    """Everything that shows photos; each file is opened once."""
    spots = folder.spots(vectors, clusters, job)
    paired, strange, leaked = folder.pairs_to_show(selection), folder.strangest(clusters), folder.leaked(selection)[: folder.SHOWN]
    faulty = folder.flagged(selection)
    others = [
        *selection.column("id")[paired],
        *selection.column("witness")[paired],
        *clusters.column("id")[strange],
        *leaked,
        *selection.column("id")[faulty],
    ]
    album = pictures.Album(items)
    with pictures.opened(items, model.preprocess, job.workers) as loader:
        wanted = pictures.wanted(pictures.members(clusters, selection), clusters.medoids, others, spots.ids[spots.pictured])
        album.load(loader, wanted, job)
        views = pictures.augmented(loader, items, clusters, policy, album.missing, job)
    return {
        "map": folder.draw_map(spots, album, len(items), clusters.names),
        "galleries": pictures.galleries(clusters, selection, album),
        "pairs": folder.pairs(selection, paired, album),
        "outliers": folder.outliers(clusters, selection, strange, album),
        "faults": folder.faults(selection, faulty, album),
        "leaked": [album.photo(item) for item in leaked],
        "missing": len(album.missing),
        "tiny": bool(np.median(np.maximum(items.column("width"), items.column("height"))) < TINY),
        "views": views,
    }


def dials(policy: Policy) -> dict[str, Any]:
    """Strength and frequency of each family, overall and per cluster; a frequency that is the same everywhere is said once."""
    rows = [("overall", policy.families), *((f"cluster {number}", families) for number, families in enumerate(policy.clusters))]
    names = list(dict.fromkeys(name for _, families in rows for name in families))
    often = {name: {families[name].frequency for _, families in rows if name in families} for name in names}
    heads = [(name, often[name].pop() if len(often[name]) == 1 else None) for name in names]
    return {"heads": heads, "rows": [(label, [families.get(name) for name in names]) for label, families in rows]}


def measurements(policy: Policy) -> list[tuple[list[str], list[list[str]]]]:
    """The measurements behind the dials as tables: names, rows; one table per set of names."""
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for row in policy.evidence[:MEASURED]:
        tables.setdefault(tuple(row), []).append([words.value(each) for each in row.values()])
    return [(list(names), rows) for names, rows in tables.items()]


def live(*curves: Sequence[Mapping[str, float]]) -> dict[str, Any] | None:
    """How the dials moved in the last of some training curves that moved any: charts by family, and where each cluster's ended."""
    moving = [curve for curve in curves if sum("strength" in row for row in curve) > 1]
    if not moving:
        return None
    rows = [row for row in moving[-1] if "strength" in row]
    names = list(dict.fromkeys(key[9:-1] for row in rows for key in row if key.startswith("strength[") and ", cluster " not in key))
    drawn = []
    for name in names:
        lines = [[(float(row["step"]), float(row[f"{dial}[{name}]"])) for row in rows] for dial in ("strength", "frequency")]
        drawn.append((words.label(name), charts.line(lines[0], title="strength", across="step", second=("frequency", lines[1]))))
    ended, count = rows[-1], sum(key.startswith(f"strength[{names[0]}, cluster ") for key in rows[-1])
    cell = "{:.2f}, {:.0f} %".format
    table = [
        [cell(ended[f"strength[{name}, cluster {number}]"], 100 * ended[f"frequency[{name}, cluster {number}]"]) for name in names]
        for number in range(count)
    ]
    return {"charts": drawn, "names": [words.label(name) for name in names], "clusters": table}


def _use(items: Items, export: Export) -> dict[str, str]:
    """The code and the command, with the run's own paths in them."""
    first = next((file for path in items.column("path")[:20] if (file := Path(items.root) / path).is_file()), Path("photo.jpg"))
    files = [str(first)]
    use = {"snippet": origin.snippet(str(export.onnx), files), "command": origin.command(str(export.onnx.parent), files)}
    return use | {"place": where(export.card.get("runtime", DEFAULT))}


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "plain": words.plain,
        "closed": words.closed,
        "middle": words.middle,
        "percent": words.percent,
        "hue": charts.hue,
        "label": words.label,
    }
    environment.globals |= {
        "style": Markup((HERE / "style.css").read_text("utf-8")),
        "script": Markup((HERE / "page.js").read_text("utf-8")),
    }
    return environment
