"""Labels to judge with, read for evaluate and for nothing else: from a .csv or from the names of the items' folders."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from attar.config import Evaluate
from attar.errors import DataError, UsageError
from attar.records import Items
from attar.workspace import file_digest


def fingerprint(settings: Evaluate) -> str | None:
    """Changes when the labels file was written; None where there is no file."""
    path = Path(settings.labels or "")
    return file_digest(path) if path.is_file() else None


def read_labels(items: Items, source: str) -> tuple[np.ndarray, list[str]]:
    """Label of every item by id, (n,) strings, "" where it has none; and how well they matched, in words.

    `source` is "folders" (the name of the folder an item lies in) or a .csv with the columns path and label; a path is
    the item's own, its file name where only one item has it, or absolute. Raises UsageError when there is no such
    file, DataError naming file and line when it cannot be understood or none of it matches.
    """
    paths = items.column("path")
    if source == "folders":
        labels = np.array([PurePosixPath(path.rpartition("::")[2]).parent.name for path in paths], object)
        if not np.any(labels):
            raise DataError(f"labels: folders: no item lies in a folder of its own (for example {paths[0]}); name a .csv with path,label")
        return labels, [f"Labels are the names of the items' folders: {np.count_nonzero(labels)} of {len(paths)} items lie in one."]
    labels, lines = np.full(len(paths), "", object), np.zeros(len(paths), np.int64)
    find, missed, rows = _finder(items), [], 0
    for line, path, label in _csv_rows(source):
        rows += 1
        if (at := find(path)) is None:
            missed.append(f"{path} (line {line})")
        elif labels[at] not in ("", label):
            raise DataError(f"{source}, line {line}: {path} is {label!r}, but line {lines[at]} calls it {labels[at]!r}; keep one of them")
        else:
            labels[at], lines[at] = label, line
    if not np.any(labels):
        raise DataError(
            f"{source}: none of its {rows} rows matches an item; the first path is {next(iter(missed), 'missing')}, an item's is {paths[0]}; "
            "write paths relative to the data, file names that occur once, or absolute paths"
        )
    notes = [f"Labels from {source}: {rows} rows, {np.count_nonzero(labels)} of {len(paths)} items matched."]
    if missed:
        notes.append(f"{len(missed)} rows of {source} match no item, or several of that name, for example {missed[0]}.")
    return labels, notes


def _finder(items: Items) -> Callable[[str], int | None]:
    """path → id by an item's path, absolute path or file name; None for an unknown path and for a name that occurs twice."""
    root, paths = items.root, items.column("path")
    base = root if os.path.isdir(root) else os.path.dirname(re.split(r"[*?[]", root)[0])
    by_path = {path: number for number, path in enumerate(paths)}
    by_name: dict[str, int | None] = {}
    for number, path in enumerate(paths):
        name = PurePosixPath(path.rpartition("::")[2]).name
        by_name[name] = None if name in by_name else number

    def find(path: str) -> int | None:
        for known in (path, os.path.relpath(path, base) if os.path.isabs(path) else os.path.normpath(path)):
            if known in by_path:
                return by_path[known]
        return by_name.get(os.path.basename(path))

    return find


def _csv_rows(source: str) -> Iterator[tuple[int, str, str]]:
    """Line, path and label of every row of a .csv."""
    if not Path(source).is_file():
        raise UsageError(f'labels: {source}: no such file; name a .csv with the columns path,label, or write "folders"')
    try:
        with open(source, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            if not {"path", "label"} <= set(reader.fieldnames or ()):
                raise DataError(f"{source}, line 1: the columns are {','.join(reader.fieldnames or ['none'])}; expected path,label")
            for row in reader:
                path, label = (row["path"] or "").strip(), (row["label"] or "").strip()
                if not path or not label:
                    missing = "label" if path else "path"
                    raise DataError(f"{source}, line {reader.line_num}: no {missing}; expected path,label; complete or delete the line")
                yield reader.line_num, path, label
    except OSError as error:
        raise UsageError(f"labels: {source}: cannot be read ({error.strerror}); make it readable") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{source}: is not a readable UTF-8 .csv ({error}); save it as UTF-8 with the columns path,label") from None
