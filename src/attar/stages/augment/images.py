"""What users call images, as arrays of bytes (rows, columns, channels): checked, not copied where that can be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from attar.errors import DataError

CHANNELS = (1, 3, 4)
EXPECTED = "a list of uint8 arrays (height, width, 1, 3 or 4), PIL images, or one batch: a tensor (n, channels, height, width), an array (n, height, width, channels)"


def as_arrays(images: Any) -> list[np.ndarray]:
    """The images as uint8 (height, width, channels): 1 channel is grey, of 4 the last (alpha) is not used.

    A batch of floats in [0, 1] is rounded to 255 levels. Raises DataError for another type, another range, another number of channels, no pixels.
    """
    if isinstance(images, Tensor | np.ndarray) and images.ndim == 4:
        return list(as_batch(images).cpu().permute(0, 2, 3, 1).contiguous().numpy()) if isinstance(images, Tensor) else _array_batch(images)
    if isinstance(images, Tensor | np.ndarray) or not isinstance(images, Sequence) or isinstance(images, str | bytes):
        shape = f" of shape {tuple(images.shape)}" if hasattr(images, "shape") else ""
        raise DataError(
            f"Images of type {type(images).__name__}{shape} are not understood. Expected {EXPECTED}. One image alone goes in as [image]."
        )
    if not len(images):
        raise DataError(f"There are no images: the list is empty. Expected {EXPECTED}.")
    return [_one(image, number) for number, image in enumerate(images)]


def as_batch(images: Tensor) -> Shaped[Tensor, "n channels height width"]:
    """A checked batch tensor in bytes, on its own device, with its strides."""
    if images.shape[1] not in CHANNELS:
        raise DataError(
            f"The batch has shape {tuple(images.shape)}: {images.shape[1]} channels. Expected (n, 1, 3 or 4, height, width); "
            "a batch (n, height, width, channels) goes in as batch.permute(0, 3, 1, 2), which copies nothing."
        )
    if 0 in images.shape:
        raise DataError(f"The batch has shape {tuple(images.shape)}: there are no pixels in it.")
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise DataError(f"The batch is of {images.dtype}. Expected uint8, or floats in [0, 1].")
    low, high = (float(part) for part in images.aminmax())
    _check_range(low, high, "batch / 255")
    return (images.float() * 255 + 0.5).to(torch.uint8)


def _array_batch(images: np.ndarray) -> list[np.ndarray]:
    if images.shape[3] not in CHANNELS:
        raise DataError(
            f"The batch has shape {images.shape}: {images.shape[3]} channels. Expected an array (n, height, width, 1, 3 or 4); "
            "an array (n, channels, height, width) goes in as batch.transpose(0, 2, 3, 1)."
        )
    if 0 in images.shape:
        raise DataError(f"The batch has shape {images.shape}: there are no pixels in it.")
    if images.dtype == np.uint8:
        return list(images)
    if images.dtype.kind != "f":
        raise DataError(f"The batch is of {images.dtype}. Expected uint8, or floats in [0, 1].")
    _check_range(float(images.min()), float(images.max()), "batch / 255")
    return list((images * np.float32(255) + np.float32(0.5)).astype(np.uint8))


def _check_range(low: float, high: float, remedy: str) -> None:
    if not (low >= 0 and high <= 1):  # also refuses NaN
        raise DataError(f"The batch of floats goes from {low:g} to {high:g}. Expected values in [0, 1]: for bytes as floats, {remedy}.")


def _one(image: Any, number: int) -> np.ndarray:
    """One image of a list."""
    if not isinstance(image, np.ndarray):
        if isinstance(image, Tensor):
            image = image.detach().cpu().numpy()
        elif hasattr(image, "mode") and hasattr(image, "convert"):  # PIL, which is not imported for this
            image = np.asarray(image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGB"))
        else:
            raise DataError(f"Image {number} is of type {type(image).__name__}. Expected {EXPECTED}.")
    if image.dtype != np.uint8:
        remedy = (
            "(image * 255).round().astype(np.uint8)" if image.dtype.kind == "f" else "image.astype(np.uint8) if its values are 0 to 255"
        )
        raise DataError(f"Image {number} is of {image.dtype}. Expected uint8: {remedy}.")
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[2] not in CHANNELS:
        first = image.ndim == 3 and image.shape[0] in CHANNELS and image.shape[2] > max(CHANNELS)
        hint = " An image (channels, height, width) goes in as image.transpose(1, 2, 0)." if first else ""
        raise DataError(f"Image {number} has shape {image.shape}. Expected (height, width) or (height, width, 1, 3 or 4).{hint}")
    if 0 in image.shape:
        raise DataError(f"Image {number} has shape {image.shape}: there are no pixels in it.")
    return image
