"""The torch executor against the reference: every operation, alone and composed, for every kind of input, border and layout."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from attar.errors import DataError
from attar.records import Dial
from attar.stages.augment import gpu_filters, reference
from attar.stages.augment.catalogue import TRANSFORMS
from attar.stages.augment.gpu import render
from attar.stages.augment.plan import Plan, sample

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import augment_gpu

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.5, 1.0)
UNIT = ((0.0,) * 3, (1.0,) * 3)
LEVEL = 1 / 255
ROUNDED = {"gamma", "posterise", "solarise", "equalise", "jpeg"}
"""Where float32 can round to the other side of a level or of a step of the quantisation."""


def _photo(height: int, width: int, seed: int) -> np.ndarray:
    """A picture of waves and noise, with all levels, edges and flat parts."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [127 + 100 * np.sin((rng.uniform(0.05, 0.5) * x + rng.uniform(0.05, 0.5) * y) + rng.uniform(0, 6)) for _ in range(3)]
    noisy = np.stack(waves, 2) + rng.normal(0, 12, (height, width, 3))
    noisy[: height // 3, : width // 4] = rng.integers(0, 256, 3)
    return noisy.clip(0, 255).astype(np.uint8)


def _photos(*sizes: tuple[int, int]) -> list[np.ndarray]:
    return [_photo(*size, seed) for seed, size in enumerate(sizes)]


def _plan(dials: list[dict[str, Dial]], images: list[np.ndarray], size: tuple[int, int] = (24, 20), seed: int = 0, **options: Any) -> Plan:
    source = np.arange(len(dials)) % len(images)
    sizes = [images[index].shape[:2] for index in source]
    return sample(dials, np.random.default_rng(seed), sizes, size, source=source, **options)


def _off(images: list[np.ndarray], plan: Plan, **options: Any) -> np.ndarray:
    """Differences from the reference in levels, of values in [0, 1]."""
    made = render(images, plan, *UNIT, **options).double().numpy()
    return abs(made - reference.render(images, plan, *UNIT)) / LEVEL


MIXED = _photos((30, 41), (90, 70), (24, 20), (9, 13), (160, 75))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_every_transform_alone_is_the_reference(name: str) -> None:
    off = _off(MIXED, _plan([{name: Dial(1.0, 1.0)}] * 5, MIXED, seed=3))
    if name in ROUNDED:
        assert (off < 0.1).mean() > 0.99
    else:
        assert off.max() < 0.1
    assert off.mean() < 0.02


@pytest.mark.parametrize("border", ["reflect", "edge", "constant"])
@pytest.mark.parametrize("seed", range(3))
def test_random_plans_of_everything_continuous_are_the_reference(border: str, seed: int) -> None:
    names = set(TRANSFORMS) - ROUNDED
    plan = _plan([dict.fromkeys(names, Dial(1.0, 0.3))] * 12, MIXED, seed=seed, border=border, fill=(0.9, 0.1, 0.4))
    assert _off(MIXED, plan).max() < 0.1


@pytest.mark.parametrize("seed", range(3))
def test_random_plans_of_everything_are_the_reference_but_for_what_rounds(seed: int) -> None:
    plan = _plan([dict.fromkeys(TRANSFORMS, Dial(1.0, 0.3))] * 15, MIXED, seed=seed)
    off = _off(MIXED, plan)
    assert (off < 0.1).mean() > 0.97  # a level rounded otherwise before jpeg moves its whole block, if by little
    assert (off < 1).mean() > 0.97
    assert off.mean() < 0.1


@pytest.mark.parametrize("border", ["reflect", "edge", "constant"])
def test_borders_far_outside_and_around_the_smallest_images(border: str) -> None:
    images = _photos((1, 1), (1, 7), (5, 1), (6, 8))
    plan = _plan([{"rotate": Dial(1.0, 1.0), "translate": Dial(1.0, 1.0)}] * 8, images, border=border, fill=(1.0, 0.0, 0.25))
    far = plan.matrix.copy()
    far[4:, :2, :2] *= -9  # what lies many widths outside, mirrored many times
    assert _off(images, plan._replace(matrix=far)).max() < 0.1
    assert _off(images, plan).max() < 0.1


def test_shrinking_takes_the_means_of_boxes_and_of_what_there_is_at_the_edges() -> None:
    images = _photos((41, 57), (100, 60), (41, 57), (77, 203))
    plan = _plan([{"resized_crop": Dial(0.5, 0.5)}] * 8, images, size=(10, 12))
    assert len(set(plan.steps().tolist())) > 2
    assert _off(images, plan).max() < 0.1
    constant = np.full((41, 57, 3), 200, np.uint8)
    assert abs(render([constant] * 4, plan, *UNIT) - 200 / 255).max() < 1e-6


def test_a_huge_source_is_sampled_as_finely_as_a_small_one() -> None:
    wide = _photo(1, 20_000, 0)
    plan = _plan([{}], [wide], size=(3, 50))
    matrix = np.array([[[0.7, 0.01, 19_870.3], [-0.001, 0.3, 0.2], [0, 0, 1]]])
    assert _off([wide], plan._replace(matrix=matrix)).max() < 0.01


def test_blurs_reach_further_than_the_view_and_differ_by_view() -> None:
    images = _photos((4, 3), (1, 1), (20, 30))
    for size in ((4, 3), (1, 1), (1, 9)):
        plan = _plan([{}] * 6, images, size=size)
        assert _off(images, plan._replace(blur=np.array([0, 0.3, 1, 2.5, 9, 0.01], np.float32))).max() < 0.1


def test_jpeg_of_every_quality_and_of_parts_of_blocks() -> None:
    images = _photos((17, 9), (8, 8), (1, 1), (23, 16))
    for size in ((17, 9), (8, 8), (1, 1)):
        quality = np.array([1, 10, 49, 50, 75, 90, 99, 100], np.int16)
        off = _off(images, _plan([{}] * 8, images, size=size)._replace(jpeg=quality))
        assert (off < 0.1).mean() > 0.99


def test_the_noise_is_the_hash_of_seed_and_place_bit_for_bit() -> None:
    numbers = np.random.default_rng(0).integers(0, 2**32, 10_000, np.uint64)
    made = gpu_filters._scrambled(torch.from_numpy(numbers.astype(np.int64)))
    assert np.array_equal(made.numpy(), reference.scramble(numbers).astype(np.int64))
    seeds = np.array([0, 1, 2**32 - 1], np.uint32)
    normals = gpu_filters._normals(seeds, torch.zeros(3, 3, 40, 50))
    for one, seed in zip(normals, seeds):
        assert abs(one.numpy() - reference.normals(int(seed), (3, 40, 50))).max() < 1e-3


# Inputs and outputs


def _batch() -> tuple[list[np.ndarray], Plan]:
    images = _photos(*[(19, 23)] * 4)
    return images, _plan([dict.fromkeys(TRANSFORMS, Dial(1.0, 0.3))] * 8, images)


@pytest.mark.parametrize(
    "given_as",
    [
        lambda images: torch.from_numpy(np.stack(images)),
        lambda images: torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2),
        lambda images: torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        lambda images: torch.from_numpy(np.stack(images)[:, :, ::-1].copy()).flip(2),
        lambda images: torch.from_numpy(np.stack([np.zeros_like(images[0]), *images]))[1:],
        lambda images: torch.from_numpy(np.repeat(np.stack(images), 2, 2))[:, :, ::2],
        lambda images: [torch.from_numpy(image) for image in images],
        lambda images: [images[0], torch.from_numpy(images[1]), *images[2:]],
        lambda images: [np.asfortranarray(image) for image in images],
    ],
    ids=["HWC", "channels-last", "CHW", "copy", "part", "every other column", "tensors", "mixed", "Fortran"],
)
def test_a_picture_is_the_same_however_it_is_given(given_as: Callable[[list[np.ndarray]], Any]) -> None:
    images, plan = _batch()
    assert torch.equal(render(given_as(images), plan, MEAN, STD), render(images, plan, MEAN, STD))


def test_floating_batches_mean_what_their_bytes_do() -> None:
    images = _photos(*[(50, 46)] * 3)
    plan = _plan([dict.fromkeys(set(TRANSFORMS) - ROUNDED, Dial(1.0, 0.3))] * 9, images, size=(20, 20), border="constant", fill=0.2)
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-5), (torch.float16, 5e-3)):
        assert abs(render((batch.double() / 255).to(dtype), plan, *UNIT) - render(batch, plan, *UNIT)).max() < bound


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_result_has_the_type_and_layout_asked_for(dtype: torch.dtype, channels_last: bool) -> None:
    images, plan = _batch()
    made = render(images, plan, MEAN, STD, dtype, channels_last)
    assert made.dtype == dtype
    assert made.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert torch.equal(made, render(images, plan, MEAN, STD).to(dtype))


def test_values_are_normalised_per_channel() -> None:
    images, plan = _batch()
    plain = render(images, plan, *UNIT)
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (MEAN, STD))
    assert torch.allclose(render(images, plan, MEAN, STD), (plain - mean) / std, atol=1e-5)


def test_no_views_make_an_empty_batch() -> None:
    assert render([], _plan([], [np.zeros((1, 1, 3), np.uint8)]), *UNIT).shape == (0, 3, 24, 20)


# Invariants


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(list(TRANSFORMS)))
def test_a_view_depends_on_nothing_that_others_drew(seed: int, name: str) -> None:
    images = _photos(*[(19, 23)] * 6)
    plain = _plan([{"rotate": Dial(1.0, 0.5), "hue": Dial(1.0, 0.5)}] * 6, images, seed=seed)
    mixed = _plan([{"rotate": Dial(1.0, 0.5), "hue": Dial(1.0, 0.5), name: Dial(1.0, 0.5)}] * 6, images, seed=seed)
    same = np.isnan(mixed.drawn[name]).all(1) if name in mixed.drawn and name not in ("rotate", "hue") else np.ones(6, bool)
    if name not in ("rotate", "hue"):
        assert torch.equal(render(images, mixed, *UNIT)[same], render(images, plain, *UNIT)[same])


def test_what_is_in_work_at_once_changes_nothing_and_twice_is_the_same() -> None:
    images, plan = _batch()
    made = render(images, plan, *UNIT)
    assert torch.equal(made, render(images, plan, *UNIT))
    assert torch.allclose(made, render(images, plan, *UNIT, at_once=1), atol=1e-5)


class Watch(TorchFunctionMode):
    """The most bytes alive at once in tensors that operations made, and the most values of one of them in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak, self.double = 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, torch.Tensor):
                self.double = max(self.double, made.numel() if made.dtype == torch.float64 else 0)
                storage = made.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata)
                    self.peak = max(self.peak, sum(self.alive.values()))
        return out


def test_working_memory_does_not_grow_with_the_batch_and_nothing_is_double() -> None:
    images, at_once = torch.from_numpy(np.stack(_photos((40, 40), (40, 40)))), 4 * 24 * 24
    beyond = {}
    for count in (24, 60):
        dials = [dict.fromkeys(TRANSFORMS, Dial(1.0, 0.7))] * count
        plan = sample(dials, np.random.default_rng(0), [(40, 40)] * count, (24, 24), source=np.arange(count) % 2)
        with Watch() as watch:
            made = render(images, plan, *UNIT, at_once=at_once)
        beyond[count] = watch.peak - made.nbytes - plan.tables.nbytes
        assert watch.double <= 3 * count
    assert beyond[60] < 1.2 * beyond[24]
    assert beyond[60] < 170 * at_once


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 4, 5, 6, dtype=torch.uint8), r"shape \(2, 4, 5, 6\).*Expected \(images, 3, height, width\)"),
        (torch.zeros(2, 3, 5, 5, dtype=torch.int64), "type torch.int64"),
        ([np.zeros((4, 4), np.uint8)], r"shape \(4, 4\) and type uint8. Expected uint8 \(height, width, 3\)"),
        ([np.zeros((4, 4, 3), np.float32)], "type float32"),
    ],
)
def test_images_of_another_kind_are_refused(images: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        render(images, _plan([{}], MIXED), *UNIT)


# Other devices and the compiled kernels


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_makes_what_the_processor_makes() -> None:
    plan = _plan([dict.fromkeys(set(TRANSFORMS) - ROUNDED, Dial(1.0, 0.3))] * 40, MIXED)
    assert abs(render(MIXED, plan, *UNIT, device="cuda").cpu() - render(MIXED, plan, *UNIT)).max() < 0.1 * LEVEL
    images, plan = _batch()
    batch = torch.from_numpy(np.stack(images))
    off = abs(render(batch.cuda(), plan, *UNIT, device="cuda").cpu() - render(batch, plan, *UNIT))
    assert (off < LEVEL).float().mean() > 0.99
    numbers = torch.from_numpy(np.random.default_rng(0).integers(0, 2**32, 10_000))
    assert torch.equal(gpu_filters._scrambled(numbers.cuda()).cpu(), gpu_filters._scrambled(numbers))


COMPILED = """
import numpy as np, torch
from torch._inductor import config, metrics
config.force_disable_caches = True
from attar.records import Dial
from attar.stages.augment.gpu import render
from attar.stages.augment.plan import sample
images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (6, 30, 33, 3), np.uint8))
def check(names, count, seed, last=False):
    dials = [dict.fromkeys(names, Dial(1.0, 0.5))] * count
    plan = sample(dials, np.random.default_rng(seed), [(30, 33)] * count, (16, 20), source=np.arange(count) % 6)
    plain, made = (render(images, plan, (0.5,) * 3, (0.25,) * 3, channels_last=last, compiled=compiled) for compiled in (False, True))
    assert abs(made - plain).max() < 0.01, names
    assert made.stride() == plain.stride()
check(["rotate", "horizontal_flip", "brightness", "hue", "erase"], 6, 0)
print(metrics.generated_kernel_count)
check(["rotate", "horizontal_flip", "brightness", "hue", "erase"], 5, 1, last=True)
check(["rotate", "perspective", "elastic", "spherical", "barrel", "saturation", "erase", "blur", "noise"], 6, 2)
"""


@pytest.mark.slow
def test_the_compiled_pass_is_one_kernel_and_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["1"]


# The benchmark


def test_the_benchmark_times_and_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gpu.json"
    small = [
        "--device",
        "cpu",
        "--batch",
        "3",
        "--side",
        "16",
        "--rounds",
        "3",
        "--warm-up",
        "1",
        "--contenders",
        "attar",
        "--out",
        str(file),
    ]
    augment_gpu.main(small)
    body = json.loads(file.read_text())
    assert [row["name"] for row in body["rows"]] == ["attar", "attar, render"]
    printed = capsys.readouterr().out
    for row in body["rows"]:
        assert row["share_of_bound"] == pytest.approx(body["bound_milliseconds"] / row["milliseconds"])
        assert f"{row['milliseconds']:.3f} ms" in printed
    assert body["bound_milliseconds"] == pytest.approx(1e3 * 3 * 3 * 16 * 16 * 5 / body["bytes_per_second"])


def test_the_benchmark_without_kornia_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install kornia"):
        augment_gpu.main(["--device", "cpu", "--batch", "1", "--side", "8"])
