"""JPEG at a quarter and an eighth by our own kernels: libjpeg's pixels, means of boxes, and nothing at all of damaged files."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from attar.modalities import image, jpeg, jpeg_reduced

REDUCTIONS = (8, 4)


def photo(width: int, height: int, grain: float = 3.0, seed: int = 0) -> Image.Image:
    """Smooth colours, an edge, and grain: coefficients of every frequency."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = np.stack([np.sin(9 * x + 4 * y), np.cos(7 * y - 3 * x), np.sin(11 * x * y)], 2) * 80 + 128
    waves[height // 3 :, width // 2 :] += 60
    return Image.fromarray((waves + grain * rng.standard_normal((height, width, 1))).clip(0, 255).astype(np.uint8))


def encode(picture: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", **options)
    return stream.getvalue()


def by_pillow(data: bytes, reduction: int) -> np.ndarray:
    found = Image.open(io.BytesIO(data))
    found.draft(None, (found.width // reduction, found.height // reduction))
    return np.asarray(found.convert("RGB")).astype(int)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("size", [(320, 240), (131, 77), (8, 8), (9, 33), (17, 16)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subsampling": 0},
        {"optimize": True},
        {"restart_marker_blocks": 3},
        {"restart_marker_blocks": 1},
        {"quality": 5},
        {"quality": 100},
    ],
    ids=str,
)
def test_pixels_are_those_of_libjpeg(reduction: int, size: tuple[int, int], options: dict[str, object]) -> None:
    for mode in ("RGB", "L"):
        data = encode(photo(*size).convert(mode), **options)
        found = jpeg_reduced.decode(data, size, reduction)
        assert found is not None
        assert found.shape == (-(-size[1] // reduction), -(-size[0] // reduction), 3)
        difference = np.abs(found - by_pillow(data, reduction))
        assert difference.max() <= 3
        assert difference.mean() < 0.3


def upright(data: bytes) -> bytes:
    """A 4:2:2 file as 4:4:0, which Pillow does not write: the same blocks, in MCUs that are tall instead of wide."""
    place = data.index(b"\xff\xc0")
    return data[: place + 5] + bytes([384 >> 8, 384 & 255, 0, 128]) + data[place + 9 : place + 11] + b"\x12" + data[place + 12 :]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:2", "4:2:0", "4:4:0"])
def test_pixels_are_means_of_boxes(reduction: int, sampling: str) -> None:
    """Also where chroma is coarser along one side alone, which libjpeg enlarges instead."""
    data, size = encode(photo(256, 192, grain=0), quality=95, subsampling="4:2:2" if sampling == "4:4:0" else sampling), (256, 192)
    if sampling == "4:4:0":
        data, size = upright(data), (128, 384)
    full = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), float)
    means = full.reshape(size[1] // reduction, reduction, size[0] // reduction, reduction, 3).mean((1, 3))
    found = jpeg_reduced.decode(data, size, reduction)
    assert found is not None
    assert np.abs(found - means).mean() < 1


@pytest.mark.parametrize("options", [{"progressive": True}, {"keep_rgb": True}], ids=str)
def test_other_kinds_are_left_to_a_library(options: dict[str, object]) -> None:
    assert jpeg_reduced.decode(encode(photo(64, 48), **options), (64, 48), 8) is None
    assert jpeg_reduced.decode(encode(photo(64, 48).convert("CMYK")), (64, 48), 8) is None


def test_what_is_not_whole_is_left_to_a_library() -> None:
    data = encode(photo(160, 120))
    scan = data.index(b"\xff\xda")
    for other in (
        data[:-2],
        data[: len(data) // 2],
        data[:scan],
        b"",
        data[: scan + 20] + data[scan + 25 :],
        data[:-2] + b"abcd" + data[-2:],
    ):
        assert jpeg_reduced.decode(other, (160, 120), 8) is None
    assert jpeg_reduced.decode(data, (161, 120), 8) is None


def test_damage_anywhere_gives_pixels_or_nothing() -> None:
    """Any bytes changed anywhere give pixels of the right shape or nothing; where the bits cannot be whole, libjpeg has its say."""
    rng, given = np.random.default_rng(0), 0
    kinds = [encode(photo(96, 80), **options) for options in ({}, {"restart_marker_blocks": 2}, {"optimize": True, "subsampling": 0})]
    for turn in range(600):
        data = bytearray(kinds[turn % 3])
        first = 2 if turn % 2 else data.index(b"\xff\xda")
        for place in rng.integers(first, len(data), 1 + turn % 4):
            data[place] = rng.integers(256)
        for reduction in REDUCTIONS:
            found = jpeg_reduced.decode(bytes(data), (96, 80), reduction)
            assert found is None or found.shape == (80 // reduction, 96 // reduction, 3)
            given += found is not None
    assert 0 < given < 1200


def test_large_files_take_this_way_and_show_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = photo(1600, 1200, grain=12)
    data = encode(picture, quality=95)
    assert len(data) > jpeg.LARGE
    ours = image.stored(data, reduction=4, max_pixels=10**9).pixels.astype(int)
    asked = []
    monkeypatch.setattr(jpeg_reduced, "decode", lambda *given: asked.append(given[1:]))
    theirs = image.stored(data, reduction=4, max_pixels=10**9).pixels
    assert asked == [((1600, 1200), 4)]
    assert np.abs(ours - theirs).max() <= 3
    jpeg.decode(data, (1600, 1200), 2)
    jpeg.decode(encode(picture.reduce(4)), (400, 300), 4)
    assert len(asked) == 1  # half of the sides, and small files, are libjpeg-turbo's
