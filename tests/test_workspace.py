"""The run folder: what is skipped, what is redone, and that nothing is lost to a kill, a full disk or a second process."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import made_stages
import numpy as np
import pyarrow as pa
import pytest
from made_stages import SHARDS, run, tables

from attar.errors import UsageError, WorkspaceError
from attar.workspace import Bar, Job, Workspace

ALL = ["first", "second", "third"]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(made_stages.config.__file__).parents[1])])}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The path of a run folder that is not there yet."""
    return tmp_path / "run"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The file the made stages list their work in."""
    return tmp_path / "work"


def script(text: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs Python text in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)


def times(root: Path) -> dict[str, int]:
    return {
        str(path): path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file() and path.name not in ("run.json", "settings.json")
    }


def test_nothing_changed_nothing_done(root: Path, work: Path) -> None:
    assert run(root, work) == ALL
    before = times(root)
    assert run(root, work) == []
    assert {path: time for path, time in times(root).items() if not path.endswith(".lock")} == {
        path: time for path, time in before.items() if not path.endswith(".lock")
    }


@pytest.mark.parametrize(
    ("given", "redone"),
    [
        ({"strength": 0.3}, ["third"]),
        ({"keep_share": 0.5}, ["second", "third"]),
        ({"test_share": 0.5}, ALL),
        ({"seed": 1}, ALL),
        ({"workers": 1}, []),
        ({"clusters": 5}, []),
    ],
)
def test_a_changed_setting_redoes_only_what_depends_on_it(given: dict[str, float], redone: list[str], root: Path, work: Path) -> None:
    run(root, work)
    assert run(root, work, **given) == redone
    assert run(root, work, **given) == []


def test_a_stage_made_again_alike_does_not_disturb_those_after_it(root: Path, work: Path) -> None:
    run(root, work, test_share=0.5)
    assert run(root, work, test_share=0.5, max_megapixels=50) == ["first"], "the made stage ignores max_megapixels: its result is the same"


def test_results_do_not_depend_on_the_folder(tmp_path: Path, work: Path) -> None:
    run(tmp_path / "a", work)
    run(tmp_path / "b" / "deep", work)
    assert tables(tmp_path / "a") == tables(tmp_path / "b" / "deep")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_text(""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "binary": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "other": lambda path: path.write_text("[1, 2]"),
    "poor": lambda path: path.write_text("{}"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_manifest_means_the_stage_is_made_again(damage: str, root: Path, work: Path) -> None:
    run(root, work)
    before = tables(root)
    DAMAGE[damage](root / "stages" / "second.json")
    assert run(root, work) == ["second"], "the stages after it are not disturbed by an equal result"
    assert tables(root) == before


@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
@pytest.mark.parametrize("file", ["items.parquet", "selection.json", "parts/0.txt"])
def test_a_damaged_result_means_the_stage_is_made_again(damage: str, file: str, root: Path, work: Path) -> None:
    run(root, work)
    before = tables(root)
    DAMAGE[damage](root / file)
    made = run(root, work)
    assert len(made) == 1
    assert tables(root) == before


def test_fewer_files_than_before_leave_none_behind(root: Path, work: Path) -> None:
    run(root, work, keep_share=1.0)
    run(root, work, keep_share=0.3)
    assert sorted(path.name for path in (root / "parts").iterdir()) == ["0.txt", "1.txt", "2.txt"]


def test_a_load_before_its_time_says_what_to_run(root: Path, work: Path) -> None:
    run(root, work, until="second")
    with pytest.raises(WorkspaceError, match=r"the stage third is not finished here; run: attar third"):
        Workspace(root, made_stages.stages(work)).load("third")


def test_an_interrupted_stage_goes_on_from_its_last_shard(root: Path, work: Path) -> None:
    stages = made_stages.stages(work)
    first = stages["first"]

    def stumble(data: object, job: Job) -> object:
        shard, calls = job.shard, iter(range(SHARDS))

        def until_the_last(number: int, make: Callable[[], pa.Table]) -> pa.Table:
            if next(calls) == SHARDS - 1:
                raise KeyboardInterrupt
            return shard(number, make)

        job.shard = until_the_last  # type: ignore[method-assign]
        return first.make(data, job)

    with Workspace(root, stages | {"first": dataclasses.replace(first, make=stumble)}) as space:
        space.claim("made", {})
        with pytest.raises(KeyboardInterrupt):
            space.run("first", made_stages.settings(), quiet=True)
    assert work.read_text().splitlines() == [f"first {number}" for number in range(SHARDS - 1)]
    run(root, work)
    assert work.read_text().splitlines() == [*(f"first {number}" for number in range(SHARDS)), "second", "third"]
    assert not list((root / ".partial").iterdir())


def test_half_done_work_for_other_settings_is_not_used(root: Path, work: Path, tmp_path: Path) -> None:
    stages = made_stages.stages(work)

    def stumble(data: object, job: Job) -> object:
        stages["first"].make(data, job)
        raise KeyboardInterrupt

    with Workspace(root, stages | {"first": dataclasses.replace(stages["first"], make=stumble)}) as space:
        space.claim("made", {})
        with pytest.raises(KeyboardInterrupt):
            space.run("first", made_stages.settings(seed=1), quiet=True)
    run(root, work, seed=2)
    run(tmp_path / "clean", work, seed=2)
    assert tables(root) == tables(tmp_path / "clean")


def test_notes_and_seconds_survive_with_the_stage(root: Path, work: Path) -> None:
    run(root, work)
    manifest = json.loads((root / "stages" / "first.json").read_text())
    assert manifest["notes"] == [f"{SHARDS} shards"]
    assert manifest["seconds"] >= 0


def killed(tmp_path: Path, start: Path | None, step: int) -> list[dict]:
    command = [sys.executable, made_stages.__file__, tmp_path / "run", tmp_path / "work", start or "-", step]
    done = subprocess.run(list(map(str, command)), env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check_kills(rows: list[dict], expected: dict[str, str]) -> None:
    assert [row["signal"] for row in rows] == [9] * (len(rows) - 1) + [0]
    for row in rows:
        assert row["tables"] == expected, f"killed at file operation {row['kill']}"
        assert row["left"] == [], f"killed at file operation {row['kill']}"
        whole = {*(f"first {number}" for number in range(SHARDS)), "second", "third"}
        # A kill can take the unit of work in flight; `third` keeps nothing, so a kill in its publishing takes it as well.
        assert set(row["work"]) == whole
        assert len(row["work"]) <= len(whole) + 1, f"killed at file operation {row['kill']}: more than one unit of work was lost"


@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_at_any_file_operation_then_the_same_again(step: int, tmp_path: Path, work: Path) -> None:
    run(tmp_path / "whole", tmp_path / "log", keep_share=0.5, test_share=0.2)
    check_kills(killed(tmp_path, None, step), tables(tmp_path / "whole"))


@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_kill_while_replacing_an_earlier_result(step: int, tmp_path: Path, work: Path) -> None:
    run(tmp_path / "whole", tmp_path / "log", keep_share=0.5, test_share=0.2)
    run(tmp_path / "start", tmp_path / "log", keep_share=0.9, test_share=0.5)
    check_kills(killed(tmp_path, tmp_path / "start", step), tables(tmp_path / "whole"))


def test_a_kill_while_publishing_then_other_settings_leaves_no_stray_file(tmp_path: Path, work: Path) -> None:
    root = tmp_path / "run"
    run(root, work, keep_share=0.2)
    killer = """
        import os, signal, sys
        from pathlib import Path
        import made_stages
        replace = os.replace
        def hook(source, target):
            if str(target).endswith("parts/7.txt"):
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)
        os.replace = hook
        made_stages.run(Path(sys.argv[1]), Path(sys.argv[2]), keep_share=0.9)
    """
    assert script(killer, root, work).returncode == -9
    assert (root / "parts" / "6.txt").exists()
    run(root, work, keep_share=0.3)
    assert sorted(path.name for path in (root / "parts").iterdir()) == ["0.txt", "1.txt", "2.txt"]


def test_a_second_process_is_refused(root: Path, work: Path) -> None:
    with Workspace(root, made_stages.stages(work)):
        second = script(
            "import sys, made_stages; from pathlib import Path; made_stages.run(Path(sys.argv[1]), Path(sys.argv[2]))", root, work
        )
    assert second.returncode == 1
    assert f"{root}: another attar is working in this run folder; wait for it, or choose another with --out" in second.stderr
    assert run(root, work) == ALL, "the lock is gone with the process that held it"


def test_a_folder_that_is_not_ours_is_refused_and_left_alone(root: Path, work: Path) -> None:
    root.mkdir()
    (root / "thesis.doc").write_text("years of work")
    with pytest.raises(WorkspaceError, match="is not empty and not a run of attar; nothing was touched; choose another folder with --out"):
        run(root, work)
    assert [path.name for path in root.iterdir()] == ["thesis.doc"]


def test_an_empty_folder_is_taken(root: Path, work: Path) -> None:
    root.mkdir()
    assert run(root, work) == ALL


def test_a_file_in_place_of_the_folder_is_refused(root: Path, work: Path) -> None:
    root.write_text("mine")
    with pytest.raises(WorkspaceError, match="is a file, not a run folder; choose another name with --out"):
        run(root, work)
    assert root.read_text() == "mine"


def test_the_run_of_other_data_is_refused(root: Path, work: Path) -> None:
    run(root, work)
    before = tables(root)
    with (
        Workspace(root, made_stages.stages(work)) as space,
        pytest.raises(UsageError, match="is a run of made, not of cats; choose another"),
    ):
        space.claim("cats", {})
    assert tables(root) == before


def test_a_mistyped_name_of_the_data_does_not_take_the_folder(root: Path, work: Path) -> None:
    with Workspace(root, made_stages.stages(work)) as space:
        space.claim("mdae", {})
    assert run(root, work) == ALL


@pytest.mark.parametrize("text", ["", "{}", "[]", "\udcff"])
def test_a_damaged_mark_is_refused(text: str, root: Path, work: Path) -> None:
    run(root, work)
    (root / "run.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(WorkspaceError, match=r"run.json: is damaged"):
        run(root, work)


@pytest.mark.parametrize("where", ["file/run", "/proc/attar", "x" * 300])
def test_a_folder_that_cannot_be_written_is_named(where: str, tmp_path: Path, work: Path) -> None:
    (tmp_path / "file").write_text("")
    root = tmp_path / where
    if not root.parent.exists():
        pytest.skip("no /proc here")
    with pytest.raises(WorkspaceError) as caught:
        run(root, work)
    assert str(root) in str(caught.value)
    assert "choose a folder you can write to with --out" in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write_is_named(tmp_path: Path, work: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(WorkspaceError, match="choose a folder you can write to with --out"):
        run(tmp_path / "closed" / "run", work)


FULL = """
    import resource, sys
    from pathlib import Path
    import made_stages
    from attar.errors import WorkspaceError
    limit = int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        made_stages.run(Path(sys.argv[1]), Path(sys.argv[2]))
    except WorkspaceError as error:
        print(error)
"""


@pytest.mark.parametrize("limit", [10, 60, 500, 900, 1500])
def test_a_full_disk_is_named_and_the_run_resumes(limit: int, root: Path, work: Path, tmp_path: Path) -> None:
    done = script(FULL, root, work, limit)
    assert done.returncode == 0, done.stderr
    assert str(root) in done.stdout
    assert "File too large" in done.stdout
    assert "free some space, then run the same command: it resumes" in done.stdout
    run(root, work)
    run(tmp_path / "whole", tmp_path / "log")
    assert tables(root) == tables(tmp_path / "whole")


WEIGHTS = """
    import resource, sys, torch
    from pathlib import Path
    from attar.errors import WorkspaceError
    from attar.workspace import Job
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    try:
        Job("stage", Path(sys.argv[1])).remember("checkpoint.pt", {"weight": torch.zeros(10000)})
    except WorkspaceError as error:
        print(error)
"""


def test_a_disk_that_fills_under_a_checkpoint_is_named(root: Path) -> None:
    done = script(WEIGHTS, root)
    assert done.returncode == 0, done.stderr
    assert str(root) in done.stdout
    assert "free some space, then run the same command: it resumes" in done.stdout
    assert not (root / "checkpoint.pt").exists(), "half a checkpoint must not be taken for a whole one"


def test_a_real_full_file_system_is_named(tmp_path: Path, work: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "none", disk], capture_output=True).returncode == 0
    )
    if not mounted:
        pytest.skip("mounting is not permitted here")
    try:
        (disk / "filler").write_bytes(b"0" * 16_000)
        with pytest.raises(WorkspaceError, match=r"No space left on device.*free some space, then run the same command"):
            run(disk / "run", work)
        (disk / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,size=8M", disk], check=True)
        run(disk / "run", work)
        run(tmp_path / "whole", tmp_path / "log")
        assert tables(disk / "run") == tables(tmp_path / "whole")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_randomness_depends_on_seed_stage_and_purpose_only(tmp_path: Path) -> None:
    def draw(name: str = "embed", seed: int = 0, *purpose: object, folder: str = "a", workers: int = 1) -> float:
        return Job(name, tmp_path / folder, seed=seed, workers=workers).rng(*purpose).random()

    reference = draw("embed", 0, "view", 3)
    assert draw("embed", 0, "view", 3, folder="b", workers=9) == reference
    others = [
        draw("train", 0, "view", 3),
        draw("embed", 1, "view", 3),
        draw("embed", 0, "view", 4),
        draw("embed", 0, "batch", 3),
        draw("embed", 0),
    ]
    assert len({reference, *others}) == 1 + len(others)


def test_randomness_is_the_same_in_another_process(tmp_path: Path) -> None:
    text = "import sys; from pathlib import Path; from attar.workspace import Job; print(Job('s', Path('x'), seed=7).rng('a', 1).random())"
    assert float(script(text).stdout) == Job("s", tmp_path, seed=7).rng("a", 1).random()


@pytest.mark.parametrize("name", ["kept.json", "kept.parquet", "kept.pt"])
def test_what_is_remembered_is_recalled_by_another_job(name: str, tmp_path: Path) -> None:
    import torch

    value = {"kept.json": [1, "é"], "kept.parquet": pa.table({"a": [1, 2]}), "kept.pt": {"a": torch.arange(3)}}[name]
    made: list[int] = []
    for _ in range(2):
        kept = Job("stage", tmp_path / "scratch").once(name, lambda: made.append(1) or value)
        same = torch.equal(kept["a"], value["a"]) if name.endswith(".pt") else kept == value
        assert same
    assert made == [1]


def test_numpy_values_are_kept_as_plain_json(tmp_path: Path) -> None:
    kept = Job("stage", tmp_path / "scratch").once("a.json", lambda: {"n": np.int64(3), "v": np.arange(2), "p": Path("x")})
    assert kept == {"n": 3, "v": [0, 1], "p": "x"}


def test_a_folder_is_built_whole_or_not_at_all(tmp_path: Path) -> None:
    job = Job("stage", tmp_path / "scratch")

    def half(path: Path) -> None:
        path.mkdir()
        (path / "a").write_text("1")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.build("folder", half)
    assert not (tmp_path / "scratch" / "folder").exists()
    assert job.build("folder", lambda path: path.mkdir()).is_dir()
    assert list((tmp_path / "scratch" / "folder").iterdir()) == [], "nothing of the half-built folder is left"


def test_notes_are_said_once_and_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = Job("stage", tmp_path / "scratch")
    job.say("once")
    job.say("once")
    assert Job("stage", tmp_path / "scratch").notes == ["once"]
    said = capsys.readouterr()
    assert (said.out, said.err.count("stage: once")) == ("", 1)


def test_a_bar_that_was_interrupted_in_its_making_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """As Ctrl-C leaves it: an object without fields, about to be collected."""
    bar = Bar.__new__(Bar)
    for field in list(vars(bar)):
        delattr(bar, field)
    bar.__del__()
    assert capsys.readouterr().err == ""
