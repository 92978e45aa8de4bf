"""What an engine is, and the one that works in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

Tick = Callable[[int], object]
"""Called with the number of items that were done."""


class Work(Protocol):
    """How parts are worked on; picklable, and so are parts and results."""

    def open(self, workers: int) -> AbstractContextManager[Callable[[Any, Tick], Any]]:
        """What one process needs for it (readers, networks, a pool of that many threads), and in it the function of one part.

        A part's result depends on nothing but the part: it may be made anywhere, in any order, and more than once.
        """


class Engine(Protocol):
    """Does work on numbered parts."""

    remote: bool
    """Whether other processes do it, so that what they need must be sent there."""

    @property
    def slots(self) -> int:
        """Parts that are worked on at once."""

    def map(self, work: Work, parts: Mapping[int, Any], tick: Tick) -> Iterator[tuple[int, Any]]:
        """(number, result) of each part, as they become ready."""

    def hold(self, value: Any) -> Any:
        """A part that several calls of `map` take, kept where it is needed."""

    def close(self) -> None:
        """Lets go of what was started."""


class Local:
    """This process, one part after the other; a part's own threads are its parallelism."""

    remote = False
    slots = 1

    def __init__(self, workers: int) -> None:
        self._workers = workers

    def map(self, work: Work, parts: Mapping[int, Any], tick: Tick) -> Iterator[tuple[int, Any]]:
        if not parts:
            return
        with work.open(self._workers) as make:
            for number, part in parts.items():
                yield number, make(part, tick)

    def hold(self, value: Any) -> Any:
        return value

    def close(self) -> None:
        pass
