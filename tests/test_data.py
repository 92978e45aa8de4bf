"""data and containers: what is found, what is refused, and that every source gives the same bytes."""

from __future__ import annotations

import glob
import io
import os
import shutil
import tarfile
import threading
import time
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attar import data
from attar.containers import Unreadable
from attar.errors import DataError

SUFFIXES = frozenset({".png", ".jpg"})


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Five items and three other files; the bytes are the names."""
    root = tmp_path / "tree"
    for name in ("b.png", "a.JPG", "sub/c.png", "sub/deep/d.png", "with space/é 猫.png", "notes.txt", "clip.mov", "sub/other.mov"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def everything(source: object) -> dict[str, bytes]:
    """The bytes of every item by the last part of its path, read in several threads."""
    entries, problems = data.listing(str(source), SUFFIXES)
    assert not problems
    with data.Reader(str(source)) as reader, ThreadPoolExecutor(4) as pool:
        contents = list(pool.map(reader.read, [entry.path for entry in entries]))
    assert all(entry.bytes in (0, len(content)) for entry, content in zip(entries, contents))
    return {entry.path.split("::")[-1]: content for entry, content in zip(entries, contents)}


def pack(tree: Path, target: Path) -> Path:
    """The tree as the archive its suffix names."""
    if target.suffix == ".zip":
        with zipfile.ZipFile(target, "w") as archive:
            for path in sorted(tree.rglob("*")):
                archive.write(path, path.relative_to(tree))
    else:
        with tarfile.open(target, "w:gz" if target.suffix in (".gz", ".tgz") else "w") as archive:
            archive.add(tree, ".")
    return target


def test_folder_is_listed_in_order_with_sizes_and_other_files_are_counted(tree: Path) -> None:
    others: Counter[str] = Counter()
    entries, problems = data.listing(str(tree), SUFFIXES, others)
    names = ["a.JPG", "b.png", "sub/c.png", "sub/deep/d.png", "with space/é 猫.png"]
    assert entries == [(name, len(name.encode())) for name in names]
    assert not problems
    assert others == {".txt": 1, ".mov": 2}
    assert data.tally(others) == ".mov 2, .txt 1"


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".zip"])
def test_archives_hold_what_the_folder_holds(tree: Path, tmp_path: Path, suffix: str) -> None:
    assert everything(pack(tree, tmp_path / f"shard{suffix}")) == everything(tree)


@pytest.mark.parametrize("column", ["binary", "struct", "large"])
def test_parquet_rows_hold_what_the_folder_holds(tree: Path, tmp_path: Path, column: str) -> None:
    contents = list(everything(tree).values())
    if column == "struct":
        values = pa.array([{"bytes": content, "path": "x.png"} for content in contents])
    else:
        values = pa.array(contents, pa.large_binary() if column == "large" else pa.binary())
    table = pa.table({"label": range(len(contents)), "embedding": [b"no image"] * len(contents), "image": values})
    pq.write_table(table, tmp_path / "part.parquet", row_group_size=2)
    found = everything(tmp_path / "part.parquet")
    assert list(found) == [str(row) for row in range(len(contents))]
    assert list(found.values()) == contents


def test_list_file_names_files_relative_to_itself(tree: Path) -> None:
    listed = tree / "some.txt"
    listed.write_text("\ufeff# mine\r\nb.png\n\nsub/c.png\n./b.png\nmissing.png\nnotes.txt\nsub\n", "utf-8")
    entries, problems = data.listing(str(listed), SUFFIXES)
    assert [entry.path for entry in entries] == ["b.png", "sub/c.png"]
    assert [(problem.path, problem.reason) for problem in problems] == [("missing.png", "there is no such file")]
    with data.Reader(str(listed)) as reader:
        assert reader.read("sub/c.png") == b"sub/c.png"


def test_list_file_may_name_absolute_paths_and_archives(tree: Path, tmp_path: Path) -> None:
    pack(tree, tmp_path / "shard.zip")
    (tmp_path / "all.txt").write_text(f"{tree}/b.png\nshard.zip\n")
    found = everything(tmp_path / "all.txt")
    assert found.pop(f"{tree}/b.png") == b"b.png"
    assert found == everything(tree)


@pytest.mark.parametrize("pattern", ["*.png", "**/*.png", "sub/**", "*/*", "**/[cd].png", "?.[Jp]*", "**/deep/*", "*/**/d.png"])
def test_glob_finds_what_the_standard_library_finds(tree: Path, pattern: str) -> None:
    expected = {path for path in glob.glob(str(tree / pattern), recursive=True) if path.lower().endswith(tuple(SUFFIXES))}
    source = str(tree / pattern)
    entries, _ = data.listing(source, SUFFIXES)
    base = next(folder for folder in (tree / "sub", tree) if source.startswith(str(folder) + "/"))
    assert {str(base / entry.path) for entry in entries} == expected
    with data.Reader(source) as reader:
        assert reader.read(entries[0].path)


def test_glob_of_shards(tree: Path, tmp_path: Path) -> None:
    for number in range(3):
        pack(tree, tmp_path / f"shard-{number}.tar")
    entries, _ = data.listing(str(tmp_path / "shard-*.tar"), SUFFIXES)
    assert [entry.path for entry in entries[:2]] == ["shard-0.tar::a.JPG", "shard-0.tar::b.png"]
    assert len(entries) == 15
    with data.Reader(str(tmp_path / "shard-*.tar")) as reader:
        assert [reader.read(f"shard-{n}.tar::sub/c.png") for n in (2, 0, 1)] == [b"sub/c.png"] * 3


def test_a_glob_is_safe_from_link_loops(tree: Path) -> None:
    (tree / "sub/loop").symlink_to(tree)
    entries, problems = data.listing(str(tree / "**/*.png"), SUFFIXES)
    assert len(entries) == 4
    assert [problem.path for problem in problems] == ["sub/loop"]


def test_links_are_followed_once_and_loops_are_reported(tree: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "far.png").write_bytes(b"far")
    (tree / "linked").symlink_to(outside)
    (tree / "a link").symlink_to(tree / "sub")  # sorts before its target, which must keep its own name
    (tree / "sub/deep/loop").symlink_to(tree / "sub")
    (tree / "self").symlink_to("self")
    (tree / "copy.png").symlink_to("b.png")
    entries, problems = data.listing(str(tree), SUFFIXES)
    assert {"linked/far.png", "sub/c.png", "copy.png"} < {entry.path for entry in entries}
    assert len(entries) == 7
    reasons = {problem.path: problem.reason for problem in problems}
    assert reasons == {
        "a link": "leads to a folder that is read already: sub",
        "self": "symbolic link that leads back to itself",
        "sub/deep/loop": "symbolic link loop: leads back to sub",
    }


def test_special_files_are_never_opened(tree: Path) -> None:
    os.mkfifo(tree / "pipe.png")
    os.mkfifo(tree / "pipe of another kind")
    (tree / "gone.jpg").symlink_to("nowhere")
    (tree / "null.png").symlink_to("/dev/null")
    _, problems = data.listing(str(tree), SUFFIXES)
    assert {problem.path: problem.reason for problem in problems} == {
        "gone.jpg": "symbolic link to a file that does not exist",
        "null.png": "is a device, not a regular file",
        "pipe.png": "is a named pipe, not a regular file",
    }
    assert all(problem.remedy for problem in problems)


def test_odd_names(tmp_path: Path) -> None:
    names = [" lead and trail .png", "x" * 251 + ".png", "ünï/猫 \n;'\"$.png", "a::b.tar::c.png", "-rf.png", "100%.png", "[x].png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    assert set(everything(tmp_path).values()) == {name.encode() for name in names}
    assert everything(tmp_path / "[x].png") == {"[x].png": b"[x].png"}


def test_a_name_that_is_not_utf8_is_a_problem_that_can_be_printed(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(b"x")
    Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.png")).write_bytes(b"x")
    entries, problems = data.listing(str(tmp_path), SUFFIXES)
    assert [entry.path for entry in entries] == ["good.png"]
    assert problems == [("caf\\udce9.png", "its name is not valid UTF-8", "rename it")]
    assert data.fingerprint(str(tmp_path), SUFFIXES)


def test_hidden_files_and_runs_of_attar_are_left_out(tree: Path) -> None:
    before = data.fingerprint(str(tree), SUFFIXES)
    for name in (".hidden.png", ".cache/x.png", "runs/mine/report.png", "runs/mine/run.json"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text('{"attar": "0.1"}')
    (tree / "sub/run.json").write_text('{"other": 1}')
    assert len(data.listing(str(tree), SUFFIXES)[0]) == 5
    assert data.fingerprint(str(tree), SUFFIXES) == before
    with pytest.raises(DataError, match="is the folder of an attar run, not data"):
        data.listing(str(tree / "runs/mine"), SUFFIXES)


def test_a_single_file_is_one_item(tree: Path) -> None:
    assert everything(tree / "b.png") == {"b.png": b"b.png"}


def test_nothing_there(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tre: cannot be found \(No such file or directory; looked for /.*tre\); did you mean tree\?"):
        data.listing(str(tmp_path / "tre"), SUFFIXES)
    with pytest.raises(DataError, match=r"cannot be found .* name a folder, a quoted glob"):
        data.listing(str(tmp_path / "absent" / "*.png"), SUFFIXES)
    (tree / "a.doc").touch()
    with pytest.raises(DataError, match=r"\.doc: is not something attar reads; expected a folder, a quoted glob"):
        data.listing(str(tree / "a.doc"), SUFFIXES)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: is a named pipe, not a file or folder"):
        data.listing(str(tmp_path / "pipe"), SUFFIXES)


def test_empty_sources_say_what_was_looked_for(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"empty: nothing to read; there is no file there at all; attar reads \.jpg, \.png; name the folder"
    ):
        data.listing(str(tmp_path / "empty"), SUFFIXES)
    with pytest.raises(
        DataError, match=r"the 8 files there have other suffixes \(\.png 4, \.mov 2, \.jpg 1, \.txt 1\); attar reads \.webp"
    ):
        data.listing(str(tree), frozenset({".webp"}))
    with pytest.raises(DataError, match=r'quote the pattern, and use "\*\*/"'):
        data.listing(str(tree / "*.gif"), SUFFIXES)
    shutil.rmtree(tree)
    tree.mkdir()
    (tree / "shard.tar").touch()
    with pytest.raises(DataError, match=r"archives and Parquet files are read when you name them, for example '.*tree/\*\.tar'"):
        data.listing(str(tree), SUFFIXES)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".zip", ".parquet"])
def test_what_is_no_archive_is_refused_alone_and_set_aside_among_others(tree: Path, tmp_path: Path, suffix: str) -> None:
    broken = tmp_path / f"broken{suffix}"
    broken.write_bytes(b"this is no archive at all" * 100)
    with pytest.raises(DataError, match=rf"broken{suffix}: not a readable .*; copy it again from its source"):
        data.listing(str(broken), SUFFIXES)
    (tmp_path / "list.txt").write_text(f"tree/b.png\nbroken{suffix}\n")
    entries, problems = data.listing(str(tmp_path / "list.txt"), SUFFIXES)
    assert [entry.path for entry in entries] == ["tree/b.png"]
    assert problems[0].path == f"broken{suffix}"


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_truncated_tar_gives_what_it_still_holds(tree: Path, tmp_path: Path, suffix: str) -> None:
    (tree / "z.png").write_bytes(os.urandom(50_000))
    with tarfile.open(tmp_path / f"cut{suffix}", "w:gz" if "gz" in suffix else "w") as archive:
        for path in sorted(tree.glob("*.png")):
            archive.add(path, path.name)
    whole = (tmp_path / f"cut{suffix}").read_bytes()
    (tmp_path / f"cut{suffix}").write_bytes(whole[:30_000])
    entries, problems = data.listing(str(tmp_path / f"cut{suffix}"), SUFFIXES)
    assert entries[0].path == f"cut{suffix}::b.png"
    assert len(problems) == 1
    assert "damaged" in problems[0].reason
    with data.Reader(str(tmp_path / f"cut{suffix}")) as reader:
        assert reader.read(entries[0].path) == b"b.png"
        for entry in entries[1:]:
            with pytest.raises(Unreadable, match="the archive ends inside this member"):
                reader.read(entry.path)


def test_a_damaged_header_inside_a_tar_is_noticed(tree: Path, tmp_path: Path) -> None:
    target = pack(tree, tmp_path / "shard.tar")
    whole = bytearray(target.read_bytes())
    with tarfile.open(target) as archive:
        middle = archive.getmembers()[5].offset
    whole[middle : middle + 100] = b"\xff" * 100
    target.write_bytes(whole)
    _, problems = data.listing(str(target), SUFFIXES)
    assert [problem.path for problem in problems] == ["shard.tar"]
    assert "a header is damaged" in problems[0].reason


def test_links_and_special_members_of_a_tar(tmp_path: Path) -> None:
    def member(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        return info

    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        info = tarfile.TarInfo("d/a.png")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
        archive.addfile(member("hard.png", tarfile.LNKTYPE, "d/a.png"))
        archive.addfile(member("d/soft.png", tarfile.SYMTYPE, "a.png"))
        archive.addfile(member("lost.png", tarfile.SYMTYPE, "../../etc/passwd"))
        archive.addfile(member("pipe.png", tarfile.FIFOTYPE))
        archive.addfile(member("__MACOSX/._a.png", tarfile.REGTYPE))
    entries, problems = data.listing(str(tmp_path / "t.tar"), SUFFIXES)
    assert [entry.path.split("::")[1] for entry in entries] == ["d/a.png", "d/soft.png", "hard.png"]
    assert [problem.path.split("::")[1] for problem in problems] == ["lost.png", "pipe.png"]
    with data.Reader(str(tmp_path / "t.tar")) as reader:
        assert {reader.read(entry.path) for entry in entries} == {b"abc"}


def test_a_damaged_member_of_a_zip_is_refused_by_its_checksum(tree: Path, tmp_path: Path) -> None:
    target = pack(tree, tmp_path / "shard.zip")
    whole = target.read_bytes()
    target.write_bytes(whole.replace(b"b.pngb.png", b"b.pngX.png"))
    with data.Reader(str(target)) as reader, pytest.raises(Unreadable, match=r"damaged in the archive \(Bad CRC-32"):
        reader.read("shard.zip::b.png")


def test_parquet_without_image_bytes_lists_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1], "b": ["x"]}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"no column with image bytes; the columns are a \(int64\), b \(string\)"):
        data.listing(str(tmp_path / "p.parquet"), SUFFIXES)
    pq.write_table(pa.table({"image": pa.array([None, b"x"])}), tmp_path / "p.parquet")
    with data.Reader(str(tmp_path / "p.parquet")) as reader:
        assert reader.read("p.parquet::1") == b"x"
        with pytest.raises(Unreadable, match="the row holds no bytes"):
            reader.read("p.parquet::0")


def test_a_damaged_row_group_does_not_spoil_the_others(tmp_path: Path) -> None:
    values = [os.urandom(200) for _ in range(40)]
    target = tmp_path / "p.parquet"
    pq.write_table(pa.table({"image": values}), target, row_group_size=20, compression="zstd", use_dictionary=False)
    chunk = pq.ParquetFile(target).metadata.row_group(1).column(0)
    whole = bytearray(target.read_bytes())
    whole[chunk.data_page_offset : chunk.data_page_offset + 60] = b"\xff" * 60
    target.write_bytes(whole)
    with data.Reader(str(target)) as reader:
        assert [reader.read(f"p.parquet::{row}") for row in range(20)] == values[:20]
        with pytest.raises(Unreadable, match="row group 1 of the Parquet file is damaged"):
            reader.read("p.parquet::25")


def test_reading_what_vanished(tree: Path, tmp_path: Path) -> None:
    with data.Reader(str(tree)) as reader, pytest.raises(Unreadable, match=r"cannot be opened \(No such file or directory\); put it back"):
        reader.read("gone.png")
    pack(tree, tmp_path / "shard.tar")
    with data.Reader(str(tmp_path / "shard.tar")) as reader, pytest.raises(Unreadable, match=r"shard\.tar no longer holds it"):
        reader.read("shard.tar::gone.png")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read(tree: Path) -> None:
    (tree / "b.png").chmod(0)
    (tree / "sub").chmod(0)
    _, problems = data.listing(str(tree), SUFFIXES)
    assert [(problem.path, problem.reason) for problem in problems] == [("sub", "folder cannot be read (Permission denied)")]
    with data.Reader(str(tree)) as reader, pytest.raises(Unreadable, match=r"cannot be opened \(Permission denied\); make it readable"):
        reader.read("b.png")
    (tree / "sub").chmod(0o755)


def test_fingerprint_changes_with_what_is_read_and_only_with_that(tree: Path, tmp_path: Path) -> None:
    seen = [data.fingerprint(str(tree), SUFFIXES)]
    assert data.fingerprint(str(tree), SUFFIXES) == seen[0]
    (tree / "more notes.txt").write_text("not an item")
    assert data.fingerprint(str(tree), SUFFIXES) == seen[0]
    for change in (
        lambda: (tree / "b.png").write_bytes(b"longer than before"),
        lambda: os.utime(tree / "b.png", ns=(1, 1)),
        lambda: (tree / "b.png").rename(tree / "bb.png"),
        lambda: (tree / "dead.png").symlink_to("nowhere"),
        lambda: (tree / "sub/c.png").unlink(),
    ):
        change()
        seen.append(data.fingerprint(str(tree), SUFFIXES))
    assert len(set(seen)) == 6
    packed = pack(tree, tmp_path / "shard.tar")
    first = data.fingerprint(str(packed), SUFFIXES)
    os.utime(packed, ns=(1, 1))
    assert data.fingerprint(str(packed), SUFFIXES) != first


def test_fingerprint_is_cheap(tmp_path: Path) -> None:
    for folder in range(20):
        (tmp_path / str(folder)).mkdir()
        for name in range(100):
            os.close(os.open(tmp_path / str(folder) / f"{name}.png", os.O_CREAT))
    started = time.process_time()
    data.fingerprint(str(tmp_path), SUFFIXES)
    assert (time.process_time() - started) * 30 < 5  # seconds for 60,000 files at this rate; about 0.4 where it was written


def test_temporary_files_leave_nothing_behind(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    monkeypatch.setenv("TMPDIR", str(spool))
    monkeypatch.setattr("tempfile.tempdir", None)
    packed = pack(tree, tmp_path / "shard.tar.gz")
    reader = data.Reader(str(packed))
    assert reader.read("shard.tar.gz::b.png") == b"b.png"
    assert not list(spool.iterdir())  # unnamed while it is in use: a kill leaves nothing either
    reader.close()


def test_one_archive_is_opened_once_by_many_threads(tree: Path, tmp_path: Path) -> None:
    packed, gate = pack(tree, tmp_path / "shard.tar.gz"), threading.Barrier(8)
    with data.Reader(str(packed)) as reader, ThreadPoolExecutor(8) as pool:

        def read(_: int) -> bytes:
            gate.wait()
            return reader.read("shard.tar.gz::sub/deep/d.png")

        assert set(pool.map(read, range(8))) == {b"sub/deep/d.png"}


parts = st.lists(st.sampled_from(["a", "b", "ab", "c.png"]), min_size=1, max_size=4)
patterns = st.lists(st.sampled_from(["a", "*", "**", "?", "a*", "*.png"]), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(parts, patterns)
def test_a_folder_above_a_match_is_always_entered(path: list[str], pattern: list[str]) -> None:
    if data._matches(path, pattern):
        assert all(data._matches(path[:depth], pattern, above=True) for depth in range(len(path)))
