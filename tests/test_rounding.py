"""Rounding: on the grid, within the bounds that keep pairs from saturating, nearer in output than plain rounding, and true to what was seen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attar.stages.compress import rounding
from attar.stages.compress.rounding import LARGEST, PAIR, Moments, partners, refit, round_weights, scales, solve


def case(seed: int, outputs: int = 6, channels: int = 12, area: int = 1, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Weights with a bias column (groups, outputs, inputs + 1), and rows of correlated inputs with the constant last (groups, rows, inputs + 1)."""
    generator = torch.Generator().manual_seed(seed)
    inputs = channels * area
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    rows = torch.randn(groups, 400, inputs, generator=generator, dtype=torch.float64) @ mix + 0.5
    rows = torch.cat([rows, torch.ones(groups, 400, 1, dtype=torch.float64)], 2)
    return torch.randn(groups, outputs, inputs + 1, generator=generator, dtype=torch.float64), rows


def moments(rows: Tensor, targets: Tensor) -> Moments:
    return Moments(rows.mT @ rows, targets.mT @ rows, rows.shape[1])


def plainly(weight: Tensor, scale: Tensor) -> Tensor:
    return torch.cat([(weight[:, :, :-1] / scale[:, :, None]).round() * scale[:, :, None], weight[:, :, -1:]], 2)


def error(weight: Tensor, targets: Tensor, rows: Tensor) -> float:
    return float((rows @ weight.mT - targets).square().mean())


def rounded(weight: Tensor, rows: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """Real weights after rounding against their own outputs, and the step per output."""
    _, gram = refit(weight, moments(rows, rows @ weight.mT), 0.01)
    made = round_weights(weight, gram, scales(weight[:, :, :-1], pairs), pairs)
    return torch.cat([made.whole * made.scale[:, :, None], made.rest], 2), made.whole


def worst_pair(whole: Tensor, pairs: Tensor) -> float:
    """Largest magnitude of what two neighbours of one sign add up to, by trying every pair."""
    worst = 0.0
    for layout in pairs.tolist():
        for first, second in enumerate(layout):
            if second >= 0:
                one, other = whole[:, :, first], whole[:, :, second]
                worst = max(
                    worst, float((one.clamp_min(0) + other.clamp_min(0)).max()), float(-(one.clamp_max(0) + other.clamp_max(0)).min())
                )
    return worst


def test_partners_are_the_neighbours_in_the_order_of_the_kernels() -> None:
    """Against a walk over the memory of both layouts."""
    for channels, area in [(3, 1), (3, 9), (4, 9), (5, 4), (1, 6)]:
        run = [(channel, place) for place in range(area) for channel in range(channels)]
        padded = [(channel, place) for place in range(area) for channel in range(-(-channels // 4) * 4)]
        expected = []
        for memory in (run, padded):
            beside = [-1] * (channels * area)
            for at, (channel, place) in enumerate(memory):
                other = at ^ 1
                if channel < channels and other < len(memory) and memory[other][0] < channels:
                    beside[channel * area + place] = memory[other][0] * area + memory[other][1]
            expected.append(beside)
        found = partners(channels, area).tolist()
        assert found == expected if len(found) == 2 else [found[0], found[0]] == expected, (channels, area)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(12, 1), (5, 1), (3, 9), (4, 4)]))
def test_no_weight_and_no_pair_exceeds_its_bound(seed: int, size: tuple[int, int]) -> None:
    weight, rows = case(seed, channels=size[0], area=size[1])
    pairs = partners(*size)
    _, whole = rounded(weight, rows, pairs)
    assert torch.equal(whole, whole.round())
    assert float(whole.abs().max()) <= LARGEST
    assert worst_pair(whole, pairs) <= PAIR


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_the_step_is_the_finest_that_keeps_the_bounds(seed: int) -> None:
    weight, _ = case(seed)
    pairs = partners(12, 1)
    step = scales(weight[:, :, :-1], pairs)
    finer = weight[:, :, :-1] / (0.999 * step[:, :, None])
    for output in range(weight.shape[1]):
        one = finer[:, output : output + 1]
        assert max(float(one.abs().max()) / LARGEST, worst_pair(one, pairs) / PAIR) > 1


def test_outputs_are_nearer_than_with_plain_rounding() -> None:
    pairs, ratios = partners(12, 1), []
    for seed in range(20):
        weight, rows = case(seed)
        targets, step = rows @ weight.mT, scales(weight[:, :, :-1], pairs)
        ratios.append(error(rounded(weight, rows, pairs)[0], targets, rows) / error(plainly(weight, step), targets, rows))
    assert sum(ratio < 1 for ratio in ratios) >= 18
    assert sum(ratios) / 20 < 0.7


def test_uncorrelated_inputs_leave_nothing_to_compensate() -> None:
    weight, _ = case(3)
    pairs = torch.full((1, 12), -1)
    step = scales(weight[:, :, :-1], pairs)
    made = round_weights(weight, torch.eye(13, dtype=torch.float64)[None], step, pairs)
    torch.testing.assert_close(torch.cat([made.whole * step[:, :, None], made.rest], 2), plainly(weight, step))


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, rows = case(7, channels=20)
    whole = rounded(weight, rows, partners(20, 1))[1]
    monkeypatch.setattr(rounding, "BLOCK", 3)
    assert torch.equal(rounded(weight, rows, partners(20, 1))[1], whole)


def test_groups_are_rounded_each_by_itself() -> None:
    weight, rows = case(5, channels=9, groups=4)
    pairs = torch.full((1, 9), -1)
    together = solve(weight, (moments(rows, rows @ weight.mT), moments(rows, rows @ weight.mT)), pairs)
    for group in range(4):
        own, part = weight[group : group + 1], rows[group : group + 1]
        alone = solve(own, (moments(part, part @ own.mT), moments(part, part @ own.mT)), pairs)
        # all groups share one order of inputs, so that integers may differ by the order alone: the outputs must be as near
        ours = torch.cat([together.whole * together.scale[:, :, None], together.rest], 2)[group : group + 1]
        theirs = torch.cat([alone.whole * alone.scale[:, :, None], alone.rest], 2)
        assert error(ours, part @ own.mT, part) < 3 * error(theirs, part @ own.mT, part)


def test_what_the_earlier_layers_shifted_is_put_right() -> None:
    """Inputs that come scaled, shifted and noisy: the solved weights undo it, the old ones cannot."""
    weight, rows = case(11)
    targets = rows @ weight.mT
    generator = torch.Generator().manual_seed(0)
    seen = torch.cat([rows[:, :, :-1] * 0.9 + 0.3, rows[:, :, -1:]], 2)
    seen[:, :, :-1] += 0.01 * torch.randn(seen[:, :, :-1].shape, generator=generator, dtype=torch.float64)
    halves = moments(seen[:, ::2], targets[:, ::2]), moments(seen[:, 1::2], targets[:, 1::2])
    made = solve(weight, halves, partners(12, 1))
    solved = torch.cat([made.whole * made.scale[:, :, None], made.rest], 2)
    assert error(solved, targets, seen) < 0.02 * error(weight, targets, seen)


def test_few_rows_hold_the_weights_back() -> None:
    """With fewer rows than inputs, a fit to half of them is judged on the rest: the old weights, which are right here, are kept."""
    weight, rows = case(13, channels=40)
    targets = rows @ weight.mT + torch.randn(1, 400, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 20
    few, other = slice(0, 30), slice(30, 400)
    halves = moments(rows[:, few][:, ::2], targets[:, few][:, ::2]), moments(rows[:, few][:, 1::2], targets[:, few][:, 1::2])
    made = solve(weight, halves, partners(40, 1))
    solved = torch.cat([made.whole * made.scale[:, :, None], made.rest], 2)
    free, _ = refit(weight, moments(rows[:, few], targets[:, few]), 1e-6)
    exact = rows @ weight.mT
    assert error(solved, exact[:, other], rows[:, other]) < 0.5 * error(free, exact[:, other], rows[:, other])


def test_a_row_of_zeros_stays_zero() -> None:
    weight, rows = case(4)
    weight[:, 2] = 0
    assert float(rounded(weight, rows, partners(12, 1))[0][:, 2].abs().max()) < 1e-9


def test_the_same_moments_give_the_same_integers() -> None:
    weight, rows = case(9)
    halves = moments(rows[:, ::2], rows[:, ::2] @ weight.mT), moments(rows[:, 1::2], rows[:, 1::2] @ weight.mT)
    assert torch.equal(solve(weight, halves, partners(12, 1)).whole, solve(weight, halves, partners(12, 1)).whole)
