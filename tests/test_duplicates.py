from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import attar
from attar.cli import main
from attar.errors import DataError, UsageError
from attar.stages.curate.likeness import SIDE, WINDOWS, Window, coarse_patterns, has_pattern, likeness, patterns


def scene(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """A picture with structure at every scale, like a photo: random waves with amplitudes of 1/f, in colour."""
    rng = np.random.default_rng(seed)
    f = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.fftfreq(width)[None] * width)
    waves = np.fft.ifft2(np.fft.fft2(rng.normal(size=(height, width))) / np.maximum(f, 1) ** 1.2).real
    grey = 128 + 45 * (waves - waves.mean()) / waves.std()
    return Image.fromarray((grey[..., None] + rng.normal(size=3) * 15).clip(0, 255).astype(np.uint8))


def again(picture: Image.Image, quality: int = 60) -> Image.Image:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality)
    return Image.open(io.BytesIO(stream.getvalue())).convert("RGB")


def part(picture: Image.Image, left: float, top: float, scale: float) -> Image.Image:
    w, h = picture.size
    return picture.crop((round(left * w), round(top * h), round((left + scale) * w), round((top + scale) * h)))


def thumb(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 scenes, and of some: a copy, encoded again, darker, scaled, mirrored, a part; two blank ones and a broken file."""
    home = tmp_path_factory.mktemp("data") / "photos"
    home.mkdir()
    for seed in range(40):
        scene(seed).save(home / f"{seed:02d}.png")
    scene(3).save(home / "copy of 03.bmp")
    again(scene(4)).save(home / "again 04.png")
    scene(5).point(lambda v: int(v * 0.7)).save(home / "dark 05.png")
    scene(6).resize((96, 72), Image.Resampling.BICUBIC).save(home / "small 06.png")
    scene(7).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(home / "mirror 07.png")
    part(scene(8), 0.1, 0.05, 0.8).save(home / "part 08.png")
    for number in (1, 2):
        Image.new("RGB", (60, 40), (0, 0, 100 + number)).save(home / f"blank {number}.png")
    (home / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return home


def told(rows: list[dict]) -> set[tuple[str, str, str]]:
    return {(row["path"], row["kind"], row["of"]) for row in rows if not row["keep"]}


WHOLE = {
    ("copy of 03.bmp", "exact", "03.png"),
    ("again 04.png", "same", "04.png"),
    ("dark 05.png", "same", "05.png"),
    ("small 06.png", "same", "06.png"),
    ("mirror 07.png", "mirrored", "07.png"),
}


def test_every_kind_is_found_and_nothing_else(folder, capsys):
    rows = attar.duplicates(folder)
    assert {(*sorted((row["path"], row["of"])), row["kind"]) for row in rows} == {(*sorted((a, b)), kind) for a, kind, b in WHOLE}
    assert len(told(rows)) == 5
    assert "5 of 48 pictures are copies of 5 others: 1 exact, 3 same, 1 mirrored; 1 could not be read" in capsys.readouterr().err
    by_group = {row["group"]: [] for row in rows}
    for row in rows:
        by_group[row["group"]].append(row)
    assert [len(group) for group in by_group.values()] == [2] * 5
    assert all([row["keep"] for row in group] == [True, False] for group in by_group.values()), "the one to keep comes first"
    small = next(row for row in rows if row["path"] == "small 06.png")
    assert (small["keep"], small["width"], small["height"]) == (False, 96, 72)


def test_parts_and_mirrors_are_a_setting(folder):
    rows = attar.duplicates(folder, parts=True, mirrored=False, quiet=True)
    found = told(rows)
    assert ("part 08.png", "part", "08.png") in found
    assert not any("mirror 07" in path for path, _, _ in found)
    whole = next(row for row in rows if row["path"] == "08.png")
    assert (whole["keep"], whole["kind"], whole["of"]) == (True, "contains", "part 08.png")
    assert not {path for path, _, _ in found} & {f"{seed:02d}.png" for seed in range(40) if seed != 3}


def test_leaks_between_two_folders(folder, tmp_path, capsys):
    test = tmp_path / "test"
    test.mkdir()
    for seed in (100, 101):
        scene(seed).save(test / f"{seed}.png")
    scene(9).save(test / "same pixels.png")
    again(scene(10)).save(test / "again.png")
    again(scene(11).transpose(Image.Transpose.FLIP_LEFT_RIGHT)).save(test / "mirror.png")
    part(scene(12), 0.2, 0.1, 0.75).save(test / "part.png")
    rows = attar.leaks(test, folder, parts=True, table=tmp_path / "leaks.csv")
    assert {(row["path"], row["kind"], row["of"]) for row in rows} == {
        ("same pixels.png", "exact", "09.png"),
        ("again.png", "same", "10.png"),
        ("mirror.png", "mirrored", "11.png"),
        ("part.png", "part", "12.png"),
    }
    assert "4 of 6 pictures of" in capsys.readouterr().err
    with (tmp_path / "leaks.csv").open() as stream:
        assert [row["path"] for row in csv.DictReader(stream)] == [row["path"] for row in rows]
    back = attar.leaks(folder, test, parts=True, mirrored=False, quiet=True)
    assert {(row["path"], row["kind"]) for row in back} == {("09.png", "exact"), ("10.png", "same"), ("12.png", "contains")}


def test_run_folders_stand_for_their_data(folder, tmp_path):
    attar.scan(tmp_path / "run", data=str(folder), quiet=True)
    assert attar.duplicates(tmp_path / "run", quiet=True) == attar.duplicates(folder, quiet=True)


def test_any_number_of_workers_gives_the_same(folder):
    assert attar.duplicates(folder, parts=True, workers=1, quiet=True) == attar.duplicates(folder, parts=True, workers=3, quiet=True)


def test_a_still_video_is_one_group(tmp_path):
    for number in range(60):
        noise = np.random.default_rng(number).integers(-2, 3, (120, 160, 3))
        frame = (np.asarray(scene(0)).astype(int) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(frame).save(tmp_path / f"{number:03d}.png")
    rows = attar.duplicates(tmp_path, quiet=True)
    assert len(rows) == 60
    assert {row["group"] for row in rows} == {0}
    assert sum(row["keep"] for row in rows) == 1


def test_the_command_line(folder, tmp_path, capsys):
    assert main(["duplicates", str(folder), "--no-mirrored", "--table", str(tmp_path / "twice.csv"), "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.splitlines()[0].split("\t")[:3] == ["group", "path", "keep"]
    assert len(said.out.splitlines()) == 9 == len((tmp_path / "twice.csv").read_text().splitlines())
    assert main(["duplicates", str(folder), "--table", str(tmp_path / "twice.csv")]) == 2
    assert "exists already and is not touched" in capsys.readouterr().err
    assert main(["leaks", str(folder), str(folder), "--likeness", "1.2"]) == 2
    assert "likeness: 1.2; expected 0.5 to 1" in capsys.readouterr().err


def test_bad_input(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of its 1 pictures can be read"):
        attar.duplicates(tmp_path, quiet=True)
    with pytest.raises(DataError, match="cannot be found"):
        attar.leaks(tmp_path / "nowhere", tmp_path, quiet=True)
    with pytest.raises(UsageError, match=r"likeness: 0\.2"):
        attar.duplicates(tmp_path, likeness=0.2)


# Kernels


def test_patterns_are_correlations():
    thumbs = np.stack([thumb(scene(seed)) for seed in range(6)])
    small = thumbs.reshape(6, 16, 2, 16, 2).mean((2, 4)).reshape(6, -1)
    np.testing.assert_allclose(patterns(thumbs) @ patterns(thumbs).T, np.corrcoef(small), atol=1e-5)
    dim = (thumbs * 0.6).astype(np.uint8)
    assert ((patterns(thumbs) * patterns(dim)).sum(1) > 0.99).all()
    assert has_pattern(np.stack([thumbs[0], np.full_like(thumbs[0], 9)])).tolist() == [True, False]


def test_a_part_is_near_one_of_the_windows():
    rng, wholes, parts = np.random.default_rng(0), [], []
    for seed in range(60):
        scale, picture = rng.uniform(0.72, 0.93), scene(seed)
        left, top = rng.uniform(0, 1 - scale, 2)
        wholes.append(thumb(picture))
        parts.append(thumb(part(picture, left, top, scale)))
    own = coarse_patterns(np.stack(parts), Window(0, 0, 1))
    reached = np.max([(own * coarse_patterns(np.stack(wholes), window)).sum(1) for window in WINDOWS], axis=0)
    assert np.quantile(reached, 0.1) > 0.88


def test_the_window_is_found_and_only_of_the_same_picture():
    windows = [(0.1, 0.05, 0.8), (0.0, 0.2, 0.75), (0.15, 0.1, 0.85)]
    wholes = np.stack([thumb(scene(seed)) for seed in range(3)])
    parts = np.stack([thumb(part(scene(seed), *window)) for seed, window in enumerate(windows)])
    near = Window(0.09, 0.09, 0.8)
    alike, scale = likeness(parts, wholes, near, search=True)
    assert (alike > 0.9).all()
    np.testing.assert_allclose(scale, [window[2] for window in windows], atol=0.03)
    assert (likeness(parts, wholes[[1, 2, 0]], near, search=True)[0] < 0.7).all()
    same, _ = likeness(wholes, wholes, Window(0, 0, 1))
    np.testing.assert_allclose(same, 1, atol=0.02)
