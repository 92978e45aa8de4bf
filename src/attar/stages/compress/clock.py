"""Minutes become steps: how many fit is said anew at every look, from how long the last steps took."""

from __future__ import annotations

import time
from collections.abc import Callable

from attar.workspace import Job

WINDOW = 8
"""Looks over which a step's time is taken: what disturbed the machine before does not count."""
RISING = 0.8
"""Share of the steps after which they do not become more: the learning rate has fallen and is not raised again."""


class Clock:
    """The steps of one training that has so many seconds. What was said is kept: a training that was interrupted goes the same way again."""

    def __init__(
        self, seconds: float, steps: int, lap: int, later: float, job: Job, name: str, now: Callable[[], float] = time.perf_counter
    ) -> None:
        """`steps` are thought to fit; one after the first `lap` costs the share `later`, above 0, at most 1, of one in it. Time runs from here on."""
        self._seconds, self._lap, self._later = seconds, lap, later
        self._job, self._file, self._now, self._mark = job, f"clock-{name}.json", now, now()
        self._looks: list[tuple[int, int, float]] = [(0, steps, 0.0)]
        self._looks += [(int(at), int(said), float(spent)) for at, said, spent in job.recall(self._file) or ()]

    def __call__(self, step: int) -> int:
        """The number of steps in all, said after `step` of them; `step` itself where the time is over."""
        mark, self._mark = self._mark, self._now()
        if all(at != step for at, _, _ in self._looks):
            spent = self._looks[-1][2] + self._mark - mark
            self._looks.append((step, self._fitting(step, spent), spent))
            self._job.remember(self._file, self._looks[1:])
        return self.total(step)

    def total(self, step: int) -> int:
        """The number of steps in all, as it was last said by then."""
        return next(said for at, said, _ in reversed(self._looks) if at <= step)

    def _fitting(self, step: int, spent: float) -> int:
        before, _, then = self._looks[-WINDOW:][0]
        pace = (spent - then) / (self._cost(step) - self._cost(before))
        left = max(0.0, self._seconds - spent) / max(pace, 1e-9)  # in steps of the first lap
        dear = min(left, max(0, self._lap - step))
        fits, said = step + int(dear + (left - dear) / self._later), self.total(step)
        return min(fits, said) if step > RISING * said else fits

    def _cost(self, step: int) -> float:
        """Of so many steps, in steps of the first lap."""
        return min(step, self._lap) + self._later * max(0, step - self._lap)
