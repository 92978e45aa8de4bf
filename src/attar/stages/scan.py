"""scan: every item is found, checked by decoding it, hashed by content and put into a split; what is broken is set aside with the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from attar import __version__, config
from attar.data import Entry, Problem, Reader, Unreadable, absolute, listing, stamps, tally
from attar.data import fingerprint as data_fingerprint
from attar.errors import DataError
from attar.modalities import MODALITIES
from attar.records import ITEM_SCHEMA, QUARANTINE_SCHEMA, SPLITS, Items
from attar.scale.local import Tick
from attar.workspace import Job

MODALITY = "image"
SHARD = 2048  # entries that are lost at most when a scan is interrupted
BLOCK = 32  # entries a thread takes at a time
FEWEST = 20  # distinct items below which neither clusters nor splits mean anything
FEWEST_IN_SPLIT = 8
# Encoded bytes per pixel no honest image exceeds (16-bit RGBA, uncompressed, and as much again), and the size that is always allowed.
BYTES_PER_PIXEL, FREE_BYTES = 16, 256 << 20

_CHECKED = [ITEM_SCHEMA.field(name) for name in ("path", "content", "bytes", "width", "height", "format", "note", "thumb", "blur")]
CHECKED_SCHEMA = pa.schema([*_CHECKED, QUARANTINE_SCHEMA.field("reason"), QUARANTINE_SCHEMA.field("remedy")])


def fingerprint(data: config.Data) -> str:
    """Changes when a file of the data was added, removed, or written."""
    return data_fingerprint(data.data, MODALITIES[MODALITY].SUFFIXES)


def scan(data: config.Data, job: Job) -> Items:
    """Finds, checks, hashes and splits every item of the data.

    Raises DataError when the data cannot be found, when nothing in it is readable, or when fewer than 20 distinct items are.
    """
    others = Counter[str]()
    entries, problems = listing(data.data, MODALITIES[MODALITY].SUFFIXES, others)
    stamped = stamps(data.data, MODALITIES[MODALITY].SUFFIXES)
    known = job.once("known.parquet", lambda: checked_before(stamped, data, job))
    seen = set(known["path"].to_pylist())
    fresh = [entry for entry in entries if entry.path not in seen]
    parts = [fresh[start : start + SHARD] for start in range(0, len(fresh), SHARD)]
    files = job.shards(Checking(data.data, int(data.max_megapixels * 1e6), BLOCK), parts, "reading", f"{MODALITY}s")
    checked = pa.concat_tables([known, *(pq.read_table(file) for file in files)]).sort_by("path")
    keep_checked(checked, stamped, data, job)
    if seen:
        job.say(f"{len(seen):,} files are as they were at the last scan and were not read again")
    items = _assemble(absolute(data.data), checked, problems, data)
    _refuse_too_few(data.data, items)
    _summarise(items, others, job)
    return items


@dataclass(frozen=True)
class Checking:
    """Work of an engine: what decoding some entries gives."""

    data: str
    limit: int
    """Pixels of the largest image that is decoded."""
    block: int
    """Entries a thread takes at a time."""

    @contextmanager
    def open(self, workers: int) -> Iterator[Callable[[Sequence[Entry], Tick], pa.Table]]:
        """The function of one shard, schema CHECKED_SCHEMA; only the small rows are held, never the images."""
        pool, modality = ThreadPoolExecutor(workers, "attar-scan"), MODALITIES[MODALITY]
        with Reader(self.data) as reader:

            def look(block: Sequence[Entry]) -> list[dict[str, Any]]:
                return [_examine(entry, reader, modality, self.limit) for entry in block]

            def check(entries: Sequence[Entry], tick: Tick) -> pa.Table:
                rows = []
                for part in pool.map(look, [entries[start : start + self.block] for start in range(0, len(entries), self.block)]):
                    rows += part
                    tick(len(part))
                return pa.Table.from_pylist(rows, CHECKED_SCHEMA)

            try:
                yield check
            finally:
                pool.shutdown(cancel_futures=True)


def _examine(entry: Entry, reader: Reader, modality: ModuleType, limit: int) -> dict[str, Any]:
    try:
        if entry.bytes > max(FREE_BYTES, BYTES_PER_PIXEL * limit):
            raise Unreadable(f"the file has {entry.bytes / 1e6:,.0f} MB, more than any {MODALITY} within max_megapixels", "leave it out")
        data = reader.read(entry.path)
        image, note = modality.decode(data, max_pixels=limit, name=entry.path)
    except Unreadable as error:
        return {"path": entry.path, "reason": error.reason, "remedy": error.remedy}
    return {
        "path": entry.path,
        "content": modality.content_hash(image),
        "bytes": len(data),
        "width": image.width,
        "height": image.height,
        "format": image.format,
        "note": note,
        "thumb": modality.thumbnail(image),
        "blur": modality.blur(image),
    }


def checked_before(stamped: Mapping[str, tuple[int, int]], data: config.Data, job: Job) -> pa.Table:
    """What the last scan found of files whose size and time of change are still the same, schema CHECKED_SCHEMA."""
    kept = job.kept("checked.parquet")
    if kept is None or kept.schema.names != [*CHECKED_SCHEMA.names, "size", "mtime", "limit", "attar"]:
        return CHECKED_SCHEMA.empty_table()
    rows = zip(*(kept[name].to_pylist() for name in ("path", "size", "mtime", "limit", "attar")))
    same = [
        stamped.get(path) == (size, time) and (limit, version) == (data.max_megapixels, __version__)
        for path, size, time, limit, version in rows
    ]
    return kept.select(CHECKED_SCHEMA.names).filter(pa.array(same, pa.bool_())).cast(CHECKED_SCHEMA)


def keep_checked(checked: pa.Table, stamped: Mapping[str, tuple[int, int]], data: config.Data, job: Job) -> None:
    """Keeps what was found with the size and time of change the file had before it was read."""
    stamp = [stamped.get(path, (-1, -1)) for path in checked["path"].to_pylist()]
    kept = checked.filter(pa.array([time >= 0 for _, time in stamp], pa.bool_()))
    columns = zip(*[one for one in stamp if one[1] >= 0]) if kept.num_rows else ((), ())
    for name, values in zip(("size", "mtime"), columns):
        kept = kept.append_column(name, pa.array(values, pa.int64()))
    kept = kept.append_column("limit", pa.array([data.max_megapixels] * kept.num_rows, pa.float64()))
    job.keep("checked.parquet", kept.append_column("attar", pa.array([__version__] * kept.num_rows, pa.string())))


def _assemble(root: str, checked: pa.Table, problems: Sequence[Problem], data: config.Data) -> Items:
    """The record, from what was checked (in the order of path) and what could not even be listed."""
    broken = np.asarray(checked["reason"].is_valid())
    good = checked.filter(pa.array(~broken))
    set_aside = [tuple(row.values()) for row in checked.filter(pa.array(broken)).select(QUARANTINE_SCHEMA.names).to_pylist()]
    rows = sorted({*set_aside, *(tuple(problem) for problem in problems)})
    columns: dict[str, Any] = {name: good[name] for name in good.column_names} | {
        "id": np.arange(len(good)),
        "modality": pa.array([MODALITY] * len(good), pa.string()),
        "frame_time": pa.nulls(len(good), pa.float64()),
        "split": pa.array(split_by_content(good["content"].to_pylist(), data.test_share, data.validation_share), pa.string()),
    }
    table = pa.table(columns).select(ITEM_SCHEMA.names).cast(ITEM_SCHEMA).combine_chunks()
    quarantine = pa.Table.from_pylist([dict(zip(QUARANTINE_SCHEMA.names, row)) for row in rows], QUARANTINE_SCHEMA)
    return Items(root=root, table=table, quarantine=quarantine)


def split_by_content(contents: Sequence[str], test_share: float, validation_share: float) -> list[str]:
    """The split of each item from its content hash alone: u < test_share is test, below test_share + validation_share is validation.

    u = the first 8 bytes of the hash / 2^64, so that an item keeps its split when others come or go. Where a split would hold fewer
    than min(8, its share of the distinct contents) of them, or none, it takes those with the smallest hash from the next one
    (training: those with the largest); with 3 distinct contents or more every split has one. Equal contents are never parted.
    """
    unique = sorted(set(contents))
    n = len(unique)
    shares = (test_share, validation_share, 1 - test_share - validation_share)
    test, validation, train = (min(FEWEST_IN_SPLIT, max(1, int(n * share))) for share in shares)
    test = max(0, min(test, n - 2))
    validation = max(0, min(validation, n - test - 1))
    train = min(train, n - test - validation)
    u = np.array([int(content[:16], 16) / 2**64 for content in unique])
    first = min(max(int((u < test_share).sum()), test), n - validation - train)
    second = min(max(int((u < test_share + validation_share).sum()), first + validation), n - train)
    of = {content: SPLITS[2] if rank < first else SPLITS[1] if rank < second else SPLITS[0] for rank, content in enumerate(unique)}
    return [of[content] for content in contents]


def _reasons(items: Items) -> str:
    """The commonest reasons for setting files aside, each with one of the files."""
    reasons = items.quarantine["reason"].to_pylist()
    example = dict(zip(reversed(reasons), reversed(items.quarantine["path"].to_pylist())))
    common = sorted(Counter(reasons).items(), key=lambda pair: (-pair[1], pair[0]))[:3]
    return "; ".join(f"{count} × {reason} (such as {example[reason]})" for reason, count in common)


def _refuse_too_few(data: str, items: Items) -> None:
    read, distinct, aside = len(items), len(set(items.table["content"].to_pylist())), items.quarantine.num_rows
    if not read:
        raise DataError(f"{data}: none of the {aside} {MODALITY} files can be read: {_reasons(items)}")
    if distinct >= FEWEST:
        return
    if read == 1:
        found = f"only one {MODALITY} ({items.table['path'][0]})"
    elif distinct == 1:
        found = f"{read} {MODALITY}s that are all identical"
    else:
        found = f"only {distinct} distinct {MODALITY}s ({read} read)"
    broken = f"; {aside} more could not be read: {_reasons(items)}" if aside else ""
    raise DataError(f"{data}: holds {found}; attar learns from at least {FEWEST} distinct {MODALITY}s: add some{broken}")


def _summarise(items: Items, others: Counter[str], job: Job) -> None:
    splits = Counter(items.table["split"].to_pylist())
    copies = len(items) - len(set(items.table["content"].to_pylist()))
    parts = [
        f"{len(items):,} {MODALITY}s read",
        f"{copies:,} of them exact duplicates" if copies else "",
        f"{items.quarantine.num_rows:,} files set aside ({_reasons(items)})" if items.quarantine.num_rows else "none set aside",
        ", ".join(f"{splits[split]:,} {split}" for split in SPLITS),
        f"other kinds of file passed over: {tally(others)}" if others else "",
    ]
    job.say("; ".join(part for part in parts if part))
