"""The tree of errors: every failure a user can cause has a class here, and every message names the remedy.

AttarError                 exit code 1
├── UsageError             2   an option, setting or source that is not understood
├── DataError              1   the items: none found, none readable, too few
├── ModelError             1   the model: cannot be built, its weights do not fit, it is not safe to load
├── WorkspaceError         1   the run folder: not ours, not writable, full, in use
├── MissingExtra           1   an optional package is needed; names the extra that brings it
└── BudgetNotReached       3   the best result is saved all the same
"""

from __future__ import annotations

from typing import Any


class AttarError(Exception):
    """Base of all errors attar raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(AttarError):
    """An option, a setting or a source string that is not understood."""

    exit_code = 2


class DataError(AttarError):
    """The items cannot carry the run: none found, none readable, or too few."""


class ModelError(AttarError):
    """The model cannot be built, loaded or followed."""


class WorkspaceError(AttarError):
    """The run folder cannot be used."""


class MissingExtra(AttarError):
    """An optional package is needed and not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}, which is not installed. Install it with: pip install 'attar[{extra}]'")


class BudgetNotReached(AttarError):
    """No candidate met the budget; the best one found was saved, and `run` is the Run that holds it."""

    exit_code = 3

    def __init__(self, message: str, run: Any = None) -> None:
        super().__init__(message)
        self.run = run
