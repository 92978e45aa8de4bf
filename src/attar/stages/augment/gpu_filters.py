"""What gpu.py does to more than a pixel at a time: equalise, table, blur, sharpen, noise and jpeg, each on the views that drew it and no others."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from attar.stages.augment.plan import Plan
from attar.stages.augment.reference import MASK, REACH, TO_RGB, TO_YCC, dct_matrix, quantisers

Change = Callable[[Tensor, np.ndarray], Tensor]


def neighbourhood(
    values: Float[Tensor, "k 3 height width"], plan: Plan, table: Tensor, tables: Tensor
) -> Float[Tensor, "k 3 height width"]:
    """Equalise, table, blur, sharpen, noise and jpeg, each on the views that drew it."""
    device = values.device

    def looked_up(v: Tensor, rows: np.ndarray) -> Tensor:
        first = table[torch.as_tensor(rows, device=device), None] * 768 + 256 * torch.arange(3, device=device)
        return tables[levels(v) + first[:, :, None, None]] / 255

    def sharpened(v: Tensor, rows: np.ndarray) -> Tensor:
        return v + _column(plan.sharpen[rows], device) * (v - _gaussian(v, np.ones(len(rows), np.float32)))

    changes: list[tuple[np.ndarray, Change]] = [
        (plan.equalise, lambda v, rows: _equalised(v)),
        (plan.table >= 0, looked_up),
        *((mask, lambda v, rows: _gaussian(v, plan.blur[rows])) for mask in _by_reach(plan.blur)),
        (plan.sharpen > 0, sharpened),
        (plan.noise > 0, lambda v, rows: v + _column(plan.noise[rows], device) * _normals(plan.seed[rows], v)),
        (plan.jpeg > 0, lambda v, rows: _jpeg(v, plan.jpeg[rows])),
    ]
    for mask, change in changes:
        rows = np.flatnonzero(mask)
        if len(rows) == len(values):
            values = change(values, rows)
        elif len(rows):
            at = torch.as_tensor(rows, device=device)
            values = values.index_copy(0, at, change(values[at], rows))
    return values


def _column(values: np.ndarray, device: torch.device) -> Float[Tensor, "k 1 1 1"]:
    return torch.as_tensor(values, dtype=torch.float32, device=device)[:, None, None, None]


def _equalised(v: Float[Tensor, "k 3 height width"]) -> Float[Tensor, "k 3 height width"]:
    """reference.equalise: all histograms at once, in integers."""
    level = levels(v).flatten(2)
    counts = torch.zeros((*level.shape[:2], 256), dtype=torch.int64, device=v.device)
    above = counts.scatter_add_(2, level, counts.new_ones(1, 1, 1).expand_as(level)).cumsum(2)
    first = above.masked_fill(above == 0, level.shape[2]).amin(2, keepdim=True)
    rest = level.shape[2] - first
    table = torch.div(510 * (above - first) + rest, (2 * rest).clamp_min(1), rounding_mode="floor").clamp(0, 255)
    table = torch.where(rest > 0, table, torch.arange(256, device=v.device))
    return (table.gather(2, level) / 255).view_as(v)


def _by_reach(sigma: np.ndarray) -> Iterator[np.ndarray]:
    """Views whose blurs reach about as far: none pays for the widest of its chunk."""
    octave = np.where(sigma > 0, np.ceil(np.log2(np.maximum(REACH * sigma, 1))), -1)
    return (octave == one for one in np.unique(octave[octave >= 0]))


def _gaussian(v: Float[Tensor, "k 3 height width"], sigma: np.ndarray) -> Float[Tensor, "k 3 height width"]:
    """reference.gaussian, each view with its own sigma and reach."""
    reach = np.ceil(REACH * sigma.astype(np.float32))
    offsets = np.arange(-reach.max(), reach.max() + 1)
    kernel = np.exp(-0.5 * (offsets / sigma[:, None].astype(np.float64)) ** 2) * (abs(offsets) <= reach[:, None])
    kernel /= kernel.sum(1, keepdims=True)
    weights = torch.as_tensor(kernel, dtype=torch.float32, device=v.device).repeat_interleave(3, 0)
    flat = v.flatten(0, 1)[None]
    for axis, shape in ((3, (1, len(offsets))), (2, (len(offsets), 1))):
        count = v.shape[axis]
        at = torch.as_tensor(np.arange(count + len(offsets) - 1) - len(offsets) // 2, device=v.device)
        folded = torch.remainder(at, max(2 * count - 2, 1))
        folded = torch.minimum(folded, 2 * count - 2 - folded)  # mirrored at the centre of the edge's pixel, as often as it takes
        flat = F.conv2d(flat.index_select(axis, folded), weights.view(len(weights), 1, *shape), groups=len(weights))
    return flat[0].view_as(v)


def _scrambled(x: Int[Tensor, "*any"]) -> Int[Tensor, "*any"]:
    """reference.scramble: 32 bits in int64, whose product may wrap but keeps its lower half."""
    x = (x ^ (x >> 16)).mul_(0x7FEB352D).bitwise_and_(MASK)
    x = x.bitwise_xor_(x >> 15).mul_(0x846CA68B).bitwise_and_(MASK)
    return x.bitwise_xor_(x >> 16)


def _normals(seed: np.ndarray, like: Float[Tensor, "k 3 height width"]) -> Float[Tensor, "k 3 height width"]:
    """reference.normals: its integers bit for bit, on any device."""
    own = _scrambled(torch.as_tensor(seed.astype(np.int64), device=like.device))[:, None, None, None]
    place = torch.arange(like[0].numel(), device=like.device).view(like.shape[1:]) & MASK
    a = _scrambled(place ^ own)
    radius = (a >> 8).float().add_(0.5).mul_(2**-24).log_().mul_(-2).sqrt_()
    b = _scrambled(a.add_(0x9E3779B9).bitwise_and_(MASK))
    return (b >> 8).float().mul_(2 * torch.pi * 2**-24).cos_().mul_(radius)


def _jpeg(v: Float[Tensor, "k 3 height width"], quality: np.ndarray) -> Float[Tensor, "k 3 height width"]:
    """reference.jpeg on all blocks at once: rows and columns of 8 by products with the 8 × 8 cosines."""
    _, _, height, width = v.shape
    dct = torch.as_tensor(dct_matrix(), dtype=torch.float32, device=v.device)
    tables = np.stack([quantisers(int(one)) for one in quality])[:, :, None, :, None, :]
    steps = torch.as_tensor(tables, dtype=torch.float32, device=v.device)
    wide = _continued(_continued(v, 2, -height % 8), 3, -width % 8)
    grey = 128 * torch.tensor([1.0, 0, 0], device=v.device)[:, None, None]
    blocks = (_mixed(255 * TO_YCC, wide) - grey).unflatten(3, (-1, 8)).unflatten(2, (-1, 8))  # k, channel, rows, 8, columns, 8
    kept = (torch.einsum("ij,kcrjsl,ml->kcrism", dct, blocks, dct) / steps + 0.5).floor()
    ycc = torch.einsum("ij,kcrism,ml->kcrjsl", dct, kept * steps, dct).flatten(4).flatten(2, 3)
    return _mixed(TO_RGB / 255, ycc + grey)[:, :, :height, :width]


def _continued(v: Tensor, axis: int, count: int) -> Tensor:
    """`count` more of the last row or column."""
    return torch.cat([v, v.narrow(axis, v.shape[axis] - 1, 1).repeat_interleave(count, axis)], axis) if count else v


def _mixed(matrix: Float[np.ndarray, "3 3"], v: Float[Tensor, "k 3 height width"]) -> Float[Tensor, "k 3 height width"]:
    """The same 3 × 3 product for every pixel."""
    red, green, blue = v.unbind(1)
    return torch.stack([float(row[0]) * red + float(row[1]) * green + float(row[2]) * blue for row in matrix], 1)


def levels(values: Tensor) -> Tensor:
    """Values in [0, 1] as levels 0 … 255."""
    return (255 * values + 0.5).floor().long()
