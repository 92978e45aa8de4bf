"""What the benchmarks share: CIFAR as JPEG files, a user's model in a Python file, judging by hidden labels, tables."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

CACHE = Path(tempfile.gettempdir()) / "attar-benchmarks"
BATCH = 100


class Pictures(NamedTuple):
    """One folder of class folders. Labels only judge: what is compressed gets images alone."""

    images: np.ndarray  # (n, height, width, 3) uint8
    labels: np.ndarray  # (n,) number of the class folder, in the order of `classes`
    classes: tuple[str, ...]


def pictures(folder: Path, cache: Path = CACHE) -> Pictures:
    """Every folder/CLASS/*.jpg, decoded once and kept in `cache` as one file, so that further seeds and sides do not decode again."""
    kept = cache / f"{folder.name}-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:12]}.npz"
    if not kept.exists():
        files = sorted(folder.glob("*/*.jpg"))
        if not files:
            raise SystemExit(f"{folder}: no CLASS/*.jpg inside; expected one folder of JPEG files per class")
        say(f"decoding {len(files):,} images of {folder}")
        with ThreadPoolExecutor(2) as pool:
            images = np.stack(list(pool.map(lambda file: np.asarray(Image.open(file).convert("RGB")), files)))
        classes = sorted({file.parent.name for file in files})
        labels = np.array([classes.index(file.parent.name) for file in files])
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(".part.npz")
        np.savez(part, images=images, labels=labels, classes=np.array(classes))
        part.rename(kept)
    with np.load(kept) as found:
        return Pictures(found["images"], found["labels"], tuple(found["classes"].tolist()))


class Original(NamedTuple):
    """A user's model: a Python file with a builder, MEAN, STD and CLASSES, and a safetensors file."""

    module: nn.Module  # in evaluation mode
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]


def original(spec: str, weights: Path) -> Original:
    """The model of FILE.py:BUILDER with its weights."""
    file, _, builder = spec.rpartition(":")
    found = importlib.util.spec_from_file_location(Path(file).stem, file)
    if found is None or found.loader is None or not Path(file).is_file():
        raise SystemExit(f"--model {spec}: expected FILE.py:BUILDER")
    code = importlib.util.module_from_spec(found)
    sys.modules[found.name] = code  # so that modules of its classes can be copied and saved
    found.loader.exec_module(code)
    module = getattr(code, builder)()
    module.load_state_dict(load_file(weights))
    return Original(module.eval(), tuple(code.MEAN), tuple(code.STD), tuple(code.CLASSES))


def normalised(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """uint8 (n, height, width, 3) → float32 (n, 3, height, width), (x / 255 − mean) / std."""
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return ((scaled - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]).contiguous()


def write_onnx(module: nn.Module, example: torch.Tensor, path: Path) -> Path:
    """A module that gives logits as an ONNX file that takes any number of items."""
    path.parent.mkdir(parents=True, exist_ok=True)
    axes = {"input": {0: "items"}, "logits": {0: "items"}}
    module = module.eval().to(memory_format=torch.contiguous_format)
    with torch.no_grad():
        torch.onnx.export(
            module,
            (example[:2].contiguous(),),
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=["input"],
            output_names=["logits"],
            dynamic_axes=axes,
        )
    return path


def decide(path: Path, inputs: torch.Tensor, threads: int) -> np.ndarray:
    """Class of every input (n, …) by ONNX Runtime: the output called logits, or the only one."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    if "logits" not in names and len(names) > 1:
        raise SystemExit(f"{path}: outputs {names}; expected one called logits")
    wanted = "logits" if "logits" in names else names[0]
    entry = session.get_inputs()[0].name
    chunks = (inputs[start : start + BATCH].numpy() for start in range(0, len(inputs), BATCH))
    return np.concatenate([session.run([wanted], {entry: chunk})[0].argmax(1) for chunk in chunks])


def onnx_macs(path: Path, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of one item (1, …) in a float32 file's convolutions and matrix products: one counter for every side.

    The shapes are those of a run with every tensor that counts as an output, so nothing is inferred.
    """
    model = onnx.load(path)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    names = {name for node in nodes for name in (*node.input[:2], node.output[0])} - shapes.keys()
    entry = model.graph.input[0].name
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(names - {entry}))
    options = ort.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL, 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    zeros = np.zeros(shape, np.float32)
    shapes |= {name: value.shape for name, value in zip(sorted(names - {entry}), session.run(None, {entry: zeros}))} | {entry: shape}
    total = 0
    for node in nodes:
        turned = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
        first, second = shapes[node.input[0]], shapes[node.input[1]]
        summed = math.prod(second[1:]) if node.op_type == "Conv" else first[-2 if turned else -1]
        total += math.prod(shapes[node.output[0]]) * summed
    return total


def shown(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± sample standard deviation; the value alone when there is one."""
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with equal keys as a Markdown table, columns aligned."""
    head = list(rows[0])
    cells = [head, *([str(row[key]) for key in head] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
