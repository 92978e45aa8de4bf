"""Descriptors that need no training: texture as uniform local binary patterns, colour as histograms and moments, in one torch module."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

RADII = (1, 2, 4)
"""Radii of the circles of neighbours, pixels."""
NEIGHBOURS = 8
HALF_LEVEL = 0.5 / 255
"""A neighbour darker than the centre by less counts as not darker: rounding decides nothing on flat ground."""
BINS = 16
"""Bins of a channel's histogram."""
LUMA = (0.299, 0.587, 0.114)


def uniform_bins() -> list[int]:
    """Bin of each of the 256 patterns: one for each of the 58 with at most two changes around the circle, in order, and one for the rest.

    >>> bins = uniform_bins()
    >>> len(set(bins)), bins[0], bins[255], bins[0b0101]
    (59, 0, 57, 58)
    """
    changes = [((code ^ ((code >> 1) | (code & 1) << 7)) & 255).bit_count() for code in range(256)]
    order = [code for code in range(256) if changes[code] <= 2]
    return [order.index(code) if changes[code] <= 2 else len(order) for code in range(256)]


def circle(radius: int) -> Float[Tensor, "8 1 side side"]:
    """Kernels that give each neighbour on a circle minus the centre; neighbours between pixels are interpolated bilinearly."""
    side = 2 * radius + 1
    kernels = torch.zeros(NEIGHBOURS, 1, side, side)
    for place in range(NEIGHBOURS):
        angle = 2 * math.pi * place / NEIGHBOURS
        x, y = round(radius + radius * math.cos(angle), 6), round(radius - radius * math.sin(angle), 6)
        left, top = min(int(x), side - 2), min(int(y), side - 2)
        for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
            share = (1 - abs(x - left - column)) * (1 - abs(y - top - row))
            kernels[place, 0, top + row, left + column] += share
        kernels[place, 0, radius, radius] -= 1
    return kernels


class Descriptors(nn.Module):
    """Images in [0, 1] (n, 3, h, w), sides of at least 9 → (n, 234): roots of the texture histograms of three radii and of the colour
    histograms of three channels, then the channels' moments.

    Texture: Ojala et al. 2002 (59 uniform patterns of 8 neighbours). Colour: 16 bins between which a value is shared linearly; mean, standard
    deviation and cube root of the third central moment (Stricker & Orengo 1995). The root of a histogram has length 1, and the cosine of
    two is their Bhattacharyya coefficient. Everything is convolution, comparison and table, so that it exports; nothing has weights.
    """

    luma: Tensor
    table: Tensor
    powers: Tensor
    centres: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("luma", torch.tensor(LUMA).view(1, 3, 1, 1))
        self.register_buffer("table", F.one_hot(torch.tensor(uniform_bins())).float())
        self.register_buffer("powers", 2 ** torch.arange(NEIGHBOURS).view(1, NEIGHBOURS, 1, 1))
        self.register_buffer("centres", ((torch.arange(BINS) + 0.5) / BINS).view(1, 1, BINS, 1))
        for radius in RADII:
            self.register_buffer(f"circle{radius}", circle(radius))

    def forward(self, x: Float[Tensor, "items 3 height width"]) -> Float[Tensor, "items 234"]:
        grey = F.conv2d(x, self.luma)
        return torch.cat([*(self.texture(grey, radius) for radius in RADII), self.colour(x), moments(x)], 1)

    def texture(self, grey: Float[Tensor, "items 1 height width"], radius: int) -> Float[Tensor, "items 59"]:
        bits = F.conv2d(grey, self.get_buffer(f"circle{radius}")) >= -HALF_LEVEL
        codes = (bits * self.powers).sum(1)
        return (F.embedding(codes, self.table).mean((1, 2)) + 1e-12).sqrt()

    def colour(self, x: Float[Tensor, "items 3 height width"]) -> Float[Tensor, "items 48"]:
        values = x.flatten(2).clamp(0.5 / BINS, 1 - 0.5 / BINS).unsqueeze(2)
        return (F.relu(1 - BINS * (values - self.centres).abs()).mean(3) + 1e-12).sqrt().flatten(1)


def moments(x: Float[Tensor, "items channels height width"]) -> Float[Tensor, "items features"]:
    """Mean, standard deviation and cube root of the third central moment of each channel."""
    values = x.flatten(2)
    mean = values.mean(2)
    centred = values - mean.unsqueeze(2)
    third = (centred * centred * centred).mean(2)
    skew = third.sign() * (third.abs() + 1e-12) ** (1 / 3)
    return torch.cat([mean, ((centred * centred).mean(2) + 1e-12).sqrt(), skew], 1)
