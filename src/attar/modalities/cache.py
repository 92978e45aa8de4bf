"""Memory that stays within a stated number of bytes: for decoded items that are kept, for those in work, for batches made ahead."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from attar.errors import UsageError

OVERHEAD = 512
"""Bytes an entry is counted as beyond its pixels: the array's and the key's objects and their places in the tables, rounded up."""


class Usage(NamedTuple):
    hits: int  # asked for and there, or just being made for somebody else
    misses: int  # asked for and made
    items: int  # held now
    bytes: int  # held now, OVERHEAD of each item included
    peak: int  # the most bytes ever held


def size_of(array: np.ndarray) -> int:
    """Bytes that keeping an array costs: of the whole buffer where it is a part of one, and OVERHEAD."""
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    return max(owner.nbytes, array.nbytes) + OVERHEAD


class BoundedCache:
    """Arrays by key, the least recently used given up first; for any number of threads.

    Example:
        >>> cache = BoundedCache(10_000)
        >>> [int(cache.get(key, lambda: np.full(4000, key)).sum()) for key in (1, 1, 2, 3)]  # 32,000 bytes each: too large to be kept
        [4000, 4000, 8000, 12000]
        >>> cache.usage()
        Usage(hits=0, misses=4, items=0, bytes=0, peak=0)
    """

    def __init__(self, limit_bytes: int) -> None:
        """`limit_bytes` bounds the sum of `size_of` what is held, at every moment; 0 keeps nothing. Raises UsageError below 0."""
        if limit_bytes < 0:
            raise UsageError(f"a cache of {limit_bytes} bytes: expected 0 (keep nothing) or more")
        self.limit = limit_bytes
        self._lock = threading.Lock()
        self._held: OrderedDict[Hashable, np.ndarray] = OrderedDict()
        self._making: dict[Hashable, Future[np.ndarray]] = {}
        self._bytes = self._peak = self._hits = self._misses = 0

    def get(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The array of a key, read-only; made when it is not held, once however many threads ask for it at the same time.

        What `make` raises reaches everyone who waits for it, and the next to ask tries again. `make` must not ask for the same key.
        """
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                self._hits += 1
                return self._held[key]
            promise = self._making.get(key)
            mine = promise is None
            if promise is None:
                promise = self._making[key] = Future()
                self._misses += 1
            else:
                self._hits += 1
        if mine:
            self._make(key, make, promise)
        return promise.result()

    def _make(self, key: Hashable, make: Callable[[], np.ndarray], promise: Future[np.ndarray]) -> None:
        try:
            array = make()
            array.flags.writeable = False  # it is everyone's
        except BaseException as error:
            with self._lock:
                del self._making[key]
            promise.set_exception(error)
            return
        with self._lock:
            self._keep(key, array)
            del self._making[key]
        promise.set_result(array)

    def _keep(self, key: Hashable, array: np.ndarray) -> None:
        size = size_of(array)
        if size > self.limit:
            return
        while self._bytes + size > self.limit:
            _, given_up = self._held.popitem(last=False)
            self._bytes -= size_of(given_up)
        self._held[key] = array
        self._bytes += size
        self._peak = max(self._peak, self._bytes)

    def usage(self) -> Usage:
        with self._lock:
            return Usage(self._hits, self._misses, len(self._held), self._bytes, self._peak)

    def clear(self) -> None:
        """Gives up everything that is held; the counts stay."""
        with self._lock:
            self._held.clear()
            self._bytes = 0


class Allowance:
    """Bytes that threads may have in work at a time; who asks for more than there are waits until nobody else holds any."""

    def __init__(self, limit_bytes: int) -> None:
        """Raises UsageError below 1."""
        if limit_bytes < 1:
            raise UsageError(f"an allowance of {limit_bytes} bytes: expected 1 or more")
        self.limit, self.peak = limit_bytes, 0
        self._held, self._freed = 0, threading.Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """So many bytes, for the length of a with block."""
        with self._freed:
            self._freed.wait_for(lambda: not self._held or self._held + size <= self.limit)
            self._held += size
            self.peak = max(self.peak, self._held)
        try:
            yield
        finally:
            with self._freed:
                self._held -= size
                self._freed.notify_all()


class Recycled:
    """Memory for batches; that of the last one whose reader let go of it is used again, for the system takes its time to clear new pages."""

    def __init__(self, limit_bytes: int) -> None:
        """`limit_bytes` bounds what was taken and not handed over, and what is kept for the next."""
        self.limit, self.peak = limit_bytes, 0
        self._out = 0
        self._spare: deque[np.ndarray] = deque(maxlen=1)

    def fits(self, size: int) -> bool:
        """Whether so many bytes more are within the limit, beside what was taken and not handed over."""
        return self._out + size <= self.limit

    def take(self, size: int) -> UInt8[np.ndarray, " bytes"]:
        """So many bytes, 1 or more. From numpy, which asks for large pages."""
        while self._spare:
            memory = self._spare.pop()
            if memory.nbytes == size:
                break
        else:
            memory = np.empty(size, np.uint8)
        self._out += size
        self.peak = max(self.peak, self._out)
        # Not a slice: parts of that would refer to what lies below it, and not keep it from being used again.
        lent = np.frombuffer(memory.data, np.uint8)
        weakref.finalize(lent, self._take_back, memory).atexit = False
        return lent

    def hand_over(self, size: int) -> None:
        """They are the reader's now."""
        self._out -= size

    def _take_back(self, memory: np.ndarray) -> None:
        if self.fits(memory.nbytes):
            self._spare.append(memory)
