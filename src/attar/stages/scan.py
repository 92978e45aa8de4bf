"""scan: every item is found, checked by decoding it, hashed by content and put into a split; what is broken is set aside with the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from attar import config
from attar.data import Entry, Problem, Reader, Unreadable, absolute, listing, tally
from attar.data import fingerprint as data_fingerprint
from attar.errors import DataError
from attar.modalities import MODALITIES
from attar.records import ITEM_SCHEMA, QUARANTINE_SCHEMA, SPLITS, Items
from attar.workspace import Job

MODALITY = "image"
SHARD = 2048  # entries that are lost at most when a scan is interrupted
BLOCK = 32  # entries a thread takes at a time
FEWEST = 20  # distinct items below which neither clusters nor splits mean anything
FEWEST_IN_SPLIT = 8
# Encoded bytes per pixel no honest image exceeds (16-bit RGBA, uncompressed, and as much again), and the size that is always allowed.
BYTES_PER_PIXEL, FREE_BYTES = 16, 256 << 20

_CHECKED = [ITEM_SCHEMA.field(name) for name in ("path", "content", "bytes", "width", "height", "format", "note", "thumb")]
CHECKED_SCHEMA = pa.schema([*_CHECKED, QUARANTINE_SCHEMA.field("reason"), QUARANTINE_SCHEMA.field("remedy")])


def fingerprint(data: config.Data) -> str:
    """Changes when a file of the data was added, removed, or written."""
    return data_fingerprint(data.data, MODALITIES[MODALITY].SUFFIXES)


def scan(data: config.Data, job: Job) -> Items:
    """Finds, checks, hashes and splits every item of the data.

    Raises DataError when the data cannot be found, when nothing in it is readable, or when fewer than 20 distinct items are.
    """
    modality, others = MODALITIES[MODALITY], Counter[str]()
    entries, problems = listing(data.data, modality.SUFFIXES, others)
    shards = [entries[start : start + SHARD] for start in range(0, len(entries), SHARD)]
    limit = int(data.max_megapixels * 1e6)
    tables = []
    with Reader(data.data) as reader, job.progress(len(entries), "reading", f"{MODALITY}s") as bar:
        pool = ThreadPoolExecutor(job.workers, "attar-scan")
        try:
            for number, shard in enumerate(shards):
                tables.append(job.shard(number, partial(_check, shard, reader, modality, limit, pool, bar)))
                bar.update(sum(map(len, shards[: number + 1])) - bar.n)  # a shard kept from before counts as well
        finally:
            pool.shutdown(cancel_futures=True)
    checked = pa.concat_tables(tables or [CHECKED_SCHEMA.empty_table()])
    items = _assemble(absolute(data.data), checked, problems, data)
    _refuse_too_few(data.data, items)
    _summarise(items, others, job)
    return items


def _check(entries: Sequence[Entry], reader: Reader, modality: ModuleType, limit: int, pool: ThreadPoolExecutor, bar: tqdm) -> pa.Table:
    """One shard: what decoding each entry gave, schema CHECKED_SCHEMA; only the small rows are held, never the images."""

    def look(block: Sequence[Entry]) -> list[dict[str, Any]]:
        return [_examine(entry, reader, modality, limit) for entry in block]

    rows = []
    for part in pool.map(look, [entries[start : start + BLOCK] for start in range(0, len(entries), BLOCK)]):
        rows += part
        bar.update(len(part))
    return pa.Table.from_pylist(rows, CHECKED_SCHEMA)


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
    }


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
