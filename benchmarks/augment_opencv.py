"""Augmentations composed by hand from OpenCV: what a careful programmer writes when speed matters; benchmarks/augment.py times them.

Geometry is one matrix and one cv2.warpAffine (a crop alone: a slice and cv2.resize), linear colour one cv2.transform, pointwise maps one table of 256
values, all on uint8; then planes, as float32, normalised, in place in the batch. Where there are several ways the fastest here is measured and taken.
Ranges are those of augment_peers.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np

Photo = np.ndarray  # uint8 (height, width, 3)
Step = Callable[[Photo, np.random.Generator], Photo]
Warp = Callable[[Photo, Any], Photo]  # photo, matrix or maps → view
LUMA = np.array([0.299, 0.587, 0.114])
TO_YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
LEVELS = np.arange(256) / 255
INVERSE = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP


def _by_numpy(planes: np.ndarray, out: np.ndarray) -> None:
    np.copyto(out, planes)
    out *= np.float32(1 / 127.5)
    out -= np.float32(1)


def _by_weights(planes: np.ndarray, out: np.ndarray) -> None:
    flat = planes.reshape(-1, planes.shape[2])
    cv2.addWeighted(flat, 1 / 127.5, flat, 0, -1, dst=out.reshape(flat.shape), dtype=cv2.CV_32F)


def _by_transform(planes: np.ndarray, out: np.ndarray) -> None:
    flat = planes.reshape(-1, planes.shape[2])
    cv2.transform(flat.astype(np.float32), np.array([[1 / 127.5, -1]], np.float32), dst=out.reshape(flat.shape))


def seconds(call: Callable[[], object]) -> float:
    """Median of 200 calls."""
    times = []
    for _ in range(200):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def fastest_normalise(side: int) -> Callable[[np.ndarray, np.ndarray], None]:
    """uint8 planes → float32 planes (v / 255 - 0.5) / 0.5 by the way that is fastest on this processor with this OpenCV."""
    planes, out = np.zeros((3, side, side), np.uint8), np.empty((3, side, side), np.float32)
    return min((_by_numpy, _by_weights, _by_transform), key=lambda way: seconds(lambda: way(planes, out)))


def fastest_channels(warp: Warp, example: Any, side: int) -> Warp:
    """The warp, or the same by way of RGBA, where that is faster: OpenCV moves pixels of four bytes in fewer steps than those of three."""

    def four(photo: Photo, how: Any) -> Photo:
        return cv2.cvtColor(warp(cv2.cvtColor(photo, cv2.COLOR_RGB2RGBA), how), cv2.COLOR_RGBA2RGB)

    photo = np.zeros((side, side, 3), np.uint8)
    return min((warp, four), key=lambda way: seconds(lambda: way(photo, example)))


def crop_box(photo: Photo, rng: np.random.Generator) -> tuple[float, float, float, float]:
    """x, y, width, height of 8 to 100 % of the area, 3:4 to 4:3."""
    height, width, _ = photo.shape
    area, aspect = height * width * rng.uniform(0.08, 1), math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
    w, h = min(math.sqrt(area * aspect), width), min(math.sqrt(area / aspect), height)
    return rng.random() * (width - w), rng.random() * (height - h), w, h


def affine(
    side: int, rng: np.random.Generator, *, degrees: float = 0, scale: float = 1, shear: float = 0, translate: float = 0
) -> np.ndarray:
    """Output pixel → input pixel about the centre, 3 x 3; each range symmetric, `scale` as a factor."""
    angle, factor = math.radians(rng.uniform(-degrees, degrees)), math.exp(rng.uniform(-1, 1) * math.log(scale))
    a, b = (math.tan(math.radians(rng.uniform(-shear, shear))) for _ in "xy")
    c, s, centre = math.cos(angle) / factor, math.sin(angle) / factor, (side - 1) / 2
    m = np.array([[c - s * b, c * a - s, 0], [s + c * b, s * a + c, 0], [0, 0, 1]])
    shift = [rng.uniform(-translate, translate) * side for _ in "xy"]
    m[:2, 2] = centre - m[:2, :2] @ [centre + shift[0], centre + shift[1]]
    return m


def colour(rng: np.random.Generator, *, brightness: float = 0, contrast: float = 0, saturation: float = 0, hue: float = 0) -> np.ndarray:
    """Hue in YIQ, saturation, contrast about mid grey, brightness: one 3 x 4 matrix for values up to 255."""
    turn, s = 2 * math.pi * rng.uniform(-hue, hue), 1 + rng.uniform(-saturation, saturation)
    k, b = 1 + rng.uniform(-contrast, contrast), 1 + rng.uniform(-brightness, brightness)
    rotation = np.array([[1, 0, 0], [0, math.cos(turn), -math.sin(turn)], [0, math.sin(turn), math.cos(turn)]])
    matrix = (s * np.eye(3) + (1 - s) * LUMA) @ FROM_YIQ @ rotation @ TO_YIQ
    return np.hstack([b * k * matrix, np.full((3, 1), b * 127.5 * (1 - k))])


FROM_YIQ = np.linalg.inv(TO_YIQ)


def full(side: int, warp: Warp) -> Step:
    def step(photo: Photo, rng: np.random.Generator) -> Photo:
        x, y, w, h = crop_box(photo, rng)
        m = np.array([[w / side, 0, x + w / side / 2 - 0.5], [0, h / side, y + h / side / 2 - 0.5], [0, 0, 1]])
        if rng.random() < 0.5:
            m = m @ [[-1, 0, side - 1], [0, 1, 0], [0, 0, 1]]
        m = m @ affine(side, rng, degrees=15, scale=1.15, shear=10, translate=0.1)
        view = warp(photo, m[:2])
        return cv2.transform(view, colour(rng, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1))

    return step


def crop(side: int, flip: float = 0.5) -> Step:
    def step(photo: Photo, rng: np.random.Generator) -> Photo:
        x, y, w, h = (round(value) for value in crop_box(photo, rng))
        view = cv2.resize(photo[y : y + h, x : x + w], (side, side), interpolation=cv2.INTER_LINEAR)
        return cv2.flip(view, 1) if rng.random() < flip else view

    return step


def warped(side: int, warp: Warp, **ranges: float) -> Step:
    return lambda photo, rng: warp(photo, affine(side, rng, **ranges)[:2])


def coloured(**ranges: float) -> Step:
    return lambda photo, rng: cv2.transform(photo, colour(rng, **ranges))


def looked_up(curve: Callable[[float], Any]) -> Step:
    """A pointwise map by table; `curve` takes a uniform number to the values of the 256 levels, in [0, 1]."""

    def step(photo: Photo, rng: np.random.Generator) -> Photo:
        return cv2.LUT(photo, (255 * np.clip(curve(rng.random()), 0, 1) + 0.5).astype(np.uint8))

    return step


def perspective(side: int, warp: Warp) -> Step:
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32) * (side - 1)

    def step(photo: Photo, rng: np.random.Generator) -> Photo:
        moved = (corners + rng.uniform(-0.15, 0.15, (4, 2)) * side).astype(np.float32)
        return warp(photo, cv2.getPerspectiveTransform(corners, moved))

    return step


def radial(side: int, remap: Warp, factor: Callable[[np.ndarray, float], np.ndarray]) -> Step:
    """Pixels seen at `factor(radius squared, amount)` times their place, about a drawn centre."""
    axis = ((np.arange(side) + 0.5) / side * 2 - 1).astype(np.float32)

    def step(photo: Photo, rng: np.random.Generator) -> Photo:
        u, v = (axis - np.float32(rng.uniform(-0.1, 0.1)) for _ in "xy")
        k = factor(u[None] ** 2 + v[:, None] ** 2, rng.uniform(-1, 1)) * np.float32(side / 2)
        middle = (side - 1) / 2
        return remap(photo, (k * u[None] + middle, k * v[:, None] + middle))

    return step


def elastic(side: int, remap: Warp) -> Step:
    base = np.mgrid[:side, :side].astype(np.float32)

    def step(photo: Photo, rng: np.random.Generator) -> Photo:
        nodes = rng.uniform(-0.06 * side, 0.06 * side, (5, 5, 2)).astype(np.float32)
        moved = cv2.split(cv2.resize(nodes, (side, side), interpolation=cv2.INTER_LINEAR))
        return remap(photo, (cv2.add(base[1], moved[0]), cv2.add(base[0], moved[1])))

    return step


def equalise(photo: Photo, rng: np.random.Generator) -> Photo:
    return cv2.merge([cv2.equalizeHist(plane) for plane in cv2.split(photo)])


def blur(photo: Photo, rng: np.random.Generator) -> Photo:
    sigma = rng.uniform(0.01, 2)
    return cv2.GaussianBlur(photo, (2 * math.ceil(2.5 * sigma) + 1,) * 2, sigma)


def sharpen(photo: Photo, rng: np.random.Generator) -> Photo:
    amount = rng.uniform(0, 2)
    return cv2.addWeighted(photo, 1 + amount, cv2.GaussianBlur(photo, (7, 7), 1), -amount, 0)


def noise(photo: Photo, rng: np.random.Generator) -> Photo:
    drawn = cv2.randn(np.empty(photo.shape, np.int16), 0, 25.5 * rng.random())
    return cv2.add(photo, drawn, dtype=cv2.CV_8U)


def jpeg(photo: Photo, rng: np.random.Generator) -> Photo:
    return cv2.imdecode(cv2.imencode(".jpg", photo, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(10, 101))])[1], cv2.IMREAD_COLOR)


def erase(photo: Photo, rng: np.random.Generator) -> Photo:
    share, aspect, (height, width) = 0.25 * rng.random(), math.exp(rng.uniform(-0.7, 0.7)), photo.shape[:2]
    w, h = (min(round(math.sqrt(value) * length), length) for value, length in ((share * aspect, width), (share / aspect, height)))
    x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    out = photo.copy()
    out[y : y + h, x : x + w] = 128
    return out


def warps(side: int) -> tuple[Warp, Warp, Warp]:
    """By a matrix 2 x 3, by a matrix 3 x 3, by maps of x and y."""
    grid, turn = np.mgrid[:side, :side].astype(np.float32), np.array([[0.9, 0.2, 5], [-0.2, 0.9, 30], [0, 0, 1]])
    maps = tuple((row[0] * grid[1] + row[1] * grid[0] + row[2]).astype(np.float32) for row in turn[:2])
    mirror = {"borderMode": cv2.BORDER_REFLECT}
    return (
        fastest_channels(lambda photo, matrix: cv2.warpAffine(photo, matrix, (side, side), flags=INVERSE, **mirror), turn[:2], side),
        fastest_channels(lambda photo, matrix: cv2.warpPerspective(photo, matrix, (side, side), flags=INVERSE, **mirror), turn, side),
        fastest_channels(lambda photo, maps: cv2.remap(photo, *maps, cv2.INTER_LINEAR, **mirror), maps, side),
    )


def steps(side: int) -> dict[str, Step]:
    move, project, remap = warps(side)
    turns, orders = (
        (cv2.ROTATE_90_CLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_COUNTERCLOCKWISE),
        ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)),
    )
    bend = lambda square, amount: 1 + np.float32(0.3 * max(amount, -0.4) / 2) * square  # noqa: E731
    bulge = lambda square, amount: 1 + np.float32(amount) * (np.sqrt(np.minimum(square, 1)) - 1).astype(np.float32)  # noqa: E731
    return {
        "full": full(side, move),
        "crop": crop(side),
        "horizontal_flip": lambda photo, rng: cv2.flip(photo, 1),
        "vertical_flip": lambda photo, rng: cv2.flip(photo, 0),
        "quarter_turn": lambda photo, rng: cv2.rotate(photo, turns[rng.integers(3)]),
        "rotate": warped(side, move, degrees=30),
        "scale": warped(side, move, scale=2),
        "shear": warped(side, move, shear=30),
        "translate": warped(side, move, translate=0.3),
        "resized_crop": crop(side, flip=0),
        "perspective": perspective(side, project),
        "spherical": radial(side, remap, bulge),
        "barrel": radial(side, remap, bend),
        "elastic": elastic(side, remap),
        "brightness": coloured(brightness=0.8),
        "contrast": coloured(contrast=0.8),
        "saturation": coloured(saturation=0.8),
        "hue": coloured(hue=0.2),
        "gamma": looked_up(lambda u: LEVELS ** (2.5 ** (2 * u - 1))),
        "grey": lambda photo, rng: cv2.cvtColor(cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB),
        "channel_shuffle": lambda photo, rng: cv2.merge([cv2.split(photo)[k] for k in orders[rng.integers(5)]]),
        "invert": lambda photo, rng: cv2.bitwise_not(photo),
        "posterise": lambda photo, rng: cv2.bitwise_and(photo, (0xFF << int(rng.integers(7)) & 0xFF,) * 4),
        "solarise": looked_up(lambda u: np.where(u > LEVELS, LEVELS, 1 - LEVELS)),
        "equalise": equalise,
        "blur": blur,
        "sharpen": sharpen,
        "noise": noise,
        "jpeg": jpeg,
        "erase": erase,
    }


def workloads(side: int) -> dict[str, Callable[[Sequence[Photo]], np.ndarray]]:
    normalise, rng = fastest_normalise(side), np.random.default_rng(0)

    def one(step: Step) -> Callable[[Sequence[Photo]], np.ndarray]:
        def call(photos: Sequence[Photo]) -> np.ndarray:
            batch, planes = np.empty((len(photos), 3, side, side), np.float32), np.empty((3, side, side), np.uint8)
            for photo, out in zip(photos, batch):
                cv2.split(step(photo, rng), list(planes))
                normalise(planes, out)
            return batch

        return call

    return {name: one(step) for name, step in steps(side).items()}
