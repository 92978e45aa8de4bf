"""Items to vectors as fast as the model goes: reading, decoding and computing side by side, on every core, without waiting for each other."""

from __future__ import annotations

import copy
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float16, Int, UInt8
from torch import Tensor, nn

from attar.modalities.image import Loader
from attar.models.frozen import Ends, Frozen
from attar.models.network import Network, to_onnx
from attar.records import Preprocess

PIXELS = 2**18
"""Of a batch: what its layers make then stays near the processor. MobileNetV2 takes 16 ms a photo in batches of 4, 27 in 16, 52 in 64."""
STREAMS = 8
"""Batches that are computed at once, at most: each takes the memory of its layers' outputs."""
WORTH = 200
"""Items from which it pays to compile a network, which takes 0.2 to 3 seconds."""
LARGE = 2**28
"""Weights above which a network is not compiled: they would be there three times while it is, in a file of 1 GB."""
SAME = 1e-3
"""Difference between embeddings, as a share of them, that float16 hides."""


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


class _Embedding(nn.Module):
    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        embedding: Tensor = self.network(x)[0]
        return embedding


def compiled(network: Network, preprocess: Preprocess, items: int) -> Network:
    """The network's embeddings by ONNX Runtime, a batch on each thread: in such batches 1.2 (ViT-S) to 3 times (MobileNetV2) as fast as torch.

    Where so many items repay it (WORTH), it is not LARGE, and the two give the same embeddings; else the network as it is.
    """
    weights = sum(tensor.numel() for tensor in network.parameters())
    if items < WORTH or isinstance(network, Frozen) or not 0 < weights <= LARGE:
        return network
    seen = torch.rand(3, 3, *preprocess.size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    try:
        with tempfile.TemporaryDirectory(prefix="attar-") as folder, torch.inference_mode():
            file = Path(folder) / "encoder.onnx"
            to_onnx(_Embedding(copy.deepcopy(network)), torch.zeros(2, 3, *preprocess.size), file, "image", ["embedding"])
            made = Frozen(file, Ends("embedding", "", softmax=False), _inside())
            known = network(seen)[0]
            same = torch.allclose(made(seen)[0], known, rtol=SAME, atol=SAME * float(known.abs().mean()))
    except Exception:  # the exporter and the runtime raise what they like at a model they cannot take, and torch takes it
        return network
    return made if same else network


def _inside() -> int:
    """Threads inside a batch: as many as leave STREAMS at once."""
    threads = torch.get_num_threads()
    return threads // min(threads, STREAMS)


@contextmanager
def streams(network: Network) -> Iterator[tuple[ThreadPoolExecutor, list[Network]]]:
    """Threads that compute a batch each, and a network for each with the same weights: modules may keep things between their calls. A file does
    not, and serves as many as its own threads leave room for.

    A batch on a thread of its own never waits for others at every layer, as threads that share a batch do, and gives the same bits on any number
    of cores. With more than STREAMS cores, several share one.
    """
    threads, file = torch.get_num_threads(), isinstance(network, Frozen)
    inside = network.threads if isinstance(network, Frozen) else _inside()
    count = min(max(threads // inside, 1), STREAMS)
    weights = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    networks = [network, *(network if file else copy.deepcopy(network, dict(weights)) for _ in range(count - 1))]
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
