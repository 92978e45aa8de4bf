"""Is my run working? What a training curve says in plain words, and where its figures are written while it is drawn.

A curve is a list of looks at held-out items: step, validation_loss, and of an encoder effective_rank and spread (see models.objectives).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from attar.errors import MissingExtra
from attar.workspace import Job

Curve = Sequence[Mapping[str, float]]

PATIENCE = 6
"""Looks at the validation loss without an improvement of MARGIN after which training has reached its plateau."""
MARGIN = 0.003
LEAST = 0.02
"""Share of the first validation loss by which it must have fallen for a run to have learned something."""
RANK, SPREAD = 1.5, 0.05
"""Effective rank and spread of the embeddings under either of which they are all alike."""
LASTING = 3
"""Looks in a row that must be collapsed: an untrained encoder and a passing dip are not one."""


class Verdict(NamedTuple):
    state: str  # "learning", "plateau", "collapse" or "hardly learning"
    sentence: str  # for a person


def collapsed(seen: Mapping[str, float]) -> bool:
    """Whether at one look all items were alike: effective rank or spread under its limit; False where neither was measured."""
    return seen.get("effective_rank", RANK) < RANK or seen.get("spread", SPREAD) < SPREAD


def has_collapsed(curve: Curve) -> bool:
    """Whether the last looks after the first, LASTING of them, were all collapsed."""
    return len(curve) > LASTING and all(collapsed(seen) for seen in curve[-LASTING:])


def plateaued(curve: Curve) -> bool:
    """Whether the last PATIENCE looks brought no validation loss better than the best before them by the share MARGIN."""
    losses = [seen["validation_loss"] for seen in curve]
    if len(losses) <= 2 * PATIENCE:
        return False
    best = min(losses[:-PATIENCE])
    return min(losses[-PATIENCE:]) > best - MARGIN * abs(best)


def verdict(curve: Curve) -> Verdict:
    """What a curve says. Collapse comes first, then too small an improvement, then a plateau; else the run is learning.

    >>> verdict([{"step": 0, "validation_loss": 5.0}, {"step": 10, "validation_loss": 4.0}]).state
    'learning'
    """
    first, last = curve[0], curve[-1]
    best = min(curve, key=lambda seen: seen["validation_loss"])
    gained = first["validation_loss"] - best["validation_loss"]
    figures = f"validation loss {first['validation_loss']:.2f} → {last['validation_loss']:.2f}, step {int(last['step'])}"
    if "effective_rank" in last:
        figures += f", effective rank {last['effective_rank']:.0f}"
    if has_collapsed(curve):
        alike = f"effective rank {last.get('effective_rank', 1.0):.1f}, spread {last.get('spread', 0.0):.2f}"
        return Verdict("collapse", f"collapse: all items get nearly the same vector ({alike}; {figures})")
    if len(curve) > 2 * PATIENCE and gained < LEAST * abs(first["validation_loss"]):
        return Verdict("hardly learning", f"hardly learning: the loss on held-out items has not fallen by {LEAST:.0%} ({figures})")
    if plateaued(curve):
        return Verdict("plateau", f"plateau: {PATIENCE} looks without an improvement of {MARGIN:.1%} ({figures})")
    return Verdict("learning", f"learning: the loss on held-out items falls ({figures})")


REMEDIES = {
    "collapse": "the state before the collapse is kept; try --objective nt-xent or vicreg, a larger --batch-size, or weaker augmentation (--strength 0.3)",
    "hardly learning": "try more --self-steps, weaker augmentation (--strength 0.3), a larger --batch-size, or a pretrained model (--model hf:…)",
}


def closing(curve: Curve, dim: int) -> str:
    """The last word on a finished training: the verdict with its figures and, where it is bad, what to do."""
    state, _ = verdict(curve)
    first, best, last = curve[0], min(curve, key=lambda seen: seen["validation_loss"]), curve[-1]
    gained = first["validation_loss"] - best["validation_loss"]
    if state in ("learning", "plateau"):
        state = "hardly learning" if gained < LEAST * abs(first["validation_loss"]) else state
    word = {"learning": "learned", "plateau": "learned, to a plateau", "hardly learning": "hardly learned", "collapse": "collapsed"}[state]
    rank = f"effective rank {last['effective_rank']:.0f} of {dim}, " if "effective_rank" in last else ""
    said = f"the encoder {word}: validation loss {first['validation_loss']:.2f} → {best['validation_loss']:.2f}, {rank}{int(last['step'])} steps"
    return f"{said}; {REMEDIES[state]}" if state in REMEDIES else said


class Recorder:
    """Writes every look of a training as it is made: FOLDER/LABEL.jsonl in the stage's half-done work, and TensorBoard events where asked for.

    A resumed training first writes what the looks before it were; its TensorBoard events go on where they ended.
    """

    def __init__(self, job: Job, label: str, curve: Curve) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        self._file = (job.folder / f"{label}.jsonl").open("w", encoding="utf-8")
        self._board: Any = _board(f"{job.tensorboard}/{job.name}-{label}", int(curve[-1]["step"]) + 1) if job.tensorboard else None
        for seen in curve:
            self._write(seen)
        if self._board and len(curve) == 1:
            self._show(curve[0])

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._board:
            self._board.close()

    def __call__(self, seen: Mapping[str, float]) -> None:
        self._write(seen)
        if self._board:
            self._show(seen)

    def _write(self, seen: Mapping[str, float]) -> None:
        self._file.write(json.dumps(dict(seen)) + "\n")
        self._file.flush()

    def _show(self, seen: Mapping[str, float]) -> None:
        for name, value in seen.items():
            if name != "step":
                self._board.add_scalar(name, value, int(seen["step"]))
        self._board.flush()


def require_board() -> None:
    """Raises MissingExtra where TensorBoard files cannot be written."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise MissingExtra("tensorboard", "tensorboard", "--tensorboard") from None


def _board(folder: str, resumed_at: int) -> Any:
    require_board()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=resumed_at)
