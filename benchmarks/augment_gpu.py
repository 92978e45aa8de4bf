"""Augmentation on an accelerator: a batch of bytes → crop, flip, affine, full colour jitter, normalise, beside Kornia and beside what memory allows.

    python benchmarks/augment_gpu.py [--device cuda] [--batch 512] [--side 256] [--rounds 50] [--contenders attar attar-compiled kornia kornia-compiled]
        [--dtype float32] [--out FILE.json]

All contenders take turns in every round, on the same uint8 batch (n, 3, side, side) that already is on the device, and leave a normalised batch of
`--dtype` and of the same shape there. Each draws new parameters every time; `render` is attar's part of that without the drawing. The bound is to read
the bytes once and to write the result once, at the rate at which this device copies a large tensor, measured in the same rounds. Needs kornia for its
contenders (pip install kornia); Kornia works in float32 and is cast at the end.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from environment import record
from torch import Tensor

from attar.records import Dial
from attar.stages.augment.gpu import render
from attar.stages.augment.plan import Plan, sample

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHAIN = {
    name: Dial(1.0, 1.0)
    for name in ("resized_crop", "rotate", "shear", "translate", "scale", "brightness", "contrast", "saturation", "hue")
}
CHAIN["horizontal_flip"] = Dial(1.0, 0.5)
CONTENDERS = ("attar", "attar-compiled", "kornia", "kornia-compiled")


def plan_of(count: int, side: int, rng: np.random.Generator) -> Plan:
    return sample([CHAIN] * count, rng, np.full((count, 2), side), (side, side))


def kornia_chain(side: int) -> torch.nn.Module:
    """The same transforms at the same strengths; Kornia clips between its colour steps and resamples twice."""
    import kornia.augmentation as K

    return torch.nn.Sequential(
        K.RandomResizedCrop((side, side), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), cropping_mode="resample"),
        K.RandomHorizontalFlip(0.5),
        K.RandomAffine(30.0, translate=(0.3, 0.3), scale=(0.5, 2.0), shear=(-30.0, 30.0, -30.0, 30.0), padding_mode="reflection", p=1.0),
        K.ColorJitter((0.2, 1.8), (0.2, 1.8), (0.2, 1.8), (-0.2, 0.2), p=1.0),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    )


def contenders(names: Sequence[str], images: Tensor, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """What is timed, by name: nothing in, the batch out."""
    if any(name.startswith("kornia") for name in names) and importlib.util.find_spec("kornia") is None:
        raise SystemExit(
            "kornia is not installed, and two of the contenders are Kornia's. Install it (pip install kornia), "
            "or leave them out: --contenders attar attar-compiled"
        )
    count, side, rng = len(images), images.shape[2], np.random.default_rng(0)
    found: dict[str, Callable[[], Tensor]] = {}
    for name in names:
        compiled = name.endswith("-compiled")
        if name.startswith("attar"):
            once = plan_of(count, side, rng)
            found[name] = lambda compiled=compiled: render(
                images, plan_of(count, side, rng), MEAN, STD, dtype, device=images.device, compiled=compiled
            )
            found[f"{name}, render"] = lambda compiled=compiled, once=once: render(
                images, once, MEAN, STD, dtype, device=images.device, compiled=compiled
            )
        else:
            chain = kornia_chain(side).to(images.device)
            call = torch.compile(chain) if compiled else chain
            found[name] = lambda call=call: call(images.float() / 255).to(dtype)
    return found


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """One call, waited for."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def measure(calls: dict[str, Callable[[], object]], rounds: int, warm_up: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every call in every round."""
    for call in calls.values():
        for _ in range(warm_up):
            seconds(call, device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, device))
    return times


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that is allocated while a call runs, beyond what was; known for CUDA alone."""
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    seconds(call, device)
    return torch.cuda.max_memory_allocated(device) - before


class Row(NamedTuple):
    name: str
    milliseconds: float  # median over the rounds
    quartiles: tuple[float, float]
    images_per_second: float
    share_of_bound: float
    peak_bytes: int | None


def row(name: str, taken: Sequence[float], bound: float, count: int, peak: int | None) -> Row:
    low, middle, high = np.quantile(taken, [0.25, 0.5, 0.75]).tolist()
    return Row(name, 1e3 * middle, (1e3 * low, 1e3 * high), count / middle, bound / middle, peak)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (options.batch, 3, options.side, options.side), dtype=torch.uint8, generator=generator).to(device)
    calls = contenders(options.contenders, images, dtype)
    source = torch.zeros(max(2**28 if device.type == "cuda" else 2**24, images.numel()), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    with torch.no_grad():
        times = measure({**calls, "copy": lambda: target.copy_(source)}, options.rounds, options.warm_up, device)
        peaks = {name: peak_bytes(call, device) for name, call in calls.items()}
    bandwidth = 2 * source.numel() / float(np.median(times.pop("copy")))
    bound = images.numel() * (1 + dtype.itemsize) / bandwidth
    rows = [row(name, taken, bound, options.batch, peaks[name]) for name, taken in times.items()]
    print(
        f"{options.batch} × {options.side}² on {device}, {options.dtype}: copies at {bandwidth / 1e9:.0f} GB/s, so at best {1e3 * bound:.3f} ms"
    )
    for one in rows:
        low, high = one.quartiles
        print(f"{one.name:24s} {one.milliseconds:10.3f} ms ({low:.3f} … {high:.3f})  {100 * one.share_of_bound:6.2f} % of the bound")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    found = {"device_name": name, "bytes_per_second": bandwidth, "bound_milliseconds": 1e3 * bound}
    record(options, **found, rows=[one._asdict() for one in rows])


if __name__ == "__main__":
    main()
