"""modalities.resample and stages.encode: the pixels a model sees, and vectors computed side by side."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from attar.modalities.image import Loader
from attar.modalities.resample import KERNELS, taps, window
from attar.models.frozen import Frozen
from attar.models.network import Network
from attar.records import Items, Preprocess
from attar.stages import encode
from attar.stages.augment.engine import normalise
from attar.stages.encode import as_input, batch_size

PREPROCESS = Preprocess(size=(16, 20), resize_shortest=20, mean=(0.2, 0.5, 0.6), std=(0.3, 0.2, 0.1))


class Keeping(nn.Module):
    """Keeps something between its layers on itself, as some people's models do: two calls at once would mix."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.top = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.conv(x).relu()
        torch.rand(200, 200).sort()  # time for another thread
        return self.top(self.kept.mean((2, 3)))


def network() -> Network:
    torch.manual_seed(0)
    return Network(Keeping().eval(), "top").eval()


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("size", [(40, 30), (31, 47), (256, 20), (7, 5)])
@pytest.mark.parametrize("scaled", [(13, 11), (41, 60), (30, 40)])
def test_a_window_is_part_of_what_pillow_makes(name: str, size: tuple[int, int], scaled: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    filter_ = Image.Resampling[name.upper()]
    whole = np.asarray(Image.fromarray(pixels).resize(scaled[::-1], filter_)).astype(int)
    assert np.abs(window(pixels, scaled, (0, 0, *scaled), name) - whole).max() <= 1
    assert np.abs(window(pixels, scaled, (2, 3, 8, 5), name) - whole[2:10, 3:8]).max() <= 1
    length = size[0] - 0.5, size[1] - 0.25
    boxed = Image.fromarray(pixels).resize(scaled[::-1], filter_, box=(0, 0, length[1], length[0]))
    assert np.abs(window(pixels, scaled, (0, 0, *scaled), name, length) - np.asarray(boxed).astype(int)).max() <= 1


@pytest.mark.parametrize("name", KERNELS)
def test_weights_sum_to_one_within_the_line(name: str) -> None:
    for given, scaled in ((100, 7), (7, 100), (10, 10), (1, 5)):
        first, weights = taps(name, given, float(given), scaled, 0, scaled)
        np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
        assert (weights >= 0).all()
        assert (first >= 0).all()
        assert ((first[:, None] + np.arange(weights.shape[1]) < given) | (weights == 0)).all()


def test_inputs_are_normalised_pixels() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), np.uint8)
    expected = normalise(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, PREPROCESS.mean, PREPROCESS.std)
    found = as_input(images, PREPROCESS)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("threads", [1, 3, 20])
def test_vectors_are_the_models_in_the_order_asked_on_any_number_of_threads(
    items: Items, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, before, told = network(), items.ids()[::-1], torch.get_num_threads(), []
    monkeypatch.setattr(encode, "batch_size", lambda preprocess: 2)
    with Loader(items, PREPROCESS) as loader:
        with torch.no_grad():
            expected = torch.cat([model(as_input(loader.batch(ids[start : start + 2]), PREPROCESS))[0] for start in range(0, len(ids), 2)])
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        try:
            found = encode.encode(model, PREPROCESS, loader, ids, told.append)
        finally:
            monkeypatch.undo()
            torch.set_num_threads(before)
    assert found.dtype == np.float16
    assert sum(told) == len(ids)
    np.testing.assert_allclose(found, expected.half().numpy(), atol=1e-3)


def test_streams_share_weights_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    before, model = torch.get_num_threads(), network()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with encode.streams(model) as (_, networks):
        first, second = networks
        assert first is model
        assert all(a is b for a, b in zip(first.parameters(), second.parameters()))
        assert not {id(one) for one in first.modules()} & {id(one) for one in second.modules()}
    monkeypatch.undo()
    torch.set_num_threads(before)


def test_a_compiled_network_gives_the_same_vectors_on_any_number_of_threads(items: Items, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, before = network(), items.ids(), torch.get_num_threads()
    with Loader(items, PREPROCESS) as loader:
        expected = encode.encode(model, PREPROCESS, loader, ids, lambda count: None)
        found = []
        for threads in (1, 3, 20):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            made = encode.compiled(model, PREPROCESS, encode.WORTH)
            assert isinstance(made, Frozen)
            found.append(encode.encode(made, PREPROCESS, loader, ids, lambda count: None))
            monkeypatch.undo()
            torch.set_num_threads(before)
    np.testing.assert_allclose(found[0], expected, atol=1e-3)
    assert (found[0] == found[1]).all()
    np.testing.assert_allclose(found[2], expected, atol=1e-3)


class Deciding(nn.Module):
    """Does in Python what the values ask for."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2) if float(x.abs().sum()) == 0 else x.flatten(2).amax(2)


class Foreign(nn.Module):
    """Leaves torch."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.sort(x.numpy().reshape(len(x), -1))[:, :4].copy())


@pytest.mark.parametrize("body", [Deciding(), Foreign()])
def test_what_cannot_be_compiled_stays_as_it_is(body: nn.Module) -> None:
    body.weight = nn.Parameter(torch.ones(1))
    model = Network(body)
    assert encode.compiled(model, PREPROCESS, 10**6) is model


def test_few_items_and_large_or_frozen_models_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    assert encode.compiled(model, PREPROCESS, encode.WORTH - 1) is model
    monkeypatch.setattr(encode, "LARGE", 5)
    assert encode.compiled(model, PREPROCESS, encode.WORTH) is model
    monkeypatch.undo()
    frozen = encode.compiled(model, PREPROCESS, encode.WORTH)
    assert isinstance(frozen, Frozen)
    assert encode.compiled(frozen, PREPROCESS, encode.WORTH) is frozen


def test_what_fails_reaches_the_caller(items: Items) -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no such input")

    with Loader(items, PREPROCESS) as loader, pytest.raises(ValueError, match="no such input"):
        encode.encode(Network(Failing()), PREPROCESS, loader, items.ids(), lambda count: None)


def test_a_batch_is_bounded_by_its_pixels() -> None:
    sizes = [batch_size(Preprocess(size=(side, side))) for side in (8, 32, 64, 224, 1024)]
    assert sizes == sorted(sizes, reverse=True)
    assert min(sizes) == 2
    assert not doctest.testmod(encode).failed
