"""Files in, batches of augmented views out: each item is decoded once for all its views, at the scale they need, and kept while there is room."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int64, Shaped
from torch import Tensor

from attar.containers import Unreadable
from attar.errors import DataError, UsageError
from attar.modalities import image
from attar.modalities.cache import Allowance, BoundedCache, Recycled, Usage
from attar.modalities.jpeg import reduction_for
from attar.records import Items
from attar.stages.augment import cpu
from attar.stages.augment.engine import Augment, checked_boxes
from attar.stages.augment.plan import Plan

HEAD = 64 << 10
"""Bytes of a file that are read to learn its size; all of it where they are not enough."""
AHEAD = 4
"""Batches in the making or ready, at most, however small they are."""
PER_PIXEL = 8
"""Bytes a pixel takes while a format is decoded that has no scaled decoding."""


def upright_to_stored(size: tuple[int, int], orientation: int, reduction: int = 1) -> Float64[np.ndarray, "3 3"]:
    """Pixel coordinates of an upright image of (height, width) → those of its file, whose EXIF `orientation` is 1 … 8, decoded at 1 / reduction."""
    height, width = size
    matrix = np.eye(3)
    if orientation in (2, 3, 6, 7):
        matrix = np.array([[-1.0, 0, width], [0, 1, 0], [0, 0, 1]]) @ matrix
    if orientation in (3, 4, 7, 8):
        matrix = np.array([[1.0, 0, 0], [0, -1, height], [0, 0, 1]]) @ matrix
    if orientation > 4:
        matrix = matrix[[1, 0, 2]]
    return np.diag([1 / reduction, 1 / reduction, 1.0]) @ matrix


def reductions(plan: Plan, count: int) -> Int64[np.ndarray, " count"]:
    """By how much the sides of each of `count` images may be divided in decoding: every view still has at least a pixel of the source for its own.

    For a plane view that is its shrink as `Plan.steps` has it, for a warped one or one in perspective the least shrink anywhere in it.
    """
    shrink = plan.steps().astype(float)
    bent = (plan.warp[:, 0] != 0) | plan.elastic.any((1, 2, 3)) | (plan.matrix[:, 2] != [0, 0, 1]).any(1)
    for view in np.flatnonzero(bent & (shrink >= 2)):
        shrink[view] = _least_shrink(plan, int(view))
    least = np.full(count, np.inf)
    np.minimum.at(least, plan.source, shrink)
    return np.array([reduction_for(value) for value in least], np.int64)


def _least_shrink(plan: Plan, view: int) -> float:
    """The least distance in the source of neighbouring pixels of a view."""
    x, y = plan.coordinates(view)
    return min(float(np.hypot(np.diff(x, axis=axis), np.diff(y, axis=axis)).min(initial=np.inf)) for axis in (0, 1))


class Paths:
    """Plain files in the place of scanned items (image.Encoded): what their headers say is learnt when it is first asked for."""

    def __init__(self, paths: Sequence[str | os.PathLike[str]], max_pixels: int) -> None:
        self._paths, self._max_pixels = [os.fspath(path) for path in paths], max_pixels
        self.sizes, self.bytes, self.jpeg = np.zeros((len(paths), 2), np.int64), np.zeros(len(paths), np.int64), np.zeros(len(paths), bool)

    def __exit__(self, *_: object) -> None:
        pass

    def measure(self, item: int) -> None:
        """Fills in size, bytes and format of one file; of a JPEG by its first HEAD bytes where they are enough."""
        try:
            head = self.read(item, HEAD)
            self.jpeg[item] = head.startswith(b"\xff\xd8")
            if self.jpeg[item]:
                with suppress(Unreadable):
                    self.sizes[item] = image.upright_size(head, max_pixels=self._max_pixels)
            if not self.sizes[item, 0]:
                self.sizes[item] = image.upright_size(self.read(item), max_pixels=self._max_pixels)
            self.bytes[item] = os.path.getsize(self._paths[item])
        except Unreadable as error:
            raise self.fault(item, error) from None

    def limit(self, item: int) -> int:
        return self._max_pixels

    def read(self, item: int, count: int = -1) -> bytes:
        try:
            with open(self._paths[item], "rb") as stream:
                return stream.read(count)
        except OSError as error:
            raise Unreadable(f"cannot be opened ({error.strerror})", "put it back, or leave it out") from None

    def fault(self, item: int, error: Unreadable) -> DataError:
        return DataError(f"{self._paths[item]}: {error}")


class Memory(NamedTuple):
    """What an AugmentingLoader took, in bytes: never more than `stated`, but for a single item larger than what may be in decoding."""

    cache: Usage
    queue: int  # the most that batches in the making or ready had
    decoding: int  # the most that items had which were being read, decoded or made into views
    stated: int


@dataclass
class _Batch:
    ids: Int64[np.ndarray, " items"]
    views: cpu.Pass
    reductions: list[int]
    bytes: list[int]  # what each item takes while it is in work: of its file, its pixels, and what their decoding needs
    parts: list[Future[None]] = field(default_factory=list)
    dropped: bool = False


class AugmentingLoader:
    """Scanned items, or plain files, as batches of augmented views, made in threads; a context manager.

    What comes out depends on the items, `augment` and the step alone: not on threads, the room of the cache or what was loaded before. Where all
    views of a JPEG shrink it, it is decoded smaller; their pixels then differ a little from those made of all pixels.
    """

    def __init__(
        self,
        data: Items | Sequence[str | os.PathLike[str]],
        augment: Augment,
        *,
        views: int = 2,
        threads: int = 2,
        cache_bytes: int = 256 << 20,
        queue_bytes: int = 512 << 20,
        decode_bytes: int = 256 << 20,
        max_megapixels: float = 100.0,
        boxes: Shaped[np.ndarray, "items 4"] | None = None,
    ) -> None:
        """`cache_bytes` bounds the decoded items that are kept, `queue_bytes` the batches of views made ahead, `decode_bytes` what the threads have in
        work. Of plain files those above `max_megapixels` are refused; what is scanned has passed its own limit. `boxes` is where the foreground of
        every item is, by id, as Augment takes it.

        Raises UsageError for counts below 1, bytes below what they can be, or an `augment` for another device than the CPU.
        """
        for name, value in (("views", views), ("threads", threads), ("queue_bytes", queue_bytes)):
            if value < 1:
                raise UsageError(f"{name}: {value}; expected at least 1")
        if augment.device.type != "cpu":
            raise UsageError(f"an Augment on {augment.device}: the loader makes its views on the CPU; make one with device='cpu'")
        self._augment, self._views, self._threads, self._memory = augment, views, threads, Recycled(queue_bytes)
        self._files: image.Encoded | Paths = image.Encoded(data) if isinstance(data, Items) else Paths(data, int(max_megapixels * 1e6))
        self._boxes = None if boxes is None else checked_boxes(boxes, len(data))
        self._orientation = np.ones(len(data), np.int8)  # of what was decoded
        self._cache, self._decoding = BoundedCache(cache_bytes), Allowance(decode_bytes)
        self._pool = ThreadPoolExecutor(threads, "attar-views")

    def __enter__(self) -> AugmentingLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._files.__exit__()

    def memory(self) -> Memory:
        stated = self._cache.limit + self._memory.limit + self._decoding.limit
        return Memory(self._cache.usage(), self._memory.peak, self._decoding.peak, stated)

    def batch(self, ids: Sequence[int] | np.ndarray, step: int, *, clusters: np.ndarray | None = None) -> Float[Tensor, "n 3 height width"]:
        """The views of some ids, `views` of each in a row, as `augment` draws them in a step; `clusters` is the cluster of every item, by id.

        Raises DataError for a file that cannot be read, or is not what it was when it was scanned.
        """
        return self._finish(self._start(np.asarray(ids, np.int64), step, clusters))[1]

    def stream(
        self, batches: Iterable[Sequence[int] | np.ndarray], *, start: int = 0, clusters: np.ndarray | None = None
    ) -> Iterator[tuple[Int64[np.ndarray, " items"], Float[Tensor, "n 3 height width"]]]:
        """Ids and views of each batch in order, the first being that of step `start`; as many further ones in the making as `queue_bytes` hold, at most AHEAD."""
        waiting: deque[_Batch] = deque()
        try:
            for step, given in enumerate(batches, start):
                ids = np.asarray(given, np.int64)
                while waiting and (len(waiting) == AHEAD or not self._memory.fits(self._room(ids))):
                    yield self._finish(waiting.popleft())
                waiting.append(self._start(ids, step, clusters))
            while waiting:
                yield self._finish(waiting.popleft())
        finally:
            for batch in waiting:
                self._drop(batch)

    def _room(self, ids: np.ndarray) -> int:
        return self._augment.room(len(ids) * self._views)

    def _start(self, ids: np.ndarray, step: int, clusters: np.ndarray | None) -> _Batch:
        room = self._room(ids)
        if not self._memory.fits(room):
            raise UsageError(
                f"a batch of {len(ids)} items, {self._views} views each, takes {room:,} bytes, queue_bytes is {self._memory.limit:,}; "
                "raise it (for batches to be made ahead to twice that or more), or take smaller batches"
            )
        if isinstance(self._files, Paths):
            for item in np.unique(ids[self._files.sizes[ids, 0] == 0]):
                self._files.measure(int(item))
        own = None if clusters is None else np.asarray(clusters)[ids]
        boxes = None if self._boxes is None else self._boxes[ids]
        plan = self._augment.plan(self._files.sizes[ids], clusters=own, step=step, views=self._views, boxes=boxes)
        factors, pixels = reductions(plan, len(ids)), self._files.sizes[ids].prod(1)
        work = self._files.bytes[ids] + 3 * pixels // factors**2 + np.where(self._files.jpeg[ids], 0, PER_PIXEL * pixels)
        memory, how = self._memory.take(room), self._augment
        views = cpu.Pass(np.zeros((len(ids), 5), np.int64), plan, how.mean, how.std, dtype=how.dtype, layout=how.layout, memory=memory)
        batch = _Batch(ids, views, factors.tolist(), work.tolist())
        batch.parts = [self._pool.submit(self._fill, batch, first) for first in range(min(self._threads, len(ids)))]
        return batch

    def _fill(self, batch: _Batch, first: int) -> None:
        for slot in range(first, len(batch.ids), self._threads):
            if batch.dropped:
                return
            item = int(batch.ids[slot])
            try:
                self._make(batch, slot, item)
            except Unreadable as error:
                raise self._files.fault(item, error) from None

    def _make(self, batch: _Batch, slot: int, item: int) -> None:
        """All views of one item, from one decoding."""
        reduction, first = batch.reductions[slot], slot * self._views
        with self._decoding.hold(batch.bytes[slot]):
            pixels = self._cache.get((item, reduction), lambda: self._decode(item, reduction))
            orientation = int(self._orientation[item])
            if orientation > 1 or reduction > 1:
                height, width = self._files.sizes[item].tolist()
                batch.views.move(first, first + self._views, upright_to_stored((height, width), orientation, reduction))
            batch.views.give(slot, pixels)
            batch.views.make(first, first + self._views)

    def _decode(self, item: int, reduction: int) -> np.ndarray:
        pixels, orientation = image.stored(self._files.read(item), reduction=reduction, max_pixels=self._files.limit(item))
        self._orientation[item] = orientation
        height, width = self._files.sizes[item] if orientation < 5 else self._files.sizes[item][::-1]
        if pixels.shape[:2] != (-(-height // reduction), -(-width // reduction)):
            raise Unreadable(f"is of another size than {width} × {height} pixels", "let nothing write to it while it is in use")
        return pixels

    def _finish(self, batch: _Batch) -> tuple[np.ndarray, Tensor]:
        try:
            for part in batch.parts:
                part.result()
        finally:
            self._drop(batch)
        return batch.ids, batch.views.views

    def _drop(self, batch: _Batch) -> None:
        """Ends what is still being made of a batch, and its place in the queue."""
        batch.dropped = True
        for part in batch.parts:
            part.cancel()
        self._memory.hand_over(batch.views.views.nbytes)
