"""Made records of a small, complete run, and what a browser would see of its report."""

from __future__ import annotations

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
from PIL import Image

from attar import records as r
from attar.config import build_config, flatten
from attar.workspace import Job

COUNT = 36
HOSTILE = """a"b'<script>alert(1)<&amp;>é日本.png"""
LONG = "long-" * 40 + "end.png"
PREPROCESS = r.Preprocess(size=(16, 16), resize_shortest=18, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), origin="the test")


def figure(name: str, of: str, value: float, low: float, high: float, n: int = 268, unit: str = "share") -> r.Figure:
    return r.Figure(name, of, value, low, high, n, "test" if unit == "share" else "", "exact 95 %", unit)


def tiny_onnx(path: Path, classes: tuple[str, ...]) -> None:
    """A real file of the delivered kind: means of the channels as embedding and logits, their softmax as clusters."""
    make = onnx.helper.make_node
    nodes = [
        make("ReduceMean", ["image"], ["embedding"], axes=[2, 3], keepdims=0),
        make("Softmax", ["embedding"], ["cluster_probabilities"]),
    ]
    names = ["embedding", "cluster_probabilities"]
    if classes:
        nodes.append(make("Neg", ["embedding"], ["logits"]))
        names.append("logits")
    kind = onnx.TensorProto.FLOAT
    outputs = [onnx.helper.make_tensor_value_info(name, kind, ["items", 3]) for name in names]
    inputs = [onnx.helper.make_tensor_value_info("image", kind, ["items", 3, 16, 16])]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "tiny", inputs, outputs), opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )
    known = {"preprocess": dataclasses.asdict(PREPROCESS), "classes": list(classes), "clusters": 3, "lineage": []}
    model.metadata_props.add(key="attar", value=json.dumps(known))
    onnx.save(model, path)


def made_items(root: Path) -> tuple[r.Items, np.ndarray]:
    """COUNT small files with hostile names among them, in three groups of colour; and the group of each."""
    rng, rows = np.random.default_rng(0), []
    group = np.arange(COUNT) % 3
    root.mkdir(parents=True)
    for item in range(COUNT):
        name = {0: HOSTILE, 1: LONG}.get(item, f"{item:03d}.png")
        pixels = rng.integers(0, 90, (24, 20, 3)).astype(np.uint8)
        pixels[..., group[item]] += 150
        Image.fromarray(pixels).save(root / name, "PNG")
        split = "test" if item % 6 == 4 else "validation" if item % 6 == 5 else "train"
        rows.append((item, name, "image", f"{item:032x}", (root / name).stat().st_size, 20, 24, "PNG", None, split, "", bytes(256), 0.3))
    table = pa.table([pa.array(column, kind) for column, kind in zip(zip(*rows), r.ITEM_SCHEMA.types)], schema=r.ITEM_SCHEMA)
    broken = [
        {"path": f"<img src=x onerror=alert(1)>{i}", "reason": "the file is empty (0 bytes)", "remedy": "delete it"} for i in range(2)
    ]
    return r.Items(root=str(root), table=table, quarantine=pa.Table.from_pylist(broken, r.QUARANTINE_SCHEMA)), group


def records(root: Path, classes: tuple[str, ...] = ("cat", "<dog>", "cow")) -> dict[str, Any]:
    """Everything a report is made from: small, complete, with something under every heading."""
    items, group = made_items(root / "photos & more")
    rng = np.random.default_rng(1)
    values = (np.eye(3, 8)[group] + 0.1 * rng.normal(size=(COUNT, 8))).astype(np.float32)
    model = r.Model(source={"source": "self"}, state={}, preprocess=PREPROCESS, classes=classes, lineage=("made <here>",))
    signals = tuple({"step": s, "loss": 5.0 - s / 10, "validation_loss": 5.2 - s / 10, "effective_rank": 3.0 + s} for s in range(0, 30, 10))
    ids = np.arange(COUNT)
    clusters = r.Clusters(
        table=pa.table(
            [ids, group, np.full(COUNT, -1), rng.random(COUNT), rng.random(COUNT), rng.random(COUNT)], r.CLUSTER_SCHEMA.names
        ).cast(r.CLUSTER_SCHEMA),
        head=r.Head(
            mean=np.zeros(8, np.float32), projection=np.eye(8, 4, dtype=np.float32), centroids=np.eye(3, 4, dtype=np.float32), temperature=1
        ),
        medoids=np.array([0, 1, 2]),
        curve=tuple({"k": k, "score": 0.1 * k} for k in (2, 3, 4)),
        separation=-0.25,
        method="k-means, 3 clusters: as asked for",
    )
    reason = np.full(COUNT, "", object)
    reason[[3, 4, 9, 12]] = "exact duplicate", "near duplicate", "outlier", "redundant"
    witness = np.where(np.isin(ids, [3, 4]), 0, -1)
    flag = np.where(ids == 12, "dark, odd size", "").astype(object)
    table = pa.table(
        [ids, reason == "", reason, witness, np.where(witness >= 0, 0.98, 0), 1.0 * (reason == ""), ids == 10, flag],
        r.SELECTION_SCHEMA.names,
    )
    costs = {"size": 2.6e6, "parameters": 9e5, "macs": 4e7, "latency": 3.4, "agreement": 1.0, "n": 120.0}
    file = root / "run" / "model" / "student.onnx"
    file.parent.mkdir(parents=True)
    tiny_onnx(file, classes)
    original = r.Candidate(name="original", model=model, onnx=file, precision="float32", figures=costs)
    small = {
        "size": 4.2e5,
        "parameters": 3e5,
        "macs": 1e7,
        "latency": 1.0,
        "agreement": 0.975,
        "n": 120.0,
        "latency_ratio": 0.29,
        "size_ratio": 0.16,
    }
    students = [
        r.Candidate(name="half-int8", model=model, onnx=file, precision="int8", figures=small),
        r.Candidate(
            name="half", model=model, onnx=file, precision="float32", figures=small | {"size": 1.6e6, "latency": 1.9, "agreement": 0.99}
        ),
    ]
    evidence = [
        figure("agreement", "student", 0.978, 0.952, 0.99),
        figure("size", "original", 2.6e6, 2.6e6, 2.6e6, 1, "bytes"),
        figure("size", "student", 4.2e5, 4.2e5, 4.2e5, 1, "bytes"),
        figure("latency_ms", "original", 3.4, 3.3, 3.5, 30, "ms"),
        figure("latency_ms", "student", 1.0, 0.98, 1.1, 30, "ms"),
        figure("latency_ratio", "student", 0.294, 0.28, 0.32, 30, "ratio"),
        figure("accuracy", "original", 0.9, 0.85, 0.94),
        figure("accuracy", "student", 0.89, 0.84, 0.93),
        figure("accuracy_difference", "student", -0.01, -0.03, 0.004),
        figure("f1[<dog>]", "student", 0.8, 0.7, 0.9, 40),
    ]
    rows = [{"cluster": c, "n": 9, "value": v, "low": v - 0.2, "high": h} for c, v, h in ((0, 1.0, 1.0), (1, 0.98, 1.0), (2, 0.6, 0.9))]
    families = {
        "geometry": r.Dial(0.8, 0.9),
        "flip": r.Dial(1, 0.5),
        "colour": r.Dial(0.5, 0.8),
        "blur": r.Dial(0.5, 0.2),
        "erase": r.Dial(0.5, 0.1),
    }
    measured = ({"family": "flip", "value": 0.51}, {"family": "blur", "strength": 0.2, "kept": 0.97, "n": 64})
    return {
        "items": items,
        "vectors": r.Vectors(shards=[lambda: r.Shard(ids, values)], count=COUNT, dim=8, model=model, signals=signals),
        "clusters": clusters,
        "selection": r.Selection(table=table.cast(r.SELECTION_SCHEMA), thresholds={"near_duplicate": 0.97}),
        "policy": r.Policy(families=families, clusters=(families, families, families | {"blur": r.Dial(0.1, 0.9)}), evidence=measured),
        "model": model,
        "front": r.Front(
            original=original,
            candidates=tuple(students),
            chosen="half-int8",
            budget="latency<=0.5x, size<=1MB, agreement>=0.95",
            met=True,
            reason="1 of 2 candidates meet it",
            threads=1,
        ),
        "evidence": r.Evidence(figures=tuple(evidence), per_cluster=tuple(rows), notes=("<b>note</b>",)),
        "export": r.Export(onnx=file, card={}, checks={"items": 6.0, "embedding_cosine": 0.99987, "equal_decisions": 1.0}),
        "settings": flatten(build_config({"data": str(root), "clusters": 3, "mean": (0.4, 0.5, 0.6)})),
        "history": [{"stage": "scan", "seconds": 1.25, "notes": ["2 files set <aside>"]}, {"stage": "embed", "seconds": 75.0, "notes": []}],
        "job": Job("report", root / "job", quiet=True),
    }


class Reader(HTMLParser):
    """What a browser would see: elements, their attributes, the text of each kind of element."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag: str) -> list[str]:
        return [text for kind, text in self.texts if kind == tag]
