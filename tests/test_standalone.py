"""Compression alone, as its user meets it: any module, any inputs, and what is said of those that cannot be used."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from networks import Residual, images
from torch import Tensor, nn

import attar
from attar import standalone
from attar.errors import DataError, ModelError, UsageError, WorkspaceError
from attar.runtime import open_session, outputs
from attar.standalone import Compressed, compress_module, stack

QUICK = {"distil_steps": 12, "calibration_items": 64, "quiet": True, "clusters": 3}


def table_model(outputs: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs)).eval()


def rows(count: int = 200, seed: int = 0) -> Tensor:
    return torch.randn(count, 10, generator=torch.Generator().manual_seed(seed))


class Tokens(nn.Module):
    """Token numbers (n, 12) → an output as transformers return it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(50, 32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.norm, self.classify = nn.LayerNorm(32), nn.Linear(32, 3)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        x = self.norm(x + self.down(torch.relu(self.up(x))))
        return {"logits": self.classify(x.mean(1)), "last_hidden_state": x}


class Encoder(nn.Module):
    """Images of one channel → a map, which is no vector of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 16, 3, 2, 1), nn.Conv2d(16, 24, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.b(torch.relu(self.a(x))))


def ran(made: Compressed, batch: Tensor) -> dict[str, np.ndarray]:
    return outputs(open_session(made.onnx), batch.numpy())


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    return attar.compress(table_model(), rows(), budget="macs<=0.6x", out=tmp_path_factory.mktemp("table") / "out", **QUICK)


def test_a_table_model_is_cut_to_the_budget_with_a_certificate(table: Compressed) -> None:
    assert table.met
    assert table.front.student.figures["macs_ratio"] <= 0.6
    inputs = rows(8, seed=9)
    with torch.no_grad():
        assert table.module(inputs).shape == (8, 4)
    certificate = table.certificate
    assert certificate.kind == "same top-1 class as the original"
    assert certificate.agreement.split == "test"
    assert certificate.agreement.low <= certificate.agreement.value <= certificate.agreement.high
    assert certificate.agreement.n == round(sum(row["n"] for row in certificate.per_cluster))
    assert certificate.worst_cluster is not None
    assert certificate.worst_cluster.value == min(row["value"] for row in certificate.per_cluster if row["n"] >= 5)
    assert str(certificate) in str(table)
    card = json.loads((table.onnx.parent / "card.json").read_text())
    assert card["input"] == {"name": "input", "type": "float32", "shape": ["items", 10]}
    assert card["certificate"] == str(certificate)
    assert "preprocess" not in card, "nobody can prepare a table's rows from here"


def test_the_certificate_is_the_agreement_of_module_and_file_on_the_test_items(table: Compressed) -> None:
    items = attar.formats.FORMATS[attar.records.Items].load(table.folder)
    test = torch.from_numpy(np.flatnonzero(items.column("split") == "test"))
    with torch.no_grad():
        wanted = table_model()(rows()[test]).argmax(1).numpy()
    equal = ran(table, rows()[test])["logits"].argmax(1) == wanted
    assert table.certificate.agreement.n == len(test)
    assert table.certificate.agreement.value == pytest.approx(equal.mean())


def test_module_and_file_decide_alike(table: Compressed) -> None:
    inputs = rows(64, seed=5)
    with torch.no_grad():
        ours = table.module(inputs).numpy()
    assert (ours.argmax(1) == ran(table, inputs)["logits"].argmax(1)).mean() > 0.95


def test_the_module_of_the_caller_is_left_as_it_was() -> None:
    model = table_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    compress_module(model, rows(), budget="macs<=0.6x", **QUICK)
    assert model.training
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert [layer.out_features for layer in model if isinstance(layer, nn.Linear)] == [64, 64, 4]


def test_the_same_call_resumes_and_another_module_or_other_inputs_do_not(table: Compressed, capsys: pytest.CaptureFixture[str]) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in table.folder.glob("candidates/*/model.onnx")}
    again = attar.compress(table_model(), rows(), budget="macs<=0.6x", out=table.folder, **QUICK)
    assert {path: path.stat().st_mtime_ns for path in table.folder.glob("candidates/*/model.onnx")} == stamps
    assert str(again) == str(table)
    with pytest.raises(UsageError, match=r"is a run of tensors \w+, not of tensors \w+; choose another folder with --out"):
        attar.compress(table_model(), rows(seed=1), budget="macs<=0.6x", out=table.folder, **QUICK)


def test_changed_weights_are_compressed_anew(tmp_path: Path) -> None:
    model = table_model()
    one = compress_module(model, rows(), out=tmp_path / "out", budget="macs<=0.6x", **QUICK)
    before = (tmp_path / "out" / "candidates" / "original" / "weights.safetensors").read_bytes()
    with torch.no_grad():
        model[0].weight.neg_()
    two = compress_module(model, rows(), out=tmp_path / "out", budget="macs<=0.6x", **QUICK)
    assert (tmp_path / "out" / "candidates" / "original" / "weights.safetensors").read_bytes() != before
    assert one.met == two.met


def test_an_interrupted_call_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: Compressed) -> None:
    from attar.stages.compress.bench import Bench

    real, made = Bench._write, []

    def interrupted(self: Bench, name: str, *rest: Any) -> None:
        if "distilled" in name:
            raise KeyboardInterrupt
        real(self, name, *rest)
        made.append(name)

    monkeypatch.setattr(Bench, "_write", interrupted)
    settings = {"out": tmp_path / "out", "budget": "macs<=0.6x"} | QUICK
    with pytest.raises(KeyboardInterrupt):
        attar.compress(table_model(), rows(), **settings)
    first = list(made)
    monkeypatch.setattr(Bench, "_write", lambda self, name, *rest: (real(self, name, *rest), made.append(name))[0])
    done = attar.compress(table_model(), rows(), **settings)
    assert not set(first) & set(made[len(first) :]), "no candidate is built twice"
    for one, two in zip(done.front.candidates, table.front.candidates, strict=True):
        assert one.name == two.name
        assert one.figures["agreement"] == two.figures["agreement"]
        assert all(torch.equal(value, two.model.state[name]) for name, value in one.model.state.items())


def test_a_temporary_folder_lives_as_long_as_the_result() -> None:
    made = attar.compress(table_model(), rows(), budget="macs<=0.6x", **QUICK)
    folder = made.folder
    assert made.onnx.is_file()
    del made
    gc.collect()
    assert not folder.exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(WorkspaceError, match="is not empty and not a run of attar; nothing was touched"):
        attar.compress(table_model(), rows(), out=tmp_path, **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_tokens_and_a_transformers_output() -> None:
    torch.manual_seed(0)
    model = Tokens().eval()
    ids = torch.randint(0, 50, (150, 12), generator=torch.Generator().manual_seed(0))
    made = attar.compress(model, (batch.int() for batch in ids.split(32)), budget="size<=0.9x", **QUICK)
    with torch.no_grad():
        assert made.module(ids[:5]).shape == (5, 3)
    assert ran(made, ids[:5])["logits"].shape == (5, 3)
    session = open_session(made.onnx)
    assert [(one.name, one.type, one.shape[1:]) for one in session.get_inputs()] == [("input", "tensor(int64)", [12])]


def test_an_encoder_agrees_by_its_clusters_and_returns_what_the_original_did() -> None:
    torch.manual_seed(0)
    grey = images(120).mean(1, keepdim=True)
    made = attar.compress(Encoder().eval(), list(grey), budget="macs<=0.7x", **QUICK)
    assert made.certificate.kind == "same most probable cluster as the original"
    with torch.no_grad():
        assert made.module(grey[:2]).shape == (2, 24, 8, 8)
    assert [one.name for one in open_session(made.onnx).get_inputs()] == ["image"]
    assert onnx.load(made.onnx).graph.output[0].name == "embedding"


def test_an_output_of_classes_that_is_said_to_be_an_embedding() -> None:
    torch.manual_seed(0)
    made = attar.compress(Residual().eval(), images(100), budget="macs<=0.8x", output="embedding", **QUICK)
    answer = ran(made, images(2))
    assert "logits" not in answer
    assert answer["embedding"].shape == (2, 7)


def test_a_budget_out_of_reach_gives_the_nearest_and_says_what_binds() -> None:
    made = attar.compress(table_model(), rows(), budget="size<=0.01x", **QUICK)
    assert not made.met
    assert made.reason.startswith("none of ")
    assert "size<=0.01x binds: the nearest, " in made.reason
    assert str(made).startswith("Budget 'size<=0.01x' not met: none of")
    assert made.onnx.is_file()


def test_a_student_module_of_another_width() -> None:
    small = nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 9))
    made = attar.compress(table_model(), rows(), budget="size<=0.9x", student=small, **QUICK)
    assert [one.name for one in made.front.candidates] == [f"student-distilled-{form}" for form in ("float32", "float16", "int8")]
    with torch.no_grad():
        assert made.module(rows(3)).shape == (3, 4), "as many logits as the original, whatever the student came with"
    assert small[2].out_features == 9, "the caller's student is left as it was"


# inputs


@pytest.mark.parametrize(
    "as_given", [lambda x: x, lambda x: x.numpy(), lambda x: x.split(7), lambda x: list(x), lambda x: (one for one in x.double())]
)
def test_inputs_are_one_tensor_batches_or_single_items(as_given: Callable[[Tensor], Any]) -> None:
    assert torch.equal(stack(as_given(rows(40)), table_model()), rows(40))


def test_images_are_told_from_batches() -> None:
    torch.manual_seed(0)
    model, batch = Residual().eval(), images(6)
    for given in (list(batch), [batch[:4], batch[4:]], batch):
        assert torch.equal(stack(given, model), batch)


def poisoned() -> Tensor:
    bad = rows(40)
    bad[17, 3] = float("nan")
    return bad


def counting() -> Iterator[int]:
    yield from range(40)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "empty": (lambda: [], r"the inputs are empty; expected a tensor \(items, …\) or an iterable of tensors, 20 items or more"),
    "nothing": (lambda: None, r"the inputs are a NoneType; expected a tensor \(items, …\) or an iterable of tensors"),
    "a path": (lambda: "photos/", r"the inputs are a str; expected a tensor"),
    "numbers": (counting, r"input 0 is a int; expected a tensor"),
    "pairs": (
        lambda: [(row, 1) for row in rows(30)],
        r"input 0 is a tuple; expected a tensor \(of pairs such as a data set's, pass the inputs alone: \(x for x, _ in loader\)\)",
    ),
    "NaN": (poisoned, r"input 0 holds NaN or infinite values; take it out or repair it"),
    "NaN in the third": (lambda: [rows(8), rows(8), rows(8) / 0], r"input 2 holds NaN or infinite values"),
    "other shapes": (
        lambda: [rows(8), rows(8)[:, :9]],
        r"input 1 has items of shape \(9,\) and type float32, the first ones are shape \(10,\) and type float32; all must be alike: resize, pad",
    ),
    "other types": (lambda: [rows(8), torch.zeros(8, 10, dtype=torch.int32)], r"input 1 has items of shape \(10,\) and type int64"),
    "truth": (lambda: torch.ones(40, 10, dtype=torch.bool), r"input 0 has type torch\.bool; expected floats or whole numbers"),
    "one row": (lambda: torch.zeros(10), r"the inputs are one tensor of shape \(10,\); expected \(items, …\)"),
    "too few": (lambda: rows(12), r"the inputs are 12 items, 12 of them distinct; at least 20 distinct ones are needed: add some"),
    "all alike": (lambda: torch.ones(500, 10), r"the inputs are 500 items, 1 of them distinct"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_inputs_that_cannot_be_used_are_named(kind: str) -> None:
    made, text = REFUSED[kind]
    with pytest.raises(DataError, match=text):
        attar.compress(table_model(), made(), **QUICK)


class One(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True)


class Words(nn.Module):
    def forward(self, x: Tensor) -> str:
        return "a cat"


class Nans(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float("nan")


@pytest.mark.parametrize(
    ("module", "inputs", "error", "text"),
    [
        (table_model(), rows(40)[:, :7], ModelError, r"Sequential: does not run on float32 inputs \(2, 7\): RuntimeError: .*must come prepared"),
        (Tokens(), rows(40)[:, :9], ModelError, r"Tokens: does not run on float32 inputs \(2, 9\)"),
        (One(), rows(40), ModelError, r"One: returns \(2, 1\) for 2 items; expected a row of two numbers or more"),
        (Words(), rows(40), ModelError, r"the model returns str; expected a tensor \(items, channels\)"),
        (Nans(), rows(40), DataError, r"40 of 40 vectors have no direction \(all zero, NaN or infinite\), the first of input 0"),
        (SimpleNamespace(), rows(40), UsageError, r"the module is a SimpleNamespace; expected a torch\.nn\.Module, or the path of a run folder"),
    ],
)  # fmt: skip
def test_modules_that_cannot_be_used_are_named(module: Any, inputs: Tensor, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        attar.compress(module, inputs, **QUICK)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"mean": 0.5}, r"mean: not a setting of attar\.compress\(module, …\): its inputs come as the module takes them"),
        ({"budgit": "macs<=0.5x"}, r"unknown setting 'budgit'; did you mean budget"),
        ({"budget": "macs>=0.5x"}, r"budget: 'macs>=0.5x': macs is bounded with <="),
        ({"minutes": -1}, r"minutes: -1\.0; expected above 0"),
        ({"student": "a cat"}, r"model: 'a cat' is not a known source"),
    ],
)
def test_settings_that_cannot_be_used_are_named(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        attar.compress(table_model(), rows(), **(QUICK | settings))


def test_equal_inputs_count_once_in_what_is_judged() -> None:
    twice = torch.cat([rows(60), rows(60)])
    job = SimpleNamespace(say=lambda text: None)
    items = standalone._scan(twice, SimpleNamespace(test_share=0.2, validation_share=0.2), job)
    split = standalone._split(items)
    assert np.array_equal(items.column("split")[:60], items.column("split")[60:])
    assert set(split[60:]) == {""}
    assert set(split[:60]) == {"train", "validation", "test"}
