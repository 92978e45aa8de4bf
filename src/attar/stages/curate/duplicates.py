"""The same picture twice in a folder, or in two: by content, encoded again or brighter, mirrored, or as a part of another. No model is needed.

Pictures are decoded once to a content hash and a 32 × 32 thumbnail (1 kB each, on disk). Every pair of thumbnails is compared (pairs.py), and
those that correlate are looked at in detail (likeness.py). Memory grows by about 2 kB per picture, however many pairs there are.
"""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from attar.data import Entry, Reader, Unreadable, absolute, listing
from attar.errors import DataError, UsageError
from attar.formats import read_json
from attar.modalities import image as modality
from attar.stages.curate.likeness import SIDE, WINDOWS, Window, coarse_patterns, has_pattern, likeness, patterns
from attar.stages.curate.pairs import Pairs, groups, similar_pairs
from attar.workspace import Job

KINDS = ("exact", "same", "mirrored", "part", "contains")
"""How one picture is like another, the closest first: equal pixels; the same view; its mirror image; a part of the other, or the reverse."""
EXACT, SAME, MIRRORED, PART_OF, CONTAINS = range(len(KINDS))
ALIKE = 0.85  # of likeness(): planted copies stay above 0.92, nearly all other pairs that correlate below 0.7
CORRELATED = 0.94  # of 16 × 16 thumbnails, what is looked at in detail: a copy darkened by 40 % reaches 0.97
ROUGHLY = 0.88  # of the coarse patterns of a part and the nearest of WINDOWS: 97 % of parts of 0.7 to 0.95 of the sides
WHOLLY = 0.98  # scale above which a window is the whole picture
BLOCK = 2048  # pictures or pairs converted at once
WHOLE = Window(0.0, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Search:
    """What counts as the same picture."""

    likeness: float = ALIKE
    """Smallest likeness, −1 to 1."""
    mirrored: bool = True
    """Whether mirror images count."""
    parts: bool = False
    """Whether a part of a picture, of 0.7 to 0.95 of its sides, counts; takes about 50 times as many comparisons."""

    def __post_init__(self) -> None:
        if not 0.5 <= self.likeness <= 1:
            raise UsageError(f"likeness: {self.likeness}; expected 0.5 to 1")


class Pictures(NamedTuple):
    """What was read of some pictures."""

    paths: list[str]
    content: np.ndarray  # (n,) hash of the pixels, as S32
    size: np.ndarray  # (n, 3) width, height, bytes
    thumbs: np.ndarray  # (n, 32, 32) uint8, mapped from a file
    broken: int  # that could not be read


class Match(NamedTuple):
    """Each picture's closest other: rows, −1 for none."""

    other: np.ndarray  # (n,)
    kind: np.ndarray  # (n,) number in KINDS; len(KINDS) for none
    score: np.ndarray  # (n,) likeness; 1 for equal pixels


def data_of(source: str | Path) -> str:
    """The data of a run folder, or the data themselves (folder, glob, list file, archive, Parquet file)."""
    marker = Path(source) / "run.json"
    return str(read_json(marker)["data"]) if marker.is_file() else absolute(str(source))


def read(data: str, home: Path, max_pixels: int, job: Job) -> Pictures:
    """Every picture of the data that can be read. Raises DataError when the data cannot be found or nothing in them can be read."""
    entries, problems = listing(data, modality.SUFFIXES)
    rows: list[tuple[str, bytes, tuple[int, int, int]]] = []

    def look(part: Sequence[Entry]) -> list[tuple[str, bytes, tuple[int, int, int], bytes] | None]:
        return [_look(entry, reader, max_pixels) for entry in part]

    with (
        Reader(data) as reader,
        ThreadPoolExecutor(job.workers, "attar-read") as pool,
        (home / "thumbs").open("wb") as stream,
        job.progress(len(entries), f"reading {Path(data).name}") as bar,
    ):
        for start in range(0, len(entries), BLOCK):  # so that no more than a block waits
            block = entries[start : start + BLOCK]
            for part in pool.map(look, [block[at : at + 32] for at in range(0, len(block), 32)]):
                for row in filter(None, part):
                    rows.append(row[:3])
                    stream.write(row[3])
                bar.update(len(part))
    if not rows:
        raise DataError(f"{data}: none of its {len(entries) + len(problems)} pictures can be read; see what attar scan says of them")
    thumbs = np.memmap(home / "thumbs", np.uint8, "r").reshape(-1, SIDE, SIDE)
    paths, content, size = zip(*rows)
    return Pictures(list(paths), np.array(content), np.array(size, np.int64), thumbs, len(entries) + len(problems) - len(rows))


def _look(entry: Entry, reader: Reader, max_pixels: int) -> tuple[str, bytes, tuple[int, int, int], bytes] | None:
    try:
        data = reader.read(entry.path)
        picture, _ = modality.decode(data, max_pixels=max_pixels, name=entry.path)
    except Unreadable:
        return None
    grey = picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX).tobytes()
    return entry.path, modality.content_hash(picture).encode(), (*picture.size, len(data)), grey


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, start + BLOCK) for start in range(0, count, BLOCK))


def _described(thumbs: np.ndarray, rows: np.ndarray, window: Window | None = None, mirrored: bool = False) -> np.ndarray:
    """Patterns of some thumbnails as float16, coarse ones where a window is named."""
    made = []
    for block in _blocks(len(rows)):
        some = thumbs[rows[block]]
        some = some[:, :, ::-1] if mirrored else some
        made.append((patterns(some) if window is None else coarse_patterns(some, window)).astype(np.float16))
    return np.concatenate(made)


def _alike(found: Pairs, a: np.ndarray, b: np.ndarray, window: Window, search: Search, mirrored: bool = False) -> Pairs:
    """Those of some pairs of thumbnails that are alike in detail, with that likeness in place of the cosine."""
    score, scale = np.empty(len(found.left), np.float32), np.empty(len(found.left), np.float32)
    for block in _blocks(len(score)):
        whole = b[found.right[block]]
        whole = whole[:, :, ::-1] if mirrored else whole
        score[block], scale[block] = likeness(a[found.left[block]], whole, window, search=window.scale < 1)
    good = score >= search.likeness
    if window.scale < 1:
        good &= scale < WHOLLY
    return Pairs(found.left[good], found.right[good], score[good])


def links(a: Pictures, b: Pictures | None, search: Search, job: Job) -> Iterator[tuple[int, Pairs]]:
    """Pairs that are alike with the number of their kind: within one set (each once), or of a (left) and b (right); closest kinds first."""
    other = a if b is None else b
    yield EXACT, _equal(a, b)
    rows = _to_compare(a)
    columns = rows if b is None else _to_compare(b)
    if not len(rows) or not len(columns):
        return
    with job.progress(1 + search.mirrored + search.parts * len(WINDOWS) * (1 if b is None else 2), "comparing", "passes") as bar:
        own = _described(a.thumbs, rows)
        against = None if b is None else _described(b.thumbs, columns)
        for found in similar_pairs(own, CORRELATED, against, workers=job.workers):
            yield SAME, _alike(Pairs(rows[found.left], columns[found.right], found.cosine), a.thumbs, other.thumbs, WHOLE, search)
        bar.update()
        if search.mirrored:
            for found in similar_pairs(own, CORRELATED, _described(other.thumbs, columns, mirrored=True), workers=job.workers):
                once = found.left < found.right if b is None else slice(None)
                pairs = Pairs(rows[found.left[once]], columns[found.right[once]], found.cosine[once])
                yield MIRRORED, _alike(pairs, a.thumbs, other.thumbs, WHOLE, search, mirrored=True)
            bar.update()
        del own, against
        if search.parts:
            yield from ((PART_OF, pairs) for pairs in _parts(a, other, rows, columns, b is None, search, job, bar))
        if search.parts and b is not None:
            for pairs in _parts(b, a, columns, rows, False, search, job, bar):
                yield CONTAINS, Pairs(pairs.right, pairs.left, pairs.cosine)


def _parts(
    a: Pictures, b: Pictures, rows: np.ndarray, columns: np.ndarray, within: bool, search: Search, job: Job, bar: Any
) -> Iterator[Pairs]:
    """Pairs whose left picture is a part of the right one."""
    own = _described(a.thumbs, rows, WHOLE)
    for window in WINDOWS:
        for found in similar_pairs(own, ROUGHLY, _described(b.thumbs, columns, window), workers=job.workers):
            apart = found.left != found.right if within else slice(None)
            pairs = Pairs(rows[found.left[apart]], columns[found.right[apart]], found.cosine[apart])
            yield _alike(pairs, a.thumbs, b.thumbs, window, search)
        bar.update()


def _to_compare(pictures: Pictures) -> np.ndarray:
    """Rows of one picture of each content that is not blank."""
    rows = np.sort(np.unique(pictures.content, return_index=True)[1])
    return rows[np.concatenate([has_pattern(pictures.thumbs[rows[block]]) for block in _blocks(len(rows))])]


def _equal(a: Pictures, b: Pictures | None) -> Pairs:
    """Equal pixels: each with the first picture of that content."""
    content, first = np.unique((b or a).content, return_index=True)
    place = np.searchsorted(content, a.content).clip(0, len(content) - 1)
    equal = content[place] == a.content
    left, right = np.flatnonzero(equal), first[place[equal]]
    if b is None:
        left, right = left[right != left], right[right != left]
        left, right = right, left
    return Pairs(left, right, np.ones(len(left), np.float32))


def _note(match: Match, rows: np.ndarray, others: np.ndarray, scores: np.ndarray, kind: int) -> None:
    """Keeps the closest: the kind that comes first, then the highest likeness, then the lowest row."""
    order = np.lexsort((others, -scores, rows))
    rows, first = np.unique(rows[order], return_index=True)
    others, scores = others[order][first], scores[order][first]
    better = (kind < match.kind[rows]) | ((kind == match.kind[rows]) & (scores > match.score[rows]))
    match.other[rows[better]], match.score[rows[better]], match.kind[rows[better]] = others[better], scores[better], kind


def _no_match(count: int) -> Match:
    return Match(np.full(count, -1), np.full(count, len(KINDS), np.int8), np.zeros(count, np.float32))


def duplicates(
    source: str | Path, search: Search, *, table: str | Path | None = None, workers: int, max_megapixels: float, quiet: bool
) -> list[dict[str, Any]]:
    """Groups of pictures that are the same, one row per picture of a group; see attar.duplicates.

    Groups are connected: what is like one of a group belongs to it. The picture to keep is the one of most pixels, then most bytes.
    """
    _refuse_existing(table)
    with tempfile.TemporaryDirectory(prefix="attar-") as home:
        job = Job("duplicates", Path(home) / "job", workers=workers, quiet=quiet)
        found = read(data_of(source), Path(home), int(max_megapixels * 1e6), job)
        match, count = _no_match(len(found.paths)), len(found.paths)

        def noted() -> Iterator[Pairs]:
            for kind, pairs in links(found, None, search, job):
                _note(match, pairs.left, pairs.right, pairs.cosine, kind)
                _note(match, pairs.right, pairs.left, pairs.cosine, CONTAINS if kind == PART_OF else kind)
                yield pairs

        best = np.lexsort((np.arange(count), -found.size[:, 2], -found.size[:, 0] * found.size[:, 1]))
        rank = np.empty(count)
        rank[best] = np.arange(count)
        rows = _grouped(found, groups(count, noted(), -rank), match, rank)
        copies = [row for row in rows if not row["keep"]]
        job.say(f"{len(copies)} of {count} pictures are copies of {len(rows) - len(copies)} others{_tally(copies)}{_aside(found)}")
    _write_csv(table, rows, ("group", "path", "keep", "kind", "of", "likeness", "width", "height", "bytes"))
    return rows


def _grouped(found: Pictures, keeper: np.ndarray, match: Match, rank: np.ndarray) -> list[dict[str, Any]]:
    members = np.flatnonzero(np.bincount(keeper, minlength=len(keeper))[keeper] > 1)
    members = members[np.lexsort((rank[members], keeper[members]))]
    number = np.unique(keeper[members], return_inverse=True)[1]
    rows = []
    for row, group in zip(members.tolist(), number.tolist()):
        width, height, size = found.size[row].tolist()
        about = {"group": group, "path": found.paths[row], "keep": bool(keeper[row] == row), "kind": KINDS[match.kind[row]]}
        about |= {"of": found.paths[match.other[row]], "likeness": round(float(match.score[row]), 4)}
        rows.append(about | {"width": width, "height": height, "bytes": size})
    return rows


def leaks(
    source: str | Path,
    against: str | Path,
    search: Search,
    *,
    table: str | Path | None = None,
    workers: int,
    max_megapixels: float,
    quiet: bool,
) -> list[dict[str, Any]]:
    """Pictures of one data set that are in another, one row each with the closest picture there; see attar.leaks."""
    _refuse_existing(table)
    with tempfile.TemporaryDirectory(prefix="attar-") as home:
        job = Job("leaks", Path(home) / "job", workers=workers, quiet=quiet)
        pictures = []
        for name, data in (("a", data_of(source)), ("b", data_of(against))):
            (Path(home) / name).mkdir()
            pictures.append(read(data, Path(home) / name, int(max_megapixels * 1e6), job))
        a, b = pictures
        match = _no_match(len(a.paths))
        for kind, pairs in links(a, b, search, job):
            _note(match, pairs.left, pairs.right, pairs.cosine, kind)
        rows = []
        for row in np.flatnonzero(match.other >= 0).tolist():
            about = {"path": a.paths[row], "kind": KINDS[match.kind[row]], "of": b.paths[match.other[row]]}
            rows.append(about | {"likeness": round(float(match.score[row]), 4)})
        job.say(f"{len(rows)} of {len(a.paths)} pictures of {source} are in {against}{_tally(rows)}{_aside(a, b)}")
    _write_csv(table, rows, ("path", "kind", "of", "likeness"))
    return rows


def _tally(rows: Sequence[dict[str, Any]]) -> str:
    counts = [f"{n} {kind}" for kind in KINDS if (n := sum(row["kind"] == kind for row in rows))]
    return f": {', '.join(counts)}" if counts else ""


def _aside(*pictures: Pictures) -> str:
    broken = sum(some.broken for some in pictures)
    return f"; {broken} could not be read" if broken else ""


def _refuse_existing(table: str | Path | None) -> None:
    if table is not None and Path(table).exists():
        raise UsageError(f"{table}: exists already and is not touched; name another file")


def _write_csv(table: str | Path | None, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    if table is not None:
        with Path(table).open("x", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(rows)
