"""Small networks of the families that matter: residual, depthwise, transformer; and transformers folders as save_pretrained writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attar.models.network import Network, find_classifier

SIDE = 32
CLASSES = 7


class Residual(nn.Module):
    """conv → two basic blocks (the second with stride 2 and a projected shortcut) → pool → linear."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.a1, self.a2 = nn.Conv2d(width, 2 * width, 3, 1, 1, bias=False), nn.Conv2d(2 * width, width, 3, 1, 1, bias=False)
        self.n1, self.n2 = nn.BatchNorm2d(2 * width), nn.BatchNorm2d(width)
        self.b1, self.b2 = nn.Conv2d(width, 2 * width, 3, 2, 1), nn.Conv2d(2 * width, 2 * width, 3, 1, 2, dilation=2)
        self.short = nn.Conv2d(width, 2 * width, 1, 2)
        self.fc = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = F.relu(x + self.n2(self.a2(F.relu(self.n1(self.a1(x))))))
        x = F.relu(self.short(x) + self.b2(F.relu(self.b1(x))))
        return self.fc(x.mean((2, 3)))


class Inverted(nn.Module):
    """MobileNetV2's block: 1 × 1 up, depthwise 3 × 3, 1 × 1 down, added to its input; a 1 × 1 convolution classifies."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.up = nn.Sequential(nn.Conv2d(8, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False), nn.BatchNorm2d(32), nn.ReLU6())
        self.down = nn.Sequential(nn.Conv2d(32, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.classifier = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.down(self.depthwise(self.up(x)))
        return self.classifier(F.adaptive_avg_pool2d(x, 1)).flatten(1)


class Transformer(nn.Module):
    """A ViT of one block: patches, a class token, attention, an MLP; a linear layer on the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        q, k, v = self.qkv(self.norm1(x)).reshape(x.shape[0], x.shape[1], 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(y)
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x[:, 0])


class PaddedBlock(nn.Module):
    """A basic block whose shortcut has no weights (option A): every second pixel, missing channels padded with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.stride, self.widen = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.widen, self.widen)))


class Padded(nn.Module):
    """A user's CIFAR ResNet in small: a stem, two stages of two blocks with shortcuts of option A, pool, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(PaddedBlock(8, 8, 1), PaddedBlock(8, 8, 1), PaddedBlock(8, 16, 2), PaddedBlock(16, 16, 1))
        self.linear = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(F.relu(self.bn(self.conv(x)))).mean((2, 3)))


class Joint(nn.Module):
    """An attention over 4 × 4 patches whose queries, keys and values come from one layer; its code asks `heads` and `head_dim`."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim = 4, 6
        self.patches, self.norm = nn.Conv2d(3, 24, 8, 8), nn.LayerNorm(24)
        self.qkv, self.proj, self.head = nn.Linear(24, 72), nn.Linear(24, 24), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(x)).reshape(x.shape[0], -1, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = ((q @ k.transpose(2, 3)) / self.head_dim**0.5).softmax(3) @ v
        return self.head((x + self.proj(y.transpose(1, 2).flatten(2))).mean(1))


BODIES: dict[str, Callable[[], nn.Module]] = {"residual": Residual, "inverted": Inverted, "transformer": Transformer}


def images(count: int, side: int = SIDE, seed: int = 0) -> Tensor:
    """Smooth noise, (count, 3, side, side): neighbouring pixels are alike, as in photographs."""
    noise = torch.randn(count, 3, side // 4, side // 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, (side, side), mode="bilinear")


def made(kind: str, seed: int = 0) -> Network:
    """A network with random weights and batch norms that have seen images, in evaluation mode."""
    torch.manual_seed(seed)
    body = BODIES[kind]()
    with torch.no_grad():
        for name, parameter in body.named_parameters():
            if "bn" in name or ".1." in name or name.startswith("n"):
                parameter.add_(0.2 * torch.randn_like(parameter))
        body.train()
        for step in range(20):
            body(images(16, seed=step))
    body.eval()
    return Network(body, find_classifier(body, images(2))).eval()


def hf_folder(folder: Path, kind: str, classifier: bool) -> Path:
    """A tiny random model as `save_pretrained` leaves it, with the preprocessor_config.json of its family."""
    import transformers as t

    labels = {"num_labels": CLASSES} if classifier else {}
    small = {"image_size": SIDE, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {
        "resnet": lambda: t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **labels),
        "bottleneck": lambda: t.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="bottleneck", **labels),
        "vit": lambda: t.ViTConfig(intermediate_size=32, **small, **labels),
        "dinov2": lambda: t.Dinov2Config(mlp_ratio=2, **small, **labels),
        "convnext": lambda: t.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, **labels),
        "mobilenet": lambda: t.MobileNetV2Config(depth_multiplier=0.25, depth_divisible_by=4, min_depth=4, image_size=SIDE, **labels),
    }
    torch.manual_seed(0)
    config = settings[kind]()
    model = (t.AutoModelForImageClassification if classifier else t.AutoModel).from_config(config)
    with torch.no_grad():
        model.train()
        for step in range(20):  # batch norms that have seen images
            model(images(8, seed=step))
        if kind == "dinov2" or kind == "convnext":  # layer scale starts at 1e-6 or 1: the blocks would be invisible or dominate
            for name, parameter in model.named_parameters():
                if "layer_scale" in name:
                    parameter.fill_(0.5)
    model.eval().save_pretrained(folder)
    crop = {"size": {"shortest_edge": 36}, "crop_size": {"height": SIDE, "width": SIDE}, "do_center_crop": True}
    exact = {"size": {"height": SIDE, "width": SIDE}}
    near = {"size": {"shortest_edge": SIDE}, "crop_pct": 0.875}
    size = exact if kind == "vit" else near if kind in ("convnext", "resnet", "bottleneck") else crop
    body = {"do_resize": True, "do_normalize": True, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3], "resample": 3} | size
    (folder / "preprocessor_config.json").write_text(json.dumps(body), "utf-8")
    return folder
