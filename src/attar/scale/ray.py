"""The engine that works on a Ray cluster: one that is there already, or one that is started on this machine."""

from __future__ import annotations

import contextlib
import functools
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from attar import __version__
from attar.errors import AttarError, MissingExtra, UsageError, WorkspaceError
from attar.scale.local import Tick, Work

AHEAD = 2  # parts per slot that are sent before their turn, so that no worker waits for the next one
RETRIES = 3  # times that a part is given to another worker when its own died

_open: tuple[str, contextlib.ExitStack, Callable[[Any, Tick], Any]] | None = None
"""In a worker process: what it opened for the work it is on; parts of one work come one after the other."""


def _make(key: str, box: list[Any], part: Any, version: str) -> tuple[Any, int]:
    """In a worker process: the result of a part, and how many items were done."""
    global _open
    import ray

    if version != __version__:
        node = ray.util.get_node_ip_address()
        raise UsageError(f"the Ray node {node} has attar {__version__}, this machine {version}; install the same version on all nodes")
    if _open is None or _open[0] != key:
        if _open is not None:
            _open[1].close()
        stack = contextlib.ExitStack()
        _open = key, stack, stack.enter_context(ray.get(box[0]).open(1))
    done: list[int] = []
    return _open[2](part, done.append), sum(done)


class Ray:
    """Sends parts to Ray as tasks; what they return is kept by the caller, so no more than a few are on their way.

    Nodes read the data under the paths it has here. A part whose worker died is sent again.
    Raises MissingExtra without the package, UsageError for an address where no cluster answers.
    """

    remote = True

    def __init__(self, workers: int, address: str | None) -> None:
        try:
            import ray
        except ModuleNotFoundError:
            raise MissingExtra("ray", "ray", "engine ray") from None
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # attar sends nothing anywhere
        self._ray, self._workers, self._address, self._mine = ray, workers, address, False

    @functools.cached_property
    def slots(self) -> int:  # connects: a run whose stages are all finished starts nothing
        ray = self._ray
        if not ray.is_initialized():
            here: dict[str, Any] = {"address": self._address}
            if self._address is None:
                here = {"address": "local", "num_cpus": self._workers, "include_dashboard": False}
            try:
                ray.init(**here, configure_logging=False, log_to_driver=False)
            except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
                where = f"no Ray cluster answers at {self._address!r}" if self._address else "Ray cannot be started on this machine"
                raise UsageError(
                    f"ray_address: {where} ({error}); start one with `ray start --head` and name it, as in ray://HOST:10001 or auto"
                ) from None
            self._mine = True
        return max(1, int(ray.cluster_resources().get("CPU", 1)))

    def map(self, work: Work, parts: Mapping[int, Any], tick: Tick) -> Iterator[tuple[int, Any]]:
        ray, key, todo, most = self._ray, uuid.uuid4().hex, list(parts.items())[::-1], AHEAD * self.slots
        task = ray.remote(num_cpus=1, max_retries=RETRIES)(_make)
        box, waiting, failed = [ray.put(work)], dict[Any, int](), list[Exception]()
        while waiting or (todo and not failed):
            while todo and not failed and len(waiting) < most:
                number, part = todo.pop()
                waiting[task.remote(key, box, part, __version__)] = number
            for ready in ray.wait(list(waiting), num_returns=1)[0]:
                number = waiting.pop(ready)
                try:
                    result, done = self._get(ready)
                except Exception as error:  # raised when what is on its way has come, so that it is not lost
                    failed.append(error)
                    continue
                tick(done)
                yield number, result
        if failed:
            raise failed[0]

    def _get(self, ready: Any) -> tuple[Any, int]:
        errors = self._ray.exceptions
        try:
            return self._ray.get(ready)
        except errors.RayTaskError as error:
            if isinstance(error.cause, AttarError):
                raise error.cause from None
            raise
        except errors.RayError as error:
            raise WorkspaceError(
                f"a Ray worker was lost {RETRIES + 1} times on one part ({type(error).__name__}: {str(error).partition('.')[0]}); "
                "what is finished is kept: give the nodes more memory, then run the same command: it resumes"
            ) from error

    def hold(self, value: Any) -> Any:
        assert self.slots
        return self._ray.put(value)

    def close(self) -> None:
        if self._mine:
            self._ray.shutdown()
