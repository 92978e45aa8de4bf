"""Texture and colour against slow loops, what they do not see, and that they export."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attar.models.descriptors import BINS, HALF_LEVEL, LUMA, RADII, Descriptors, circle, moments, uniform_bins

seeds = st.integers(0, 1000)


def _image(seed: int, side: int = 14) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side + 3, 3)).astype(np.float64) / 255


def _batch(*images: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()


def _slow_texture(image: np.ndarray, radius: int) -> list[float]:
    """The histogram of the 59 patterns, one pixel and one neighbour at a time."""
    grey = image @ np.array(LUMA)
    rows, columns = grey.shape
    codes = []
    for row in range(radius, rows - radius):
        for column in range(radius, columns - radius):
            code = 0
            for place in range(8):
                angle = 2 * math.pi * place / 8
                y, x = round(row - radius * math.sin(angle), 6), round(column + radius * math.cos(angle), 6)
                top, left = math.floor(y), math.floor(x)
                value = sum(
                    (1 - abs(y - r)) * (1 - abs(x - c)) * grey[min(r, rows - 1), min(c, columns - 1)]
                    for r in (top, top + 1)
                    for c in (left, left + 1)
                )
                code |= (value - grey[row, column] >= -HALF_LEVEL) << place
            codes.append(code)
    patterns = [code for code in range(256) if sum((code >> p & 1) != (code >> (p + 1) % 8 & 1) for p in range(8)) <= 2]
    counts = [sum(code == pattern for code in codes) for pattern in patterns]
    return [count / len(codes) for count in (*counts, len(codes) - sum(counts))]


@pytest.mark.parametrize("radius", RADII)
def test_texture_is_the_histogram_of_uniform_patterns(radius: int) -> None:
    images = [_image(0), np.round(_image(1) * 3) / 3]
    with torch.no_grad():
        grey = torch.einsum("nchw,c->nhw", _batch(*images), torch.tensor(LUMA)).unsqueeze(1)
        made = Descriptors().texture(grey, radius)
    for row, image in zip(made.numpy(), images):
        assert np.abs(row**2 - _slow_texture(image, radius)).max() <= 2.5 / 64  # a tie broken by rounding moves one pixel
        assert np.abs(row**2 - _slow_texture(image, radius)).sum() < 0.05


@given(seeds)
def test_colour_and_moments_are_their_loops(seed: int) -> None:
    image = _image(seed)
    with torch.no_grad():
        colour, found = Descriptors().colour(_batch(image))[0].numpy(), moments(_batch(image))[0].numpy()
    expected: list[float] = []
    for channel in range(3):
        histogram = [0.0] * BINS
        for value in image[..., channel].ravel():
            at = min(max(value * BINS - 0.5, 0.0), BINS - 1.0)
            low = min(int(at), BINS - 2)
            histogram[low] += 1 - (at - low)
            histogram[low + 1] += at - low
        expected += [math.sqrt(count / image[..., channel].size) for count in histogram]
    assert np.allclose(colour, expected, atol=1e-4)
    values = image.reshape(-1, 3)
    third = ((values - values.mean(0)) ** 3).mean(0)
    assert np.allclose(found, np.concatenate([values.mean(0), values.std(0), np.cbrt(third)]), atol=2e-3)


@settings(max_examples=20, deadline=None)
@given(seeds, st.floats(0.5, 0.9), st.floats(0, 0.1))
def test_texture_does_not_see_light_and_colour_does_not_see_place(seed: int, gain: float, offset: float) -> None:
    image = np.round(_image(seed) * 7) / 7  # steps far above what counts as flat
    body, textured = Descriptors(), 59 * len(RADII)
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(image.reshape(-1, 3)).reshape(image.shape)
    with torch.no_grad():
        plain, dimmed, moved = body(_batch(image, gain * image + offset, shuffled))
    assert torch.cosine_similarity(plain[:textured], dimmed[:textured], dim=0) > 0.98
    assert torch.allclose(plain[textured:], moved[textured:], atol=2e-3)
    assert not torch.allclose(plain[:textured], moved[:textured], atol=0.05)


def test_there_are_58_uniform_patterns_and_the_rest() -> None:
    bins = uniform_bins()
    assert sorted(set(bins)) == list(range(59))
    assert bins.count(58) == 256 - 58
    assert all(bins.count(value) == 1 for value in range(58))


@pytest.mark.parametrize("radius", RADII)
def test_neighbours_are_weighed_to_one_and_the_centre_taken_away(radius: int) -> None:
    kernels = circle(radius)
    assert torch.allclose(kernels.sum((1, 2, 3)), torch.zeros(8), atol=1e-6)
    assert float(kernels[0, 0, radius, 2 * radius]) == 1  # to the right
    assert float(kernels[2, 0, 0, radius]) == 1  # above


def test_flat_images_and_each_histogram_has_length_one() -> None:
    with torch.no_grad():
        made = Descriptors()(torch.stack([torch.full((3, 32, 32), 0.3), torch.rand(3, 32, 32)]))
    assert made.shape == (2, 59 * 3 + 3 * BINS + 9)
    assert bool(torch.isfinite(made).all())
    for start in range(0, 177, 59):
        assert torch.allclose(made[:, start : start + 59].norm(dim=1), torch.ones(2), atol=1e-4)


def test_they_export_and_run_without_torch(tmp_path: Path) -> None:
    body, example = Descriptors().eval(), torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    file = tmp_path / "d.onnx"
    torch.onnx.export(body, (example,), file, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "n"}})
    other = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    (made,) = onnxruntime.InferenceSession(file).run(None, {"x": other.numpy()})
    with torch.no_grad():
        assert np.abs(made - body(other).numpy()).max() < 0.02  # a pixel at a tie may fall to the other side
