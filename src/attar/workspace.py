"""The run folder: what is finished, what is half done, and what each result was made from.

    RUN/run.json            what this folder is a run of; its presence makes the folder attar's
    RUN/settings.json       the settings of the last command, for the verbs that continue a run
    RUN/stages/NAME.json    manifest of a finished stage: key (hash of its inputs and settings), outputs, seconds, notes
    RUN/.cache/NAME/        what a stage needs to know of its result to use parts of it again when items are added
    RUN/.partial/NAME-KEY/  half-done work of a stage: shards, checkpoints, candidates; removed when the stage is finished

A stage is skipped when its key is the one in its manifest and its files are there. A key covers the contents of the
records it reads, so a stage that was made again with the same result does not disturb those after it. Every file is
written under a temporary name and renamed, so that a kill at any moment leaves either the old or the new one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import functools
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from attar import __version__, formats
from attar.errors import UsageError, WorkspaceError
from attar.records import Page
from attar.scale import engine_of
from attar.scale.local import Engine, Local, Work
from attar.stages import STAGES

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}


@contextlib.contextmanager
def _disk(path: Path, refusals: set[int] = DISK_ERRORS) -> Iterator[None]:
    """Turns the operating system's refusals to write into an error that names the folder and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in refusals and Path(error.filename or path).is_relative_to(path):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            remedy = "free some space, then run the same command: it resumes" if full else "choose a folder you can write to with --out"
            raise WorkspaceError(f"{error.filename or path}: cannot write the run folder ({error.strerror}); {remedy}") from error
        raise


class Bar(tqdm):
    """A progress bar that Ctrl-C may meet half-way through its construction."""

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # fields that were not set yet
            super().__del__()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _same(table: pa.Table) -> pa.Table:
    return table


def _read(path: Path) -> Any:
    """What a file of half-done work holds, by its suffix."""
    if path.suffix == ".json":
        return formats.read_json(path)
    if path.suffix == ".parquet":
        return pq.read_table(path)
    import torch

    return torch.load(path, weights_only=True)


class Job:
    """What a stage gets besides records and settings: randomness, progress, and a place to keep half-done work."""

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        seed: int = 0,
        workers: int = 2,
        quiet: bool = False,
        tensorboard: str = "",
        engine: Engine | None = None,
    ) -> None:
        self.name, self.folder, self.seed, self.workers, self.quiet = name, folder, seed, workers, quiet
        self.engine = engine or Local(workers)
        """What makes shards, here or on other machines."""
        self.tensorboard = tensorboard
        """Where training curves are shown as they are drawn; empty for nowhere."""
        self.history: list[dict[str, Any]] = []
        """Stage, seconds and notes of the stages this one needs."""
        self.cache: Path | None = None
        """Beginning of the names of what is kept beside this stage's result; None outside a run folder."""
        self.cache_before: Path | None = None
        """The same of the result that is in the run folder."""
        self.before: Callable[[], Any] = lambda: None
        """The record of this stage that is in the run folder, of other inputs or settings; None where there is none."""
        self.notes: list[str] = []
        self.notes = (self.recall("notes.json") if folder.exists() else None) or self.notes

    def rng(self, *purpose: Any) -> np.random.Generator:
        """A generator that depends on the seed, the stage and the purpose only, so that a resumed stage draws the same numbers."""
        return np.random.default_rng([self.seed, zlib.crc32(self.name.encode()), zlib.crc32(repr(purpose).encode())])

    def progress(self, total: int, label: str, unit: str = "items", done: int = 0) -> Bar:
        """A bar on stderr with rate and remaining time; appears after two seconds, never in quiet mode."""
        slow = 0.2 if sys.stderr.isatty() else 10.0
        return Bar(
            total=total,
            desc=f"{self.name}: {label}",
            unit=f" {unit}",
            initial=done,
            delay=2,
            disable=self.quiet,
            mininterval=slow,
            dynamic_ncols=True,
            file=sys.stderr,
        )

    def say(self, text: str) -> None:
        """Tells the person something worth knowing, once; kept with the stage and shown in the report."""
        if text in self.notes:
            return
        self.notes.append(text)
        self.remember("notes.json", self.notes)
        if not self.quiet:
            tqdm.write(f"{self.name}: {text}", file=sys.stderr)

    def remember(self, name: str, value: Any) -> None:
        """Keeps half-done work under a name ending in .json, .parquet (a table) or .pt (tensors, numbers, containers of them)."""
        with _disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = self.folder / f".{name}.tmp"
            if name.endswith(".json"):
                formats.write_json(temporary, value)
            elif name.endswith(".parquet"):
                formats.write_table(temporary, value)
            else:
                import torch

                memory = io.BytesIO()  # torch hides a full disk in an error of its own
                torch.save(value, memory)
                temporary.write_bytes(memory.getbuffer())
            os.replace(temporary, self.folder / name)

    def recall(self, name: str) -> Any:
        """What was kept under a name by this stage, with these inputs and settings, before it was interrupted; else None.

        A damaged file counts as none, and that is said.
        """
        path = self.folder / name
        if not path.exists():
            return None
        try:
            return _read(path)
        except (ValueError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:  # pa.ArrowInvalid is a ValueError
            if isinstance(error, OSError) and error.errno:
                raise  # the operating system's refusal, not the file's contents
            path.unlink()
            why = str(error).partition("\n")[0][:100] or type(error).__name__
            self.say(f"{name}, kept from before, was damaged ({why}): it is made again")
            return None

    def keep(self, name: str, table: pa.Table) -> None:
        """Keeps a table beside the stage's result, for the next time it is made; see `kept`."""
        if self.cache is not None:
            with _disk(self.cache.parent.parent):
                self.cache.parent.mkdir(parents=True, exist_ok=True)
                temporary = self.cache.parent / f".{name}.tmp"
                formats.write_table(temporary, table)
                os.replace(temporary, self.cache.with_name(f"{self.cache.name}-{name}"))

    def kept(self, name: str) -> pa.Table | None:
        """What the stage kept when it was last finished, with other inputs or settings; None where there is nothing."""
        path = self.cache_before and self.cache_before.with_name(f"{self.cache_before.name}-{name}")
        return pq.read_table(path) if path and path.exists() else None

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The kept value of that name, made and kept when there is none."""
        kept = self.recall(name)
        if kept is None:
            self.remember(name, make())
            kept = self.recall(name)
        return kept

    def shard(self, number: int, make: Callable[[], pa.Table]) -> pa.Table:
        """One shard of a long table, made once."""
        return self.once(f"shard-{number:05d}.parquet", make)

    def shards(self, work: Work, parts: Sequence[Sized], label: str, unit: str = "items") -> list[Path]:
        """A table of each part, made by the engine where it is not kept from before: the files, in the order of the parts.

        The parts' lengths are what the progress bar counts.
        """
        names = [f"shard-{number:05d}.parquet" for number in range(len(parts))]
        kept = {number for number, name in enumerate(names) if self.recall(name) is not None}
        missing = {number: part for number, part in enumerate(parts) if number not in kept}
        with self.progress(sum(map(len, parts)), label, unit, done=sum(len(parts[number]) for number in kept)) as bar:
            for number, table in self.engine.map(work, missing, bar.update):
                self.shard(number, functools.partial(_same, table))
        return [self.folder / name for name in names]

    def build(self, name: str, write: Callable[[Path], None]) -> Path:
        """A folder that `write` fills, made once: it is either whole or absent."""
        path = self.folder / name
        if not path.exists():
            with _disk(self.folder):
                temporary = self.folder / f".{name}.tmp"
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.parent.mkdir(parents=True, exist_ok=True)
                write(temporary)
                os.replace(temporary, path)
        return path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the spine: what makes it, from which records and which sections of the settings."""

    make: Callable[..., Any]
    """Called with the records of `needs`, then the sections of `settings`, then the Job; returns one record."""
    record: type
    needs: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    fingerprint: Callable[..., Any] | None = None
    """Called with the sections; a value that changes when something outside the run folder (data, weights) changes."""
    reads: tuple[str, ...] = ()
    """Files of the run folder that people change and the result shows."""


class Workspace:
    """A run folder, locked while it is open."""

    def __init__(self, root: Path, stages: Mapping[str, Stage]) -> None:
        self.root, self.stages = root, stages
        self._lock: Any = None
        self._engine: Engine | None = None
        self.ran: list[str] = []
        """Stages that did work since the folder was opened."""

    def __enter__(self) -> Workspace:
        with _disk(self.root, DISK_ERRORS | {errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP}):
            if self.root.exists() and not self.root.is_dir():
                raise WorkspaceError(f"{self.root}: is a file, not a run folder; choose another name with --out")
            begun = {".lock", "run.json.tmp"}  # all there is after a kill before run.json was in place
            if self.root.is_dir() and not (self.root / "run.json").exists() and {entry.name for entry in self.root.iterdir()} - begun:
                raise WorkspaceError(
                    f"{self.root}: is not empty and not a run of attar; nothing was touched; choose another folder with --out"
                )
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = (self.root / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise WorkspaceError(
                f"{self.root}: another attar is working in this run folder; wait for it, or choose another with --out"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._engine is not None:
            self._engine.close()
        self._lock.close()  # closing releases the lock, as does a kill

    def claim(self, data: str, settings: Mapping[str, Any]) -> None:
        """Marks the folder as a run of this data; refuses the folder of another data set of which anything was done."""
        marker = self.root / "run.json"
        if marker.exists():
            held = self._marked(marker)
            if held != data and any(any(self.root.glob(kept)) for kept in ("stages/*.json", ".partial/*/*")):
                raise UsageError(f"{self.root}: is a run of {held}, not of {data}; choose another folder with --out")
        with _disk(self.root):
            self._write("run.json", {"data": data, "attar": __version__})
            self._write("settings.json", settings)
            (self.root / "stages").mkdir(exist_ok=True)

    def _marked(self, marker: Path) -> str:
        try:
            return formats.read_json(marker)["data"]
        except (ValueError, TypeError, KeyError):
            raise WorkspaceError(f"{marker}: is damaged, so whose run this is cannot be told; choose another folder with --out") from None

    def _write(self, name: str, value: Any) -> None:
        temporary = self.root / f"{name}.tmp"
        formats.write_json(temporary, value)
        os.replace(temporary, self.root / name)

    def manifest(self, name: str) -> dict[str, Any] | None:
        """The manifest of a finished stage whose files are all there, else None."""
        body = self._manifest(name)
        return body if body and all(self._whole(file, size) for file, (size, _) in body["outputs"].items()) else None

    def _whole(self, file: str, size: int) -> bool:
        path = self.root / file
        return path.is_file() and path.stat().st_size == size

    def _manifest(self, name: str) -> dict[str, Any] | None:
        """The manifest as it stands; None for a missing or damaged one, whose stage is then made again."""
        try:
            body = formats.read_json(self.root / "stages" / f"{name}.json")
            return body if {"key", "content", "outputs", "seconds", "notes"} <= body.keys() else None
        except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError):
            return None

    def load(self, name: str) -> Any:
        """The record of a finished stage."""
        if self.manifest(name) is None:
            outputs = (self._manifest(name) or {}).get("outputs", {})
            damaged = [self.root / file for file, (size, _) in outputs.items() if not self._whole(file, size)]
            what = f"{damaged[0]}: is missing or cut short" if damaged else f"{self.root}: the stage {name} is not finished here"
            raise WorkspaceError(f"{what}; run: attar {name} {self.root}")
        return formats.FORMATS[self.stages[name].record].load(self.root)

    def key(self, name: str, config: Any) -> str:
        """Hash of everything a stage's result depends on; the stages it needs must be finished."""
        stage = self.stages[name]
        sections = [getattr(config, section) for section in stage.settings]
        inputs = {need: (self.manifest(need) or {}).get("content") for need in stage.needs}
        outside = stage.fingerprint(*sections) if stage.fingerprint else None
        read = {file: file_digest(self.root / file) for file in stage.reads if (self.root / file).is_file()}
        return _digest([name, __version__, config.setup.seed, [dataclasses.asdict(section) for section in sections], inputs, outside, read])

    def run(self, name: str, config: Any, *, quiet: bool = False) -> Any:
        """The record of a stage: loaded when it is finished and nothing it depends on changed, else made (resuming what is half done)."""
        stage, key = self.stages[name], self.key(name, config)
        manifest = self.manifest(name)
        if manifest and manifest["key"] == key:
            self._clear(name)
            return self.load(name)
        scratch = self.root / ".partial" / f"{name}-{key[:12]}"
        setup = config.setup
        self._engine = self._engine or engine_of(setup)
        options = {"seed": setup.seed, "workers": setup.workers, "tensorboard": setup.tensorboard}
        job = Job(name, scratch, quiet=quiet, engine=self._engine, **options)
        cache = self.root / ".cache" / name
        job.cache = cache / key[:12]
        if manifest:
            job.cache_before, job.before = cache / manifest["key"][:12], functools.partial(self.load, name)
        manifests = {need: self.manifest(need) or {} for need in stage.needs}
        job.history = [{"stage": need, "seconds": body.get("seconds"), "notes": body.get("notes", [])} for need, body in manifests.items()]
        spent = (job.recall("seconds.json") or 0.0) if scratch.exists() else 0.0
        started = time.perf_counter()
        try:
            with _disk(self.root):
                record = stage.make(
                    *(self.load(need) for need in stage.needs), *(getattr(config, section) for section in stage.settings), job
                )
        finally:
            if scratch.exists():
                with contextlib.suppress(OSError, WorkspaceError):
                    job.remember("seconds.json", spent + time.perf_counter() - started)
        with _disk(self.root):
            self._publish(name, key, record, scratch, {"seconds": round(spent + time.perf_counter() - started, 2), "notes": job.notes})
        self.ran.append(name)
        return self.load(name)

    def _publish(self, name: str, key: str, record: Any, scratch: Path, body: dict[str, Any]) -> None:
        """Moves a stage's files into place; the manifest goes last, so that a kill in between means the stage is finished again from its scratch."""
        fresh = scratch / "out"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        formats.FORMATS[self.stages[name].record].save(fresh, record)
        outputs = {
            str(path.relative_to(fresh)): (path.stat().st_size, file_digest(path)) for path in sorted(fresh.rglob("*")) if path.is_file()
        }
        manifest = self.root / "stages" / f"{name}.json"
        moving = self.root / "stages" / f"{name}.moving"  # every file that may be left by a kill, whatever is published next
        before = {**(self._manifest(name) or {}).get("outputs", {}), **(formats.read_json(moving) if moving.exists() else {})}
        self._write(f"stages/{moving.name}", before | outputs)
        manifest.unlink(missing_ok=True)
        for stale in before.keys() - outputs.keys():
            (self.root / stale).unlink(missing_ok=True)
        for file in outputs:
            target = self.root / file
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(fresh / file, target)
        content = _digest({file: digest for file, (_, digest) in outputs.items()})
        self._write(f"stages/{name}.json", body | {"key": key, "content": content, "outputs": outputs, "attar": __version__})
        self._clear(name)

    def _clear(self, name: str) -> None:
        """Removes half-done work of a stage that is finished: left by a kill at the very end, or for settings since taken back."""
        (self.root / "stages" / f"{name}.moving").unlink(missing_ok=True)
        for old in (self.root / ".partial").glob(f"{name}-*"):
            shutil.rmtree(old, ignore_errors=True)
        current = ((self._manifest(name) or {}).get("key") or "")[:12]
        for old in (self.root / ".cache" / name).glob("*-*"):
            if not old.name.startswith(f"{current}-"):
                old.unlink(missing_ok=True)


def status(run: str | Path) -> dict[str, Any]:
    """What is done in a run folder: state, seconds and notes of every stage, and the result's sentence when there is one. Imports no stage."""
    root = Path(run)
    if not (root / "run.json").is_file():
        raise WorkspaceError(f"{root}: is not a run folder of attar (no run.json)")
    space, rows = Workspace(root, {}), []
    for name in STAGES:
        manifest = space.manifest(name)
        half = any((root / ".partial").glob(f"{name}-*"))
        state = "half done" if half else "done" if manifest else "not started"
        rows.append(
            {"stage": name, "state": state, "seconds": manifest and manifest["seconds"], "notes": manifest["notes"] if manifest else []}
        )
    finished = space.manifest("report") is not None
    result = formats.FORMATS[Page].load(root).sentence if finished else None
    return {"run": str(root), **formats.read_json(root / "run.json"), "stages": rows, "result": result}
