"""A library of augmentations in a process of its own, asked in JSON lines (runtimes.py has the asking side); benchmarks/augment.py compares them.

    python augment_peers.py attar|opencv|albumentations|fuse|kornia|torchvision THREADS CORES

Needs numpy and the library alone, so it may be another Python environment's. Every workload takes uint8 photos and gives float32 (n, 3, 224, 224),
(value / 255 - 0.5) / 0.5, in a fresh array. What differs between the libraries, and is left to each as it is:

- Where they draw: attar, OpenCV by hand, Albumentations and fuse-augmentations one photo at a time, Kornia a batch at a time with parameters of each
  photo, torchvision one photo at a time because a batch shares its parameters there. Tensors are made before the clock starts.
- Brightness: Albumentations' fastest adds, the others multiply. Contrast turns about mid grey (attar, OpenCV), the photo's mean (the others).
- Hue: attar and OpenCV by hand turn the chroma plane of YIQ, a matrix; the others go through HSV.
- Perspective and warps: equal families, ranges as near as the arguments allow. Elastic: a 5 x 5 grid where there is one (Albumentations'
  GridDistortion, thin plates in Kornia), displacement of every pixel in torchvision.
- Shrinking: bilinear without antialiasing everywhere; attar takes means of boxes where it shrinks by two or more.
- Blur: sigma up to 2 pixels; kernels of 13 pixels where the library does not choose them by sigma.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TextIO

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
import numpy as np

SIDE = 224
TURN_SECONDS = 0.03  # a turn lasts at least this, so that the clock's grain and single interrupts do not show
BLUR = 2.0
FULL = {
    "resized_crop": 1.0,  # 8 to 100 % of the area, 3:4 to 4:3
    "horizontal_flip": (1.0, 0.5),
    "rotate": 0.5,  # ±15°
    "scale": 0.2,  # 0.87 to 1.15
    "shear": 1 / 3,  # ±10°
    "translate": 1 / 3,  # ±0.1
    "brightness": 0.5,  # 0.6 to 1.4
    "contrast": 0.5,
    "saturation": 0.5,
    "hue": 0.5,  # ±0.1 turns
}
CROP = {"resized_crop": 1.0, "horizontal_flip": (1.0, 0.5)}
DEGREES, SCALE, SHEAR, TRANSLATE = 15.0, (0.87, 1.15), (-10.0, 10.0), 0.1
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
SINGLES = (
    "horizontal_flip", "vertical_flip", "quarter_turn", "rotate", "scale", "shear", "translate", "resized_crop", "perspective", "spherical",
    "barrel", "elastic", "brightness", "contrast", "saturation", "hue", "gamma", "grey", "channel_shuffle", "invert", "posterise", "solarise",
    "equalise", "blur", "sharpen", "noise", "jpeg", "erase",
)  # fmt: skip
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
Call = Callable[[Any], Any]


class Side(NamedTuple):
    version: str
    prepare: Call  # uint8 (n, height, width, 3) → photos as the library wants them, before the clock starts
    workloads: Mapping[str, Call]  # photos → float32 (n, 3, 224, 224)


def plain(photos: np.ndarray) -> list[np.ndarray]:
    return [np.ascontiguousarray(photo) for photo in photos]


def open_attar(threads: int) -> Side:
    import attar
    from attar import Augment

    def one(policy: Mapping[str, Any]) -> Call:
        return Augment(policy, size=SIDE, threads=threads)

    singles = {name: one({name: 0.3 if name == "blur" else 1.0}) for name in SINGLES}
    return Side(attar.__version__, plain, {"full": one(FULL), "crop": one(CROP), "loader": _loader(one(FULL))} | singles)


def _loader(augment: Call, workers: int = 4) -> Call:
    """Batches through torch's DataLoader with worker processes, each on one thread: as many batches a call as there are workers."""
    kept: list[Any] = []

    def call(photos: Sequence[np.ndarray]) -> Any:
        if not kept:
            from torch.utils.data import DataLoader

            batches: Any = _Batches(augment, photos)
            kept.append(iter(DataLoader(batches, batch_size=None, num_workers=workers, prefetch_factor=2)))
        return [next(kept[0]) for _ in range(workers)]

    return call


class _Batches:
    def __init__(self, augment: Callable[..., Any], photos: Sequence[np.ndarray]) -> None:
        self.augment, self.photos = augment, photos

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, step: int) -> Any:
        return self.augment(self.photos, step=step)


def open_opencv(threads: int) -> Side:
    """One matrix and one warpAffine for geometry, one cv2.transform for colour, the fastest found way to normalised planes."""
    import cv2
    from augment_opencv import workloads

    cv2.setNumThreads(threads)
    return Side(cv2.__version__, plain, workloads(SIDE))


def _albumentations() -> dict[str, list[Any]]:
    import albumentations as A
    import cv2

    linear, mirror = {"interpolation": cv2.INTER_LINEAR}, {"border_mode": cv2.BORDER_REFLECT, "p": 1.0}
    jitter = {"brightness": (1, 1), "contrast": (1, 1), "saturation": (1, 1), "hue": (0, 0), "p": 1.0}
    crop = A.RandomResizedCrop((SIDE, SIDE), scale=AREA, ratio=RATIO, **linear)
    d, t = DEGREES, TRANSLATE
    affine = A.Affine(scale=SCALE, translate_percent=(-t, t), rotate=(-d, d), shear={"x": SHEAR, "y": SHEAR}, **linear, **mirror)
    colour = A.ColorJitter(brightness=(0.6, 1.4), contrast=(0.6, 1.4), saturation=(0.6, 1.4), hue=(-0.1, 0.1), p=1.0)
    return {
        "full": [crop, A.HorizontalFlip(p=0.5), affine, colour],
        "crop": [crop, A.HorizontalFlip(p=0.5)],
        "horizontal_flip": [A.HorizontalFlip(p=1)],
        "vertical_flip": [A.VerticalFlip(p=1)],
        "quarter_turn": [A.RandomRotate90(p=1)],
        "rotate": [A.Rotate((-30, 30), **linear, **mirror)],
        "scale": [A.Affine(scale=(0.5, 2.0), keep_ratio=True, **linear, **mirror)],
        "shear": [A.Affine(shear={"x": (-30, 30), "y": (-30, 30)}, **linear, **mirror)],
        "translate": [A.Affine(translate_percent=(-0.3, 0.3), **linear, **mirror)],
        "resized_crop": [crop],
        "perspective": [A.Perspective(scale=(0.05, 0.15), **linear, **mirror)],
        "spherical": [A.OpticalDistortion(0.5, mode="fisheye", **linear, p=1)],
        "barrel": [A.OpticalDistortion(0.3, mode="camera", **linear, p=1)],
        "elastic": [A.GridDistortion(num_steps=4, distort_limit=0.25, **linear, p=1)],
        "brightness": [A.RandomBrightnessContrast((-0.8, 0.8), (0, 0), p=1)],
        "contrast": [A.RandomBrightnessContrast((0, 0), (-0.8, 0.8), p=1)],
        "saturation": [A.ColorJitter(**jitter | {"saturation": (0.2, 1.8)})],
        "hue": [A.ColorJitter(**jitter | {"hue": (-0.2, 0.2)})],
        "gamma": [A.RandomGamma((40, 250), p=1)],
        "grey": [A.ToGray(p=1)],
        "channel_shuffle": [A.ChannelShuffle(p=1)],
        "invert": [A.InvertImg(p=1)],
        "posterise": [A.Posterize((2, 7), p=1)],
        "solarise": [A.Solarize((0, 1), p=1)],
        "equalise": [A.Equalize(mode="cv", by_channels=True, p=1)],
        "blur": [A.GaussianBlur(blur_limit=0, sigma_limit=(0.01, BLUR), p=1)],
        "sharpen": [A.Sharpen(alpha=(0, 1), method="gaussian", kernel_size=5, sigma=1.0, p=1)],
        "noise": [A.GaussNoise(std_range=(0, 0.1), p=1)],
        "jpeg": [A.ImageCompression(quality_range=(10, 100), p=1)],
        "erase": [A.CoarseDropout((1, 1), (0.01, 0.5), (0.01, 0.5), fill=128, p=1)],
    }


def _one_by_one(compose: Callable[..., dict[str, np.ndarray]]) -> Call:
    """An Albumentations pipeline that ends in float32 (height, width, 3), into the planes of a batch."""
    import cv2

    def call(photos: Sequence[np.ndarray]) -> np.ndarray:
        batch = np.empty((len(photos), 3, SIDE, SIDE), np.float32)
        for photo, planes in zip(photos, batch):
            cv2.split(compose(image=photo)["image"], list(planes))  # a third of the time of torch's permuted copy
        return batch

    return call


def open_albumentations(threads: int) -> Side:
    import albumentations as A
    import cv2

    cv2.setNumThreads(threads)
    last = A.Normalize((0.5,) * 3, (0.5,) * 3)
    workloads = {name: _one_by_one(A.Compose([*steps, last])) for name, steps in _albumentations().items()}
    return Side(A.__version__, plain, workloads)


def open_fuse(threads: int) -> Side:
    """fuse-augmentations over Albumentations' transforms on numpy photos: over Kornia's its full chain took seven times as long.

    What it does not fuse it would pass through, which is Albumentations again, so those are left out.
    """
    import albumentations as A
    import cv2
    from fuse_augmentations import Compose

    cv2.setNumThreads(threads)
    unknown = {
        "perspective",
        "spherical",
        "barrel",
        "elastic",
        "saturation",
        "hue",
        "grey",
        "channel_shuffle",
        "invert",
        "sharpen",
        "noise",
        "jpeg",
        "erase",
    }
    last = A.Normalize((0.5,) * 3, (0.5,) * 3)
    known = {name: steps for name, steps in _albumentations().items() if name not in unknown}
    workloads = {name: _one_by_one(Compose([*steps, last], padding_mode="reflection")) for name, steps in known.items()}
    return Side(importlib.metadata.version("fuse-augmentations"), plain, workloads)


def _planes(photos: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(photos).permute(0, 3, 1, 2).contiguous()


def open_kornia(threads: int) -> Side:
    import kornia
    import kornia.augmentation as K
    import torch

    torch.set_num_threads(threads)
    crop = K.RandomResizedCrop((SIDE, SIDE), scale=AREA, ratio=RATIO)
    mirror = {"padding_mode": "reflection", "p": 1.0}
    affine = K.RandomAffine(DEGREES, (TRANSLATE, TRANSLATE), SCALE, SHEAR * 2, **mirror)
    steps = {
        "full": [crop, K.RandomHorizontalFlip(p=0.5), affine, K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=1)],
        "crop": [crop, K.RandomHorizontalFlip(p=0.5)],
        "horizontal_flip": [K.RandomHorizontalFlip(p=1)],
        "vertical_flip": [K.RandomVerticalFlip(p=1)],
        "quarter_turn": [K.RandomRotation90((1, 3), p=1)],
        "rotate": [K.RandomAffine(30.0, **mirror)],
        "scale": [K.RandomAffine(0.0, scale=(0.5, 2.0), **mirror)],
        "shear": [K.RandomAffine(0.0, shear=(-30.0, 30.0, -30.0, 30.0), **mirror)],
        "translate": [K.RandomAffine(0.0, (0.3, 0.3), **mirror)],
        "resized_crop": [crop],
        "perspective": [K.RandomPerspective(0.3, p=1)],
        "spherical": [K.RandomFisheye(*(torch.tensor(pair) for pair in ((-0.2, 0.2), (-0.2, 0.2), (0.5, 1.5))), p=1)],
        "elastic": [K.RandomThinPlateSpline(0.12, p=1)],
        "brightness": [K.RandomBrightness((0.2, 1.8), p=1)],
        "contrast": [K.RandomContrast((0.2, 1.8), p=1)],
        "saturation": [K.RandomSaturation((0.2, 1.8), p=1)],
        "hue": [K.RandomHue((-0.2, 0.2), p=1)],
        "gamma": [K.RandomGamma((0.4, 2.5), p=1)],
        "grey": [K.RandomGrayscale(p=1)],
        "channel_shuffle": [K.RandomChannelShuffle(p=1)],
        "invert": [K.RandomInvert(p=1)],
        "posterise": [K.RandomPosterize((2, 8), p=1)],
        "solarise": [K.RandomSolarize((0.0, 1.0), (0.0, 0.0), p=1)],
        "equalise": [K.RandomEqualize(p=1)],
        "blur": [K.RandomGaussianBlur((13, 13), (0.01, BLUR), p=1)],
        "sharpen": [K.RandomSharpness((0.0, 2.0), p=1)],
        "noise": [K.RandomGaussianNoise(0.0, 0.1, p=1)],
        "jpeg": [K.RandomJPEG((10.0, 100.0), p=1)],
        "erase": [K.RandomErasing((0.02, 0.25), p=1, value=0.5)],
    }
    mean = torch.full((3,), 0.5)
    workloads = {name: _batched(K.AugmentationSequential(*found, K.Normalize(mean, mean))) for name, found in steps.items()}
    return Side(kornia.__version__, _planes, workloads)


def _batched(pipeline: Call) -> Call:
    import torch

    def call(photos: Any) -> Any:
        with torch.inference_mode():
            return pipeline(photos.float().mul_(1 / 255))

    return call


def _torchvision(v2: Any, torch: Any) -> dict[str, list[Any]]:
    linear = {"interpolation": v2.InterpolationMode.BILINEAR}
    crop = v2.RandomResizedCrop((SIDE, SIDE), scale=AREA, ratio=RATIO, antialias=False, **linear)
    affine = v2.RandomAffine(DEGREES, (TRANSLATE, TRANSLATE), SCALE, SHEAR * 2, **linear)
    gamma = v2.Lambda(lambda photo: v2.functional.adjust_gamma(photo, math.exp(math.log(2.5) * float(torch.rand(1) * 2 - 1))))
    return {
        "full": [crop, v2.RandomHorizontalFlip(0.5), affine, v2.ColorJitter(0.4, 0.4, 0.4, 0.1)],
        "crop": [crop, v2.RandomHorizontalFlip(0.5)],
        "horizontal_flip": [v2.RandomHorizontalFlip(1)],
        "vertical_flip": [v2.RandomVerticalFlip(1)],
        "rotate": [v2.RandomRotation(30, **linear)],
        "scale": [v2.RandomAffine(0, scale=(0.5, 2.0), **linear)],
        "shear": [v2.RandomAffine(0, shear=(-30, 30, -30, 30), **linear)],
        "translate": [v2.RandomAffine(0, (0.3, 0.3), **linear)],
        "resized_crop": [crop],
        "perspective": [v2.RandomPerspective(0.3, p=1, **linear)],
        "elastic": [v2.ElasticTransform(**linear)],
        "brightness": [v2.ColorJitter(brightness=0.8)],
        "contrast": [v2.ColorJitter(contrast=0.8)],
        "saturation": [v2.ColorJitter(saturation=0.8)],
        "hue": [v2.ColorJitter(hue=0.2)],
        "gamma": [gamma],
        "grey": [v2.RandomGrayscale(1)],
        "channel_shuffle": [v2.RandomChannelPermutation()],
        "invert": [v2.RandomInvert(1)],
        "posterise": [v2.RandomPosterize(4, p=1)],
        "solarise": [v2.RandomSolarize(128, p=1)],
        "equalise": [v2.RandomEqualize(1)],
        "blur": [v2.GaussianBlur(13, (0.01, BLUR))],
        "sharpen": [v2.RandomAdjustSharpness(2, p=1)],
        "noise": [v2.ToDtype(torch.float32, scale=True), v2.GaussianNoise(0, 0.05)],
        "jpeg": [v2.JPEG((10, 100))],
        "erase": [v2.RandomErasing(1, (0.02, 0.25), value=128)],
    }


def open_torchvision(threads: int) -> Side:
    """torchvision's transforms on uint8 tensors; on PIL images the full chain took more than twice as long."""
    import torch
    import torchvision
    from torchvision.transforms import v2

    torch.set_num_threads(threads)
    last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.5,) * 3, (0.5,) * 3)]

    def one(pipeline: Call) -> Call:
        def call(photos: Sequence[Any]) -> Any:
            with torch.inference_mode():
                return torch.stack([pipeline(photo) for photo in photos])

        return call

    workloads = {name: one(v2.Compose([*steps, *last])) for name, steps in _torchvision(v2, torch).items()}
    return Side(torchvision.__version__, lambda photos: list(_planes(photos)), workloads)


OPEN: dict[str, Callable[[int], Side]] = {
    "attar": open_attar,
    "opencv": open_opencv,
    "albumentations": open_albumentations,
    "fuse": open_fuse,
    "kornia": open_kornia,
    "torchvision": open_torchvision,
}


def converse(answer: Callable[..., Any], replies: TextIO) -> None:
    """Answers the questions on stdin, a line of JSON each, until there are no more."""
    for line in sys.stdin:
        try:
            reply = {"value": answer(**json.loads(line))}
        except Exception as error:  # whatever it is, the asking side must hear of it
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


def serve(name: str, threads: int, cores: int) -> None:
    """Answers requests until there are no more; what the library prints goes to stderr."""
    replies, sys.stdout = sys.stdout, sys.stderr
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])
    sides: list[Side] = []
    given: dict[str, Any] = {}
    repeats: dict[str, int] = {}

    def call(workload: str) -> Any:
        return sides[0].workloads[workload](given[workload])

    def seconds(workload: str, times: int, clock: Callable[[], float] = time.perf_counter) -> float:
        start = clock()
        for _ in range(times):
            call(workload)
        return clock() - start

    def answer(do: str, workload: str = "", photos: str = "", outputs: str = "", times: int = 0, clock: str = "wall") -> Any:
        if do == "open":
            sides.append(OPEN[name](threads))
            return {"version": sides[0].version, "workloads": list(sides[0].workloads)}
        if do == "load":
            given[workload] = sides[0].prepare(np.load(photos))
            first = seconds(workload, 1)
            repeats[workload] = math.ceil(TURN_SECONDS / min(seconds(workload, 1) for _ in range(2)))
            return first
        if do == "turn":
            times = times or repeats[workload]
            return seconds(workload, times, CLOCKS[clock]) / times
        assert do == "outputs", do
        np.save(outputs, np.asarray(call(workload)))
        return None

    converse(answer, replies)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
