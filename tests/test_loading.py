"""stages.augment.loading: one decoding for all views, at the scale they need, in bounded memory, the same for any number of threads."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_image import photo

from attar.config import Data
from attar.errors import DataError, UsageError
from attar.modalities import image
from attar.records import Dial, Items, Policy
from attar.stages.augment import loading, reference
from attar.stages.augment.engine import Augment
from attar.stages.augment.loading import AugmentingLoader, reductions, upright_to_stored
from attar.stages.scan import scan
from attar.workspace import Job

SIDE = 24
STRONG = {"geometry": 0.8, "flip": (1.0, 0.5), "colour": 0.5, "blur": (0.5, 0.3), "erase": (0.5, 0.3)}


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 JPEG photos of several sizes; every third is stored turned; two are PNG."""
    folder = tmp_path_factory.mktemp("jpegs") / "photos"
    folder.mkdir()
    for number in range(30):
        exif = Image.Exif()
        exif[0x0112] = 1 + number // 3 % 8 if number % 3 == 0 else 1
        size = [(90, 64), (61, 97), (203, 155), (331, 240)][number % 4]
        photo(*size, seed=number).save(folder / f"{number:02d}.jpg", quality=90, exif=exif)
    photo(50, 40, seed=99).save(folder / "plain.png")
    photo(240, 210, seed=98).save(folder / "wide.png")
    return folder


@pytest.fixture(scope="module")
def scanned(jpegs: Path, tmp_path_factory: pytest.TempPathFactory) -> Items:
    return scan(Data(data=str(jpegs)), Job("scan", tmp_path_factory.mktemp("scan"), quiet=True))


def augment(policy: object = STRONG, **options: object) -> Augment:
    return Augment(policy, **{"size": SIDE, "seed": 3} | options)


# which scale


def test_the_scale_leaves_each_view_a_pixel_of_the_source_for_its_own() -> None:
    whole = augment("none")
    sizes = [(SIDE * k + extra, SIDE * k * 3) for k in range(1, 11) for extra in (0, 1)]
    found = reductions(whole.plan(sizes, step=0), len(sizes))
    assert found.tolist() == [next(d for d in (8, 4, 2, 1) if d <= k) for k in range(1, 11) for _ in (0, 1)]
    assert reductions(whole.plan([(SIDE - 1, 900)], step=0), 1).tolist() == [1]


def test_the_view_that_shrinks_least_decides() -> None:
    crops = augment({"resized_crop": 1.0})
    sizes = np.array([(230, 260)] * 60)
    plan = crops.plan(sizes, step=0, views=3)
    found = reductions(plan, 60)
    by_view = [name for name in plan._fields if name not in ("size", "border", "fill", "tables", "drawn")]
    per_view = [
        reductions(plan._replace(**{name: getattr(plan, name)[[row]] for name in by_view} | {"source": np.zeros(1, int)}), 1)[0]
        for row in range(180)
    ]
    assert np.array_equal(found, np.reshape(per_view, (60, 3)).min(1))
    assert set(found) >= {2, 4, 8}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["perspective", "spherical", "barrel", "elastic"]))
@example(3140, "barrel")  # its matrix shrinks 7.9996 times, the barrel 8.0008 times at least
def test_warps_are_followed_to_where_they_shrink_least(seed: int, name: str) -> None:
    plan = augment({name: 1.0, "scale": 0.7}, seed=seed).plan([(SIDE * 5, SIDE * 6)] * 4, step=0)
    found = reductions(plan, 4)
    assert (found <= plan.steps() + 1).all()
    for view in range(4):
        x, y = plan.coordinates(view)
        for row, column in np.random.default_rng(seed).integers(0, SIDE - 1, (100, 2)):
            for other in ((row + 1, column), (row, column + 1)):
                apart = np.hypot(x[other] - x[row, column], y[other] - y[row, column])
                assert found[view] == 1 or apart >= found[view]


# orientation


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_places_are_found_in_the_file(orientation: int) -> None:
    pixels = np.arange(35, dtype=np.uint8).reshape(5, 7)
    upright = np.asarray(image._turn(Image.fromarray(pixels), orientation))
    matrix = upright_to_stored(upright.shape, orientation)
    for row, column in itertools.product(*map(range, upright.shape)):
        x, y, _ = matrix @ [column + 0.5, row + 0.5, 1]
        assert pixels[int(y), int(x)] == upright[row, column]
    assert np.allclose(upright_to_stored(upright.shape, orientation, 4)[:2] * 4, matrix[:2])


# what comes out


def test_views_are_those_of_augment_on_decoded_images(scanned: Items, jpegs: Path) -> None:
    aug = augment(STRONG, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    ids = np.array([5, 0, 31, 30, 12, 12, 9, 27])
    paths = scanned.column("path")
    images = [np.asarray(image.decode((jpegs / paths[item]).read_bytes(), max_pixels=10**7)[0]) for item in ids]
    expected, plan = aug(images, step=7, views=3, return_plan=True)
    with AugmentingLoader(scanned, aug, views=3) as loader:
        found = loader.batch(ids, 7)
    assert found.shape == expected.shape
    difference = (found - expected).abs()
    factors = np.repeat(reductions(plan, len(ids)), 3)
    assert set(factors) >= {1, 2}
    plain = torch.from_numpy(plan.steps() == 1)  # means of boxes are taken from the file's corner: of turned images from another one
    assert float(difference[plain].max()) < 2e-3
    reduced = difference[torch.from_numpy(factors > 1)]
    assert 0 < float(reduced.mean()) < 0.05  # in standard deviations of 0.2 to 0.4


def test_reduced_decoding_is_near_the_reference_on_all_pixels(tmp_path: Path) -> None:
    photo(800, 640).save(tmp_path / "a.jpg", quality=92)
    aug = augment({"geometry": 0.4, "flip": 1.0}, mean=0.0, std=1.0, size=40)
    full = np.asarray(Image.open(tmp_path / "a.jpg"))
    with AugmentingLoader([tmp_path / "a.jpg"], aug, views=2) as loader:
        for step in range(4):
            plan = aug.plan([full.shape[:2]], step=step, views=2)
            assert reductions(plan, 1)[0] >= 4
            found = loader.batch([0], step).numpy()
            expected = reference.render([full], plan, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
            assert expected.std() > 0.05
            assert np.abs(found - expected).mean() < 0.02


@pytest.mark.parametrize(("dtype", "layout"), [("float32", "channels_last"), ("float16", "contiguous"), ("bfloat16", "channels_last")])
def test_types_and_layouts_are_those_of_augment(scanned: Items, dtype: str, layout: str) -> None:
    with AugmentingLoader(scanned, augment(dtype=dtype, layout=layout)) as loader, AugmentingLoader(scanned, augment()) as plain:
        found = loader.batch([1, 2, 3], 0)
        assert found.dtype == getattr(torch, dtype)
        assert found.is_contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)
        assert torch.allclose(found.float(), plain.batch([1, 2, 3], 0), atol=0.02)


def test_the_result_does_not_depend_on_threads_cache_or_what_was_loaded_before(scanned: Items) -> None:
    batches = [np.random.default_rng(number).integers(0, 32, 9) for number in range(4)]

    def run(**options: int) -> list[torch.Tensor]:
        with AugmentingLoader(scanned, augment(), **options) as loader:
            return [views for _ in range(2) for _, views in loader.stream(batches, start=40)]

    first = run(threads=1, cache_bytes=0)
    for options in (
        {"threads": 5},
        {"threads": 2, "cache_bytes": 400_000},
        {"threads": 3, "queue_bytes": 9 * 2 * 3 * SIDE * SIDE * 4},
        {"decode_bytes": 1},
    ):
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(run(**options), first))
    assert all(torch.equal(first[number], first[number + 4]) for number in range(4))
    with AugmentingLoader(scanned, augment()) as loader:
        assert torch.equal(loader.batch(batches[3], 43), first[3])
        assert not torch.equal(loader.batch(batches[3], 44), first[3])


def test_a_batch_that_is_kept_is_not_written_over(scanned: Items) -> None:
    with AugmentingLoader(scanned, augment()) as loader:
        kept = [views for _, views in loader.stream([np.arange(8)] * 6)]
        assert all(torch.equal(views, loader.batch(np.arange(8), step)) for step, views in enumerate(kept))
        part = loader.batch(np.arange(8), 0)[3:5, 1]
        for _ in loader.stream([np.arange(8)] * 3, start=1):
            pass
        assert torch.equal(part, kept[0][3:5, 1])
        assert loader.batch([], 0).shape == (0, 3, SIDE, SIDE)


def test_plain_files_give_what_scanned_ones_do(scanned: Items, jpegs: Path) -> None:
    files = [jpegs / path for path in scanned.column("path")]
    with AugmentingLoader(scanned, augment()) as loader, AugmentingLoader(files, augment()) as plain:
        assert torch.equal(plain.batch(np.arange(32), 2), loader.batch(np.arange(32), 2))


def test_dials_are_those_of_each_items_cluster(scanned: Items) -> None:
    policy = Policy(families={}, clusters=({}, {"invert": Dial(1.0, 1.0)}))
    clusters = np.arange(32) % 2
    with AugmentingLoader(scanned, augment(policy)) as loader, AugmentingLoader(scanned, augment("none")) as plain:
        (_, found), (_, same) = (next(one.stream([[4, 7]], clusters=clusters)) for one in (loader, plain))
    assert torch.allclose(found, same * torch.tensor([1.0, 1, -1, -1]).view(4, 1, 1, 1), atol=1e-5)


# memory


def test_each_item_is_decoded_once_for_its_views_and_kept(scanned: Items, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    stored = image.stored

    def counted(data: bytes, *, reduction: int = 1, max_pixels: int) -> image.Stored:
        asked.append(reduction)
        return stored(data, reduction=reduction, max_pixels=max_pixels)

    monkeypatch.setattr(image, "stored", counted)
    with AugmentingLoader(scanned, augment("none"), threads=3) as loader:
        for _ in loader.stream([np.arange(32)] * 3):
            pass
        assert len(asked) == 32
        assert set(asked) == {1, 2, 4, 8}
        used = loader.memory().cache
        assert (used.misses, used.hits, used.items) == (32, 64, 32)
    with AugmentingLoader(scanned, augment("none"), cache_bytes=0) as loader:
        for _ in loader.stream([np.arange(32)] * 3):
            pass
    assert len(asked) == 32 + 96


def test_memory_stays_within_what_is_stated(scanned: Items) -> None:
    batch = 8 * 2 * 3 * SIDE * SIDE * 4
    limits = {"cache_bytes": 60_000, "queue_bytes": 3 * batch, "decode_bytes": 700_000}
    with AugmentingLoader(scanned, augment(), threads=4, **limits) as loader:
        rng = np.random.default_rng(0)
        for _ in loader.stream([rng.integers(0, 32, 8) for _ in range(12)]):
            found = loader.memory()
            assert found.cache.bytes <= found.cache.peak <= 60_000
        assert found.cache.items > 0
        assert found.queue == 3 * batch
        assert 0 < found.decoding <= 700_000
        assert found.stated == sum(limits.values())


def test_batches_are_made_ahead_as_far_as_the_queue_holds(scanned: Items) -> None:
    batch, asked = 4 * 2 * 3 * SIDE * SIDE * 4, []

    def source() -> Iterator[list[int]]:
        for number in range(9):
            asked.append(number)
            yield [number] * 4

    for room, ahead in ((1, 1), (2, 2), (100, loading.AHEAD)):
        asked.clear()
        with AugmentingLoader(scanned, augment(), queue_bytes=room * batch) as loader:
            for number, (ids, _) in enumerate(loader.stream(source())):
                assert ids.tolist() == [number] * 4
                assert len(asked) == min(number + ahead + 1, 9)


def test_a_stream_may_be_left_early(scanned: Items) -> None:
    before = threading.active_count()
    with AugmentingLoader(scanned, augment()) as loader:
        stream = loader.stream(itertools.cycle([np.arange(32)]))
        next(stream)
        stream.close()
        kept = loader.stream(itertools.cycle([np.arange(32)]))  # still open when the loader is closed
        next(kept)
    assert threading.active_count() == before


# what is wrong


def test_a_file_that_changed_since_the_scan_is_named(scanned: Items, jpegs: Path, tmp_path: Path) -> None:
    for path in scanned.column("path"):
        (tmp_path / path).write_bytes((jpegs / path).read_bytes())
    (tmp_path / "05.jpg").unlink()
    whole = (jpegs / "06.jpg").read_bytes()
    (tmp_path / "06.jpg").write_bytes(whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2))
    photo(64, 90, seed=4).save(tmp_path / "04.jpg")  # turned on its side
    sizes = scanned.table.set_column(
        scanned.table.schema.get_field_index("bytes"),
        "bytes",
        [[(tmp_path / path).stat().st_size if (tmp_path / path).exists() else 1 for path in scanned.column("path")]],
    )
    again = "has changed since it was scanned .*run the same command again"
    with AugmentingLoader(replace(scanned, root=str(tmp_path), table=sizes), augment()) as loader:
        for item, reason in ((5, "cannot be opened"), (6, "truncated|damaged"), (4, "another size than 90 × 64")):
            with pytest.raises(DataError, match=rf"{item:02d}\.jpg in .*{again}") as caught:
                loader.batch([1, item], 0)
            assert any(word in str(caught.value) for word in reason.split("|"))
        assert loader.batch([1], 0).shape == (2, 3, SIDE, SIDE)  # still of use


def test_plain_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    good, cut, text = tmp_path / "good.jpg", tmp_path / "cut.jpg", tmp_path / "text.jpg"
    photo(90, 60).save(good)
    cut.write_bytes(good.read_bytes()[:-300])
    text.write_text("hello")
    with AugmentingLoader([good, tmp_path / "none.jpg", cut, text], augment(), max_megapixels=0.01) as loader:
        assert loader.batch([0], 0).shape[0] == 2
        for item, reason in ((1, "none.jpg: cannot be opened"), (2, "cut.jpg: the file is truncated"), (3, "text.jpg: not an image")):
            with pytest.raises(DataError, match=reason):
                loader.batch([item], 0)
    with (
        AugmentingLoader([good], augment(), max_megapixels=0.001) as loader,
        pytest.raises(DataError, match=r"good\.jpg: too large: 90 × 60"),
    ):
        loader.batch([0], 0)


def test_settings_that_cannot_be_are_refused(scanned: Items) -> None:
    for options, message in (
        ({"views": 0}, "views: 0; expected at least 1"),
        ({"threads": 0}, "threads: 0; expected at least 1"),
        ({"queue_bytes": 0}, "queue_bytes: 0"),
        ({"cache_bytes": -1}, "a cache of -1 bytes"),
        ({"decode_bytes": 0}, "an allowance of 0 bytes"),
    ):
        with pytest.raises(UsageError, match=message):
            AugmentingLoader(scanned, augment(), **options)
    with pytest.raises(UsageError, match="an Augment on meta: the loader makes its views on the CPU"):
        AugmentingLoader(scanned, augment(device="meta"))
    with AugmentingLoader(scanned, augment(), queue_bytes=10_000) as loader:
        with pytest.raises(UsageError, match="a batch of 2 items, 2 views each, takes 27,648 bytes, queue_bytes is 10,000; raise it"):
            loader.batch([1, 2], 0)
        with pytest.raises(UsageError, match="a batch of 3 items"):
            next(loader.stream([[1, 2, 3]]))


def test_an_error_in_the_ids_reaches_the_reader(scanned: Items) -> None:
    def source() -> Iterator[list[int]]:
        yield [1]
        raise KeyError("mine")

    with AugmentingLoader(scanned, augment()) as loader, pytest.raises(KeyError, match="mine"):
        list(loader.stream(source()))
