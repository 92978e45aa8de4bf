"""How each record lies on disk: Parquet for tables, safetensors for weights, ONNX for graphs, JSON for the rest.

One pair of functions per record, `save(folder, record) -> files` and `load(folder) -> record`; workspace.py decides
where and when.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from attar import records as r
from attar.errors import WorkspaceError


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, default=_plain) + "\n", "utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(dict(row), default=_plain) + "\n" for row in rows), "utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def write_table(path: Path, table: pa.Table) -> None:
    # No dictionary of library versions and no statistics that could differ between machines: equal tables are equal bytes.
    pq.write_table(table.replace_schema_metadata(None), path, compression="zstd", store_schema=True)


def shard_table(ids: np.ndarray, values: np.ndarray) -> pa.Table:
    """A shard of vectors as a table: id, vector (fixed-size list)."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return pa.table({"id": pa.array(ids, pa.int64()), "vector": pa.FixedSizeListArray.from_arrays(flat, values.shape[1])})


def read_shard(path: Path) -> r.Shard:
    table = pq.read_table(path)
    column = table["vector"].combine_chunks()
    return r.Shard(table["id"].to_numpy(), column.flatten().to_numpy().reshape(len(column), -1))


def _save_items(folder: Path, items: r.Items) -> None:
    write_table(folder / "items.parquet", items.table)
    write_table(folder / "quarantine.parquet", items.quarantine)
    write_json(folder / "items.json", {"root": items.root})


def _load_items(folder: Path) -> r.Items:
    root = read_json(folder / "items.json")["root"]
    return r.Items(root=root, table=pq.read_table(folder / "items.parquet"), quarantine=pq.read_table(folder / "quarantine.parquet"))


NAMES = "names.json"
"""The file of a run folder that holds the names people gave to clusters."""
HEAD_ARRAYS = ("mean", "projection", "centroids", "weights", "bias")


def _head_arrays(head: r.Head) -> dict[str, np.ndarray]:
    """The arrays a head has; the last two only where it is linear."""
    return {key: value for key in HEAD_ARRAYS if (value := getattr(head, key)) is not None}


def save_model(folder: Path, model: r.Model, name: str) -> None:
    """NAME.safetensors and NAME.json; the head's arrays travel with the weights under "head." names."""
    import torch
    from safetensors.torch import save

    state = {key: value.detach().contiguous().clone() for key, value in model.state.items()}
    if model.head:
        state |= {f"head.{key}": torch.from_numpy(np.ascontiguousarray(value)) for key, value in _head_arrays(model.head).items()}
    (folder / f"{name}.safetensors").write_bytes(save(state))  # save_file hides a full disk in an error of its own
    body = {item.name: getattr(model, item.name) for item in dataclasses.fields(model) if item.name not in ("state", "head", "preprocess")}
    body |= {"preprocess": dataclasses.asdict(model.preprocess), "temperature": model.head and model.head.temperature}
    write_json(folder / f"{name}.json", body)


def load_model(folder: Path, name: str) -> r.Model:
    from safetensors.torch import load_file

    body = read_json(folder / f"{name}.json")
    state = load_file(folder / f"{name}.safetensors")
    temperature = body.pop("temperature")
    arrays = {key: state.pop(f"head.{key}").numpy() for key in HEAD_ARRAYS if f"head.{key}" in state}
    head = r.Head(**arrays, temperature=temperature) if temperature is not None else None
    pre: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in body.pop("preprocess").items()}
    body |= {key: tuple(body[key]) for key in ("shape", "classes", "cuts", "lineage", "signals")}
    return r.Model(state=state, head=head, preprocess=r.Preprocess(**pre), **body)


def _save_vectors(folder: Path, vectors: r.Vectors) -> None:
    (folder / "vectors").mkdir()
    for number, (ids, values) in enumerate(vectors.batches()):
        write_table(folder / "vectors" / f"{number:05d}.parquet", shard_table(ids, values))
    write_json(folder / "vectors" / "vectors.json", {"count": vectors.count, "dim": vectors.dim, "signals": vectors.signals})
    save_model(folder / "vectors", vectors.model, "encoder")
    if vectors.signals:
        write_lines(folder / "vectors" / "metrics.jsonl", vectors.signals)


def _read_whole(path: Path, dim: int) -> r.Shard:
    """A shard of a finished run; raises WorkspaceError for one that is damaged or of another length of vectors."""
    try:
        shard = read_shard(path)
    except (pa.ArrowException, OSError) as error:
        what = f"cannot be read ({str(error).partition('.')[0][:100]})"
    else:
        if shard.values.shape[1] == dim:
            return shard
        what = f"holds vectors of {shard.values.shape[1]} numbers, the run's have {dim}"
    root = path.parents[1]
    raise WorkspaceError(f"{path}: {what}; delete it, then run: attar embed {root}, which makes the vectors again") from None


def _load_vectors(folder: Path) -> r.Vectors:
    body = read_json(folder / "vectors" / "vectors.json")
    shards = [functools.partial(_read_whole, path, body["dim"]) for path in sorted((folder / "vectors").glob("*.parquet"))]
    signals = tuple(body.pop("signals"))
    return r.Vectors(shards=shards, model=load_model(folder / "vectors", "encoder"), signals=signals, **body)


def _save_clusters(folder: Path, clusters: r.Clusters) -> None:
    write_table(folder / "clusters.parquet", clusters.table)
    head = _head_arrays(clusters.head) | {"temperature": clusters.head.temperature}
    body = {"medoids": clusters.medoids, "curve": clusters.curve, "separation": clusters.separation, "method": clusters.method}
    write_json(folder / "clusters.json", body | {"head": head})


def _load_clusters(folder: Path) -> r.Clusters:
    body = read_json(folder / "clusters.json")
    head = body.pop("head")
    given = read_json(folder / NAMES) if (folder / NAMES).is_file() else {"medoids": [], "names": []}
    if given["medoids"] == body["medoids"]:  # else they are of other clusters, until the stage's end has carried them over
        body["names"] = {row["cluster"]: row["name"] for row in given["names"]}
    arrays = {key: np.asarray(head[key], np.float32) for key in HEAD_ARRAYS if key in head}
    return r.Clusters(
        table=pq.read_table(folder / "clusters.parquet"),
        head=r.Head(**arrays, temperature=head["temperature"]),
        medoids=np.asarray(body.pop("medoids"), np.int64),
        curve=tuple(body.pop("curve")),
        **body,
    )


def _save_selection(folder: Path, selection: r.Selection) -> None:
    write_table(folder / "selection.parquet", selection.table)
    write_json(folder / "selection.json", {"thresholds": selection.thresholds})


def _load_selection(folder: Path) -> r.Selection:
    return r.Selection(table=pq.read_table(folder / "selection.parquet"), **read_json(folder / "selection.json"))


def _save_policy(folder: Path, policy: r.Policy) -> None:
    body = dataclasses.asdict(policy)
    del body["generated"]  # the folder beside it
    write_json(folder / "policy.json", body)
    if policy.generated is not None:
        shutil.copytree(policy.generated, folder / "generated")


def _load_policy(folder: Path) -> r.Policy:
    body = read_json(folder / "policy.json")
    dials = [{name: r.Dial(*dial) for name, dial in families.items()} for families in (body.pop("families"), *body.pop("clusters"))]
    made = folder / "generated"
    body |= {"evidence": tuple(body["evidence"]), "generated": made if (made / "samples.parquet").is_file() else None}
    return r.Policy(families=dials[0], clusters=tuple(dials[1:]), **body)


def _save_ranking(folder: Path, found: r.Ranking) -> None:
    home = folder / "search"
    home.mkdir()
    _save_policy(home, found.policy)
    write_json(home / "table.json", {"verdict": found.verdict, "rows": found.rows})
    with (home / "table.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(found.rows[0]))
        writer.writeheader()
        writer.writerows(found.rows)


def _load_ranking(folder: Path) -> r.Ranking:
    body = read_json(folder / "search" / "table.json")
    return r.Ranking(policy=_load_policy(folder / "search"), rows=tuple(body["rows"]), verdict=body["verdict"])


def _save_objects(folder: Path, found: r.Objects) -> None:
    from attar.stages.objects import coco

    home = folder / "objects"
    home.mkdir()
    for number, table in enumerate(found.batches()):
        write_table(home / f"{number:05d}.parquet", table)
    write_table(home / "images.parquet", found.images)
    write_json(home / "kinds.json", {"kinds": found.kinds, "method": found.method})
    (home / "sheet.png").write_bytes(found.sheet)
    coco.write(home / "objects.json", found)


def _load_objects(folder: Path) -> r.Objects:
    home = folder / "objects"
    body = read_json(home / "kinds.json")
    shards = [functools.partial(pq.read_table, path) for path in sorted(home.glob("[0-9]*.parquet"))]
    images, sheet = pq.read_table(home / "images.parquet"), (home / "sheet.png").read_bytes()
    return r.Objects(shards=shards, images=images, kinds=tuple(body["kinds"]), method=body["method"], sheet=sheet)


def _save_original(folder: Path, model: r.Model) -> None:
    (folder / "original").mkdir()
    save_model(folder / "original", model, "original")


def save_candidate(folder: Path, candidate: r.Candidate) -> None:
    """One folder per candidate: model.onnx, weights.safetensors, weights.json, candidate.json."""
    folder.mkdir(parents=True)
    shutil.copyfile(candidate.onnx, folder / "model.onnx")
    save_model(folder, candidate.model, "weights")
    body = {key: getattr(candidate, key) for key in ("name", "precision", "runtime", "figures")}
    write_json(folder / "candidate.json", body)


def load_candidate(folder: Path) -> r.Candidate:
    return r.Candidate(model=load_model(folder, "weights"), onnx=folder / "model.onnx", **read_json(folder / "candidate.json"))


def _save_front(folder: Path, front: r.Front) -> None:
    for candidate in (front.original, *front.candidates):
        save_candidate(folder / "candidates" / candidate.name, candidate)
    body = {key: getattr(front, key) for key in ("chosen", "budget", "met", "reason", "threads")}
    write_json(folder / "candidates" / "front.json", body | {"order": [candidate.name for candidate in front.candidates]})


def _load_front(folder: Path) -> r.Front:
    body = read_json(folder / "candidates" / "front.json")
    load = {name: load_candidate(folder / "candidates" / name) for name in (*body["order"], "original")}
    return r.Front(original=load["original"], candidates=tuple(load[name] for name in body.pop("order")), **body)


def _save_evidence(folder: Path, evidence: r.Evidence) -> None:
    body = {"figures": [figure._asdict() for figure in evidence.figures], "per_cluster": evidence.per_cluster, "notes": evidence.notes}
    write_json(folder / "evidence.json", body)


def _load_evidence(folder: Path) -> r.Evidence:
    body = read_json(folder / "evidence.json")
    figures = tuple(r.Figure(**figure) for figure in body["figures"])
    return r.Evidence(figures=figures, per_cluster=tuple(body["per_cluster"]), notes=tuple(body["notes"]))


def _save_export(folder: Path, export: r.Export) -> None:
    (folder / "model").mkdir()
    shutil.copyfile(export.onnx, folder / "model" / "student.onnx")
    write_json(folder / "model" / "card.json", export.card)
    write_json(folder / "model" / "checks.json", export.checks)


def _load_export(folder: Path) -> r.Export:
    home = folder / "model"
    return r.Export(onnx=home / "student.onnx", card=read_json(home / "card.json"), checks=read_json(home / "checks.json"))


def _save_page(folder: Path, page: r.Page) -> None:
    (folder / "report.html").write_text(page.html, "utf-8")
    write_json(folder / "result.json", {"sentence": page.sentence})


def _load_page(folder: Path) -> r.Page:
    return r.Page(html=(folder / "report.html").read_text("utf-8"), sentence=read_json(folder / "result.json")["sentence"])


class Format:
    """How one record is saved and loaded; the files it makes are found by comparing the folder before and after."""

    def __init__(self, save: Callable[[Path, Any], None], load: Callable[[Path], Any]) -> None:
        self.save, self.load = save, load


FORMATS: dict[type, Format] = {
    r.Items: Format(_save_items, _load_items),
    r.Vectors: Format(_save_vectors, _load_vectors),
    r.Clusters: Format(_save_clusters, _load_clusters),
    r.Selection: Format(_save_selection, _load_selection),
    r.Policy: Format(_save_policy, _load_policy),
    r.Ranking: Format(_save_ranking, _load_ranking),
    r.Objects: Format(_save_objects, _load_objects),
    r.Model: Format(_save_original, lambda folder: load_model(folder / "original", "original")),
    r.Front: Format(_save_front, _load_front),
    r.Evidence: Format(_save_evidence, _load_evidence),
    r.Export: Format(_save_export, _load_export),
    r.Page: Format(_save_page, _load_page),
}
