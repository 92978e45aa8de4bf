"""Execution of a plan on a batch, on any torch device: one resampling, one colour product, then blur and erase."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from attar.records import Policy
from attar.stages.augment.plan import Plan, sample


def apply(
    images: UInt8[np.ndarray, "items height width 3"] | Tensor, plan: Plan, device: str = "cpu"
) -> Float[Tensor, "items 3 height width"]:
    """Augmented views in [0, 1], one per image.

    Geometry samples bilinearly and reflects at the border; colour is clipped once, at the end; the erased box becomes mid grey.
    """
    pixels = torch.as_tensor(images, device=device).permute(0, 3, 1, 2).float() / 255
    move = torch.from_numpy(plan.geometry).to(device)
    grid = F.affine_grid(move, list(pixels.shape), align_corners=False)
    views = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    mix = torch.from_numpy(plan.colour).to(device)
    views = torch.einsum("nij,njhw->nihw", mix[:, :, :3], views) + mix[:, :, 3, None, None]
    views = _blur(views, plan.blur)
    return _erase(views, torch.from_numpy(plan.erase).to(device)).clamp_(0, 1)


def _blur(views: Tensor, share: np.ndarray) -> Tensor:
    """Separable Gaussian, its own sigma and reach (2.5 sigma) per view; views that were not drawn are not touched."""
    chosen = np.flatnonzero(share > 0)
    if not len(chosen):
        return views
    height, width = views.shape[2:]
    sigma = torch.from_numpy(share[chosen]).to(views.device) * min(height, width)
    reach = (2.5 * sigma).ceil().clamp(1, min(height, width) - 1)
    radius = int(reach.max())
    offsets = torch.arange(-radius, radius + 1, device=views.device)
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None].clamp_min(1e-3)) ** 2)
    kernel = kernel * (offsets.abs() <= reach[:, None])  # a view does not depend on the widest blur of its batch
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(3, 0)  # one row per view and channel
    flat = F.pad(views[chosen].flatten(0, 1)[None], (radius,) * 4, mode="reflect")
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=len(kernel))
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=len(kernel))
    out = views.clone()
    out[chosen] = flat[0].unflatten(0, (-1, 3))
    return out


def _erase(views: Tensor, boxes: Tensor) -> Tensor:
    height, width = views.shape[2:]
    x = (torch.arange(width, device=views.device) + 0.5) / width
    y = (torch.arange(height, device=views.device) + 0.5) / height
    inside_x = (x > boxes[:, :1]) & (x < boxes[:, 2:3])
    inside_y = (y > boxes[:, 1:2]) & (y < boxes[:, 3:])
    return views.masked_fill((inside_y[:, :, None] & inside_x[:, None, :])[:, None], 0.5)


def augment(images: np.ndarray, policy: Policy, clusters: np.ndarray | None, rng: np.random.Generator, device: str = "cpu") -> Tensor:
    """One view of each image under a policy, with the dials of each item's cluster where the policy has them."""
    dials = [policy.of(None if clusters is None else int(cluster)) for cluster in (clusters if clusters is not None else [0] * len(images))]
    return apply(images, sample(dials, rng), device)


def preview(
    images: UInt8[np.ndarray, "items height width 3"], policy: Policy, clusters: np.ndarray, rng: np.random.Generator, views: int
) -> UInt8[np.ndarray, "items views height width 3"]:
    """Several views of each image, as bytes to show to a person."""
    made = [augment(images, policy, clusters, rng).permute(0, 2, 3, 1) for _ in range(views)]
    return (torch.stack(made, 1) * 255).round().byte().numpy()


def normalise(views: Float[Tensor, "items 3 height width"], mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(views − mean) / std per channel."""
    shape = (1, 3, 1, 1)
    return (views - views.new_tensor(mean).view(shape)) / views.new_tensor(std).view(shape)
