"""Distillation: it brings a student nearer to its teacher, the same way each time, and learns norms only where there are some."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import images, made
from torch import nn

from attar.config import Compress
from attar.errors import ModelError
from attar.models.network import Network
from attar.stages.augment.mix import mix
from attar.stages.compress import distil as stage
from attar.stages.compress import feed
from attar.stages.compress.distil import distil, live_norms
from attar.stages.compress.feed import TensorFeed, erased
from attar.stages.compress.mimicry import Taps, comparable, feature_distance
from attar.workspace import Job

SETTINGS = Compress(distil_batch=32)


@pytest.fixture
def job(tmp_path) -> Callable[[str], Job]:
    return lambda name: Job("compress", tmp_path / name, quiet=True)


def _feed(job: Job) -> TensorFeed:
    split = np.array(["train"] * 96 + ["validation"] * 32)
    return TensorFeed(images(128), split, np.zeros(128, np.int64), job)


def _student(teacher: Network, noise: float = 0.1) -> Network:
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * parameter.abs().mean())
    return student


class Staged(nn.Module):
    """Three stages of blocks."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        block = lambda a, b, stride: nn.Sequential(nn.Conv2d(a, inner, 3, stride, 1), nn.ReLU(), nn.Conv2d(inner, b, 1))  # noqa: E731
        self.one, self.two = nn.Sequential(block(3, 4, 1), block(4, 4, 1)), nn.Sequential(block(4, 6, 2))
        self.three = nn.Sequential(block(6, 8, 2), block(8, 8, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.three(self.two(self.one(x))).mean((2, 3))


@pytest.mark.parametrize("kind", ["residual", "transformer"])
def test_distillation_lowers_the_distance_and_is_bit_equal_when_repeated(kind: str, job) -> None:
    teacher = made(kind)
    runs = []
    for name in ("one", "two"):
        student = _student(teacher)
        curve = distil(student, teacher, _feed(job(name)), 30, SETTINGS, job(name), "distilling")
        assert not any(module.training for module in student.modules())
        runs.append((curve, student.state_dict()))
    (curve, state), (again, other) = runs
    assert curve[-1]["validation_loss"] < 0.8 * curve[0]["validation_loss"]
    assert curve == again
    assert all(torch.equal(a, b) for a, b in zip(state.values(), other.values()))


def test_norms_learn_their_statistics_where_they_have_any_and_batches_are_large_enough(job) -> None:
    teacher = made("residual")
    assert len(live_norms(teacher, 32)) == 3
    assert live_norms(teacher, 8) == []
    folded = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert live_norms(folded, 32) == []
    assert live_norms(made("transformer"), 32) == []
    student = _student(teacher)
    before = student.body.bn.running_mean.clone()
    distil(student, teacher, _feed(job("one")), 60, SETTINGS, job("one"), "distilling")
    assert not torch.equal(student.body.bn.running_mean, before)


def test_the_rate_falls_with_how_little_of_the_teacher_is_missed(job, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, rates = made("residual"), []
    monkeypatch.setattr(stage, "optimise", lambda _, rate, *rest, **more: rates.append(rate) or ())
    strange = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in strange.parameters():
            parameter.zero_()
    for student in (copy.deepcopy(teacher), _student(teacher, 0.01), strange):
        distil(student, teacher, _feed(job("one")), 400, SETTINGS, job("one"), "distilling")
    assert rates[0] == stage.LIVE_RATE * stage.LEAST_RATE < rates[1] < rates[2] == stage.LIVE_RATE


@pytest.mark.parametrize("room", [1 << 29, 20_000])
def test_the_teacher_is_asked_about_every_view_once(room: int, job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no room for all its answers it is asked again, and the student learns the same."""
    teacher, states = made("residual"), []
    monkeypatch.setattr(stage, "comparable", lambda *_: [])
    for kept in (1 << 29, room):
        monkeypatch.setattr(stage, "KEPT_BYTES", kept)
        student, asked = _student(teacher), []
        hook = teacher.register_forward_pre_hook(lambda _, given, asked=asked: asked.append(given[0]))
        distil(student, teacher, _feed(job(str(len(states)))), 30, SETTINGS, job(str(len(states))), "distilling")
        hook.remove()
        states.append((len(asked), student.state_dict()))
    (once, first), (times, second) = states
    assert once == 1 + 30 / stage.LAPS  # the held-out items, and a lap
    assert (times > once) == (room < 1 << 29)
    assert all(torch.equal(a, b) for a, b in zip(first.values(), second.values()))


def test_the_last_map_is_a_target_to_the_end_where_there_is_room_for_all_of_it(job, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, compared = Network(Staged(6)), {}
    for room in (1 << 29, 100_000):
        monkeypatch.setattr(stage, "KEPT_BYTES", room)
        seen: list[int] = []
        monkeypatch.setattr(stage, "feature_distance", lambda a, b, seen=seen: seen.append(len(a)) or feature_distance(a, b))
        distil(_student(teacher), teacher, _feed(job(str(room))), 30, SETTINGS, job(str(room)), "distilling")
        compared[room] = seen
    assert compared[1 << 29] == [3, 1] * 10 + [1] * 20
    assert compared[100_000] == [3] * 10


@pytest.mark.parametrize("steps", [30, 90])
def test_squares_are_erased_where_items_are_seen_often(steps: int, job, monkeypatch: pytest.MonkeyPatch) -> None:
    """96 items in batches of 32: three steps a look."""
    teacher, called = made("residual"), []
    monkeypatch.setattr(stage, "ERASED_FROM", 25)
    monkeypatch.setattr(stage, "erased", lambda views, rng: called.append(0) or erased(views, rng))
    distil(_student(teacher), teacher, _feed(job("one")), steps, SETTINGS, job("one"), "distilling")
    assert len(called) == (90 if steps == 90 else 0)


def test_a_batch_in_pieces_gives_the_gradient_of_the_whole(job, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, gradients, shown = made("transformer"), [], []

    def once(modules: nn.ModuleDict, rate: float, steps: int, stream, loss_of, *rest: object, **more: object) -> tuple[()]:
        _, ids, views = next(iter(stream(range(1))))
        hook = modules["student"].register_forward_pre_hook(lambda _, given: shown.append(len(given[0])))
        loss_of(0, ids, views).backward()
        hook.remove()
        gradients.append(torch.cat([p.grad.flatten() for p in modules.parameters() if p.grad is not None]))
        return ()

    monkeypatch.setattr(stage, "optimise", once)
    for numbers in (feed.PIECE, 11 * 3 * 32 * 32):
        monkeypatch.setattr(feed, "PIECE", numbers)
        distil(_student(teacher), teacher, _feed(job(str(numbers))), 30, SETTINGS, job(str(numbers)), "distilling")
    whole, summed = gradients
    assert shown == [32, 11, 11, 10]
    assert float((whole - summed).norm()) < 0.1 * float(whole.norm()), "but for the scales of the parts, which are those of a piece"


def test_norms_are_given_enough_items_to_learn_from(job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "PIECE", 1)
    given = _feed(job("one"))
    assert stage.piece_of(given, 32, []) == 1
    assert stage.piece_of(given, 32, live_norms(made("residual"), 32)) == stage.LEAST_BATCH


def test_settled_norms_leave_the_function_and_make_training_mode_agree_with_it() -> None:
    """Whatever statistics a cut was repaired for, training begins from what it computes."""
    network, inputs = made("residual"), images(64, seed=3)
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    with torch.no_grad():
        for place, norm in enumerate(norms):  # as after a repair: statistics that are not those of the inputs
            norm.running_mean += 0.5 + place
            norm.running_var *= 3.0
        before = network(inputs)[1]
        apart = float((network.train()(inputs)[1] - before).abs().max())
        network.eval()
        stage.settle(network, norms, inputs.split(32))
        after = network(inputs)[1]
        close = float((network.train()(inputs)[1] - after).abs().max())
    assert torch.allclose(before, after, atol=1e-4 * float(before.abs().max()))
    assert close < 0.02 * apart


def test_norms_learn_nothing_from_mixtures(job, monkeypatch: pytest.MonkeyPatch) -> None:
    """What every item looks like when mixed is not what the student will see."""
    teacher, kept = made("residual"), {}
    monkeypatch.setattr(stage, "MIXED_FROM", 0)
    monkeypatch.setattr(stage, "settle", lambda *_: None)
    monkeypatch.setattr(stage, "FULL_RATE_FROM", 40)  # so fast that the student is still getting better in the second half
    monkeypatch.setattr(stage, "mix", lambda views, rng: 0.5 * views + 0.5 * views.flip(0))
    for until in (0.5, 1.0):
        monkeypatch.setattr(stage, "MIXED_UNTIL", until)
        student = _student(teacher)
        before = student.body.bn.running_mean.clone()
        distil(student, teacher, _feed(job(str(until))), 40, SETTINGS, job(str(until)), "distilling")
        kept[until] = torch.equal(student.body.bn.running_mean, before)
        assert student.body.bn.momentum == 0.1
    assert kept == {0.5: False, 1.0: True}


def test_a_student_that_gives_no_numbers_is_named(job) -> None:
    teacher, student = made("residual"), made("residual")
    with torch.no_grad():
        student.body.conv.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="distilling: the loss is nan at step 0"):
        distil(student, teacher, _feed(job("one")), 5, SETTINGS, job("one"), "distilling")


# mimicry


def test_maps_are_compared_where_stages_end_and_nowhere_between_architectures() -> None:
    wide, narrow = Network(Staged(6)), Network(Staged(2))
    assert comparable(narrow, wide, images(2)) == ["body.one", "body.two", "body.three"]
    assert comparable(made("transformer"), wide, images(2)) == []
    assert comparable(narrow, Network(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))), images(2)) == []


def test_feature_distance_is_a_share_of_the_teachers_variance() -> None:
    a, b = torch.randn(50, 4, 6, 6), torch.randn(50, 7, 3)
    assert float(feature_distance([a, b], [a, b])) == 0
    assert float(feature_distance([a + 1, 3 * b], [a, 3 * b])) == pytest.approx(0.5 / float(a.var()), rel=1e-4)


def test_taps_hold_the_last_pass_and_leave_nothing_behind() -> None:
    network = made("inverted")
    taps = Taps(network, ["body.up"])
    with torch.no_grad():
        network(images(3))
    assert taps.maps["body.up"].shape == (3, 32, 16, 16)
    taps.close()
    assert not network.body.up._forward_hooks


# mixing


@given(st.integers(0, 300))
@settings(deadline=None, max_examples=60)
def test_every_value_of_a_mixture_lies_between_those_it_was_made_of(seed: int) -> None:
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    made_of, again = (mix(x, np.random.default_rng(seed)) for _ in range(2))
    assert torch.equal(made_of, again)
    assert (made_of >= x.amin(0) - 1e-6).all()
    assert (made_of <= x.amax(0) + 1e-6).all()
    other = x[torch.from_numpy(_permutation(seed, len(x)))]
    changed = made_of != x
    weight = ((made_of - x) / (other - x))[changed & (other != x)]
    blended = torch.allclose(weight, weight.mean(), atol=1e-2) if len(weight) else True  # one share for all, or whole pixels of the other
    assert blended or torch.equal(made_of[changed], other[changed])


def _permutation(seed: int, count: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rng.random()
    return rng.permutation(count)


def test_half_of_the_batches_stay_and_both_ways_of_mixing_occur() -> None:
    x = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 10, 10).contiguous()
    kinds = {"plain": 0, "blended": 0, "boxed": 0}
    for seed in range(400):
        y = mix(x, np.random.default_rng(seed))
        kinds["plain" if torch.equal(x, y) else "boxed" if torch.equal(y, y.round()) else "blended"] += 1
    assert 150 < kinds["plain"] < 280
    assert kinds["blended"] > 50
    assert kinds["boxed"] > 50


def test_tables_are_blended_and_tokens_left_alone() -> None:
    seeds = range(20)
    rows, tokens = torch.rand(5, 7), torch.arange(15).reshape(5, 3)
    assert any(not torch.equal(mix(rows, np.random.default_rng(seed)), rows) for seed in seeds)
    assert all(torch.equal(mix(tokens, np.random.default_rng(seed)), tokens) for seed in seeds)
