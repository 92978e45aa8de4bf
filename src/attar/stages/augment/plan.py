"""Sampling: dials per item → one geometric matrix, one colour matrix, one blur and one erased box per view. Pure numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from attar.records import Dial

FAMILIES = ("geometry", "flip", "colour", "blur", "erase")
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


class Plan(NamedTuple):
    """What happens to each of n views; identity where a family was not drawn."""

    geometry: Float[np.ndarray, "views 2 3"]  # output → input coordinates, both in [−1, 1] (x right, y down)
    colour: Float[np.ndarray, "views 3 4"]  # RGB in [0, 1] → RGB: 3 × 3 matrix and offset
    blur: Float[np.ndarray, " views"]  # Gaussian sigma as a share of the image side; 0 for none
    erase: Float[np.ndarray, "views 4"]  # box x0, y0, x1, y1 in [0, 1]; zero area for none


def sample(dials: Sequence[Mapping[str, Dial]], rng: np.random.Generator) -> Plan:
    """One plan for as many views as there are dials; each family is drawn with its frequency, its range scaled by its strength.

    Full strength: crops of 8 % of the area and aspect 3:4 to 4:3, ±30° rotation; brightness, contrast and saturation
    ×[0.2, 1.8] and ±0.2 turns of hue; Gaussian blur of sigma up to 3 % of the side; an erased box up to 25 % of the area.
    """
    count = len(dials)
    strength = np.array([[dial[family].strength for family in FAMILIES] for dial in dials], np.float32)
    frequency = np.array([[dial[family].frequency for family in FAMILIES] for dial in dials])
    drawn = np.where(rng.random((count, len(FAMILIES))) < frequency, strength, 0.0)
    geometry, flip, colour, blur, erase = drawn.T
    # The flip is there or not; a strength of zero switches it off like any other family.
    return Plan(
        _geometry(geometry, flip > 0, rng),
        _colour(colour, rng),
        (0.03 * blur * rng.random(count)).astype(np.float32),
        _erase(erase, rng),
    )


def _geometry(strength: np.ndarray, flip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Crop (area, aspect, place), rotation and mirror multiplied into one matrix per view."""
    count = len(strength)
    area = 1 - 0.92 * strength * rng.random(count)
    aspect = np.exp(np.log(4 / 3) * strength * rng.uniform(-1, 1, count))
    half_width, half_height = np.minimum(np.sqrt(area * aspect), 1), np.minimum(np.sqrt(area / aspect), 1)
    centre_x, centre_y = (1 - half_width) * rng.uniform(-1, 1, count), (1 - half_height) * rng.uniform(-1, 1, count)
    angle = np.deg2rad(30) * strength * rng.uniform(-1, 1, count)
    cos, sin, mirror = np.cos(angle), np.sin(angle), np.where(flip, -1.0, 1.0)
    rows = [[half_width * cos * mirror, -half_height * sin, centre_x], [half_width * sin * mirror, half_height * cos, centre_y]]
    return np.moveaxis(np.array(rows, np.float32), 2, 0)


def _colour(strength: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Hue rotation in YIQ, saturation, contrast about mid grey and brightness, composed in that order into one affine map."""
    count = len(strength)
    to_yiq = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    turn = 2 * np.pi * 0.2 * strength * rng.uniform(-1, 1, count)
    hue = np.zeros((count, 3, 3))
    hue[:, 0, 0] = 1
    hue[:, 1, 1] = hue[:, 2, 2] = np.cos(turn)
    hue[:, 1, 2], hue[:, 2, 1] = -np.sin(turn), np.sin(turn)
    brightness, contrast, saturation = 1 + 0.8 * strength * rng.uniform(-1, 1, (3, count))
    grey = np.broadcast_to(LUMA, (3, 3))
    saturate = saturation[:, None, None] * np.eye(3) + (1 - saturation)[:, None, None] * grey
    matrix = saturate @ np.linalg.inv(to_yiq) @ hue @ to_yiq
    gain = (brightness * contrast)[:, None, None]
    offset = np.broadcast_to((brightness * 0.5 * (1 - contrast))[:, None, None], (count, 3, 1))
    untouched = (strength == 0)[:, None, None]
    affine = np.concatenate([gain * matrix, offset], 2)
    return np.where(untouched, np.eye(3, 4), affine).astype(np.float32)


def _erase(strength: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    count = len(strength)
    share = 0.25 * strength * rng.random(count)
    aspect = np.exp(rng.uniform(-0.7, 0.7, count))
    width, height = np.minimum(np.sqrt(share * aspect), 1), np.minimum(np.sqrt(share / aspect), 1)
    x, y = (1 - width) * rng.random(count), (1 - height) * rng.random(count)
    return np.stack([x, y, x + width, y + height], 1).astype(np.float32)
