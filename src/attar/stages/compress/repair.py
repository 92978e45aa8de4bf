"""Repair: what the channels that stay can take over from those that go, in closed form, from unlabelled activations.

For a consumer with weights W (outputs × inputs) and inputs x, the second moments H = E[x xᵀ] + ridge are gathered in one streaming pass,
and with them how much the model's own decisions mind an error in its outputs: F = E[Σ g gᵀ], g the gradient of the log-likelihood of a class
drawn from the model itself (Fisher information; no labels). Removing inputs J and re-fitting the rest by least squares costs

    err(J) = min over W' with W'_J = 0 of ½ tr(F (W − W') H (W − W')ᵀ)  ≈  KL(original ‖ cut), nats per item,

and removing one more channel j adds ½ tr(F W_j [H⁻¹]_jj⁻¹ W_jᵀ) (optimal brain surgeon, Hassibi & Stork 1993; for structures ZipLM, Kurtic et
al. 2023; H ⊗ F is K-FAC, Martens & Grosse 2015). Taking the cheapest channel each time gives the order of the cuts and the damage of every width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from attar.models.network import Network
from attar.stages.compress.structure import padding

RIDGE = 1e-3
"""Ridge, as a share of the mean second moment: keeps the inverse tame and the repaired weights near the old ones."""
POSITIONS = 64
"""Places of a feature map looked at per image; more adds cost and little information, neighbours being alike."""
AT_ONCE = 8
"""Channels of a wide group removed between two scorings."""


class Moments(NamedTuple):
    """Second moments of a layer's inputs; the last input is the constant 1, which carries the bias."""

    gram: Float[Tensor, "inputs inputs"]  # float64, mean over positions; inputs = channels × kernel area + 1
    rows: int


def refittable(layer: nn.Module) -> bool:
    """Whether a layer is a linear one or a convolution that mixes all its channels, zero-padded: what `patches` reads."""
    return isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1 and padding(layer) is not None)


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    found = padding(layer)
    assert found is not None, "only refittable layers are read"
    return found


def _lattice(inputs: Tensor, layer: nn.Conv2d) -> tuple[int, int]:
    """Height and width of a convolution's output."""
    spans = zip(inputs.shape[2:], _padding(layer), layer.dilation, layer.kernel_size, layer.stride)
    height, width = ((side + 2 * pad - step * (kernel - 1) - 1) // stride + 1 for side, pad, step, kernel, stride in spans)
    return height, width


def positions_of(inputs: Tensor, layer: nn.Module) -> int:
    """Number of output positions per item: of the feature map, of the tokens, or 1."""
    if isinstance(layer, nn.Conv2d):
        height, width = _lattice(inputs, layer)
        return height * width
    return inputs[0].numel() // inputs.shape[-1]


def some(count: int, generator: torch.Generator) -> Tensor:
    """At most POSITIONS of `count` positions, chosen at random."""
    return torch.randperm(count, generator=generator)[:POSITIONS]


def patches(inputs: Tensor, layer: nn.Module, chosen: Tensor) -> Float[Tensor, "positions inputs"]:
    """Inputs of a convolution or linear layer as rows, one for each item and chosen output position."""
    if isinstance(layer, nn.Linear):
        return inputs.flatten(1, -2)[:, chosen].flatten(0, 1) if inputs.dim() > 2 else inputs
    assert isinstance(layer, nn.Conv2d)
    (kernel_y, kernel_x), (stride_y, stride_x) = layer.kernel_size, layer.stride
    (pad_y, pad_x), (step_y, step_x) = _padding(layer), layer.dilation
    padded = nn.functional.pad(inputs, (pad_x, pad_x, pad_y, pad_y))
    _, columns = _lattice(inputs, layer)
    top, left = chosen // columns * stride_y, chosen % columns * stride_x
    y = top[:, None, None] + torch.arange(kernel_y)[:, None] * step_y
    x = left[:, None, None] + torch.arange(kernel_x)[None, :] * step_x
    return padded[:, :, y, x].permute(0, 2, 1, 3, 4).flatten(2).flatten(0, 1)  # (n, C, P, ky, kx) → (n·P, C·ky·kx)


def with_one(rows: Float[Tensor, "positions inputs"]) -> Tensor:
    """Rows with a constant 1 as their last input."""
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1)


def gather(network: Network, batches: Iterable[Tensor], layers: Sequence[str], seed: int) -> dict[str, Moments]:
    """Second moments of the inputs of some layers, in one pass over normalised batches; memory is that of the moments."""
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)
    generator = torch.Generator().manual_seed(seed)

    def hook(name: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = with_one(patches(inputs[0], layer, some(positions_of(inputs[0], layer), generator)))
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


def sensitivities(network: Network, batches: Iterable[Tensor], layers: Sequence[str], seed: int) -> dict[str, Tensor]:
    """Fisher information of some layers' outputs, (outputs, outputs) float64, summed over positions, mean over items.

    Of a classifier the score is that of a class drawn from its own probabilities; of an encoder that of its embedding seen with normal noise
    of the size of the embedding.
    """
    sums: dict[str, Tensor] = {}
    generator, items = torch.Generator().manual_seed(seed), 0
    kept: dict[str, Tensor] = {}

    def hook(name: str, layer: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def keep(_: nn.Module, __: object, output: Tensor) -> Tensor:
            kept[name] = output
            return output.clone()  # what follows may work in place

        return layer.register_forward_hook(keep)

    handles = [hook(name, network.get_submodule(name)) for name in layers]
    try:
        for batch in batches:
            with torch.enable_grad():
                embedding, logits = network(batch)
                if logits is None:
                    scale = embedding.detach().square().sum(1, keepdim=True).mean().sqrt().clamp_min(1e-12)
                    score = (embedding * torch.randn(embedding.shape, generator=generator)).sum() / scale
                else:
                    chances = logits.detach().softmax(1)
                    drawn = torch.multinomial(chances, 1, generator=generator)
                    score = logits.log_softmax(1).gather(1, drawn).sum()
                gradients = torch.autograd.grad(score, [kept[name] for name in layers])
            items += len(batch)
            for name, gradient in zip(layers, gradients):
                rows = gradient.movedim(1, -1) if isinstance(network.get_submodule(name), nn.Conv2d) else gradient
                rows = rows.reshape(-1, rows.shape[-1])
                product = (rows.T @ rows).double()
                sums[name] = sums[name] + product if name in sums else product
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / items for name, total in sums.items()}


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


class Consumer(NamedTuple):
    """A layer that reads a group's units, as the surgeon sees it."""

    weight: Float[Tensor, "outputs inputs"]
    moments: Moments
    sensitivity: Float[Tensor, "outputs outputs"]


def eliminate(consumers: Sequence[Consumer], width: int) -> tuple[list[int], Float[np.ndarray, " removed"]]:
    """Order in which to remove a group's units, and the damage (nats per item) after removing 0, 1, … width of them.

    Damage is that of the formula above, summed over the consumers, after optimal repair. Groups of 128 units and more lose up to AT_ONCE at a
    time, scored together before and charged together after: widths are multiples of 8 anyway.
    """
    states = []
    for weight, moments, sensitivity in consumers:
        values, vectors = torch.linalg.eigh(sensitivity)
        root = (vectors * values.clamp_min(1e-9 * values.max()).sqrt()).T  # rootᵀ root = F
        states.append((root @ weight, torch.linalg.inv(ridged(moments)), (weight.shape[1] - 1) // width))
    alive = torch.ones(width, dtype=torch.bool)
    order: list[int] = []
    damage = [0.0]
    while len(order) < width:
        scores = torch.stack([_scores(weight, inverse, block, width) for weight, inverse, block in states]).sum(0)
        scores[~alive] = float("inf")
        chosen = scores.argsort(stable=True)[: min(max(1, min(AT_ONCE, width // 64)), width - len(order))]
        added = 0.0
        for weight, inverse, block in states:
            inputs = (chosen[:, None] * block + torch.arange(block)).flatten()
            added += _remove(weight, inverse, inputs) / 2
        alive[chosen] = False
        damage += [damage[-1] + added * (index + 1) / len(chosen) for index in range(len(chosen))]
        order += chosen.tolist()
    return order, np.array(damage)


def _scores(weight: Tensor, inverse: Tensor, block: int, width: int) -> Tensor:
    """tr(W_j [H⁻¹]_jj⁻¹ W_jᵀ) for every unit j; removed units have zero weights and a unit block."""
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


def inputs_kept(channels: Tensor, width: int, inputs: int) -> Tensor:
    """Indices of a layer's inputs (the constant last) when only some of its `width` channels stay."""
    block = (inputs - 1) // width
    return torch.cat([(channels[:, None] * block + torch.arange(block)).flatten(), torch.tensor([inputs - 1])])


def write_back(layer: nn.Module, matrix: Float[Tensor, "outputs inputs"]) -> None:
    """Puts repaired weights and bias into a layer that was cut; a layer without a bias gets one."""
    with torch.no_grad():
        layer.weight.copy_(matrix[:, :-1].reshape(layer.weight.shape).float())  # type: ignore[operator, union-attr, arg-type]
        layer.bias = nn.Parameter(matrix[:, -1].float().clone())
