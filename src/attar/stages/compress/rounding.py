"""Rounding: integer weights chosen so that a layer's outputs change least, given the inputs it really gets.

The inputs are those of the int8 file with all earlier layers rounded already; the targets are the float32 file's outputs. Least squares gives
the real weights that come nearest to them (they undo what the earlier rounding shifted), and rounding goes on input by input: what rounding one
weight costs is made up for by those not rounded yet, through the inverse of the second moments (optimal brain quantisation, Frantar & Alistarh 2022;
order and Cholesky form of GPTQ, Frantar et al. 2023; inputs of the rounded network against outputs of the exact one as in GPTAQ, Li et al. 2025).
The bias comes last and takes what is left: bias correction in the same stroke.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

LARGEST = 127
"""Largest integer weight."""
PAIR = 128
"""Largest sum of two neighbouring integer weights of one sign: 255 · 128 fits into 16 bits, so no pair of products saturates."""
RIDGES = (0.01, 0.1, 1.0, 10.0)
"""Ridges tried, as shares of the mean second moment: how near the new weights are held to the old."""
BLOCK = 128
"""Inputs rounded between two updates of all the others."""


class Moments(NamedTuple):
    """Second moments of a layer's inputs x and its exact outputs y, per group of a convolution; with a bias the last input is the constant 1."""

    gram: Float[Tensor, "groups inputs inputs"]  # float64, Σ x xᵀ over rows
    cross: Float[Tensor, "groups outputs inputs"]  # Σ y xᵀ
    rows: int


class Solved(NamedTuple):
    """Integer weights, their step per output, and the real weights of the inputs off the grid (the bias)."""

    whole: Float[Tensor, "groups outputs gridded"]
    scale: Float[Tensor, "groups outputs"]
    rest: Float[Tensor, "groups outputs free"]


def partners(channels: int, area: int) -> Int[Tensor, "layouts inputs"]:
    """The input that each input (channel-major, then kernel position) shares a 16-bit sum with; −1 for none.

    Processors without VNNI multiply unsigned activations with signed weights two by two and add the pair in 16 bits (`vpmaddubsw`). ONNX Runtime
    and oneDNN walk the inputs position by position, channels innermost: in one run (layout 0), or with each position padded to whole
    groups of four channels (layout 1). The two are the same where the number of channels is even.

    >>> partners(3, 1).tolist(), partners(4, 1).tolist()
    ([[1, 0, -1]], [[1, 0, 3, 2]])
    """
    channel, place = torch.arange(channels)[:, None], torch.arange(area)[None, :]
    run = (place * channels + channel) ^ 1
    flat = torch.where(run < channels * area, run % channels * area + run // channels, -1).flatten()
    beside = channel ^ 1
    padded = torch.where(beside < channels, beside * area + place, -1).flatten()
    return flat[None] if torch.equal(flat, padded) else torch.stack([flat, padded])


def scales(weight: Float[Tensor, "groups outputs inputs"], pairs: Int[Tensor, "layouts inputs"]) -> Float[Tensor, "groups outputs"]:
    """The finest step per output at which no weight exceeds LARGEST and no pair of one sign exceeds PAIR.

    >>> weight = torch.tensor([[[127.0, 0.0, 64.0, 64.0], [127.0, 127.0, 0.0, 0.0], [127.0, -127.0, 0.0, 0.0]]])
    >>> scales(weight, partners(4, 1)).tolist()
    [[1.0, 1.984375, 1.0]]
    """
    largest = weight.abs().amax(2) / LARGEST
    for layout in pairs:  # of two signs, the larger weight alone is the larger sum
        both = (weight + weight[:, :, layout] * (layout >= 0)).abs().amax(2)
        largest = torch.maximum(largest, both / PAIR)
    return largest.clamp_min(1e-12)


def refit(weight: Float[Tensor, "groups outputs inputs"], moments: Moments, ridge: float) -> tuple[Tensor, Tensor]:
    """The real weights whose outputs come nearest to the exact ones, held near the old by the ridge; and the ridged mean moments.

    (C + ρW)(G + ρI)⁻¹ with G = E[x xᵀ], C = E[y xᵀ], ρ = ridge · mean diagonal of G.
    """
    gram = moments.gram / moments.rows
    added = ridge * gram.diagonal(dim1=1, dim2=2).mean(1) + 1e-10
    gram.diagonal(dim1=1, dim2=2).add_(added[:, None])
    wanted = moments.cross / moments.rows + added[:, None, None] * weight
    return torch.linalg.solve(gram, wanted.transpose(1, 2)).transpose(1, 2), gram


def round_weights(
    weight: Float[Tensor, "groups outputs inputs"],
    gram: Float[Tensor, "groups inputs inputs"],
    scale: Float[Tensor, "groups outputs"],
    pairs: Int[Tensor, "layouts gridded"],
) -> Solved:
    """Integers for the first `gridded` inputs, and real weights for the rest, such that tr((W − W') gram (W − W')ᵀ) is small.

    Inputs are taken in order of their second moments, the largest first; every pair keeps its bound.
    """
    count, inputs = pairs.shape[1], weight.shape[2]
    energy = gram.diagonal(dim1=1, dim2=2).sum(0)[:count]
    order = torch.cat([energy.argsort(descending=True, stable=True), torch.arange(count, inputs)])
    spread = torch.linalg.cholesky(torch.linalg.inv(gram[:, order][:, :, order]), upper=True)
    left, whole = weight[:, :, order], torch.zeros_like(weight[:, :, :count])
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        errors = torch.zeros_like(left[:, :, start:stop])
        for column in range(start, stop):
            at = int(order[column])
            low, high = _room(whole, pairs[:, at])
            whole[:, :, at] = (left[:, :, column] / scale).round().clamp(low, high)
            error = (left[:, :, column] - whole[:, :, at] * scale) / spread[:, None, column, column]
            left[:, :, column:stop] -= error[:, :, None] * spread[:, None, column, column:stop]
            errors[:, :, column - start] = error
        left[:, :, stop:] -= errors @ spread[:, start:stop, stop:]
    return Solved(whole, scale, left[:, :, count:])


def _room(whole: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of the next integer beside partners that are rounded already; those that are not count as zero."""
    high = torch.full_like(whole[:, :, 0], LARGEST)
    low = -high
    for partner in beside[beside >= 0].tolist():
        high = torch.minimum(high, PAIR - whole[:, :, partner].clamp_min(0))
        low = torch.maximum(low, -PAIR - whole[:, :, partner].clamp_max(0))
    return low, high


def solve(weight: Float[Tensor, "groups outputs inputs"], halves: tuple[Moments, Moments], pairs: Int[Tensor, "layouts gridded"]) -> Solved:
    """Rounded weights from all rows, under the ridge whose fit to the first half of the rows does best on the second."""
    seen, unseen = halves

    def loss(ridge: float) -> float:
        fitted, _ = refit(weight, seen, ridge)
        return float(((fitted @ unseen.gram) * fitted - 2 * fitted * unseen.cross).sum())

    both = Moments(seen.gram + unseen.gram, seen.cross + unseen.cross, seen.rows + unseen.rows)
    target, gram = refit(weight, both, min(RIDGES, key=loss))
    return round_weights(target, gram, scales(target[:, :, : pairs.shape[1]], pairs), pairs)
