"""modalities.cache: what is kept, what is given up, and that the limit holds at every moment."""

from __future__ import annotations

import doctest
import threading
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attar.errors import UsageError
from attar.modalities import cache as caches
from attar.modalities.cache import OVERHEAD, Allowance, BoundedCache, Recycled, size_of


def pixels(count: int, value: int = 0) -> np.ndarray:
    return np.full(count, value, np.uint8)


class Slow:
    """The same by hand: a list of keys from the least to the most recently used, sums taken anew each time."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, OrderedDict[int, int]()

    def get(self, key: int, size: int) -> bool:
        if key in self.held:
            self.held.move_to_end(key)
            return True
        if size <= self.limit:
            while sum(self.held.values()) + size > self.limit:
                del self.held[next(iter(self.held))]
            self.held[key] = size
        return False


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 20_000), st.lists(st.integers(0, 9), max_size=60))
def test_it_keeps_what_the_slow_one_keeps(limit: int, keys: list[int]) -> None:
    cache, slow, hits = BoundedCache(limit), Slow(limit), 0
    for key in keys:
        made: list[int] = []

        def make(key: int = key, made: list[int] = made) -> np.ndarray:
            made.append(key)
            return pixels(700 * key, key)

        found = cache.get(key, make)
        assert np.array_equal(found, pixels(700 * key, key))
        there = slow.get(key, 700 * key + OVERHEAD)
        assert there == (not made)
        hits += there
    usage = cache.usage()
    assert (usage.hits, usage.misses) == (hits, len(keys) - hits)
    assert (usage.items, usage.bytes) == (len(slow.held), sum(slow.held.values()))
    assert usage.bytes <= usage.peak <= limit


def test_the_limit_holds_at_every_moment_for_many_threads() -> None:
    cache, limit, seen, stop = BoundedCache(100_000), 100_000, [], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.append(cache.usage().bytes)

    def use(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for key in rng.integers(0, 60, 400):
            size = int(key) * 173 + 1
            assert (cache.get(int(key), lambda size=size, key=key: pixels(size, int(key))) == key).all()

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(8)))
    stop.set()
    watcher.join()
    usage = cache.usage()
    assert max(seen) <= limit
    assert 0 < usage.bytes <= usage.peak <= limit
    assert usage.hits + usage.misses == 8 * 400
    assert usage.bytes == sum(size_of(array) for array in cache._held.values())


def test_one_key_is_made_once_for_all_who_ask_at_the_same_time() -> None:
    cache, made, meet = BoundedCache(10**6), [], threading.Barrier(6)

    def make() -> np.ndarray:
        made.append(1)
        time.sleep(0.05)
        return pixels(10)

    def ask() -> np.ndarray:
        meet.wait()
        return cache.get("same", make)

    with ThreadPoolExecutor(6) as pool:
        found = [future.result() for future in [pool.submit(ask) for _ in range(6)]]
    assert len(made) == 1
    assert all(array is found[0] for array in found)
    assert cache.usage()[:3] == (5, 1, 1)


def test_a_failure_reaches_all_who_wait_and_is_not_kept() -> None:
    cache, meet = BoundedCache(10**6), threading.Barrier(4)

    def fail() -> np.ndarray:
        time.sleep(0.05)
        raise ValueError("damaged")

    def ask() -> None:
        meet.wait()
        with pytest.raises(ValueError, match="damaged"):
            cache.get("same", fail)

    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(ask) for _ in range(4)]:
            future.result()
    assert (cache.get("same", lambda: pixels(3, 7)) == 7).all()


def test_what_is_larger_than_the_limit_is_made_and_not_kept() -> None:
    cache = BoundedCache(2000)
    small = cache.get("small", lambda: pixels(100))
    assert cache.get("large", lambda: pixels(2000)).shape == (2000,)
    assert cache.get("small", lambda: pixels(0)) is small  # nothing was given up for it
    assert cache.usage().items == 1
    nothing = BoundedCache(0)
    assert nothing.get("a", lambda: pixels(1)).shape == (1,)
    assert nothing.usage()[2:] == (0, 0, 0)


def test_a_part_is_counted_with_the_whole_it_keeps_alive() -> None:
    whole = np.zeros((100, 100, 3), np.uint8)
    assert size_of(whole[:2, :2]) == size_of(whole) == 30_000 + OVERHEAD
    cache = BoundedCache(30_000)
    cache.get("part", lambda: whole[:2, :2])
    assert cache.usage().bytes == 0


def test_what_is_held_cannot_be_changed() -> None:
    cache = BoundedCache(10**6)
    with pytest.raises(ValueError, match="read-only"):
        cache.get("a", lambda: pixels(5))[0] = 1
    cache.clear()
    assert cache.usage() == (0, 1, 0, 0, 5 + OVERHEAD)


def test_a_limit_below_zero_is_refused() -> None:
    with pytest.raises(UsageError, match=r"a cache of -1 bytes: expected 0 \(keep nothing\) or more"):
        BoundedCache(-1)


# what is in work


def test_an_allowance_is_never_exceeded_but_by_one_alone() -> None:
    allowance, lock = Allowance(1000), threading.Lock()
    held: list[int] = []
    most: list[tuple[int, int]] = []

    def use(seed: int) -> None:
        for size in np.random.default_rng(seed).integers(1, 1500, 60).tolist():
            with allowance.hold(size):
                with lock:
                    held.append(size)
                    most.append((len(held), sum(held)))
                time.sleep(0.0002)
                with lock:
                    held.remove(size)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(use, range(6)))
    assert all(total <= 1000 or count == 1 for count, total in most)
    with allowance.hold(400), allowance.hold(600):
        pass  # two that fit do not wait for each other
    assert allowance.peak == max(total for _, total in most) > 1000


def test_what_was_held_is_given_back_after_an_error() -> None:
    allowance = Allowance(10)
    with pytest.raises(KeyError), allowance.hold(10):
        raise KeyError("mine")
    with allowance.hold(10):
        pass
    with pytest.raises(UsageError, match="an allowance of 0 bytes: expected 1 or more"):
        Allowance(0)


def test_memory_is_used_again_when_its_reader_has_let_go_of_it() -> None:
    memory = Recycled(3000)
    first, second = memory.take(1000), memory.take(1000)
    first[:], second[:] = 1, 2
    place = second.ctypes.data
    memory.hand_over(1000)
    memory.hand_over(1000)
    part = second[10:20]
    del second
    third = memory.take(1000)
    assert (part == 2).all()  # a part of it is still read: it is not used again
    assert third.ctypes.data != place
    memory.hand_over(1000)
    del part
    fourth = memory.take(1000)
    assert fourth.ctypes.data == place
    assert (first == 1).all()
    assert memory.peak == 2000


def test_memory_kept_for_the_next_counts_as_well() -> None:
    memory = Recycled(2000)
    handed = memory.take(1500)
    memory.hand_over(1500)
    waiting = memory.take(1500)
    assert not memory.fits(501)
    assert memory.fits(500)
    del handed  # with what is waiting it would be too much
    assert not memory._spare
    memory.hand_over(1500)
    del waiting
    assert [one.nbytes for one in memory._spare] == [1500]
    other = memory.take(700)
    assert other.nbytes == 700
    assert not memory._spare  # of another size: it was given up


def test_the_example_is_right() -> None:
    assert doctest.testmod(caches).failed == 0
