"""scan: what is read, what is set aside and why, the splits, and that interruptions leave no trace."""

from __future__ import annotations

import importlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections import Counter
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import KINDS, make_image, png_bomb
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from attar import formats
from attar.config import Data
from attar.errors import DataError
from attar.modalities.image import Loader
from attar.records import ITEM_SCHEMA, QUARANTINE_SCHEMA, SPLITS, Items, Preprocess
from attar.stages.scan import scan, split_by_content
from attar.workspace import Job

Jobs = Callable[..., Job]
stage = importlib.import_module("attar.stages.scan")


@pytest.fixture
def folder(photos: Path, tmp_path: Path) -> Path:
    """A copy of the made images that a test may change."""
    return Path(shutil.copytree(photos, tmp_path / "photos"))


def reasons(items: Items) -> dict[str, str]:
    return dict(zip(items.quarantine["path"].to_pylist(), items.quarantine["reason"].to_pylist()))


def notes(items: Items) -> dict[str, str]:
    return {path: note for path, note in zip(items.column("path"), items.column("note")) if note}


def test_table_of_a_folder(photos: Path, items: Items) -> None:
    assert items.root == str(photos)
    assert items.table.schema == ITEM_SCHEMA
    assert items.quarantine.schema == QUARANTINE_SCHEMA
    assert items.quarantine.num_rows == 0
    expected = sorted(f"{kind}/{seed:03d}.png" for kind in KINDS for seed in range(20))
    assert items.column("path").tolist() == expected
    assert items.ids().tolist() == list(range(60))
    assert set(items.column("modality")) == {"image"}
    assert set(items.column("format")) == {"PNG"}
    assert set(zip(items.column("width"), items.column("height"))) == {(48, 40)}
    assert items.column("bytes").tolist() == [(photos / path).stat().st_size for path in expected]
    assert items.table["frame_time"].null_count == 60
    assert len(set(items.column("content"))) == 60
    assert {len(thumb) for thumb in items.column("thumb")} == {256}
    assert sum(len(items.ids(split)) for split in SPLITS) == 60


def test_record_is_saved_and_loaded_unchanged(items: Items, tmp_path: Path) -> None:
    formats.FORMATS[Items].save(tmp_path, items)
    loaded = formats.FORMATS[Items].load(tmp_path)
    assert loaded.table.equals(items.table)
    assert loaded.quarantine.equals(items.quarantine)
    assert loaded.root == items.root


# --- the same images from other sources -------------------------------------------------------------------------------


def as_tar(photos: Path, target: Path) -> str:
    with tarfile.open(target / "shard.tar", "w") as archive:
        archive.add(photos, "photos")
    return str(target / "shard.tar")


def as_tar_gz(photos: Path, target: Path) -> str:
    with tarfile.open(target / "shard.tar.gz", "w:gz") as archive:
        archive.add(photos, ".")
    return str(target / "shard.tar.gz")


def as_webdataset(photos: Path, target: Path) -> str:
    paths = sorted(photos.rglob("*.png"))
    for number in range(3):
        with tarfile.open(target / f"part-{number}.tar", "w") as archive:
            for path in paths[number::3]:
                key = f"{path.parent.name}-{path.stem}"
                archive.add(path, f"{key}.png")
                info = tarfile.TarInfo(f"{key}.json")
                info.size = 2
                archive.addfile(info, io.BytesIO(b"{}"))
    return str(target / "part-*.tar")


def as_zip(photos: Path, target: Path) -> str:
    with zipfile.ZipFile(target / "shard.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in photos.rglob("*.png"):
            archive.write(path, path.relative_to(photos))
    return str(target / "shard.zip")


def as_parquet(photos: Path, target: Path) -> str:
    rows = [{"bytes": path.read_bytes(), "path": path.name} for path in sorted(photos.rglob("*.png"))]
    pq.write_table(pa.table({"label": [0] * len(rows), "image": rows}), target / "part.parquet", row_group_size=7)
    return str(target / "part.parquet")


def as_list(photos: Path, target: Path) -> str:
    (target / "list.txt").write_text("\n".join(str(path) for path in sorted(photos.rglob("*.png"))))
    return str(target / "list.txt")


def as_glob(photos: Path, target: Path) -> str:
    return str(photos / "**" / "*.png")


@pytest.mark.parametrize("make", [as_tar, as_tar_gz, as_webdataset, as_zip, as_parquet, as_list, as_glob])
def test_every_source_gives_the_same_contents_and_splits(
    make: Callable[[Path, Path], str], photos: Path, items: Items, tmp_path: Path, job: Jobs
) -> None:
    found = scan(Data(data=make(photos, tmp_path)), job())
    assert found.quarantine.num_rows == 0
    for column in ("content", "bytes", "split", "thumb"):
        assert Counter(found.column(column)) == Counter(items.column(column))
    assert dict(zip(found.column("content"), found.column("split"))) == dict(zip(items.column("content"), items.column("split")))
    assert found.column("path").tolist() == sorted(found.column("path"))
    with Loader(found, Preprocess(size=(16, 16)), workers=2) as loader:
        assert loader.batch([3, 1]).shape == (2, 16, 16, 3)


# --- what people have in their folders --------------------------------------------------------------------------------


def test_odd_but_good_files_are_read_with_a_note(folder: Path, job: Jobs) -> None:
    picture, exif = make_image("discs", 100), Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((30, 30), 50).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30) * 70).save(folder / "deep.png")
    picture.convert("P").save(folder / "palette.png")
    Image.fromarray(np.dstack([np.asarray(picture), np.arange(40 * 48, dtype=np.uint8).reshape(40, 48)])).save(folder / "clear.png")
    picture.save(folder / "moving.gif", save_all=True, append_images=[make_image("discs", seed) for seed in range(101, 105)])
    picture.save(folder / "turned.jpg", exif=exif)
    picture.save(folder / "label.png", "JPEG")
    picture.save(folder / "spaces and ünïcødé 猫.png")
    make_image("noise", 99).save(folder / ("long" * 62 + ".png"))
    found = scan(Data(data=str(folder)), job())
    assert len(found) == 69
    assert found.quarantine.num_rows == 0
    assert notes(found) == {
        "cmyk.jpg": "CMYK converted to RGB",
        "deep.png": "16-bit grey scaled to 8 bits",
        "clear.png": "transparency put on white",
        "moving.gif": "first of 5 frames",
        "turned.jpg": "turned by EXIF orientation 6",
        "label.png": "JPEG named .png",
    }
    row = found.column("path").tolist().index("turned.jpg")
    assert (found.column("width")[row], found.column("height")[row]) == (40, 48)
    assert found.column("format")[found.column("path").tolist().index("label.png")] == "JPEG"


def break_some(folder: Path) -> None:
    """Seven things that cannot be used and one file of another kind."""
    whole = (folder / "discs/000.png").read_bytes()
    (folder / "empty.jpg").touch()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("not an image")
    (folder / "bomb.png").write_bytes(png_bomb(60_000, 50_000))
    (folder / "dead.png").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "loop").symlink_to(folder)
    (folder / "notes.txt").touch()


def test_broken_files_are_set_aside_and_the_rest_is_read(folder: Path, items: Items, job: Jobs) -> None:
    break_some(folder)
    mine = job()
    found = scan(Data(data=str(folder)), mine)
    assert found.table.equals(items.table)
    assert found.quarantine["path"].to_pylist() == sorted(found.quarantine["path"].to_pylist())
    assert {path: reason.split(" (")[0] for path, reason in reasons(found).items()} == {
        "bomb.png": "too large: 3,000 megapixels by its header, the limit is 100 megapixels",
        "cut.png": "the file is truncated",
        "dead.png": "symbolic link to a file that does not exist",
        "empty.jpg": "the file is empty",
        "loop": "symbolic link loop: leads back to .",
        "pipe.jpg": "is a named pipe, not a regular file",
        "text.jpg": "not an image in a format attar reads, or its header is damaged",
    }
    assert all(found.quarantine["remedy"].to_pylist())
    (summary,) = mine.notes
    assert summary.startswith("60 images read; 7 files set aside (1 × is a named pipe, not a regular file (such as pipe.jpg); 1 × ")
    assert summary.endswith("; other kinds of file passed over: .txt 1")


def test_large_images_are_set_aside_unread_and_the_limit_can_be_raised(folder: Path, job: Jobs) -> None:
    Image.new("L", (1200, 1000)).save(folder / "large.png")
    found = scan(Data(data=str(folder), max_megapixels=1.0), job("one"))
    assert list(reasons(found)) == ["large.png"]
    assert "too large: 1200 × 1000 pixels by its header, the limit is 1 megapixels" in reasons(found)["large.png"]
    assert len(scan(Data(data=str(folder), max_megapixels=1.2), job("two"))) == 61


def test_a_huge_file_is_not_read_at_all(folder: Path, job: Jobs) -> None:
    with (folder / "huge.bmp").open("wb") as stream:
        stream.write(b"BM")
        stream.truncate(3 << 30)  # takes no space on disk
    found = scan(Data(data=str(folder)), job())
    assert reasons(found) == {"huge.bmp": "the file has 3,221 MB, more than any image within max_megapixels"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_set_aside(folder: Path, job: Jobs) -> None:
    (folder / "discs/003.png").chmod(0)
    assert reasons(scan(Data(data=str(folder)), job())) == {"discs/003.png": "cannot be opened (Permission denied)"}


# --- too little -------------------------------------------------------------------------------------------------------


def refusal(folder: Path, job: Job) -> str:
    with pytest.raises(DataError) as caught:
        scan(Data(data=str(folder)), job)
    return str(caught.value)


def test_too_few_images_are_refused_with_what_was_found(tmp_path: Path, job: Jobs) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    assert f"{folder}: nothing to read; there is no file there at all" in refusal(folder, job("empty"))
    make_image("discs", 0).save(folder / "a.png")
    learns = "attar learns from at least 20 distinct images: add some"
    assert refusal(folder, job("one")) == f"{folder}: holds only one image (a.png); {learns}"
    for number in range(30):
        make_image("discs", 0).save(folder / f"copy {number}.bmp")
    assert refusal(folder, job("same")) == f"{folder}: holds 31 images that are all identical; {learns}"
    for seed in range(1, 19):
        make_image("discs", seed).save(folder / f"{seed}.png")
    (folder / "broken.png").touch()
    assert refusal(folder, job("nineteen")) == (
        f"{folder}: holds only 19 distinct images (49 read); {learns}; "
        "1 more could not be read: 1 × the file is empty (0 bytes) (such as broken.png)"
    )
    make_image("discs", 19).save(folder / "19.png")
    assert len(scan(Data(data=str(folder)), job("twenty"))) == 50


def test_nothing_readable_lists_the_commonest_reasons(tmp_path: Path, job: Jobs) -> None:
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(b"" if number else b"text")
    found = refusal(tmp_path, job())
    assert found.startswith(
        f"{tmp_path}: none of the 5 image files can be read: 4 × the file is empty (0 bytes) (such as 1.jpg); 1 × not an"
    )


# --- splits -----------------------------------------------------------------------------------------------------------


def hashed(numbers: list[int]) -> list[str]:
    return [blake2b(str(number).encode(), digest_size=16).hexdigest() for number in numbers]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=3, max_size=200), st.floats(0.01, 0.44), st.floats(0.01, 0.44))
def test_duplicates_never_straddle_and_no_split_is_empty(numbers: list[int], test: float, validation: float) -> None:
    contents = hashed(numbers)
    splits = split_by_content(contents, test, validation)
    of = dict(zip(contents, splits))
    assert splits == [of[content] for content in contents]
    assert set(splits) <= set(SPLITS)
    if len(of) >= 3:
        assert set(splits) == set(SPLITS)


def test_splits_follow_the_rule_for_large_sets() -> None:
    contents = hashed(list(range(5000)))
    found = np.array(split_by_content(contents, 0.15, 0.1))
    u = np.array([int(content, 16) / 2**128 for content in contents])
    expected = np.where(u < 0.15, "test", np.where(u < 0.25, "validation", "train"))
    assert (found == expected).all()
    assert np.isclose((found == "test").mean(), 0.15, atol=0.02)
    # an item keeps its split when others come
    assert split_by_content(contents[:3000], 0.15, 0.1) == found[:3000].tolist()


def test_small_splits_take_the_smallest_hashes() -> None:
    contents = sorted(hashed(list(range(2000))))[-100:]  # none below 0.25: the rule alone would leave test and validation empty
    assert split_by_content(contents, 0.15, 0.1) == ["test"] * 8 + ["validation"] * 8 + ["train"] * 84
    low = sorted(hashed(list(range(2000))))[:100]
    assert split_by_content(low, 0.15, 0.1) == ["test"] * 84 + ["validation"] * 8 + ["train"] * 8


def test_exact_duplicates_in_other_formats_share_a_split(folder: Path, job: Jobs) -> None:
    for path in sorted(folder.glob("noise/*.png")):
        Image.open(path).save(path.with_suffix(".bmp"))
    mine = job()
    found = scan(Data(data=str(folder)), mine)
    assert len(found) == 80
    groups: dict[str, set[str]] = {}
    for content, split in zip(found.column("content"), found.column("split")):
        groups.setdefault(content, set()).add(split)
    assert len(groups) == 60
    assert all(len(splits) == 1 for splits in groups.values())
    assert "20 of them exact duplicates" in mine.notes[0]


# --- resuming ---------------------------------------------------------------------------------------------------------


def saved(items: Items, folder: Path) -> list[bytes]:
    folder.mkdir()
    formats.FORMATS[Items].save(folder, items)
    return [(folder / name).read_bytes() for name in ("items.parquet", "quarantine.parquet")]


def test_tables_are_equal_bytes_whatever_the_threads_and_interruptions(
    folder: Path, tmp_path: Path, job: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_some(folder)
    monkeypatch.setattr(stage, "SHARD", 9)
    monkeypatch.setattr(stage, "BLOCK", 2)
    data = Data(data=str(folder))
    whole = saved(scan(data, job("whole", workers=1)), tmp_path / "whole")
    assert saved(scan(data, job("threads", workers=5)), tmp_path / "threads") == whole
    original, read = stage.Reader.read, Counter[str]()

    def stumbling(self: object, path: str) -> bytes:
        read[path] += 1
        if sum(read.values()) in (13, 30, 50):
            raise KeyboardInterrupt
        return original(self, path)

    monkeypatch.setattr(stage.Reader, "read", stumbling)
    stops = 0
    while True:
        try:
            pieces = scan(data, job("pieces", workers=2))
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops == 3
    assert sum(read.values()) < 64 + 3 * 9 + 3  # finished shards were not read again
    assert saved(pieces, tmp_path / "pieces") == whole
    read.clear()
    assert saved(scan(data, job("pieces")), tmp_path / "again") == whole
    assert not read


def test_kill_and_resume(folder: Path, tmp_path: Path, items: Items, monkeypatch: pytest.MonkeyPatch) -> None:
    script = f"""
import importlib, os, signal
from pathlib import Path
from attar.config import Data
from attar.workspace import Job
stage = importlib.import_module("attar.stages.scan")
stage.SHARD = 16
class Killed(Job):
    def shard(self, number, make):
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().shard(number, make)
stage.scan(Data(data={str(folder)!r}), Killed("scan", Path({str(tmp_path / "job")!r}), quiet=True))
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "job").glob("shard-*")) == ["shard-00000.parquet", "shard-00001.parquet"]
    monkeypatch.setattr(stage, "SHARD", 16)
    resumed = scan(Data(data=str(folder)), Job("scan", tmp_path / "job", quiet=True))
    assert resumed.table.equals(items.table)


def test_threads_end_with_the_scan(photos: Path, job: Jobs) -> None:
    before = threading.active_count()
    scan(Data(data=str(photos)), job(workers=6))
    assert threading.active_count() == before


def test_fingerprint_tells_whether_a_scan_is_stale(folder: Path) -> None:
    data = Data(data=str(folder))
    first = stage.fingerprint(data)
    assert stage.fingerprint(data) == first
    make_image("noise", 77).save(folder / "new.png")
    assert stage.fingerprint(data) != first


def test_images_are_never_all_in_memory(photos: Path, tmp_path: Path) -> None:
    """24 images of 4 megapixels are 290 MB when decoded; two threads hold two of them and their copies."""
    for number in range(24):
        Image.new("RGB", (2000, 2000), (number, 0, 0)).save(tmp_path / f"{number}.png", compress_level=1)
    script = """
import resource, sys
from pathlib import Path
from attar.config import Data
from attar.stages.scan import scan
from attar.workspace import Job
scan(Data(data=sys.argv[1]), Job("scan", Path(sys.argv[2]), workers=2, quiet=True))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    peaks = []
    for folder in (photos, tmp_path):
        command = [sys.executable, "-c", script, str(folder), str(tmp_path / f"job of {folder.name}")]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert peaks[1] - peaks[0] < 140  # MB
