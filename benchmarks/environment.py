"""What a result was measured on (commit, processor, threads, versions), and its file."""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any


def environment() -> dict[str, object]:
    here = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=here).stdout.strip()
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    versions = {name: importlib.metadata.version(name) for name in ("torch", "onnxruntime", "numpy", "scikit-learn", "torch-pruning")}
    return {"commit": commit, "cpu": cpu or platform.processor(), "cores": os.cpu_count(), "python": platform.python_version(), **versions}


def _named(value: Any) -> Any:
    """A setting without the folders of a path, also of those in strings, as FILE.py:BUILDER and NAME=PATH."""
    if isinstance(value, list):
        return [_named(one) for one in value]
    if isinstance(value, Path):
        return value.name
    if not isinstance(value, str):
        return value
    name, equals, path = value.rpartition("=")
    return name + equals + path.rpartition(os.sep)[2]


def record(given: argparse.Namespace, **found: Any) -> None:
    """Writes what was found to `given.out`, where that was asked for, with the environment and the settings; of paths only the names, for where they lay is nobody's business."""
    if given.out:
        settings = {key: _named(value) for key, value in vars(given).items() if key != "out"}
        body = {"environment": environment(), "settings": settings} | found
        given.out.write_text(json.dumps(body, indent=1, default=str) + "\n", "utf-8")
