"""ONNX Runtime: the only place that runs ONNX files, and the process of its own that latency is measured in.

Every file attar makes takes one input of any n: "image", float32 (n, 3, H, W), already normalised, or "input" for what is no image;
and gives "embedding" (n, d), "cluster_probabilities" (n, k) and, where the model has classes, "logits" (n, c).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from attar.errors import AttarError, ModelError

if TYPE_CHECKING:  # the measuring process must stay light: numpy and onnxruntime only
    from attar.records import Preprocess

TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
}
TURN_MS = 5.0  # what one file's turn in a round lasts at least, so that the clock's grain and single interrupts do not show


def open_session(path: str | Path, threads: int = 1, profile: Path | None = None) -> ort.InferenceSession:
    """A session on the CPU: `threads` threads inside an operator, operators one after the other, all graph optimisations.

    Threads spin while a call runs (ONNX Runtime's default) and stop when it returns, so that sessions do not steal each
    other's cores. Raises ModelError when the file is missing or not a model.
    """
    if not Path(path).is_file():
        raise ModelError(f"{path}: no such file; expected an ONNX model")
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own classes share no base below Exception
        raise ModelError(f"{path}: ONNX Runtime {ort.__version__} cannot load it ({_first_line(error)}); export the model again") from error


def input_size(session: ort.InferenceSession) -> tuple[int, int]:
    """Height and width of a session's input, pixels; raises ModelError when it is not an image input of a fixed size."""
    inputs = session.get_inputs()
    shape = inputs[0].shape
    if len(inputs) != 1 or len(shape) != 4 or shape[1] != 3 or not all(isinstance(side, int) for side in shape[2:]):
        raise ModelError(f"the model's inputs are {_said(inputs)}; expected one, float32 (n, 3, height, width) with fixed height and width")
    return shape[2], shape[3]


def outputs(session: ort.InferenceSession, batch: np.ndarray) -> dict[str, np.ndarray]:
    """Every output by name for a batch of inputs, in the type the file takes; raises ModelError when the model refuses it.

    A file with a fixed number of items per call is called as often as needed, the last time filled up.
    """
    taken, names = session.get_inputs()[0], [output.name for output in session.get_outputs()]
    fixed = taken.shape[0] if taken.shape and isinstance(taken.shape[0], int) else len(batch)
    parts = []
    for start in range(0, len(batch), max(fixed, 1)):
        part = np.ascontiguousarray(batch[start : start + fixed], TYPES.get(taken.type))
        filled = np.concatenate([part, np.repeat(part[-1:], fixed - len(part), 0)]) if len(part) < fixed else part
        try:
            found = session.run(names, {taken.name: filled})
        except Exception as error:  # as in open_session
            raise ModelError(f"the ONNX model refuses a batch of shape {batch.shape} ({_first_line(error)})") from error
        parts.append([value[: len(part)] for value in found])
    return {name: np.concatenate(values) if len(values) > 1 else values[0] for name, *values in zip(names, *parts)}


def normalise(images: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """Model input from pixels, (x / 255 − mean) / std: uint8 (n, H, W, 3) → float32 (n, 3, H, W), contiguous.

    >>> from attar.records import Preprocess
    >>> white = np.full((1, 1, 1, 3), 255, np.uint8)
    >>> normalise(white, Preprocess(size=(1, 1), mean=(0.5,), std=(0.25,))).ravel().tolist()
    [2.0, 2.0, 2.0]
    """
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise ValueError(f"images: {images.dtype} {images.shape}; expected uint8 (n, height, width, 3)")
    mean, std = (np.broadcast_to(np.asarray(part, np.float64), 3) for part in (preprocess.mean, preprocess.std))
    scale, shift = ((1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32))
    out = np.empty((len(images), 3, *images.shape[1:3]), np.float32)
    np.multiply(images.transpose(0, 3, 1, 2), scale[:, None, None], out=out)
    out += shift[:, None, None]
    return out


def run_batches(files: Mapping[str, Path], stream: Iterable[np.ndarray], *, threads: int = 1) -> Iterator[dict[str, dict[str, np.ndarray]]]:
    """Runs several files on the same batches of inputs, so that an item is read once: yields outputs by file name.

    Memory: one batch.
    """
    sessions = {name: open_session(path, threads) for name, path in files.items()}
    for batch in stream:
        yield {name: outputs(session, batch) for name, session in sessions.items()}


def run_stacked(
    path: Path, stream: Iterable[np.ndarray], *, threads: int = 1, progress: Callable[[int], object] | None = None
) -> dict[str, np.ndarray]:
    """One file's outputs for a whole stream of inputs, stacked in its order: name → (n, …).

    `progress` is called with the number of items done after each batch.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for found in run_batches({"model": path}, stream, threads=threads):
        for name, value in found["model"].items():
            parts.setdefault(name, []).append(value)
        if progress:
            progress(len(value))
    if not parts:
        raise ValueError(f"{path}: nothing to run on; expected at least one batch")
    return {name: np.concatenate(values) for name, values in parts.items()}


def measure_latency(
    files: Mapping[str, Path],
    *,
    threads: int = 1,
    rounds: int = 30,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> dict[str, np.ndarray]:
    """Milliseconds of one inference at batch 1, per file (rounds,), measured in a fresh process without torch.

    The files take turns (A B C A B C …), so that a change of clock speed or load hits all alike and ratios can be
    paired by round. A turn is one untimed inference, then timed ones for at least TURN_MS; its figure is their median.
    The input is normal noise drawn from `seed`, zeros where it is no floating-point one. `progress` is called with 1 after each round. Raises ModelError with
    the last line of the process's error output when it fails.
    """
    order = {name: str(Path(path).resolve()) for name, path in files.items()}
    spec = json.dumps({"files": order, "threads": threads, "rounds": rounds, "seed": seed})
    # `-m` imports from the current folder first: it must be attar's, not the user's with perhaps a json.py in it.
    home = Path(__file__).resolve().parents[1]
    found: list[dict[str, float]] = []
    with tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, "-m", "attar.runtime", spec]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, text=True, cwd=home) as process:
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    found.append(json.loads(line))
                    if progress:
                        progress(1)
            except BaseException:
                process.kill()
                raise
        if process.returncode != 0 or len(found) != rounds:
            errors.seek(0)
            lines = errors.read().strip().splitlines() or [f"the process ended with code {process.returncode} and said nothing"]
            raise ModelError(f"measuring latency failed: {lines[-1]}")
    return {name: np.array([one[name] for one in found]) for name in files}


def kernel_times(path: Path, runs: int = 20, seed: int = 0) -> dict[str, float]:
    """Milliseconds of each node of the optimised graph in one inference at batch 1, one thread: the median of some runs."""
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(path, profile=Path(folder) / "profile")
        call = _call(session, noise(session, seed))
        for _ in range(runs):
            call()
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    found: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            found.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event["dur"] / 1e3)
    return {name: float(np.median(times)) for name, times in found.items()}


def _rounds(files: Mapping[str, str], threads: int, rounds: int, seed: int) -> Iterator[dict[str, float]]:
    """Milliseconds of each file, one round at a time."""
    sessions = {name: open_session(path, threads) for name, path in files.items()}
    calls = {name: _call(session, noise(session, seed)) for name, session in sessions.items()}
    # Warm-up: memory arenas and weight layouts settle in the first calls; the last one tells how many fit in a turn.
    repeats = {name: math.ceil(TURN_MS / min(call() for _ in range(5))) for name, call in calls.items()}
    for _ in range(rounds):
        figures = {}
        for name, call in calls.items():
            call()  # brings the file's weights back into the caches the others used
            figures[name] = float(np.median([call() for _ in range(repeats[name])]))
        yield figures


def noise(session: ort.InferenceSession, seed: int) -> np.ndarray:
    """One item a session takes: normal noise, zeros for whole numbers; raises ModelError where its shape is not fixed."""
    inputs = session.get_inputs()
    shape, kind = inputs[0].shape, TYPES.get(inputs[0].type)
    if len(inputs) != 1 or kind is None or not shape or not all(isinstance(side, int) for side in shape[1:]):
        raise ModelError(f"the model's inputs are {_said(inputs)}; expected one, of a fixed shape but for the number of items")
    whole = (shape[0] if isinstance(shape[0], int) else 1, *shape[1:])
    floating = np.issubdtype(kind, np.floating)
    return np.random.default_rng(seed).standard_normal(whole).astype(kind) if floating else np.zeros(whole, kind)


def _said(inputs: Iterable[Any]) -> str:
    return ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs)


def _call(session: ort.InferenceSession, item: np.ndarray) -> Callable[[], float]:
    """One inference of a session; returns its milliseconds."""
    feed = {session.get_inputs()[0].name: item}

    def call() -> float:
        start = time.perf_counter_ns()
        session.run(None, feed)
        return (time.perf_counter_ns() - start) / 1e6

    return call


def _first_line(error: Any) -> str:
    text = str(error).removeprefix("[ONNXRuntimeError] : ").strip()
    return text.splitlines()[0] if text else type(error).__name__


def _main(spec: str) -> int:
    """What `python -m attar.runtime SPEC` does: one JSON line per round on stdout."""
    try:
        for figures in _rounds(**json.loads(spec)):
            print(json.dumps(figures), flush=True)
    except AttarError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(_main(sys.argv[1]))
