"""What the documents show runs, and what is generated is fresh."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_folder, make_image

ROOT = Path(__file__).parents[1]
TINY = "[embed]\nself_steps = 8\n[train]\ntrain_steps = 0\n[compress]\ndistil_steps = 4\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the README assumes it: photos/, new.jpg and an attar.toml, here with few steps."""
    make_folder(tmp_path / "photos", 14)
    make_image("discs", 999).save(tmp_path / "new.jpg")
    (tmp_path / "attar.toml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_readme_s_python_runs_as_written(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, alone, views = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    exec(compile(run, "README.md", "exec"), {})
    assert "model" in capsys.readouterr().out  # the sentence
    exec(compile(alone, "README.md", "exec"), {})
    assert "same top-1 class as the original on" in capsys.readouterr().out
    assert (project / "attar-runs" / "photos" / "report.html").exists()
    made: dict[str, object] = {}
    exec(compile(views, "README.md", "exec"), made)
    assert made["batch"].shape == (4, 3, 224, 224)  # type: ignore[attr-defined]


def test_the_readme_s_map_names_every_file_and_no_other() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    house = text[text.index("## The house") : text.index("## What it is not")]
    package = ROOT / "src" / "attar"
    here = {path.name for path in package.glob("*.py") if path.name != "__init__.py"}
    for folder in (
        "stages",
        "stages/cluster",
        "stages/curate",
        "stages/augment",
        "stages/compress",
        "stages/objects",
    ):  # the others are named as folders
        here |= {path.name for path in (package / folder).glob("*.py") if path.name != "__init__.py"}
    here |= {
        f"{path.name}/" for path in (*package.iterdir(), *(package / "stages").iterdir()) if path.is_dir() and path.name != "__pycache__"
    }
    named = set(re.findall(r"(?:^|  |, )(\w+(?:\.py|/))(?=[\s,])", house, re.MULTILINE)) - {"tests/", "examples/", "benchmarks/", "docs/"}
    assert named == here


def test_every_benchmark_and_make_target_named_in_the_documents_exists() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for document in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"make ([\w-]+)", (ROOT / document).read_text("utf-8")):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE) or target == "and", f"{document}: make {target}"
    for script in re.findall(r"`(\w+\.py)", (ROOT / "benchmarks" / "README.md").read_text("utf-8")):
        assert (ROOT / "benchmarks" / script).exists(), script


def test_generated_pages_are_fresh() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "generate.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_augmentation_page_s_python_runs_as_written() -> None:
    namespace: dict[str, object] = {"__name__": "page"}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "augmentation.md").read_text("utf-8"), re.DOTALL)
    for block in blocks:
        exec(compile(block, "augmentation.md", "exec"), namespace)
    assert len(blocks) == 4
    assert namespace["batch"].shape == (3, 3, 224, 224)  # type: ignore[attr-defined]
    assert namespace["views"].shape == (3, 3, 128, 128)  # type: ignore[attr-defined]
    assert all(one.shape == (6, 3, 224, 224) for one in namespace["alone"])  # type: ignore[attr-defined]
