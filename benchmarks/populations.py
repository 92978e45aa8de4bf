"""The sets of `certificate.py`: a classifier, unlabelled items to compress it with, and a population that neither has seen."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import workloads
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from torch import Tensor, nn


class Population(NamedTuple):
    module: nn.Module  # in evaluation mode; inputs → logits
    items: Tensor  # (m, …) what compression gets
    population: Tensor  # (n, …)
    labels: np.ndarray | None  # (n,) of the population; None where the classes are not the labels'


def convolutional(side: int, classes: int = 10) -> nn.Module:
    """Three convolutions with norms on grey images, pooled to 2 × 2."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        if side >= 14:
            layers.append(nn.MaxPool2d(2))
            side //= 2
    return nn.Sequential(*layers, nn.AvgPool2d(side // 2), nn.Flatten(), nn.Linear(128, classes))


def perceptron(width: int, classes: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, classes))


def fitted(module: nn.Module, inputs: Tensor, labels: np.ndarray, epochs: int) -> nn.Module:
    """The user's model: fitted to labels, as plainly as can be."""
    optimiser, truth = torch.optim.Adam(module.parameters(), 2e-3), torch.from_numpy(labels)
    for _ in range(epochs):
        for chosen in torch.randperm(len(inputs)).split(64):
            optimiser.zero_grad()
            F.cross_entropy(module(inputs[chosen]), truth[chosen]).backward()
            optimiser.step()
    return module.eval()


def _split(module: nn.Module, inputs: Tensor, labels: np.ndarray, train: int, items: int, epochs: int, seed: int) -> Population:
    """Fits a module to `train` random items with their labels; the first `items` of them compress it, all others are the population."""
    torch.manual_seed(seed)
    order = np.random.default_rng(seed).permutation(len(inputs))
    mine, rest = order[:train], order[train:]
    return Population(fitted(module, inputs[mine], labels[mine], epochs), inputs[mine[:items]], inputs[rest], labels[rest])


def digits(seed: int) -> Population:
    """Scikit-learn's 1,797 digits of 8 × 8 pixels; those to fit on are few, so that a population is left."""
    found = load_digits()
    inputs = torch.from_numpy(found.images).float()[:, None] / 8 - 1
    torch.manual_seed(seed)
    return _split(convolutional(8), inputs, found.target.astype(np.int64), 400, 400, 15, seed)


def mnist(file: Path, items: int, seed: int) -> Population:
    """MNIST as arrays x (n, 28, 28) and y (n,): 5,000 digits fit the model, the others are the population."""
    with np.load(file) as found:
        inputs, labels = torch.from_numpy(found["x"])[:, None].float() / 127.5 - 1, found["y"].astype(np.int64)
    torch.manual_seed(seed)
    return _split(convolutional(28), inputs, labels, 5000, items, 3, seed)


def rows(file: Path, items: int, seed: int) -> Population:
    """A table whose last column is the class: numbers standardised, words one-hot; 4,000 rows fit the model."""
    with file.open(newline="") as stream:
        columns = list(zip(*([cell.strip() for cell in line] for line in csv.reader(stream) if line)))
    parts = []
    for column in columns[:-1]:
        try:
            values = np.array(column, np.float32)[:, None]
            parts.append((values - values.mean()) / max(float(values.std()), 1e-6))
        except ValueError:  # words
            names, index = np.unique(column, return_inverse=True)
            parts.append(np.eye(len(names), dtype=np.float32)[index])
    inputs, labels = torch.from_numpy(np.concatenate(parts, 1)), np.unique(columns[-1], return_inverse=True)[1].astype(np.int64)
    torch.manual_seed(seed)
    return _split(perceptron(inputs.shape[1]), inputs, labels, 4000, items, 5, seed)


def cifar(data: Path, resnets: Path, builder: str, items: int, seed: int, cache: Path) -> Population:
    """JPEG CIFAR and a given ResNet: random training images compress it, the test images are the population."""
    given = workloads.original(f"{resnets / 'resnet_cifar.py'}:{builder}", resnets / f"{builder}.safetensors")
    train, test = (workloads.pictures(data / split, cache) for split in ("train", "test"))
    chosen = np.random.default_rng(seed).choice(len(train.images), items, replace=False)
    truth = np.array([given.classes.index(name) for name in test.classes])[test.labels]
    tensors = [workloads.normalised(images, given.mean, given.std) for images in (train.images[chosen], test.images)]
    return Population(given.module, *tensors, truth)


class Logits(nn.Module):
    """A transformers classifier as a module that gives its logits."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, pixels: Tensor) -> Tensor:
        return self.body(pixels).logits


def clothing(photos: Path, mobilenet: Path, items: int, seed: int) -> Population:
    """Photos through a classifier of other things (ImageNet): agreement alone is judged."""
    from transformers import AutoModelForImageClassification

    module = Logits(AutoModelForImageClassification.from_pretrained(mobilenet).eval()).eval()
    files = sorted(photos.glob("*.jpg"))
    if not files:
        raise SystemExit(f"{photos}: no .jpg inside")
    images = np.stack([np.asarray(_photo(file)) for file in files])
    order = np.random.default_rng(seed).permutation(len(images))
    mine, rest = (
        workloads.normalised(images[part], (0.5,), (0.5,)) for part in (order[: min(items, len(order) // 4)], order[len(order) // 4 :])
    )
    return Population(module, mine, rest, None)


def _photo(file: Path) -> Image.Image:
    """Upright, the shorter side 256, the middle 224 × 224."""
    with Image.open(file) as opened:
        opened.draft("RGB", (512, 512))
        upright = ImageOps.exif_transpose(opened).convert("RGB")
    scale = 256 / min(upright.size)
    resized = upright.resize((round(upright.width * scale), round(upright.height * scale)), Image.Resampling.BILINEAR)
    left, top = (resized.width - 224) // 2, (resized.height - 224) // 2
    return resized.crop((left, top, left + 224, top + 224))
