"""Text: noise as people and machines make it, letter case, words left out, exchanged or replaced by synonyms.

A transform goes through a text place by place and changes each with a rate. At strength 1 (frequency: how many texts it is drawn for):

| name | rate at strength 1 | changes |
|---|---|---|
| upper, lower, capitalise | exactly 1 | words: all capitals, no capitals, first letter a capital |
| random_case | exactly 1 | letters: the toss of a coin decides on the case |
| delete_character, swap_characters | up to 0.2 | characters: left out, exchanged with the next of the word |
| keyboard | up to 0.2 | Latin letters and digits: a neighbour on a QWERTY keyboard, in the same case |
| ocr | up to 0.3 | what scanners take for something else: o and 0, l and 1, rn and m |
| delete_word, swap_words | up to 0.3 | words (at least one stays): left out, exchanged with the next |
| synonym | up to 0.5 | words the lexicon has: one of their synonyms, in the same case |

"exactly" scales with the strength; "up to" is drawn evenly between 0 and the rate times the strength, for each text. Words are what white space
separates. A character is what a person sees as one (see graphemes.py): none is ever cut apart, no text becomes empty, white space stays (but for
the gap beside a word left out).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from attar.errors import DataError, UsageError
from attar.records import Policy
from attar.stages.augment import dials
from attar.stages.augment.graphemes import extends, graphemes
from attar.stages.augment.lexicon import Lexicon

Change = Callable[[str, float, np.random.Generator], str]

ROWS = ("1234567890", "qwertyuiop", "asdfghjkl", "zxcvbnm")
"""Each row of a QWERTY keyboard is set half a key further to the right than the one above it."""
LOOKALIKES = (
    ("0", "o"), ("0", "O"), ("1", "l"), ("1", "I"), ("l", "I"), ("l", "i"), ("5", "S"), ("5", "s"), ("8", "B"), ("2", "Z"), ("2", "z"), ("6", "G"),
    ("9", "g"), ("6", "b"), ("c", "e"), ("u", "v"), ("h", "b"), ("n", "u"), ("t", "f"), ("rn", "m"), ("cl", "d"), ("vv", "w"), ("ri", "n"), ("li", "h"),
)  # fmt: skip


def _neighbours() -> dict[str, str]:
    """Key → the keys that touch it."""
    places = {key: (x + 0.5 * y, y) for y, row in enumerate(ROWS) for x, key in enumerate(row)}
    return {
        key: "".join(other for other, (u, v) in places.items() if other != key and abs(u - x) <= 1 and abs(v - y) <= 1)
        for key, (x, y) in places.items()
    }


def _confusions() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for a, b in LOOKALIKES:
        found.setdefault(a, []).append(b)
        found.setdefault(b, []).append(a)
    return found


KEYS, CONFUSED = _neighbours(), _confusions()
PIECES = re.compile("|".join(sorted(CONFUSED, key=len, reverse=True)))


def augment_text(
    texts: Sequence[str],
    policy: Policy | Mapping[str, Any],
    rng: np.random.Generator,
    *,
    clusters: Any = None,
    lexicon: Lexicon | None = None,
) -> list[str]:
    """Texts changed under a policy, each by draws of its own: what becomes of a text depends on its place in the list, not on the other texts.

    `clusters` (one number per text) chooses the dials of a policy that has them per cluster; `lexicon` (see read_lexicon) is what `synonym` needs.
    Transforms are applied in the order of CHANGES. Raises UsageError for unknown transforms and dials and for synonyms without a lexicon.

    >>> augment_text(["the cat", ""], {"upper": 1.0}, np.random.default_rng(0))
    ['THE CAT', '']
    """
    wanted = dials.read(policy, TRANSFORMS, "text")
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"texts of type {type(texts).__name__}; expected a list of str, one per item")
    asked = any(found.get("synonym", (0, 0))[0] > 0 for found in (wanted.families, *wanted.clusters))
    if asked and lexicon is None:
        raise UsageError("synonym needs a lexicon: give lexicon=read_lexicon(PATH) with word → synonyms, or read_lexicon('wordnet')")
    changes: dict[str, Change] = {**CHANGES, "synonym": lambda text, rate, own: _replaced(text, rate, own, lexicon)}  # type: ignore[arg-type]
    strength = dials.strengths(wanted, TRANSFORMS, len(texts), clusters, rng)
    seeds, made = rng.integers(2**63, size=len(texts)), []
    for text, row, seed in zip(texts, strength, seeds):
        own = np.random.default_rng(seed)
        for name, amount in zip(TRANSFORMS, row):
            if amount > 0:
                rate = amount * RATES[name] * (1.0 if name in EXACT else own.random())
                text = changes[name](text, rate, own)
        made.append(text)
    return made


def _words(text: str) -> list[str]:
    """Words at the even places, the white space between them at the odd ones; joined together they are the text."""
    return re.split(r"(\s+)", text)


def _by_word(change: Callable[[str], str]) -> Change:
    def apply(text: str, rate: float, rng: np.random.Generator) -> str:
        parts = _words(text)
        hit = rng.random(len(parts)) < rate
        return "".join(change(part) if hit[place] and place % 2 == 0 else part for place, part in enumerate(parts))

    return apply


def _capitalised(word: str) -> str:
    """The first letter in title case (of a digraph its first half), the rest as it is."""
    first = next((place for place, sign in enumerate(word) if sign.isalpha()), len(word))
    return word[:first] + word[first : first + 1].title() + word[first + 1 :]


def _random_case(text: str, rate: float, rng: np.random.Generator) -> str:
    chance, up = rng.random((2, len(text)))
    return "".join(
        (sign.upper() if up[k] < 0.5 else sign.lower()) if chance[k] < rate and sign.isalpha() else sign for k, sign in enumerate(text)
    )


def _solid(part: str) -> bool:
    """Whether a character is a letter, digit, punctuation mark or symbol: controls (such as those of the writing direction) and spaces stay."""
    return unicodedata.category(part[0])[0] in "LNPS"


def _delete_character(text: str, rate: float, rng: np.random.Generator) -> str:
    parts = graphemes(text)
    gone = (rng.random(len(parts)) < rate) & np.array([_solid(part) for part in parts], bool)
    if gone.any() and not "".join(part for k, part in enumerate(parts) if not gone[k]).strip():
        gone[rng.choice(np.flatnonzero(gone))] = False
    return "".join(part for k, part in enumerate(parts) if not gone[k])


def _swap_characters(text: str, rate: float, rng: np.random.Generator) -> str:
    parts = graphemes(text)
    hit, place = rng.random(len(parts)) < rate, 0
    while place < len(parts) - 1:
        if hit[place] and _solid(parts[place]) and _solid(parts[place + 1]):
            parts[place], parts[place + 1] = parts[place + 1], parts[place]
            place += 1  # one that moved does not move on
        place += 1
    return "".join(parts)


def _keyboard(text: str, rate: float, rng: np.random.Generator) -> str:
    parts = graphemes(text)
    chance, which = rng.random((2, len(parts)))
    for place, part in enumerate(parts):
        keys = KEYS.get(part.lower(), "")
        if keys and chance[place] < rate:
            key = keys[int(which[place] * len(keys))]
            parts[place] = key.upper() if part.isupper() else key
    return "".join(parts)


def _ocr(text: str, rate: float, rng: np.random.Generator) -> str:
    chance, which = rng.random((2, len(text)))
    made, end = [], 0
    for match in PIECES.finditer(text):
        start, others = match.start(), CONFUSED[match.group()]
        carries = match.end() < len(text) and extends(text[match.end()])  # marks, which would be left to a stranger
        if chance[start] < rate and not carries:
            made += [text[end:start], others[int(which[start] * len(others))]]
            end = match.end()
    return "".join([*made, text[end:]])


def _delete_word(text: str, rate: float, rng: np.random.Generator) -> str:
    parts = _words(text.strip())
    words, gaps = parts[::2], ["", *parts[1::2]]
    kept = rng.random(len(words)) >= rate
    if not kept.any():
        kept[rng.integers(len(words))] = True
    rest = "".join(gap + word for gap, word, stays in zip(gaps, words, kept) if stays)
    body = rest[len(gaps[int(kept.argmax())]) :]  # the gap before the first that stays
    return text[: len(text) - len(text.lstrip())] + body + text[len(text.rstrip()) :] if text.strip() else text


def _swap_words(text: str, rate: float, rng: np.random.Generator) -> str:
    parts = _words(text)
    places = [place for place in range(0, len(parts), 2) if parts[place]]
    hit, k = rng.random(len(places)) < rate, 0
    while k < len(places) - 1:
        if hit[k]:
            here, there = places[k], places[k + 1]
            parts[here], parts[there] = parts[there], parts[here]
            k += 1
        k += 1
    return "".join(parts)


def _replaced(text: str, rate: float, rng: np.random.Generator, lexicon: Lexicon) -> str:
    """Words with synonyms, at the rate; punctuation around a word stays, its case is kept."""
    parts = _words(text)
    for place in range(0, len(parts), 2):
        before, word, after = _core(parts[place])
        chance, which = rng.random(2)
        found = lexicon(word.lower()) if word and chance < rate else ()
        if found:
            parts[place] = before + _in_case_of(word, found[int(which * len(found))]) + after
    return "".join(parts)


def _core(word: str) -> tuple[str, str, str]:
    """Punctuation and symbols before the word, the word itself, those after it."""
    parts = graphemes(word)
    inner = [k for k, part in enumerate(parts) if unicodedata.category(part[0])[0] not in "PS"]
    first, last = (inner[0], inner[-1] + 1) if inner else (0, 0)
    return "".join(parts[:first]), "".join(parts[first:last]), "".join(parts[last:])


def _in_case_of(word: str, other: str) -> str:
    if word.isupper() and len(word) > 1:
        return other.upper()
    return _capitalised(other) if word[:1].isupper() else other


CHANGES: dict[str, Change] = {
    "delete_word": _delete_word,
    "swap_words": _swap_words,
    "delete_character": _delete_character,
    "swap_characters": _swap_characters,
    "keyboard": _keyboard,
    "ocr": _ocr,
    "upper": _by_word(str.upper),
    "lower": _by_word(str.lower),
    "capitalise": _by_word(_capitalised),
    "random_case": _random_case,
}
TRANSFORMS = ("synonym", *CHANGES)
EXACT = ("upper", "lower", "capitalise", "random_case")
RATES = dict.fromkeys(EXACT, 1.0) | dict.fromkeys(("delete_character", "swap_characters", "keyboard"), 0.2)
RATES |= dict.fromkeys(("ocr", "delete_word", "swap_words"), 0.3) | {"synonym": 0.5}
