"""Locating and reading items, whatever their modality: folders, globs, list files, archives and Parquet files.

Paths are relative to the data's base folder; members of a container are "shard.tar::member.jpg" or "part.parquet::17".
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import glob
import hashlib
import heapq
import json
import os
import re
import stat
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import NamedTuple

from attar.containers import CONTAINERS, COPY_AGAIN, Container, Unreadable
from attar.errors import DataError

KINDS = {stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device", stat.S_IFDIR: "folder"}


class Entry(NamedTuple):
    path: str
    bytes: int  # of the encoded file; 0 where the container does not tell (Parquet)


class Problem(NamedTuple):
    path: str
    reason: str
    remedy: str


class _Found(NamedTuple):
    path: str
    bytes: int = 0
    mtime: int = 0  # nanoseconds
    reason: str = ""  # why it cannot be used; empty when it can
    remedy: str = ""


class _Source(NamedTuple):
    kind: str  # "folder", "glob", "list" or "file"
    base: str  # the folder that paths are relative to
    pattern: str  # what is left of the data under it: glob pattern or file name


def absolute(data: str) -> str:
    """The data as named by the user, made absolute; "~" is the home folder, a glob stays a glob."""
    return os.path.abspath(os.path.expanduser(data))


def _suffix(name: str) -> str:
    suffix = os.path.splitext(name)[1].lower()
    return ".tar.gz" if suffix == ".gz" and name.lower().endswith(".tar.gz") else suffix


def _locate(data: str) -> _Source:
    """What kind of source the data is and where it lies; raises DataError when there is nothing of that name."""
    path = absolute(data)
    base, name = os.path.split(path)
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if glob.has_magic(path):
            fixed = path[: re.search(r"[*?[]", path).start()].rpartition("/")[0] or "/"  # type: ignore[union-attr]
            if os.path.isdir(fixed):
                return _Source("glob", fixed, os.path.relpath(path, fixed))
        raise DataError(_missing(data, path, error)) from None
    if stat.S_ISDIR(mode):
        return _Source("folder", path, "")
    if not stat.S_ISREG(mode):
        raise DataError(f"{data}: is a {KINDS.get(stat.S_IFMT(mode), 'special file')}, not a file or folder; name a folder of images")
    return _Source("list" if _suffix(name) == ".txt" else "file", base, name)


def _missing(data: str, path: str, error: OSError) -> str:
    base, name = os.path.split(path)
    near: list[str] = []
    with contextlib.suppress(OSError):
        near = difflib.get_close_matches(name, os.listdir(base), 3)
    hint = f"did you mean {' or '.join(near)}?" if near else "name a folder, a quoted glob, a list file, an archive or a Parquet file"
    return f"{data}: cannot be found ({error.strerror}; looked for {path}); {hint}"


def _matches(parts: list[str], pattern: list[str], above: bool = False) -> bool:
    """Whether a path fits a glob pattern, both split at "/"; `above`: whether something under it could."""
    if not parts:
        return above or all(part == "**" for part in pattern)
    if not pattern:
        return False
    if pattern[0] == "**":
        return _matches(parts, pattern[1:], above) or _matches(parts[1:], pattern, above)
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:], above)


def _is_run(folder: str) -> bool:
    try:
        with open(os.path.join(folder, "run.json"), encoding="utf-8") as stream:
            return "attar" in json.load(stream)
    except (OSError, ValueError, TypeError):
        return False


def _look(path: str, name: str) -> _Found:
    """One file, following links, without opening it."""
    try:
        info = os.stat(path)
    except FileNotFoundError:
        if not os.path.islink(path):
            return _Found(name, reason="there is no such file", remedy="correct the path, or put the file there")
        return _Found(name, reason="symbolic link to a file that does not exist", remedy="restore its target, or delete the link")
    except OSError as error:
        return _Found(name, reason=f"cannot be reached ({error.strerror})", remedy="make it readable, or delete it")
    if not stat.S_ISREG(info.st_mode):
        kind = KINDS.get(stat.S_IFMT(info.st_mode), "special file")
        return _Found(name, reason=f"is a {kind}, not a regular file", remedy="nothing was opened; keep such files outside the data")
    return _Found(name, info.st_size, info.st_mtime_ns)


def _enter(base: str, folder: str, seen: dict[tuple[int, int], str]) -> tuple[list[os.DirEntry[str]], str, str]:
    """What lies in a folder, or the reason and remedy why it is not read; `seen` remembers the folders that were."""
    where = os.path.join(base, folder)
    try:
        info = os.stat(where)
        twin = seen.setdefault((info.st_dev, info.st_ino), folder)
        if twin != folder:
            loop = not twin or folder.startswith(twin + "/")
            reason = f"symbolic link loop: leads back to {twin or '.'}" if loop else f"leads to a folder that is read already: {twin}"
            return [], reason, "nothing is missing; delete the link to silence this"
        with os.scandir(where) as listed:
            return list(listed), "", ""
    except OSError as error:
        return [], f"folder cannot be read ({error.strerror})", "make it readable, or leave it out"


def _walk(base: str, suffixes: frozenset[str], others: Counter[str], pattern: list[str] | None = None) -> Iterator[_Found]:
    """Regular files below a folder (those that fit the pattern), and what cannot be used; follows links, never twice into one folder."""
    seen: dict[tuple[int, int], str] = {}
    folders, links = [""], list[str]()
    while folders or links:
        # Linked folders wait until the real ones are read, so that a link never stands in for its target.
        folder = folders.pop() if folders else heapq.heappop(links)
        children, reason, remedy = _enter(base, folder, seen)
        if reason:
            yield _Found(folder or ".", reason=reason, remedy=remedy)
        if folder and any(child.name == "run.json" for child in children) and _is_run(os.path.join(base, folder)):
            continue
        for child in children:
            name = child.name
            if name[0] == ".":
                continue
            path = f"{folder}/{name}" if folder else name
            try:
                is_folder = child.is_dir()
            except OSError:
                yield _Found(path, reason="symbolic link that leads back to itself", remedy="delete the link")
                continue
            if is_folder:
                if pattern is None or _matches(path.split("/"), pattern, above=True):
                    if child.is_symlink():
                        heapq.heappush(links, path)
                    else:
                        folders.append(path)
            elif pattern is None or _matches(path.split("/"), pattern):
                suffix = _suffix(name)
                if suffix not in suffixes:
                    others[suffix] += 1
                elif child.is_file(follow_symlinks=False):
                    info = child.stat()
                    yield _Found(path, info.st_size, info.st_mtime_ns)
                else:
                    yield _look(child.path, path)


def _read_list(path: str, suffixes: frozenset[str], others: Counter[str]) -> Iterator[_Found]:
    try:
        with open(path, encoding="utf-8-sig") as stream:
            lines = [line.strip() for line in stream]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list of paths ({error}); expected UTF-8 text with one path per line") from None
    for name in dict.fromkeys(str(PurePosixPath(line)) for line in lines if line and not line.startswith("#")):
        if _suffix(name) in suffixes:
            yield _look(os.path.join(os.path.dirname(path), name), name)
        else:
            others[_suffix(name)] += 1


def _files(source: _Source, suffixes: frozenset[str], others: Counter[str]) -> list[_Found]:
    """The files of a source sorted by path; containers count as files, and only where the user pointed at them."""
    named = suffixes | CONTAINERS.keys()
    path = os.path.join(source.base, source.pattern)
    if source.kind == "folder":
        if _is_run(source.base):
            raise DataError(f"{source.base}: is the folder of an attar run, not data; name the folder of images")
        found: Iterable[_Found] = _walk(source.base, suffixes, others)
    elif source.kind == "glob":
        found = _walk(source.base, named, others, source.pattern.split("/"))
    elif source.kind == "list":
        found = _read_list(path, named, others)
    elif _suffix(source.pattern) in named:
        found = [_look(path, source.pattern)]
    else:
        raise DataError(
            f"{path}: is not something attar reads; expected a folder, a quoted glob, a list file (.txt), "
            f"an archive or Parquet file ({', '.join(sorted(CONTAINERS))}), or one of {', '.join(sorted(suffixes))}"
        )
    return sorted(_encodable(one) for one in found)


def _encodable(found: _Found) -> _Found:
    """A name that is not UTF-8 cannot stand in a table or a web page."""
    try:
        found.path.encode()
    except UnicodeEncodeError:
        shown = found.path.encode("utf-8", "backslashreplace").decode()
        return _Found(shown, reason="its name is not valid UTF-8", remedy="rename it")
    return found


def listing(data: str, suffixes: frozenset[str], others: Counter[str] | None = None) -> tuple[list[Entry], list[Problem]]:
    """Every item of the data with one of the suffixes, and what cannot be used, both sorted by path.

    `others` counts the files that were passed over, by suffix. Hidden files and folders of attar runs are left out.
    Raises DataError when the data cannot be found or holds nothing to read.
    """
    source, others = _locate(data), Counter() if others is None else others
    entries: list[Entry] = []
    bad: list[_Found] = []
    for found in _files(source, suffixes, others):
        if found.reason:
            bad.append(found)
        elif _suffix(found.path) not in CONTAINERS:
            entries.append(Entry(found.path, found.bytes))
        else:
            for member in _members(source.base, found.path, suffixes, others):
                if member.reason:
                    bad.append(member)
                else:
                    entries.append(Entry(member.path, member.bytes))
    problems = sorted(Problem(found.path, found.reason, found.remedy) for found in bad)
    if not entries and problems and source.kind == "file":
        raise DataError(f"{data}: {problems[0].reason}; {problems[0].remedy}")
    if not entries and not problems:
        raise DataError(_nothing(data, source, suffixes, others))
    return sorted(entries), problems


def _nothing(data: str, source: _Source, suffixes: frozenset[str], others: Counter[str]) -> str:
    passed = f"the {others.total()} files there have other suffixes ({tally(others)})" if others else "there is no file there at all"
    if packed := [suffix for suffix in sorted(CONTAINERS) if others[suffix]]:
        remedy = f"archives and Parquet files are read when you name them, for example {os.path.join(source.base, '*' + packed[0])!r}"
    else:
        remedy = "name the folder that holds the images" if source.kind != "glob" else 'quote the pattern, and use "**/" for subfolders'
    return f"{data}: nothing to read; {passed}; attar reads {', '.join(sorted(suffixes))}; {remedy}"


def tally(counts: Counter[str], most: int = 5) -> str:
    """Counts in words, commonest first: ".txt 10, .mov 2"."""
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    shown = [f"{name or 'no suffix'} {count}" for name, count in ordered[:most]]
    return ", ".join(shown + [f"{len(ordered) - most} more kinds"] * (len(ordered) > most))


def fingerprint(data: str, suffixes: frozenset[str]) -> str:
    """Hash of path, size and modification time of every file of the data (of the archive for archives): changes when they may have."""
    digest = hashlib.blake2b(digest_size=16)
    for found in _files(_locate(data), suffixes, Counter()):
        digest.update(f"{found.path}\0{found.bytes}\0{found.mtime}\0{found.reason}\n".encode())
    return digest.hexdigest()


def stamps(data: str, suffixes: frozenset[str]) -> dict[str, tuple[int, int]]:
    """Size and modification time (nanoseconds) of every file of the data that is an item; members of archives have none of their own."""
    found = _files(_locate(data), suffixes, Counter())
    return {one.path: (one.bytes, one.mtime) for one in found if not one.reason and _suffix(one.path) not in CONTAINERS}


def _members(base: str, path: str, suffixes: frozenset[str], others: Counter[str]) -> Iterator[_Found]:
    """The items inside a container."""
    try:
        container = CONTAINERS[_suffix(path)](os.path.join(base, path))
    except Unreadable as error:
        yield _Found(path, reason=error.reason, remedy=error.remedy)
        return
    with contextlib.closing(container):
        for name, size in container.sizes():
            if any(part.startswith((".", "__MACOSX")) for part in name.split("/")):
                continue
            if container.suffixed and _suffix(name) not in suffixes:
                others[_suffix(name)] += 1
            else:
                yield _encodable(_Found(f"{path}::{name}", size))
        for name, reason in container.faults:
            yield _encodable(_Found(f"{path}::{name}" if name else path, reason=reason, remedy=COPY_AGAIN))


_MEMBER = re.compile(r"(.*?(?:" + "|".join(re.escape(suffix) for suffix in CONTAINERS) + r"))::(.*)", re.IGNORECASE | re.DOTALL)


class Reader:
    """Reads items by path, from any thread; containers stay open until it is closed.

    Raises DataError when the data itself cannot be found, and from `read` Unreadable for one item that cannot be read.
    """

    def __init__(self, root: str) -> None:
        self._source = _locate(root)
        self._lock = threading.Lock()
        self._open: dict[str, Container] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for container in self._open.values():
            container.close()
        self._open.clear()

    def file(self, path: str) -> str | None:
        """Where an item lies as a file of its own; None for a member of a container."""
        inside = self._source.kind != "folder" and _MEMBER.fullmatch(path)
        return None if inside else os.path.join(self._source.base, path)

    def read(self, path: str) -> bytes:
        """The encoded bytes of one item."""
        inside = None if self._source.kind == "folder" else _MEMBER.fullmatch(path)
        if inside is None:
            try:
                with open(os.path.join(self._source.base, path), "rb") as stream:
                    return stream.read()
            except OSError as error:
                remedy = "make it readable (chmod u+r)" if isinstance(error, PermissionError) else "put it back, or leave it out"
                raise Unreadable(f"cannot be opened ({error.strerror})", remedy) from None
        outer, member = inside.groups()
        with self._lock:
            if outer not in self._open:
                self._open[outer] = CONTAINERS[_suffix(outer)](os.path.join(self._source.base, outer))
            container = self._open[outer]
        try:
            return container.read(member)
        except KeyError:
            raise Unreadable(f"{outer} no longer holds it", "put it back, or leave it out") from None
