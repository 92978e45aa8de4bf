"""Lexicons: word → synonyms, from a file of the user's or from WordNet where that is installed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from attar.errors import DataError, MissingExtra, UsageError

Lexicon = Callable[[str], Sequence[str]]
"""The synonyms of a word in small letters, none where it has none."""


def read_lexicon(source: str | Path | Mapping[str, Sequence[str]]) -> Lexicon:
    """A lexicon from a mapping, a .json file {"word": ["synonym", …]}, a .tsv file (word, then synonyms, a word a line), or "wordnet".

    WordNet (English) is read by nltk, whose data the user installs. Raises UsageError for a source that is not one of these or whose data are
    missing, MissingExtra without nltk, and DataError for a file that cannot be understood, naming the place.
    """
    if source == "wordnet":
        return _wordnet()
    if isinstance(source, Mapping):
        return _of(source, "the lexicon")
    path = Path(source)
    if not path.is_file():
        raise UsageError(f"lexicon {str(path)!r}: no such file; give a .json or .tsv file of word → synonyms, or 'wordnet'")
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"lexicon {path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    if path.suffix.lower() == ".json":
        try:
            return _of(json.loads(text), str(path))
        except json.JSONDecodeError as error:
            raise DataError(f'lexicon {path}: not JSON ({error}); expected {{"word": ["synonym", …]}}') from None
    return _of(_table(text, path), str(path))


def _table(text: str, path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        word, *synonyms = (cell.strip() for cell in line.split("\t"))
        if not word and not any(synonyms):
            continue
        if not word or not any(synonyms):
            raise DataError(f"lexicon {path}, line {number}: {line!r}; expected a word and its synonyms with tabs between them")
        found.setdefault(word, []).extend(filter(None, synonyms))
    return found


def _of(entries: Any, name: str) -> Lexicon:
    """Entries by their word in small letters; a word is no synonym of itself."""
    if not isinstance(entries, Mapping):
        raise DataError(f"{name}: {type(entries).__name__}; expected word → list of synonyms")
    found: dict[str, list[str]] = {}
    for word, synonyms in entries.items():
        if (
            isinstance(synonyms, str)
            or not isinstance(synonyms, Sequence)
            or not all(isinstance(other, str) and other for other in synonyms)
        ):
            raise DataError(f"{name}: the synonyms of {word!r} are {synonyms!r}; expected a list of words")
        found.setdefault(word.lower(), []).extend(other for other in synonyms if other.lower() != word.lower())
    return lambda word: found.get(word, ())


def _wordnet() -> Lexicon:
    try:
        from nltk.corpus import wordnet  # its parts are loaded when first asked for
    except ImportError:
        raise MissingExtra("nltk", "text", "the lexicon 'wordnet'") from None
    try:
        wordnet.ensure_loaded()
    except LookupError:
        raise UsageError(
            "the lexicon 'wordnet': nltk is installed but WordNet's data are not; python -m nltk.downloader wordnet gets them"
        ) from None

    @lru_cache(maxsize=100_000)
    def synonyms(word: str) -> tuple[str, ...]:
        names = (name.replace("_", " ") for senses in wordnet.synsets(word) for name in senses.lemma_names())
        return tuple(dict.fromkeys(name for name in names if name.lower() != word))

    return synonyms
