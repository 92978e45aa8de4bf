"""One suite over all model sources, and one over all stages of the spine."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pytest
import torch
from contract import SOURCES, halved, onnx_outputs, reloaded, resolved, torch_outputs
from networks import images
from report_records import PREPROCESS, tiny_onnx

from attar import records as r
from attar.config import Config
from attar.formats import FORMATS
from attar.models import sources
from attar.pipeline import SPINE


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_goes_from_its_string_to_a_small_file_that_runs(name: str, items: r.Items, tmp_path: Path) -> None:
    model = resolved(name, items, tmp_path)
    batch = images(6, model.preprocess.size[0])
    embedding, logits = sources.network(model)(batch)
    assert embedding.shape == (6, len(model.head.mean))
    assert bool(torch.isfinite(embedding).all())
    assert (logits is not None) == bool(model.classes)
    cut = halved(model)
    assert cut is not None, "every source here has channels that can be cut"
    assert cut.macs < model.macs
    assert cut.parameters < model.parameters
    for kept, folder in ((model, "whole"), (cut, "half")):
        again = reloaded(kept, tmp_path / folder)
        ours = torch_outputs(kept, batch)
        assert all(np.array_equal(a, b) for a, b in zip(ours, torch_outputs(again, batch), strict=True))
        theirs = onnx_outputs(again, tmp_path / f"{folder}.onnx", batch)
        assert list(theirs) == ["embedding", "cluster_probabilities", *(["logits"] if model.classes else [])]
        for a, b in zip(ours, theirs.values(), strict=True):
            assert np.isfinite(b).all()
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * max(1, np.abs(a).max()))
        assert onnx_outputs(again, tmp_path / f"{folder}.onnx", batch[:1])["embedding"].shape == (1, embedding.shape[1])


def _model(head: r.Head) -> r.Model:
    return r.Model(
        source={"kind": "self", "side": 16, "width": 8, "classifier": None},
        state={"body.weight": torch.arange(6.0).reshape(2, 3)},
        preprocess=PREPROCESS,
        classes=("a", "b"),
        cuts=(["body.conv", [0, 2]],),
        head=head,
        parameters=6,
        macs=12,
        lineage=("made",),
        signals=({"step": 1, "loss": 0.5},),
    )


def _records(folder: Path, items: r.Items) -> dict[type, Any]:
    """One small record of every class that a stage returns."""
    rng = np.random.default_rng(0)
    mean, projection, centroids = (rng.normal(size=shape).astype(np.float32) for shape in (4, (4, 2), (3, 2)))
    head = r.Head(mean=mean, projection=projection, centroids=centroids, temperature=0.5)
    model, n = _model(head), len(items)
    tiny_onnx(folder / "tiny.onnx", ("a", "b"))
    values = rng.normal(size=(n, 4)).astype(np.float16)
    halves = [r.Shard(items.ids()[:20], values[:20]), r.Shard(items.ids()[20:], values[20:])]
    shards = [lambda half=half: half for half in halves]
    clusters = pa.table([items.ids(), *[np.zeros(n)] * 5], names=r.CLUSTER_SCHEMA.names).cast(r.CLUSTER_SCHEMA)
    selection = pa.table(
        [items.ids(), np.ones(n, bool), [""] * n, np.full(n, -1), np.zeros(n), np.ones(n), np.zeros(n, bool), [""] * n],
        names=r.SELECTION_SCHEMA.names,
    ).cast(r.SELECTION_SCHEMA)
    figure = r.Figure("agreement", "student", 0.9, 0.8, 0.95, 40, "test", "exact 95 %", "share")
    candidates = [
        r.Candidate(name=name, model=model, onnx=folder / "tiny.onnx", precision="float32", figures={"size": 1.0})
        for name in ("original", "cut50-int8", "cut75-int8")
    ]
    dials = {"flip": r.Dial(1.0, 0.5)}
    front = {"chosen": "cut75-int8", "budget": "size<=0.5x", "met": True, "reason": "made", "threads": 1}
    return {
        r.Items: items,
        r.Vectors: r.Vectors(shards=shards, count=n, dim=4, model=model, signals=({"step": 1.0},)),
        r.Clusters: r.Clusters(
            table=clusters, head=head, medoids=np.arange(3), curve=({"k": 3, "score": 0.2},), separation=0.2, method="m"
        ),
        r.Selection: r.Selection(table=selection, thresholds={"near_duplicate": 0.97}),
        r.Policy: r.Policy(families=dials, clusters=(dials, {"flip": r.Dial(0.0, 0.0)}), method="made", evidence=({"family": "flip"},)),
        r.Model: model,
        r.Front: r.Front(original=candidates[0], candidates=tuple(candidates[1:]), **front),
        r.Evidence: r.Evidence(figures=(figure,), per_cluster=({"cluster": 0, "n": 3},), notes=("none",)),
        r.Export: r.Export(onnx=folder / "tiny.onnx", card={"file": "student.onnx"}, checks={"items": 3.0}),
        r.Page: r.Page(html="<p>é</p>", sentence="It works."),
    }


def _same(a: Any, b: Any) -> bool:
    """Whether two records hold the same, through tables, arrays, tensors, files and shards."""
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(_same(getattr(a, item.name), getattr(b, item.name)) for item in dataclasses.fields(a))
    if isinstance(a, Path):
        return a.read_bytes() == b.read_bytes()
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(one, other) for one, other in zip(a, b))
    return _same(a(), b()) if callable(a) else a == b


@pytest.mark.parametrize("stage", SPINE)
def test_a_stages_record_is_the_same_after_being_saved_and_loaded(stage: str, items: r.Items, tmp_path: Path) -> None:
    record, folder = _records(tmp_path, items)[SPINE[stage].record], tmp_path / "saved"
    folder.mkdir()
    FORMATS[type(record)].save(folder, record)
    again = FORMATS[type(record)].load(folder)
    assert _same(record, again)
    twice = tmp_path / "twice"
    twice.mkdir()
    FORMATS[type(record)].save(twice, again)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files
    assert all((folder / file).read_bytes() == (twice / file).read_bytes() for file in files), "equal records are equal bytes"


def test_the_comparison_of_records_sees_a_difference(items: r.Items, tmp_path: Path) -> None:
    records = _records(tmp_path, items)
    vectors = records[r.Vectors]
    ids, values = vectors.shards[1]()
    moved = dataclasses.replace(vectors, shards=[vectors.shards[0], lambda: r.Shard(ids, values + 1)])
    assert not _same(vectors, moved)
    weight = {"body.weight": torch.zeros(2, 3)}
    assert not _same(vectors, dataclasses.replace(vectors, model=dataclasses.replace(vectors.model, state=weight)))


@pytest.mark.parametrize("stage", SPINE)
def test_a_stage_says_what_it_does_and_takes_what_it_names(stage: str) -> None:
    entry = SPINE[stage]
    assert entry.make.__doc__
    assert entry.make.__doc__.strip().splitlines()[0].rstrip().endswith((".", ":"))
    names = list(SPINE)
    assert all(names.index(need) < names.index(stage) for need in entry.needs), "a stage reads what was made before it"
    assert set(entry.settings) <= {item.name for item in dataclasses.fields(Config)}
    parameters = inspect.signature(entry.make).parameters.values()
    if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        assert len(parameters) == len(entry.needs) + len(entry.settings) + 1


def test_the_made_file_is_valid(tmp_path: Path) -> None:
    tiny_onnx(tmp_path / "tiny.onnx", ())
    onnx.checker.check_model(onnx.load(tmp_path / "tiny.onnx"))
