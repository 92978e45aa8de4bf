"""The command line: exit codes, stdout for data, stderr for people, and no traceback whatever is typed."""

from __future__ import annotations

import csv
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import Finished, attar_command, contents

import attar
from attar.cli import main
from attar.config import template
from attar.stages import STAGES

ROOT = Path(__file__).parents[1]


class Said:
    """What a command returned and wrote."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> Said:
        try:
            code = main(list(map(str, words)))
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        return Said(code, *capsys.readouterr())

    return call


def strictly(text: str) -> Any:
    """JSON as the standard has it: no NaN, no Infinity."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_json_of_a_run_is_all_of_stdout(finished: Finished) -> None:
    body = strictly(finished.stdout)
    assert Path(body["report"]).is_file()
    assert Path(body["model"], "student.onnx").is_file()
    assert body["stages_run"] == list(STAGES)
    assert body["budget_met"] is True
    assert "smaller" in body["result"] or "model" in body["result"]
    assert {figure["name"] for figure in body["figures"]} >= {"agreement", "size", "latency"} or body["figures"]
    assert "scan: 60 images read" in finished.stderr, "progress and notes are for people"
    assert "Traceback" not in finished.stderr


def test_the_same_again_does_nothing_and_says_the_same(cli: Any, finished: Finished) -> None:
    said = cli("report", finished.root)
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("report: done, ")


def test_quiet_silences_stderr(cli: Any, photos: Path) -> None:
    said = cli("scan", "run", "--data", photos, "--quiet", "--json")
    assert (said.code, said.err) == (0, "")
    assert strictly(said.out)["state"] == "done"
    assert "scan: 60 images read" in cli("scan", "run", "--seed", "1").err


def test_status(cli: Any, photos: Path, finished: Finished) -> None:
    body = strictly(cli("status", finished.root, "--json").out)
    assert [row["state"] for row in body["stages"]] == ["done"] * len(STAGES)
    assert body["result"] in cli("status", finished.root).out
    cli("scan", "run", "--data", photos)
    lines = cli("status", "run").out.splitlines()
    assert lines[0] == f"run: a run of {photos}"
    assert [line.split()[:2] for line in lines[1:3]] == [["scan", "done"], ["embed", "not"]]


def test_a_run_gets_names_tables_and_links_by_the_command_line(
    finished: Finished, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished.root, root)
    before = contents(finished.data)

    def command(*words: object) -> str:
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().out

    assert json.loads(command("name", root, 1, "blue / discs", "--json")) == {"1": "blue / discs"}
    assert "blue / discs" in (root / "report.html").read_text()
    rows = json.loads(command("clusters", root, "--links", tmp_path / "sorted", "--table", tmp_path / "table.csv", "--json"))["clusters"]
    assert rows[1]["name"] == "blue / discs"
    clusters, items = attar.cluster(root, quiet=True), attar.scan(root, quiet=True)
    paths, own = items.column("path"), clusters.column("cluster")
    with (tmp_path / "table.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [line["path"] for line in lines] == paths.tolist()
    assert [int(line["cluster"]) for line in lines] == own.tolist()
    assert {line["name"] for line in lines if line["cluster"] == "1"} == {"blue / discs"}
    links = sorted((tmp_path / "sorted").glob("*/*"))
    assert len(links) == len(items)
    assert all(link.is_symlink() for link in links)
    inside = [link for link in links if link.parent.name == "1 blue _ discs"]
    assert {os.readlink(link) for link in inside} == {str(finished.data / path) for path in paths[own == 1]}
    nearest = clusters.column("distance")[own == 1].argmin()
    assert os.readlink(inside[0]) == str(finished.data / paths[own == 1][nearest])
    assert contents(finished.data) == before
    answers = attar.predict(root, [str(finished.data / path) for path in paths])
    assert {row["cluster_name"] for row in answers if row["cluster"] == 1} <= {"blue / discs"}
    assert {row["cluster_name"] for row in answers if row["cluster"] != 1} <= {f"cluster {number}" for number in range(clusters.count)}
    assert all(row["state"] == "done" for row in attar.status(root)["stages"])


def test_a_run_goes_on_from_any_folder(cli: Any, photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "mine")
    assert cli("scan", "run", "--data", "mine").code == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli("scan", tmp_path / "run").err == "", "nothing to do"
    monkeypatch.chdir(tmp_path)
    assert cli("scan", "run", "--data", "./mine/").err == "", "the same data by another name"


def test_predict(cli: Any, finished: Finished) -> None:
    rows = strictly(cli("predict", finished.root / "model", finished.data / "discs", finished.data / "broken.png", "--json").out)
    assert len(rows) == 21
    assert all({"path", "cluster", "cluster_probability"} <= row.keys() for row in rows[:-1])
    assert rows[-1].keys() == {"path", "error"}
    lines = cli("predict", finished.root, finished.data / "discs").out.splitlines()
    assert len(lines) == 20
    assert re.match(r"path=\S+discs/000.png\tcluster=\d+\t", lines[0])


def test_init(cli: Any) -> None:
    assert cli("init").out == "wrote attar.toml\n"
    assert Path("attar.toml").read_text() == template()
    said = cli("init")
    assert said.code == 2
    assert "exists already and is left as it is" in said.err
    assert strictly(cli("init", "other.toml", "--json").out) == {"path": "other.toml"}


def test_a_settings_file_in_this_folder_is_used_and_named(cli: Any, photos: Path) -> None:
    Path("attar.toml").write_text(f'[data]\ndata = "{photos}"\n')
    said = cli("scan", "run")
    assert said.code == 0
    assert "attar: settings from attar.toml" in said.err


SILLY = {
    "nothing": ((), 2, "usage"),
    "unknown verb": (("fly", "photos"), 2, "invalid choice"),
    "no data": (("run",), 2, "data: nothing to read; name a folder"),
    "empty data": (("run", ""), 2, "data: nothing to read"),
    "missing data": (("run", "missing"), 1, "missing"),
    "empty folder": (("run", "empty"), 1, "empty"),
    "data is an empty file": (("run", "file"), 1, "file"),
    "data is a device": (("run", "/dev/null"), 1, "/dev/null"),
    "data is very long": (("run", "x" * 5000), 1, "xxx"),
    "glob of nothing": (("run", "empty/**/*.png"), 1, "empty/**/*.png"),
    "bad archive": (("run", "bad.tar"), 1, "bad.tar"),
    "bad parquet": (("run", "bad.parquet"), 1, "bad.parquet"),
    "unknown flag": (("run", "photos", "--clutsers", "3"), 2, "--clutsers"),
    "flag without value": (("run", "photos", "--clusters"), 2, "expected one argument"),
    "not a number": (("run", "photos", "--clusters", "many"), 2, "clusters: 'many'; expected a whole number"),
    "out of range": (("run", "photos", "--keep-share", "7"), 2, "keep_share: 7.0; expected above 0, at most 1"),
    "nan": (("run", "photos", "--minutes", "nan"), 2, "minutes: 'nan'; expected a number"),
    "unknown source": (("run", "photos", "--model", "resnet50"), 2, "model: 'resnet50' is not a known source; expected"),
    "missing builder": (("run", "photos", "--model", "net.py:build"), 1, "net.py"),
    "negative size": (("scan", "run", "--data", "photos", "--max-megapixels", "-1"), 2, "must be above 0"),
    "bad budget": (("run", "photos", "--budget", "small"), 2, "budget: cannot read 'small'"),
    "missing config": (("run", "photos", "--config", "no.toml"), 2, "no.toml: cannot be read"),
    "config is a folder": (("run", "photos", "--config", "empty"), 2, "empty: cannot be read"),
    "out is a file": (("run", "photos", "--out", "file"), 1, "file: is a file, not a run folder"),
    "out below a file": (("run", "photos", "--out", "file/run"), 1, "choose a folder you can write to with --out"),
    "out is not ours": (("run", "photos", "--out", "full"), 1, "is not empty and not a run of attar; nothing was touched"),
    "out is very long": (("run", "photos", "--out", "x" * 5000), 1, "choose a folder you can write to with --out"),
    "stage of no run": (
        ("embed", "missing"),
        2,
        "is not a run folder (no settings.json); name an existing one, or what to read with --data",
    ),
    "stage of a file": (("report", "file"), 2, "is not a run folder"),
    "status of no run": (("status", "missing"), 1, "missing: is not a run folder of attar"),
    "status of nothing": (("status", ""), 1, "is not a run folder of attar"),
    "predict by nothing": (("predict", "missing", "file"), 2, "missing: no such file or folder; expected a run folder"),
    "predict by an unfinished run": (("predict", "empty", "file"), 2, "holds no student.onnx"),
    "predict by rubbish": (("predict", "file", "file"), 1, "file"),
    "predict without files": (("predict", "empty"), 2, "FILE"),
    "init nowhere": (("init", "no/such/folder.toml"), 2, "cannot be written"),
    "init a folder": (("init", "empty"), 2, "exists already"),
}


@pytest.mark.parametrize("name", SILLY)
def test_whatever_is_typed_gets_a_message_and_an_exit_code(name: str, cli: Any, photos: Path) -> None:
    words, code, text = SILLY[name]
    for folder in ("empty", "full"):
        Path(folder).mkdir()
    for file in ("file", "full/mine", "bad.tar", "bad.parquet"):
        Path(file).write_text("x" if "." in file or "/" in file else "")
    Path("photos").symlink_to(photos)
    said = cli(*words)
    assert said.code == code, said.err
    assert text in said.err
    assert said.out == "", "stdout is data only"
    assert "Traceback" not in said.err
    assert sorted(path.name for path in Path("full").iterdir()) == ["mine"]


@pytest.mark.parametrize("threads", ["0", "-1", "1000000000"])
def test_silly_threads_of_predict(threads: str, cli: Any, finished: Finished) -> None:
    said = cli("predict", finished.root, finished.data / "discs", "--threads", threads)
    assert said.code == 2
    assert f"threads: {threads}; expected 1 to 256" in said.err


def test_silly_files_of_predict(cli: Any, finished: Finished) -> None:
    said = cli("predict", finished.root, "missing.jpg", "", "/dev/null", "x" * 5000, "--json")
    rows = strictly(said.out)
    assert len(rows) == 4
    assert all(row["error"] for row in rows)


@pytest.mark.parametrize("files", [1, 60], ids=["little is written", "much is written"])
def test_a_closed_stdout_is_not_a_failure(files: int, finished: Finished) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    words = ["predict", finished.root, *sorted(finished.data.rglob("0*.png"))[:files], "--json"]
    done = subprocess.run(attar_command(*words), stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_then_the_same_command(photos: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    command = attar_command("embed", root, "--data", photos, "--self-steps", "60", "--self-width", "16", "--batch-size", "32")
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a suite that runs in the background inherits a deaf ear
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    deadline = time.monotonic() + 60
    while not any(root.glob(".partial/embed-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=30)
    assert running.returncode == 130, err
    assert out == ""
    assert "attar: interrupted; nothing is lost: the same command resumes where this one stopped" in err
    assert "Traceback" not in err
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "images read" not in again.stderr, "scan was finished and is not done again"


def test_the_generated_pages_are_fresh() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", [[], ["run"], ["predict"], ["status"], ["init"], ["augment", "search"], *([stage] for stage in STAGES)])
def test_help_of_every_verb(verb: list[str], cli: Any) -> None:
    said = cli(*verb, "--help")
    assert (said.code, said.err) == (0, "")
    assert "usage: attar" in said.out


BUILDER = """
import torch
from torch import nn
MEAN, STD = (0.5,), (0.25,)
CLASSES = ("ant", "bee", "cat")
def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
"""


def test_compress_without_a_run_gives_the_model_and_its_certificate(cli: Any, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(BUILDER)
    words = ("compress", "--model", "net.py:small", "--data", photos, "--budget", "macs<=0.8x", "--distil-steps", 4, "--input-size", 32)
    said = cli(*words)
    assert said.code == 0, said.err
    sentence, certificate, model = said.out.splitlines()
    assert "in the worst cluster on" in sentence
    assert certificate.startswith("Certificate: same top-1 class as the original on ")
    assert model == f"Model: {Path('attar-runs', photos.name, 'model', 'student.onnx')}"
    assert Path(model.removeprefix("Model: ")).is_file()
    assert not Path("attar-runs", photos.name, "report.html").exists()
    table = [
        line.removeprefix("compress: ") for line in said.err.splitlines() if re.match(r"compress: (candidate|original|cut|whole)", line)
    ]
    assert table[0].split() == ["candidate", "size", "MACs", "latency", "agreement"]
    assert len({len(line) for line in table}) == 1, "the live table is aligned"
    missed = cli(*words[:5], "--budget", "size<=1KB", *words[7:], "--json", "--quiet")
    assert missed.code == 3
    assert "budget 'size<=1KB' not reached" in missed.err
    body = strictly(missed.out)
    assert body["budget_met"] is False
    assert "size<=1000 binds: the nearest, " in body["reason"]
    assert Path(body["model"], "student.onnx").is_file(), "the best found is saved"
    assert {row["cluster"] for row in body["per_cluster"]}
    assert all(one["size_ratio"] > 0 for one in body["candidates"])


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("compress",), "data: nothing to read"),
        (("compress", "RUN", "--out", "other"), "out: other: RUN (RUN) is the folder already; give one of the two"),
        (("compress", "--data", ".", "--model", "a.onnx", "--student", "b.onnx"), "a.onnx: no such file"),
        (("compress", "--data", ".", "--student", "a cat"), "'a cat' is not a known source"),
    ],
)
def test_a_compress_that_cannot_be_begun_says_why(cli: Any, photos: Path, words: tuple[str, ...], text: str) -> None:
    said = cli(*(str(photos) if word == "." else word for word in words), "--quiet")
    assert said.code in (1, 2)
    assert text in said.err
    assert "Traceback" not in said.err
