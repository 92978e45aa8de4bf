"""A small generative adversarial network for a processor's minutes: networks, differentiable augmentation, its adaptive strength. Pure torch.

The convolutions are those of DCGAN (Radford et al. 2016), the losses hinges with a spectrally normalised discriminator (Miyato et al. 2018), the
augmentation of what the discriminator sees that of DiffAugment (Zhao et al. 2020), and how often it is applied follows the discriminator's
overfitting as in ADA (Karras et al. 2020).
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

LATENT = 64
"""Numbers that a sample is drawn from."""
WIDTHS = {4: 128, 8: 96, 16: 48, 32: 24, 64: 16, 128: 8}
"""Channels of a map by its side in pixels, in both networks."""
RATES = {"generator": 4e-4, "discriminator": 4e-4}
"""Learning rates of Adam."""
MOMENTA = (0.5, 0.99)
MEMORY = 0.995
"""Decay per step of the running average of the generator's weights that samples are drawn from."""
OVERFIT = 0.1
"""The overfitting signal that the strength of the augmentation is held at."""
MOST = 0.8
"""The largest share of augmented images: at 1 the generator would learn the augmentation itself (Karras et al. 2020, section 2.2)."""


class Generator(nn.Module):
    """Latent numbers (n, LATENT) → images (n, 3, side, side) in [−1, 1]; the side is a power of two, 8 to 128."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.start = nn.Linear(LATENT, WIDTHS[4] * 16, bias=False)
        layers: list[nn.Module] = [nn.BatchNorm2d(WIDTHS[4]), nn.ReLU()]
        for at in _sides(side)[1:]:
            layers += [nn.ConvTranspose2d(WIDTHS[at // 2], WIDTHS[at], 4, 2, 1, bias=False), nn.BatchNorm2d(WIDTHS[at]), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(WIDTHS[side], 3, 3, 1, 1), nn.Tanh())

    def forward(self, latent: Tensor) -> Tensor:
        return self.layers(self.start(latent).unflatten(1, (WIDTHS[4], 4, 4)))


class Discriminator(nn.Module):
    """Images (n, 3, side, side) in [−1, 1] → how real each looks, (n,), above 0 for real.

    The last map gets the batch's mean standard deviation as a further channel, so that samples that are all alike give themselves away
    (Karras et al. 2018, section 3).
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for at in _sides(side)[-2::-1]:
            layers += [spectral_norm(nn.Conv2d(inputs, WIDTHS[at], 4, 2, 1)), nn.LeakyReLU(0.2)]
            inputs = WIDTHS[at]
        self.layers = nn.Sequential(*layers)
        self.mixed = nn.Sequential(spectral_norm(nn.Conv2d(inputs + 1, inputs, 3, 1, 1)), nn.LeakyReLU(0.2))
        self.end = spectral_norm(nn.Linear(inputs * 16, 1))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.layers(images)
        spread = maps.std(0, unbiased=False).mean().expand(len(maps), 1, 4, 4)
        return self.end(self.mixed(torch.cat([maps, spread], 1)).flatten(1))[:, 0]


def _sides(side: int) -> list[int]:
    """Sides of the maps from 4 pixels to `side`."""
    sides = [at for at in WIDTHS if at <= side]
    if side not in WIDTHS or len(sides) < 2:
        raise ValueError(f"side: {side}; expected one of {', '.join(map(str, list(WIDTHS)[1:]))}")
    return sides


class Draw(NamedTuple):
    """How n images are augmented; rows that are not drawn are left as they are."""

    drawn: Tensor  # (n, 3) bool: colour, translation, cutout
    brightness: Tensor  # (n,) added, −0.5 … 0.5 of a range of 2
    saturation: Tensor  # (n,) factor on the distance from the pixel's mean, 0 … 2
    contrast: Tensor  # (n,) factor on the distance from the image's mean, 0.5 … 1.5
    move: Tensor  # (n, 2) pixels down and right, up to an eighth of the side
    hole: Tensor  # (n, 2) centre of the square that is cut out, half a side wide; pixels


def draw(count: int, side: int, strength: float, rng: np.random.Generator) -> Draw:
    """Parameters for `count` images; each of the three kinds is applied to an image with probability `strength`, 0 … 1."""
    reach = max(1, side // 8)
    parts = (
        rng.random((count, 3)) < strength,
        rng.uniform(-0.5, 0.5, count).astype(np.float32),
        rng.uniform(0, 2, count).astype(np.float32),
        rng.uniform(0.5, 1.5, count).astype(np.float32),
        rng.integers(-reach, reach + 1, (count, 2)),
        rng.integers(0, side, (count, 2)),
    )
    return Draw(*map(torch.from_numpy, parts))


def augmented(images: Float[Tensor, "n 3 s s"], plan: Draw) -> Float[Tensor, "n 3 s s"]:
    """DiffAugment (Zhao et al. 2020): colour, translation (mid grey moves in), cutout (mid grey), in that order; differentiable by the images."""
    side = images.shape[2]
    colour, moved, cut = (plan.drawn[:, kind, None, None, None] for kind in range(3))
    views = images + plan.brightness[:, None, None, None]
    grey = views.mean(1, keepdim=True)
    views = grey + (views - grey) * plan.saturation[:, None, None, None]
    middle = views.mean((1, 2, 3), keepdim=True)
    views = middle + (views - middle) * plan.contrast[:, None, None, None]
    views = torch.where(colour, views, images)
    place = torch.arange(side, device=images.device)
    from_ = place - torch.where(moved[:, :, 0, 0], plan.move, 0)[:, :, None]  # (n, 2, s): the row and the column each pixel comes from
    rows, columns = (at.clamp(0, side - 1) for at in from_.unbind(1))
    number = torch.arange(len(images), device=images.device)[:, None, None]
    views = views.permute(0, 2, 3, 1)[number, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    inside = ((from_ >= 0) & (from_ < side)).unbind(1)
    views = views * (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
    near = ((place - plan.hole[:, :, None] >= -(side // 4)) & (place - plan.hole[:, :, None] < side // 4)).unbind(1)
    return views * ~(cut & (near[0][:, :, None] & near[1][:, None, :])[:, None])


class Gan(nn.Module):
    """Both networks, and the running average of the generator."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.generator, self.discriminator = Generator(side), Discriminator(side)
        self.average = copy.deepcopy(self.generator).requires_grad_(False)

    def optimisers(self) -> dict[str, torch.optim.Optimizer]:
        return {name: torch.optim.Adam(self.get_submodule(name).parameters(), rate, MOMENTA) for name, rate in RATES.items()}


def latents(count: int, rng: np.random.Generator) -> Float[Tensor, "n latent"]:
    return torch.from_numpy(rng.standard_normal((count, LATENT), np.float32))


def scaled(images: UInt8[np.ndarray, "n h w 3"]) -> Float[Tensor, "n 3 h w"]:
    """Bytes as the networks see them, in [−1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def take_step(
    gan: Gan,
    optimisers: dict[str, torch.optim.Optimizer],
    real: Float[Tensor, "n 3 s s"],
    strength: float,
    step: int,
    rng: np.random.Generator,
) -> dict[str, float]:
    """One step of both networks on the same samples, the discriminator's first, and of the generator's average; returns their losses.

    Discriminator: mean max(0, 1 − D(real)) + mean max(0, 1 + D(sample)); generator: −mean D(sample). D sees augmented images only.
    """
    gan.train()
    count = len(real)
    made = gan.generator(latents(count, rng))
    views = [augmented(images, draw(count, gan.side, strength, rng)) for images in (real, made)]
    judged = gan.discriminator(views[0]), gan.discriminator(views[1].detach())
    against = F.relu(1 - judged[0]).mean() + F.relu(1 + judged[1]).mean()
    _descend(optimisers["discriminator"], against)
    gan.discriminator.requires_grad_(False)
    loss = -gan.discriminator(views[1]).mean()
    _descend(optimisers["generator"], loss)
    gan.discriminator.requires_grad_(True)
    decay = min(MEMORY, (step + 1) / (step + 10))
    with torch.no_grad():
        for old, new in zip(gan.average.parameters(), gan.generator.parameters()):
            old.lerp_(new, 1 - decay)
    return {"discriminator_loss": float(against.detach()), "generator_loss": float(loss.detach())}


def _descend(optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step()


@torch.no_grad()
def overfitting(
    gan: Gan, real: Float[Tensor, "n 3 s s"], held: Float[Tensor, "m 3 s s"], strength: float, rng: np.random.Generator
) -> float:
    """How much surer the discriminator is of images it was trained on than of others: mean sign D(real) − mean sign D(held-out), −2 … 2.

    The first term is r_t of Karras et al. (2020); their r_t alone also rises while a young generator is easily told from anything real, which
    held-out images give away. Both sides are augmented as in training.
    """
    gan.discriminator.eval()  # the power iteration of its norms is training's alone
    signs = [gan.discriminator(augmented(images, draw(len(images), gan.side, strength, rng))).sign().mean() for images in (real, held)]
    gan.discriminator.train()
    return float(signs[0] - signs[1])


def adapted(strength: float, signal: float, by: float) -> float:
    """The strength moved by `by` towards more when the signal is above OVERFIT, towards less when below; 0 … MOST.

    >>> adapted(0.5, 0.4, 0.1), adapted(0.05, 0.0, 0.1)
    (0.6, 0.0)
    """
    return float(np.clip(strength + (by if signal > OVERFIT else -by), 0.0, MOST))


@torch.no_grad()
def settle(generator: Generator, rng: np.random.Generator, batches: int = 16) -> None:
    """Re-estimates the statistics of an averaged generator's norms, which no batch was normalised with, and leaves it in evaluation mode."""
    norms = [layer for layer in generator.modules() if isinstance(layer, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
    generator.train()
    for _ in range(batches):
        generator(latents(64, rng))
    generator.eval()


@torch.no_grad()
def generate(model: Generator, count: int, rng: np.random.Generator) -> UInt8[np.ndarray, "n s s 3"]:
    """So many samples of a settled generator; each depends on its own latent numbers alone."""
    made = [model(part) for part in latents(count, rng).split(64)]
    return ((torch.cat(made).permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
