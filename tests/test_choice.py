"""--model auto: every line of its rule, on made tables of items and a made cache."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from attar.config import ModelChoice
from attar.errors import UsageError
from attar.models import choice
from attar.models.choice import FEW, SMALL, choose
from attar.records import Items

AUTO = ModelChoice(model="auto")


def _made(items: Items, count: int, side: int) -> Items:
    """`count` training items of a size, from the made ones."""
    table = items.table.take(np.zeros(count, np.int64))
    for name, values in (
        ("id", pa.array(range(count), pa.int64())),
        ("split", pa.array(["train"] * count)),
        ("width", pa.array([side] * count, pa.int32())),
        ("height", pa.array([side + 8] * count, pa.int32())),
    ):
        table = table.set_column(table.column_names.index(name), name, values)
    return replace(items, table=table)


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing was downloaded."""
    monkeypatch.setattr(choice, "_downloaded", lambda: "")


def test_a_named_source_is_left_alone(items: Items) -> None:
    named = ModelChoice(model="self")
    assert choose(named, items) == (named, "")


@pytest.mark.usefixtures("bare")
def test_pretrained_models_take_photos(items: Items) -> None:
    given = replace(AUTO, pretrained="hf:some/encoder")
    taken, why = choose(given, _made(items, 50, SMALL))
    assert taken.model == "hf:some/encoder"
    assert why == f"--model auto took hf:some/encoder: 50 images of about {SMALL} px, 50 to learn from, and a pretrained model is at hand"
    taken, why = choose(given, _made(items, FEW, SMALL - 1))
    assert taken.model == "self"
    assert "hf:some/encoder has seen larger photos" in why


@pytest.mark.usefixtures("bare")
def test_without_one_the_number_of_items_decides(items: Items) -> None:
    few, why = choose(AUTO, _made(items, FEW - 1, 300))
    assert few.model == "descriptors"
    assert f"fewer than the {FEW} an encoder needs; no pretrained model is at hand (--pretrained names one)" in why
    enough, why = choose(AUTO, _made(items, FEW, 300))
    assert enough.model == "self"
    assert "an encoder learned from the items" in why


def test_the_cache_is_looked_through_without_a_network(items: Items, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert choose(AUTO, _made(items, FEW, 300))[0].model == "self"
    snapshot = tmp_path / f"models--{choice.KNOWN[1].replace('/', '--')}" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    for name in ("config.json", "preprocessor_config.json"):
        (snapshot / name).write_text("{}")
    assert choose(AUTO, _made(items, FEW, 300))[0].model == "self", "without its weights it is not at hand"
    (snapshot / "model.safetensors").write_bytes(b"")
    assert choose(AUTO, _made(items, FEW, 300))[0].model == f"hf:{snapshot}"
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert choose(AUTO, _made(items, FEW, 300))[0].model == "self"


def test_auto_may_not_be_its_own_remedy(items: Items) -> None:
    with pytest.raises(UsageError, match='pretrained: "auto" names no model; give what --model auto may take'):
        choose(replace(AUTO, pretrained="auto"), items)
