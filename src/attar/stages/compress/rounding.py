"""Rounding: 7-bit weights chosen so that the layer's outputs change least, from the same second moments that repair uses.

Weights are rounded input by input; what rounding one costs is made up for by those not rounded yet, through the inverse of the second moments
(optimal brain quantisation, Frantar & Alistarh 2022; in the order and with the Cholesky form of GPTQ, Frantar et al. 2023). The bias comes last
and takes what is left: bias correction in the same stroke.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attar.models.network import Network
from attar.stages.compress.repair import Moments, ridged, weights_of, write_back

LEVELS = 64
"""Largest integer weight: 255 · (64 + 64) fits into 16 bits, so that no pair of products saturates on processors without VNNI."""


def round_weights(weight: Float[Tensor, "outputs inputs"], moments: Moments) -> Float[Tensor, "outputs inputs"]:
    """Weights on the grid scale · {−64 … 64} of each output, scale = max |w| / 64, the last input (the bias) off it.

    The largest weight of each output stays at ±64, so that whoever quantises the result by its range finds the same scale and rounds nothing.
    """
    weight = weight.clone()
    scale = (weight[:, :-1].abs().amax(1) / LEVELS).clamp_min(1e-12)
    largest = weight[:, :-1].abs().argmax(1)
    sign = weight[torch.arange(len(weight)), largest].sign()
    spread = torch.linalg.cholesky(torch.linalg.inv(ridged(moments)), upper=True)
    for column in range(weight.shape[1] - 1):
        whole = (weight[:, column] / scale).round().clamp(-LEVELS, LEVELS)
        whole = torch.where(largest == column, LEVELS * sign, whole)
        error = (weight[:, column] - whole * scale) / spread[column, column]
        weight[:, column:] -= error[:, None] * spread[column, column:]
        weight[:, column] = whole * scale
    return weight


def roundable(network: Network) -> list[str]:
    """Layers whose weights are rounded by their moments: linear ones and convolutions that mix channels. Depthwise ones keep 8 bits."""
    return [
        name
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear)
        or (isinstance(layer, nn.Conv2d) and layer.groups == 1 and not isinstance(layer.padding, str) and layer.padding_mode == "zeros")
    ]


def round_network(network: Network, moments: dict[str, Moments]) -> None:
    """Rounds the weights of layers whose moments are given, in place."""
    for name, gathered in moments.items():
        layer = network.get_submodule(name)
        write_back(layer, round_weights(weights_of(layer), gathered))
