"""Text: rates, characters that are never cut apart, lexicons, and what each transform may and may not change."""

from __future__ import annotations

import doctest
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.errors import AttarError, DataError, MissingExtra, UsageError
from attar.records import Dial, Policy
from attar.stages.augment import graphemes as characters
from attar.stages.augment import text as texts_module
from attar.stages.augment.graphemes import graphemes
from attar.stages.augment.lexicon import read_lexicon
from attar.stages.augment.text import CONFUSED, KEYS, TRANSFORMS, augment_text

LEXICON = read_lexicon({"cat": ["feline", "tom cat"], "big": ["large"], "Émeu": ["oiseau"], "same": ["same"]})
SAMPLE = [
    "The quick brown fox, it's 5 o'clock!\nBig cat  (same) Émeu.",
    "e\u0301te\u0301 a\u0308 n\u0303andu\u0301",
    "👩🏽‍🚀 flies 👨‍👩‍👧‍👦 to 🇳🇱 1️⃣ 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "مَرْحَبًا بِالعَالَم \u202bשָׁלוֹם\u202c",
    "नमस्ते दुनिया क्ष क् ख",
    "각 한국어 \u1112\u1161\u11ab",
    "漢字かな交じり文 か\u3099",
    "",
    " ",
    "\n\t x",
    "a",
]
ALPHABET = st.sampled_from(
    [*"abrnclO01 \n.'\u0301\u0308\u200d\u094d\u0915\u0937\u0940\u1100\u1161\u11a8각🏽👩🚀🇳🇱\u20e3\ufe0fشًא\r\u0600ß\u0345\u202b", "é"]
)


def one(text: str, policy: dict, seed: int = 0) -> str:
    return augment_text([text], policy, np.random.default_rng(seed), lexicon=LEXICON)[0]


def many(text: str, name: str, count: int = 300, strength: float = 1.0) -> list[str]:
    return augment_text([text] * count, {name: strength}, np.random.default_rng(0), lexicon=LEXICON)


# what holds for all


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("off", [0.0, (1.0, 0.0), Dial(0.0, 1.0)])
def test_strength_or_frequency_zero_is_the_identity(name: str, off: float) -> None:
    assert augment_text(SAMPLE, {name: off}, np.random.default_rng(0), lexicon=LEXICON) == SAMPLE


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_generator_decides_and_a_text_does_not_depend_on_its_neighbours(name: str) -> None:
    policy, text = {name: (1.0, 0.9)}, SAMPLE[0]
    made = augment_text([text] * 5, policy, np.random.default_rng(7), lexicon=LEXICON)
    assert made == augment_text([text] * 5, policy, np.random.default_rng(7), lexicon=LEXICON)
    others = augment_text(["x" * 50, text, "", text, "y z"], policy, np.random.default_rng(7), lexicon=LEXICON)
    assert (others[1], others[3]) == (made[1], made[3])
    assert any(other != text for other in many(text, name, 20))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_frequency_is_a_share_of_the_texts(name: str) -> None:
    text = " ".join(["big Cat orn 10"] * 30)
    made = augment_text([text] * 400, {name: (1.0, 0.3)}, np.random.default_rng(0), lexicon=LEXICON)
    assert 0.2 < np.mean([other != text for other in made]) < 0.4


@settings(deadline=None, max_examples=100)
@given(st.text(ALPHABET, max_size=14), st.integers(0, 50))
def test_any_text_survives_everything_at_once(text: str, seed: int) -> None:
    made = one(text, dict.fromkeys(TRANSFORMS, 1.0), seed)
    assert bool(made.strip()) == bool(text.strip())
    made.encode("utf-8")


# characters


@settings(deadline=None, max_examples=400)
@given(st.text(ALPHABET | st.characters(exclude_categories=["Cn", "Co", "Cs"], max_codepoint=0x1FFFF), max_size=10))
def test_nothing_is_cut_that_unicode_s_clusters_hold_together(text: str) -> None:
    found = graphemes(text)
    assert "".join(found) == text
    ends, theirs = (set(np.cumsum([len(part) for part in parts]).tolist()) for parts in (found, regex.findall(r"\X", text)))
    assert ends <= theirs, (found, regex.findall(r"\X", text))


@pytest.mark.parametrize("text", SAMPLE)
def test_in_writing_as_it_occurs_the_cuts_are_unicode_s(text: str) -> None:
    conjuncts = (
        text == SAMPLE[4]
    )  # held together by graphemes, as Unicode 15.1 does; the regex package follows an older rule or a newer one
    assert conjuncts or graphemes(text) == regex.findall(r"\X", text)


@pytest.mark.parametrize("text", SAMPLE)
def test_characters_are_left_out_and_exchanged_whole_and_white_space_stays(text: str) -> None:
    whole = Counter(regex.findall(r"\X", text))
    for made in many(text, "delete_character", 40):
        assert not Counter(regex.findall(r"\X", made)) - whole
        assert [sign for sign in made if sign.isspace()] == [sign for sign in text if sign.isspace()]
    for made in many(text, "swap_characters", 40):
        assert Counter(regex.findall(r"\X", made)) == whole
        assert [sign.isspace() for sign in made] == [sign.isspace() for sign in text] or not text.isascii()


@pytest.mark.parametrize("name", ["delete_character", "keyboard", "ocr", "swap_characters"])
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_rates_of_characters_are_even_up_to_the_full_rate_times_the_strength(name: str, strength: float) -> None:
    text, full = "o" * 400, {"ocr": 0.3}.get(name, 0.2)
    if name == "swap_characters":
        text, full = "ox" * 200, 0.2 * 2  # each exchange moves two
    made = many(text, name, 120, strength)
    rate = [1 - len(other) / 400 if name == "delete_character" else np.mean([a != b for a, b in zip(text, other)]) for other in made]
    assert 0.8 < np.mean(rate) / (full * strength / 2) < 1.2
    assert max(rate) < full * strength * 1.25 + 0.02
    assert min(rate) < full * strength * 0.15


def test_keyboard_noise_hits_touching_keys_in_the_same_case_and_leaves_other_scripts_and_marks() -> None:
    assert sorted(KEYS["g"]) == sorted("tyhbvf")
    assert sorted(KEYS["q"]) == sorted("12wa")
    for made in many("gG5", "keyboard"):
        assert made[0] in "g" + KEYS["g"]
        assert made[1] in "G" + KEYS["g"].upper()
        assert made[2] in "5" + KEYS["5"]
    assert set(many("n\u0303 ش 漢 ñ", "keyboard")) == {"n\u0303 ش 漢 ñ"}


def test_scanning_noise_exchanges_lookalikes_and_leaves_letters_with_marks() -> None:
    seen = set(many("rn", "ocr", 600))
    assert {"m", "rn"} <= seen <= {"rn", *CONFUSED["rn"]}
    assert set(many("o\u0308rn\u0303", "ocr", 300)) == {"o\u0308rn\u0303"}
    assert all(a in CONFUSED[b] for b, others in CONFUSED.items() for a in others)
    assert all(b in CONFUSED[a] for b, others in CONFUSED.items() for a in others)


# words and case


def test_case() -> None:
    text = "hello WORLD it's 'quoted' ǆ straße"
    assert one(text, {"upper": 1.0}) == text.upper()
    assert one(text, {"lower": 1.0}) == text.lower()
    assert one(text, {"capitalise": 1.0}) == "Hello WORLD It's 'Quoted' ǅ Straße"
    half = [sum(word.isupper() for word in made.split()) / 100 for made in many("a " * 100, "upper", strength=0.4)]
    assert 0.38 < np.mean(half) < 0.42
    tossed = one("aB" * 500, {"random_case": 1.0})
    assert tossed.lower() == "ab" * 500
    assert 400 < sum(a != b for a, b in zip(tossed, "aB" * 500)) < 600


def test_words_are_left_out_with_one_gap_and_one_always_stays() -> None:
    text = " one  two\tthree\n"
    seen = set(many(text, "delete_word", 600))
    assert {" one  two\n", " two\tthree\n", " one\tthree\n", " one\n", " two\n", " three\n", text} >= seen
    assert len(seen) == 7
    assert set(many("alone", "delete_word")) == {"alone"}


def test_words_change_places_with_the_next_and_gaps_stay() -> None:
    text = "one  two\tthree"
    assert set(many(text, "swap_words")) == {text, "two  one\tthree", "one  three\ttwo"}


def test_synonyms_keep_case_and_punctuation() -> None:
    assert set(many('"Cat!" cat CAT', "synonym", 900)) == {
        f'"{a}!" {b} {c}' for a in ("Cat", "Feline", "Tom cat") for b in ("cat", "feline", "tom cat") for c in ("CAT", "FELINE", "TOM CAT")
    }
    assert set(many("same dog \U0001f44d émeu", "synonym")) == {"same dog \U0001f44d émeu", "same dog \U0001f44d oiseau"}


def test_clusters_have_their_dials_and_a_pick_is_one_transform() -> None:
    policy = Policy(families={"upper": Dial(0.0, 1.0)}, clusters=({"upper": Dial(1.0, 1.0)}, {"lower": Dial(1.0, 1.0)}))
    made = augment_text(["aB"] * 4, policy, np.random.default_rng(0), clusters=[0, 1, -1, 5])
    assert made == ["AB", "ab", "aB", "aB"]
    picked = Policy(families={"upper": 1.0, "lower": 1.0}, pick=1)
    assert set(augment_text(["aB"] * 50, picked, np.random.default_rng(0))) == {"AB", "ab"}


# lexicons


def test_lexicons_from_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"Cat": ["feline"]}), "utf-8")
    (tmp_path / "b.tsv").write_text("cat\tfeline\ttom\n\nbig\tlarge\ncat\tmouser\n", "utf-8-sig")
    assert list(read_lexicon(tmp_path / "a.json")("cat")) == ["feline"]
    table = read_lexicon(str(tmp_path / "b.tsv"))
    assert list(table("cat")) == ["feline", "tom", "mouser"]
    assert list(table("dog")) == []


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("a.json", b"[1]", "list; expected word → list of synonyms"),
        ("a.json", b'{"cat": "feline"}', "the synonyms of 'cat' are 'feline'; expected a list of words"),
        ("a.json", b"{", "not JSON (Expecting property name"),
        ("a.tsv", b"cat\tfeline\nbig\n", "line 2: 'big'; expected a word and its synonyms with tabs between them"),
        ("a.tsv", b"\xff\xfe", "not UTF-8 (invalid start byte at byte 0); save it as UTF-8"),
    ],
)
def test_a_lexicon_that_cannot_be_read_is_named_with_the_place(tmp_path: Path, name: str, body: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(body)
    with pytest.raises(DataError) as caught:
        read_lexicon(tmp_path / name)
    assert message in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_wordnet_without_nltk_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk.corpus", None)  # as where it is not installed, also where it is
    with pytest.raises(MissingExtra, match=r"the lexicon 'wordnet' needs the package 'nltk'.*pip install 'attar\[text\]'"):
        read_lexicon("wordnet")


@pytest.mark.parametrize(
    ("texts", "policy", "error", "message"),
    [
        (["a"], {"uper": 1.0}, UsageError, "there is no transform 'uper' of text. Did you mean 'upper'? Known are: synonym, delete_word"),
        (["a"], {"upper": 1.01}, UsageError, "upper: strength 1.01 is outside 0 … 1"),
        (["a"], {"upper": "much"}, UsageError, "upper: 'much' is no dial"),
        (["a"], {"upper": float("nan")}, UsageError, "upper: strength nan is outside 0 … 1"),
        (["a"], {"synonym": 0.5}, UsageError, "synonym needs a lexicon: give lexicon=read_lexicon(PATH)"),
        ("abc", {"upper": 1.0}, DataError, "texts of type str; expected a list of str, one per item"),
        (["a"], Policy(families={"upper": 1.0}, pick=0), UsageError, "pick is 0; expected how many transforms each item gets"),
    ],
)
def test_what_does_not_fit_is_named(texts: list[str], policy: dict, error: type[AttarError], message: str) -> None:
    with pytest.raises(error) as caught:
        augment_text(texts, policy, np.random.default_rng(0))
    assert message in str(caught.value)
    with pytest.raises(UsageError, match=r"no such file; give a \.json or \.tsv file of word → synonyms, or 'wordnet'"):
        read_lexicon("missing.tsv")
    with pytest.raises(DataError, match=r"clusters of shape \(2,\) for 1 items"):
        augment_text(["a"], {"upper": 1.0}, np.random.default_rng(0), clusters=[1, 2])


def test_the_examples_in_the_docs_run() -> None:
    for module in (texts_module, characters):
        assert doctest.testmod(module).failed == 0
        assert doctest.testmod(module).attempted
