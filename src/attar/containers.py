"""Files that hold many items: tar, zip and Parquet, each read at random access from any thread.

A container gives `sizes()` (member and bytes), `faults` (member and reason; "" for the container itself), `read(member)` and `close()`.
"""

from __future__ import annotations

import bisect
import gzip
import os
import posixpath
import tarfile
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from attar.errors import DataError

COPY_AGAIN = "copy it again from its source, or delete it"
COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "content", "data")  # likely names of a column of encoded items


class Unreadable(DataError):
    """One item that cannot be used: `reason` says why, `remedy` what a person can do; scan sets such items aside."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason, self.remedy = reason, remedy


class Container(Protocol):
    suffixed: bool
    """Whether members have names with a suffix."""
    faults: list[tuple[str, str]]

    def sizes(self) -> Iterator[tuple[str, int]]: ...
    def read(self, name: str) -> bytes: ...
    def close(self) -> None: ...


def _spool() -> IO[bytes]:
    """An unnamed temporary file: gone when closed, even by a kill. /var/tmp because /tmp may lie in memory."""
    folder = None if os.environ.get("TMPDIR") or not os.access("/var/tmp", os.W_OK) else "/var/tmp"
    return tempfile.TemporaryFile(dir=folder)


def _spill(spool: IO[bytes], block: bytes, path: str) -> None:
    try:
        spool.write(block)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be unpacked to a temporary file ({error.strerror}); free some space or name another folder with TMPDIR"
        ) from None


class Tar:
    """A tar file read at random access; a compressed one is first unpacked to a temporary file, since gzip cannot seek."""

    suffixed = True

    def __init__(self, path: str) -> None:
        self.faults: list[tuple[str, str]] = []
        self._index: dict[str, tuple[int, int]] = {}
        try:
            self._file: IO[bytes] = open(path, "rb")  # noqa: SIM115  # stays open until close()
        except OSError as error:
            raise Unreadable(f"archive cannot be opened ({error.strerror})", "make it readable") from None
        if self._file.read(2) == b"\x1f\x8b":
            self._unpack(path)
        try:
            self._file.seek(0)
            with tarfile.open(fileobj=self._file, mode="r:") as archive:
                while member := archive.next():
                    archive.members.clear()  # type: ignore[attr-defined]  # or the headers of all members stay in memory
                    self._add(member)
                # tarfile takes a damaged header for the end of the archive
                if os.pread(self._file.fileno(), 512, archive.offset).strip(b"\0"):  # type: ignore[attr-defined]
                    raise tarfile.ReadError("a header is damaged")
        except (tarfile.TarError, OSError, EOFError) as error:
            known = next((reason for name, reason in self.faults if not name), "")  # of the compression around it
            if not self._index:
                self.close()
                raise Unreadable(known or f"not a readable tar archive ({error})", COPY_AGAIN) from None
            if not known:
                self.faults.append(("", f"archive is damaged after {len(self._index)} members ({error})"))

    def _unpack(self, path: str) -> None:
        packed, self._file = self._file, _spool()
        packed.seek(0)
        try:
            with packed, gzip.open(packed) as stream:
                while block := stream.read1(1 << 17):  # read() would drop what precedes the damage
                    _spill(self._file, block, path)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            self.faults.append(("", f"archive is truncated or damaged ({error})"))

    def _add(self, member: tarfile.TarInfo) -> None:
        name = posixpath.normpath(member.name)
        if member.isreg() and not member.issparse():
            self._index[name] = (member.offset_data, member.size)
        elif member.islnk() or member.issym():
            target = member.linkname if member.islnk() else posixpath.join(posixpath.dirname(name), member.linkname)
            if found := self._index.get(posixpath.normpath(target)):
                self._index[name] = found
            else:
                self.faults.append((name, f"link to {member.linkname}, which the archive does not hold before it"))
        elif not member.isdir():
            self.faults.append((name, "is a special file, not a regular one"))

    def sizes(self) -> Iterator[tuple[str, int]]:
        return ((name, size) for name, (_, size) in self._index.items())

    def read(self, name: str) -> bytes:
        offset, size = self._index[name]
        block = os.pread(self._file.fileno(), size, offset)
        if len(block) < size:
            raise Unreadable("the archive ends inside this member", COPY_AGAIN)
        return block

    def close(self) -> None:
        self._file.close()


class Zip:
    """A zip file; one lock, because members share the file's position."""

    suffixed = True

    def __init__(self, path: str) -> None:
        self.faults: list[tuple[str, str]] = []
        self._lock = threading.Lock()
        try:
            self._archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
            raise Unreadable(f"not a readable zip archive ({error})", COPY_AGAIN) from None
        self._index = {posixpath.normpath(info.filename): info for info in self._archive.infolist() if not info.is_dir()}

    def sizes(self) -> Iterator[tuple[str, int]]:
        return ((name, info.file_size) for name, info in self._index.items())

    def read(self, name: str) -> bytes:
        info = self._index[name]
        if info.flag_bits & 1:
            raise Unreadable("is encrypted", "unpack the archive with its password, then name the folder")
        try:
            with self._lock:
                return self._archive.read(info)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, OSError, RuntimeError) as error:
            raise Unreadable(f"damaged in the archive ({error})", COPY_AGAIN) from None

    def close(self) -> None:
        self._archive.close()


class Parquet:
    """Image bytes in a Parquet column; each row group is decoded once, in batches, into a temporary file that rows are read from."""

    suffixed = False

    def __init__(self, path: str) -> None:
        self.faults: list[tuple[str, str]] = []
        self._path, self._lock = path, threading.Lock()
        try:
            self._file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise Unreadable(f"not a readable Parquet file ({error})", COPY_AGAIN) from None
        self._column = bytes_column(self._file.schema_arrow)
        meta = self._file.metadata
        self._starts = np.cumsum([0, *(meta.row_group(group).num_rows for group in range(meta.num_row_groups))])
        self._spool: IO[bytes] | None = None
        self._groups: dict[int, np.ndarray | str] = {}  # group → (rows, 2) offset and size, size −1 for null; or why it is unreadable

    def sizes(self) -> Iterator[tuple[str, int]]:
        return ((str(row), 0) for row in range(self._starts[-1]))

    def _load(self, group: int) -> np.ndarray | str:
        spans: list[tuple[int, int]] = []
        self._spool = self._spool or _spool()
        end = self._spool.seek(0, os.SEEK_END)
        try:
            for batch in self._file.iter_batches(batch_size=64, row_groups=[group], columns=[self._column]):
                values: Any = batch.column(0)
                for value in values.field("bytes") if pa.types.is_struct(values.type) else values:
                    block = value.as_py()
                    _spill(self._spool, block or b"", self._path)
                    spans.append((end, -1 if block is None else len(block)))
                    end += len(block or b"")
        except (pa.ArrowException, OSError) as error:
            return f"row group {group} of the Parquet file is damaged ({error})"
        self._spool.flush()
        return np.array(spans, np.int64).reshape(-1, 2)

    def read(self, name: str) -> bytes:
        row = int(name)
        group = bisect.bisect_right(self._starts, row) - 1
        with self._lock:
            if group not in self._groups:
                self._groups[group] = self._load(group)
            spans = self._groups[group]
        if isinstance(spans, str):
            raise Unreadable(spans, COPY_AGAIN)
        offset, size = spans[row - self._starts[group]]
        if size < 0:
            raise Unreadable("the row holds no bytes", "fill it, or drop the row")
        return os.pread(self._spool.fileno(), size, offset)  # type: ignore[union-attr]

    def close(self) -> None:
        self._file.close()
        if self._spool:
            self._spool.close()


def bytes_column(schema: pa.Schema) -> str:
    """The column with encoded bytes: a binary one, or the Hugging Face struct {bytes, path}; the likeliest name when there are several."""
    found = {}
    for column in schema:
        held, name = column.type, column.name
        if pa.types.is_struct(held) and (at := held.get_field_index("bytes")) >= 0:
            held, name = held.field(at).type, f"{column.name}.bytes"
        if pa.types.is_binary(held) or pa.types.is_large_binary(held):
            found[column.name] = name
    if not found:
        columns = ", ".join(f"{column.name} ({column.type})" for column in schema)
        raise Unreadable(f"no column with image bytes; the columns are {columns}", "write the encoded images into a column of type binary")
    ranked = sorted(found, key=lambda name: COLUMNS.index(name.lower()) if name.lower() in COLUMNS else len(COLUMNS))
    return found[ranked[0]]


CONTAINERS: dict[str, Callable[[str], Container]] = {
    ".tar": Tar,
    ".tar.gz": Tar,
    ".tgz": Tar,
    ".zip": Zip,
    ".parquet": Parquet,
}
