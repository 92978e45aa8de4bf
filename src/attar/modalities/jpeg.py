"""JPEG without Pillow, by libjpeg-turbo: the same pixels in half the time, also at a half, a quarter or an eighth of the sides (jpeg_reduced.py, for large files)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import simplejpeg
from jaxtyping import UInt8

REDUCTIONS = (8, 4, 2, 1)
"""What the sides may be divided by; the scales between these cost as much as the next larger of them, or more."""
LARGE, DENSE = 1 << 18, {8: 0.5, 4: 1.0}
"""Bytes of a file, and bits a pixel, from which jpeg_reduced.py is faster than libjpeg-turbo: photos as cameras store them, not small or smooth ones."""
SCAN = 0xDA
"""The marker before a scan."""
SMALLEST = 16
"""Longer side, pixels, below which a reduced size may be that of several scales of n/8, of which not the one that is meant would be taken."""


def reduction_for(shrink: float) -> int:
    """The most by which the sides may be divided in decoding when what is made of an image shrinks it by so much everywhere.

    Example:
        >>> [reduction_for(shrink) for shrink in (0.5, 1.9, 2, 7.9, 30)]
        [1, 1, 2, 4, 8]
    """
    return next((factor for factor in REDUCTIONS if factor <= shrink), 1)


def segments(data: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Marker, body and end of each segment up to the first scan's header, which is the last; fewer where a file is not as it should be."""
    at, marker = 2, 0
    while marker != SCAN and at + 4 <= len(data) and data[at] == 0xFF:
        marker, end = data[at + 1], at + 2 + (data[at + 2] << 8 | data[at + 3])
        yield marker, data[at + 4 : end], end
        at = end


def plain_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG that nothing says to turn, grey or YCbCr; None for what Pillow has to look at."""
    found = list(segments(data)) if data.startswith(b"\xff\xd8\xff") else []  # not all of the data: large files take a while to search
    if not found or found[-1][0] != SCAN or any(b"Exif\0\0" in body or b"tiff:Orientation" in body for _, body, _ in found):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (width, height) if colours in ("YCbCr", "Gray") else None


def decode(data: bytes, size: tuple[int, int], reduction: int = 1) -> UInt8[np.ndarray, "height width 3"] | None:
    """RGB pixels of a grey or coloured JPEG of (width, height), with sides ⌈side / reduction⌉, one of REDUCTIONS.

    None for what Pillow has to decode: damaged data, of which it says what is wrong or makes the best, and what is below SMALLEST, reduced.
    """
    if reduction > 1 and max(size) < SMALLEST:
        return None
    if len(data) >= max(LARGE, DENSE.get(reduction, math.inf) * size[0] * size[1] / 8):
        from attar.modalities import jpeg_reduced  # compiled code takes a while to load

        pixels = jpeg_reduced.decode(data, size, reduction)
        if pixels is not None:
            return pixels
    width, height = (-(-side // reduction) for side in size)
    try:
        if simplejpeg.decode_jpeg_header(data)[1::-1] != size:
            return None
        least = {"min_height": height, "min_width": width} if reduction > 1 else {}
        return simplejpeg.decode_jpeg(data, **least)
    except ValueError:
        return None
