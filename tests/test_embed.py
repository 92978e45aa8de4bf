"""The embed stage: objectives in turn, descriptors and auto through the spine, adaptation kept only where it helps, curves on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import attar
from attar import config
from attar.config import Embed, ModelChoice
from attar.errors import UsageError
from attar.pipeline import Run
from attar.records import Items, Vectors
from attar.stages import embed as stage
from attar.stages.embed import embed
from attar.workspace import Job

AUGMENT = config.Augment()
ENCODER = """
import torch
from torch import nn
from attar.models.students import Encoder

SIZE, MEAN, STD = 16, (0.5,), (0.25,)

def encoder():
    torch.manual_seed(0)
    net = Encoder(16, 8)
    with torch.no_grad():
        for _ in range(30):  # norms that hold statistics
            net(4 * torch.rand(32, 3, 16, 16) - 2)
    return net

def classifier():
    return nn.Sequential(Encoder(16, 8), nn.Linear(32, 3))
"""

Make = Callable[..., Job]


@pytest.fixture(scope="module")
def halved(items: Items) -> Items:
    """Every other item held out: enough to tell whether something was learned."""
    split = pa.array(["validation" if item % 2 else "train" for item in range(len(items))])
    return replace(items, table=items.table.set_column(items.table.column_names.index("split"), "split", split))


@pytest.fixture
def given(tmp_path: Path) -> ModelChoice:
    file = tmp_path / "net.py"
    file.write_text(ENCODER)
    return ModelChoice(model=f"{file}:encoder", output="embedding")


def _rows(vectors: Vectors, items: Items) -> np.ndarray:
    return vectors.rows(items.ids())


def test_objectives_are_taken_in_turn_and_said(items: Items, job: Make) -> None:
    made = job("embed")
    settings = Embed(objective="autoencoder, cluster", self_steps=6, self_width=8, batch_size=16, self_kinds=3)
    vectors = embed(items, ModelChoice(), settings, AUGMENT, made)
    taken = [step for step in vectors.model.lineage if "steps" in step]
    assert taken == [
        f"6 steps (autoencoder) on {len(items.ids('train'))} training items",
        f"{vectors.signals[-1]['step']} steps (cluster) on {len(items.ids('train'))} training items",
    ]
    assert "agreement" in vectors.signals[-1]
    assert sum(note.startswith("the encoder ") for note in made.notes) == 2
    written = (made.folder / "cluster-training.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in written] == [row["step"] for row in vectors.signals]
    again = embed(items, ModelChoice(), settings, AUGMENT, Job("embed", made.folder, quiet=True))
    assert np.array_equal(_rows(vectors, items), _rows(again, items))
    assert again.signals == vectors.signals


def test_a_given_encoder_that_finds_items_better_after_learning_on_is_kept(
    halved: Items, given: ModelChoice, job: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "ADAPT_RATE", 2e-3)  # this one is random: it has as much to learn as one from scratch
    made = job("embed")
    before = embed(halved, given, Embed(), AUGMENT, job("plain"))
    vectors = embed(halved, given, Embed(adapt_steps=60, batch_size=16), AUGMENT, made)
    (said,) = [note for note in made.notes if "found by another view" in note]
    assert said.startswith("the encoder learned on from these items; held-out items found by another view of themselves: "), said
    assert vectors.model.lineage[-1] == f"adapted: {said.partition('; ')[2]}"
    assert not np.array_equal(_rows(before, halved), _rows(vectors, halved))
    was, now = (dict(found.model.state)["body.stem.1.running_mean"] for found in (before, vectors))
    assert not torch.equal(was, now), "a norm that is alive learns on"


def test_one_that_does_not_get_better_stays_bit_for_bit(
    halved: Items, given: ModelChoice, job: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "ADAPT_RATE", 0.0)  # learns nothing: after is not above before
    made = job("embed")
    before = embed(halved, given, Embed(), AUGMENT, job("plain"))
    vectors = embed(halved, given, Embed(adapt_steps=5, batch_size=8), AUGMENT, made)  # eight items are too few for a norm to learn from
    assert any("did not help" in note and "the encoder stays as it came" in note for note in made.notes)
    assert np.array_equal(_rows(before, halved), _rows(vectors, halved))
    assert vectors.model.lineage == before.model.lineage
    assert all(torch.equal(a, b) for a, b in zip(vectors.model.state.values(), before.model.state.values()))


def test_what_cannot_learn_on_is_refused_with_the_remedy(items: Items, given: ModelChoice, job: Make) -> None:
    for choice, why in (
        (ModelChoice(), "self cannot be adapted: it learns from these items anyway; give --self-steps, or leave out --adapt-steps"),
        (ModelChoice(model="descriptors"), "descriptors cannot be adapted: it has no weights, or leave out --adapt-steps"),
        (
            ModelChoice(model=given.model.replace(":encoder", ":classifier")),
            "its classes were learned for the embeddings it gives now; take it .* --output embedding",
        ),
    ):
        with pytest.raises(UsageError, match=f"adapt_steps: .*{why}"):
            embed(items, choice, Embed(adapt_steps=5), AUGMENT, job())


def _descriptors(photos: Path, out: Path, until: str) -> Run:
    settings: dict[str, Any] = {"model": "auto", "clusters": 3, "budget": "agreement>=0.5", "labels": "folders"}
    return attar.run(photos, out=str(out), until=until, quiet=True, **settings)


def test_auto_says_why_and_descriptors_are_vectors_as_any(photos: Path, tmp_path: Path) -> None:
    run = _descriptors(photos, tmp_path / "run", "cluster")
    assert run["embed"].model.source["kind"] == "descriptors"
    (notes,) = [row["notes"] for row in attar.status(run.root)["stages"] if row["stage"] == "embed"]
    assert notes[0].startswith("--model auto took descriptors of texture and colour: 60 images of about 40 px, ")
    kinds = np.array([Path(path).parts[0] for path in run["scan"].column("path")])
    texture = _rows(run["embed"], run["scan"])[:, :177]  # the colours of the made images are drawn at random
    near = texture @ texture.T
    np.fill_diagonal(near, -1)
    assert (kinds[near.argmax(1)] == kinds).mean() > 0.9, "stripes, discs and noise differ in texture"


@pytest.mark.slow
def test_descriptors_go_through_the_spine(photos: Path, tmp_path: Path) -> None:
    run = _descriptors(photos, tmp_path / "run", "report")
    notes = {row["stage"]: row["notes"] for row in attar.status(run.root)["stages"]}
    assert any("no channels of this model can be followed" in note for note in notes["compress"]), "there is nothing to cut"
    assert run["evaluate"].get("agreement").value >= 0.5
    assert (run.root / "model" / "student.onnx").is_file()


def test_curves_are_kept_with_the_vectors(photos: Path, tmp_path: Path) -> None:
    run = attar.run(photos, out=str(tmp_path / "run"), until="embed", quiet=True, self_steps=5, self_width=8)
    lines = [json.loads(line) for line in (run.root / "vectors" / "metrics.jsonl").read_text().splitlines()]
    assert lines == [dict(row) for row in run["embed"].signals]
    assert {"step", "validation_loss", "effective_rank", "spread"} <= lines[0].keys()
