"""Where the work on shards is done: in this process, or on a Ray cluster."""

from __future__ import annotations

from attar.config import Setup
from attar.scale.local import Engine, Local


def engine_of(setup: Setup) -> Engine:
    """The engine the settings name; raises MissingExtra where its package is not installed."""
    if setup.engine == "local":
        return Local(setup.workers)
    from attar.scale.ray import Ray

    return Ray(setup.workers, setup.ray_address)
