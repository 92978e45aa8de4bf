"""The peers of compression by cutting: Torch-Pruning's importances, then plain logit distillation for what is left of the same minutes.

Nothing here reads a label. A peer gets what attar gets (the module, normalised images, minutes, threads) and a recipe its users would be
content with: gradients renewed while it prunes, the classifier kept, the share of MACs met closely, channels-last memory, batch norms in
training mode, random crops and flips, AdamW with a warm-up and a cosine that ends with the minutes. Rate and loss are the best of 1e-3, 3e-3 and
6e-3 with softened KL, 1e-3 and 3e-3 with squared error, in 60 steps on ResNet-56.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

STEPS = 200  # of iterative pruning from nothing to everything: half a per cent of the channels each
RENEW = 10  # steps between two computations of gradients
SAMPLES = 256  # images that gradients are computed on
BATCH = 128
TEMPERATURE = 4.0
RATE = 3e-3


class Method(NamedTuple):
    """A way to prune with Torch-Pruning."""

    importance: Callable[[], Any]
    gradients: Callable[[Any, nn.Module, Tensor, Tensor], None] | None = None  # (importance, pruned so far, images, the original's logits)
    streams: bool = True  # also channels of residual streams, not only those inside blocks


def macs(module: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one item, from torch's own counter."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(example[:1])
    return counter.get_total_flops() // 2


def _first_order(_: Any, module: nn.Module, images: Tensor, expected: Tensor) -> None:
    """Gradients of the cross-entropy to the original's own decisions (of the KL to its logits they are zero at the start)."""
    module.zero_grad()
    F.cross_entropy(module(images), expected.argmax(1)).backward()


def _second_order(importance: Any, module: nn.Module, images: Tensor, expected: Tensor) -> None:
    """Squared gradients per image, of labels drawn from the original's probabilities: the diagonal of the Fisher matrix."""
    importance.zero_grad()
    drawn = torch.multinomial(expected.softmax(1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    for image, label in zip(images[:64], drawn[:64]):
        module.zero_grad()
        F.cross_entropy(module(image[None]), label[None]).backward()
        importance.accumulate_grad(module)


METHODS = {
    "magnitude": Method(tp.importance.GroupMagnitudeImportance),
    "magnitude-inner": Method(tp.importance.GroupMagnitudeImportance, streams=False),
    "lamp": Method(tp.importance.LAMPImportance),
    "bn-scale": Method(tp.importance.BNScaleImportance),
    "taylor": Method(tp.importance.GroupTaylorImportance, _first_order),
    "taylor-inner": Method(tp.importance.GroupTaylorImportance, _first_order, streams=False),
    "hessian": Method(tp.importance.GroupHessianImportance, _second_order),
}
"""`inner` leaves residual streams whole: Torch-Pruning shifts their channels wrongly where a shortcut pads them."""


def prune(module: nn.Module, images: Tensor, share: float, method: Method) -> nn.Module:
    """A copy with at most `share` of the MACs, as few channels removed as the importance's order allows; the classifier is kept whole."""
    cut, whole = copy.deepcopy(module).eval(), macs(module, images)
    importance, images = method.importance(), images[:SAMPLES]
    with torch.no_grad():
        expected = module(images)
    kept = [layer for layer in cut.modules() if isinstance(layer, nn.Linear)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = tp.pruner.BasePruner(
            cut,
            images[:1],
            importance=importance,
            global_pruning=True,
            pruning_ratio=1.0,
            iterative_steps=STEPS,
            ignored_layers=kept if method.streams else kept + _streams(cut, images[:1]),
        )
        for step in range(STEPS):
            if macs(cut, images) <= share * whole:
                break
            if method.gradients and step % RENEW == 0:
                method.gradients(importance, cut, images, expected)
            pruner.step()
        else:
            raise SystemExit(f"pruning ended above {share:.0%} of the MACs")
    cut.zero_grad()
    return cut


def _streams(module: nn.Module, example: Tensor) -> list[nn.Module]:
    """Convolutions whose outputs meet others' in an addition: those that share a group with another convolution's outputs."""
    graph = tp.DependencyGraph().build_dependency(module, example)
    found: list[nn.Module] = []
    for group in graph.get_all_groups(root_module_types=[nn.Conv2d]):
        layers = {item.dep.target.module for item in group.items if item.dep.handler.__name__ == "prune_out_channels"}
        makers = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
        found += makers if len(makers) > 1 else ()
    return found


def estimate_norms(module: nn.Module, images: Tensor) -> nn.Module:
    """A copy with batch-norm statistics taken anew from the images: what a user can repair without a gradient."""
    fresh = copy.deepcopy(module).train()
    for layer in fresh.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.reset_running_stats()
            layer.momentum = None  # a plain average over batches
    with torch.no_grad():
        for batch in images.split(BATCH):
            if len(batch) > 1:
                fresh(batch)
    for mine, layer in zip(module.modules(), fresh.modules()):
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = mine.momentum  # type: ignore[union-attr, assignment]
    return fresh.eval()


def jitter(images: Tensor, generator: torch.Generator, pad: int = 4) -> Tensor:
    """Each image (n, c, h, w) shifted by up to `pad` pixels either way, zeros moving in, and mirrored or not."""
    n, _, height, width = images.shape
    top, left = (torch.randint(2 * pad + 1, (n, 1), generator=generator) for _ in range(2))
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, (pad, pad, pad, pad)).permute(0, 2, 3, 1)
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def kl(logits: Tensor, expected: Tensor) -> Tensor:
    """KL(original ‖ student) of softened probabilities, times T² (Hinton et al. 2015)."""
    soft = F.log_softmax(expected / TEMPERATURE, 1), F.log_softmax(logits / TEMPERATURE, 1)
    return TEMPERATURE**2 * F.kl_div(soft[1], soft[0], reduction="batchmean", log_target=True)


def mse(logits: Tensor, expected: Tensor) -> Tensor:
    return F.mse_loss(logits, expected)


def distil(
    student: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    progress: Callable[[int], float],
    seed: int,
    rate: float = RATE,
    loss: Callable[[Tensor, Tensor], Tensor] = mse,
) -> int:
    """Trains the student on the teacher's logits, in place, until `progress(steps)` reaches 1; returns the steps taken."""
    generator = torch.Generator().manual_seed(seed)
    student.train().to(memory_format=torch.channels_last)
    teacher = copy.deepcopy(teacher).eval().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=1e-4)
    steps, order = 0, torch.empty(0, dtype=torch.long)
    while (done := progress(steps)) < 1:
        if len(order) < BATCH:
            order = torch.cat([order, torch.randperm(len(images), generator=generator)])
        views = jitter(images[order[:BATCH]], generator).contiguous(memory_format=torch.channels_last)
        order = order[BATCH:]
        with torch.no_grad():
            expected = teacher(views)
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (steps + 1) / 20) * 0.5 * (1 + float(torch.cos(torch.tensor(done * torch.pi))))
        optimiser.zero_grad()
        loss(student(views), expected).backward()
        optimiser.step()
        steps += 1
    student.eval()
    return steps


def clock(start: float, seconds: float) -> Callable[[int], float]:
    """Share of the time that has passed since `start` (of time.perf_counter), whatever the steps."""
    return lambda _: (time.perf_counter() - start) / seconds
