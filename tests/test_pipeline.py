"""The spine from end to end, on one small real run: what it leaves, what a second call redoes, and what a kill costs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest
from conftest import Finished, attar_command, contents
from safetensors.numpy import load_file

import attar
from attar.errors import BudgetNotReached, UsageError
from attar.pipeline import SPINE, Run

TABLES = ("items.parquet", "quarantine.parquet", "clusters.parquet", "selection.parquet", "policy.json")
"""Bit-equal however a run was interrupted."""


@pytest.fixture
def copy(finished: Finished, tmp_path: Path) -> Path:
    """The finished run, to be changed."""
    return Path(shutil.copytree(finished.root, tmp_path / "run"))


def again(finished: Finished, root: Path, until: str = "report", **changed: Any) -> tuple[str, ...]:
    """The stages that did work when a run is called again with some settings changed."""
    return attar.run(**(finished.settings | {"out": str(root), "quiet": True, "until": until} | changed)).ran


def test_every_file_is_there_and_opens_with_plain_tools(finished: Finished) -> None:
    root = finished.root
    for name in ("items", "quarantine", "clusters", "selection", "vectors/00000"):
        assert pq.read_table(root / f"{name}.parquet").num_rows == (1 if name == "quarantine" else 60), name
    for path in root.rglob("*.json"):
        assert json.loads(path.read_text("utf-8"), parse_constant=lambda name, path=path: pytest.fail(f"{path}: {name}")), path
    weights = list(root.rglob("*.safetensors"))
    assert {str(path.relative_to(root)) for path in weights} > {"original/original.safetensors", "vectors/encoder.safetensors"}
    for path in weights:
        assert all(np.isfinite(value).all() for value in load_file(path).values()), path
    images = np.zeros((1, 3, 48, 48), np.float32)
    for path in root.rglob("*.onnx"):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        entry = session.get_inputs()[0]
        side = entry.shape[-2:]
        made = dict(
            zip([output.name for output in session.get_outputs()], session.run(None, {entry.name: np.resize(images, (1, 3, *side))}))
        )
        assert made["cluster_probabilities"].sum() == pytest.approx(1, abs=1e-3), path
    assert {path.parent.name for path in root.glob("candidates/*/model.onnx")} >= {"original", "cut50-int8"}
    assert (root / "report.html").read_text("utf-8").lstrip().lower().startswith("<!doctype html")
    assert not list(root.rglob("*.tmp"))
    assert not any((root / ".partial").iterdir())


def test_the_broken_file_is_set_aside_with_reason_and_remedy(finished: Finished) -> None:
    (row,) = pq.read_table(finished.root / "quarantine.parquet").to_pylist()
    assert row["path"] == "broken.png"
    assert row["reason"]
    assert row["remedy"]


def test_nothing_of_the_users_is_changed(finished: Finished) -> None:
    assert contents(finished.data) == finished.data_before


def test_the_same_again_does_no_work(finished: Finished, copy: Path) -> None:
    before = contents(copy)
    assert again(finished, copy) == ()
    bookkeeping = {".lock", "run.json", "settings.json"}
    assert {name: value for name, value in contents(copy).items() if name not in bookkeeping} == {
        name: value for name, value in before.items() if name not in bookkeeping
    }


def test_the_run_gives_the_record_of_every_stage(finished: Finished) -> None:
    run = Run(finished.root)
    assert {name: type(run[name]) for name in SPINE} == {name: stage.record for name, stage in SPINE.items()}
    assert run.sentence == json.loads(finished.stdout)["result"]
    with pytest.raises(UsageError, match="'clusters' is not a stage; the stages are scan, embed, cluster"):
        run["clusters"]


def test_clusters_leave_scan_and_embed_alone(finished: Finished, copy: Path) -> None:
    assert again(finished, copy, "curate", clusters=4) == ("cluster", "curate")
    assert attar.cluster(copy, quiet=True).count == 4, "a verb on the run goes on with its settings"


def test_a_missed_budget_redoes_compress_and_later_and_saves_the_best(finished: Finished, copy: Path) -> None:
    with pytest.raises(
        BudgetNotReached, match=r"budget 'macs<=0.001x' not reached: none of \d+ candidates meets it; macs<=0.001x binds"
    ) as caught:
        again(finished, copy, budget="macs<=0.001x", distil_steps=1)
    assert caught.value.exit_code == 3
    run = caught.value.run
    assert run.ran[0] == "compress"
    assert set(run.ran) <= {"compress", "evaluate", "export", "report"}
    assert run.ran[-1] == "report"
    assert not run["compress"].met
    assert "macs&lt;=0.001x" in run["report"].html, "the report says which budget was missed"
    assert attar.predict(copy, [str(finished.data / "discs")])[0]["cluster"] >= 0
    done = subprocess.run(attar_command("report", copy, "--json"), capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert done.stderr.startswith("attar: budget 'macs<=0.001x' not reached")
    assert json.loads(done.stdout)["state"] == "done"


def test_changed_data_redoes_what_its_contents_ask_for(photos: Path, tmp_path: Path) -> None:
    data, root = tmp_path / "photos", tmp_path / "run"
    shutil.copytree(photos, data)

    def ran() -> tuple[str, ...]:
        return attar.run(data, out=root, until="embed", quiet=True, self_steps=2, self_width=8, batch_size=16).ran

    assert ran() == ("scan", "embed")
    os.utime(data / "discs" / "000.png")
    assert ran() == ("scan",), "written again with the same content: read again, and found the same"
    shutil.copy(data / "discs" / "000.png", data / "discs" / "new.png")
    assert ran() == ("scan", "embed")
    (data / "discs" / "new.png").unlink()
    assert ran() == ("scan", "embed")
    assert ran() == ()


def kill_at(command: list[str], moment: Any) -> bool:
    """Starts a command and kills it with SIGKILL when `moment()`; whether it was still running."""
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while running.poll() is None and not moment() and time.monotonic() < deadline:
        time.sleep(0.01)
    running.kill()
    return running.wait() == -signal.SIGKILL


def assert_same(root: Path, reference: Path) -> None:
    for name in TABLES:
        assert (root / name).read_bytes() == (reference / name).read_bytes(), name
    for path in sorted(reference.rglob("*.safetensors")):
        weights, expected = load_file(root / path.relative_to(reference)), load_file(path)
        assert weights.keys() == expected.keys()
        for key, value in expected.items():
            assert np.allclose(weights[key], value, rtol=0, atol=1e-5), f"{path.relative_to(reference)}: {key}"


def command_of(finished: Finished, root: Path) -> list[str]:
    flags = [word for name, value in finished.settings.items() if name != "data" for word in (f"--{name.replace('_', '-')}", value)]
    return attar_command("run", finished.data, "--out", root, *flags, "--json")


@pytest.mark.slow
def test_a_kill_in_compress_then_the_same_command(finished: Finished, copy: Path) -> None:
    for name in ("compress", "evaluate", "export", "report"):
        (copy / "stages" / f"{name}.json").unlink()
    shutil.rmtree(copy / "candidates")
    command = command_of(finished, copy)
    assert kill_at(command, lambda: any(copy.glob(".partial/compress-*/*cut50-distilled-float32")))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stderr.splitlines() if line.startswith("compress: ")]
    kept = {line.split()[1] for line in rows if line.endswith("kept")}
    assert {"original", "cut50-int8"} <= kept, "candidates finished before the kill are not built again"
    assert_same(copy, finished.root)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.15, 0.3, 0.45, 0.6, 0.75])
def test_a_kill_anywhere_then_the_same_command(share: float, finished: Finished, tmp_path: Path) -> None:
    root = tmp_path / "run"
    seconds = sum(json.loads(path.read_text())["seconds"] for path in finished.root.glob("stages/*.json")) + 4
    start, command = time.monotonic(), command_of(finished, root)
    kill_at(command, lambda: time.monotonic() - start > share * seconds)
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert_same(root, finished.root)
