"""Work on shards: the same on Ray as in this process, shards that resume alone, and what is damaged or missing."""

from __future__ import annotations

import functools
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import attar_command
from sklearn.metrics import adjusted_rand_score
from test_cluster import make_items, make_vectors

from attar import config, formats
from attar.data import listing
from attar.errors import DataError, MissingExtra, UsageError, WorkspaceError
from attar.modalities.image import SUFFIXES
from attar.pipeline import Run, run_config
from attar.records import Items, Vectors
from attar.scale import engine_of
from attar.scale.local import Engine, Local, Tick
from attar.stages.cluster.cluster import cluster
from attar.stages.cluster.kmeans import kmeans
from attar.stages.curate.curate import curate
from attar.stages.embed import Encoding, embed
from attar.stages.scan import BLOCK, Checking, scan
from attar.workspace import Job

Make = Callable[..., Job]
TINY = config.Embed(self_steps=6, self_width=8, batch_size=16)


class Doubling:
    """Work that notes in a file of its own what it did."""

    def __init__(self, log: Path, fail_at: int | None = None) -> None:
        self.log, self.fail_at = log, fail_at

    def open(self, workers: int) -> Any:
        return nullcontext(self.make)

    def make(self, part: range, tick: Tick) -> pa.Table:
        with self.log.open("a") as stream:
            stream.write(f"{part[0]}\n")
        if self.fail_at is not None and part[0] >= self.fail_at:
            raise DataError(f"part {part[0]} cannot be made")
        tick(len(part))
        return pa.table({"twice": [2 * value for value in part]})


class Dying:
    """Work whose process ends the first time it meets a part."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def open(self, workers: int) -> Any:
        return nullcontext(self.make)

    def make(self, part: list[int], tick: Tick) -> int:
        if part == [3] and not self.mark.exists():
            self.mark.touch()
            os._exit(1)
        return sum(part)


PARTS = [range(start, start + 4) for start in range(0, 24, 4)]


def twice(files: list[Path]) -> list[int]:
    return [value for file in files for value in formats.pq.read_table(file)["twice"].to_pylist()]


@pytest.mark.parametrize("name", [None, pytest.param("ray", marks=pytest.mark.slow)])
def test_shards_resume_alone(name: str | None, job: Make, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Shards that are there are not made again, a damaged one is, and a failure loses none that is finished."""
    engine, log = request.getfixturevalue(name) if name else None, tmp_path / "log"
    with pytest.raises(DataError, match=r"part \d+ cannot be made"):
        job(engine=engine).shards(Doubling(log, fail_at=16), PARTS, "doubling")
    kept = {path.name for path in job().folder.glob("shard-*.parquet")}
    assert kept == {f"shard-{number:05d}.parquet" for number in range(4)}
    log.unlink()
    whole = job().folder / "shard-00001.parquet"
    whole.write_bytes(whole.read_bytes()[:-30])
    again = job(engine=engine)
    assert twice(again.shards(Doubling(log), PARTS, "doubling")) == list(range(0, 48, 2))
    made = sorted(int(line) for line in log.read_text().split())
    assert made == [4, 16, 20]
    assert [note.split(",")[0] for note in again.notes] == ["shard-00001.parquet"]
    assert again.notes[0].endswith("it is made again")
    log.unlink()
    again.shards(Doubling(log), PARTS, "doubling")
    assert not log.exists()


@pytest.mark.parametrize("name", ["state.json", "state.pt", "state.parquet"])
@pytest.mark.parametrize("damage", [lambda body: body[:-12], lambda body: b"", lambda body: b"\x00" * len(body)])
def test_damaged_half_done_work_is_made_again_and_that_is_said(name: str, damage: Callable[[bytes], bytes], job: Make) -> None:
    value = pa.table({"a": list(range(1000))}) if name.endswith("parquet") else {"a": list(range(50))}
    first = job()
    first.remember(name, value)
    (first.folder / name).write_bytes(damage((first.folder / name).read_bytes()))
    second = job()
    assert second.once(name, lambda: value) == value
    assert len(second.notes) == 1
    assert second.notes[0].startswith(f"{name}, kept from before, was damaged (")
    assert job().notes == second.notes, "the note is kept"


def test_damaged_notes_stop_nothing(job: Make) -> None:
    first = job()
    first.say("something")
    (first.folder / "notes.json").write_text('["someth')
    assert [note.split(",")[0] for note in job().notes] == ["notes.json"]


def test_a_file_that_cannot_be_read_is_not_taken_for_damaged(job: Make) -> None:
    first = job()
    (first.folder / "state.json").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        job().recall("state.json")
    assert (first.folder / "state.json").exists()


def test_a_damaged_shard_of_a_finished_run_is_named_with_what_makes_it_again(photos: Path, tmp_path: Path) -> None:
    root, settings = (
        tmp_path / "run",
        config.build_config({"data": str(photos), "out": str(tmp_path / "run"), "self_steps": 4, "self_width": 8}),
    )
    run_config(settings, until="embed", quiet=True)
    shard = root / "vectors" / "00000.parquet"
    whole = shard.read_bytes()
    shard.write_bytes(b"\x00" * len(whole))
    remedy = rf"delete it, then run: attar embed {root}, which makes the vectors again"
    with pytest.raises(WorkspaceError, match=rf"{shard}: cannot be read \(.+\); {remedy}"):
        list(Run(root)["embed"].batches())
    formats.write_table(shard, formats.shard_table(np.arange(60), np.zeros((60, 5), np.float16)))
    with pytest.raises(WorkspaceError, match=rf"{shard}: holds vectors of 5 numbers, the run's have \d+; {remedy}"):
        list(formats.FORMATS[Vectors].load(root).batches())
    shard.write_bytes(whole[:-9])
    with pytest.raises(WorkspaceError, match=rf"{shard}: is missing or cut short; run: attar embed {root}"):
        Run(root)["embed"]
    shard.unlink()
    assert run_config(settings, until="embed", quiet=True).ran == ("embed",)
    assert shard.read_bytes() == whole


def test_work_travels(photos: Path, items: Items, job: Make) -> None:
    """What is sent to other processes gives the same there: the network is built again from its record."""
    entries, _ = listing(str(photos), SUFFIXES)
    vectors = embed(items, config.ModelChoice(), TINY, config.Augment(), job("embed"))
    done: list[int] = []
    for work, part in ((Checking(str(photos), 10**8, BLOCK), entries), (Encoding(items, vectors.model, "not sent"), items.ids())):  # type: ignore[arg-type]
        with pickle.loads(pickle.dumps(work)).open(2) as make:
            table = make(part, done.append)
        if isinstance(work, Checking):
            assert table["content"].to_pylist() == items.column("content").tolist()
        else:
            assert table.equals(formats.shard_table(*next(iter(vectors.batches()))))
        assert sum(done) == 60
        done.clear()


def test_the_page_s_python_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made: dict[str, Any] = {}
    (block,) = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "docs" / "scale.md").read_text("utf-8"), re.DOTALL)
    exec(compile(block, "scale.md", "exec"), made)
    assert made["fit"].centroids.shape == made["rough"].centroids.shape == (50, 64)


def test_settings_of_the_engine() -> None:
    with pytest.raises(UsageError, match="engine: 'spark'; expected local or ray"):
        config.build_config({"data": "x", "engine": "spark"})
    with pytest.raises(UsageError, match="ray_address: 'auto' with the engine 'local'; it is for --engine ray"):
        config.build_config({"data": "x", "ray_address": "auto"})
    assert isinstance(engine_of(config.Setup(workers=3)), Local)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        MissingExtra, match=r"engine ray needs the package 'ray', which is not installed. Install it with: pip install 'attar\[ray\]'"
    ):
        engine_of(config.Setup(engine="ray"))


@pytest.fixture(scope="module")
def ray() -> Iterator[Engine]:
    """A Ray of two processes."""
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:  # workers import what this file defines
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
        engine = engine_of(config.Setup(engine="ray", workers=2))
        assert engine.slots == 2
    yield engine
    engine.close()


@pytest.mark.slow
def test_scan_and_embed_on_ray_give_the_same(ray: Engine, photos: Path, tmp_path: Path, job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(photos, tmp_path / "photos"))
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    monkeypatch.setattr("attar.stages.scan.SHARD", 16)
    monkeypatch.setattr("attar.stages.embed.SHARD", 16)
    scanned = [scan(config.Data(data=str(folder)), job(f"scan {number}", engine=engine)) for number, engine in enumerate((None, ray))]
    assert scanned[1].table.equals(scanned[0].table)
    assert scanned[1].quarantine.equals(scanned[0].quarantine)
    assert scanned[0].quarantine.num_rows == 1
    made = [embed(scanned[0], config.ModelChoice(), TINY, config.Augment(), job("embed", engine=engine)) for engine in (None, None)]
    for shard in job("embed").folder.glob("shard-*"):
        shard.unlink()  # the encoder stays
    made.append(embed(scanned[0], config.ModelChoice(), TINY, config.Augment(), job("embed", engine=ray)))
    assert len(made[2].shards) == 4
    for here, there in zip(made[0].batches(), made[2].batches()):
        assert np.array_equal(here.ids, there.ids)
        np.testing.assert_allclose(here.values.astype(np.float32), there.values.astype(np.float32), rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_kmeans_on_ray_gives_the_same(ray: Engine, tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(20_000, 6)).astype(np.float16)
    points[:7000] += 4
    np.save(tmp_path / "points.npy", points)
    shards = [functools.partial(formats.read_shard, tmp_path / f"{number}.parquet") for number in range(4)]
    for number in range(4):
        rows = np.arange(number * 5000, (number + 1) * 5000)
        formats.write_table(tmp_path / f"{number}.parquet", formats.shard_table(rows, points[rows]))
    vectors = Vectors(shards=shards, count=20_000, dim=6, model=make_vectors(points[:5]).model)
    for source in (points, np.load(tmp_path / "points.npy", mmap_mode="r"), vectors):
        here, there = (kmeans(source, 12, np.random.default_rng(1), iterations=4, engine=engine) for engine in (None, ray))
        np.testing.assert_allclose(there.centroids, here.centroids, atol=1e-4)
        assert there.inertia == pytest.approx(here.inertia, rel=1e-6)


@pytest.mark.slow
def test_near_duplicates_on_ray_are_the_same(ray: Engine, job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains of alike items through all blocks: who leads is decided block after block, though a wave of them is compared at once."""
    monkeypatch.setattr("attar.stages.curate.curate.BLOCK", 16)
    rng = np.random.default_rng(0)
    walk = np.cumsum(0.2 * rng.normal(size=(300, 12)), 0) + 3 * rng.normal(size=(1, 12))
    items = make_items(300, thumbs=np.repeat(rng.integers(0, 256, (1, 256), np.uint8), 300, 0))
    vectors = make_vectors(walk.astype(np.float16))
    clusters = cluster(items, vectors, config.Cluster(clusters=3), job("cluster"))
    here, there = (curate(items, vectors, clusters, config.Curate(), job(f"curate {engine}", engine=engine)) for engine in (None, ray))
    assert here.table.equals(there.table)
    reasons = here.column("reason").tolist()
    assert 20 < reasons.count("near duplicate") < 290


@pytest.mark.slow
def test_a_part_whose_worker_dies_is_made_elsewhere(ray: Engine, tmp_path: Path) -> None:
    found = dict(ray.map(Dying(tmp_path / "mark"), {number: [number] for number in range(6)}, lambda count: None))
    assert found == {number: number for number in range(6)}
    assert (tmp_path / "mark").exists()


@pytest.mark.slow
def test_a_run_on_ray_from_the_command_line(photos: Path, tmp_path: Path) -> None:
    runs = []
    for engine in ("local", "ray"):
        flags = ["--data", photos, "--engine", engine, "--self-steps", 4, "--self-width", 8, "--quiet"]
        subprocess.run(attar_command("cluster", tmp_path / engine, *flags), check=True, timeout=300)
        runs.append(Run(tmp_path / engine))
    assert runs[0]["scan"].table.equals(runs[1]["scan"].table)
    assert runs[0]["cluster"].count == runs[1]["cluster"].count
    assert adjusted_rand_score(runs[0]["cluster"].column("cluster"), runs[1]["cluster"].column("cluster")) > 0.9


@pytest.mark.slow
def test_an_address_without_a_cluster_is_named() -> None:
    text = "import attar.scale, attar.config as c; attar.scale.engine_of(c.Setup(engine='ray', ray_address='ray://127.0.0.1:9')).slots"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=300)
    assert "UsageError: ray_address: no Ray cluster answers at 'ray://127.0.0.1:9'" in done.stderr
    assert "start one with `ray start --head`" in done.stderr
