"""The only place that runs ONNX files, in ONNX Runtime or in OpenVINO, and the processes that latency is measured in, one for each of the two.

Every file attar makes takes one input of any n: "image", float32 (n, 3, H, W), already normalised, or "input" for what is no image;
and gives "embedding" (n, d), "cluster_probabilities" (n, k) and, where the model has classes, "logits" (n, c).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import onnxruntime as ort

from attar.errors import AttarError, MissingExtra, ModelError

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
DEFAULT = "onnxruntime"
NAMES = {DEFAULT: "ONNX Runtime", "openvino": "OpenVINO"}
"""What people call the runtimes."""
TURN_MS = 5.0  # what one file's turn in a round lasts at least, so that the clock's grain and single interrupts do not show


class Session(Protocol):
    """What attar uses of `onnxruntime.InferenceSession`; its inputs and outputs have a name, a type as in TYPES and a shape."""

    def get_inputs(self) -> Sequence[Any]: ...

    def get_outputs(self) -> Sequence[Any]: ...

    def run(self, names: Sequence[str] | None, feed: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]: ...


class Port(NamedTuple):
    """An input or output of a file in OpenVINO, described as ONNX Runtime describes it."""

    name: str
    type: str
    shape: list[int | str]


class OpenVino:
    """A file in OpenVINO, used like an ONNX Runtime session.

    It is compiled for the one shape that latency is measured at, a single item unless the file fixes another number, so that the program that is
    timed is the one that is judged and used. Float layers are computed in float32: left to itself OpenVINO takes bfloat16 on processors that have
    it, and what was found on one processor would not hold on another. The system places the threads, as it does ONNX Runtime's.
    """

    def __init__(self, path: str | Path, threads: int) -> None:
        import openvino

        core = openvino.Core()
        model = core.read_model(str(path))
        shapes = {port: port.get_partial_shape() for port in model.inputs}
        for shape in shapes.values():
            if shape.rank.is_static and len(shape) and shape[0].is_dynamic:
                shape[0] = 1
        model.reshape(shapes)
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32",
            "ENABLE_CPU_PINNING": False,
        }
        self._request = core.compile_model(model, "CPU", settings).create_infer_request()
        self._ports = [[_port(port) for port in ports] for ports in (model.inputs, model.outputs)]

    def get_inputs(self) -> list[Port]:
        return self._ports[0]

    def get_outputs(self) -> list[Port]:
        return self._ports[1]

    def run(self, names: Sequence[str] | None, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        made = self._request.infer([feed[port.name] for port in self.get_inputs()], share_inputs=True)
        found = dict(zip((port.name for port in self.get_outputs()), made.values()))
        return [found[name] for name in names or found]


def _port(port: Any) -> Port:
    kind, shape = port.get_element_type(), port.get_partial_shape()
    known = next((name for name, dtype in TYPES.items() if np.dtype(dtype) == kind.to_dtype()), str(kind))
    return Port(port.get_any_name(), known, [int(str(side)) if side.is_static else str(side) for side in shape])


def require(runtime: str, purpose: str = "") -> None:
    """Raises MissingExtra when a runtime ("auto": the choice between the two) needs a package that is not installed; `purpose` says what for."""
    if runtime != DEFAULT and importlib.util.find_spec("openvino") is None:
        raise MissingExtra("openvino", "openvino", purpose or f"runtime {runtime!r}")


def said(runtime: str) -> str:
    """A runtime's name and version."""
    return f"{NAMES[runtime]} {ort.__version__ if runtime == DEFAULT else importlib.metadata.version(runtime)}"


def where(runtime: str) -> str:
    """What follows a figure that holds in one runtime; nothing for ONNX Runtime, which goes without saying.

    >>> "1.8 ms" + where("openvino"), "2.3 ms" + where("onnxruntime")
    ('1.8 ms in OpenVINO', '2.3 ms')
    """
    return "" if runtime == DEFAULT else f" in {NAMES[runtime]}"


def open_session(path: str | Path, threads: int = 1, runtime: str = DEFAULT) -> Session:
    """A file on the CPU, in one of the runtimes: `threads` threads inside an operator, operators one after the other, all graph optimisations.

    Raises ModelError when the file is missing or the runtime cannot run it, MissingExtra when the runtime is not installed.
    """
    if not Path(path).is_file():
        raise ModelError(f"{path}: no such file; expected an ONNX model")
    require(runtime, f"{path}, a file for {NAMES[runtime]},")
    try:
        return OpenVino(path, threads) if runtime == "openvino" else _onnxruntime(path, threads)
    except Exception as error:  # the runtimes' own classes share no base below Exception
        remedy = "export the model again" if runtime == DEFAULT else "use the runtime onnxruntime"
        raise ModelError(f"{path}: {said(runtime)} cannot load it ({_gist(error)}); {remedy}") from error


def _onnxruntime(path: str | Path, threads: int, profile: Path | None = None) -> ort.InferenceSession:
    """Threads spin while a call runs (ONNX Runtime's default) and stop when it returns, so that sessions do not steal each other's cores."""
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def input_size(session: Session) -> tuple[int, int]:
    """Height and width of a session's input, pixels; raises ModelError when it is not an image input of a fixed size."""
    inputs = session.get_inputs()
    shape = inputs[0].shape
    if len(inputs) != 1 or len(shape) != 4 or shape[1] != 3 or not all(isinstance(side, int) for side in shape[2:]):
        raise ModelError(f"the model's inputs are {_said(inputs)}; expected one, float32 (n, 3, height, width) with fixed height and width")
    return shape[2], shape[3]


def outputs(session: Session, batch: np.ndarray) -> dict[str, np.ndarray]:
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
            raise ModelError(f"the ONNX model refuses a batch of shape {batch.shape} ({_gist(error)})") from error
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


def run_batches(
    files: Mapping[str, Path], stream: Iterable[np.ndarray], *, threads: int = 1, runtimes: Mapping[str, str] = {}
) -> Iterator[dict[str, dict[str, np.ndarray]]]:
    """Runs several files on the same batches of inputs, so that an item is read once: yields outputs by file name.

    `runtimes` names the runtime of a file, ONNX Runtime where it does not. Memory: one batch.
    """
    sessions = {name: open_session(path, threads, runtimes.get(name, DEFAULT)) for name, path in files.items()}
    for batch in stream:
        yield {name: outputs(session, batch) for name, session in sessions.items()}


def run_stacked(
    path: Path,
    stream: Iterable[np.ndarray],
    *,
    threads: int = 1,
    runtime: str = DEFAULT,
    progress: Callable[[int], object] | None = None,
) -> dict[str, np.ndarray]:
    """One file's outputs for a whole stream of inputs, stacked in its order: name → (n, …).

    `progress` is called with the number of items done after each batch.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for found in run_batches({"model": path}, stream, threads=threads, runtimes={"model": runtime}):
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
    runtimes: Mapping[str, str] = {},
    threads: int = 1,
    rounds: int = 30,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> dict[str, np.ndarray]:
    """Milliseconds of one inference at batch 1, per file (rounds,), each runtime in a fresh process without torch.

    The files take turns (A B C A B C …), also across processes, of which one at a time works, so that a change of clock speed or load
    hits all alike and ratios can be paired by round. A turn is one untimed inference, then timed ones for at least TURN_MS; its figure is their median.
    The input is normal noise drawn from `seed`, zeros where it is no floating-point one. `runtimes` names the runtime of a file, ONNX Runtime where
    it does not. `progress` is called with 1 after each round. Raises ModelError with the last line of the process's error output when it fails.
    """
    grouped: dict[str, dict[str, Path]] = {}
    for name, path in files.items():
        grouped.setdefault(runtimes.get(name, DEFAULT), {})[name] = path
    found: list[dict[str, float]] = []
    with contextlib.ExitStack() as stack:
        clocks = [stack.enter_context(_Clock(some, runtime, threads, seed)) for runtime, some in grouped.items()]
        for _ in range(rounds):
            found.append({name: value for clock in clocks for name, value in clock.round().items()})
            if progress:
                progress(1)
    return {name: np.array([one[name] for one in found]) for name in files}


class _Clock:
    """The asking side of a process that times some files in one runtime, a round whenever it is asked for one."""

    def __init__(self, files: Mapping[str, Path], runtime: str, threads: int, seed: int) -> None:
        require(runtime)
        order = {name: str(Path(path).resolve()) for name, path in files.items()}
        spec = json.dumps({"files": order, "runtime": runtime, "threads": threads, "seed": seed})
        # `-m` imports from the current folder first: it must be attar's, not the user's with perhaps a json.py in it.
        home, command = Path(__file__).resolve().parents[1], [sys.executable, "-m", "attar.runtime", spec]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed on exit
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, cwd=home)

    def __enter__(self) -> _Clock:
        try:
            self._answer()  # the files are open and warm
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):  # of a request that was not read any more
            self._process.communicate()
        self._errors.close()

    def round(self) -> dict[str, float]:
        """Milliseconds of each file in its next turn."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended: its last words say why
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            lines = self._errors.read().strip().splitlines() or [f"the process ended with code {code} and said nothing"]
            raise ModelError(f"measuring latency failed: {lines[-1]}")
        return json.loads(line)


def kernel_times(path: Path, runs: int = 20, seed: int = 0) -> dict[str, float]:
    """Milliseconds of each node of the optimised graph in one inference at batch 1, one thread: the median of some runs."""
    with tempfile.TemporaryDirectory() as folder:
        session = _onnxruntime(path, 1, Path(folder) / "profile")
        call = _call(session, noise(session, seed))
        for _ in range(runs):
            call()
        events = json.loads(Path(session.end_profiling()).read_text("utf-8"))
    found: dict[str, list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            found.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event["dur"] / 1e3)
    return {name: float(np.median(times)) for name, times in found.items()}


def _rounds(files: Mapping[str, str], runtime: str, threads: int, seed: int) -> Iterator[dict[str, float]]:
    """Milliseconds of each file, one round at a time; nothing of them in the first, when all is ready."""
    sessions = {name: open_session(path, threads, runtime) for name, path in files.items()}
    calls = {name: _call(session, noise(session, seed)) for name, session in sessions.items()}
    # Warm-up: memory arenas and weight layouts settle in the first calls; the last one tells how many fit in a turn.
    repeats = {name: math.ceil(TURN_MS / min(call() for _ in range(5))) for name, call in calls.items()}
    yield {}
    while True:
        figures = {}
        for name, call in calls.items():
            call()  # brings the file's weights back into the caches the others used
            figures[name] = float(np.median([call() for _ in range(repeats[name])]))
        yield figures


def noise(session: Session, seed: int) -> np.ndarray:
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


def _call(session: Session, item: np.ndarray) -> Callable[[], float]:
    """One inference of a session; returns its milliseconds."""
    feed = {session.get_inputs()[0].name: item}

    def call() -> float:
        start = time.perf_counter_ns()
        session.run(None, feed)
        return (time.perf_counter_ns() - start) / 1e6

    return call


def _gist(error: Any) -> str:
    """The first line that says what is wrong, without what both runtimes put before it."""
    text = str(error).removeprefix("[ONNXRuntimeError] : ").strip()
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(("Exception from", "Check '"))]
    return lines[0] if lines else type(error).__name__


def _main(spec: str) -> int:
    """What `python -m attar.runtime SPEC` does: a JSON line when it is ready, then one per line it is given, a round each."""
    try:
        for figures in _rounds(**json.loads(spec)):
            print(json.dumps(figures), flush=True)
            if not sys.stdin.readline():
                break
    except AttarError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(_main(sys.argv[1]))
