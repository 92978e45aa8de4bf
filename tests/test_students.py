"""The encoder that attar builds itself: its sizes, its reach, and that width and side are what they say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attar.models.network import count_macs, count_parameters
from attar.models.students import Block, Encoder, input_side


@pytest.mark.parametrize("side", [16, 24, 32, 40, 48, 64])
def test_the_last_map_is_small_and_the_channels_double_to_it(side: int) -> None:
    encoder = Encoder(side, 8).eval()
    maps = []
    hook = encoder.stages.register_forward_hook(lambda _m, _i, out: maps.append(out.shape))
    with torch.no_grad():
        embedding = encoder(torch.zeros(2, 3, side, side))
    hook.remove()
    assert embedding.shape == (2, encoder.dim)
    assert maps[0][1] == encoder.dim
    assert maps[0][2] <= 8


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([16, 32, 64]), st.integers(4, 24))
def test_dim_is_a_power_of_two_times_the_width(side: int, width: int) -> None:
    encoder = Encoder(side, width)
    assert encoder.dim in {width, 2 * width, 4 * width, 8 * width}
    assert encoder.stem[0].out_channels == width


def test_one_seed_gives_one_encoder_and_another_another() -> None:
    def made(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return Encoder(32, 8).eval()(torch.full((1, 3, 32, 32), 0.3))

    assert torch.equal(made(0), made(0))
    assert not torch.equal(made(0), made(1))


def test_every_input_pixel_reaches_the_embedding() -> None:
    encoder = Encoder(32, 4).eval()
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    encoder(image).square().sum().backward()
    assert image.grad is not None
    assert bool((image.grad.abs().sum(1) > 0).all())


def test_wider_costs_more() -> None:
    narrow, wide = Encoder(32, 8), Encoder(32, 16)
    example = torch.zeros(1, 3, 32, 32)
    assert count_macs(narrow.eval(), example) < count_macs(wide.eval(), example)
    assert count_parameters(narrow) < count_parameters(wide)


def test_a_block_of_one_shape_starts_as_its_input_when_its_branch_is_silent() -> None:
    block = Block(4, 4, 1).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 4, 6, 6)
    assert torch.equal(block(x), x)
    assert Block(4, 8, 2).eval()(x).shape == (2, 8, 3, 3)


@given(st.integers(1, 5000))
def test_input_side_is_a_multiple_of_eight_within_its_bounds_and_never_upsamples_more_than_it_must(short: int) -> None:
    side = input_side(short)
    assert side % 8 == 0
    assert 16 <= side <= 64
    assert side >= min(short, 64)
    assert side < short + 8 or side == 16
    assert input_side(short + 1) >= side
