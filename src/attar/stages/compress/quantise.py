"""int8: a float32 ONNX file becomes one with 8-bit activations and 7-bit weights, calibrated on unlabelled items.

Weights use 7 bits (`reduce_range`): processors without VNNI add pairs of products in 16 bits, which saturates with full-range weights
and silently changes the results. Depthwise convolutions keep 8 bits: their kernels widen each product to 32 bits before adding, and nine weights have
no others to make up for their rounding. Cluster head and shape arithmetic stay in float32.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process


class _Batches(CalibrationDataReader):
    def __init__(self, name: str, batches: Sequence[np.ndarray]) -> None:
        self._name, self._left = name, iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._left, None)
        return None if batch is None else {self._name: batch}


def quantise(source: Path, target: Path, batches: Sequence[np.ndarray]) -> None:
    """Writes the int8 version of an ONNX file; `batches` are normalised float32 (n, 3, height, width).

    Raises ValueError when there are none.
    """
    if not batches:
        raise ValueError(f"{source.name}: no calibration batches; expected at least one")
    logging.getLogger().setLevel(logging.ERROR)  # the library advises on the root logger at every call
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        graph = onnx.load(prepared).graph
        nodes = graph.node
        head = [node.name for node in nodes if "/head/" in node.name]
        depthwise = [
            node.input[1] for node in nodes if node.op_type == "Conv" and any(a.name == "group" and a.i > 1 for a in node.attribute)
        ]
        whole_range = {"quant_type": QuantType.QInt8, "axis": 0, "symmetric": True, "reduce_range": False}
        quantize_static(
            str(prepared),
            str(Path(folder) / "int8.onnx"),
            _Batches(graph.input[0].name, batches),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=head,
            calibrate_method=CalibrationMethod.MinMax,  # keeps two numbers per tensor and batch; the histogram methods keep every activation
            extra_options={"TensorQuantOverrides": {name: [whole_range] for name in depthwise}},
        )
        shutil.copyfile(Path(folder) / "int8.onnx", target)
