"""Mixing: inputs between the items. A teacher answers for any input, so a student may be asked about mixtures as well."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

PLAIN = 0.5
"""Share of the batches that stay as they are."""


def mix(inputs: Shaped[Tensor, "items ..."], rng: np.random.Generator) -> Shaped[Tensor, "items ..."]:
    """A batch, in PLAIN of the cases; else every item mixed with another of the batch.

    Images (n, c, h, w) are as often blended (mixup, Zhang et al. 2018) as given a box of the other (CutMix, Yun et al. 2019); anything else that is
    made of floats is blended. The share of the other is uniform in 0 … 1, one for the batch. Whole numbers (tokens) are left alone.
    """
    if not inputs.is_floating_point() or rng.random() < PLAIN:
        return inputs
    other = inputs[torch.from_numpy(rng.permutation(len(inputs)))]
    share, boxed = rng.random(), rng.random() < 0.5
    if inputs.dim() != 4 or not boxed:
        return (1 - share) * inputs + share * other
    height, width = inputs.shape[2:]
    tall, wide = round(height * share**0.5), round(width * share**0.5)
    top, left = rng.integers(0, height - tall + 1), rng.integers(0, width - wide + 1)
    mixed = inputs.clone()
    mixed[:, :, top : top + tall, left : left + wide] = other[:, :, top : top + tall, left : left + wide]
    return mixed
