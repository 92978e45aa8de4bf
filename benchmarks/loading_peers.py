"""A loader of JPEG files in a process of its own, asked in JSON lines (runtimes.py has the asking side); benchmarks/loading.py compares them.

    python loading_peers.py attar|opencv|albumentations|torchvision|torchvision-pil CORES

Needs the library, numpy and torch (for its DataLoader), so it may be another Python environment's. Every loader takes a list of files and gives
batches of BATCH photos, two views of each, float32 (2 · BATCH, 3, 224, 224), (value / 255 - 0.5) / 0.5, decoding each file once for both views. The
operations are those of augment_peers.py, where it is said how the libraries differ.

- attar: AugmentingLoader, as many threads as cores; nothing is kept between passes ("kept": what is decoded stays in memory).
- opencv: what a careful programmer composes by hand: simplejpeg into the loops of augment_opencv.py, as many threads as cores, written in place into the batch.
- albumentations: cv2.imread, twice the pipeline, in a torch DataLoader with a worker process per core.
- torchvision: its own decoder (torchvision.io), v2 on tensors, in a DataLoader; torchvision-pil: Pillow's decoder, as in its ImageFolder.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
import augment_peers
import numpy as np
from augment_peers import SIDE

BATCH, VIEWS = 32, 2
Pass = Callable[[Sequence[str], int], Iterator[Any]]  # files and the number of the pass → batches


def batches(count: int) -> list[np.ndarray]:
    return [np.arange(first, min(first + BATCH, count)) for first in range(0, count, BATCH)]


def attar_passes(workload: str, cores: int, keep: bool) -> tuple[Pass, Callable[[str], Any]]:
    from attar.modalities import image
    from attar.stages.augment.engine import Augment
    from attar.stages.augment.loading import AugmentingLoader, reductions

    augment = Augment({"full": augment_peers.FULL, "crop": augment_peers.CROP}[workload], size=SIDE)
    kept: dict[tuple[str, ...], AugmentingLoader] = {}

    def run(files: Sequence[str], number: int) -> Iterator[Any]:
        loader = kept.get(key := tuple(files))
        if loader is None:
            loader = kept[key] = AugmentingLoader(files, augment, views=VIEWS, threads=cores, cache_bytes=(4 << 30) * keep)
        every = batches(len(files))
        for _, views in loader.stream(every, start=number * len(every)):
            yield views

    scales: dict[str, int] = {}

    def decode(file: str) -> Any:
        """At the scale of some step's views: which one is drawn at the first call, that nobody times."""
        data = Path(file).read_bytes()
        if file not in scales:
            plan = augment.plan([image.upright_size(data, max_pixels=10**9)], views=VIEWS)
            scales[file] = int(reductions(plan, 1)[0])
        return image.stored(data, reduction=scales[file], max_pixels=10**9)

    return run, decode


def opencv_passes(workload: str, cores: int, keep: bool) -> tuple[Pass, Callable[[str], Any]]:
    import cv2
    import simplejpeg
    from augment_opencv import fastest_normalise, steps

    cv2.setNumThreads(1)
    step, normalise = steps(SIDE)[workload], fastest_normalise(SIDE)
    pool = ThreadPoolExecutor(cores)

    def decode(file: str) -> np.ndarray:
        return simplejpeg.decode_jpeg(Path(file).read_bytes())

    def fill(files: Sequence[str], batch: np.ndarray, first: int, seed: int) -> None:
        rng, planes = np.random.default_rng([seed, first]), np.empty((3, SIDE, SIDE), np.uint8)
        for slot in range(first, len(files), cores):
            photo = decode(files[slot])
            for view in range(VIEWS * slot, VIEWS * (slot + 1)):
                cv2.split(step(photo, rng), list(planes))
                normalise(planes, batch[view])

    def run(files: Sequence[str], number: int) -> Iterator[Any]:
        waiting: list[tuple[np.ndarray, list[Any]]] = []

        def finished() -> np.ndarray:
            made, parts = waiting.pop(0)
            for part in parts:
                part.result()
            return made

        for ids in batches(len(files)):
            out, own = np.empty((VIEWS * len(ids), 3, SIDE, SIDE), np.float32), [files[item] for item in ids]
            waiting.append((out, [pool.submit(fill, own, out, first, number + int(ids[0])) for first in range(cores)]))
            if len(waiting) == 3:
                yield finished()
        while waiting:
            yield finished()

    return run, decode


class Files:
    """A map-style data set for torch's DataLoader."""

    def __init__(self, files: Sequence[str], decode: Callable[[str], Any], twice: Callable[[Any], Any]) -> None:
        self.files, self.decode, self.twice = files, decode, twice

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, item: int) -> Any:
        return self.twice(self.decode(self.files[item]))


def _passes(decode: Callable[[str], Any], twice: Callable[[Any], Any], cores: int) -> tuple[Pass, Callable[[str], Any]]:
    """A DataLoader that joins the pairs of views, with workers that live on between passes."""
    import torch
    from torch.utils.data import DataLoader

    torch.set_num_threads(1)
    kept: dict[tuple[str, ...], Any] = {}

    def run(files: Sequence[str], number: int) -> Iterator[Any]:
        loader = kept.get(key := tuple(files))
        if loader is None:
            loader = kept[key] = DataLoader(
                Files(files, decode, twice), BATCH, num_workers=cores, collate_fn=torch.cat, prefetch_factor=2, persistent_workers=True
            )
        yield from loader

    return run, decode


def albumentations_passes(workload: str, cores: int, keep: bool) -> tuple[Pass, Callable[[str], Any]]:
    import albumentations as A
    import cv2
    import torch

    cv2.setNumThreads(1)
    pipeline = A.Compose([*augment_peers._albumentations()[workload], A.Normalize((0.5,) * 3, (0.5,) * 3)])

    def twice(photo: np.ndarray) -> Any:
        pair = np.empty((VIEWS, 3, SIDE, SIDE), np.float32)
        for planes in pair:
            cv2.split(pipeline(image=photo)["image"], list(planes))
        return torch.from_numpy(pair)

    return _passes(lambda file: cv2.imread(file, cv2.IMREAD_COLOR_RGB), twice, cores)


def torchvision_passes(workload: str, cores: int, keep: bool, pillow: bool = False) -> tuple[Pass, Callable[[str], Any]]:
    import torch
    from torchvision.io import ImageReadMode, decode_image, read_file
    from torchvision.transforms import v2

    last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.5,) * 3, (0.5,) * 3)]
    pipeline = v2.Compose([*augment_peers._torchvision(v2, torch)[workload], *last])

    def by_pillow(file: str) -> Any:
        from PIL import Image

        return v2.functional.pil_to_tensor(Image.open(file).convert("RGB"))

    def by_itself(file: str) -> Any:
        return decode_image(read_file(file), ImageReadMode.RGB)

    def twice(photo: Any) -> Any:
        with torch.inference_mode():
            return torch.stack([pipeline(photo) for _ in range(VIEWS)])

    return _passes(by_pillow if pillow else by_itself, twice, cores)


def torchvision_pil_passes(workload: str, cores: int, keep: bool) -> tuple[Pass, Callable[[str], Any]]:
    return torchvision_passes(workload, cores, keep, pillow=True)


SIDES = {
    "attar": (attar_passes, "numba"),
    "opencv": (opencv_passes, "opencv-python-headless"),
    "albumentations": (albumentations_passes, "albumentations"),
    "torchvision": (torchvision_passes, "torchvision"),
    "torchvision-pil": (torchvision_pil_passes, "torchvision"),
}


def processor_seconds() -> float:
    """Processor time of this process, and of the threads that the processes below it have now."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it ended meanwhile
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])

    def below(process: int) -> bool:
        while process in parents:
            process = parents[process]
            if process == os.getpid():
                return True
        return False

    total = time.process_time()
    for process in filter(below, list(parents)):
        for task in Path(f"/proc/{process}/task").iterdir():
            with suppress(OSError):
                total += int((task / "schedstat").read_text().split()[0]) / 1e9
    return total


def serve(name: str, cores: int) -> None:
    """Answers requests until there are no more; what the library prints goes to stderr."""
    replies, sys.stdout = sys.stdout, sys.stderr
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])
    loaders: dict[str, tuple[Pass, Callable[[str], Any]]] = {}
    numbers = iter(range(10**9))

    def answer(do: str, workload: str = "full", files: Sequence[str] = (), keep: bool = False) -> Any:
        if do == "open":
            SIDES[name][0]("full", cores, False)
            return importlib.metadata.version(SIDES[name][1])
        loader = f"{workload} {keep}"
        if loader not in loaders:
            loaders[loader] = SIDES[name][0](workload, cores, keep)
        run, decode = loaders[loader]
        start, before = time.perf_counter(), processor_seconds()
        if do == "decode":
            for file in files:
                decode(file)
        else:
            assert do == "pass", do
            shapes = {tuple(views.shape[1:]) for views in run(files, next(numbers))}
            assert shapes == {(3, SIDE, SIDE)}, shapes
        return time.perf_counter() - start, processor_seconds() - before

    augment_peers.converse(answer, replies)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
