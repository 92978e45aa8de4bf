"""Three tiny stages with real records, and a process that is killed at any chosen file operation while it runs them.

As a script: `made_stages.py ROOT WORK START STEP` kills a run of ROOT at its file operation number 1, 1 + STEP, 1 + 2 STEP …
until one ends unharmed, and runs it again after each; START is a finished run folder to begin each time from, or "-".
Prints one JSON line per kill.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from attar import config
from attar.config import Config, build_config, options
from attar.formats import FORMATS, Format, shard_table
from attar.records import ITEM_SCHEMA, QUARANTINE_SCHEMA, SELECTION_SCHEMA, Items, Selection
from attar.workspace import Job, Stage, Workspace

SHARDS, ROWS = 3, 5
OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A record of as many files as it has texts."""

    texts: tuple[str, ...]


def _save_parts(folder: Path, parts: Parts) -> None:
    (folder / "parts").mkdir()
    for number, text in enumerate(parts.texts):
        (folder / "parts" / f"{number}.txt").write_text(text)


FORMATS[Parts] = Format(_save_parts, lambda folder: Parts(texts=tuple(path.read_text() for path in sorted(folder.glob("parts/*")))))


def settings(**given: Any) -> Config:
    return build_config({"data": "made", **given})


def stages(work: Path) -> dict[str, Stage]:
    """first → second → third; every piece of work done adds a line to the file `work`."""

    def done(name: str) -> None:
        with work.open("a") as stream:
            stream.write(name + "\n")

    def first(data: config.Data, job: Job) -> Items:
        def shard(number: int) -> pa.Table:
            done(f"first {number}")
            ids = np.arange(ROWS) + number * ROWS
            return shard_table(ids, job.rng("draw", number).random((ROWS, 2)).astype(np.float32))

        tables = [job.shard(number, lambda number=number: shard(number)) for number in range(SHARDS)]
        job.say(f"{SHARDS} shards")
        values = np.concatenate([table["vector"].combine_chunks().flatten().to_numpy().reshape(-1, 2) for table in tables])
        columns: dict[str, Any] = {field.name: pa.nulls(len(values), field.type) for field in ITEM_SCHEMA}
        columns |= {"id": pa.array(np.arange(len(values))), "frame_time": pa.array(values[:, 0].astype(np.float64))}
        columns |= {"split": pa.array(["test" if value < data.test_share else "train" for value in values[:, 1]])}
        return Items(root="made", table=pa.table(columns).cast(ITEM_SCHEMA), quarantine=QUARANTINE_SCHEMA.empty_table())

    def second(items: Items, curate: config.Curate, job: Job) -> Selection:
        def draw() -> list[float]:
            done("second")
            return job.rng("weight").random(len(items)).tolist()

        weight = np.asarray(job.once("weight.json", draw))
        folder = job.build("folder", lambda path: (path.mkdir(), (path / "half").write_text("a"), (path / "whole").write_text("b"))[0])
        assert (folder / "whole").read_text() == "b", "build left a folder half filled"
        columns: dict[str, Any] = {field.name: pa.nulls(len(items), field.type) for field in SELECTION_SCHEMA}
        keep = (weight < curate.keep_share) & (items.column("split") == "train")
        columns |= {"id": items.table["id"], "keep": pa.array(keep), "weight": pa.array(weight.astype(np.float32))}
        return Selection(table=pa.table(columns).cast(SELECTION_SCHEMA), thresholds={"share": curate.keep_share})

    def third(selection: Selection, augment: config.Augment, job: Job) -> Parts:
        done("third")
        kept = selection.column("id")[selection.column("keep")]
        return Parts(texts=tuple(f"{number} {augment.strength} {kept}" for number in range(int(10 * selection.thresholds["share"]))))

    return {
        "first": Stage(make=first, record=Items, settings=("data",)),
        "second": Stage(make=second, record=Selection, needs=("first",), settings=("curate",)),
        "third": Stage(make=third, record=Parts, needs=("second",), settings=("augment",)),
    }


def run(root: Path, work: Path, until: str = "third", **given: Any) -> list[str]:
    """Runs the made stages; the names of those that did work."""
    made = stages(work)
    with Workspace(root, made) as space:
        space.claim("made", {})
        for name in list(made)[: list(made).index(until) + 1]:
            space.run(name, settings(**given), quiet=True)
    return space.ran


def tables(root: Path) -> dict[str, str]:
    """SHA-256 of every file of a run folder outside its bookkeeping."""
    skipped = {"run.json", "settings.json", ".lock"}
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.name not in skipped]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.parent.name != "stages"}


def _kill_at(number: int, root: str) -> None:
    """From now on this process kills itself just before its file operation of that number inside root."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in OPERATIONS and str(arguments[0]).startswith(root):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _in_child(task: Any) -> int:
    """The signal that ended a child process which ran a task, 0 for none; another exit status than 0 raises."""
    child = os.fork()
    if not child:
        status = 1
        try:
            task()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the made stages failed")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def kill_everywhere(root: Path, work: Path, start: Path | None, step: int) -> None:
    options()  # read once here, not in every child
    for number in range(1, 1000, step):
        for path in (root, work):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        if start:
            shutil.copytree(start, root)

        def doomed(number: int = number) -> None:
            _kill_at(number, str(root))
            run(root, work, keep_share=0.5, test_share=0.2)

        ended = _in_child(doomed)
        _in_child(lambda: run(root, work, keep_share=0.5, test_share=0.2))
        done = work.read_text().splitlines()
        left = sorted(path.name for path in (root / ".partial").glob("*")) + sorted(path.name for path in root.glob("stages/*.moving"))
        print(json.dumps({"kill": number, "signal": ended, "tables": tables(root), "work": done, "left": left}))
        if not ended:
            return
    raise RuntimeError("the run never ended")


if __name__ == "__main__":
    kill_everywhere(Path(sys.argv[1]), Path(sys.argv[2]), None if sys.argv[3] == "-" else Path(sys.argv[3]), int(sys.argv[4]))
