"""How to use the model and how it came to be: a snippet that runs, settings, versions, stage times, lineage."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attar
from attar.config import options
from attar.records import Export, Front
from attar.stages.report import words

SNIPPET = '''\
import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

MODEL = {model}
FILES = sys.argv[1:] or {files}

session = onnxruntime.InferenceSession(MODEL)
about = json.loads(session.get_modelmeta().custom_metadata_map["attar"])
steps = about["preprocess"]


def prepare(path):
    """The file as the model's input, float32 (3, height, width)."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    height, width = steps["size"]
    shortest, scaled = steps["resize_shortest"], (width, height)
    if shortest:
        scaled = [int(shortest * side / min(image.size)) for side in image.size]
    pixels = np.asarray(image.resize(scaled, Image.Resampling[steps["resample"].upper()]))
    gaps = [max(0, want - have) for want, have in zip((height, width), pixels.shape)]
    pixels = np.pad(pixels, [((gap + 1) // 2, gap // 2) for gap in gaps] + [(0, 0)], "edge")
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    pixels = np.float32(pixels[top : top + height, left : left + width]) / 255
    return ((pixels - np.float32(steps["mean"])) / np.float32(steps["std"])).transpose(2, 0, 1)


for path in FILES:
    outputs = session.run(None, {{session.get_inputs()[0].name: prepare(path)[None]}})
    found = dict(zip([output.name for output in session.get_outputs()], outputs))
    print(path, "cluster", int(found["cluster_probabilities"][0].argmax()), end=" ")
    if "logits" in found:
        best = int(found["logits"][0].argmax())
        print("class", about["classes"][best] if about["classes"] else best, end=" ")
    print()
'''


def snippet(model: str, files: Sequence[str]) -> str:
    """A program that runs the delivered file on some images with onnxruntime, Pillow and numpy alone."""
    return SNIPPET.format(model=_literal(model), files=_literal(list(files)))


def _literal(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def command(model: str, files: Sequence[str]) -> str:
    return shlex.join(["attar", "predict", model, *files])


def settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that differ from their defaults, and all others by section."""
    changed: list[dict[str, str]] = []
    others: dict[str, list[dict[str, str]]] = {}
    for name, option in options().items():
        if name not in values:
            continue
        row = {"name": name, "value": words.setting(values[name]), "default": words.setting(option.default), "text": option.text}
        if _differs(values[name], option.default):
            changed.append(row)
        else:
            others.setdefault(option.section, []).append(row)
    return {"changed": changed, "others": others}


def _differs(value: Any, default: Any) -> bool:
    value, default = (tuple(v) if isinstance(v, list) else v for v in (value, default))
    return value != default


def versions(front: Front, export: Export) -> list[tuple[str, str]]:
    """What made this run; read from this machine, as the records hold none of it."""
    found = [("attar", attar.__version__), ("Python", platform.python_version())]
    for name, package in (("PyTorch", "torch"), ("ONNX Runtime", "onnxruntime"), ("scikit-learn", "scikit-learn"), ("numpy", "numpy")):
        found.append((name, importlib.metadata.version(package)))
    found += [("processor", processor()), ("system", f"{platform.system()} {platform.machine()}")]
    return [*found, ("threads when measuring", str(front.threads))]


def processor() -> str:
    """The name of this machine's CPU."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def stages(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds and notes of each stage, its bar in per cent of the longest."""
    longest = max((float(row["seconds"]) for row in history), default=0.0)
    rows = [
        {
            "name": words.plain(row["stage"]),
            "time": words.seconds(float(row["seconds"])),
            "bar": round(100 * float(row["seconds"]) / longest, 2) if longest else 0.0,
            "notes": [words.plain(note) for note in row["notes"]],
        }
        for row in history
    ]
    return {"rows": rows, "total": words.seconds(sum(float(row["seconds"]) for row in history))}
