from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import make_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter
from test_cluster import make_items
from test_curate import decide

from attar.config import FLAGS, Data, build_config
from attar.errors import UsageError
from attar.modalities.blur import WIDTH, blur
from attar.records import Items
from attar.stages.curate.quality import COMMON, flags, words
from attar.stages.scan import scan


def slow_blur(grey: np.ndarray) -> float:
    """Crete et al. with the filter written out."""
    shares = []
    for lines in (grey.astype(float), grey.T.astype(float)):
        rows = len(lines)
        mean = [np.mean([lines[min(max(i + k, 0), rows - 1)] for k in range(-(WIDTH // 2), WIDTH // 2 + 1)], axis=0) for i in range(rows)]
        once = [np.abs(lines[i + 1] - lines[i]) for i in range(rows - 1)]
        twice = [np.abs(mean[i + 1] - mean[i]) for i in range(rows - 1)]
        total = np.sum(once)
        if total:
            shares.append(1 - np.sum([np.maximum(a - b, 0) for a, b in zip(once, twice)]) / total)
    return max(shares, default=float("nan"))


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_blur_is_that_of_a_slow_reference(height, width, seed):
    grey = np.random.default_rng(seed).integers(0, 256, (height, width)).astype(np.uint8)
    assert blur(Image.fromarray(grey)) == pytest.approx(slow_blur(grey), nan_ok=True)


def test_blur_grows_with_blurring_and_not_with_contrast():
    photo = make_image("stripes", 3, 300, 240)
    sharp, *soft = [blur(photo.filter(ImageFilter.GaussianBlur(radius))) for radius in (0, 1, 2, 4)]
    assert sharp < 0.25 < 0.38 < min(soft)
    assert blur(ImageEnhance.Contrast(photo).enhance(0.5)) == pytest.approx(sharp, abs=0.05)
    assert np.isnan(blur(Image.new("RGB", (50, 50), "red")))
    assert 0 <= blur(photo.resize((1500, 1200))) <= 1


def usual(count: int = 100) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "thumbs": rng.integers(30, 220, (count, 256)).astype(np.uint8),
        "width": np.full(count, 640),
        "height": np.full(count, 480),
        "blurs": rng.normal(0.3, 0.03, count).astype(np.float32),
    }


def test_each_fault_has_its_flag():
    given = usual()
    given["thumbs"][0] = 128
    given["thumbs"][1] //= 8
    given["thumbs"][2] = 228 + given["thumbs"][2] // 10
    given["blurs"][[3, 0]] = 0.8
    given["blurs"][4] = np.nan
    given["width"][5], given["height"][5] = 160, 100
    given["width"][6], given["height"][6] = 4000, 300
    found = flags(**given)
    assert {name: np.flatnonzero(rows).tolist() for name, rows in found.items()} == {
        "blank": [0],
        "blurred": [3],
        "dark": [1],
        "glaring": [2],
        "odd size": [5],
        "odd shape": [6],
    }
    assert words(found, 100)[[0, 1, 4, 5]].tolist() == ["blank", "dark", "", "odd size"]
    given["thumbs"][5] //= 8
    assert words(flags(**given), 100)[5] == "dark, odd size"


def test_what_is_common_is_not_a_fault():
    given = usual()
    given["thumbs"][:11] //= 8
    assert not flags(**given)["dark"].any()
    given = usual()
    given["thumbs"][: int(100 * COMMON)] //= 8
    assert flags(**given)["dark"].sum() == 10
    blurry = usual()
    blurry["blurs"] += 0.4  # a set that is soft throughout
    assert not flags(**blurry)["blurred"].any()


@pytest.mark.parametrize("count", [0, 1])
def test_tiny_sets_and_missing_blur(count):
    given = {name: column[:count] for name, column in usual(1).items()} | {"blurs": np.full(count, np.nan, np.float32)}
    assert not any(rows.any() for rows in flags(**given).values())
    assert words(flags(**given), count).tolist() == [""] * count


def test_scan_measures_and_curation_flags(photos: Path, tmp_path: Path, job):
    data = tmp_path / "photos"
    data.mkdir()
    for number, path in enumerate(sorted(photos.rglob("*.png"))):
        Image.open(path).save(data / f"{number:03d}.png")
    Image.new("RGB", (48, 40), (90, 90, 90)).save(data / "blank.png")
    Image.open(photos / "stripes" / "003.png").filter(ImageFilter.GaussianBlur(4)).save(data / "soft.png")
    Image.open(photos / "discs" / "003.png").point(lambda v: v // 9).save(data / "night.png")
    Image.open(photos / "discs" / "004.png").resize((240, 40)).save(data / "strip.png")
    items = scan(Data(data=str(data)), job("scan"))
    assert items.column("blur").dtype == np.float32
    table = items.table.set_column(items.table.schema.get_field_index("split"), "split", [["train"] * len(items)])
    items = Items(root=items.root, table=table, quarantine=items.quarantine)
    values = np.random.default_rng(0).normal(size=(len(items), 16)).astype(np.float32)
    selection, notes = decide(values, tmp_path / "a", items)
    told = {path: flag for path, flag in zip(items.column("path"), selection.column("flag")) if flag}
    assert told == {"blank.png": "blank", "night.png": "dark", "strip.png": "odd shape", "soft.png": "blurred"}
    assert selection.column("keep").all(), "flagged, not dropped"
    assert "flagged: 1 blank, 1 blurred, 1 dark, 1 odd shape" in notes
    selection, notes = decide(values, tmp_path / "b", items, drop_flagged="blank, dark")
    assert {items.column("path")[row]: selection.column("reason")[row] for row in np.flatnonzero(~selection.column("keep"))} == {
        "blank.png": "blank",
        "night.png": "dark",
    }
    assert selection.column("weight").sum() == len(items) - 2
    assert selection.column("keep")[selection.column("witness")[~selection.column("keep")]].all()
    assert "→ flagged 2 → kept 62;" in notes[-1]


def test_flags_are_dropped_with_their_copies_and_never_a_medoid(tmp_path: Path):
    thumbs = usual(60)["thumbs"]
    thumbs[[0, 7]] = 128  # item 0 is a medoid
    values = np.random.default_rng(0).normal(size=(60, 16)).astype(np.float32)
    content = [f"c{7 if number == 8 else number}" for number in range(60)]
    thumbs[8] = thumbs[7]
    items = make_items(60, thumbs=thumbs, content=content, split=["train"] * 60)
    selection, _ = decide(values, tmp_path, items, drop_flagged="blank")
    assert np.flatnonzero(selection.column("reason") == "blank").tolist() == [7, 8]
    assert selection.column("flag")[[0, 7, 8]].tolist() == ["blank"] * 3
    assert selection.column("keep")[0]


def test_unknown_flags_are_refused():
    with pytest.raises(UsageError, match="drop_flagged: hazy; expected some of blank, blurred, dark, glaring, odd size, odd shape"):
        build_config({"data": "x", "drop_flagged": "hazy, dark"})
    assert build_config({"data": "x", "drop_flagged": "odd size,dark"}).curate.dropped_flags == ("odd size", "dark")
    assert FLAGS == ("blank", "blurred", "dark", "glaring", "odd size", "odd shape")
