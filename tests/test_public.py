"""The public face: the names, and that importing it is cheap."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Finished

import attar

NAMES = [
    "augment", "cluster", "clusters", "compress", "curate", "duplicates", "embed", "evaluate", "export", "init", "leaks", "name", "objects", "predict", "report", "run", "scan",
    "status", "train",
]  # fmt: skip


def imported(text: str) -> set[str]:
    """The top-level packages that Python text imports, in a process of its own."""
    code = f"{text}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stderr.split())


def test_public_names_are_these() -> None:
    assert attar.__all__ == ["Augment", *NAMES]
    public = {name for name, value in vars(attar).items() if not name.startswith("_") and inspect.isfunction(value)}
    assert public == set(NAMES)


def test_every_name_is_a_documented_verb_of_the_command_line() -> None:
    from attar.cli import make_parser

    verbs = next(action for action in make_parser()._actions if action.choices).choices
    assert set(verbs) == set(NAMES)
    for name in NAMES:
        assert getattr(attar, name).__doc__, name
        assert getattr(attar, name).__name__ == name


def test_verbs_are_functions_before_and_after_a_run(photos: Path, finished: Finished, tmp_path: Path) -> None:
    before = {name: getattr(attar, name) for name in NAMES}
    attar.scan(tmp_path / "run", data=str(photos), quiet=True)
    for module in ("attar.cli", "attar.pipeline", "attar.stages.report.page"):
        importlib.import_module(module)
    assert attar.predict(finished.root, [str(photos / "discs" / "000.png")])[0]["path"]
    assert {name: getattr(attar, name) for name in NAMES} == before
    for name in ("scan", "embed", "cluster", "curate", "augment", "train", "compress", "evaluate", "export", "report"):
        assert callable(getattr(attar, name)), name
    assert attar.status(tmp_path / "run")["stages"][0]["state"] == "done"


def test_a_stage_verb_returns_its_record(photos: Path, tmp_path: Path) -> None:
    from attar.records import Items

    items = attar.scan(tmp_path / "run", data=str(photos), quiet=True)
    assert isinstance(items, Items)
    assert len(items) == 60


@pytest.mark.parametrize(
    "text", ["import attar", "import attar.cli", "from attar.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"]
)
def test_importing_is_cheap(text: str) -> None:
    assert imported(text).isdisjoint({"torch", "numpy", "pyarrow", "sklearn", "scipy", "onnxruntime", "transformers", "PIL"})


def test_using_the_small_model_needs_no_torch(finished: Finished) -> None:
    found = imported(f"import attar; attar.predict({str(finished.root / 'model')!r}, [{str(finished.data / 'discs')!r}])")
    assert "onnxruntime" in found
    assert found.isdisjoint({"torch", "sklearn", "transformers"})
