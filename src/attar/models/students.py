"""Encoders that attar builds itself."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Residual block (He et al. 2016): two 3 × 3 convolutions; where the shape changes the shortcut is pooled, then projected (ResNet-D)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False) if stride == 2 else nn.Identity()
        same = stride == 1 and inputs == outputs
        project = nn.Identity() if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Sequential(pool, project)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Encoder(nn.Module):
    """A small convolutional encoder: images (n, 3, side, side) → embeddings (n, dim).

    Stages halve the map and double the channels until the map is about 4 pixels wide, so that the receptive field covers
    the image whatever its size; `width` is the channels of the first stage. Pooled by the mean.
    """

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        coarse = side > 40  # a strided stem: full resolution would take most of the compute for little
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2 if coarse else 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        map_side, stages, channels = side // 2 if coarse else side, [], width
        stages.append(Block(channels, channels, 1))
        while map_side > 4 and channels < 8 * width:
            stages.append(Block(channels, 2 * channels, 2))
            channels, map_side = 2 * channels, map_side // 2
        self.stages = nn.Sequential(*stages)
        self.dim = channels

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x)).mean((2, 3))


def input_side(short_side: int) -> int:
    """Side of the encoder's input for images whose median shorter side is `short_side` pixels: the multiple of 8 at or above it, 16 to 64.

    >>> [input_side(side) for side in (8, 28, 32, 400)]
    [16, 32, 32, 64]
    """
    return min(64, max(16, -(-short_side // 8) * 8))
