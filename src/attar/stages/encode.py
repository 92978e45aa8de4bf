"""Items to vectors as fast as the model goes: reading, decoding and computing side by side, on every core, without waiting for each other."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float, Float16, Int, UInt8
from torch import Tensor

from attar.modalities.image import Loader
from attar.models.network import Network
from attar.records import Preprocess

PIXELS = 2**18
"""Of a batch: what its layers make then stays near the processor. MobileNetV2 takes 16 ms a photo in batches of 4, 27 in 16, 52 in 64."""
STREAMS = 8
"""Batches that are computed at once, at most: each takes the memory of its layers' outputs."""


def batch_size(preprocess: Preprocess) -> int:
    """Items of a batch: 5 of 224 × 224 pixels, 256 of the smallest.

    >>> [batch_size(Preprocess(size=(side, side))) for side in (32, 224, 518)]
    [256, 5, 2]
    """
    return int(np.clip(PIXELS // (preprocess.size[0] * preprocess.size[1]), 2, 256))


def as_input(images: UInt8[np.ndarray, "n height width 3"], preprocess: Preprocess) -> Float[Tensor, "n 3 height width"]:
    """(x / 255 − mean) / std in place, a row of pixels at a time, in the order of the pixels (channels last).

    >>> white = np.full((1, 1, 1, 3), 255, np.uint8)
    >>> as_input(white, Preprocess(size=(1, 1), mean=(0.5,), std=(0.25,))).flatten().tolist()
    [2.0, 2.0, 2.0]
    """
    count, height, width, _ = images.shape
    mean, std = (torch.tensor(part, dtype=torch.float64).expand(3).repeat(width) for part in (preprocess.mean, preprocess.std))
    rows = torch.from_numpy(images).reshape(count * height, width * 3).float()
    rows.mul_((1 / (255 * std)).float()).add_((-mean / std).float())
    return rows.view(count, height, width, 3).permute(0, 3, 1, 2)


@contextmanager
def streams(network: Network) -> Iterator[tuple[ThreadPoolExecutor, list[Network]]]:
    """Threads that compute a batch each, and a network for each with the same weights: modules may keep things between their calls.

    A batch on a thread of its own never waits for others at every layer, as threads that share a batch do, and gives the same bits on any number
    of cores. With more than STREAMS cores, several share one.
    """
    threads = torch.get_num_threads()
    count = 1 if hasattr(network, "session") else min(threads, STREAMS)  # a frozen file brings its own threads
    weights = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    networks = [network, *(copy.deepcopy(network, dict(weights)) for _ in range(count - 1))]
    try:
        with ThreadPoolExecutor(count, "attar-encode", torch.set_num_threads, (threads // count,)) as pool:
            yield pool, networks
    finally:
        torch.set_num_threads(threads)  # threads to come take the number that was set last


def encode(
    network: Network, preprocess: Preprocess, loader: Loader, ids: Int[np.ndarray, " n"], tick: Callable[[int], object]
) -> Float16[np.ndarray, "n d"]:
    """Embeddings of the items of some ids, in their order; `tick` is called with the number of items of each batch that is done."""
    size = batch_size(preprocess)
    waiting: deque[Future[np.ndarray]] = deque()
    made: list[np.ndarray] = []

    def finish() -> None:
        made.append(waiting.popleft().result())
        tick(len(made[-1]))

    with streams(network) as (pool, free):

        def compute(images: np.ndarray) -> np.ndarray:
            own = free.pop()  # there are as many as threads
            try:
                with torch.inference_mode():
                    return own(as_input(images, preprocess))[0].half().numpy()
            finally:
                free.append(own)

        for _, images in loader.stream(ids[start : start + size] for start in range(0, len(ids), size)):
            if len(waiting) > STREAMS:
                finish()
            waiting.append(pool.submit(compute, images))
        while waiting:
            finish()
    return np.concatenate(made)
