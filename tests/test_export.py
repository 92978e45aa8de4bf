"""The delivered file: it computes what the torch model computes, and says all that is needed to feed and read it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from contract import halved, reloaded, resolved, torch_outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import images

from attar import __version__, runtime
from attar.errors import ModelError
from attar.modalities.image import Loader
from attar.records import Candidate, Evidence, Figure, Front, Items, Model
from attar.runtime import normalise, open_session, outputs
from attar.stages.export import check, export, write_onnx
from attar.workspace import Job

FIGURE = Figure("agreement", "student", 0.9, 0.8, 0.95, 40, "test", "exact 95 %; same top-1 class", "share")


@pytest.fixture(scope="module")
def classifier(items: Items, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A builder's classifier, cut to half its inner channels."""
    cut = halved(resolved("file", items, tmp_path_factory.mktemp("file")))
    assert cut is not None
    return cut


@pytest.fixture(scope="module")
def encoder(items: Items, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return resolved("self", items, tmp_path_factory.mktemp("self"))


@pytest.fixture(scope="module")
def session(classifier: Model, tmp_path_factory: pytest.TempPathFactory):
    file = tmp_path_factory.mktemp("session") / "model.onnx"
    write_onnx(classifier, file)
    return open_session(file)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 9), st.integers(0, 1000))
def test_the_file_computes_what_torch_computes_for_any_number_of_items(classifier: Model, session, count: int, seed: int) -> None:
    batch = images(count, seed=seed)
    for ours, theirs in zip(torch_outputs(classifier, batch), outputs(session, batch.numpy()).values(), strict=True):
        assert len(theirs) == count
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_file_is_valid_and_names_its_ends(encoder: Model, classifier: Model, tmp_path: Path) -> None:
    for model, names in ((encoder, ["embedding", "cluster_probabilities"]), (classifier, ["embedding", "cluster_probabilities", "logits"])):
        write_onnx(model, tmp_path / "model.onnx")
        graph = onnx.load(tmp_path / "model.onnx")
        onnx.checker.check_model(graph)
        assert [value.name for value in graph.graph.input] == ["image"]
        assert [value.name for value in graph.graph.output] == names
        shape = [dim.dim_param or dim.dim_value for dim in graph.graph.input[0].type.tensor_type.shape.dim]
        assert shape == ["items", 3, *model.preprocess.size]


def test_the_same_model_gives_the_same_bytes(classifier: Model, tmp_path: Path) -> None:
    again = reloaded(classifier, tmp_path / "saved")
    for model, name in ((classifier, "one"), (again, "two")):
        write_onnx(model, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def _front(model: Model, folder: Path) -> Front:
    write_onnx(model, folder / "small.onnx")
    made = [
        Candidate(name=name, model=model, onnx=folder / "small.onnx", precision="float32", figures={})
        for name in ("original", "cut50-float32")
    ]
    return Front(
        original=made[0], candidates=(made[1],), chosen="cut50-float32", budget="agreement>=0.9", met=True, reason="1 of 1", threads=1
    )


def test_an_export_says_how_to_feed_it_and_where_it_comes_from(
    items: Items, classifier: Model, job: Callable[..., Job], tmp_path: Path
) -> None:
    made = export(items, classifier, _front(classifier, tmp_path), Evidence(figures=(FIGURE,), notes=("none",)), job("export"))
    onnx.checker.check_model(onnx.load(made.onnx))
    (entry,) = onnx.load(made.onnx).metadata_props
    known = json.loads(entry.value)
    assert entry.key == "attar"
    assert known["version"] == __version__
    assert "runtime" not in known
    assert known["classes"] == ["ant", "bee", "cat"]
    assert known["clusters"] == 5
    assert known["lineage"] == [*classifier.lineage, "delivered as float32"]
    assert known["preprocess"] == json.loads(json.dumps(dataclasses.asdict(classifier.preprocess)))
    card = made.card
    assert card["outputs"] == [output.name for output in open_session(made.onnx).get_outputs()]
    assert card["input"]["shape"] == ["items", 3, 32, 32]
    assert card["figures"] == [FIGURE._asdict()]
    assert card["notes"] == ["none"]
    assert card["certificate"].startswith("same top-1 class on 90.0% (95 % interval 80.0% to 95.0%) of 40")
    assert card["budget"] == {"asked": "agreement>=0.9", "met": True, "reason": "1 of 1"}
    assert card["checks"] == made.checks
    json.dumps(card)


def test_a_file_for_openvino_says_so_and_is_checked_there(
    items: Items, classifier: Model, job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    front = _front(classifier, tmp_path)
    there = dataclasses.replace(front, candidates=(dataclasses.replace(front.student, runtime="openvino"),))
    opened: list[int] = []
    monkeypatch.setattr(runtime.OpenVino, "run", lambda *given, real=runtime.OpenVino.run: opened.append(1) or real(*given))
    given = job("export")
    made = export(items, classifier, there, Evidence(figures=(FIGURE,)), given)
    (entry,) = onnx.load(made.onnx).metadata_props
    known = json.loads(entry.value)
    assert known["runtime"] == made.card["runtime"] == "openvino"
    assert known["lineage"] == [*classifier.lineage, "delivered as float32 in OpenVINO"]
    assert made.checks["equal_decisions"] == 1
    assert made.checks["embedding_largest_difference"] < 1e-4
    assert len(opened) == made.checks["items"], "every item, one by one"
    assert given.notes[-1].endswith("equal decisions 1 in OpenVINO")


@pytest.mark.parametrize("kind", ["classifier", "encoder"])
def test_the_check_compares_file_and_torch_on_real_items(kind: str, items: Items, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    model = request.getfixturevalue(kind)
    write_onnx(model, tmp_path / "right.onnx")
    with Loader(items, model.preprocess) as loader:
        batch = torch.from_numpy(normalise(loader.batch(items.ids("test")), model.preprocess))
    batches = [batch[:5], batch[5:]]
    right = check(tmp_path / "right.onnx", model, batches)
    assert right["items"] == len(items.ids("test"))
    assert right["equal_decisions"] == 1
    assert right["embedding_cosine"] == pytest.approx(1, abs=1e-5)
    assert right["embedding_largest_difference"] < 1e-4
    generator = torch.Generator().manual_seed(0)
    noisy = {
        name: value + 0.5 * torch.randn(value.shape, generator=generator) if value.dim() > 1 else value
        for name, value in model.state.items()
    }
    write_onnx(dataclasses.replace(model, state=noisy), tmp_path / "wrong.onnx")
    wrong = check(tmp_path / "wrong.onnx", model, batches)
    assert wrong["embedding_cosine"] < 0.999
    assert wrong["embedding_largest_difference"] > 1e-2


def test_the_runtime_without_torch_feeds_the_file_alike(items: Items, encoder: Model, job: Callable[..., Job], tmp_path: Path) -> None:
    write_onnx(encoder, tmp_path / "model.onnx")
    with Loader(items, encoder.preprocess) as loader:
        pixels = loader.batch(items.ids("test")[:4])
    batch = normalise(pixels, encoder.preprocess)
    ours = torch_outputs(encoder, torch.from_numpy(batch))[0]
    np.testing.assert_allclose(outputs(open_session(tmp_path / "model.onnx"), batch)["embedding"], ours, rtol=1e-4, atol=1e-5)


def test_a_model_whose_weights_are_of_another_graph_is_not_written(classifier: Model, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        write_onnx(dataclasses.replace(classifier, cuts=()), tmp_path / "wrong.onnx")
    assert not (tmp_path / "wrong.onnx").exists()


def test_a_batch_of_another_size_is_refused_by_the_file(session) -> None:
    with pytest.raises(ModelError, match=r"refuses a batch of shape \(1, 3, 24, 24\)"):
        outputs(session, images(1, 24).numpy())
