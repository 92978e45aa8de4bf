"""What every model source must be able to do: resolve → network → embed → cut → export → run, with equal results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from networks import hf_folder, images

from attar import formats
from attar.config import ModelChoice
from attar.models import sources
from attar.models.network import Shipped, count_macs, count_parameters
from attar.records import Head, Items, Model
from attar.runtime import open_session, outputs
from attar.stages.compress import prune, repair
from attar.stages.compress.cutter import repaired
from attar.stages.export import write_onnx
from attar.workspace import Job

BUILDER = """
from torch import nn
SIZE, MEAN, STD = 32, (0.5,), (0.25,)
CLASSES = ("ant", "bee", "cat")

def net():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3),
    )
"""


def _file(folder: Path) -> str:
    (folder / "net.py").write_text(BUILDER, "utf-8")
    return f"{folder / 'net.py'}:net"


SOURCES: dict[str, Callable[[Path], str]] = {
    "self": lambda folder: "self",
    "hf convolutional classifier": lambda folder: f"hf:{hf_folder(folder / 'm', 'resnet', classifier=True)}",
    "hf depthwise classifier": lambda folder: f"hf:{hf_folder(folder / 'm', 'mobilenet', classifier=True)}",
    "hf transformer encoder": lambda folder: f"hf:{hf_folder(folder / 'm', 'dinov2', classifier=False)}",
    "file": _file,
}


def resolved(name: str, items: Items, folder: Path) -> Model:
    """The model of a source, with a made cluster head of five clusters."""
    job = Job("contract", folder / "job", quiet=True)
    model = sources.resolve(ModelChoice(model=SOURCES[name](folder)), items, 8, job)
    with torch.no_grad():
        embedding = sources.network(model)(images(5, model.preprocess.size[0], seed=11))[0].numpy()
    points = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    mean = points.mean(0)
    projection = np.linalg.qr((points - mean).T)[0][:, :4].astype(np.float32)
    head = Head(mean=mean, projection=projection, centroids=((points - mean) @ projection).astype(np.float32), temperature=0.1)
    return replace(model, head=head)


def halved(model: Model) -> Model | None:
    """The model with half the channels of every group, repaired; None where no group can be followed."""
    network, example = sources.network(model), sources.example_input(model)
    groups = prune.find_groups(network, example)
    if not groups:
        return None
    names = sorted({name for group in groups for name in group.consumers})
    moments = repair.gather(network, [images(16, model.preprocess.size[0], seed) for seed in range(3)], names, 0)
    cuts = [(group.name, list(range(group.width // 2))) for group in groups]
    cut = sources.network(model)
    prune.replay(cut, cuts, example)
    repaired(cut, network, cuts, example, moments)
    counts = {"parameters": count_parameters(cut), "macs": count_macs(cut, example)}
    return replace(model, state=cut.state_dict(), cuts=tuple(cuts), **counts)


def reloaded(model: Model, folder: Path) -> Model:
    folder.mkdir()
    formats.save_model(folder, model, "model")
    return formats.load_model(folder, "model")


def torch_outputs(model: Model, batch: torch.Tensor) -> list[np.ndarray]:
    with torch.no_grad():
        return [output.numpy() for output in Shipped(sources.network(model), model.head).eval()(batch)]


def onnx_outputs(model: Model, file: Path, batch: torch.Tensor) -> dict[str, np.ndarray]:
    write_onnx(model, file)
    return outputs(open_session(file), batch.numpy())
