"""The half of a convolutional autoencoder that is thrown away: a decoder from embeddings to images, and what is hidden from the encoder."""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

HIDDEN = 0.4
"""Share of the patches that are hidden."""
PATCHES = 8
"""Patches along each side of an image."""
NOISE = 0.2
"""Standard deviation of the noise on what is seen, in units of normalised pixels."""
COARSE = 4
"""Side of the map the decoder starts from."""


class Decoder(nn.Module):
    """Embeddings (n, dim) → images (n, 3, height, width): a linear layer to a 4 × 4 map, doubled by nearest neighbours and 3 × 3 convolutions.

    Small on purpose: what the decoder cannot invent the embedding must hold.
    """

    def __init__(self, dim: int, size: tuple[int, int], width: int = 64) -> None:
        super().__init__()
        self.size, self.width = size, width
        self.start = nn.Linear(dim, width * COARSE * COARSE)
        doublings = max(1, int(np.ceil(np.log2(max(size) / COARSE))))
        widths = [max(16, width >> step) for step in range(doublings + 1)]
        self.steps = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in itertools.pairwise(widths)
        )
        self.end = nn.Conv2d(widths[-1], 3, 3, 1, 1)

    def forward(self, embedding: Float[Tensor, "items dim"]) -> Float[Tensor, "items 3 height width"]:
        x = self.start(embedding).unflatten(1, (self.width, COARSE, COARSE))
        for step in self.steps:
            x = step(F.interpolate(x, scale_factor=2))
        made = self.end(x)
        return made if made.shape[2:] == self.size else F.interpolate(made, self.size, mode="bilinear", align_corners=False)


def hide(
    images: Float[Tensor, "items channels height width"], rng: np.random.Generator, share: float = HIDDEN, noise: float = NOISE
) -> tuple[Float[Tensor, "items channels height width"], Float[Tensor, "items 1 height width"]]:
    """Images with noise and with patches set to zero (the mean), and which pixels those are (1 hidden, 0 seen).

    Denoising after Vincent et al. 2008, masking after Pathak et al. 2016. Every image loses the same number of patches of a grid of
    PATCHES × PATCHES, `share` of them, drawn anew for each.
    """
    count, _, height, width = images.shape
    patches = min(PATCHES, height, width)
    order = rng.random((count, patches * patches)).argsort(1)
    grid = torch.from_numpy((order < round(share * patches * patches)).astype(np.float32)).view(count, 1, patches, patches)
    hidden = F.interpolate(grid, (height, width), mode="nearest")
    grain = torch.from_numpy(rng.standard_normal(images.shape, np.float32)) * noise
    return (images + grain) * (1 - hidden), hidden
