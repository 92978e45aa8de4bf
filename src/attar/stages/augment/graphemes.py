"""Text as the characters people see: a letter with its marks, an emoji with its modifiers, never cut apart."""

from __future__ import annotations

import unicodedata

JOINER = "\u200d"
PREPENDED = frozenset(map(chr, (
    *range(0x600, 0x606), 0x6DD, 0x70F, 0x890, 0x891, 0x8E2, 0xD4E, 0x110BD, 0x110CD, 0x111C2, 0x111C3, 0x1193F, 0x11941, 0x11A3A,
    *range(0x11A84, 0x11A8A), 0x11D46, 0x11F02,
)))  # fmt: skip
"""Signs that belong to the one after them."""
VIRAMA = 9
"""Combining class of the signs that join two consonants into one."""


def graphemes(text: str) -> list[str]:
    """A text cut into characters; joined together they are the text.

    Follows the extended grapheme clusters of Unicode's annex 29 in that nothing it holds together is cut (it cuts a few less: after any joiner
    and any virama): marks, emoji sequences and modifiers, flags, keycaps, tags, Hangul syllables, CR LF.

    >>> graphemes("añ🇳🇱!")
    ['a', 'ñ', '🇳🇱', '!']
    """
    if text.isascii() and "\r" not in text:
        return list(text)
    parts: list[str] = []
    flags = 0  # regional indicators at the end of the last part: two of them are a flag
    for sign in text:
        regional = "\U0001f1e6" <= sign <= "\U0001f1ff"
        if parts and (_joins(parts[-1][-1], sign) or (regional and flags == 1)):
            parts[-1] += sign
        else:
            parts.append(sign)
            flags = 0
        flags = flags + 1 if regional else 0
    return parts


def _joins(before: str, sign: str) -> bool:
    """Whether a sign belongs to the character that ends with the one before it."""
    if before in "\r\n" or sign in "\r\n":
        return before == "\r" and sign == "\n"
    if unicodedata.category(before) in ("Cc", "Zl", "Zp"):
        return False
    if extends(sign) or before in PREPENDED or _hangul(before, sign):
        return unicodedata.category(sign) != "Cc"
    return (before == JOINER or unicodedata.combining(before) == VIRAMA) and unicodedata.category(sign)[0] not in "CZ"


def extends(sign: str) -> bool:
    """Whether a sign adds to the one before it: marks, joiners, emoji modifiers, tags, halfwidth voicing marks."""
    return (
        unicodedata.category(sign) in ("Mn", "Mc", "Me")
        or sign in "\u200c\u200d\uff9e\uff9f\u0e33\u0eb3"
        or "\U0001f3fb" <= sign <= "\U0001f3ff"
        or "\U000e0020" <= sign <= "\U000e007f"
    )


def _hangul(before: str, sign: str) -> bool:
    """Whether two Hangul signs are of one syllable: leading, vowel, trailing, in that order."""
    first, second = _jamo(before), _jamo(sign)
    return (first, second) in {("L", "L"), ("L", "V"), ("L", "LV"), ("L", "LVT"), ("LV", "V"), ("V", "V")} or (
        second == "T" and first in ("LV", "V", "LVT", "T")
    )


def _jamo(sign: str) -> str:
    code = ord(sign)
    if 0xAC00 <= code <= 0xD7A3:
        return "LVT" if (code - 0xAC00) % 28 else "LV"
    kinds = (
        (0x1100, 0x115F, "L"),
        (0xA960, 0xA97C, "L"),
        (0x1160, 0x11A7, "V"),
        (0xD7B0, 0xD7C6, "V"),
        (0x11A8, 0x11FF, "T"),
        (0xD7CB, 0xD7FB, "T"),
    )
    return next((kind for low, high, kind in kinds if low <= code <= high), "")
