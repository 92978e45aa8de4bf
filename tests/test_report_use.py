"""How the report says to use the model, and what it says of the settings: the snippet runs, the command survives a shell."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from report_records import HOSTILE, PREPROCESS, Reader, records

from attar import records as r
from attar.config import build_config, flatten
from attar.modalities.image import decode, resize_crop
from attar.runtime import normalise
from attar.stages.report import origin
from attar.stages.report.page import report


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return records(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def html(whole: dict[str, Any]) -> str:
    return report(**whole).html


def code_blocks(html: str) -> list[str]:
    blocks, current = [], None
    for part in re.split(r"(<code>|</code></pre>)", html):
        if part == "<code>":
            current = ""
        elif part == "</code></pre>" and current is not None:
            blocks.append("".join(text for _, text in Reader(f"<p>{current}</p>").texts))
            current = None
        elif current is not None:
            current = part
    return blocks


@pytest.fixture(scope="module")
def snippet(html: str) -> str:
    return next(block for block in code_blocks(html) if block.startswith("import json"))


def test_snippet_runs_as_it_is(snippet: str, whole: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "use.py").write_text(snippet, "utf-8")
    done = subprocess.run([sys.executable, "-I", "-X", "utf8", "use.py"], cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    path = Path(whole["items"].root) / HOSTILE
    image, _ = decode(path.read_bytes(), max_pixels=10**6)
    channels = normalise(resize_crop(image, PREPROCESS)[None], PREPROCESS).mean(axis=(2, 3))[0]
    best = whole["model"].classes[int((-channels).argmax())]
    assert done.stdout.strip() == f"{path} cluster {int(channels.argmax())} class {best}"
    assert {line.split()[1].split(".")[0] for line in snippet.splitlines() if line.startswith(("import ", "from "))} == {
        "json",
        "sys",
        "numpy",
        "onnxruntime",
        "PIL",
    }


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(3, 60), st.integers(3, 60)),
    st.sampled_from(["RGB", "L", "RGBA", "P", "CMYK"]),
    st.sampled_from([None, 12, 16, 19]),
    st.sampled_from(["bilinear", "bicubic", "nearest", "box", "lanczos"]),
    st.sampled_from([(16, 16), (10, 14)]),
)
def test_snippet_prepares_images_as_attar_does(
    made_prepare: Callable[..., np.ndarray], size: tuple[int, int], mode: str, shortest: int | None, resample: str, target: tuple[int, int]
) -> None:
    preprocess = dataclasses.replace(PREPROCESS, size=target, resize_shortest=shortest, resample=resample)
    pixels = np.random.default_rng(sum(size)).integers(0, 256, (*size, 4)).astype(np.uint8)
    image = Image.fromarray(pixels, "RGBA").convert(mode) if mode != "CMYK" else Image.fromarray(pixels[..., :3]).convert("CMYK")
    given, expected = made_prepare(image, preprocess)
    level = 1 / 255 / min(preprocess.std)  # attar scales in a pass of its own, within one level of Pillow
    np.testing.assert_allclose(given, expected, atol=1.001 * level)


@pytest.fixture(scope="module")
def made_prepare(snippet: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """Runs the snippet's `prepare` and attar's own on an image saved as TIFF, under given steps."""
    file = tmp_path_factory.mktemp("prepare") / "image.tiff"
    names: dict[str, Any] = {}
    before, sys.argv = sys.argv, ["use.py"]
    try:
        exec(compile(snippet, "use.py", "exec"), names)
    finally:
        sys.argv = before

    def prepare(image: Image.Image, preprocess: r.Preprocess) -> tuple[np.ndarray, np.ndarray]:
        image.save(file, "TIFF")
        names["steps"] = json.loads(json.dumps(dataclasses.asdict(preprocess)))
        ours = resize_crop(decode(file.read_bytes(), max_pixels=10**6)[0], preprocess)
        return names["prepare"](file), normalise(ours[None], preprocess)[0]

    return prepare


def test_command_survives_a_shell(whole: dict[str, Any], html: str) -> None:
    import shlex

    line = next(block for block in code_blocks(html) if block.startswith("attar predict"))
    assert shlex.split(line) == ["attar", "predict", str(whole["export"].onnx.parent), str(Path(whole["items"].root) / HOSTILE)]


def test_settings_that_differ_come_first() -> None:
    found = origin.settings(flatten(build_config({"data": "d", "clusters": 4, "mean": [0.5, 0.5, 0.5]})))
    assert [(row["name"], row["value"]) for row in found["changed"]] == [("data", "d"), ("mean", "0.5, 0.5, 0.5"), ("clusters", "4")]
    others = [row["name"] for rows in found["others"].values() for row in rows]
    assert "seed" in others
    assert len(others) + 3 == len(flatten(build_config({"data": "d"})))
