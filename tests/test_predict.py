"""predict on real image files with real ONNX files, in this process and in one where torch must stay out."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from attar import runtime
from attar.errors import MissingExtra, ModelError, UsageError
from attar.inference import load, predict
from attar.modalities.image import resize_crop
from attar.records import Preprocess

PLAIN = Preprocess(size=(8, 8), resize_shortest=10, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
KNOWN = {
    "preprocess": {"size": [8, 8], "resize_shortest": 10, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "resample": "bilinear"},
    "classes": ["red", "green", "blue"],
    "clusters": 3,
    "cluster_names": ["warm", "leafy", "cold"],
    "lineage": ["made for a test"],
    "version": "0",
}


def student(path: Path, known: object = KNOWN) -> Path:
    """A file of attar's contract whose class and cluster are the strongest colour channel."""
    weight = np.kron(np.eye(3), np.full((64, 1), 1 / 64)).astype(np.float32)
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["embedding"]),
        helper.make_node("Identity", ["embedding"], ["logits"]),
        helper.make_node("Softmax", ["embedding"], ["cluster_probabilities"]),
    ]
    graph = helper.make_graph(
        nodes,
        "student",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in ("embedding", "cluster_probabilities", "logits")],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if known is not None:
        model.metadata_props.add(key="attar", value=known if isinstance(known, str) else json.dumps(known))
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def photo(path: Path, colour: int, size: tuple[int, int] = (20, 14)) -> Path:
    pixels = np.random.default_rng(colour).integers(0, 80, (*size, 3), np.uint8)
    pixels[..., colour] += 150
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(70):  # more than two batches
        photo(tmp_path / "photos" / f"{number:02d}.png", number % 3)
    return tmp_path / "photos"


def test_answers_are_those_of_the_file(tmp_path: Path, folder: Path) -> None:
    path = student(tmp_path / "student.onnx")
    found = predict(path, [folder], quiet=True)
    assert [one["path"] for one in found] == [str(folder / f"{number:02d}.png") for number in range(70)]
    images = np.stack([resize_crop(Image.open(one["path"]), PLAIN) for one in found])
    expected = runtime.outputs(runtime.open_session(path), runtime.normalise(images, PLAIN))
    shares = expected["cluster_probabilities"]  # the logits' softmax as well
    for number, one in enumerate(found):
        best = number % 3
        assert {name: one[name] for name in ("cluster", "cluster_name", "label")} == {
            "cluster": best,
            "cluster_name": KNOWN["cluster_names"][best],  # type: ignore[index]
            "label": KNOWN["classes"][best],  # type: ignore[index]
        }
        assert one["probability"] == pytest.approx(shares[number, best], abs=1e-5)
        assert one["cluster_probability"] == pytest.approx(shares[number, best], abs=1e-5)
    assert json.loads(json.dumps(found)) == found
    assert predict(path, [folder], workers=3, quiet=True) == found


def test_bad_files_do_not_stop_the_others(tmp_path: Path) -> None:
    home = tmp_path / "mixed"
    photo(home / "good.png", 0)
    (home / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not the rest of a photo")
    (home / "empty.png").write_bytes(b"")
    (home / "notes.doc").write_text("hello")
    files = [home / "gone.png", home / "notes.doc", home, photo(home / "späte Rose.png", 2)]
    found = predict(student(tmp_path / "student.onnx"), files, quiet=True)
    assert [Path(one["path"]).name for one in found] == [
        *("gone.png", "notes.doc"),
        *("broken.jpg", "empty.png", "good.png", "späte Rose.png"),
        "späte Rose.png",
    ]
    assert [one.get("label") for one in found] == [None, None, None, None, "red", "blue", "blue"]
    errors = [one["error"] for one in found if "error" in one]
    assert "cannot be found (No such file or directory" in errors[0]
    assert "is not something attar reads" in errors[1]
    assert "empty (0 bytes)" in errors[3]
    assert len(errors) == 4


def test_nothing_but_bad_files_still_answers(tmp_path: Path) -> None:
    found = predict(student(tmp_path / "student.onnx"), [tmp_path / "a.png", tmp_path / "b.png"], quiet=True)
    assert ["error" in one for one in found] == [True, True]


def test_archives_and_patterns_are_read(tmp_path: Path, folder: Path) -> None:
    with zipfile.ZipFile(tmp_path / "few.zip", "w") as archive:
        for number in range(3):
            archive.write(folder / f"{number:02d}.png", f"inside/{number}.png")
    found = predict(student(tmp_path / "student.onnx"), [str(tmp_path / "few.zip"), str(folder / "0*.png")], quiet=True)
    assert [one["path"] for one in found[:3]] == [f"{tmp_path}/few.zip::inside/{number}.png" for number in range(3)]
    assert [one["path"] for one in found[3:]] == [str(folder / f"{number:02d}.png") for number in range(10)]
    assert [one["cluster"] for one in found] == [0, 1, 2, *(number % 3 for number in range(10))]


def test_an_encoder_without_names_gives_clusters_alone(tmp_path: Path) -> None:
    path = student(tmp_path / "student.onnx", {key: KNOWN[key] for key in ("preprocess", "clusters")} | {"classes": []})
    (one,) = predict(path, [photo(tmp_path / "a.png", 1)], quiet=True)
    assert set(one) == {"path", "cluster", "cluster_probability"}


def test_the_model_may_be_a_run_its_folder_or_a_file(tmp_path: Path) -> None:
    path = student(tmp_path / "run" / "model" / "student.onnx")
    image = photo(tmp_path / "a.png", 1)
    answers = [predict(model, [image], quiet=True) for model in (tmp_path / "run", str(path.parent), path)]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][0]["label"] == "green"
    with pytest.raises(UsageError, match=r"nowhere: no such file or folder; expected a run folder, its model folder or an \.onnx file"):
        predict(tmp_path / "nowhere", [image])
    (tmp_path / "bare").mkdir()
    with pytest.raises(UsageError, match=r"bare: holds no student\.onnx; the run may not be finished"):
        predict(tmp_path / "bare", [image])


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (None, r"student\.onnx: has no attar metadata, so how to prepare images for it is unknown"),
        ("{", r"student\.onnx: its attar metadata cannot be understood \(JSONDecodeError"),
        (
            {"classes": []},
            "was made from tensors, so how to prepare images for it is unknown; give its input what the original module took",
        ),
        (
            KNOWN | {"runtime": "other"},
            r"student\.onnx: is for the runtime 'other'; expected onnxruntime or openvino: a newer attar may know it",
        ),
        ({"preprocess": {"size": [9, 9]}}, r"takes images of \(8, 8\) pixels but its metadata says \(9, 9\)"),
    ],
)
def test_files_that_do_not_say_how_to_feed_them_are_refused(tmp_path: Path, known: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        predict(student(tmp_path / "student.onnx", known), [])


def test_torch_stays_out(tmp_path: Path) -> None:
    path, image = student(tmp_path / "student.onnx"), photo(tmp_path / "a.png", 2)
    code = (
        "import sys; from attar.inference import predict; answer = predict(sys.argv[1], sys.argv[2:], quiet=True);"
        "print(answer[0]['label'], [m for m in ('torch', 'sklearn', 'onnx', 'pandas') if m in sys.modules])"
    )
    home = str(Path(runtime.__file__).parents[1])
    said = subprocess.run(
        [sys.executable, "-c", code, str(path), str(image)], capture_output=True, text=True, check=True, env={"PYTHONPATH": home}
    )
    assert said.stdout.strip() == "blue []"


@pytest.mark.skipif(importlib.util.find_spec("openvino") is not None, reason="OpenVINO is installed")
def test_a_file_for_openvino_is_not_run_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(MissingExtra, match=r"student\.onnx, a file for OpenVINO, needs the package 'openvino'.*'attar\[openvino\]'"):
        predict(student(tmp_path / "student.onnx", KNOWN | {"runtime": "openvino"}), [])


def test_a_file_for_openvino_is_run_there(tmp_path: Path, folder: Path) -> None:
    pytest.importorskip("openvino")
    here = student(tmp_path / "here.onnx")
    there = student(tmp_path / "there.onnx", KNOWN | {"runtime": "openvino"})
    assert isinstance(load(there).session, runtime.OpenVino)
    assert not isinstance(load(here).session, runtime.OpenVino)
    ours, theirs = predict(here, [folder], quiet=True), predict(there, [folder], quiet=True)
    assert [one["label"] for one in theirs] == [one["label"] for one in ours]
    np.testing.assert_allclose([one["probability"] for one in theirs], [one["probability"] for one in ours], atol=1e-5)
