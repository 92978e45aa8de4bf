"""Training: batches, exact resumption, the plateau, and that both objectives teach something on made images."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from attar.config import Embed
from attar.errors import ModelError
from attar.models.network import Network
from attar.models.students import Encoder
from attar.records import Head, Items, Policy, Preprocess
from attar.stages import train
from attar.stages.augment.policy import DEFAULTS
from attar.stages.cluster.head import refit_head
from attar.stages.cluster.space import head_probabilities
from attar.stages.signals import plateaued
from attar.workspace import Job

PREPROCESS = Preprocess(size=(16, 16), resize_shortest=16, mean=(0.5,) * 3, std=(0.25,) * 3)
POLICY = Policy(families=DEFAULTS)

Make = Callable[..., Job]


def _draw(seed: int) -> Callable[[int], np.random.Generator]:
    return lambda number: np.random.default_rng([seed, number])


# batches


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 100))
def test_an_epoch_shows_every_item_once_at_most_and_all_when_the_batch_divides(count: int, size: int, seed: int) -> None:
    ids, size = np.arange(100, 100 + count), min(size, count)
    per_epoch = count // size
    for epoch in range(3):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        seen = np.concatenate(list(train.batches(ids, size, steps, _draw(seed))))
        assert len(seen) == len(set(seen.tolist())) == per_epoch * size
        assert set(seen.tolist()) <= set(ids.tolist())
        if count % size == 0:
            assert set(seen.tolist()) == set(ids.tolist())


@given(st.integers(0, 40))
def test_batches_do_not_depend_on_where_one_starts(start: int) -> None:
    whole = list(train.batches(np.arange(23), 5, range(60), _draw(0)))
    resumed = list(train.batches(np.arange(23), 5, range(start, 60), _draw(0)))
    assert all(np.array_equal(a, b) for a, b in zip(whole[start:], resumed, strict=True))


# the loop


class Stopped(Exception):
    """A kill, as the loop sees it."""


def _fit(
    job: Job, steps: int, stop: int | None = None, poison: int | None = None, **more: Any
) -> tuple[dict[str, Tensor], tuple[dict[str, float], ...]]:
    """A regression with the loop; `stop` breaks it off before that step, `poison` makes that step's loss infinite."""
    torch.manual_seed(0)
    modules = nn.ModuleDict({"net": nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))})
    held = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))

    def error(x: Tensor) -> Tensor:
        return (modules["net"](x) - x.sum(1, keepdim=True)).square().mean()

    def stream(wanted: range) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        for step in wanted:
            if step == stop:
                raise Stopped
            yield step, np.arange(4), np.random.default_rng(step).normal(size=(16, 4)).astype(np.float32)

    def loss_of(step: int, _: np.ndarray, images: np.ndarray) -> Tensor:
        return error(torch.from_numpy(images)) * (float("inf") if step == poison else 1)

    def look() -> dict[str, float]:
        with torch.no_grad():
            return {"validation_loss": float(error(held))}

    curve = train.optimise(modules, 1e-2, steps, stream, loss_of, look, job, "a fit", **more)
    return modules.state_dict(), curve


@pytest.mark.parametrize("more", [{}, {"averaged": 0.3}, {"recount": lambda step: 35 if step > 20 else 50}])
@pytest.mark.parametrize("stop", [1, 17, 34])
def test_a_loop_that_was_interrupted_goes_on_to_the_same_bits(
    stop: int, more: dict[str, Any], job: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, curve = _fit(job("whole"), 40, **more)
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", -1.0)  # a checkpoint after every step
    with pytest.raises(Stopped):
        _fit(job("broken"), 40, stop=stop, **more)
    assert job("broken").recall("a-fit.pt")["step"] == stop
    resumed, again = _fit(job("broken"), 40, **more)
    assert again == curve
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_loop_interrupted_before_its_first_checkpoint_starts_again(job: Make) -> None:
    whole, _ = _fit(job("whole"), 40)
    with pytest.raises(Stopped):
        _fit(job("broken"), 40, stop=11)
    resumed, _ = _fit(job("broken"), 40)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_finished_loop_is_not_taken_again(job: Make) -> None:
    whole, curve = _fit(job("once"), 40)
    found, again = _fit(job("once"), 40, stop=0)  # would raise at its first step
    assert again == curve
    assert all(torch.equal(whole[name], found[name]) for name in whole)
    assert curve[-1]["step"] == 40
    assert curve[-1]["validation_loss"] < curve[0]["validation_loss"]


def test_the_number_of_steps_may_change_on_the_way(job: Make) -> None:
    more, fewer = (_fit(job(str(said)), 40, recount=lambda _, said=said: said)[1] for said in (63, 22))
    assert more[-1]["step"] == 63
    assert fewer[-1]["step"] == 22


def test_the_mean_of_the_last_weights_is_what_is_left(job: Make) -> None:
    """Against the definition: the running mean over a share of the steps, of a loss so noisy that no single step is right."""
    seen: list[Tensor] = []
    modules = nn.ModuleDict({"net": nn.Linear(1, 1, bias=False)})

    def loss_of(step: int, *_: object) -> Tensor:
        seen.append(modules["net"].weight.detach().clone())
        return (modules["net"].weight - 2.0 - float(np.random.default_rng(step).normal())).square().sum()

    def stream(wanted: range) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        return ((step, np.arange(1), np.zeros(1)) for step in wanted)

    def look() -> dict[str, float]:
        return {"validation_loss": float(modules["net"].weight.square().sum())}

    curve = train.optimise(modules, 0.05, 100, stream, loss_of, look, job(), "a fit", averaged=0.2)
    expected = seen[1]
    for step, weight in enumerate(seen[2:], 2):
        expected = expected + (weight - expected) / min(step, 20)
    expected = expected + (seen[-1] - expected) / 20
    close = 0.05 * 0.3 / 20  # the last step, of at most that rate, is not in `seen`
    assert curve[-1]["validation_loss"] ** 0.5 == pytest.approx(float(expected.abs()), abs=close)
    assert abs(float(seen[-1] - expected)) > 3 * close, "another thing than the last weights"


def test_a_loss_that_is_not_finite_is_named_with_its_step(job: Make) -> None:
    with pytest.raises(ModelError, match=r"a-fit: the loss is inf at step 7; the model or its preprocessing \(--mean, --std\) is not sane"):
        _fit(job(), 20, poison=7)


def test_training_ends_with_the_best_it_saw(job: Make) -> None:
    looks = iter([3.0, 2.0, 1.0, *[5.0] * 30])
    seen = []

    def fit(until_plateau: bool) -> tuple[Tensor, tuple[dict[str, float], ...]]:
        modules = nn.ModuleDict({"net": nn.Linear(2, 1)})

        def look() -> dict[str, float]:
            seen.append(modules["net"].weight.detach().clone())
            return {"validation_loss": next(looks)}

        def loss_of(*_: object) -> Tensor:
            return modules["net"](torch.ones(1, 2)).square().sum()

        def stream(wanted: range) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
            return ((step, np.arange(1), np.zeros(1)) for step in wanted)

        curve = train.optimise(modules, 1e-2, 100, stream, loss_of, look, job(), "a fit", plateaued if until_plateau else train.never)
        return modules["net"].weight.detach(), curve

    weight, curve = fit(until_plateau=True)
    assert torch.equal(weight, seen[2])
    assert not torch.equal(weight, seen[-1])
    assert curve[-1]["step"] < 100, "no step is taken past the plateau"


def test_steps_follow_the_number_of_items() -> None:
    assert [train.default_steps(count, 256) for count in (4, 60, 5000, 10**6)] == [300, 300, 1953, 3000]
    assert all(a <= b for a, b in itertools.pairwise(train.default_steps(count, 256) for count in range(600, 20000, 500)))


# learning


def _encoder(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network(Encoder(16, 8)).eval()


def test_contrastive_training_raises_retrieval_and_is_the_same_twice(items: Items, job: Make) -> None:
    split = pa.array(["validation" if item % 2 else "train" for item in range(len(items))])  # enough held-out items to tell
    items = replace(items, table=items.table.set_column(items.table.column_names.index("split"), "split", split))
    settings, ids = Embed(batch_size=16), items.ids("train")
    network = _encoder()
    before = train.retrieval(network, items, PREPROCESS, POLICY, job("look"))
    curve = train.learn(network, items, ids, PREPROCESS, POLICY, None, 120, settings, job("train"))
    after = train.retrieval(network, items, PREPROCESS, POLICY, job("look"))
    assert after > before
    assert curve[-1]["validation_loss"] < curve[0]["validation_loss"]
    assert curve[-1]["effective_rank"] > 1
    assert not network.training
    one, two = _encoder(), _encoder()
    for net, name in ((one, "one"), (two, "two")):
        train.learn(net, items, ids, PREPROCESS, POLICY, None, 4, settings, _job(job, name))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


@pytest.mark.parametrize("stop", [3, 17, 29])
def test_live_dials_are_resumed_with_the_weights(stop: int, items: Items, job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between any two steps: weights, dials, curve and everything drawn after it are the same bits."""
    policy = Policy(families=DEFAULTS, clusters=(DEFAULTS, DEFAULTS, DEFAULTS))
    settings, ids, clusters = Embed(batch_size=16), items.ids("train"), np.arange(len(items)) // 20

    def fit(name: str) -> tuple[dict[str, Tensor], tuple[dict[str, float], ...]]:
        network = _encoder()
        curve = train.learn(network, items, ids, PREPROCESS, policy, clusters, 30, settings, _job(job, name))
        return network.state_dict(), curve

    whole, curve = fit("whole")
    moved = {key: value for key, value in curve[-1].items() if key.startswith(("strength[", "frequency["))}
    assert any(value != curve[0][key] for key, value in moved.items() if key in curve[0]), "this training moves no dial"
    assert {"strength[geometry, cluster 0]", "frequency[colour, cluster 2]"} <= moved.keys()
    streamer = train._streamer

    def broken(*given: object) -> Callable[[range], Iterator[tuple[int, np.ndarray, np.ndarray]]]:
        def stream(wanted: range) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
            for step, batch, images in streamer(*given)(wanted):  # type: ignore[arg-type]
                if step == stop:
                    raise Stopped
                yield step, batch, images

        return stream

    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(train, "_streamer", broken)
    with pytest.raises(Stopped):
        fit("broken")
    monkeypatch.setattr(train, "_streamer", streamer)
    assert _job(job, "broken").recall("nt-xent-training.pt")["step"] == stop
    resumed, again = fit("broken")
    assert again == curve
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_pinned_dials_leave_the_policy_alone(items: Items, job: Make) -> None:
    pinned = tuple({"pinned": name, "value": 0.5} for name in ("strength", "frequency"))
    settings, ids = Embed(batch_size=16), items.ids("train")
    curves = [
        train.learn(
            _encoder(), items, ids, PREPROCESS, Policy(families=DEFAULTS, evidence=evidence), None, 10, settings, _job(job, str(place))
        )
        for place, evidence in enumerate((pinned, ()))
    ]
    assert set(curves[0][-1]) == {"step", "loss", "validation_loss", "effective_rank", "spread"}
    assert set(curves[1][-1]) > {"strength", "frequency", "gap", "retrieval", "strength[geometry]", "frequency[colour]"}
    assert curves[0][0]["validation_loss"] == curves[1][0]["validation_loss"], "held-out views are those of the policy as given"


def _job(job: Make, name: str) -> Job:
    """A job of the stage "train" in a folder of its own: the draws depend on the stage's name, the checkpoints lie in the folder."""
    made = job(name)
    return Job("train", made.folder, quiet=True)


def test_a_refitted_head_puts_items_in_their_clusters_again() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 30)
    old = Head(
        mean=np.zeros(8, np.float32), projection=np.eye(8, 3, dtype=np.float32), centroids=np.zeros((3, 3), np.float32), temperature=1.0
    )
    embeddings = (5 * np.eye(8)[labels * 2] + 0.3 * rng.normal(size=(90, 8))).astype(np.float32)
    head = refit_head(embeddings, labels, old)
    assert head.centroids.shape[0] == 3
    assert np.array_equal(head_probabilities(embeddings, head).argmax(1), labels)
    again = refit_head(embeddings, labels, old)
    assert np.array_equal(head.centroids, again.centroids)


def test_held_out_items_are_validation_items_and_always_the_same(items: Items, job: Make, tmp_path: Path) -> None:
    held = train.held_out(items, job("a"))
    assert set(held.tolist()) <= set(items.ids("validation").tolist())
    assert np.array_equal(held, train.held_out(items, Job("a", tmp_path / "elsewhere", quiet=True)))
