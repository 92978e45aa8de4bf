"""Are objects found where they are? Boxes without labels on blood smears, beside plain saliency and plain feature k-means; the true boxes only judge.

    python benchmarks/objects.py BCCD --model hf:FOLDER [--self] [--every 3] [--side 448] [--photos FOLDER] [--pictures FOLDER] [--out FILE.json]

BCCD has JPEGImages/ and Annotations/ (VOC boxes of red cells, white cells and platelets). Every third image is taken, from the second on: the settings of
attar were chosen on every sixth, from the first on, which are none of these. White cells: CorLoc (the best box of an image has an IoU of at least 0.5 with
one), recall (any box has) and the mean over them of the best IoU. All cells: CorLoc, recall, precision of all boxes. 95 % bootstrap intervals over images.

The peers: spectral residual (Hou & Zhang 2007) and frequency-tuned saliency (Achanta et al. 2009), each cut at twice its mean into connected parts, and
k-means of the places of the same map, words rarer on the border than elsewhere being objects. Photographs have no true masks: they are only drawn.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from environment import record
from PIL import Image
from scipy.ndimage import gaussian_filter, label, uniform_filter

import attar
from attar.models import sources
from attar.pipeline import Run
from attar.stages.cluster.kmeans import fit_centroids
from attar.stages.cluster.space import squared_distances
from attar.stages.objects import discovery, masks
from attar.stages.objects.dense import Dense, sight
from attar.stages.objects.objects import PLACES, WORDS, Looker
from attar.stats import bootstrap

LEAST = 0.002


class Box(NamedTuple):
    x0: float
    y0: float
    x1: float
    y1: float


Boxes = list[Box]  # best first


def truth(file: Path) -> dict[str, Boxes]:
    """The boxes of a VOC file by name; boxes without area are left out."""
    found: dict[str, Boxes] = {}
    for one in ElementTree.parse(file).getroot().findall("object"):
        at = one.find("bndbox")
        assert at is not None
        box = Box(*(float(at.findtext(side, "0")) for side in ("xmin", "ymin", "xmax", "ymax")))
        if box.x1 > box.x0 and box.y1 > box.y0:
            found.setdefault(one.findtext("name", ""), []).append(box)
    return found


def overlaps(first: Sequence[Box], second: Sequence[Box]) -> np.ndarray:
    """IoU of every pair, (len(first), len(second))."""
    a, b = (np.asarray(boxes, np.float64).reshape(-1, 4) for boxes in (first, second))
    both = (np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])).clip(0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (a, b)]
    return both / (areas[0][:, None] + areas[1] - both)


def judge(found: Sequence[Boxes], true: Sequence[dict[str, Boxes]], rng: np.random.Generator) -> dict[str, list[float]]:
    """Every figure as value, low, high: means over images of shares within the image."""
    rows: dict[str, list[float]] = {
        name: [] for name in ("white corloc", "white recall", "white iou", "corloc", "recall", "precision", "boxes")
    }
    for boxes, by_name in zip(found, true):
        white, cells = by_name.get("WBC", []), [box for boxes_of in by_name.values() for box in boxes_of]
        if white:
            best = overlaps(boxes, white).max(0) if boxes else np.zeros(len(white))
            rows["white corloc"].append(float(bool(boxes) and overlaps(boxes[:1], white).max() >= 0.5))
            rows["white recall"].append(float((best >= 0.5).mean()))
            rows["white iou"].append(float(best.mean()))
        pairs = overlaps(boxes, cells) if boxes else np.zeros((1, len(cells)))
        rows["corloc"].append(float(pairs[0].max() >= 0.5))
        rows["recall"].append(float((pairs.max(0) >= 0.5).mean()))
        rows["precision"].append(float((pairs.max(1) >= 0.5).mean()))
        rows["boxes"].append(len(boxes))
    return {name: [round(float(x), 3) for x in (np.mean(values), *bootstrap(np.array(values), rng))] for name, values in rows.items()}


def spectral_residual(image: np.ndarray) -> np.ndarray:
    """Saliency (height, width) of pixels (height, width, 3): the log spectrum of the image at 64 pixels less its local mean, back in space, blurred."""
    small = np.asarray(Image.fromarray(image).convert("L").resize((64, 64), Image.Resampling.BILINEAR)).astype(np.float64)
    spectrum = np.fft.fft2(small)
    size = np.log(np.abs(spectrum) + 1e-9)
    residual = size - uniform_filter(size, 3)
    return masks.enlarge(gaussian_filter(np.abs(np.fft.ifft2(np.exp(residual + 1j * np.angle(spectrum)))) ** 2, 2.5), image.shape[:2])


def frequency_tuned(image: np.ndarray) -> np.ndarray:
    """Saliency: distance of every blurred pixel to the mean colour of the image, in Lab."""
    bytes_ = np.asarray(Image.fromarray(image).convert("LAB"))
    lab = np.concatenate([bytes_[..., :1], bytes_[..., 1:] ^ 128], 2).astype(np.float64)
    return np.linalg.norm(gaussian_filter(lab, (1, 1, 0)) - lab.mean((0, 1)), axis=2)


def parts(saliency: np.ndarray, inside: np.ndarray, size: tuple[int, int]) -> Boxes:
    """Boxes around the connected parts of a mask in an image of (height, width), by mean saliency."""
    pieces, count = label(inside)
    found = []
    for number in range(1, count + 1):
        piece = pieces == number
        if piece.sum() >= LEAST * piece.size:
            x, y, width, height = masks.box_of(piece)
            across, down = size[1] / piece.shape[1], size[0] / piece.shape[0]
            found.append((float(saliency[piece].mean()), Box(x * across, y * down, (x + width) * across, (y + height) * down)))
    return [box for _, box in sorted(found, reverse=True)]


def by_saliency(files: Sequence[Path], of: Callable[[np.ndarray], np.ndarray]) -> list[Boxes]:
    found = []
    for file in files:
        with Image.open(file) as image:
            size, small = image.size, image.convert("RGB")
        small.thumbnail((224, 224))
        saliency = of(np.asarray(small))
        found.append(parts(saliency, saliency > 2 * saliency.mean(), size[::-1]))
    return found


def by_kmeans(root: Path, side: int) -> list[Boxes]:
    """The peer from features: unit features of the map as the model gives it, k-means, words rarer on the border."""
    run = Run(root)
    items, model = run["scan"], run["embed"].model
    network = sources.network(model)
    look = sight(model, network, side, "")
    looker = Looker(items, look._replace(dense=Dense(network, look.dense.layer, {}, margin=0)), 1)
    rng, drawn, edge = np.random.default_rng(0), [], []
    for _, _, places in looker.stream(items.ids()[::2]):
        flat = _unit(places)
        chosen = rng.permutation(len(flat))[:PLACES]
        drawn.append(flat[chosen])
        edge.append(discovery.ring(*places.shape[:2]).ravel()[chosen])
    values, border = np.concatenate(drawn), np.concatenate(edge)
    centres = fit_centroids(values, WORDS, rng)
    word = squared_distances(values, centres).argmin(1)
    shares = [np.bincount(word[part], minlength=len(centres)) / part.sum() for part in (border, ~border)]
    front, found = shares[0] < shares[1], {}
    for item, _, places in looker.stream(items.ids()):
        squared = squared_distances(_unit(places), centres)
        inside = front[squared.argmin(1)].reshape(places.shape[:2])
        grid = 32  # pixels a place: boxes of whole places
        found[item] = parts(np.kron(inside, np.ones((grid, grid))), np.kron(inside, np.ones((grid, grid))) > 0, _size(items, item))
    return [found[item] for item in sorted(found)]


def _unit(places: np.ndarray) -> np.ndarray:
    flat = places.reshape(-1, places.shape[2])
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


def _size(items: Any, item: int) -> tuple[int, int]:
    return int(items.column("height")[item]), int(items.column("width")[item])


def by_attar(root: Path, data: Path, **settings: Any) -> tuple[list[Boxes], bytes]:
    """Boxes of each file in the order of their names, best first, and the contact sheet."""
    found = attar.objects(root, data=str(data), **settings)
    boxes: list[Boxes] = [[] for _ in range(found.images.num_rows)]
    for table in found.batches():
        for row in table.to_pylist():
            boxes[row["item"]].append(Box(row["x"], row["y"], row["x"] + row["width"], row["y"] + row["height"]))
    return boxes, found.sheet


def arms(
    files: Sequence[Path], data: Path, home: Path, given: argparse.Namespace
) -> dict[str, Callable[[], tuple[list[Boxes], bytes | None]]]:
    """Everything that is compared, by name."""
    first = {"model": given.model, "objects_side": given.side}
    made: dict[str, Callable[[], tuple[list[Boxes], bytes | None]]] = {
        "spectral residual": lambda: (by_saliency(files, spectral_residual), None),
        "frequency-tuned": lambda: (by_saliency(files, frequency_tuned), None),
        "attar, normalised cuts": lambda: by_attar(home / "given", data, **first),
        "feature k-means": lambda: (by_kmeans(home / "given", given.side), None),
        "attar, normalised cuts, parts never cut": lambda: by_attar(home / "given", data, **first, objects_neck=0),
        "attar, visual words": lambda: by_attar(home / "given", data, **first, objects_neck=0.7, objects_method="words"),
        "attar, rarest place": lambda: by_attar(home / "given", data, **first, objects_neck=0.7, objects_method="lost"),
    }
    if given.self:
        made["attar, normalised cuts, self"] = lambda: by_attar(home / "self", data, model="self", objects_side=given.side)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--self", action="store_true", help="also an encoder learned from the images themselves")
    parser.add_argument("--every", type=int, default=3)
    parser.add_argument("--side", type=int, default=448)
    parser.add_argument("--photos", type=Path, help="photographs to draw the objects of")
    parser.add_argument("--pictures", type=Path, help="folder for the contact sheets")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    chosen = sorted((given.data / "JPEGImages").iterdir())[1 :: given.every]
    true = [truth(given.data / "Annotations" / f"{file.stem}.xml") for file in chosen]
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        home, sheets = Path(folder), {}
        data = home / "cells"
        data.mkdir()
        for file in chosen:
            (data / file.name).symlink_to(file.resolve())
        attar.embed(home / "given", data=str(data), model=given.model)  # so that no arm is charged with it
        for name, arm in arms(chosen, data, home, given).items():
            start = time.perf_counter()
            boxes, sheet = arm()
            seconds = round((time.perf_counter() - start) / len(chosen), 3)
            rows[name] = judge(boxes, true, np.random.default_rng(0)) | {"seconds an image": seconds}
            sheets |= {name: sheet} if sheet else {}
            print(
                f"{name:42}",
                *(
                    f"{key} {value[0]:.2f} ({value[1]:.2f} to {value[2]:.2f})"
                    for key, value in rows[name].items()
                    if key != "seconds an image"
                ),
                f"{seconds} s",
                flush=True,
            )
        if given.photos:
            sheets["photos"] = by_attar(home / "photos", given.photos, model=given.model, objects_side=given.side, objects_neck=0)[1]
        if given.pictures:
            given.pictures.mkdir(parents=True, exist_ok=True)
            for name, sheet in sheets.items():
                (given.pictures / f"{name.replace(', ', '-').replace(' ', '-')}.png").write_bytes(sheet)
    record(given, images=len(chosen), rows=rows)


if __name__ == "__main__":
    main()
