"""export: the chosen candidate becomes RUN/model — one ONNX file that says how to feed it, checked against torch on real items."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from attar import __version__
from attar.modalities.image import Loader
from attar.models import sources
from attar.models.network import Shipped
from attar.records import Evidence, Export, Front, Items, Model
from attar.runtime import open_session, outputs
from attar.stages.augment.engine import normalise
from attar.workspace import Job


def write_onnx(model: Model, path: Path) -> None:
    """The file of a model: image (n, 3, height, width) normalised → embedding, cluster_probabilities, logits where it has classes."""
    shipped = Shipped(sources.network(model), model.head).eval()  # type: ignore[arg-type]
    names = ["embedding", "cluster_probabilities", *(["logits"] if model.classes else [])]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracer warnings about Python values that are constant here: the size is fixed
        torch.onnx.export(
            shipped,
            (sources.example_input(model, 2),),
            str(path),
            dynamo=False,  # one second instead of ten, readable node names, no further package
            opset_version=17,
            input_names=["image"],
            output_names=names,
            dynamic_axes={name: {0: "items"} for name in ("image", *names)},
        )


def export(items: Items, model: Model, front: Front, evidence: Evidence, job: Job) -> Export:
    """The delivered file with its metadata, its card, and how far it is from the torch model on real test items."""
    student = front.student
    lineage = [*student.model.lineage, f"delivered as {student.precision}"]
    card: dict[str, Any] = {
        "attar": __version__,
        "file": "student.onnx",
        "precision": student.precision,
        "input": {"name": "image", "type": "float32", "shape": ["items", 3, *model.preprocess.size], "colour": "RGB"},
        "outputs": ["embedding", "cluster_probabilities", *(["logits"] if model.classes else [])],
        "preprocess": dataclasses.asdict(model.preprocess),
        "classes": list(model.classes),
        "clusters": len(model.head.centroids),  # type: ignore[union-attr]
        "budget": {"asked": front.budget, "met": front.met, "reason": front.reason},
        "figures": [figure._asdict() for figure in evidence.figures],
        "notes": list(evidence.notes),
        "lineage": lineage,
    }
    graph = onnx.load(student.onnx)
    known = {key: card[key] for key in ("preprocess", "classes", "clusters", "lineage")} | {"version": __version__}
    graph.metadata_props.add(key="attar", value=json.dumps(known, ensure_ascii=False))
    file = job.folder / "student.onnx"
    job.folder.mkdir(parents=True, exist_ok=True)
    onnx.save(graph, file)
    checks = check(file, student.model, items, job)
    job.say(", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in checks.items()))
    return Export(onnx=file, card=card | {"checks": checks}, checks=checks)


def check(file: Path, model: Model, items: Items, job: Job, count: int = 128) -> dict[str, float]:
    """The file against the torch model it was made from, on test items: cosine of embeddings and equal decisions."""
    ids = items.ids("test")[:count]
    network: nn.Module = Shipped(sources.network(model), model.head).eval()  # type: ignore[arg-type]
    session, preprocess = open_session(file), model.preprocess
    cosine, equal, largest = [], [], 0.0
    with Loader(items, preprocess, workers=job.workers) as loader, torch.no_grad():
        for _, images in loader.stream(np.array_split(ids, -(-len(ids) // 32))):
            batch = normalise(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, preprocess.mean, preprocess.std)
            ours = [output.numpy() for output in network(batch)]
            theirs = list(outputs(session, batch.contiguous().numpy()).values())
            norms = np.linalg.norm(ours[0], axis=1) * np.linalg.norm(theirs[0], axis=1)
            cosine.append((ours[0] * theirs[0]).sum(1) / np.maximum(norms, 1e-12))
            equal.append(ours[-1].argmax(1) == theirs[-1].argmax(1))
            largest = max(largest, float(np.abs(ours[0] - theirs[0]).max()))
    return {
        "items": float(len(ids)),
        "embedding_cosine": float(np.concatenate(cosine).mean()),
        "embedding_largest_difference": largest,
        "equal_decisions": float(np.concatenate(equal).mean()),
    }
