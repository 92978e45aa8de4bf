"""Objects: kernels on made maps against slow references, the stage on made images, the COCO file, and crops that keep the foreground."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import hf_folder
from PIL import Image, ImageDraw
from scipy.linalg import eigh
from torch import nn

import attar
from attar.cli import main
from attar.config import Data, ModelChoice, build_config
from attar.config import Objects as Settings
from attar.errors import DataError, ModelError, UsageError
from attar.models import sources
from attar.models.network import Network
from attar.records import Dial, Items, Model, Preprocess, Vectors
from attar.stages.augment import engine
from attar.stages.augment.loading import AugmentingLoader
from attar.stages.augment.plan import sample
from attar.stages.objects import discovery, masks
from attar.stages.objects.dense import Dense, layers, sight
from attar.stages.objects.objects import Side, Space, find, objects, settle, sort_kinds
from attar.stages.scan import scan
from attar.workspace import Job

BLOB = (slice(3, 7), slice(5, 11))


def planted(rows: int = 12, columns: int = 16, seed: int = 0, noise: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Unit features (rows · columns, 8) that differ inside BLOB, and the mask of it."""
    rng = np.random.default_rng(seed)
    inside = np.zeros((rows, columns), bool)
    inside[BLOB] = True
    directions = np.array([[1, 0], [-0.6, 0.8]]) @ np.linalg.qr(rng.standard_normal((8, 2)))[0].T  # about the mean of all images: apart
    values = directions[inside.ravel().astype(int)] + noise * rng.standard_normal((rows * columns, 8)) / np.sqrt(8)
    return values / np.linalg.norm(values, axis=1, keepdims=True), inside


def disc(height: int, width: int, y: float, x: float, radius: float) -> np.ndarray:
    down, across = np.mgrid[:height, :width]
    return np.hypot(down - y, across - x) < radius


# kernels


@pytest.mark.parametrize("seed", range(3))
def test_the_second_vector_is_that_of_a_dense_generalised_solver(seed: int) -> None:
    weights = discovery.graph(planted(6, 9, seed, noise=1.5)[0], 0.2)
    degree = np.diag(weights.sum(1))
    values, vectors = eigh(degree - weights, degree)
    slow = vectors[:, 1] / np.linalg.norm(vectors[:, 1])
    fast = discovery.second_vector(weights)
    assert values[2] - values[1] > 1e-3, "the comparison needs one vector, not a plane of them"
    assert abs(abs(slow @ fast) - 1) < 1e-4
    assert fast[np.abs(fast).argmax()] > 0
    assert np.array_equal(fast, discovery.second_vector(weights))


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_second_vector_of_a_handful_of_places(n: int) -> None:
    weights = discovery.graph(np.random.default_rng(n).standard_normal((n, 4)), 0.0) + 0.1 * np.eye(n)
    degree = np.diag(weights.sum(1))
    slow = eigh(degree - weights, degree)[1][:, 1]
    assert discovery.second_vector(weights).shape == (n,)
    fast = discovery.second_vector(weights)
    rayleigh = [float(v @ (degree - weights) @ v / (v @ degree @ v)) for v in (slow, fast)]
    assert rayleigh[1] == pytest.approx(rayleigh[0], abs=1e-5)


@pytest.mark.parametrize("method", ["cut", "lost"])
@pytest.mark.parametrize("seed", range(4))
def test_a_planted_blob_is_found(method: str, seed: int) -> None:
    features, inside = planted(seed=seed)
    part = discovery.token_cut(features, inside.shape, 0.2) if method == "cut" else discovery.lost(features, inside.shape, 20)
    assert part is not None
    assert np.array_equal(part.inside, inside)
    assert part.strength[inside].min() > 0.5 >= part.strength[~inside].max()
    assert 0 <= part.strength.min() <= part.strength.max() <= 1


@pytest.mark.parametrize("features", [np.ones((20, 3)) / np.sqrt(3), np.eye(20)])
def test_nothing_stands_out_where_all_places_are_alike_or_all_differ(features: np.ndarray) -> None:
    assert discovery.token_cut(features, (4, 5), 0.2) is None
    assert discovery.lost(features, (4, 5)) is None


def test_all_images_together_decide_what_stands_in_front() -> None:
    """In a third of the images the object is cut off by the frame, so that by itself it would be taken for what lies behind."""
    directions = np.eye(2)
    sides, alone = [], []
    for number in range(12):
        inside = np.zeros((8, 8), bool)
        inside[2:6, 2:6] = True
        if number % 3 == 0:
            inside = np.zeros((8, 8), bool)
            inside[:, :2] = inside[:2] = True
        features = directions[inside.ravel().astype(int)]
        alone.append(discovery.token_cut(features, (8, 8), 0.5).inside.sum() == inside.sum())  # type: ignore[union-attr]
        side = discovery.halve(features, 0.5) > 0  # type: ignore[operator]
        counts = np.array(
            [
                [(~side & ~inside.ravel()).sum(), (~side & inside.ravel()).sum()],
                [(side & ~inside.ravel()).sum(), (side & inside.ravel()).sum()],
            ]
        )
        sides.append(Side(discovery.enclosed(side.reshape(8, 8)), discovery.difference(features, side), counts))
    assert not all(alone)
    blank = Space(np.zeros(2), np.eye(2), np.zeros(2), discovery.Words(np.zeros((1, 2)), np.zeros(1, bool)))
    space = settle(blank, directions, sides)
    assert space.figure[1] > 0 > space.figure[0]
    assert space.words.front.tolist() == [False, True]
    inside = np.zeros((8, 8), bool)
    inside[:, :2] = True
    part = discovery.token_cut(directions[inside.ravel().astype(int)], (8, 8), 0.5, space.figure)
    assert part is not None
    assert np.array_equal(part.inside, inside)
    words = discovery.word_part(directions[inside.ravel().astype(int)], (8, 8), space.words)
    assert words is not None
    assert np.array_equal(words.inside, inside)


def test_the_guided_filter_is_the_slow_one_and_follows_edges() -> None:
    rng = np.random.default_rng(0)
    guide, values, r, floor = rng.random((9, 11, 3)), rng.random((9, 11)), 1, 1e-2
    padded_guide, padded = np.pad(guide, ((2, 2), (2, 2), (0, 0)), mode="symmetric"), np.pad(values, 2, mode="symmetric")
    slopes, rests = np.zeros((11, 13, 3)), np.zeros((11, 13))
    for y in range(11):
        for x in range(13):
            ys, xs = np.clip([y, y + 2 * r + 1], 0, 13), np.clip([x, x + 2 * r + 1], 0, 15)
            colours, level = padded_guide[ys[0] : ys[1], xs[0] : xs[1]].reshape(-1, 3), padded[ys[0] : ys[1], xs[0] : xs[1]].ravel()
            spread = np.cov(colours.T, bias=True) + floor * np.eye(3)
            slopes[y, x] = np.linalg.solve(spread, (colours * level[:, None]).mean(0) - colours.mean(0) * level.mean())
            rests[y, x] = level.mean() - slopes[y, x] @ colours.mean(0)
    inner = np.s_[1:-1, 1:-1]  # at the border windows of windows are mirrored, not made of mirrored pixels
    slow = np.zeros((9, 11))
    for y in range(9):
        for x in range(11):
            slow[y, x] = slopes[y : y + 3, x : x + 3].mean((0, 1)) @ guide[y, x] + rests[y : y + 3, x : x + 3].mean()
    assert np.allclose(masks.guided(guide, values, r, floor)[inner], slow[inner], atol=1e-9)
    truth = disc(64, 64, 30, 34, 15)
    coarse = masks.enlarge(masks.shares(truth, (8, 8)), (64, 64))
    fine = masks.guided(np.where(truth[..., None], [0.8, 0.2, 0.2], [0.1, 0.4, 0.7]), coarse, 6, 1e-3)
    wrong = [int(((values > 0.5) ^ truth).sum()) for values in (coarse, fine)]
    assert wrong[1] < wrong[0] / 3


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_run_lengths_and_shares_keep_every_pixel(height: int, width: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < 0.4
    counts = masks.counts_of(mask)
    assert np.array_equal(masks.mask_of(counts, mask.shape), mask)
    assert counts.sum() == mask.size
    assert counts[1::2].sum() == mask.sum()
    assert (counts[1:] > 0).all()
    shares = masks.shares(mask, (5, 3))
    assert shares.mean() == pytest.approx(mask.mean())
    assert np.allclose(masks.shares(mask, mask.shape), mask)
    big = masks.resize(mask, (3 * height + 1, 2 * width))
    assert big.any() == mask.any()
    assert np.array_equal(masks.resize(mask, mask.shape), mask)


def test_touching_discs_are_cut_at_their_neck_and_a_bar_is_not() -> None:
    both = disc(60, 100, 30, 30, 20) | disc(60, 100, 30, 66, 20)
    found = masks.separate(both, 20, 0.8)
    assert len(found) == 2
    assert not (found[0] & found[1]).any()
    assert np.array_equal(found[0] | found[1], both)
    assert {masks.box_of(part)[0] < 30 for part in found} == {True, False}
    assert len(masks.separate(both, 20, 0.0)) == 1, "0 never cuts"
    bar = np.zeros((40, 90), bool)
    bar[10:30, 5:85] = True
    assert len(masks.separate(bar, 20, 0.7)) == 1
    bar[0, 0] = True
    assert len(masks.separate(bar, 2, 0.7)) == 1, "the single pixel is too small"
    ring = disc(60, 60, 30, 30, 20) & ~disc(60, 60, 30, 30, 4)
    assert masks.separate(ring, 20, 0.0)[0][30, 30], "a small hole is filled"


def test_contact_tells_what_the_frame_cuts_off() -> None:
    assert masks.contact(disc(40, 40, 20, 20, 8)) == 0
    assert masks.contact(np.ones((6, 6), bool)) == 1
    assert 0.1 < masks.contact(disc(40, 40, 0, 20, 8)) < 0.6


def test_the_odd_colour_is_told() -> None:
    image = np.full((20, 30, 3), (220, 210, 200), np.uint8)
    red, grey = disc(20, 30, 10, 8, 4), disc(20, 30, 10, 22, 4)
    image[red], image[grey] = (200, 30, 40), (200, 190, 180)
    lab = discovery.to_lab(image)
    assert np.abs(lab[10, 8] - np.array([44 * 2.55, 64, 40])).max() < 12, "CIE Lab of that red, within Pillow's rounding and white point"
    assert 0 < discovery.colourful(lab, grey) < discovery.colourful(lab, red) < 1
    assert discovery.colourful(discovery.to_lab(np.full((4, 4, 3), 90, np.uint8)), np.ones((4, 4), bool)) == 0


def test_kinds_are_as_many_as_lie_apart() -> None:
    rng = np.random.default_rng(0)
    centres = np.linalg.qr(rng.standard_normal((16, 3)))[0].T
    vectors = centres[np.arange(90) % 3] + 0.02 * rng.standard_normal((90, 16))
    assert len(sort_kinds(vectors, 0, np.random.default_rng(1))) == 3
    assert len(sort_kinds(vectors, 5, np.random.default_rng(1))) == 5
    assert len(sort_kinds(vectors[:5], 0, np.random.default_rng(1))) == 1, "too few to tell"
    assert len(sort_kinds(rng.standard_normal((200, 16)), 0, np.random.default_rng(1))) == 1, "nothing lies apart"


# maps of models


class Flat(nn.Module):
    """A perceptron on pixels: nothing in it has a place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 32 * 32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1))


def test_a_model_without_a_map_and_a_layer_that_is_none_are_refused(items: Items, job: Callable[..., Job]) -> None:
    flat = Model(source={"kind": "module"}, state={}, preprocess=Preprocess(size=(32, 32)), lineage=("source Flat",))
    with pytest.raises(ModelError, match=r"Flat: no layer's output is spread over the image.*name one that does with --objects-layer"):
        sight(flat, Network(Flat()), 64, "")
    frozen = replace(flat, source={"kind": "onnx"})
    with pytest.raises(ModelError, match="a frozen ONNX file shows none of its inner layers"):
        sight(frozen, Network(Flat()), 64, "")
    model = sources.resolve(ModelChoice(model="self"), items, 8, job())
    with pytest.raises(ModelError, match=r"objects_layer: 'nowhere' gives self no map.*that do: stages.0 \(map, a place every 1 pixels\)"):
        sight(model, sources.network(model), 64, "nowhere")


@pytest.mark.parametrize(("kind", "tokens"), [("vit", 1), ("dinov2", 1), ("resnet", -1), ("mobilenet", -1), ("convnext", -1)])
def test_maps_of_transformers_models_at_other_sizes(kind: str, tokens: int, tmp_path: Path, items: Items, job: Callable[..., Job]) -> None:
    folder = hf_folder(tmp_path / kind, kind, classifier=kind != "dinov2")
    model = sources.resolve(ModelChoice(model=f"hf:{folder}"), items, 8, job())
    network = sources.network(model)
    look = sight(model, network, 64, "")
    assert look.dense.layer.prefix == tokens
    assert look.note == ""
    height, width = look.size_of(100, 200)
    assert height < width
    assert height % look.step == width % look.step == 0
    assert abs(height * width / 64**2 - 1) < 0.5
    features = look.dense(torch.rand(2, 3, height, width))
    assert features.shape == (2, height // look.step, width // look.step, look.dense.layer.channels)
    assert torch.isfinite(features).all()
    alike, other = torch.full((1, 3, height, width), 0.5), torch.rand(1, 3, height, width)
    assert torch.allclose(look.dense(torch.cat([alike, other]))[:1], look.dense(alike), atol=1e-4), "rows do not depend on each other"


def test_tokens_are_in_the_places_of_their_patches(tmp_path: Path, items: Items, job: Callable[..., Job]) -> None:
    """A change in one patch changes its own token most."""
    model = sources.resolve(ModelChoice(model=f"hf:{hf_folder(tmp_path / 'vit', 'vit', classifier=False)}"), items, 8, job())
    look = sight(model, sources.network(model), 48, "")
    plain = torch.zeros(1, 3, 48, 64)
    changed = plain.clone()
    changed[:, :, 8:16, 40:48] = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0)) * 3
    moved = (look.dense(changed) - look.dense(plain)).norm(dim=3)[0]
    assert moved.shape == (6, 8)
    assert divmod(int(moved.argmax()), 8) == (1, 5)


class Fixed(nn.Module):
    """Tokens whose positions are learned for one size alone."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.places = nn.Conv2d(3, 8, 8, 8), nn.Parameter(torch.randn(1, 16, 8))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.patches(x).flatten(2).transpose(1, 2) + self.places).mean(1))


def test_a_model_of_one_size_is_shown_that_size_and_it_is_said() -> None:
    model = Model(source={"kind": "module"}, state={}, preprocess=Preprocess(size=(32, 32)), lineage=("source Fixed",))
    look = sight(model, Network(Fixed()), 64, "")
    assert look.size_of(100, 300) == (32, 32)
    assert look.note == "Fixed takes no other size than 32 pixels: objects are looked for at that, 4 places across"
    assert look.dense(torch.rand(1, 3, 32, 32)).shape == (1, 4, 4, 8)


def test_the_border_of_a_map_is_not_spoilt_by_zeros(items: Items, job: Callable[..., Job]) -> None:
    """A constant image has a constant map: the input is continued beyond its edges."""
    model = sources.resolve(ModelChoice(model="self"), items, 8, job())
    look = sight(model, sources.network(model), 64, "")
    assert look.dense(torch.full((1, 3, 64, 96), 0.7)).flatten(1, 2).std(1).max() < 1e-4
    bare = Dense(sources.network(model), look.dense.layer, {}, margin=0)
    assert bare(torch.full((1, 3, 64, 96), 0.7)).flatten(1, 2).std(1).max() > 1e-3, "as it would be without"
    assert len(layers(sources.network(model).body, 40)) > 2


# the stage


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images of dark discs on a bright ground, and a blank one; discs.json says where they are."""
    folder, truth = tmp_path_factory.mktemp("cells"), {}
    for number in range(24):
        rng = np.random.default_rng(number)
        size = (160, 120) if number % 3 else (120, 160)
        pixels = Image.fromarray(rng.normal((205, 200, 190), 4, (*size[::-1], 3)).clip(0, 255).astype(np.uint8))
        boxes: list[tuple[float, ...]] = []
        while len(boxes) < 3:
            r, x, y = rng.uniform(13, 18), rng.uniform(24, size[0] - 24), rng.uniform(24, size[1] - 24)
            if all(np.hypot(x - (b[0] + b[2]) / 2, y - (b[1] + b[3]) / 2) > 46 for b in boxes):
                boxes.append((x - r, y - r, x + r, y + r))
                ImageDraw.Draw(pixels).ellipse(boxes[-1], fill=(150, 60, 60) if len(boxes) > 1 else (70, 60, 150))
        pixels.save(folder / f"{number:02d}.png")
        truth[f"{number:02d}.png"] = boxes
    Image.new("RGB", (100, 100), (90, 90, 90)).save(folder / "blank.png")
    (folder.parent / "discs.json").write_text(json.dumps(truth))
    return folder


def iou(box: list[float], other: list[float]) -> float:
    low, high = np.maximum(box[:2], other[:2]), np.minimum(box[2:], other[2:])
    area = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, other)]
    both = float((high - low).clip(0).prod())
    return both / (sum(area) - both)


@pytest.fixture(scope="module")
def done(cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The run folder in which the discs were looked for, and what was found; not to be changed."""
    root = tmp_path_factory.mktemp("objects") / "run"
    found = attar.objects(root, data=str(cells), quiet=True, self_steps=8, self_width=8, batch_size=16, objects_side=192)
    return root, found


def test_discs_are_found_and_the_coco_file_says_the_same(cells: Path, done: Any) -> None:
    root, found = done
    body = json.loads((root / "objects" / "objects.json").read_text())
    images, notes = {one["id"]: one for one in body["images"]}, body["annotations"]
    assert len(images) == 25
    assert len({one["id"] for one in notes}) == len(notes) == found.count > 0
    assert {one["category_id"] for one in notes} == {one["id"] for one in body["categories"]}
    for one in notes:
        image, (x, y, width, height) = images[one["image_id"]], one["bbox"]
        assert 0 <= x < x + width <= image["width"]
        assert 0 <= y < y + height <= image["height"]
        size = tuple(one["segmentation"]["size"])
        assert size == (image["height"], image["width"])
        mask = masks.mask_of(np.array(one["segmentation"]["counts"]), size)
        assert mask.sum() == one["area"]
        assert masks.box_of(mask) == (x, y, width, height)
        assert 0 <= one["score"] <= 1
    truth = json.loads((cells.parent / "discs.json").read_text())
    boxes = {
        image["file_name"]: [[x, y, x + w, y + h] for x, y, w, h in (n["bbox"] for n in notes if n["image_id"] == image["id"])]
        for image in images.values()
    }
    hits = [max([iou(box, disc) for box in boxes[name]], default=0) > 0.5 for name, discs in truth.items() for disc in discs]
    assert np.mean(hits) > 0.7, f"{np.mean(hits):.2f} of the discs"
    assert boxes["blank.png"] == []
    assert found.foreground().shape == (25, 4)
    blank = next(one["id"] for one in images.values() if one["file_name"] == "blank.png")
    assert np.isnan(found.foreground()[blank]).all()
    with Image.open(io.BytesIO(found.sheet)) as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 600


def test_the_command_line_and_other_methods(done: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(done[0], tmp_path / "run")
    flags = ["--quiet", "--objects-side", "96"]
    for method in ("words", "lost"):
        assert main(["objects", str(tmp_path / "run"), *flags, "--objects-method", method, "--object-kinds", "2", "--json"]) == 0
        body = json.loads(capsys.readouterr().out)
        assert Path(body["coco"]).is_file()
        assert Path(body["sheet"]).is_file()
        assert len(body["kinds"]) == 2
        assert sum(kind["objects"] for kind in body["kinds"]) == body["objects"]
    assert main(["objects", str(tmp_path / "run"), *flags, "--objects-least", "0.99"]) == 1
    assert "no object stands out in any of 25 images; lower --objects-least" in capsys.readouterr().err


def test_an_interrupted_search_goes_on_where_it_stopped(cells: Path, job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    from attar.stages.objects import objects as stage

    items = scan(Data(data=str(cells)), job("scan"))
    model = sources.resolve(ModelChoice(model="self"), items, 8, job("model"))
    vectors = Vectors(shards=(), count=0, dim=0, model=model)
    monkeypatch.setattr(stage, "SHARD", 10)
    monkeypatch.setattr(stage, "SAMPLED", 6)
    want = build_config({"data": "x", "objects_side": 96}).objects
    first, half = (Job("objects", job().folder / name, quiet=True) for name in ("whole", "half"))
    whole = objects(items, vectors, want, first)
    real, calls = stage._shard, []

    def failing(*given: Any) -> Any:
        calls.append(given[2])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(stage, "_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        objects(items, vectors, want, half)
    rest = objects(items, vectors, want, half)
    assert [len(ids) for ids in calls] == [10, 10, 10, 5], "the first shard was not done again"
    assert [table.to_pylist() for table in rest.batches()] == [table.to_pylist() for table in whole.batches()]


def test_all_blank_images_are_refused(tmp_path: Path, job: Callable[..., Job]) -> None:
    for number in range(24):
        Image.new("RGB", (40, 40), (10 * number, 90, 90)).save(tmp_path / f"{number}.png")
    items = scan(Data(data=str(tmp_path)), job("scan"))
    model = sources.resolve(ModelChoice(model="self"), items, 8, job("model"))
    with pytest.raises(DataError, match="no object stands out in any of 24 images"):
        objects(items, Vectors(shards=(), count=0, dim=0, model=model), Settings(objects_side=64), job("objects"))


def test_a_single_place_has_no_objects() -> None:
    space = Space(
        np.zeros(4, np.float32),
        np.eye(4, dtype=np.float32),
        np.ones(4, np.float32),
        discovery.Words(np.eye(4)[:2], np.array([True, False])),
    )
    image = np.random.default_rng(0).integers(0, 255, (20, 20, 3)).astype(np.uint8)
    for method in ("cut", "lost"):
        assert find(image, np.ones((1, 1, 4), np.float32), space, Settings(objects_method=method)) == []


# crops that keep the foreground

CROP = {"resized_crop": Dial(1.0, 1.0)}


@given(st.integers(0, 2**31), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_crops_overlap_their_boxes_by_the_share_asked_for(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(20, 300, (16, 2))
    low = rng.random((16, 2)) * 0.8
    high = low + 0.02 + rng.random((16, 2)) * (0.98 - low)
    boxes = np.concatenate([low, high], 1) * sizes[:, [1, 0, 1, 0]]
    plan = sample([CROP] * 16, np.random.default_rng(seed), sizes, (32, 48), boxes=boxes, box_share=share)
    free = sample([CROP] * 16, np.random.default_rng(seed), sizes, (32, 48))
    for view in range(16):
        edges = (plan.matrix[view] @ np.array([[0, 48], [0, 32], [1, 1]]))[:2]
        sides, box = edges[:, 1] - edges[:, 0], boxes[view].reshape(2, 2).T
        both = (np.minimum(edges[:, 1], box[:, 1]) - np.maximum(edges[:, 0], box[:, 0])).clip(0)
        most = np.minimum(sides, box[:, 1] - box[:, 0])
        assert both.prod() >= share * most.prod() - 1e-6
        assert (edges[:, 0] >= -1e-6).all()
        assert (edges[:, 1] <= sizes[view][::-1] + 1e-6).all()
    assert np.array_equal(plan.drawn["resized_crop"][:, :3], free.drawn["resized_crop"][:, :3]), "only the place is moved"
    again = sample([CROP] * 16, np.random.default_rng(seed), sizes, (32, 48), boxes=np.full((16, 4), np.nan), box_share=share)
    assert np.array_equal(again.matrix, free.matrix), "without boxes nothing is moved"


def test_what_was_drawn_gives_the_crop_again() -> None:
    """The parameters of a plan stay those of the crop that was made: they go through the catalogue's own formula."""
    sizes, boxes = [(100, 200)] * 30, np.tile([150.0, 10, 190, 60], (30, 1))
    plan = sample([CROP] * 30, np.random.default_rng(0), sizes, (64, 64), boxes=boxes, box_share=1.0)
    area, aspect, own, x, y = plan.drawn["resized_crop"].T
    goal, ratio = aspect * 2.0**own, 2.0
    width, height = np.minimum(np.sqrt(area * goal / ratio), 1), np.minimum(np.sqrt(area * ratio / goal), 1)
    assert np.allclose(plan.matrix[:, 0, 2], 200 * (1 - width) * x)
    assert np.allclose(plan.matrix[:, 1, 2], 100 * (1 - height) * y)
    assert ((x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)).all()


def test_boxes_go_through_augment_and_the_loader(cells: Path, job: Callable[..., Job]) -> None:
    images = [np.zeros((80, 100, 3), np.uint8) for _ in range(6)]
    for image in images:
        image[50:70, 70:95] = 255
    boxes = np.tile([70.0, 50, 95, 70], (6, 1))
    views = {share: attar.Augment(CROP, 32, seed=3, box_share=share)(images, views=4, step=0, boxes=boxes) for share in (0.0, 1.0)}
    seen = {share: (made.amax((1, 2, 3)) > 0.9).float().mean() for share, made in views.items()}
    assert seen[1.0] == 1
    assert torch.equal(
        attar.Augment(CROP, 32, seed=3)(images, step=0), attar.Augment(CROP, 32, seed=3)(images, step=0, boxes=np.full((6, 4), np.nan))
    )
    items = scan(Data(data=str(cells)), job("scan"))
    own = np.tile([40.0, 30, 80, 90], (len(items), 1))
    aug = attar.Augment(CROP, 32, seed=1)
    sizes = np.stack([items.column("height"), items.column("width")], 1)
    with AugmentingLoader(items, aug, boxes=own) as held, AugmentingLoader(items, aug) as free:
        first, other = held.batch([3, 1], 0), free.batch([3, 1], 0)
    assert not torch.equal(first, other)
    plans = [aug.plan(sizes[[3, 1]], step=0, views=2, boxes=own[[3, 1]]), aug.plan(sizes[[3, 1]], step=0, views=2)]
    assert not np.array_equal(plans[0].matrix, plans[1].matrix)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"boxes": np.zeros((2, 4))}, r"boxes have shape \(2, 4\). Expected \(1, 4\)"),
        ({"boxes": [[5, 5, 5, 9]]}, r"boxes\[0\] is \[5.0, 5.0, 5.0, 9.0\]. Expected x0 < x1 and y0 < y1"),
        ({"boxes": "left"}, "boxes are str. Expected numbers x0, y0, x1, y1"),
    ],
)
def test_boxes_that_are_none_are_refused(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        engine.Augment(CROP, 32)([np.zeros((9, 9, 3), np.uint8)], **given)
    with pytest.raises(UsageError, match=r"box_share is 2\. Expected a share from 0 to 1"):
        engine.Augment(CROP, 32, box_share=2)
