"""The peers of quantisation, with nothing but their defaults.

    python quantisers.py onnxruntime|nncf SOURCE.onnx TARGET.onnx INPUTS.npy

Needs numpy, onnx and the quantiser alone, so it may be another Python environment's. INPUTS.npy holds normalised float32 inputs (n, …).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx


def onnxruntime_defaults(source: Path, target: Path, inputs: np.ndarray) -> None:
    """`quantize_static` after the preprocessing its documentation advises."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    entry = onnx.load(source).graph.input[0].name

    class Items(CalibrationDataReader):
        def __init__(self) -> None:
            self.left: Iterator[np.ndarray] = iter(np.split(inputs, len(inputs)))

        def get_next(self) -> dict[str, np.ndarray] | None:
            item = next(self.left, None)
            return None if item is None else {entry: item}

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(source), str(prepared))
        quantize_static(str(prepared), str(target), Items())


def nncf_defaults(source: Path, target: Path, inputs: np.ndarray) -> None:
    """`nncf.quantize` of the ONNX model; it takes the first 300 inputs."""
    import nncf

    model = onnx.load(source)
    entry = model.graph.input[0].name
    onnx.save(nncf.quantize(model, nncf.Dataset(np.split(inputs, len(inputs)), lambda item: {entry: item})), target)


QUANTISERS = {"onnxruntime": onnxruntime_defaults, "nncf": nncf_defaults}


if __name__ == "__main__":
    QUANTISERS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]), np.load(sys.argv[4]))
