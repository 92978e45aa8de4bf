"""Feature mimicry: where inside a cut network its maps can be compared with the original's, and how far they are apart.

Cuts inside blocks leave what passes from block to block its shape. The last of these maps of every shape (the end of each stage of a
convolutional network), or where there are few shapes some evenly spaced ones (the tokens of a transformer), are what a student is taught
first (FitNets, Romero et al. 2015).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

MOST = 4
"""Maps compared, at most."""


class Taps:
    """The outputs of some modules of a network, as they were in its last pass; to be closed after use."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        self.maps: dict[str, Tensor] = {}
        self._handles = [network.get_submodule(name).register_forward_hook(self._keep(name)) for name in names]

    def _keep(self, name: str) -> Callable[[Any, Any, Any], None]:
        return lambda _, __, output: self.maps.__setitem__(name, output)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def _maps(network: nn.Module, example: Tensor) -> dict[str, torch.Size]:
    """Shape of what each composed module returns, where that is a map (n, c, h, w) or tokens (n, t, d), in the order in which they end."""
    names = {module: name for name, module in network.named_modules() if name and next(module.children(), None) is not None}
    seen: dict[str, torch.Size] = {}

    def note(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() in (3, 4):
            seen.pop(names[module], None)
            seen[names[module]] = output.shape

    handles = [module.register_forward_hook(note) for module in names]
    try:
        with torch.no_grad():
            network(example)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def comparable(student: nn.Module, teacher: nn.Module, example: Tensor) -> list[str]:
    """Names of the modules whose outputs are compared; none where the student is of another architecture."""
    ours, theirs = _maps(student, example), _maps(teacher, example)
    common = [name for name, shape in theirs.items() if ours.get(name) == shape]
    last = {theirs[name]: name for name in common}
    if len(last) >= MOST - 1 or len(common) <= MOST:
        return list(last.values())[-MOST:]
    return [common[place] for place in np.linspace(0, len(common) - 1, MOST + 1).round().astype(int)[1:]]


def feature_distance(ours: Sequence[Float[Tensor, "items ..."]], theirs: Sequence[Float[Tensor, "items ..."]]) -> Float[Tensor, ""]:
    """Mean over the maps of the mean squared difference, as a share of the teacher's variance."""
    parts = [(one - other).square().mean() / other.var().clamp_min(1e-12) for one, other in zip(ours, theirs)]
    return torch.stack(parts).mean()
