"""Repair: what the channels that stay can take over from those that go, in closed form, from unlabelled activations.

For a consumer with weights W (outputs × inputs) and inputs x, the second moments G = E[x xᵀ] are gathered in one streaming pass.
Removing inputs J and re-fitting the rest by least squares costs exactly

    err(J) = min over W' with W'_J = 0 of tr((W − W') H (W − W')ᵀ),   H = G + ridge

and removing one more channel j adds tr(W_j [H⁻¹]_jj⁻¹ W_jᵀ) (optimal brain surgeon, Hassibi & Stork 1993; for structures ZipLM,
Kurtic et al. 2023). Taking the cheapest channel each time gives the order of the cuts and the damage of every width at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from attar.models.network import Network
from attar.stages.compress.prune import Group

RIDGE = 1e-3
"""Ridge, as a share of the mean second moment: keeps the inverse tame and the repaired weights near the old ones."""
POSITIONS = 64
"""Places of a feature map looked at per image; more adds cost and little information, neighbours being alike."""


AT_ONCE = 8
"""Channels of a wide group removed between two scorings."""


class Moments(NamedTuple):
    """Second moments of a consumer's inputs; the last input is the constant 1, which carries the bias."""

    gram: Float[Tensor, "inputs inputs"]  # float64, mean over positions; inputs = channels × kernel area + 1
    rows: int


def patches(inputs: Tensor, layer: nn.Module, generator: torch.Generator) -> Float[Tensor, "positions inputs"]:
    """Inputs of a convolution or linear layer as rows, one per output position; of each image at most POSITIONS, chosen at random."""
    if isinstance(layer, nn.Linear):
        rows = inputs.flatten(0, -2)
        per_item = len(rows) // len(inputs)
        if per_item > POSITIONS:
            chosen = torch.randperm(per_item, generator=generator)[:POSITIONS]
            rows = rows.unflatten(0, (len(inputs), per_item))[:, chosen].flatten(0, 1)
        return rows
    assert isinstance(layer, nn.Conv2d)
    (kernel_y, kernel_x), (stride_y, stride_x) = layer.kernel_size, layer.stride
    (pad_y, pad_x), (step_y, step_x) = cast(tuple[int, int], layer.padding), layer.dilation
    padded = nn.functional.pad(inputs, (pad_x, pad_x, pad_y, pad_y))
    lines = (padded.shape[2] - step_y * (kernel_y - 1) - 1) // stride_y + 1
    columns = (padded.shape[3] - step_x * (kernel_x - 1) - 1) // stride_x + 1
    chosen = torch.randperm(lines * columns, generator=generator)[:POSITIONS]
    top, left = chosen // columns * stride_y, chosen % columns * stride_x
    y = top[:, None, None] + torch.arange(kernel_y)[:, None] * step_y
    x = left[:, None, None] + torch.arange(kernel_x)[None, :] * step_x
    return padded[:, :, y, x].permute(0, 2, 1, 3, 4).flatten(2).flatten(0, 1)  # (n, C, P, ky, kx) → (n·P, C·ky·kx)


def gather(network: Network, batches: Iterable[Tensor], layers: Sequence[str], seed: int) -> dict[str, Moments]:
    """Second moments of the inputs of some layers, in one pass over normalised batches; memory is that of the moments."""
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)
    generator = torch.Generator().manual_seed(seed)

    def hook(name: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = patches(inputs[0], layer, generator)
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
            product = (rows.T @ rows).double()
            sums[name] = sums[name] + product if name in sums else product
            counts[name] += len(rows)

        return layer.register_forward_pre_hook(add)

    handles = [hook(name, network.get_submodule(name)) for name in layers]
    try:
        with torch.no_grad():
            for batch in batches:
                network(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: Moments(sums[name] / counts[name], counts[name]) for name in layers}


def weights_of(layer: nn.Module) -> Float[Tensor, "outputs inputs"]:
    """Weights of a convolution or linear layer as a float64 matrix, its bias as the last column."""
    matrix = layer.weight.detach().double().flatten(1)  # type: ignore[union-attr, operator]
    bias = layer.bias.detach().double() if layer.bias is not None else matrix.new_zeros(len(matrix))  # type: ignore[union-attr, operator]
    return torch.cat([matrix, bias[:, None]], 1)


def ridged(moments: Moments) -> Float[Tensor, "inputs inputs"]:
    """Second moments with the ridge on every input but the constant: H of the formula above."""
    gram = moments.gram.clone()
    inner = gram.diagonal()[:-1]  # the bias is not held back
    inner += RIDGE * inner.mean() + 1e-10
    return gram


def eliminate(
    consumers: Sequence[tuple[Float[Tensor, "outputs inputs"], Moments]], width: int
) -> tuple[list[int], Float[np.ndarray, " removed"]]:
    """Order in which to remove a group's channels, and the damage after removing 0, 1, … width − 1 of them.

    Damage is the squared error of the consumers' outputs after optimal repair, each over the variance of its outputs. Groups of 128 channels
    and more lose up to AT_ONCE at a time, scored together before and charged together after: widths are multiples of 8 anyway.
    """
    states = []
    for weight, moments in consumers:
        mean = moments.gram[-1, :-1]
        covariance = moments.gram[:-1, :-1] - mean[:, None] * mean[None, :]
        variance = float(((weight[:, :-1] @ covariance) * weight[:, :-1]).sum())
        block = (weight.shape[1] - 1) // width
        states.append((weight.clone(), torch.linalg.inv(ridged(moments)), block, max(variance, 1e-12)))
    alive = torch.ones(width, dtype=torch.bool)
    order: list[int] = []
    damage = [0.0]
    while len(order) < width - 1:
        scores = torch.stack([_scores(weight, inverse, block, width) / variance for weight, inverse, block, variance in states]).sum(0)
        scores[~alive] = float("inf")
        chosen = scores.argsort(stable=True)[: min(max(1, min(AT_ONCE, width // 64)), width - 1 - len(order))]
        added = 0.0
        for weight, inverse, block, variance in states:
            inputs = (chosen[:, None] * block + torch.arange(block)).flatten()
            added += _remove(weight, inverse, inputs) / variance
        alive[chosen] = False
        damage += [damage[-1] + added * (index + 1) / len(chosen) for index in range(len(chosen))]
        order += chosen.tolist()
    return order, np.array(damage)


def _scores(weight: Tensor, inverse: Tensor, block: int, width: int) -> Tensor:
    """tr(W_j [H⁻¹]_jj⁻¹ W_jᵀ) for every channel j; removed channels have zero weights and a unit block."""
    size = width * block
    if block == 1:
        return weight[:, :size].square().sum(0) / inverse.diagonal()[:size]
    blocks = inverse[:size, :size].reshape(width, block, width, block).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    parts = weight[:, :size].reshape(len(weight), width, block).permute(1, 2, 0)  # (width, block, outputs)
    return (torch.linalg.inv(blocks) * (parts @ parts.transpose(1, 2))).sum((1, 2))


def _remove(weight: Tensor, inverse: Tensor, inputs: Tensor) -> float:
    """One step of the surgeon, in place: the weights that remain take over, the inverse shrinks; returns the error this adds."""
    across = torch.linalg.solve(inverse[inputs][:, inputs], inverse[inputs])  # (removed, inputs)
    gone = weight[:, inputs]
    error = float((gone * torch.linalg.solve(inverse[inputs][:, inputs], gone.T).T).sum())
    weight.addmm_(gone, across, alpha=-1)
    inverse.addmm_(inverse[:, inputs], across, alpha=-1)
    weight[:, inputs] = 0
    inverse[inputs], inverse[:, inputs] = 0, 0
    inverse[inputs, inputs] = 1
    return max(error, 0.0)


def refit(weight: Float[Tensor, "outputs inputs"], moments: Moments, keep: Tensor) -> Float[Tensor, "outputs kept"]:
    """Weights on the kept inputs that come nearest to the old outputs: W H[:, S] H[S, S]⁻¹."""
    hessian = ridged(moments)
    return torch.linalg.solve(hessian[keep][:, keep], (weight @ hessian[:, keep]).T).T


def inputs_kept(channels: Sequence[int], width: int, inputs: int) -> Tensor:
    """Indices of a consumer's inputs (the constant last) when only some channels stay."""
    block = (inputs - 1) // width
    kept = (torch.tensor(sorted(channels))[:, None] * block + torch.arange(block)).flatten()
    return torch.cat([kept, torch.tensor([inputs - 1])])


def write_back(layer: nn.Module, matrix: Float[Tensor, "outputs inputs"]) -> None:
    """Puts repaired weights and bias into a layer that was cut; a layer without a bias gets one."""
    with torch.no_grad():
        layer.weight.copy_(matrix[:, :-1].reshape(layer.weight.shape).float())  # type: ignore[operator, union-attr, arg-type]
        layer.bias = nn.Parameter(matrix[:, -1].float().clone())


def repaired_weights(network: Network, group: Group, channels: Sequence[int], moments: dict[str, Moments]) -> dict[str, Tensor]:
    """Re-fitted weights of every consumer of a group when only some channels stay; the network is not changed."""
    found = {}
    for name in group.consumers:
        weight = weights_of(network.get_submodule(name))
        found[name] = refit(weight, moments[name], inputs_kept(channels, group.width, weight.shape[1]))
    return found
