"""Items added to a finished run: what holds is used again, and the result is that of a run from scratch with the same encoder."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_folder, make_image

import attar
from attar.modalities import image
from attar.records import Items, Vectors
from attar.stages import embed as stage

STEPS = {"self_steps": 6, "self_width": 8, "quiet": True}
ENCODER = {"model": "descriptors", "quiet": True}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "photos", per_kind=20)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that were decoded at full size."""
    names: list[str] = []
    decode = image.decode

    def watched(data: bytes, **options: Any) -> Any:
        names.append(options.get("name", ""))
        return decode(data, **options)

    monkeypatch.setattr(image, "decode", watched)
    return names


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many items were encoded at each call."""
    counts: list[int] = []
    encode = stage.encode

    def watched(network: Any, preprocess: Any, loader: Any, ids: np.ndarray, tick: Any) -> Any:
        counts.append(len(ids))
        return encode(network, preprocess, loader, ids, tick)

    monkeypatch.setattr(stage, "encode", watched)
    return counts


def add(data: Path, *seeds: int) -> None:
    for seed in seeds:
        make_image("discs", seed).save(data / f"added {seed}.png")


def values(vectors: Vectors) -> np.ndarray:
    assert [shard.values.dtype for shard in vectors.batches()] == [np.float16] * len(vectors.shards)
    ids = np.concatenate([shard.ids for shard in vectors.batches()])
    assert ids.tolist() == list(range(vectors.count))
    return np.concatenate([shard.values for shard in vectors.batches()])


def test_only_new_and_changed_files_are_read(data: Path, tmp_path: Path, decoded: list[str]) -> None:
    run = tmp_path / "run"
    attar.scan(run, data=str(data), quiet=True)
    assert len(decoded) == 60
    add(data, 500, 501)
    (data / "broken.png").write_bytes(b"no picture")
    make_image("noise", 900).save(data / "noise" / "003.png")  # another picture in its place
    (data / "stripes" / "000.png").unlink()
    decoded.clear()
    items = attar.scan(run, quiet=True)
    assert sorted(decoded) == ["added 500.png", "added 501.png", "broken.png", "noise/003.png"]
    assert "57 files are as they were" not in attar.status(run)["stages"][0]["notes"][0]
    assert "58 files are as they were at the last scan and were not read again" in attar.status(run)["stages"][0]["notes"]
    whole = attar.scan(tmp_path / "scratch", data=str(data), quiet=True)
    assert items.table.equals(whole.table)
    assert items.quarantine.equals(whole.quarantine)
    add(data, 502)
    decoded.clear()
    attar.scan(run, quiet=True)
    assert decoded == ["added 502.png"], "what is broken is known as well"
    decoded.clear()
    attar.scan(run, max_megapixels=50, quiet=True)
    assert len(decoded) == 63, "another limit reads everything"


def test_members_of_archives_are_read_again(data: Path, tmp_path: Path, decoded: list[str]) -> None:
    archive = shutil.make_archive(str(tmp_path / "photos"), "zip", data)
    attar.scan(tmp_path / "run", data=archive, quiet=True)
    add(data, 500)
    shutil.make_archive(str(tmp_path / "photos"), "zip", data)
    decoded.clear()
    assert len(attar.scan(tmp_path / "run", quiet=True)) == 61 == len(decoded)


def test_only_new_items_are_encoded(data: Path, tmp_path: Path, encoded: list[int]) -> None:
    run = tmp_path / "run"
    attar.embed(run, data=str(data), **ENCODER)
    assert encoded == [60]
    add(data, 500, 501, 502)
    shutil.move(data / "stripes" / "000.png", data / "z renamed.png")
    (data / "noise" / "001.png").unlink()
    found = attar.embed(run, quiet=True)
    assert encoded == [60, 3]
    assert "59 vectors are those the same encoder made before; 3 items were encoded" in attar.status(run)["stages"][1]["notes"]
    whole = attar.embed(tmp_path / "scratch", data=str(data), **ENCODER)
    np.testing.assert_allclose(values(found).astype(float), values(whole), atol=0.01)
    again = attar.embed(run, quiet=True)
    assert encoded == [60, 3, 62], "unchanged: nothing"
    assert (values(again) == values(found)).all()


def test_a_learned_encoder_is_kept_and_said(data: Path, tmp_path: Path, encoded: list[int]) -> None:
    run = tmp_path / "run"
    first = attar.embed(run, data=str(data), **STEPS)
    before = values(first)  # read now: the run folder changes
    add(data, *range(500, 510))
    found = attar.embed(run, quiet=True)
    assert encoded == [60, 10]
    assert found.signals == first.signals
    for name, value in first.model.state.items():
        assert (found.model.state[name] == value).all()
    notes = attar.status(run)["stages"][1]["notes"]
    assert any("the encoder is the one learned here before, from " in note and "--relearn-share 0 learns anew" in note for note in notes)
    known = np.isin(attar.scan(run, quiet=True).column("path"), [f"added {seed}.png" for seed in range(500, 510)], invert=True)
    assert (values(found)[known] == before).all()
    anew = attar.embed(run, relearn_share=0, quiet=True)
    assert any((anew.model.state[name] != value).any() for name, value in first.model.state.items())
    assert encoded == [60, 10, 70]
    whole = attar.embed(tmp_path / "scratch", data=str(data), **STEPS)
    assert (values(anew) == values(whole)).all(), "learned anew it is a run from scratch"


def test_other_settings_or_mostly_new_items_learn_anew(data: Path, tmp_path: Path, encoded: list[int]) -> None:
    run = tmp_path / "run"
    attar.embed(run, data=str(data), **STEPS)
    attar.embed(run, self_steps=7, quiet=True)
    assert encoded == [60, 60]
    add(data, *range(500, 590))
    notes = (attar.embed(run, quiet=True), attar.status(run)["stages"][1]["notes"])[1]
    assert encoded == [60, 60, 150]
    assert not any("learned here before" in note for note in notes)


def test_a_kill_in_between_changes_nothing(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "SHARD", 16)
    run = tmp_path / "run"
    attar.embed(run, data=str(data), **ENCODER)
    add(data, *range(500, 540))
    calls = []
    encode = stage.encode

    def dies(*given: Any) -> Any:
        calls.append(len(given[3]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(*given)

    monkeypatch.setattr(stage, "encode", dies)
    with pytest.raises(KeyboardInterrupt):
        attar.embed(run, quiet=True)
    (run / "stages" / "embed.json").unlink()  # as if it had happened while the files were moved
    found = attar.embed(run, quiet=True)
    assert calls == [16, 16, 16, 8], "the shard that was done is not done again"
    whole = attar.embed(tmp_path / "scratch", data=str(data), **ENCODER)
    np.testing.assert_allclose(values(found).astype(float), values(whole), atol=0.01)


def test_a_folder_without_memory_of_before_is_made_anew(data: Path, tmp_path: Path, decoded: list[str], encoded: list[int]) -> None:
    run = tmp_path / "run"
    attar.embed(run, data=str(data), **ENCODER)
    shutil.rmtree(run / ".cache")
    add(data, 500)
    decoded.clear()
    items: Items = attar.scan(run, quiet=True)
    assert len(decoded) == 61 == len(items)
    attar.embed(run, quiet=True)
    assert encoded == [60, 61]
    assert len(list((run / ".cache").rglob("*.parquet"))) == 2, "what is kept of older results is removed"
