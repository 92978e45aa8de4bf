"""The CPU executor against the reference: every transform, border, size and kind of input; the same from any number of threads."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from attar.records import Dial
from attar.stages.augment import coordinates, cpu, reference
from attar.stages.augment.catalogue import FAMILIES, TRANSFORMS
from attar.stages.augment.plan import Plan, sample

FULL = Dial(1.0, 1.0)
SIZES = [(37, 50), (64, 41), (1, 1), (2, 3), (3, 1), (1, 40), (90, 90), (5, 9)]
ROUNDING = {"gamma", "posterise", "solarise", "equalise", "jpeg"}
"""Transforms that round: a value next to where they do may fall to the other side."""
CLOSE = 3e-4
"""Of values in [0, 1]: float32 coordinates and arithmetic, times the gain of contrast, brightness and saturation."""
FILL = (51 / 255, 1.0, 0.0)


def picture(rows: int, columns: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth colours over the whole range, with an edge."""
    rng = np.random.default_rng([seed, rows, columns])
    smooth = gaussian_filter(rng.normal(size=(rows, columns, channels)), (2, 2, 0))
    smooth = (smooth - smooth.min()) / max(np.ptp(smooth), 1e-9) * 255
    smooth[: rows // 3, : columns // 3] = 255
    return smooth.astype(np.uint8)


IMAGES = [picture(*size) for size in SIZES]


def plan_of(names: Any, seed: int = 0, size: tuple[int, int] = (24, 32), sizes: list[tuple[int, int]] = SIZES, **options: Any) -> Plan:
    dials = names if isinstance(names, dict) else dict.fromkeys(names, FULL)
    return sample([dials] * len(sizes), np.random.default_rng(seed), sizes, size, **{"fill": FILL, **options})


def difference(plan: Plan, images: list[np.ndarray] = IMAGES, shown: list[np.ndarray] | None = None) -> np.ndarray:
    expected = reference.render(shown or images, plan, (0.0,) * 3, (1.0,) * 3)
    return np.abs(cpu.execute(images, plan).numpy() - expected)


def unshrunk(plan: Plan) -> np.ndarray:
    return plan.steps() == 1


@pytest.mark.parametrize("border", ["reflect", "edge", "constant"])
@pytest.mark.parametrize("name", [*TRANSFORMS, "geometry", "colour"])
def test_every_transform_alone_is_the_reference(name: str, border: Any) -> None:
    plan = plan_of({name: FULL} | ({"translate": FULL} if border != "reflect" else {}), border=border)
    error = difference(plan)
    if name not in ROUNDING:
        assert error[unshrunk(plan)].max() < CLOSE
        assert error.max() < 2 / 255  # means of boxes are rounded to bytes, before colours are stretched
    else:
        assert (error > 1.01 / 255).mean() < 0.02
        assert error.mean() < 1 / 255


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(24, 32), (33, 17), (1, 1), (50, 8)]), st.sampled_from(["reflect", "edge", "constant"]))
def test_random_plans_are_the_reference(seed: int, size: tuple[int, int], border: Any) -> None:
    smooth = dict.fromkeys(sorted(set(TRANSFORMS) - ROUNDING), Dial(1.0, 0.4))
    plan = plan_of(smooth, seed, size, border=border)
    error = difference(plan)
    steep = 1 + plan.sharpen.max() * 2  # what sharpening makes of a difference
    assert error[unshrunk(plan)].max(initial=0) < CLOSE * steep
    assert error.max() < 4 * steep / 255
    everything = plan_of(dict.fromkeys(TRANSFORMS, Dial(1.0, 0.2)), seed, size, border=border)
    assert np.median(difference(everything)) < 1 / 255


@pytest.mark.parametrize(("rows", "columns"), [(700, 900), (301, 95)])
def test_large_images_are_averaged_over_boxes_first(rows: int, columns: int) -> None:
    image = picture(rows, columns)
    for names in ((), ("geometry", "flip"), ("scale", "translate"), ("perspective", "elastic")):
        plan = plan_of(names, 3, (40, 30), [(rows, columns)] * 4)
        assert plan.steps().max() > 1
        assert difference(plan, [image] * 4).max() < 1 / 255


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_four_channels(channels: int) -> None:
    images = [picture(*size, channels) for size in [*SIZES, (200, 170)]]
    shown = [image.repeat(3, 2) if channels == 1 else np.ascontiguousarray(image[:, :, :3]) for image in images]
    for names in ((), ("geometry", "flip"), ("geometry", "colour", "elastic")):
        plan = plan_of(names, 1, sizes=[*SIZES, (200, 170)], border="constant")
        error = difference(plan, images, shown)
        assert error[unshrunk(plan)].max() < CLOSE
        assert error.max() < 2 / 255


def test_the_plain_view_of_its_own_size_is_the_image_and_a_flip_its_mirror_exactly() -> None:
    images = [picture(30, 44, seed=seed) for seed in range(4)]
    plain = plan_of((), size=(30, 44), sizes=[(30, 44)] * 4)
    expected = np.stack(images).transpose(0, 3, 1, 2) / np.float32(255)
    np.testing.assert_allclose(cpu.execute(images, plain).numpy(), expected, atol=1e-6)
    for name, axis in (("horizontal_flip", 3), ("vertical_flip", 2)):
        flipped = plan_of((name,), size=(30, 44), sizes=[(30, 44)] * 4)
        np.testing.assert_allclose(cpu.execute(images, flipped).numpy(), np.flip(expected, axis), atol=1e-6)


def test_quarter_turns_are_exact() -> None:
    image = picture(31, 31)
    plan = plan_of(("quarter_turn",), size=(31, 31), sizes=[(31, 31)] * 12)
    assert set(plan.drawn["quarter_turn"][:, 0]) == {1, 2, 3}
    for turns, view in zip(plan.drawn["quarter_turn"][:, 0], cpu.execute([image] * 12, plan).numpy()):
        expected = np.rot90(image, int(turns)).transpose(2, 0, 1) / 255
        np.testing.assert_allclose(view, expected, atol=1e-5)


def test_views_are_bit_equal_for_any_number_of_threads() -> None:
    plan = plan_of(dict.fromkeys([*FAMILIES, "elastic", "noise", "jpeg", "equalise"], Dial(1.0, 0.5)), sizes=SIZES * 5)
    once, again, twice, five = (cpu.execute(IMAGES * 5, plan, threads=threads) for threads in (1, 1, 2, 5))
    assert torch.equal(once, again)
    assert torch.equal(once, twice)
    assert torch.equal(once, five)


def test_a_view_depends_on_its_own_row_alone() -> None:
    plan = plan_of(dict.fromkeys(TRANSFORMS, Dial(0.8, 0.3)))
    together = cpu.execute(IMAGES, plan)
    by_view = [name for name in plan._fields if name not in ("size", "border", "fill", "tables", "drawn")]
    for view in range(len(IMAGES)):
        alone = plan._replace(**{name: getattr(plan, name)[view : view + 1] for name in by_view})
        assert torch.equal(cpu.execute(IMAGES, alone)[0], together[view])


def test_one_image_serves_several_views() -> None:
    plan = plan_of(("geometry",), sizes=[(37, 50)] * 4)._replace(source=np.array([1, 0, 1, 1]))
    both = [picture(37, 50, seed=1), picture(37, 50, seed=2)]
    apart = plan._replace(source=np.arange(4))
    assert torch.equal(cpu.execute(both, plan), cpu.execute([both[1], both[0], both[1], both[1]], apart))


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_types_and_layouts_hold_the_normalised_values(dtype: Any, layout: Any) -> None:
    plan = plan_of(dict.fromkeys(["geometry", "colour", "blur", "erase"], Dial(1.0, 0.5)))
    expected = reference.render(IMAGES, plan, MEAN, STD)
    found = cpu.execute(IMAGES, plan, MEAN, STD, dtype=dtype, layout=layout)
    assert found.dtype == getattr(torch, dtype)
    assert found.is_contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
    plain = cpu.execute(IMAGES, plan, MEAN, STD)
    assert torch.equal(found, plain.to(found.dtype))  # rounded as torch rounds, whatever the layout
    assert np.abs(plain.numpy() - expected)[unshrunk(plan)].max() < CLOSE / min(STD)


def test_float16_beyond_its_range_and_below_its_normal_numbers() -> None:
    plan = plan_of(())
    for std in (1e-6, 1e7):
        plain = cpu.execute(IMAGES, plan, (0.2,) * 3, (std,) * 3)
        assert torch.equal(cpu.execute(IMAGES, plan, (0.2,) * 3, (std,) * 3, dtype="float16"), plain.half())


def test_images_are_read_where_they_lie_and_left_as_they_were() -> None:
    wide = picture(60, 70)
    parts = [wide[5:42, 10:60], wide[::-1, ::2], wide[::2], np.asfortranarray(wide), wide.transpose(1, 0, 2)]
    kept = wide.copy()
    plan = plan_of(("geometry", "flip", "colour"), sizes=[part.shape[:2] for part in parts])
    made = cpu.execute(parts, plan)
    assert torch.equal(made, cpu.execute([part.copy() for part in parts], plan))
    assert np.array_equal(wide, kept)
    frozen = picture(37, 50)
    frozen.flags.writeable = False
    assert cpu.execute([frozen], plan_of((), sizes=[(37, 50)])).shape == (1, 3, 24, 32)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_nothing_is_read_beyond_the_image(channels: int) -> None:
    """Images that end where the memory does: a byte too far would end the process."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 3 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    guard = address + 2 * page
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) == 0
    flat = np.frombuffer(memory, np.uint8)
    try:
        for rows, columns in ((1, 1), (2, 2), (1, 9), (9, 1), (2, 3), (3, 2), (31, 40)):
            size = rows * columns * channels
            image = flat[2 * page - size : 2 * page].reshape(rows, columns, channels)
            image[:] = picture(rows, columns, channels)
            plan = plan_of(("geometry", "flip", "scale"), sizes=[(rows, columns)] * 6, size=(40, 40))
            assert torch.equal(cpu.execute([image] * 6, plan), cpu.execute([image.copy()] * 6, plan))
            small = plan_of((), sizes=[(rows, columns)], size=(1, 1))
            assert torch.equal(cpu.execute([image], small), cpu.execute([image.copy()], small))
    finally:
        libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 3)


def test_a_matrix_with_a_horizon_in_the_view_and_one_far_outside() -> None:
    matrix = np.array(
        [[[1, 0, 0], [0, 1, 0], [0.02, 0.05, -0.5]], [[1e9, 0, -1e12], [0, 1e9, 1e12], [0, 0, 1]], [[0, 0, 5], [0, 0, 5], [0, 0, 1]]]
    )
    for border in ("reflect", "edge", "constant"):
        plan = plan_of((), sizes=[(37, 50)] * 3, border=border)._replace(matrix=matrix)
        views = cpu.execute([picture(37, 50)] * 3, plan)
        assert torch.isfinite(views).all()
        assert float(views.min()) >= 0
        assert float(views.max()) <= 1
        np.testing.assert_allclose(views[2], reference.render([picture(37, 50)] * 3, plan, (0.0,) * 3, (1.0,) * 3)[2], atol=CLOSE)


def test_noise_is_normal_and_of_its_own_seed() -> None:
    shape = (64, 64)
    grey = np.full((64, 64, 3), 128, np.uint8)
    plan = plan_of((), size=shape, sizes=[shape] * 2)._replace(noise=np.full(2, 0.05, np.float32), seed=np.array([1, 2], np.uint32))
    noise = (cpu.execute([grey] * 2, plan).numpy() - 128 / 255) / 0.05
    np.testing.assert_allclose(noise[0], reference.normals(1, (3, 64, 64)), atol=1e-4)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(noise[0, :, :, 1:].ravel(), noise[0, :, :, :-1].ravel())[0, 1]) < 0.03


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0, 30.0])
def test_blur_is_scipys(sigma: float) -> None:
    image = picture(40, 32)
    plan = plan_of((), size=(40, 32), sizes=[(40, 32)])._replace(blur=np.array([sigma], np.float32))
    radius = int(np.ceil(2.5 * sigma))
    expected = [gaussian_filter(image[:, :, c] / 255, sigma, mode="mirror", radius=radius) for c in range(3)]
    np.testing.assert_allclose(cpu.execute([image], plan)[0].numpy(), expected, atol=1e-5)


def test_jpeg_keeps_as_much_as_the_codec_does() -> None:
    """Against Pillow's without subsampling; it rounds to whole levels on the way, we do not."""
    import io

    from PIL import Image

    image = picture(64, 48)
    for quality in (10, 50, 90):
        plan = plan_of((), size=(64, 48), sizes=[(64, 48)])._replace(jpeg=np.array([quality], np.int16))
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "jpeg", quality=quality, subsampling=0)
        theirs = np.asarray(Image.open(buffer)).transpose(2, 0, 1) / 255
        ours = cpu.execute([image], plan)[0].numpy()
        lost = np.abs(theirs - image.transpose(2, 0, 1) / 255).mean()
        assert np.abs(ours - theirs).mean() < 0.4 * lost + 0.6 / 255


def test_equalise_spreads_the_levels_evenly() -> None:
    dark = (picture(64, 64) // 4).astype(np.uint8)
    plan = plan_of(("equalise",), size=(64, 64), sizes=[(64, 64)])
    assert np.array_equal(
        np.rint(255 * cpu.execute([dark], plan)[0]), np.rint(255 * reference.render([dark], plan, (0.0,) * 3, (1.0,) * 3)[0])
    )
    flat = np.full((64, 64, 3), 7, np.uint8)
    np.testing.assert_allclose(cpu.execute([flat], plan).numpy(), 7 / 255, atol=1e-6)


WHOLE = {"flip": ([-1, 0, 44], [0, 1, 0]), "turn": ([0, -1, 40], [1, 0, 2]), "moved": ([1, 0, 3], [0, 1, 2])}
STRAIGHT = {"shrunk": ([1.4, 0, 0.7], [0, 1.3, 1.2]), "grown": ([0.3, 0, 9.1], [0, 0.4, 3.3]), "beyond": ([-1.1, 0, 47], [0, 1.6, -5])}


def by_matrix(rows: tuple[list[float], list[float]], **changes: Any) -> Plan:
    """A view of 24 x 32 of an image of 40 x 44."""
    border = changes.pop("border", "reflect")
    plan = plan_of((), sizes=[(40, 44)], border=border)
    return plan._replace(matrix=np.array([[*rows, [0, 0, 1]]], np.float64), **changes)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("name", [*WHOLE, *STRAIGHT])
def test_views_of_whole_pixels_and_of_straight_axes_are_what_the_general_path_makes_of_them(name: str, channels: int) -> None:
    image = picture(40, 44, channels)
    shown = image.repeat(3, 2) if channels == 1 else np.ascontiguousarray(image[:, :, :3])
    mixed = np.array([[[0.5, 0.2, 0.1, 0.1], [0, 1.4, 0, -0.1], [0.3, 0, -0.5, 0.6]]], np.float32)
    for border in ("reflect", "edge", "constant"):
        for colour in (np.eye(3, 4, dtype=np.float32)[None], mixed):
            plan = by_matrix((WHOLE | STRAIGHT)[name], border=border, colour=colour)
            slanted = plan.matrix.copy()
            slanted[0, :2, :2] += 1e-7
            slanted[0, 0, 2] += 2e-4
            assert coordinates.whole_pixels(plan.matrix[0], 0, 40, 44, 24, 32)[0] == (name in WHOLE)
            assert not coordinates.whole_pixels(slanted[0], 0, 40, 44, 24, 32)[0]
            general = cpu.execute([image], plan._replace(matrix=slanted))
            np.testing.assert_allclose(cpu.execute([image], plan), general, atol=1e-3)
            assert difference(plan, [image], [shown]).max() < CLOSE


@pytest.mark.parametrize("name", [*WHOLE, *STRAIGHT])
def test_one_table_stands_for_colour_and_table_where_bytes_are_copied(name: str) -> None:
    image, rng = picture(40, 44), np.random.default_rng(0)
    tables = rng.integers(0, 256, (1, 3, 256)).astype(np.uint8)
    colours = {"none": np.eye(3, 4), "negative": -np.eye(3, 4), "brighter": 1.3 * np.eye(3, 4)}
    colours["negative"][:, 3], colours["brighter"][:, 3] = 1, -0.101
    for colour in colours.values():
        plan = by_matrix((WHOLE | STRAIGHT)[name], table=np.zeros(1, int), tables=tables, colour=colour.astype(np.float32)[None])
        error = difference(plan, [image])
        if name in WHOLE:
            assert error.max() < 1e-6
        else:  # a random table makes much of a level that is rounded to the other side
            assert (error > 1e-6).mean() < 0.01


def test_an_output_is_not_written_over_by_later_calls() -> None:
    plans = [plan_of(("geometry",), seed, sizes=[(37, 50)] * 3) for seed in range(6)]
    images = [picture(37, 50)] * 3
    expected = [cpu.execute(images, plan).clone() for plan in plans]
    held = [cpu.execute(images, plan)[1].numpy() for plan in plans]  # what shares the memory, not the tensor itself
    for part, whole in zip(held, expected):
        assert np.array_equal(part, whole[1])
