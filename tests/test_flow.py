"""Following channels: factors of axes against indices that are carried along, what fixes them, and that watching leaves no trace."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Joint, images, made
from torch import Tensor, nn

from attar.stages.compress.flow import Factors, Watch, follow, undone

CHANNELS = 24


def _steps(data: st.DataObject, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Random views, permutations, slices and expansions that a tensor of this shape can take."""
    steps: list[tuple[str, tuple[int, ...]]] = []
    for _ in range(data.draw(st.integers(1, 6), label="steps")):
        kind = data.draw(st.sampled_from(["split", "merge", "permute", "half", "repeat"]))
        axis = data.draw(st.integers(0, len(shape) - 1))
        if kind == "split":
            part = data.draw(st.sampled_from([n for n in range(1, shape[axis] + 1) if shape[axis] % n == 0]))
            shape = (*shape[:axis], part, shape[axis] // part, *shape[axis + 1 :])
            steps.append(("view", shape))
        elif kind == "merge" and axis + 1 < len(shape):
            shape = (*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :])
            steps.append(("view", shape))
        elif kind == "permute":
            order = tuple(data.draw(st.permutations(range(len(shape)))))
            shape = tuple(shape[place] for place in order)
            steps.append(("permute", order))
        elif kind == "half" and shape[axis] % 2 == 0:
            shape = (*shape[:axis], shape[axis] // 2, *shape[axis + 1 :])
            steps.append(("half", (axis, data.draw(st.integers(0, 1)))))
        elif kind == "repeat" and math.prod(shape) < 1000:
            shape = (*shape[:axis], 2 * shape[axis], *shape[axis + 1 :])
            steps.append(("repeat", (axis,)))
    return steps


def _taken(x: Tensor, steps: list[tuple[str, tuple[int, ...]]]) -> Tensor:
    for kind, how in steps:
        if kind == "view":
            x = x.reshape(how)
        elif kind == "permute":
            x = x.permute(how)
        elif kind == "half":
            x = x.chunk(2, how[0])[how[1]]
        else:
            x = x.repeat([2 if place == how[0] else 1 for place in range(x.dim())])
    return x


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_free_factor_says_where_each_channel_has_gone(data: st.DataObject) -> None:
    """Reference: every entry carries the number of its channel through the same steps."""
    layer, x = nn.Linear(3, CHANNELS), torch.randn(1, 5, 3)
    steps = _steps(data, (1, 5, CHANNELS))
    with torch.no_grad(), Watch(layer) as watch:
        found = _taken(layer(x), steps)
    factors, flat = watch.factors, watch.factors.flat
    labels = _taken(torch.arange(CHANNELS).expand(1, 5, CHANNELS), steps)
    own = flat(watch.of(layer.weight)[0])
    digits = dict(zip(own, torch.unravel_index(labels, [factors.size[factor] for factor in own])))
    seen = []
    for axis, (size, axis_factors) in enumerate(zip(found.shape, watch.of(found))):
        inside = flat(axis_factors)
        places = torch.unravel_index(torch.arange(size), [factors.size[factor] for factor in inside]) if inside else ()
        for factor, place in zip(inside, places):
            if factor in digits and factor not in factors.fixed:
                along = place.reshape([-1 if other == axis else 1 for other in range(found.dim())])
                assert torch.equal(digits[factor], along.expand_as(labels))
                seen.append(factor)
    assert {factor for factor in own if factor not in factors.fixed} <= {*seen}


@given(st.lists(st.integers(2, 6), min_size=1, max_size=4), st.lists(st.integers(2, 6), min_size=1, max_size=4))
def test_axes_of_one_length_become_the_same_or_are_fixed(one: list[int], two: list[int]) -> None:
    factors = Factors()
    left = tuple(factor for size in one for factor in factors.fresh(size))
    right = factors.fresh(math.prod(one))
    factors.unify(left, right)
    assert factors.flat(left) == factors.flat(right)
    assert [factors.size[factor] for factor in factors.flat(left)] == one
    other = tuple(factor for size in two for factor in factors.fresh(size))
    factors.unify(left, other)  # lengths may differ: then all that does not fit is fixed
    same = factors.flat(left) == factors.flat(other)
    assert same or any(factor in factors.fixed for factor in factors.flat(left) + factors.flat(other))


class Between(nn.Module):
    def __init__(self, step: object) -> None:
        super().__init__()
        self.one, self.two, self.step = nn.Linear(3, 8), nn.Linear(8, 4), step

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.step(self.one(x)))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (F.gelu, None),
        (lambda x: x * x.sigmoid() + 1, None),
        (lambda x: x.clone().mul_(2), None),
        (lambda x: torch.cat([x[:, :1], x], 1), None),
        (lambda x: F.pad(x, (0, 0, 1, 1)), None),
        (lambda x: x.flip(1).roll(2, 1), None),
        (lambda x: x.mean(1, keepdim=True) + x, None),
        (lambda x: torch.stack([x, x], 1).flatten(1, 2), None),
        (lambda x: F.layer_norm(x, (8,)), "layer norm over the channels"),
        (lambda x: x.softmax(-1), "softmax over the channels"),
        (lambda x: x / x.norm(dim=-1, keepdim=True), "mean or norm over the channels"),
        (lambda x: x.roll(1, -1), "shift over the channels"),
        (lambda x: x[..., [1, 0, 2, 3, 4, 5, 6, 7]], "channels are indexed"),
        (lambda x: x + x.flip(-1), "shift over the channels"),
        (lambda x: x[..., 1:].repeat(1, 1, 2)[..., :8], "channels are sliced"),
        (lambda x: x @ torch.ones(8, 8), "product of activations"),
        (lambda x: x.cumsum(-1), "cumsum"),
    ],
)
def test_what_fixes_channels(step: object, reason: str | None) -> None:
    flow = follow(Between(step), torch.randn(1, 5, 3))
    ((factor,),) = [axis for axis in flow.weights["one.weight"][:1]]
    assert flow.fixed.get(factor) == reason


def test_inputs_and_outputs_are_fixed_and_products_counted() -> None:
    flow = follow(Between(F.relu), torch.randn(4, 5, 3))
    assert {flow.fixed[factor] for factor in flow.weights["two.weight"][0]} == {"the embedding and the classes keep their number"}
    assert {flow.fixed[factor] for factor in flow.weights["one.weight"][1]} == {"the input"}
    assert [macs for macs, _ in flow.products] == [5 * 3 * 8, 5 * 8 * 4]
    assert all(flow.weights["one.weight"][0][0] in factors for _, factors in flow.products)
    assert flow.shapes == {"one": (1, 5, 8), "two": (1, 5, 4)}


def test_layers_whose_constants_one_value_per_channel_could_replace() -> None:
    spread = follow(made("residual"), images(1)).spread
    assert set(spread) == {"body.a2", "body.short", "body.b2"}  # the others are read by convolutions
    assert (spread["body.short"], spread["body.b2"]) == ({"body.b2"}, {"body.short"})


class Remembers(nn.Module):
    """Keeps what it computed in evaluation mode, as models do with tables of biases."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.table, self.kept, self.calls = nn.Linear(3, 4), nn.Parameter(torch.ones(4)), {}, 0

    def train(self, mode: bool = True) -> Remembers:
        self.kept = {} if mode else self.kept
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if "table" not in self.kept:
            self.kept["table"] = 2 * self.table
        return self.layer(x) + self.kept["table"]


def test_watching_leaves_no_trace_and_sees_through_what_was_kept() -> None:
    module = Remembers().eval()
    module(torch.ones(1, 3))
    flow = follow(module, torch.ones(1, 3))
    assert "table" in flow.weights  # not hidden by the first pass
    assert (module.kept, module.calls) == ({}, 1)
    assert not module._forward_hooks


def test_changes_are_undone() -> None:
    module = Joint().eval()
    before = {name: id(parameter) for name, parameter in module.named_parameters()}
    with undone(module):
        module.heads, module.extra, module.norm = 1, 2, nn.Identity()
        module.proj.weight = nn.Parameter(torch.zeros(2, 2))
        module.register_forward_pre_hook(lambda *_: None)
    assert {name: id(parameter) for name, parameter in module.named_parameters()} == before
    assert (module.heads, hasattr(module, "extra"), len(module._forward_pre_hooks)) == (4, False, 0)
