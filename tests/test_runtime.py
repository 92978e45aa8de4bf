"""The runtimes and the measuring processes, on small real files; what needs OpenVINO is skipped where it is not installed."""

from __future__ import annotations

import doctest
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Residual, images
from onnx import TensorProto, helper, numpy_helper

from attar import formats, runtime
from attar.config import Compress, build_config
from attar.errors import MissingExtra, ModelError, UsageError
from attar.models import sources
from attar.records import SPLITS, Head, Model, Preprocess
from attar.stages.compress import bench as benches
from attar.stages.compress.bench import Bench, quicker, row
from attar.stages.compress.feed import TensorFeed
from attar.workspace import Job

PLAIN = Preprocess(size=(8, 8), mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


def small_model(path: Path, *, side: int | str = 8, work: int = 1, seed: int = 0) -> Path:
    """A file of attar's contract: flattened image → embedding (4) → cluster probabilities (3); `work` repeats a costly square product."""
    rng = np.random.default_rng(seed)
    size = 3 * (side * side if isinstance(side, int) else 64)
    weights = {"w": rng.normal(0, 0.1, (size, 4)), "c": rng.normal(size=(4, 3)), "s": np.eye(size)}
    nodes = [helper.make_node("Flatten", ["image"], ["x0"])]
    nodes += [helper.make_node("MatMul", [f"x{i}", "s"], [f"x{i + 1}"]) for i in range(work)]
    nodes += [helper.make_node("MatMul", [f"x{work}", "w"], ["embedding"]), helper.make_node("MatMul", ["embedding", "c"], ["scores"])]
    nodes += [helper.make_node("Softmax", ["scores"], ["cluster_probabilities"])]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, side, side])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width])
            for name, width in (("embedding", 4), ("cluster_probabilities", 3))
        ],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return small_model(tmp_path / "small.onnx")


def test_normalise_is_the_formula() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    slow = (images / 255 - np.array(PLAIN.mean)) / np.array(PLAIN.std)
    result = runtime.normalise(images, PLAIN)
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    np.testing.assert_allclose(result, slow.transpose(0, 3, 1, 2), atol=2e-6)


@given(st.integers(0, 255), st.floats(0, 1), st.floats(0.05, 2))
def test_normalise_is_undone_by_its_inverse(value: int, mean: float, std: float) -> None:
    pre = Preprocess(size=(2, 2), mean=(mean,), std=(std,))
    x = runtime.normalise(np.full((1, 2, 2, 3), value, np.uint8), pre)
    np.testing.assert_allclose((x * std + mean) * 255, value, atol=1e-3)


def test_normalise_refuses_other_arrays() -> None:
    with pytest.raises(ValueError, match=r"images: float32 \(2, 3, 8, 8\); expected uint8 \(n, height, width, 3\)"):
        runtime.normalise(np.zeros((2, 3, 8, 8), np.float32), PLAIN)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"gone\.onnx: no such file"):
        runtime.open_session(tmp_path / "gone.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"broken\.onnx: ONNX Runtime .* cannot load it \(.*\); export the model again"):
        runtime.open_session(broken)


def test_outputs_are_named_and_refusals_are_explained(model: Path) -> None:
    session = runtime.open_session(model)
    assert runtime.input_size(session) == (8, 8)
    found = runtime.outputs(session, np.zeros((2, 3, 8, 8), np.float32))
    assert {name: value.shape for name, value in found.items()} == {"embedding": (2, 4), "cluster_probabilities": (2, 3)}
    with pytest.raises(ModelError, match=r"refuses a batch of shape \(1, 3, 9, 9\)"):
        runtime.outputs(session, np.zeros((1, 3, 9, 9), np.float32))


def test_an_input_without_fixed_size_is_refused(tmp_path: Path) -> None:
    session = runtime.open_session(small_model(tmp_path / "free.onnx", side="side"))
    with pytest.raises(ModelError, match=r"image tensor\(float\).*expected one, float32 \(n, 3, height, width\)"):
        runtime.input_size(session)


def test_a_stream_is_stacked_as_one_batch_gives_it(model: Path) -> None:
    batch = np.random.default_rng(0).normal(size=(10, 3, 8, 8)).astype(np.float32)
    done: list[int] = []
    found = runtime.run_stacked(model, (batch[i : i + 4] for i in range(0, 10, 4)), progress=done.append)
    assert done == [4, 4, 2]
    whole = runtime.outputs(runtime.open_session(model), batch)
    for name, value in whole.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="nothing to run on"):
        runtime.run_stacked(model, [])


@pytest.mark.parametrize("count", [1, 4, 6])
def test_a_file_for_a_fixed_number_of_items_is_called_as_often_as_needed(model: Path, tmp_path: Path, count: int) -> None:
    fixed = onnx.load(model)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(fixed, tmp_path / "fixed.onnx")
    batch = np.random.default_rng(0).normal(size=(count, 3, 8, 8))  # float64: given in the type the file takes
    found = runtime.outputs(runtime.open_session(tmp_path / "fixed.onnx"), batch)
    for name, value in runtime.outputs(runtime.open_session(model), batch).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)
    assert runtime.measure_latency({"fixed": tmp_path / "fixed.onnx"}, rounds=1)["fixed"].shape == (1,)


def test_noise_has_the_file_s_own_shape_and_type(model: Path, tmp_path: Path) -> None:
    made = runtime.noise(runtime.open_session(model), seed=3)
    assert made.shape == (1, 3, 8, 8)
    assert made.dtype == np.float32
    assert np.array_equal(made, runtime.noise(runtime.open_session(model), seed=3))
    tokens = helper.make_graph(
        [helper.make_node("Cast", ["input"], ["embedding"], to=TensorProto.FLOAT)],
        "tokens",
        [helper.make_tensor_value_info("input", TensorProto.INT64, ["n", 5])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", 5])],
    )
    onnx.save(helper.make_model(tokens, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "tokens.onnx")
    assert np.array_equal(runtime.noise(runtime.open_session(tmp_path / "tokens.onnx"), seed=0), np.zeros((1, 5), np.int64))
    with pytest.raises(ModelError, match=r"image tensor\(float\).*expected one, of a fixed shape but for the number of items"):
        runtime.noise(runtime.open_session(small_model(tmp_path / "free.onnx", side="side")), seed=0)


def test_latency_tells_a_heavy_model_from_a_light_one(tmp_path: Path) -> None:
    files = {"light": small_model(tmp_path / "light.onnx", side=16), "heavy": small_model(tmp_path / "heavy.onnx", side=16, work=30)}
    done: list[int] = []
    found = runtime.measure_latency(files, rounds=6, progress=done.append)
    assert list(found) == ["light", "heavy"]
    assert all(values.shape == (6,) and np.all(values > 0) for values in found.values())
    assert np.median(found["heavy"] / found["light"]) > 3  # 30 products for one
    assert done == [1] * 6


def test_latency_survives_modules_in_the_current_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise RuntimeError('not the standard library')")
    (tmp_path / "numpy.py").write_text("raise RuntimeError('not numpy')")
    monkeypatch.chdir(tmp_path)
    assert runtime.measure_latency({"a": Path("small.onnx")}, rounds=1)["a"].shape == (1,)


def test_latency_failure_carries_the_last_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"^measuring latency failed: .*broken\.onnx: ONNX Runtime .* cannot load it"):
        runtime.measure_latency({"a": broken})


def test_the_measuring_process_is_light() -> None:
    code = "import attar.runtime, sys; print([m for m in ('torch', 'pyarrow', 'sklearn', 'scipy', 'onnx') if m in sys.modules])"
    home = str(Path(runtime.__file__).parents[1])
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": home})
    assert said.stdout.strip() == "[]"


def test_a_process_that_ended_says_so(model: Path) -> None:
    with runtime._Clock({"a": model}, runtime.DEFAULT, 1, 0) as clock:
        assert list(clock.round()) == ["a"]
        clock._process.kill()
        clock._process.wait()
        with pytest.raises(ModelError, match=r"^measuring latency failed: the process ended with code -9 and said nothing$"):
            clock.round()


@pytest.mark.parametrize("module", [runtime, benches])
def test_examples_in_the_docstrings_hold(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0


# which runtime


def test_the_setting_names_a_runtime() -> None:
    assert build_config({"data": "x"}).compress.runtime == runtime.DEFAULT
    assert {build_config({"data": "x", "runtime": name}).compress.runtime for name in (*runtime.NAMES, "auto")} == {*runtime.NAMES, "auto"}
    with pytest.raises(UsageError, match=r"^runtime: 'tensorrt'; expected onnxruntime, openvino or auto$"):
        build_config({"data": "x", "runtime": "tensorrt"})


shares = st.dictionaries(
    st.sampled_from(["onnxruntime", "openvino", "other"]), st.integers(0, 10).map(lambda tenths: tenths / 10), min_size=1
)


@given(shares, st.lists(st.integers(1, 5), min_size=3, max_size=3))
def test_the_quicker_runtime_never_costs_agreement(agreement: dict[str, float], times: list[int]) -> None:
    latency = dict(zip(agreement, map(float, times)))
    chosen, first = quicker(agreement, latency), next(iter(agreement))
    assert agreement[chosen] >= agreement[first]
    assert latency[chosen] < latency[first] or chosen == first, "the first one unless it is beaten"
    assert all(latency[chosen] <= latency[one] for one in agreement if agreement[one] >= agreement[first])


def made(count: int, job: Job) -> tuple[TensorFeed, Model]:
    """A feed of images in three splits and a small residual classifier."""
    torch.manual_seed(0)
    tensors = images(count)
    model = sources.resolve_module(sources.hold(Residual()), tensors[:2], "auto", job)
    centroids = np.random.default_rng(0).normal(size=(2, 16)).astype(np.float32)
    head = Head(mean=np.zeros(16, np.float32), projection=np.eye(16, dtype=np.float32), centroids=centroids, temperature=0.1)
    split = np.array([SPLITS[number % 3] for number in range(count)])
    return TensorFeed(tensors, split, np.zeros(count, np.int32), job), replace(model, head=head)


@pytest.mark.skipif(importlib.util.find_spec("openvino") is not None, reason="OpenVINO is installed")
def test_a_runtime_that_is_not_installed_names_its_extra(model: Path, job: Callable[..., Job]) -> None:
    needs = r"needs the package 'openvino', which is not installed\. Install it with: pip install 'attar\[openvino\]'$"
    with pytest.raises(MissingExtra, match=r"small\.onnx, a file for OpenVINO, " + needs):
        runtime.open_session(model, runtime="openvino")
    with pytest.raises(MissingExtra, match=r"^runtime 'openvino' " + needs):
        runtime.measure_latency({"a": model}, runtimes={"a": "openvino"})
    given = job()
    feed, original = made(30, given)
    with pytest.raises(MissingExtra, match=r"^runtime 'auto' " + needs):
        Bench(feed, original, Compress(runtime="auto"), given)
    assert not (given.folder / "original").exists(), "told before anything is built"


# OpenVINO


@pytest.fixture
def openvino() -> None:
    pytest.importorskip("openvino")


def both(path: Path) -> list[runtime.Session]:
    return [runtime.open_session(path, runtime=name) for name in runtime.NAMES]


@pytest.mark.usefixtures("openvino")
def test_float_files_compute_the_same_in_both(model: Path) -> None:
    """To float32's precision: bfloat16, which OpenVINO takes by itself where it can, errs in the third digit."""
    batch = np.random.default_rng(0).normal(size=(5, 3, 8, 8)).astype(np.float32)
    ours, theirs = (runtime.outputs(session, batch) for session in both(model))
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert theirs[name].dtype == value.dtype
        np.testing.assert_allclose(theirs[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("openvino")
def test_sessions_describe_a_file_alike(model: Path, tmp_path: Path) -> None:
    fixed = onnx.load(model)
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(fixed, tmp_path / "fixed.onnx")
    for path, items in ((model, 1), (tmp_path / "fixed.onnx", 4)):
        ours, theirs = both(path)
        assert theirs.get_inputs() == [runtime.Port("image", "tensor(float)", [items, 3, 8, 8])]
        assert [port.name for port in theirs.get_outputs()] == [port.name for port in ours.get_outputs()]
        assert runtime.input_size(theirs) == (8, 8)
        assert runtime.noise(theirs, 3).shape == (items, 3, 8, 8)
        batch = np.random.default_rng(0).normal(size=(6, 3, 8, 8))
        for name, value in runtime.outputs(ours, batch).items():
            np.testing.assert_allclose(runtime.outputs(theirs, batch)[name], value, rtol=1e-4, atol=1e-5)
    (free,) = runtime.open_session(small_model(tmp_path / "free.onnx", side="side"), runtime="openvino").get_inputs()
    assert free == ("image", "tensor(float)", [1, 3, "?", "?"])


@pytest.mark.usefixtures("openvino")
def test_answers_of_one_call_outlive_the_next(model: Path) -> None:
    session = runtime.open_session(model, runtime="openvino")
    first = runtime.outputs(session, np.ones((1, 3, 8, 8), np.float32))["embedding"]
    kept = first.copy()
    runtime.outputs(session, np.zeros((1, 3, 8, 8), np.float32))
    np.testing.assert_array_equal(first, kept)


@pytest.mark.usefixtures("openvino")
def test_what_openvino_refuses_is_explained(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(
        ModelError, match=r"broken\.onnx: OpenVINO 20\S+ cannot load it \(Unable to read the model.*\); use the runtime onnxruntime"
    ):
        runtime.open_session(broken, runtime="openvino")
    with pytest.raises(ModelError, match=r"refuses a batch of shape \(1, 3, 9, 9\) \(.*\bare incompatible"):
        runtime.outputs(runtime.open_session(model, runtime="openvino"), np.zeros((1, 3, 9, 9), np.float32))
    with pytest.raises(ModelError, match=r"^measuring latency failed: .*broken\.onnx: OpenVINO .* cannot load it"):
        runtime.measure_latency({"a": model, "b": broken}, runtimes={"b": "openvino"})


@pytest.mark.usefixtures("openvino")
def test_each_runtime_is_timed_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []
    start = subprocess.Popen

    def spy(command: list[str], **options: Any) -> Any:
        started.append(json.loads(command[-1]))
        return start(command, **options)

    monkeypatch.setattr(subprocess, "Popen", spy)
    heavy = small_model(tmp_path / "heavy.onnx", side=16, work=30)
    files = {"light": small_model(tmp_path / "light.onnx", side=16), "there": heavy, "here": heavy}
    found = runtime.measure_latency(files, runtimes={"there": "openvino"}, rounds=4)
    assert [(one["runtime"], list(one["files"])) for one in started] == [("onnxruntime", ["light", "here"]), ("openvino", ["there"])]
    assert list(found) == list(files)
    assert all(values.shape == (4,) and np.all(values > 0) for values in found.values())
    assert all(np.median(found[name] / found["light"]) > 2 for name in ("there", "here"))  # 30 products for one


@pytest.mark.usefixtures("openvino")
def test_a_candidate_keeps_the_runtime_it_is_for(job: Callable[..., Job], capsys: pytest.CaptureFixture[str]) -> None:
    given = job(quiet=False)
    feed, model = made(60, given)
    bench = Bench(feed, model, Compress(runtime="openvino", calibration_items=8), given)
    small = bench.candidate("whole-int8", lambda: model, "int8")
    assert (bench.original.runtime, small.runtime) == (runtime.DEFAULT, "openvino")
    batch = np.concatenate([part.numpy() for part in feed.validation()])
    files = ((bench.original.onnx, runtime.DEFAULT), (small.onnx, "openvino"))
    expected, found = (runtime.outputs(runtime.open_session(path, runtime=name), batch)["logits"].argmax(1) for path, name in files)
    assert small.figures["agreement"] == (found == expected).mean()
    assert small.figures["latency_ratio"] > 0
    again = formats.load_candidate(given.folder / "whole-int8")
    assert (again.runtime, again.figures) == ("openvino", small.figures)
    assert row(small).endswith(" in OpenVINO")
    assert row(small) in capsys.readouterr().err


@pytest.mark.usefixtures("openvino")
@pytest.mark.parametrize(("asked", "chosen"), [("openvino", "openvino"), ("auto", runtime.DEFAULT)])
def test_a_file_that_errs_in_one_runtime_is_judged_there(
    asked: str, chosen: str, job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = runtime.OpenVino.run
    monkeypatch.setattr(runtime.OpenVino, "run", lambda *call: [-value for value in real(*call)])
    given = job()
    feed, model = made(30, given)
    wrong = Bench(feed, model, Compress(runtime=asked), given).candidate("whole-float32", lambda: model, "float32")
    assert wrong.runtime == chosen
    assert wrong.figures["agreement"] == (chosen == runtime.DEFAULT), "none where the largest logit is taken for the smallest"


@pytest.mark.usefixtures("openvino")
def test_where_there_is_a_choice_a_file_openvino_cannot_run_stays(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    given = job()
    feed, model = made(30, given)

    def refuse(*_: object) -> None:
        raise RuntimeError("Exception from core.cpp:1:\nno such operator")

    bench = Bench(feed, model, Compress(runtime="auto"), given)
    monkeypatch.setattr(runtime, "OpenVino", refuse)
    assert bench.candidate("whole-float32", lambda: model, "float32").runtime == runtime.DEFAULT
    assert any(
        note.startswith("whole-float32 stays in ONNX Runtime: the file: OpenVINO") and "(no such operator)" in note for note in given.notes
    )
    alone = Bench(feed, model, Compress(runtime="openvino"), given)
    with pytest.raises(ModelError, match=r"OpenVINO .* cannot load it \(no such operator\); use the runtime onnxruntime"):
        alone.candidate("whole-float16", lambda: model, "float16")
