"""In feature space: what a chosen layer gives is changed while a network trains, gradients and all.

with feature_augment(network, "layer2", {"rotate": 0.5, "noise": (0.5, 0.3)}, np.random.default_rng(0)):
    ...                                          # the training steps; outside the block, and in eval mode, nothing is changed

What the transforms do at strength 1, each amount drawn evenly up to it for every item, and for which features there are such (maps (n, c, h, w),
tokens (n, t, d), embeddings (n, d)):

| name | maps | tokens | embeddings |
|---|---|---|---|
| rotate | ±30° in the plane | ±30° in random planes of two channels each: an orthogonal map, lengths and inner products within an item stay | as tokens |
| scale | zoom, sides × 2^±½ | values × 2^±½ | as tokens |
| resized_crop | a window of 1/4 of the area or more, resampled to the whole | a stretch of 1/4 of the tokens or more, resampled to the whole | – |
| horizontal_flip, vertical_flip | mirror (there or not: any strength above 0) | – | – |
| noise | Gaussian, up to 1/2 of the item's own standard deviation | as maps | as maps |
| dropout | up to 1/2 of the channels zero, the others × 1 / (1 − rate) | as maps | as maps |
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from attar.errors import ModelError, UsageError
from attar.records import Policy
from attar.stages.augment import dials

TRANSFORMS = ("resized_crop", "rotate", "scale", "horizontal_flip", "vertical_flip", "noise", "dropout")
MISSING = {2: ("resized_crop", "horizontal_flip", "vertical_flip"), 3: ("horizontal_flip", "vertical_flip"), 4: ()}
"""Transforms there are not, by the number of axes."""
KINDS = {2: "embeddings (n, d)", 3: "tokens (n, t, d)", 4: "maps (n, c, h, w)"}


@contextmanager
def feature_augment(network: nn.Module, layer: str, policy: Policy | Mapping[str, Any], generator: np.random.Generator) -> Iterator[None]:
    """While the block lasts, what `layer` (its name in network.named_modules()) gives is augmented whenever `network` is in training mode.

    Every forward pass draws anew from the generator, by the policy's global dials. The layer gives a tensor, or a tuple or list that starts with one.
    Raises UsageError for an unknown layer, transform or dial, at the forward pass for a transform that is not for such features, and ModelError for
    a layer that gives something else. The hook goes with the block, also when it is left by an error.
    """
    wanted = dials.read(policy, TRANSFORMS, "features")
    handle = _layer(network, layer).register_forward_hook(lambda _module, _inputs, output: changed(output))

    def changed(output: Any) -> Any:
        if not network.training:
            return None
        first = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(first, Tensor):
            raise ModelError(
                f"layer {layer!r} gives {type(output).__name__}; expected a tensor, or a tuple that starts with one: choose another layer"
            )
        made = augment_features(first, wanted, generator, where=f"layer {layer!r}")
        if first is output:
            return made
        rest = [made, *output[1:]]
        return rest if isinstance(output, list) else type(output)(*rest) if hasattr(output, "_fields") else tuple(rest)

    try:
        yield
    finally:
        handle.remove()


def _layer(network: nn.Module, layer: str) -> nn.Module:
    known = dict(network.named_modules())
    if layer in known:
        return known[layer]
    near = difflib.get_close_matches(layer, known, 5, 0.4) or [name for name in known if name][:5]
    raise UsageError(f"{type(network).__name__} has no layer {layer!r}; close to it are {near}. All of them: network.named_modules()")


def augment_features(
    features: Float[Tensor, "items ..."], policy: Policy | Mapping[str, Any], rng: np.random.Generator, *, where: str = "the input"
) -> Float[Tensor, "items ..."]:
    """Features of one of three shapes, changed item by item under a policy (the table above), in their own type; differentiable."""
    policy = dials.read(policy, TRANSFORMS, "features")
    if features.dim() not in KINDS:
        raise UsageError(f"{where} gives features of shape {tuple(features.shape)}; expected {', '.join(KINDS.values())}")
    strength = dict(zip(TRANSFORMS, dials.strengths(policy, TRANSFORMS, len(features), None, rng).T))
    asked = [name for name in MISSING[features.dim()] if policy.families.get(name, dials.FULL._replace(strength=0)).strength > 0]
    if asked:
        raise UsageError(f"{where} gives {KINDS[features.dim()]}, for which there is no {' or '.join(asked)}: take it out of the policy")
    in_place = _in_the_plane if features.dim() == 4 else _in_channel_space
    features = in_place(features, strength, rng)
    return _dropped(_noisy(features, strength["noise"], rng), strength["dropout"], rng)


def _in_the_plane(maps: Tensor, strength: Mapping[str, np.ndarray], rng: np.random.Generator) -> Tensor:
    """Window, rotation and zoom as one resampling of the maps they were drawn for (bilinear, edge repeated); mirrors exactly."""
    count, _, height, width = maps.shape
    share = np.sqrt(1 - 0.75 * strength["resized_crop"] * rng.random(count))
    angle = np.deg2rad(30) * strength["rotate"] * rng.uniform(-1, 1, count)
    side = share * 2 ** (-0.5 * strength["scale"] * rng.uniform(-1, 1, count))
    centre = (1 - share)[:, None] * rng.uniform(-1, 1, (count, 2))
    chosen = np.flatnonzero((share != 1) | (angle != 0) | (side != 1))
    if len(chosen):
        cos, sin, aspect = np.cos(angle), np.sin(angle), width / height  # the grid's units are half sides: a turn has to know both
        rows = [[side * cos, -side * sin / aspect, centre[:, 0]], [side * sin * aspect, side * cos, centre[:, 1]]]
        theta = torch.from_numpy(np.moveaxis(np.array(rows, np.float32), 2, 0)[chosen]).to(maps.device)
        index = torch.from_numpy(chosen).to(maps.device)
        part = maps[index].float()
        grid = F.affine_grid(theta, list(part.shape), align_corners=False)
        moved = F.grid_sample(part, grid, mode="bilinear", padding_mode="border", align_corners=False)
        maps = maps.index_copy(0, index, moved.to(maps.dtype))
    for name, axis in (("horizontal_flip", 3), ("vertical_flip", 2)):
        if strength[name].any():
            maps = torch.where(_mask(strength[name] > 0, maps), maps.flip(axis), maps)
    return maps


def _in_channel_space(rows: Tensor, strength: Mapping[str, np.ndarray], rng: np.random.Generator) -> Tensor:
    """Stretch of the tokens, rotation of the channels, gain."""
    if strength["resized_crop"].any():
        rows = _stretched(rows, strength["resized_crop"], rng)
    if strength["rotate"].any():
        rows = _rotated(rows, np.deg2rad(30) * strength["rotate"] * rng.uniform(-1, 1, len(rows)), rng)
    gain = 2 ** (0.5 * strength["scale"] * rng.uniform(-1, 1, len(rows)))
    return rows * _column(gain, rows) if strength["scale"].any() else rows


def _stretched(tokens: Tensor, strength: np.ndarray, rng: np.random.Generator) -> Tensor:
    """A stretch of the tokens in place of all, linear between neighbours: out_i = tokens at start + (i + ½) · share − ½, the ends repeated."""
    count, length, _ = tokens.shape
    share = 1 - 0.75 * strength * rng.random(count)
    start = (1 - share) * length * rng.random(count)
    place = np.clip(start[:, None] + (np.arange(length) + 0.5) * share[:, None] - 0.5, 0, length - 1)
    low = torch.from_numpy(place.astype(np.int64)).to(tokens.device)
    part = torch.from_numpy(place % 1).to(tokens)[:, :, None]
    rows = torch.arange(count, device=tokens.device)[:, None]
    made = (1 - part) * tokens[rows, low] + part * tokens[rows, (low + 1).clamp_max(length - 1)]
    return torch.where(_mask(strength > 0, tokens), made, tokens)


def _rotated(rows: Tensor, angle: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Rotation by `angle` in each plane of a random pairing of the channels (one pairing for the batch, the angle the item's own).

    Orthogonal, O(d): x · Rx = cos(angle) |x|² where d is even; of an odd number one channel stays.
    """
    order = torch.from_numpy(rng.permutation(rows.shape[-1])).to(rows.device)
    half = len(order) // 2
    first, second = order[:half], order[half : 2 * half]
    cos, sin = _column(np.cos(angle), rows), _column(np.sin(angle), rows)
    a, b = rows[..., first], rows[..., second]
    return rows.index_copy(-1, torch.cat([first, second]), torch.cat([cos * a - sin * b, sin * a + cos * b], -1))


def _noisy(features: Tensor, strength: np.ndarray, rng: np.random.Generator) -> Tensor:
    amount = 0.5 * strength * rng.random(len(features))
    if not amount.any():
        return features
    source = torch.Generator(features.device).manual_seed(int(rng.integers(2**63)))
    draw = torch.randn(features.shape, generator=source, device=features.device, dtype=torch.float32)
    deviation = features.detach().flatten(1).float().std(1, correction=0).view(-1, *[1] * (features.dim() - 1))
    return features + (_column(amount, draw) * deviation * draw).to(features.dtype)


def _dropped(features: Tensor, strength: np.ndarray, rng: np.random.Generator) -> Tensor:
    channels = features.shape[1] if features.dim() == 4 else features.shape[-1]
    rate = 0.5 * strength * rng.random(len(features))
    if not rate.any():
        return features
    kept = (rng.random((len(features), channels)) >= rate[:, None]) / (1 - rate[:, None])
    shape = (len(features), channels, 1, 1) if features.dim() == 4 else (len(features), *[1] * (features.dim() - 2), channels)
    return features * torch.from_numpy(kept).to(features).view(shape)


def _column(values: np.ndarray, like: Tensor) -> Tensor:
    """One value per item, to be multiplied with a tensor of items."""
    return torch.from_numpy(np.ascontiguousarray(values)).to(like).view(-1, *[1] * (like.dim() - 1))


def _mask(chosen: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(chosen)).to(like.device).view(-1, *[1] * (like.dim() - 1))
