"""A picture for people: images with the boxes and masks that were found in them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from attar.stages.objects import masks

SIDE, COLUMNS = 240, 6
COLOURS = ((230, 60, 50), (40, 120, 220), (40, 160, 70), (240, 160, 20), (150, 70, 190), (20, 180, 190), (240, 100, 170), (120, 90, 50))


def drawn(image: Image.Image, found: Sequence[Mapping[str, Any]]) -> Image.Image:
    """An image at most SIDE pixels a side, the masks of its objects (rows of an object table) tinted and their boxes drawn, a colour per kind."""
    width, height = image.size
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    pixels = np.asarray(small.convert("RGB")).astype(np.float32)
    for row in found:
        mask = masks.resize(masks.mask_of(np.array(row["counts"]), (row["mask_height"], row["mask_width"])), pixels.shape[:2])
        pixels[mask] = 0.6 * pixels[mask] + 0.4 * np.array(COLOURS[row["kind"] % len(COLOURS)])
    made = Image.fromarray(pixels.astype(np.uint8))
    pen, across, down = ImageDraw.Draw(made), made.width / width, made.height / height
    for row in found:
        x, y = row["x"] * across, row["y"] * down
        corner = max(x, x + row["width"] * across - 1), max(y, y + row["height"] * down - 1)
        pen.rectangle((x, y, *corner), outline=COLOURS[row["kind"] % len(COLOURS)], width=2)
    return made


def sheet(pictures: Sequence[Image.Image]) -> bytes:
    """Pictures side by side, COLUMNS in a row, as a PNG file."""
    rows = -(-len(pictures) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * (SIDE + 8) + 8, max(1, rows) * (SIDE + 8) + 8), "white")
    for number, picture in enumerate(pictures):
        page.paste(picture, (8 + number % COLUMNS * (SIDE + 8), 8 + number // COLUMNS * (SIDE + 8)))
    stream = io.BytesIO()
    page.save(stream, "PNG")
    return stream.getvalue()
