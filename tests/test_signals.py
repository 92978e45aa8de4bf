"""What a curve says in plain words: each verdict on made curves, the limits, and the files a curve is written to."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attar.errors import MissingExtra
from attar.stages import signals
from attar.workspace import Job

Make = Callable[..., Job]


def curve(*losses: float, rank: float = 20.0, spread: float = 0.5) -> list[dict[str, float]]:
    return [{"step": 10 * place, "validation_loss": loss, "effective_rank": rank, "spread": spread} for place, loss in enumerate(losses)]


FALLING = [1 / (step + 1) for step in range(30)]


def test_the_plateau_is_patience_looks_without_a_margin() -> None:
    assert not signals.plateaued(curve(*FALLING))
    assert not signals.plateaued(curve(*[1.0] * (2 * signals.PATIENCE)))  # too early to tell
    assert signals.plateaued(curve(*[1.0] * (2 * signals.PATIENCE + 1)))
    assert signals.plateaued(curve(*FALLING[:10], *[0.1] * signals.PATIENCE))
    assert not signals.plateaued(curve(*FALLING[:10], *[0.1] * (signals.PATIENCE - 1), 0.09))
    assert signals.plateaued(curve(*FALLING[:10], *[0.1 * (1 - signals.MARGIN / 2)] * signals.PATIENCE))


@given(st.integers(0, 12))
def test_a_negative_loss_that_falls_is_no_plateau(start: int) -> None:
    falling = [-0.1 * (start + step) for step in range(20)]
    assert not signals.plateaued(curve(*falling))
    assert signals.plateaued(curve(*falling, *[falling[-1]] * signals.PATIENCE))


def test_verdicts() -> None:
    assert signals.verdict(curve(*FALLING[:6])).state == "learning"
    assert signals.verdict(curve(*FALLING[:10], *[0.1] * 6)).state == "plateau"
    assert signals.verdict(curve(*[5.0] * 13)).state == "hardly learning"
    assert signals.verdict(curve(*[5.0] * 12)).state == "learning", "too early to say more"
    for alike in ({"rank": 1.2}, {"spread": 0.01}):
        state, sentence = signals.verdict(curve(*FALLING[:10], **alike))
        assert state == "collapse"
        assert "all items get nearly the same vector" in sentence
    only = [{"step": place, "validation_loss": loss} for place, loss in enumerate(FALLING)]
    assert signals.verdict(only).state == "learning", "a curve without an encoder's figures has no collapse"


def test_a_collapse_must_last() -> None:
    sound, alike = curve(*FALLING[:5]), curve(*FALLING[5:8], rank=1.0)
    assert not signals.has_collapsed([*sound, *alike[:2]])
    assert signals.has_collapsed([*sound, *alike])
    assert not signals.has_collapsed([*alike, *sound])
    assert not signals.has_collapsed(alike), "the untrained encoder is not judged"


def test_the_last_word_says_what_to_do() -> None:
    good = signals.closing(curve(*FALLING), 64)
    assert good == "the encoder learned: validation loss 1.00 → 0.03, effective rank 20 of 64, 290 steps"
    gone = signals.closing(curve(*FALLING, rank=1.0), 64)
    assert gone.startswith("the encoder collapsed: ")
    assert "the state before the collapse is kept; try --objective nt-xent or vicreg" in gone
    assert "--self-steps" in signals.closing(curve(*[5.0] * 8), 64)
    assert signals.closing(curve(*[5.0] * 8), 64).startswith("the encoder hardly learned")


def test_looks_are_written_as_they_come_and_resumed(job: Make) -> None:
    made = job()
    with signals.Recorder(made, "a-fit", curve(3.0)) as record:
        record(curve(3.0, 2.0)[1])
        seen = [json.loads(line) for line in (made.folder / "a-fit.jsonl").read_text().splitlines()]  # while it is still open
        assert seen == curve(3.0, 2.0)
        record(curve(3.0, 2.0, 9.0)[2])  # a look after the last checkpoint, then a kill
    with signals.Recorder(made, "a-fit", curve(3.0, 2.0)) as record:
        record(curve(3.0, 2.0, 1.0)[2])
    assert [json.loads(line) for line in (made.folder / "a-fit.jsonl").read_text().splitlines()] == curve(3.0, 2.0, 1.0)


def test_tensorboard_shows_the_curve_once_however_often_it_is_resumed(job: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = job("embed", tensorboard=str(tmp_path / "boards"))
    with signals.Recorder(made, "fit", curve(3.0)) as record:
        record(curve(3.0, 2.0)[1])
        record(curve(3.0, 2.0, 9.0)[2])
    with signals.Recorder(made, "fit", curve(3.0, 2.0)) as record:
        record(curve(3.0, 2.0, 1.0)[2])
    board = EventAccumulator(str(tmp_path / "boards" / "embed-fit")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("validation_loss")] == [(0, 3.0), (10, 2.0), (20, 1.0)]
    assert set(board.Tags()["scalars"]) == {"validation_loss", "effective_rank", "spread"}


def test_without_tensorboard_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("tensorboard", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtra, match=r"--tensorboard needs the package 'tensorboard'.*pip install 'attar\[tensorboard\]'"):
        signals.require_board()
