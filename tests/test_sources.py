"""Every model source: what it resolves to, that the record rebuilds it bit for bit, and what each failure says."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from networks import CLASSES, SIDE, hf_folder, images
from safetensors.torch import save_file

from attar import formats
from attar.config import ModelChoice
from attar.errors import MissingExtra, ModelError, UsageError
from attar.models import sources
from attar.models.preprocessing import parse_hub_config
from attar.records import Items, Model
from attar.workspace import Job

BUILDER = """
import torch
from torch import nn
{head}

def small():
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))

def encoder():
    return nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU())

def broken():
    raise RuntimeError("the moon is in the wrong house")

def text():
    return "a network"

def fussy():
    return nn.Sequential(nn.Flatten(), nn.Linear(100, 3))
"""
HEAD = 'SIZE, MEAN, STD = 32, (0.4, 0.5, 0.6), (0.2, 0.2, 0.3)\nCLASSES = ("ant", "bee", "cat")'

Make = Callable[..., Job]


@pytest.fixture
def builder(tmp_path: Path) -> Callable[..., str]:
    """Writes a builder's file and returns its path."""

    def write(head: str = HEAD, body: str = BUILDER) -> str:
        path = tmp_path / "mine.py"
        path.write_text(body.replace("{head}", head), "utf-8")
        return str(path)

    return write


def _resolve(items: Items, job: Job, source: str, **options: object) -> Model:
    return sources.resolve(ModelChoice(model=source, **options), items, 8, job)


def _outputs(model: Model) -> list[torch.Tensor]:
    with torch.no_grad():
        found = sources.network(model)(images(3, model.preprocess.size[0]))
    return [output for output in found if output is not None]


def _reloaded(model: Model, folder: Path) -> Model:
    folder.mkdir()
    formats.save_model(folder, model, "model")
    return formats.load_model(folder, "model")


def _check_record(model: Model, folder: Path) -> list[torch.Tensor]:
    """The record gives the same outputs bit for bit after being saved and loaded; returns them."""
    again = _reloaded(model, folder / "saved")
    ours, theirs = _outputs(model), _outputs(again)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert (again.preprocess, again.classes, again.macs, again.lineage) == (model.preprocess, model.classes, model.macs, model.lineage)
    assert again.source == json.loads(json.dumps(model.source))
    assert model.macs > 0
    assert model.parameters > 0
    return ours


def test_self_is_sized_to_the_images_and_depends_on_the_seed(items: Items, job: Make, tmp_path: Path) -> None:
    model = _resolve(items, job(), "self")
    assert model.preprocess.size == (40, 40)
    assert model.preprocess.origin == "sized to the images (median shorter side 40 px)"
    assert model.classes == ()
    assert len(_check_record(model, tmp_path)) == 1
    again, other = _resolve(items, job(), "self"), _resolve(items, job(seed=1), "self")
    assert all(torch.equal(model.state[name], again.state[name]) for name in model.state)
    assert not torch.equal(model.state["body.stem.0.weight"], other.state["body.stem.0.weight"])
    assert _resolve(items, job(), "self", input_size=24, mean=(0.1,)).preprocess.mean == (0.1,) * 3


@pytest.mark.parametrize("classifier", [True, False], ids=["classifier", "encoder"])
@pytest.mark.parametrize("kind", ["resnet", "vit", "mobilenet", "convnext", "dinov2"])
def test_transformers_folders(kind: str, classifier: bool, items: Items, job: Make, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForImageClassification

    folder = hf_folder(tmp_path / kind, kind, classifier)
    model = _resolve(items, job(), f"hf:{folder}")
    assert model.preprocess.size == (SIDE, SIDE)
    assert model.preprocess.mean == (0.4, 0.5, 0.6)
    assert model.preprocess.resample == "bicubic"
    found = _check_record(model, tmp_path)
    theirs = (AutoModelForImageClassification if classifier else AutoModel).from_pretrained(folder).eval()
    with torch.no_grad():
        expected = theirs(images(3))
    if classifier:
        assert model.classes == tuple(f"LABEL_{index}" for index in range(CLASSES))
        torch.testing.assert_close(found[1], expected.logits, rtol=1e-3, atol=5e-4)  # memory layouts differ
    else:
        assert model.classes == ()
        torch.testing.assert_close(found[0], expected.pooler_output.flatten(1), rtol=1e-3, atol=5e-4)


def test_a_classifiers_folder_can_be_taken_as_an_encoder(items: Items, job: Make, tmp_path: Path) -> None:
    model = _resolve(items, job(), f"hf:{hf_folder(tmp_path / 'vit', 'vit', True)}", output="embedding")
    assert model.classes == ()
    assert len(_check_record(model, tmp_path)) == 1


def test_an_encoders_folder_has_no_logits_to_give(items: Items, job: Make, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there are no logits; use --output embedding"):
        _resolve(items, job(), f"hf:{hf_folder(tmp_path / 'resnet', 'resnet', False)}", output="logits")


def test_a_builders_file_says_how_to_feed_it(builder: Callable[..., str], items: Items, job: Make, tmp_path: Path) -> None:
    made = job()
    model = _resolve(items, made, f"{builder()}:small")
    assert (model.preprocess.size, model.preprocess.mean, model.preprocess.std) == ((32, 32), (0.4, 0.5, 0.6), (0.2, 0.2, 0.3))
    assert model.classes == ("ant", "bee", "cat")
    assert [tuple(output.shape) for output in _check_record(model, tmp_path)] == [(3, 6), (3, 3)]
    assert made.notes == ["no --weights given: small keeps the values its builder gives it"]
    encoder = _resolve(items, job("other"), f"{builder(HEAD.splitlines()[0])}:encoder")
    assert encoder.classes == ()


def test_flags_replace_what_the_file_does_not_say(builder: Callable[..., str], items: Items, job: Make) -> None:
    made = job()
    model = _resolve(items, made, f"{builder('')}:small", mean=(0.5,), std=(0.1, 0.2, 0.3))
    assert (model.preprocess.size, model.preprocess.mean, model.preprocess.std) == ((40, 48), (0.5,) * 3, (0.1, 0.2, 0.3))
    assert "input size 40 × 48 taken from the images, which all have it (--input-size to change)" in made.notes
    assert any("names no CLASSES; its last linear layer is taken as class logits" in note for note in made.notes)
    assert model.classes == ("class 0", "class 1", "class 2")
    assert _resolve(items, job(), f"{builder()}:small", input_size=24, mean=(0,)).preprocess.size == (24, 24)


def test_what_is_named_nowhere_is_asked_for(builder: Callable[..., str], items: Items, job: Make) -> None:
    with pytest.raises(ModelError, match="names no MEAN or STD; give --mean and --std, or set it in the file"):
        _resolve(items, job(), f"{builder('SIZE = 32')}:small")
    with pytest.raises(ModelError, match="names no STD; give --std"):
        _resolve(items, job(), f"{builder('SIZE = 32')}:small", mean=(0.5,))
    widths = pa.array([30, *[48] * (len(items) - 1)], pa.int32())
    table = items.table.set_column(items.table.column_names.index("width"), "width", widths)
    mixed = Items(root=items.root, table=table, quarantine=items.quarantine)
    with pytest.raises(ModelError, match="names no SIZE and the images have 2 different sizes; give --input-size, or SIZE = … in the file"):
        _resolve(mixed, job(), f"{builder('MEAN = STD = (0.5,)')}:small")


def _state(path: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    return sources._call_builder(Path(path), "small")[0].state_dict()


@pytest.mark.parametrize("form", ["safetensors", "plain", "nested", "model", "parallel"])
def test_weights_files_of_every_form(form: str, builder: Callable[..., str], items: Items, job: Make, tmp_path: Path) -> None:
    path = builder()
    state = _state(path)
    file = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pt")
    if form == "safetensors":
        save_file(state, file)
    else:
        nested = {"plain": state, "nested": {"state_dict": state, "epoch": 3}, "model": {"model": state}}
        torch.save(nested.get(form, {"state_dict": {f"module.{key}": value for key, value in state.items()}}), file)
    model = _resolve(items, job(), f"{path}:small", weights=str(file))
    for name, value in state.items():
        assert torch.equal(model.state[f"body.{name}"], value)
    _check_record(model, tmp_path)
    assert model.lineage == (f"source {path}:small with weights {file}",)


def test_weights_that_do_not_fit_are_listed(builder: Callable[..., str], items: Items, job: Make, tmp_path: Path) -> None:
    path = builder()
    state = _state(path)
    state["5.weight"] = torch.zeros(9, 6)
    state["extra.bias"] = state.pop("0.bias")
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(ModelError) as caught:
        _resolve(items, job(), f"{path}:small", weights=str(tmp_path / "other.safetensors"))
    said = str(caught.value)
    assert "other.safetensors: the weights do not fit the model" in said
    assert "1 missing: 0.bias" in said
    assert "1 unexpected: extra.bias" in said
    assert "1 of another shape: 5.weight is (9, 6) in the file, (3, 6) in the model" in said
    assert said.endswith("Use the builder they were saved from")


class Payload:
    """Writes a file when unpickled: what a hostile checkpoint could do."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (Path.write_text, (self.mark, "run"))


def test_a_pickled_checkpoint_is_refused_and_never_run(builder: Callable[..., str], items: Items, job: Make, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", builder()
    for name, write in (("zip.pt", torch.save), ("raw.pkl", lambda value, file: file.write_bytes(pickle.dumps(value)))):
        write({"state_dict": Payload(mark)}, tmp_path / name)
        with pytest.raises(ModelError, match=f"{name}: refused: it holds pickled objects whose loading could run code") as caught:
            _resolve(items, job(), f"{path}:small", weights=str(tmp_path / name))
        assert "save_file(torch.load" in str(caught.value)
        assert not mark.exists()


def test_weights_that_are_none(builder: Callable[..., str], items: Items, job: Make, tmp_path: Path) -> None:
    path = builder()
    with pytest.raises(ModelError, match=r"gone\.pt: no such weights file; check --weights"):
        _resolve(items, job(), f"{path}:small", weights=str(tmp_path / "gone.pt"))
    for name in ("broken.safetensors", "broken.pt", "empty.pt"):
        (tmp_path / name).write_bytes(b"" if "empty" in name else b"\x00not weights")
        with pytest.raises(ModelError, match=rf"{name}: (is not a readable weights file|refused)"):
            _resolve(items, job(), f"{path}:small", weights=str(tmp_path / name))
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(ModelError, match="holds no tensors by name; expected a state dict"):
        _resolve(items, job(), f"{path}:small", weights=str(tmp_path / "none.pt"))
    with pytest.raises(UsageError, match=r"only FILE\.py:BUILDER and timm: models take --weights; self brings its own"):
        _resolve(items, job(), "self", weights="x.pt")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "broken",
            "the builder raised RuntimeError: the moon is in the wrong house; it must return the model when called without arguments",
        ),
        ("absent", "has no builder 'absent'; it defines small, encoder, broken, text, fussy"),
        ("text", "the builder returned str; expected a torch.nn.Module"),
        ("fussy", r"does not run on images \(2, 3, 32, 32\): RuntimeError: .*; check --input-size"),
    ],
)
def test_builders_that_fail(name: str, said: str, builder: Callable[..., str], items: Items, job: Make) -> None:
    with pytest.raises(ModelError, match=said):
        _resolve(items, job(), f"{builder()}:{name}")


def test_files_that_fail(builder: Callable[..., str], items: Items, job: Make) -> None:
    with pytest.raises(ModelError, match=r"gone\.py: no such file; the model source is FILE\.py:BUILDER"):
        _resolve(items, job(), "gone.py:small")
    with pytest.raises(ModelError, match="raised ModuleNotFoundError when imported: No module named 'surely_not_there'"):
        _resolve(items, job(), f"{builder(body='import surely_not_there')}:small")
    fewer = builder(HEAD.replace(', "cat"', ""))
    with pytest.raises(ModelError, match="names 2 classes and returns 3 logits; make them equal"):
        _resolve(items, job(), f"{fewer}:small")


@pytest.mark.parametrize("source", ["", "resnet50", "hf:", "timm:", "model.py", "net.py:not a name", "keras:x"])
def test_unknown_sources(source: str) -> None:
    with pytest.raises(UsageError, match=f"model: '{source}' is not a known source; expected \"self\""):
        sources.kind_of(source)


def test_a_hub_id_that_cannot_be_reached_fails_at_once(tmp_path: Path) -> None:
    # In a process of its own: the hub's library reads its settings when it is imported.
    code = (
        "from attar.models import sources\nfrom attar.config import ModelChoice\nfrom attar.errors import ModelError\n"
        "try:\n    sources.resolve(ModelChoice(model='hf:nobody/nothing'), None, 8, None)\n"
        "except ModelError as error:\n    print(error)"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("hf:nobody/nothing: cannot be loaded (")
    assert "or a hub id that this machine can reach" in done.stdout


def test_a_folder_that_is_no_model(items: Items, job: Make, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot be loaded .* expected a folder with config\.json and model\.safetensors"):
        _resolve(items, job(), f"hf:{tmp_path}")


def test_without_timm_the_extra_is_named(items: Items, job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra, match=r"pip install 'attar\[timm\]'"):
        _resolve(items, job(), "timm:resnet18")


def test_fingerprints_change_with_the_files_behind_a_model(builder: Callable[..., str], tmp_path: Path) -> None:
    path, weights = builder(), tmp_path / "w.pt"
    weights.write_bytes(b"1")
    choice = ModelChoice(model=f"{path}:small", weights=str(weights))
    first = sources.fingerprint(choice)
    assert first == sources.fingerprint(choice)
    weights.write_bytes(b"2")
    assert sources.fingerprint(choice)[0] == first[0]
    assert sources.fingerprint(choice) != first
    assert sources.fingerprint(ModelChoice()) == []
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text("{}")
    before = sources.fingerprint(ModelChoice(model=f"hf:{tmp_path / 'hub'}"))
    (tmp_path / "hub" / "config.json").write_text("{ }")
    assert sources.fingerprint(ModelChoice(model=f"hf:{tmp_path / 'hub'}")) != before


NORMAL = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


@pytest.mark.parametrize(
    ("settings", "size", "shortest"),
    [
        ({"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 192}}, (224, 192), 256),
        ({"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": 224}, (224, 224), 256),
        ({"size": {"height": 224, "width": 160}}, (224, 160), None),
        ({"size": 224}, (224, 224), 224),
        ({"size": {"shortest_edge": 224}, "crop_size": 64}, (224, 224), 224),  # a crop that is switched off
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875}, (224, 224), 256),
        ({"size": {"shortest_edge": 384}, "crop_pct": 0.875}, (384, 384), 384),
    ],
)
def test_hub_configs(settings: dict, size: tuple[int, int], shortest: int | None) -> None:
    found = parse_hub_config(settings | NORMAL, "here")
    assert (found.size, found.resize_shortest, found.mean, found.origin) == (size, shortest, (0.1, 0.2, 0.3), "here")
    assert parse_hub_config(settings | {"do_normalize": False}, "here").std == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"do_flip_channel_order": True}, "do_flip_channel_order .* is not supported; re-save the model for RGB input"),
        ({"rescale_factor": 1 / 127.5}, r"rescale_factor 0\.00784\d* is not 1/255; give --mean and --std"),
        ({"size": {}}, "names no input size .*; give --input-size"),
        ({"size": {"longest_edge": 500}}, "names no input size .*; give --input-size"),
        ({"image_mean": None}, "normalisation without image_mean and image_std; give --mean and --std"),
        ({"size": {"height": 256, "width": 256}, "do_center_crop": True, "crop_size": 224}, "scales to .* and crops .*; give --input-size"),
    ],
)
def test_hub_configs_that_cannot_be_followed_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(ModelError, match=f"here: .*{said}" if "names" not in said else f"here: {said}"):
        parse_hub_config({"size": {"shortest_edge": 224}} | NORMAL | settings, "here")


def test_a_hub_folder_without_a_preprocessor_file_needs_flags(items: Items, job: Make, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "resnet", "resnet", True)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"has no preprocessor_config\.json; add it, or give --input-size, --mean and --std"):
        _resolve(items, job(), f"hf:{folder}", mean=(0.5,))
    found = _resolve(items, job(), f"hf:{folder}", mean=(0.5,), std=(0.2,), input_size=24).preprocess
    assert (found.size, found.mean, found.std, found.origin) == ((24, 24), (0.5,) * 3, (0.2,) * 3, "flags")


def test_flags_override_a_hub_folder(items: Items, job: Make, tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "mobilenet", "mobilenet", True)  # shortest edge 36, crop 32
    found = _resolve(items, job(), f"hf:{folder}", input_size=64, std=(1.0,)).preprocess
    assert (found.size, found.resize_shortest, found.std) == ((64, 64), 72, (1.0,) * 3)
    np.testing.assert_allclose(found.mean, (0.4, 0.5, 0.6))
