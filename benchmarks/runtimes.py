"""A runtime in a process of its own, so that none disturbs another's timings: asked in JSON lines, answers in JSON lines.

    python runtimes.py onnxruntime|openvino THREADS

Needs numpy and the runtime alone, so it may be another Python environment's. `Runtime` is the asking side; `take_turns` lets any number of files
in any number of runtimes run one after the other, round by round, so that a change of clock speed or load hits all alike.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

TURN_MS = 5.0  # a turn lasts at least this, so that the clock's grain and single interrupts do not show


class Runtime:
    """The asking side: a process that keeps models open."""

    def __init__(self, name: str, threads: int, python: str = sys.executable) -> None:
        self.name = name
        command = [python, __file__, name, str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request: Any) -> Any:
        """The answer to one request; raises SystemExit with what the process says when it fails."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"the process ended with code {self.process.wait()}"}
        if "error" in answer:
            raise SystemExit(f"{self.name}: {request}: {answer['error']}")
        return answer["value"]

    def load(self, name: str, file: Path, shape: tuple[int, ...]) -> None:
        self.ask(do="load", name=name, file=str(Path(file).resolve()), shape=shape)

    def turn(self, name: str) -> float:
        """Milliseconds of one inference at batch 1."""
        return float(self.ask(do="turn", name=name))

    def outputs(self, name: str, inputs: Path, outputs: Path) -> np.ndarray:
        """The model's logits (n, classes) for an array of inputs in a .npy file."""
        self.ask(do="run", name=name, inputs=str(inputs), outputs=str(outputs))
        return np.load(outputs)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def take_turns(turns: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, np.ndarray]:
    """Milliseconds (rounds,) of each: every round asks all of them in turn."""
    found: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            found[name].append(turn())
    return {name: np.array(values) for name, values in found.items()}


def open_onnxruntime(file: str, shape: list[int], threads: int) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    wanted, entry = [_logits(names)], session.get_inputs()[0].name
    return lambda batch: session.run(wanted, {entry: batch})[0]


def open_openvino(file: str, shape: list[int], threads: int) -> Callable[[np.ndarray], np.ndarray]:
    import openvino as ov

    model = ov.Core().read_model(file)
    model.reshape({model.input(0): shape})
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    names = [output.get_any_name() for output in model.outputs]
    wanted = names.index(_logits(names))

    def call(batch: np.ndarray) -> np.ndarray:
        request.infer({0: batch})
        return request.get_output_tensor(wanted).data

    return call


def _logits(names: list[str]) -> str:
    if "logits" not in names and len(names) > 1:
        raise ValueError(f"outputs {names}; expected one called logits")
    return "logits" if "logits" in names else names[0]


OPEN = {"onnxruntime": open_onnxruntime, "openvino": open_openvino}


def serve(runtime: str, threads: int) -> None:
    """Answers requests until there are no more."""
    calls: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    noise: dict[str, np.ndarray] = {}
    repeats: dict[str, int] = {}

    def timed(name: str) -> float:
        start = time.perf_counter_ns()
        calls[name](noise[name])
        return (time.perf_counter_ns() - start) / 1e6

    def answer(do: str, name: str, file: str = "", shape: tuple[int, ...] = (), inputs: str = "", outputs: str = "") -> Any:
        if do == "load":
            calls[name] = OPEN[runtime](file, list(shape), threads)
            noise[name] = np.random.default_rng(0).standard_normal(shape, np.float32)
            repeats[name] = math.ceil(TURN_MS / min(timed(name) for _ in range(20)))
            return None
        if do == "turn":
            timed(name)  # brings the weights back into the caches others used
            return float(np.median([timed(name) for _ in range(repeats[name])]))
        assert do == "run", do
        items = np.load(inputs, mmap_mode="r")
        found = [calls[name](np.ascontiguousarray(items[i : i + 1])).copy() for i in range(len(items))]
        np.save(outputs, np.concatenate(found))
        return len(found)

    for line in sys.stdin:
        try:
            reply = {"value": answer(**json.loads(line))}
        except Exception as error:  # whatever it is, the asking side must hear of it and stop
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
