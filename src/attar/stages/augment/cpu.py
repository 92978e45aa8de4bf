"""The CPU executor: a plan in one compiled pass over the pixels per view, on threads that do not hold Python's lock."""

from __future__ import annotations

import functools
import itertools
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from attar.stages.augment import coordinates, mapping, neighbourhood, sampling
from attar.stages.augment.plan import Plan

Type = Literal["float32", "float16", "bfloat16"]
Layout = Literal["contiguous", "channels_last"]
TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BORDERS = ("reflect", "edge", "constant")
PIECES = 4
"""Pieces of the work per thread: views differ in what they take."""


class Inputs(NamedTuple):
    """What the compiled pass reads, in the order of its arguments."""

    images: Int64[np.ndarray, "m 5"]  # address, rows, columns, bytes per row, channels
    source: Int64[np.ndarray, " n"]
    matrix: Float[np.ndarray, "n 3 3"]
    kinds: Int64[np.ndarray, " n"]
    boxes: Int64[np.ndarray, " n"]
    warp: Float[np.ndarray, "n 4"]
    elastic: Float[np.ndarray, "n 2 5 5"]
    border: int
    fill: int
    colour: Float[np.ndarray, "n 3 4"]  # from bytes to [0, 1]
    plain: Bool[np.ndarray, " n"]  # the colour map changes nothing
    alone: Bool[np.ndarray, " n"]  # it keeps the channels apart
    table: Int64[np.ndarray, " n"]
    tables: UInt8[np.ndarray, "t 3 256"]
    erase: Float[np.ndarray, "n 4"]
    scale: Float[np.ndarray, " 3"]
    shift: Float[np.ndarray, " 3"]
    height: int
    width: int


def room(count: int, size: tuple[int, int], dtype: Type) -> int:
    """Bytes of so many views."""
    return count * 3 * size[0] * size[1] * TYPES[dtype].itemsize


def shaped(
    memory: UInt8[np.ndarray, " bytes"], count: int, size: tuple[int, int], dtype: Type, layout: Layout
) -> Float[Tensor, "n 3 height width"]:
    """`room` bytes as the tensor of views that is written into them."""
    flat = torch.from_numpy(memory).view(TYPES[dtype])
    return flat.view(count, *size, 3).permute(0, 3, 1, 2) if layout == "channels_last" else flat.view(count, 3, *size)


class Pass:
    """A plan ready for the compiled pass: views are made one after the other, from any thread, as soon as the image they show is given."""

    def __init__(
        self,
        images: Int64[np.ndarray, "m 5"],
        plan: Plan,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        dtype: Type,
        layout: Layout,
        memory: UInt8[np.ndarray, " bytes"] | None = None,
    ) -> None:
        """`images` are `described`, or zeros until `give` does; the views are written into `memory` of `room` bytes, where it is given."""
        count, kind = len(plan.source), list(TYPES).index(dtype)
        memory = np.empty(room(count, plan.size, dtype), np.uint8) if memory is None else memory  # numpy asks for large pages
        self.plan, self.views = plan, shaped(memory, count, plan.size, dtype, layout)
        self._inputs, self._every, self._altered = _inputs(images, plan, mean, std), np.arange(count), neighbourhood.needed(plan)
        flat = memory.view(np.float32 if kind == sampling.FLOAT32 else np.uint16)
        out, bits = (flat, _NO_BITS) if kind == sampling.FLOAT32 else (_NO_FLOATS, flat)
        self._target = out, bits, kind, layout == "channels_last"

    def give(self, number: int, image: UInt8[np.ndarray, "_ _ _"]) -> None:
        """An image, which has to live until its views are made."""
        self._inputs.images[number] = described(image)

    def move(self, first: int, end: int, matrix: Float[np.ndarray, "3 3"]) -> None:
        """Views whose image lies otherwise than the plan has it: `matrix` takes pixels of the planned one to those of the one given."""
        moved = matrix @ self.plan.matrix[first:end]
        self._inputs.matrix[first:end], self._inputs.boxes[first:end] = moved, mapping.steps(moved, self.plan.size)

    def make(self, first: int, end: int) -> None:
        """Views first … end − 1."""
        start, altered = first, (first + np.flatnonzero(self._altered[first:end])).tolist()
        if altered:
            whole, spare = np.empty((3, *self.plan.size), np.float32), np.empty(self.plan.size, np.float32)
        for view in [*altered, end]:
            if start < view:
                sampling.sample_views(start, view, self._every, *self._inputs, *self._target, _NO_VIEW, False)
            if view < end:
                sampling.sample_views(view, view + 1, self._every, *self._inputs, *self._target, whole, True)
                neighbourhood.alter(whole, spare, self.plan, view)
                sampling.store_view(whole, self._inputs.erase[view], view, self._inputs.scale, self._inputs.shift, *self._target)
            start = view + 1


def execute(
    images: Sequence[UInt8[np.ndarray, "_ _ _"]],
    plan: Plan,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    *,
    dtype: Type = "float32",
    layout: Layout = "contiguous",
    threads: int = 1,
) -> Float[Tensor, "n 3 height width"]:
    """The views of a plan, (value − mean) / std; equal for any number of threads.

    Images are rows × columns × 1 (grey), 3 (RGB) or 4 (the fourth is left out) bytes; pixels of a row must lie side by side. Against
    reference.render: bytes between source and colour where boxes are averaged, float32 else.
    """
    held = [image if _in_rows(image) else np.ascontiguousarray(image) for image in images]
    done = Pass(np.array([described(image) for image in held], np.int64), plan, mean, std, dtype=dtype, layout=layout)
    pieces = deque(_pieces(len(plan.source), threads))

    def work() -> None:
        while pieces:
            try:
                piece = pieces.popleft()
            except IndexError:  # another thread was faster
                return
            done.make(*piece)

    others = [_pool(threads - 1, os.getpid()).submit(work) for _ in range(min(threads, len(pieces)) - 1)]
    work()  # this thread too: it would only wait, and one less has to be woken
    for other in others:
        other.result()
    return done.views


_NO_FLOATS, _NO_BITS, _NO_VIEW = np.empty(0, np.float32), np.empty(0, np.uint16), np.empty((3, 0, 0), np.float32)


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads that stay: starting them anew takes a tenth of a batch's time. A process has its own, for a fork leaves them behind."""
    return ThreadPoolExecutor(threads, "attar-augment")


def _in_rows(image: np.ndarray) -> bool:
    """Whether the pixels of each row lie side by side in memory."""
    return image.strides[2] == 1 and image.strides[1] == image.shape[2] and image.strides[0] >= image.shape[1] * image.shape[2]


def described(image: UInt8[np.ndarray, "_ _ _"]) -> tuple[int, int, int, int, int]:
    """Address, rows, columns, bytes per row, channels."""
    return (image.ctypes.data, *image.shape[:2], image.strides[0], image.shape[2])


def _inputs(images: Int64[np.ndarray, "m 5"], plan: Plan, mean: Sequence[float], std: Sequence[float]) -> Inputs:
    colour = np.ascontiguousarray(plan.colour, np.float32)
    plain = (colour == np.eye(3, 4, dtype=np.float32)).all((1, 2))
    bent = (plan.warp[:, 0] != 0) | plan.elastic.any((1, 2, 3))
    straight = (plan.matrix[:, 2] == [0, 0, 1]).all(1)
    red, green, blue = (int(level) for level in np.floor(255 * plan.fill.astype(np.float64) + 0.5))
    return Inputs(
        images=images,
        source=np.ascontiguousarray(plan.source, np.int64),
        matrix=np.array(plan.matrix, np.float64),
        kinds=np.where(bent, coordinates.WARPED, np.where(straight, coordinates.AFFINE, coordinates.PROJECTIVE)).astype(np.int64),
        boxes=plan.steps(),
        warp=np.ascontiguousarray(plan.warp, np.float32),
        elastic=np.ascontiguousarray(plan.elastic, np.float32),
        border=BORDERS.index(plan.border),
        fill=red | green << 8 | blue << 16,
        colour=colour * np.array([1 / 255, 1 / 255, 1 / 255, 1], np.float32),
        plain=plain,
        alone=(colour[:, :, :3][:, ~np.eye(3, dtype=bool)] == 0).all(1),
        table=np.where(plan.equalise, -1, plan.table).astype(np.int64),  # equalise comes first, and takes the table along
        tables=np.ascontiguousarray(plan.tables, np.uint8),
        erase=np.ascontiguousarray(plan.erase, np.float64),
        scale=(1 / np.asarray(std, np.float64)).astype(np.float32),
        shift=(-np.asarray(mean, np.float64) / np.asarray(std, np.float64)).astype(np.float32),
        height=plan.size[0],
        width=plan.size[1],
    )


def _pieces(count: int, threads: int) -> list[tuple[int, int]]:
    """0 … count in runs for threads to take."""
    pieces = min(count, threads * PIECES if threads > 1 else 1)
    ends = [count * piece // pieces for piece in range(pieces + 1)] if pieces else []
    return list(itertools.pairwise(ends))
