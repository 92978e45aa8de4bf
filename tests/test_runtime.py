"""The ONNX Runtime helpers and the measuring process, on small real files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from attar import runtime
from attar.errors import ModelError
from attar.records import Preprocess

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
