"""A student of another architecture: built small, ended like its teacher, and made to follow it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attar import config
from attar.errors import ModelError, UsageError
from attar.models import sources
from attar.models.network import ClusterHead, Network, count_macs, count_parameters, find_classifier, plain
from attar.records import Model
from attar.stages.cluster.head import refit_head
from attar.stages.compress.feed import Feed
from attar.workspace import Job

REFITTED = 5_000
"""Training items, at most, that a student's clusters are placed by."""
WIDTH = 16
"""Channels of the first stage of the student `self`."""


class Follower(Network):
    """A student while it learns, as its teacher is compared with it: its embedding through a linear map, not delivered, where the widths differ."""

    def __init__(self, student: Network, width: int, target: int) -> None:
        super().__init__(nn.Identity())
        self.student = student
        self.match = nn.Linear(width, target, bias=False) if width != target else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        embedding, logits = self.student(x)
        return self.match(embedding), logits


def fresh(choice: str, model: Model, feed: Feed, job: Job) -> Model:
    """A student as its source builds it, with as many logits as the model has classes; without classes, an encoder of its own width.

    Its inputs are those of the model. Raises UsageError or ModelError when it cannot be built or does not take them.
    """
    example = torch.cat(feed.calibration(2, 2))
    with torch.random.fork_rng():
        torch.manual_seed(job.seed)
        body, source = sources.student_body(choice, tuple(example.shape[1:]), WIDTH)
        body.eval()
        try:
            classifier = find_classifier(body, example)
            with torch.no_grad():
                width = plain(body(example)).shape[1]
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"student: {choice}: does not run on the model's inputs {tuple(example.shape)}: {type(error).__name__}: {error}; "
                "a student sees the same inputs as the model: build it for that size"
            ) from error
        source |= _ending(body, classifier, width, len(model.classes))
        if "ending" in source:
            body = sources.end_with(body, **source["ending"])
        built = Network(body, source["classifier"]).eval()
        return replace(
            model,
            source=source,
            state=built.state_dict(),
            cuts=(),
            parameters=count_parameters(built),
            macs=count_macs(built, example),
            lineage=(f"student {choice}, to follow: {'; '.join(model.lineage)}",),
        )


def _ending(body: nn.Module, classifier: str | None, width: int, classes: int) -> dict[str, Any]:
    """What a student's source says of its last layer, for so many classes (0: it is to be an encoder)."""
    if classifier is None:
        return {"classifier": "top", "ending": {"layer": None, "width": width, "outputs": classes}} if classes else {"classifier": None}
    if classes == width:
        return {"classifier": classifier}
    layer = body.get_submodule(classifier)
    inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels  # type: ignore[union-attr]
    return {"classifier": classifier if classes else None, "ending": {"layer": classifier, "width": inputs, "outputs": classes}}


def follower(student: Network, model: Model, teacher: Network, feed: Feed, settings: config.Compress, job: Job) -> Follower:
    """A student ready to learn from its teacher: norms that have seen nothing have seen the calibration items."""
    example = torch.cat(feed.calibration(2, 2))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(job.seed)
        made = Follower(student, student.eval()(example)[0].shape[1], teacher(example)[0].shape[1])
        if not model.source.get("pretrained"):
            for norm in (layer for layer in student.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)):
                norm.train()
            for batch in feed.calibration(settings.calibration_items, 32):
                student(batch)
    return made.eval()  # type: ignore[return-value]


def with_head(model: Model, student: Network, teacher: Network, feed: Feed) -> Model:
    """A student's record with clusters of its own where its embedding has another width than its teacher's: the same items in each."""
    assert model.head is not None  # the cluster stage comes before
    student.eval()
    decide, labels, embeddings = ClusterHead(model.head), [], []
    with torch.no_grad():
        for batch in itertools.islice(feed.inputs(64), -(-REFITTED // 64)):
            labels.append(decide(teacher(batch)[0]).argmax(1).numpy())
            embeddings.append(student(batch)[0].numpy())
    own, values = np.concatenate(labels), np.concatenate(embeddings)
    if values.shape[1] == model.head.projection.shape[0]:
        return model
    directed = np.linalg.norm(values, axis=1) > 0  # a ReLU may leave nothing of an item
    if not directed.any():
        raise ModelError("student: its embedding is zero for every training item; give it more channels, or a longer distillation")
    return replace(model, head=refit_head(values[directed], own[directed], model.head))


def source_of(settings: config.Compress, model: Model) -> str | None:
    """The student's source: as asked, `self` for a frozen original, None where the original itself is cut."""
    frozen: Mapping[str, Any] = model.source
    if settings.student is None and frozen["kind"] == "onnx":
        return "self"
    if settings.student is not None and sources.kind_of(settings.student) == "onnx":
        raise UsageError(f"student: {settings.student}: an ONNX file cannot be trained; name self, hf:, timm: or FILE.py:BUILDER")
    return settings.student
