"""Still images: which files they are, how they are decoded, made into a batch and shown."""

from __future__ import annotations

import hashlib
import io
import os
import re
import struct
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from attar.containers import COPY_AGAIN, Unreadable
from attar.data import Reader
from attar.errors import DataError
from attar.modalities import jpeg
from attar.modalities.blur import blur as blur
from attar.records import Items, Preprocess

# What Pillow decodes by itself and tells by its first bytes. Not EPS (runs Ghostscript), TGA (no mark of its own), ICO (its header
# does not bound what it decodes to).
_NAMED = ("JPEG", "MPO", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000", "QOI")
Image.init()
FORMATS = tuple(name for name in _NAMED if name in Image.OPEN)  # AVIF and WebP depend on how Pillow was built
SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)

# Pillow's remarks about odd metadata are of no use to a person; what matters is in the note of the item.
warnings.filterwarnings("ignore", module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

FILTERS = {name: Image.Resampling[name.upper()] for name in ("nearest", "bilinear", "bicubic", "lanczos", "box")}
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SAME = {"MPO": "JPEG", "DIB": "BMP"}  # a format that goes by the other's suffixes


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """The image by its header alone: no pixel is decoded yet."""
    if not data:
        raise Unreadable("the file is empty (0 bytes)", COPY_AGAIN)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and max_pixels > limit:
        Image.MAX_IMAGE_PIXELS = max_pixels  # the user allows more than Pillow would
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise _too_large(f"{int(re.search(r'[0-9]+', str(error)).group()) / 1e6:,.0f} megapixels", max_pixels) from None  # type: ignore[union-attr]
    except Image.UnidentifiedImageError:
        heic = data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc")
        raise Unreadable(
            "HEIC, which attar does not read" if heic else "not an image in a format attar reads, or its header is damaged",
            "convert it to JPEG or PNG" if heic else COPY_AGAIN,
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever a malformed header leads them to
        raise Unreadable(f"its header is damaged ({error})", COPY_AGAIN) from None
    if image.width * image.height > max_pixels:
        raise _too_large(f"{image.width} × {image.height} pixels", max_pixels)
    return image


def _too_large(found: str, max_pixels: int) -> Unreadable:
    return Unreadable(
        f"too large: {found} by its header, the limit is {max_pixels / 1e6:g} megapixels (not decoded: it may be a decompression bomb)",
        "raise max_megapixels if it is genuine",
    )


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # as above
        text = str(error) or type(error).__name__
        cut = "truncated" in text or isinstance(error, EOFError)
        raise Unreadable(
            f"the file is truncated ({text})" if cut else f"the image data is damaged ({text})",
            COPY_AGAIN,
        ) from None


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 … 8; 1 where it is absent or not to be understood."""
    try:
        found = image.getexif().get(0x0112, 1)
    except Exception:  # damaged metadata does not make the pixels unusable
        return 1
    return found if found in TURNS else 1


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def _frames(image: Image.Image) -> int:
    try:
        return getattr(image, "n_frames", 1)
    except Exception:  # a damaged later frame: the first is what counts
        return 1


def _grey(image: Image.Image) -> tuple[Image.Image, str]:
    """8-bit grey from deeper grey: 16-bit files by their full range, round(v · 255 / 65535); 32-bit ones by the range of their values."""
    values = np.asarray(image).astype(np.float64)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):  # older Pillow opens these as "I"
        low, high, note = 0.0, 65535.0, "16-bit grey scaled to 8 bits"
    else:
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        note = f"32-bit grey scaled from its range {low:g} … {high:g} to 8 bits"
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    scaled = np.rint((values - low) * (255.0 / ((high - low) or 1.0)))
    return Image.fromarray(scaled.clip(0, 255).astype(np.uint8)), note


def _to_rgb(image: Image.Image) -> tuple[Image.Image, str]:
    """A loaded image as RGB, and what that changed."""
    mode, note = image.mode, ""
    if mode == "RGB" and "transparency" not in image.info:
        return image, ""
    if mode[0] in "IF":
        image, note = _grey(image)
    elif mode in ("CMYK", "YCbCr", "HSV"):
        note = f"{mode} converted to RGB"
    elif mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:  # type: ignore[index, misc]
            image, note = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image), "transparency put on white"
    elif mode not in ("1", "L", "P", "RGB", "RGBX"):
        raise Unreadable(f"colour mode {mode}, which has no plain conversion to RGB", "save it as RGB")
    return image.convert("RGB"), note


def _pillow(image: Image.Image, reduction: int) -> tuple[Image.Image, str]:
    """The same by Pillow for every format, and what had to be changed; some of its plugins turn while they load."""
    small = min(image.size) < reduction  # draft would take a larger scale
    reduced = reduction == 1 or (not small and image.draft(None, (image.width // reduction, image.height // reduction)))
    _load(image)
    rgb, change = _to_rgb(image)
    return rgb if reduced else rgb.reduce(reduction), change


def _jpeg(image: Image.Image) -> bool:
    """Whether it is one of the JPEGs that need not go through Pillow."""
    return image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")


def _rgb(image: Image.Image, data: bytes, reduction: int = 1) -> tuple[Image.Image, str]:
    """The same by whichever is fastest."""
    pixels = jpeg.decode(data, image.size, reduction) if _jpeg(image) else None
    return _pillow(image, reduction) if pixels is None else (Image.fromarray(pixels), "")


class Stored(NamedTuple):
    """An image as its file holds it: not turned yet, perhaps reduced."""

    pixels: UInt8[np.ndarray, "height width 3"]
    orientation: int  # by EXIF, 1 … 8


def stored(data: bytes, *, reduction: int = 1, max_pixels: int) -> Stored:
    """The first frame of an encoded image as RGB with sides ⌈side / reduction⌉: JPEG by scaled decoding, other formats by means of boxes.

    Raises Unreadable as `decode` does.
    """
    size, image = jpeg.plain_size(data), None
    if size is None or size[0] * size[1] > max_pixels:
        image = _open(data, max_pixels)
        size = image.size if _jpeg(image) else None
    pixels = None if size is None else jpeg.decode(data, size, reduction)
    if pixels is None:
        image = image or _open(data, max_pixels)
        pixels = np.asarray(_pillow(image, reduction)[0])
    return Stored(pixels, 1 if image is None else _orientation(image))


def upright_size(data: bytes, *, max_pixels: int) -> tuple[int, int]:
    """Height and width after the turn that EXIF asks for, by the header alone but for TIFF. Raises Unreadable as `decode` does."""
    image = _open(data, max_pixels)
    if image.format == "TIFF":
        _load(image)  # Pillow turns it then, and tells the size before or after that depending on its version
    return image.size if _orientation(image) > 4 else image.size[::-1]


def decode(data: bytes, *, max_pixels: int, name: str = "") -> tuple[Image.Image, str]:
    """The first frame of an encoded image as upright RGB, and a note of what had to be changed ("" when nothing).

    The result's `format` tells what the bytes are; with a `name` given, a suffix that says otherwise is noted.
    Raises Unreadable for what is empty, damaged, truncated, of an unknown format, or larger than `max_pixels` by its header.
    """
    image = _open(data, max_pixels)
    kind, orientation = image.format or "", _orientation(image)
    frames = _frames(_open(data, max_pixels) if kind in ("GIF", "TIFF") else image)  # these count by seeking: not in the one that is loaded
    suffix = os.path.splitext(name)[1].lower()
    named = Image.registered_extensions().get(suffix)
    rgb, change = _rgb(image, data)
    rgb = _turn(rgb, _orientation(image))  # asked again: some of Pillow's plugins turn while they load
    notes = [
        f"{kind} named {suffix}" if named and SAME.get(named, named) != SAME.get(kind, kind) else "",
        f"first of {frames} frames" if frames > 1 else "",
        change,
        f"turned by EXIF orientation {orientation}" if orientation > 1 else "",
    ]
    rgb.format = kind
    return rgb, "; ".join(note for note in notes if note)


def _scaled(width: int, height: int, preprocess: Preprocess) -> tuple[int, int]:
    """Width and height after scaling, before cropping; the longer side is rounded down as transformers does."""
    if preprocess.resize_shortest is None:
        return preprocess.size[1], preprocess.size[0]
    short, long = min(width, height), max(width, height)
    other = int(preprocess.resize_shortest * long / short)
    return (preprocess.resize_shortest, other) if width <= height else (other, preprocess.resize_shortest)


def _crop(image: Image.Image | np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The centre (height, width) of an image, (H, W, 3) uint8; what is missing repeats the edge."""
    pixels = np.asarray(image)
    missing = [max(0, want - have) for want, have in zip(size, pixels.shape)]
    if any(missing):
        pixels = np.pad(pixels, [*(((gap + 1) // 2, gap // 2) for gap in missing), (0, 0)], mode="edge")
    top, left = ((have - want) // 2 for have, want in zip(pixels.shape, size))
    return pixels[top : top + size[0], left : left + size[1]]


def _fit(
    pixels: np.ndarray, scaled: tuple[int, int], size: tuple[int, int], resample: str, length: tuple[float, float] | None = None
) -> np.ndarray:
    """The centre (height, width) of pixels (H, W, 3) that are scaled to (width, height); `length` is how much of their height and width that is."""
    from attar.modalities.resample import KERNELS, window  # compiled code takes a while to load

    width, height = scaled
    if resample in KERNELS:
        high, wide = min(size[0], height), min(size[1], width)
        return _crop(window(pixels, (height, width), ((height - high) // 2, (width - wide) // 2, high, wide), resample, length), size)
    box = (0, 0, length[1], length[0]) if length else None
    return _crop(Image.fromarray(pixels).resize(scaled, FILTERS[resample], box=box), size)


def resize_crop(image: Image.Image | np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """An RGB image as a model's input, (H, W, 3) uint8: shorter side to `resize_shortest` and centre crop, or straight to `size`.

    The pixels are those of transformers' PIL image processors, within a level, except that an image smaller than the crop is padded by
    its edge instead of black.
    """
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    if preprocess.resize_shortest:
        # Scaling the whole of a long strip would take memory without bound, and the crop sees its middle only.
        most = 64 * min(height, width)
        top, left = (max(0, side - most) // 2 for side in (height, width))
        pixels = pixels[top : top + most, left : left + most]
        height, width = pixels.shape[:2]
    return _fit(pixels, _scaled(width, height, preprocess), preprocess.size, preprocess.resample)


def prepare(data: bytes, preprocess: Preprocess, *, max_pixels: int) -> np.ndarray:
    """resize_crop(decode(data)), with JPEG decoded at 1/2, 1/4 or 1/8 scale where that still leaves twice the pixels needed."""
    image = _open(data, max_pixels)
    size, orientation, factor = image.size, _orientation(image), 1
    if image.format == "JPEG":
        upright = _scaled(*(size if orientation < 5 else size[::-1]), preprocess)
        width, height = upright if orientation < 5 else upright[::-1]
        factor = jpeg.reduction_for(min(size[0] / (2 * width), size[1] / (2 * height)))
    pixels = jpeg.decode(data, size, factor) if _jpeg(image) else None
    pixels = np.asarray(_pillow(image, factor)[0]) if pixels is None else pixels
    orientation = _orientation(image)  # asked again: some of Pillow's plugins turn while they load

    def turned(found: np.ndarray) -> np.ndarray:
        return found if orientation == 1 else np.asarray(_turn(Image.fromarray(found), orientation))

    if factor == 1:
        return resize_crop(turned(pixels), preprocess)
    length = size[1] / factor, size[0] / factor  # the reduced size is rounded up: this keeps the scale exact
    if orientation == 1:
        return _fit(pixels, (width, height), preprocess.size, preprocess.resample, length)
    return _crop(turned(_fit(pixels, (width, height), (height, width), preprocess.resample, length)), preprocess.size)


def thumbnail(image: Image.Image) -> bytes:
    """16 × 16 grey bytes, each the mean of its part of the image."""
    return image.convert("L").resize((16, 16), Image.Resampling.BOX).tobytes()


def content_hash(image: Image.Image) -> str:
    """BLAKE2b-128 of size and RGB pixels, in hexadecimal: equal for the same picture in any lossless format."""
    digest = hashlib.blake2b(struct.pack("<II", *image.size), digest_size=16)
    digest.update(image.convert("RGB").tobytes())
    return digest.hexdigest()


def show(image: Image.Image | bytes, side: int, *, max_pixels: int = 100_000_000) -> bytes:
    """A JPEG file for people, its longer side at most `side` pixels."""
    small = decode(image, max_pixels=max_pixels)[0] if isinstance(image, bytes) else image.copy()
    small.thumbnail((side, side))
    stream = io.BytesIO()
    small.convert("RGB").save(stream, "JPEG", quality=85)
    return stream.getvalue()


class Encoded:
    """Items as the bytes of their files, from any thread; a context manager."""

    def __init__(self, items: Items) -> None:
        self._root, self._paths, self._reader = items.root, items.table["path"], Reader(items.root)
        self.bytes = items.column("bytes").astype(np.int64)
        self.sizes = np.stack([items.column("height"), items.column("width")], 1).astype(np.int64)  # upright
        self.jpeg = items.column("format") == "JPEG"

    def __enter__(self) -> Encoded:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def limit(self, item: int) -> int:
        """Pixels the item had when it was scanned: no more are decoded."""
        return int(self.sizes[item].prod())

    def read(self, item: int) -> bytes:
        """The bytes of a file that is as long as it was; raises Unreadable for any other."""
        data = self._reader.read(self._paths[item].as_py())
        if len(data) != self.bytes[item]:
            raise Unreadable(f"has {len(data)} bytes instead of {self.bytes[item]}", "")
        return data

    def fault(self, item: int, error: Unreadable) -> DataError:
        """What to raise for an item that could be read when it was scanned."""
        return DataError(
            f"{self._paths[item].as_py()} in {self._root}: has changed since it was scanned ({error.reason}); "
            "run the same command again: it scans what changed"
        )


class Loader:
    """Items as model inputs, read and decoded in `workers` threads; a context manager."""

    def __init__(self, items: Items, preprocess: Preprocess, *, workers: int = 2) -> None:
        self._files, self._preprocess, self._workers = Encoded(items), preprocess, workers
        self._pool = ThreadPoolExecutor(workers, "attar-load")

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._files.__exit__()

    def _fill(self, out: np.ndarray, ids: np.ndarray, first: int) -> None:
        for slot in range(first, len(ids), self._workers):
            item = int(ids[slot])
            try:
                out[slot] = prepare(self._files.read(item), self._preprocess, max_pixels=self._files.limit(item))
            except Unreadable as error:
                raise self._files.fault(item, error) from None

    def _start(self, ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray, list[Future[None]]]:
        ids = np.asarray(ids, np.int64)
        out = np.empty((len(ids), *self._preprocess.size, 3), np.uint8)
        parts = range(min(self._workers, len(ids)))
        return ids, out, [self._pool.submit(self._fill, out, ids, first) for first in parts]

    def batch(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """The items of some ids, (n, H, W, 3) uint8; raises DataError for a file that vanished or changed since the scan."""
        _, out, parts = self._start(ids)
        for part in parts:
            part.result()
        return out

    def stream(self, batches: Iterable[Sequence[int] | np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Ids and items of each batch in order, with at most two further batches in the making."""
        waiting: deque[tuple[np.ndarray, np.ndarray, list[Future[None]]]] = deque()
        try:
            for ids in batches:
                waiting.append(self._start(ids))
                if len(waiting) == 3:
                    yield self._finish(waiting)
            while waiting:
                yield self._finish(waiting)
        finally:
            for _, _, parts in waiting:
                for part in parts:
                    part.cancel()

    @staticmethod
    def _finish(waiting: deque[tuple[np.ndarray, np.ndarray, list[Future[None]]]]) -> tuple[np.ndarray, np.ndarray]:
        ids, out, parts = waiting[0]
        for part in parts:
            part.result()
        waiting.popleft()
        return ids, out

    def original(self, item: int) -> Image.Image:
        """One item at full size, upright RGB."""
        try:
            return decode(self._files.read(item), max_pixels=self._files.limit(item))[0]
        except Unreadable as error:
            raise self._files.fault(item, error) from None
