"""A frozen ONNX file as the original, and students of another architecture that follow it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import attar_command
from networks import CLASSES, SIDE, hf_folder, images, made
from test_search import made_of
from torch import Tensor, nn

from attar.config import Compress, ModelChoice
from attar.errors import ModelError, UsageError
from attar.models import frozen, sources
from attar.models.network import Network, count_macs
from attar.models.students import Encoder
from attar.records import Items, Model
from attar.stages.cluster.space import head_probabilities
from attar.stages.compress import student as students
from attar.workspace import Job

Make = Callable[..., Job]


class Ended(nn.Module):
    """A body with chosen outputs."""

    def __init__(self, network: Network, ending: str) -> None:
        super().__init__()
        self.network, self.ending = network, ending

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        embedding, logits = self.network(x)
        assert logits is not None
        return {"logits": logits, "softmax": logits.softmax(1), "embedding": embedding + 0, "both": (embedding, logits)}[self.ending]


def exported(path: Path, ending: str, names: list[str], items: int | None = None) -> Path:
    """A residual classifier as somebody else's exporter writes it."""
    example = torch.zeros(items or 1, 3, SIDE, SIDE)
    axes = {} if items else {name: {0: "n"} for name in ("pixels", *names)}
    torch.onnx.export(
        Ended(made("residual"), ending).eval(),
        (example,),
        str(path),
        dynamo=False,
        opset_version=17,
        input_names=["pixels"],
        output_names=names,
        dynamic_axes=axes,
    )
    return path


def choice(path: Path, **flags: object) -> ModelChoice:
    return ModelChoice(**({"model": str(path), "mean": (0.5,), "std": (0.25,)} | flags))  # type: ignore[arg-type]


@pytest.mark.parametrize("items", [None, 1, 4])
@pytest.mark.parametrize("ending", ["logits", "softmax", "both"])
def test_a_file_answers_as_the_network_it_was_made_from(tmp_path: Path, ending: str, items: int | None) -> None:
    names = ["features", "logits"] if ending == "both" else ["out"]
    model = frozen.resolve(choice(exported(tmp_path / "teacher.onnx", ending, names, items)))
    network, batch = sources.network(model), images(5)
    with torch.no_grad():
        embedding, logits = made("residual")(batch)
    found, classes = network(batch)
    assert logits is not None
    assert classes is not None
    assert model.classes == tuple(f"class {number}" for number in range(CLASSES))
    torch.testing.assert_close(classes.softmax(1), logits.softmax(1), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found, embedding if ending == "both" else classes, rtol=1e-3, atol=1e-5)


def test_a_file_of_an_encoder_has_no_classes(tmp_path: Path) -> None:
    path = exported(tmp_path / "encoder.onnx", "embedding", ["features"])
    assert frozen.resolve(choice(path)).classes == ()
    assert frozen.resolve(choice(exported(tmp_path / "out.onnx", "logits", ["out"]), output="embedding")).classes == ()


def test_costs_are_those_torch_counts(tmp_path: Path) -> None:
    path, network = exported(tmp_path / "teacher.onnx", "logits", ["out"]), made("residual")
    assert frozen.count_macs(path) == count_macs(network, images(1))
    unfolded = sum(parameter.numel() for parameter in network.parameters())
    assert 0.9 * unfolded < frozen.count_parameters(path) <= unfolded * 1.05  # norms are folded by the exporter


def test_clusters_of_a_foreign_file_are_computed_from_its_embedding(tmp_path: Path, job: Make) -> None:
    path = exported(tmp_path / "teacher.onnx", "both", ["features", "logits"])
    _, other = made_of(images(40), job())
    model = replace(frozen.resolve(choice(path)), head=other.head)
    values = {"features": np.random.default_rng(0).normal(size=(6, 16)), "logits": np.zeros((6, CLASSES))}
    found = frozen.answers(values, model.source, model.head)
    assert model.head is not None
    np.testing.assert_allclose(found["cluster_probabilities"], head_probabilities(values["features"].astype(np.float32), model.head))
    assert found["logits"].dtype == np.float32


@pytest.mark.parametrize(
    ("flags", "names", "text"),
    [
        ({"mean": None, "std": None}, ["out"], r"does not say how its images are normalised; give --mean and --std"),
        ({"input_size": 64}, ["out"], r"takes images of 32 × 32 pixels, not --input-size 64; leave it out"),
        ({"weights": "a.pt"}, ["out"], r"only FILE\.py:BUILDER and timm: models take --weights"),
        ({}, ["left", "right"], r"its outputs are left, right; expected one named embedding or logits"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path: Path, flags: dict[str, object], names: list[str], text: str) -> None:
    path = exported(tmp_path / "teacher.onnx", "both" if len(names) == 2 else "logits", names)
    with pytest.raises((ModelError, UsageError), match=text):
        frozen.resolve(choice(path, **flags))


def test_a_file_that_is_no_model_or_not_of_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone\.onnx: no such file"):
        frozen.resolve(choice(tmp_path / "gone.onnx"))
    free = onnx.load(exported(tmp_path / "teacher.onnx", "logits", ["out"]))
    free.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "h"
    onnx.save(free, tmp_path / "free.onnx")
    with pytest.raises(ModelError, match=r"expected one, float32 \(n, 3, height, width\) with fixed height and width"):
        frozen.resolve(choice(tmp_path / "free.onnx"))


# students


SMALL = "from torch import nn\ndef small():\n    return nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))\n"


def sources_of(folder: Path) -> dict[str, str]:
    (folder / "net.py").write_text(SMALL)
    hf_folder(folder / "hf", "resnet", classifier=True)
    bare = folder / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((hf_folder(folder / "vit", "vit", classifier=False) / "config.json").read_bytes())
    return {"self": "self", "file": f"{folder / 'net.py'}:small", "hf": f"hf:{folder / 'hf'}", "bare": f"hf:{bare}"}


@pytest.mark.parametrize("kind", ["self", "file", "hf", "bare"])
@pytest.mark.parametrize("classes", [True, False])
def test_a_student_ends_like_its_teacher_and_is_built_again_from_its_record(kind: str, classes: bool, tmp_path: Path, job: Make) -> None:
    feed, model = made_of(images(40), job())
    model = model if classes else replace(model, classes=(), source=dict(model.source) | {"classifier": None})
    fresh = students.fresh(sources_of(tmp_path)[kind], model, feed, job())
    again = students.fresh(sources_of(tmp_path / "x" if (tmp_path / "x").mkdir() is None else tmp_path)[kind], model, feed, job())
    assert all(torch.equal(value, again.state[name]) for name, value in fresh.state.items()), "a seed gives the same student"
    network, batch = sources.network(fresh), images(3)
    with torch.no_grad():
        embedding, logits = network(batch)
    assert embedding.shape[0] == 3
    assert (logits is not None) == classes
    if logits is not None:
        assert logits.shape == (3, CLASSES)
    assert fresh.macs > 0


def test_a_follower_maps_widths_and_its_fresh_norms_have_seen_inputs(job: Make) -> None:
    feed, model = made_of(images(40), job())
    teacher, settings = sources.network(model), Compress(calibration_items=32)
    for pretrained in (False, True):
        record = replace(model, source={"kind": "file", "pretrained": pretrained})
        follower = students.follower(Network(Encoder(32, 8)), record, teacher, feed, settings, job())
        with torch.no_grad():
            assert follower(images(4))[0].shape == teacher(images(4))[0].shape
        norms = [layer for layer in follower.modules() if isinstance(layer, nn.BatchNorm2d)]
        assert all(bool(norm.running_mean.any()) is not pretrained for norm in norms if norm.running_mean is not None)
        assert not any(layer.training for layer in follower.modules())


def test_a_student_of_another_width_gets_clusters_of_its_own(job: Make) -> None:
    feed, model = made_of(images(80), job())
    teacher = sources.network(model)
    body = nn.Sequential(teacher, _First(), nn.Linear(16, 24, bias=False))  # the teacher's embedding, turned into more numbers
    torch.nn.init.orthogonal_(body[2].weight)
    record = students.with_head(model, Network(body), teacher, feed)
    assert record.head is not None
    assert model.head is not None
    batch = torch.cat(list(feed.inputs(64)))
    with torch.no_grad():
        theirs = head_probabilities(teacher(batch)[0].numpy(), model.head).argmax(1)
        ours = head_probabilities(Network(body)(batch)[0].numpy(), record.head).argmax(1)
    assert record.head.centroids.shape[0] == model.head.centroids.shape[0]
    assert (ours == theirs).mean() > 0.9
    assert students.with_head(model, teacher, teacher, feed) is model


class _First(nn.Module):
    def forward(self, x: tuple[Tensor, Tensor]) -> Tensor:
        return x[0]


def test_students_that_cannot_be_used_are_named(tmp_path: Path, job: Make) -> None:
    feed, model = made_of(images(40), job())
    (tmp_path / "net.py").write_text("from torch import nn\ndef table():\n    return nn.Linear(7, 3)\n")
    with pytest.raises(
        ModelError, match=r"student: .*net\.py:table: does not run on the model's inputs \(2, 3, 32, 32\): .*build it for that size"
    ):
        students.fresh(f"{tmp_path / 'net.py'}:table", model, feed, job())
    with pytest.raises(ModelError, match=r"student: hf:.*cannot be built .*expected a folder with config\.json"):
        students.fresh(f"hf:{tmp_path}", model, feed, job())
    with pytest.raises(UsageError, match=r"student: small\.onnx: an ONNX file cannot be trained"):
        students.source_of(Compress(student="small.onnx"), model)
    assert students.source_of(Compress(), model) is None
    assert students.source_of(Compress(), Model(source={"kind": "onnx"}, state={}, preprocess=model.preprocess)) == "self"


# the door


def test_a_frozen_teacher_is_followed_on_the_command_line(photos: Path, items: Items, tmp_path: Path) -> None:
    path = exported(tmp_path / "teacher.onnx", "softmax", ["out"])
    (tmp_path / "net.py").write_text(SMALL)
    command = attar_command(
        "compress", "--model", path, "--mean", "0.5", "--std", "0.25", "--data", photos, "--out", tmp_path / "run",
        "--student", f"{tmp_path / 'net.py'}:small", "--distil-steps", "8", "--budget", "size<=0.9x", "--json",
    )  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    body = json.loads(done.stdout)
    assert [one["name"] for one in body["candidates"]] == [f"student-distilled-{form}" for form in ("float32", "float16", "int8")]
    assert (tmp_path / "run" / "candidates" / "original" / "model.onnx").read_bytes() == path.read_bytes(), "the file itself"
    assert body["certificate"].startswith("same top-1 class as the original on ")
    card = json.loads((tmp_path / "run" / "model" / "card.json").read_text())
    assert card["input"] == {"name": "image", "type": "float32", "shape": ["items", 3, 32, 32], "colour": "RGB"}
    assert not (tmp_path / "run" / "report.html").exists(), "the model alone was asked for"
