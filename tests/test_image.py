"""modalities.image: decoding what people have, refusing what is broken, and the pixels a model sees."""

from __future__ import annotations

import contextlib
import doctest
import io
import itertools
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import KINDS, make_image, png_bomb
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from attar.containers import Unreadable
from attar.errors import DataError
from attar.modalities import MODALITIES, image, jpeg
from attar.records import Items, Preprocess

LIMIT = 10_000_000
SMALL = Preprocess(size=(24, 24), resize_shortest=28)


def encode(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def pixels(data: bytes, **options: object) -> np.ndarray:
    return np.asarray(image.decode(data, max_pixels=LIMIT, **options)[0])


def note(data: bytes, name: str = "") -> str:
    return image.decode(data, max_pixels=LIMIT, name=name)[1]


def photo(width: int = 400, height: int = 300, seed: int = 0) -> Image.Image:
    """Smooth and detailed at once, as photographs are: noise whose amplitude falls with its frequency."""
    rng = np.random.default_rng(seed)
    total = np.zeros((height, width, 3))
    for scale in (2, 4, 8, 16, 32, 64):
        layer = Image.fromarray(rng.integers(0, 256, (height // scale + 2, width // scale + 2, 3), np.uint8))
        total += np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC), float) * scale
    return Image.fromarray((total / 126).clip(0, 255).astype(np.uint8))


def test_modalities_answer_the_same_questions() -> None:
    for modality in MODALITIES.values():
        assert modality.SUFFIXES
        assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in modality.SUFFIXES)
        assert callable(modality.Loader)
        assert callable(modality.show)
    assert {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm"} <= image.SUFFIXES
    assert not {".eps", ".ps", ".pdf", ".svg"} & image.SUFFIXES


# --- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF"])
def test_lossless_formats_give_the_same_pixels_without_a_note(kind: str) -> None:
    picture = make_image("discs", 1)
    decoded, remark = image.decode(encode(picture, kind), max_pixels=LIMIT)
    assert (decoded.mode, decoded.format, remark) == ("RGB", kind, "")
    assert np.array_equal(np.asarray(decoded), np.asarray(picture))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(60, 40), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    with Image.open(io.BytesIO(data)) as stored:
        expected = ImageOps.exif_transpose(stored).convert("RGB")
    assert np.array_equal(pixels(data), np.asarray(expected))
    assert note(data) == (f"turned by EXIF orientation {orientation}" if orientation > 1 else "")


@pytest.mark.parametrize("orientation", [0, 9, 700])
def test_senseless_orientation_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(encode(make_image("discs", 0), "PNG", exif=exif)), np.asarray(make_image("discs", 0)))


def test_damaged_exif_does_not_spoil_the_pixels() -> None:
    data = encode(make_image("discs", 0), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert pixels(data).shape == (40, 48, 3)


def test_cmyk() -> None:
    data = encode(make_image("discs", 0).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(pixels(data).astype(int) - np.asarray(make_image("discs", 0))).mean() < 6
    assert note(data) == "CMYK converted to RGB"


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "big-endian TIFF", "PPM"])
def test_sixteen_bits_are_scaled_by_their_full_range(kind: str) -> None:
    values = np.array([[0, 128, 257, 10_000, 32_768, 65_535]], np.uint16)
    if kind == "big-endian TIFF":
        entries = [(256, 3, 6), (257, 3, 1), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 3, 1), (279, 4, 12)]
        fields = b"".join(
            struct.pack(">HHI", tag, form, 1) + struct.pack(">HH" if form == 3 else ">I", *([v, 0][: 5 - form])) for tag, form, v in entries
        )
        data = b"MM\0*" + struct.pack(">I", 20) + values.astype(">u2").tobytes() + struct.pack(">H", len(entries)) + fields + b"\0" * 4
    else:
        data = encode(Image.fromarray(values), kind)
    assert pixels(data)[0, :, 0].tolist() == [0, 0, 1, 39, 128, 255]  # round(v · 255 / 65535)
    assert note(data) == "16-bit grey scaled to 8 bits"


def test_thirty_two_bits_are_scaled_by_the_range_of_their_values() -> None:
    data = encode(Image.fromarray(np.array([[-1.0, 0.0, 1.0, np.nan, np.inf]], np.float32)), "TIFF")
    assert pixels(data)[0, :, 0].tolist() == [0, 128, 255, 0, 255]
    assert note(data) == "32-bit grey scaled from its range -1 … 1 to 8 bits"
    whole = encode(Image.fromarray(np.array([[1_000_000, 2_000_000]], np.int32)), "TIFF")
    assert pixels(whole)[0, :, 0].tolist() == [0, 255]
    flat = encode(Image.fromarray(np.full((2, 2), 7.0, np.float32)), "TIFF")
    assert pixels(flat).max() == 0


def test_palette_grey_and_black_and_white() -> None:
    picture = make_image("discs", 3)
    for mode in ("P", "L", "1"):
        converted = picture.convert(mode)
        assert np.array_equal(pixels(encode(converted, "PNG")), np.asarray(converted.convert("RGB")))
        assert note(encode(converted, "PNG")) == ""


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_put_on_white(mode: str) -> None:
    see_through = Image.new("RGBA", (3, 1), (100, 100, 100, 255))
    see_through.putpixel((0, 0), (100, 100, 100, 0))
    see_through.putpixel((1, 0), (100, 100, 100, 128))
    data = encode(see_through.convert(mode), "PNG")
    assert pixels(data)[0, :, 0].tolist() == [255, 177, 100]  # 255 − (255 − 100) · alpha
    assert note(data) == "transparency put on white"
    opaque = encode(make_image("discs", 0).convert(mode), "PNG")
    assert note(opaque) == ""


def test_transparent_colours_of_palette_and_rgb() -> None:
    picture = Image.new("P", (2, 1), 0)
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        data = encode(picture, kind, transparency=1)
        assert pixels(data)[0].tolist() == [[10, 20, 30], [255, 255, 255]]
        assert note(data) == "transparency put on white"
    rgb = encode(Image.new("RGB", (2, 1), (9, 8, 7)), "PNG", transparency=(9, 8, 7))
    assert pixels(rgb).min() == 255


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_first_frame_of_animated(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))
    assert note(data) == "first of 3 frames"
    assert np.array_equal(pixels(data), np.asarray(frames[0]))


def test_mislabelled_files_are_read_by_content() -> None:
    data = encode(make_image("discs", 0), "JPEG")
    assert note(data, "photo.png") == "JPEG named .png"
    for name in ("photo.jpg", "photo.JPEG", "photo.jfif", "photo", "part.parquet::3"):
        assert note(data, name) == ""


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_truncated_files_are_refused(kind: str, share: float) -> None:
    data = encode(photo(120, 90), kind)
    with pytest.raises(Unreadable, match=r"truncated|damaged") as caught:
        image.decode(data[: int(len(data) * share)], max_pixels=LIMIT)
    assert caught.value.remedy == "copy it again from its source, or delete it"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"the file is empty \(0 bytes\); copy it again"),
        (b"hello, world " * 20, "not an image in a format attar reads"),
        (b"\xff\xd8\xff\xe0", "not an image in a format attar reads, or its header is damaged|truncated"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image in a format attar reads"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC, which attar does not read; convert it to JPEG or PNG"),
        (
            png_bomb(60_000, 50_000),
            r"too large: 3,000 megapixels by its header, the limit is 10 megapixels \(not decoded.*; raise max_megapixels",
        ),
        (png_bomb(4_000, 3_000), "too large: 4000 × 3000 pixels by its header"),
        (png_bomb(1_000, 1_000), "truncated|damaged"),
    ],
    ids=["empty", "text", "stump", "eps", "heic", "bomb", "large", "hollow"],
)
def test_what_is_no_image_is_refused_with_reason_and_remedy(data: bytes, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        image.decode(data, max_pixels=LIMIT)


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    bomb = encode(Image.new("1", (16_000, 16_000)), "PNG", compress_level=1)
    started = time.process_time()
    with pytest.raises(Unreadable, match=r"too large: 256 megapixels by its header, .* decompression bomb"):
        image.decode(bomb, max_pixels=100_000_000)
    assert time.process_time() - started < 0.1


def test_pillow_stays_silent_and_the_limit_is_ours() -> None:
    script = """
import io, warnings
from PIL import Image
from attar.containers import Unreadable
from attar.modalities import image
warnings.simplefilter("error", append=True)
def encoded(mode, **options):
    stream = io.BytesIO()
    Image.new(mode, (40, 40)).save(stream, "PNG", **options)
    return stream.getvalue()
Image.MAX_IMAGE_PIXELS = 1000
try:
    image.decode(encoded("RGB"), max_pixels=900)        # Pillow would warn
except Unreadable as error:
    assert "40 × 40 pixels" in str(error)
Image.MAX_IMAGE_PIXELS = 100
assert image.decode(encoded("RGB"), max_pixels=10_000)[0].size == (40, 40)   # Pillow would refuse
image.decode(encoded("P", transparency=b"\\0\\1"), max_pixels=10_000)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"]), st.integers(0, 2**32 - 1))
def test_random_damage_gives_an_image_or_a_reason(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray(encode(make_image("discs", 0), kind))
    for position in rng.integers(0, min(len(data), 400), 4):
        data[position] = rng.integers(256)
    with contextlib.suppress(Unreadable):  # and nothing else
        decoded, _ = image.decode(bytes(data), max_pixels=LIMIT)
        assert decoded.mode == "RGB"
        assert decoded.width * decoded.height <= LIMIT


# --- preprocessing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(400, 300), (300, 401), (37, 53), (256, 256), (999, 257), (255, 1000)])
@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "lanczos", "nearest", "box"])
def test_pixels_are_those_of_transformers(size: tuple[int, int], resample: str) -> None:
    transformers = pytest.importorskip("transformers")

    def reference(name: str) -> type:
        return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)

    picture, code = photo(*size), int(image.FILTERS[resample])
    plain = {"do_rescale": False, "do_normalize": False, "resample": code}
    cropped = reference("MobileNetV2ImageProcessor")(size={"shortest_edge": 64}, crop_size={"height": 56, "width": 57}, **plain)
    straight = reference("ViTImageProcessor")(size={"height": 56, "width": 48}, **plain)
    for processor, preprocess in (
        (cropped, Preprocess(size=(56, 57), resize_shortest=64, resample=resample)),
        (straight, Preprocess(size=(56, 48), resample=resample)),
    ):
        expected = np.asarray(processor(picture, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
        found = image.resize_crop(picture, preprocess)
        assert found.shape == expected.shape
        assert (np.abs(found.astype(int) - expected) <= 1).mean() > 0.999


def test_smaller_than_the_crop_is_padded_by_its_edge() -> None:
    picture = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    found = image.resize_crop(picture, Preprocess(size=(5, 4), resize_shortest=2))
    assert found.shape == (5, 4, 3)
    assert np.array_equal(found[2:4, 1:3], np.asarray(picture))
    assert np.array_equal(found[0], found[2])
    assert np.array_equal(found[:, 0], found[:, 1])


def test_a_strip_takes_bounded_memory() -> None:
    strip = Image.new("RGB", (2_000_000, 1), (1, 2, 3))
    found = image.resize_crop(strip, Preprocess(size=(224, 224), resize_shortest=256))
    assert found.shape == (224, 224, 3)
    assert (found == (1, 2, 3)).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40), st.one_of(st.none(), st.integers(1, 50)))
def test_every_size_becomes_the_size_asked(width: int, height: int, high: int, wide: int, shortest: int | None) -> None:
    flat = Image.new("RGB", (width, height), (7, 8, 9))
    found = image.resize_crop(flat, Preprocess(size=(high, wide), resize_shortest=shortest))
    assert found.shape == (high, wide, 3)
    assert (found == (7, 8, 9)).all()


@pytest.mark.parametrize("orientation", [1, 3, 6, 7, 8])
@pytest.mark.parametrize("shape", [(1203, 901), (640, 1999)])
@pytest.mark.parametrize("shortest", [72, None])
def test_reduced_jpeg_decoding_is_nearly_full_decoding(orientation: int, shape: tuple[int, int], shortest: int | None) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(*shape), "JPEG", exif=exif, quality=90)
    preprocess = Preprocess(size=(64, 56), resize_shortest=shortest)
    full = image.resize_crop(image.decode(data, max_pixels=LIMIT)[0], preprocess).astype(int)
    reduced = image.prepare(data, preprocess, max_pixels=LIMIT).astype(int)
    assert full.std() > 10
    assert np.abs(full - reduced).mean() < 1
    assert np.abs(full - reduced).max() <= 12


def test_small_jpeg_and_lossless_are_decoded_in_full() -> None:
    for kind, picture in (("JPEG", photo(120, 90)), ("PNG", photo(1000, 800))):
        data = encode(picture, kind)
        expected = image.resize_crop(image.decode(data, max_pixels=LIMIT)[0], SMALL)
        same = np.array_equal(image.prepare(data, SMALL, max_pixels=LIMIT), expected)
        assert same


def test_the_reduction_is_the_largest_that_leaves_enough() -> None:
    assert doctest.testmod(jpeg).failed == 0
    assert [jpeg.reduction_for(shrink) for shrink in (0.1, 1, 1.99, 2, 3.99, 4, 7.99, 8, float("inf"))] == [1, 1, 1, 2, 2, 4, 4, 8, 8]


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [(120, 90), (131, 77), (17, 16), (9, 33), (15, 15), (3, 2), (1, 1)])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"keep_rgb": True}], ids=str)
def test_jpegs_are_decoded_as_pillow_does(reduction: int, size: tuple[int, int], options: dict[str, object]) -> None:
    for mode in ("RGB", "L"):
        data = encode(photo(*size).convert(mode), "JPEG", **options)
        expected = Image.open(io.BytesIO(data))
        if min(size) >= reduction:
            expected.draft(None, (size[0] // reduction, size[1] // reduction))
        else:
            expected = expected.reduce(reduction)
        found = image.stored(data, reduction=reduction, max_pixels=LIMIT).pixels
        assert found.shape == (-(-size[1] // reduction), -(-size[0] // reduction), 3)
        assert np.abs(found.astype(int) - np.asarray(expected.convert("RGB"))).max() <= 2


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        *(("PNG", mode) for mode in ("RGB", "RGBA", "P")),
        *(("TIFF", mode) for mode in ("RGB", "RGBA", "CMYK")),
        *(("WEBP", mode) for mode in ("RGB", "RGBA")),
        *(("JPEG", mode) for mode in ("RGB", "CMYK")),
        ("MPO", "RGB"),
    ],
)
def test_what_is_not_scaled_in_decoding_is_reduced_by_means_of_boxes(kind: str, mode: str) -> None:
    picture = photo(101, 62)
    data = encode(picture.convert(mode), kind, **({"lossless": True} if kind == "WEBP" else {}))
    full, _ = image.decode(data, max_pixels=LIMIT)
    found = image.stored(data, reduction=4, max_pixels=LIMIT).pixels
    expected = np.asarray(full.reduce(4)).astype(int)
    assert found.shape == expected.shape
    difference = np.abs(found - expected)
    assert difference.max() <= (40 if kind in ("JPEG", "MPO") else 0)
    assert difference.mean() < 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 2, 5, 6, 8])
def test_sizes_and_turns_are_told_apart_from_the_pixels(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photo(60, 40), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    upright, _ = image.decode(data, max_pixels=LIMIT)
    assert image.upright_size(data, max_pixels=LIMIT) == (upright.height, upright.width)
    found = image.stored(data, max_pixels=LIMIT)
    turned = image._turn(Image.fromarray(found.pixels), found.orientation)
    assert np.array_equal(np.asarray(turned), np.asarray(upright))


@pytest.mark.parametrize("reduction", [1, 4])
def test_damage_is_told_at_every_scale(reduction: int) -> None:
    data = encode(photo(120, 90), "JPEG")
    for cut in (data[: len(data) // 2], data[:-1], data[:40]):
        with pytest.raises(Unreadable, match=r"truncated|damaged"):
            image.stored(cut, reduction=reduction, max_pixels=LIMIT)
    with pytest.raises(Unreadable, match="too large"):
        image.stored(data, reduction=reduction, max_pixels=1000)
    odd = data[: data.index(b"\xff\xda")] + b"\xff\xff\xff" + data[data.index(b"\xff\xda") :]  # fill bytes: no damage
    assert image.stored(odd, reduction=reduction, max_pixels=LIMIT).pixels.shape == (-(-90 // reduction), -(-120 // reduction), 3)


def test_damage_that_can_be_read_over_is() -> None:
    data = bytearray(encode(photo(120, 90), "JPEG", restart_marker_blocks=4))
    place = data.index(b"\xff\xd3", data.index(b"\xff\xda"))
    data[place - 12 : place - 6] = b"\x00\x01\x02\x03\x04\x05"
    assert image.decode(bytes(data), max_pixels=LIMIT)[0].size == (120, 90)
    assert image.stored(bytes(data), reduction=2, max_pixels=LIMIT).pixels.shape == (45, 60, 3)


# --- fingerprints and display ----------------------------------------------------------------------------------------


def test_thumbnail_is_the_mean_of_each_part() -> None:
    picture = photo(160, 128)
    grey = np.asarray(picture.convert("L"), float)
    expected = grey.reshape(16, 8, 16, 10).mean((1, 3))
    found = np.frombuffer(image.thumbnail(picture), np.uint8).reshape(16, 16)
    assert np.abs(found - expected).max() <= 1
    assert len(image.thumbnail(Image.new("RGB", (1, 1)))) == 256


def test_content_hash_is_of_pixels_and_shape_only() -> None:
    picture = make_image("noise", 5)
    same = [image.decode(encode(picture, kind), max_pixels=LIMIT)[0] for kind in ("PNG", "BMP", "TIFF")]
    assert {image.content_hash(decoded) for decoded in same} == {image.content_hash(picture)}
    assert len(image.content_hash(picture)) == 32
    other = picture.copy()
    other.putpixel((0, 0), (1, 2, 3))
    reshaped = Image.frombytes("RGB", (picture.height, picture.width), picture.tobytes())
    assert len({image.content_hash(one) for one in (picture, other, reshaped)}) == 3


def test_show_makes_a_small_jpeg() -> None:
    for shown in (photo(300, 200), encode(photo(300, 200), "PNG")):
        with Image.open(io.BytesIO(image.show(shown, 90))) as small:
            assert (small.format, small.size) == ("JPEG", (90, 60))
    with Image.open(io.BytesIO(image.show(make_image("discs", 0), 90))) as small:
        assert small.size == (48, 40)  # never enlarged


# --- loading ---------------------------------------------------------------------------------------------------------


def test_batches_are_the_items_in_the_order_asked(items: Items, photos: Path) -> None:
    ids = [59, 0, 7, 7, 31]
    paths = items.column("path")
    expected = [image.resize_crop(Image.open(photos / paths[item]), SMALL) for item in ids]
    for workers in (1, 3, 8):
        with image.Loader(items, SMALL, workers=workers) as loader:
            assert np.array_equal(loader.batch(ids), np.stack(expected))
            assert loader.batch(ids).dtype == np.uint8
            assert loader.batch([]).shape == (0, 24, 24, 3)
            assert np.array_equal(np.asarray(loader.original(3)), np.asarray(Image.open(photos / paths[3])))


def test_stream_keeps_the_order_and_reads_two_batches_ahead(items: Items) -> None:
    batches = [np.arange(start, start + 7) % 60 for start in range(0, 84, 7)]
    asked: list[int] = []

    def source() -> Iterator[np.ndarray]:
        for number, ids in enumerate(batches):
            asked.append(number)
            yield ids

    with image.Loader(items, SMALL, workers=2) as loader:
        whole = [loader.batch(ids) for ids in batches]
        for number, (ids, found) in enumerate(loader.stream(source())):
            assert np.array_equal(ids, batches[number])
            assert np.array_equal(found, whole[number])
            assert len(asked) == min(number + 3, len(batches))
        assert len(asked) == len(batches)
        assert list(loader.stream([])) == []


def test_a_stream_may_be_endless_and_left_early(items: Items) -> None:
    before = threading.active_count()
    with image.Loader(items, SMALL, workers=2) as loader:
        stream = loader.stream(itertools.cycle([np.arange(60)]))
        next(stream)
        stream.close()
        kept = loader.stream(itertools.cycle([np.arange(60)]))  # still open when the loader is closed
        next(kept)
    assert threading.active_count() == before


def changed(items: Items, photos: Path, tmp_path: Path) -> Items:
    """The same items over a copy of the folder in which items 5 and 6 have changed since."""
    root = tmp_path / "copy"
    for path in items.column("path"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes((photos / path).read_bytes())
    (root / items.column("path")[5]).unlink()
    (root / items.column("path")[6]).write_bytes(b"short")
    return replace(items, root=str(root))


def test_a_file_that_changed_since_the_scan_is_named(items: Items, photos: Path, tmp_path: Path) -> None:
    stale = changed(items, photos, tmp_path)
    again = "run the same command again"
    with image.Loader(stale, SMALL, workers=2) as loader:
        with pytest.raises(DataError, match=rf"discs/005\.png in .*copy: has changed since it was scanned \(cannot be opened.*{again}"):
            loader.batch([4, 5])
        with pytest.raises(DataError, match=rf"discs/006\.png in .*\(has 5 bytes instead of \d+\); {again}"):
            loader.original(6)
        stream = loader.stream([[1, 2], [3, 5], [8, 9]])
        assert next(stream)[0].tolist() == [1, 2]
        with pytest.raises(DataError, match=r"005\.png"):
            next(stream)
        assert loader.batch([1]).shape == (1, 24, 24, 3)  # still of use


def test_an_error_in_the_ids_reaches_the_reader(items: Items) -> None:
    def source() -> Iterator[list[int]]:
        yield [1]
        raise KeyError("mine")

    with image.Loader(items, SMALL, workers=2) as loader, pytest.raises(KeyError, match="mine"):
        list(loader.stream(source()))


def test_an_image_that_grew_beyond_its_scan_is_not_decoded(items: Items, photos: Path) -> None:
    table = items.table.set_column(items.table.schema.get_field_index("width"), "width", pa.array([3] * 60, pa.int32()))
    with image.Loader(replace(items, table=table), SMALL, workers=1) as loader, pytest.raises(DataError, match="has changed since"):
        loader.batch([0])


def test_made_images_differ() -> None:
    assert len({image.content_hash(make_image(kind, seed)) for kind in KINDS for seed in range(20)}) == 60
