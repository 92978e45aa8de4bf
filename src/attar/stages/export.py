"""export: the chosen candidate becomes RUN/model, one ONNX file that says how to feed it, checked against torch on real items."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from attar import __version__
from attar.modalities.image import Loader
from attar.models import sources
from attar.models.network import Shipped, to_onnx
from attar.records import Evidence, Export, Front, Items, Model
from attar.runtime import DEFAULT, open_session, outputs, where
from attar.stages.encode import as_input
from attar.workspace import Job

CHECKED = 128
"""Test items the file is checked on."""


def write_onnx(model: Model, path: Path) -> None:
    """The file of a model: inputs as it takes them → embedding, cluster_probabilities, logits where it has classes; a frozen model's own file.

    The input is called "image" where it has three axes (channels, height, width), else "input".
    """
    if model.source["kind"] == "onnx":
        shutil.copyfile(model.source["path"], path)
        return
    shipped = Shipped(sources.network(model), model.head)  # type: ignore[arg-type]
    example = sources.example_input(model, 2)
    names = ["embedding", "cluster_probabilities", *(["logits"] if model.classes else [])]
    to_onnx(shipped, example, path, "image" if example.dim() == 4 else "input", names)


def export(items: Items, model: Model, front: Front, evidence: Evidence, job: Job, names: Mapping[int, str] | None = None) -> Export:
    """The delivered file of a run folder with its metadata, names of clusters among it, and its card, checked on its test images."""
    preprocess, ids = model.preprocess, items.ids("test")[:CHECKED]

    def batches() -> Iterator[torch.Tensor]:
        with Loader(items, preprocess, workers=job.workers) as loader:
            for _, images in loader.stream(np.array_split(ids, -(-len(ids) // 32))):
                yield as_input(images, preprocess)

    return deliver(model, front, evidence, batches(), job, names)


def deliver(
    model: Model, front: Front, evidence: Evidence, batches: Iterable[torch.Tensor], job: Job, names: Mapping[int, str] | None = None
) -> Export:
    """The delivered file with its metadata, its card, and how far it is from the torch model on batches of test inputs."""
    student = front.student
    graph = onnx.load(student.onnx)
    session = open_session(student.onnx)
    (taken,) = session.get_inputs()
    example = sources.example_input(student.model)
    known: dict[str, Any] = {
        "classes": list(model.classes),
        "clusters": len(model.head.centroids),  # type: ignore[union-attr]
        "lineage": [*student.model.lineage, f"delivered as {student.precision}{where(student.runtime)}"],
    }
    if names:
        known["cluster_names"] = [names.get(number, f"cluster {number}") for number in range(known["clusters"])]
    if student.runtime != DEFAULT:  # the figures and the certificate hold in this runtime alone
        known = {"runtime": student.runtime} | known
    if not model.shape:  # tensors come prepared: nobody can prepare them from here
        known = {"preprocess": dataclasses.asdict(model.preprocess)} | known
    card: dict[str, Any] = {
        "attar": __version__,
        "file": "student.onnx",
        "precision": student.precision,
        "input": {"name": taken.name, "type": str(example.dtype).removeprefix("torch."), "shape": ["items", *example.shape[1:]]},
        "outputs": [output.name for output in session.get_outputs()],
        **known,
        "budget": {"asked": front.budget, "met": front.met, "reason": front.reason},
        "certificate": str(evidence.certificate),
        "figures": [figure._asdict() for figure in evidence.figures],
        "notes": list(evidence.notes),
    }
    if not model.shape:
        card["input"]["colour"] = "RGB"
    graph.metadata_props.add(key="attar", value=json.dumps(known | {"version": __version__}, ensure_ascii=False))
    file = job.folder / "student.onnx"
    job.folder.mkdir(parents=True, exist_ok=True)
    onnx.save(graph, file)
    checks = check(file, student.model, batches, student.runtime)
    job.say(", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in checks.items()) + where(student.runtime))
    return Export(onnx=file, card=card | {"checks": checks}, checks=checks)


def check(file: Path, model: Model, batches: Iterable[torch.Tensor], runtime: str = DEFAULT) -> dict[str, float]:
    """The file, in the runtime it is for, against the torch model it was made from, on batches of inputs: cosine of embeddings and equal
    decisions."""
    network: nn.Module = Shipped(sources.network(model), model.head).eval()  # type: ignore[arg-type]
    session = open_session(file, runtime=runtime)
    cosine, equal, largest = [], [], 0.0
    with torch.no_grad():
        for batch in batches:
            ours = [output.numpy() for output in network(batch)]
            theirs = list(outputs(session, batch.contiguous().numpy()).values())
            norms = np.linalg.norm(ours[0], axis=1) * np.linalg.norm(theirs[0], axis=1)
            cosine.append((ours[0] * theirs[0]).sum(1) / np.maximum(norms, 1e-12))
            equal.append(ours[-1].argmax(1) == theirs[-1].argmax(1))
            largest = max(largest, float(np.abs(ours[0] - theirs[0]).max()))
    return {
        "items": float(sum(map(len, equal))),
        "embedding_cosine": float(np.concatenate(cosine).mean()),
        "embedding_largest_difference": largest,
        "equal_decisions": float(np.concatenate(equal).mean()),
    }
