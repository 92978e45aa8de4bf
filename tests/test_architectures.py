"""One contract over architectures of the transformers library, small and random, and a user's own: groups are found; a cut to 60 % of the
multiply-accumulates runs, costs what was said, computes what masking computes, is built again from its state, and exports to ONNX."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from networks import CLASSES, Padded, images
from torch import Tensor, nn

from attar.models.network import Network, count_macs, find_classifier
from attar.runtime import open_session, outputs
from attar.stages.compress.prune import Costs, Group, allocate, choices, described, replay, survey

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

LABELS = {"num_labels": CLASSES}
VIT = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4} | LABELS
STAGES = {"hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2} | LABELS
PYRAMID = {"image_size": 32, "hidden_sizes": [8, 16, 16, 32], "num_attention_heads": [1, 2, 2, 4], "depths": [1, 1, 1, 1]} | LABELS
WINDOWS = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4} | LABELS
MOBILEVIT = {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32], "num_attention_heads": 2}
LEVIT = {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}


def _hf(name: str, task: str = "ForImageClassification", **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, f"{name}{task}")(getattr(transformers, f"{name}Config")(**settings))


class Expected(NamedTuple):
    """What the survey of an architecture finds."""

    body: Callable[[], nn.Module]
    channels: int
    """Groups of the channels of one layer."""
    streams: int
    """Groups of channels that several layers make: residual streams, gated channels."""
    heads: int
    """Groups whose units are attention heads, or the groups of a grouped convolution."""
    removable: int
    floor: float
    """Share of the multiply-accumulates that is left when every group gets its least width."""
    left: str
    """The most frequent reason why layers are left alone."""
    shape: tuple[int, ...] = (3, 32, 32)


OUTPUT = "the embedding and the classes keep their number"
NORM = "layer norm over the channels"
KINDS = {
    "resnet basic": Expected(
        _hf("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", **LABELS), 4, 1, 0, 4, 0.262, OUTPUT
    ),
    "resnet bottleneck": Expected(
        _hf("ResNet", embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], layer_type="bottleneck", **LABELS), 9, 1, 0, 8, 0.169, OUTPUT
    ),
    "regnet": Expected(
        _hf("RegNet", embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], groups_width=4, **LABELS), 5, 1, 4, 8, 0.089, OUTPUT
    ),
    "convnext": Expected(_hf("ConvNext", **STAGES), 4, 0, 0, 4, 0.452, NORM),
    # its response normalisation divides by a mean over the channels, in the only layers that the layer norms leave
    "convnext v2": Expected(_hf("ConvNextV2", **STAGES), 0, 0, 0, 0, 1, NORM),
    "mobilenet v1": Expected(_hf("MobileNetV1", depth_multiplier=0.25, min_depth=8, image_size=32, **LABELS), 13, 0, 0, 0, 0.079, OUTPUT),
    "mobilenet v2": Expected(
        _hf("MobileNetV2", depth_multiplier=0.25, depth_divisible_by=4, min_depth=4, image_size=32, **LABELS), 19, 5, 0, 10, 0.106, OUTPUT
    ),
    "efficientnet": Expected(
        _hf("EfficientNet", image_size=32, width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320, **LABELS),
        14,
        9,
        0,
        9,
        0.128,
        OUTPUT,
    ),
    "mobilevit": Expected(_hf("MobileViT", **MOBILEVIT, **LABELS), 22, 2, 9, 24, 0.069, NORM, (3, 64, 64)),
    "vit": Expected(_hf("ViT", intermediate_size=64, **VIT), 2, 0, 2, 3, 0.291, NORM),  # one attention must stay for the class token
    "deit": Expected(_hf("DeiT", intermediate_size=64, **VIT), 2, 0, 2, 3, 0.281, NORM),
    "dinov2": Expected(_hf("Dinov2", mlp_ratio=2, **VIT), 2, 0, 2, 4, 0.238, NORM),
    "beit": Expected(_hf("Beit", intermediate_size=64, use_relative_position_bias=True, **VIT), 2, 0, 2, 4, 0.238, NORM),
    "swin": Expected(_hf("Swin", **WINDOWS), 4, 0, 4, 8, 0.049, NORM),
    "swin v2": Expected(_hf("Swinv2", **WINDOWS), 8, 0, 4, 4, 0.176, NORM),
    "segformer": Expected(_hf("Segformer", **PYRAMID), 4, 0, 3, 7, 0.495, NORM),  # an attention of one head keeps it
    "pvt": Expected(_hf("Pvt", sequence_reduction_ratios=[2, 1, 1, 1], **PYRAMID), 4, 0, 3, 6, 0.274, NORM),
    "levit": Expected(_hf("Levit", **LEVIT, **LABELS), 8, 2, 5, 8, 0.163, OUTPUT, (3, 64, 64)),
    "poolformer": Expected(
        _hf("PoolFormer", hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], **LABELS), 4, 0, 0, 4, 0.568, "group norm over the channels"
    ),
    "videomae": Expected(
        _hf("VideoMAE", "ForVideoClassification", num_frames=4, tubelet_size=2, intermediate_size=64, **VIT),
        2,
        0,
        2,
        4,
        0.375,
        NORM,
        (4, 3, 32, 32),
    ),
    "a user's with padded shortcuts": Expected(Padded, 4, 0, 0, 4, 0.048, "channels are padded"),
}
SLOW = {"mobilevit", "levit", "swin v2", "pvt"}


def lively(body: nn.Module, shape: Sequence[int]) -> nn.Module:
    """Random weights of a size at which every layer counts, and batch norms that have seen inputs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in body.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1 and parameter.shape[0] > 1:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(0.2 * noise + float("weight" in name or "lambda" in name or "scale" in name))
        body.train()
        for step in range(10):
            body(inputs(shape, 8, step))
    return body.eval()


def inputs(shape: Sequence[int], count: int, seed: int = 0) -> Tensor:
    """Smooth noise: images, or films (items, frames, 3, height, width)."""
    frames = math.prod(shape[:-3])
    return images(count * frames, shape[-1], seed).reshape(count, *shape)


class Studied(NamedTuple):
    network: Network
    groups: list[Group]
    left: dict[str, str]
    costs: Costs
    widths: dict[str, int]
    cuts: list[tuple[str, list[int]]]
    cut: Network


def _network(kind: str) -> Network:
    torch.manual_seed(0)
    body = lively(KINDS[kind].body(), KINDS[kind].shape)
    return Network(body, find_classifier(body, inputs(KINDS[kind].shape, 2))).eval()


@functools.cache
def studied(kind: str) -> Studied:
    """An architecture cut to 60 % of its multiply-accumulates (or as far as it goes) by made-up damage; not to be changed."""
    network, example, rng = _network(kind), inputs(KINDS[kind].shape, 1), np.random.default_rng(0)
    groups, left = survey(network, example)
    costs = Costs(network, example, groups)
    damage = {group.name: np.concatenate([[0], rng.exponential(size=group.width - 1 + group.removable).cumsum()]) for group in groups}
    widths = allocate(groups, damage, costs, 0.6) if groups else {}
    gone = {group.name: sorted(rng.permutation(group.width)[widths[group.name] :].tolist()) for group in groups}
    cuts, cut = [(name, units) for name, units in gone.items() if units], copy.deepcopy(network)
    replay(cut, cuts, example)
    return Studied(network, groups, left, costs, widths, cuts, cut)


every = pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind in SLOW else []) for kind in KINDS])


@every
def test_its_groups_are_found_and_the_rest_is_said(kind: str) -> None:
    expected, (_, groups, left, costs, *_) = KINDS[kind], studied(kind)
    assert sum(group.unit == 1 and len(group.producers) == 1 for group in groups) == expected.channels
    assert sum(group.unit == 1 and len(group.producers) > 1 for group in groups) == expected.streams
    assert sum(group.unit > 1 for group in groups) == expected.heads
    assert sum(group.removable for group in groups) == expected.removable
    assert costs.total({group.name: choices(group)[0] for group in groups}) / costs.total({}) == pytest.approx(expected.floor, abs=5e-4)
    assert f"left alone: {expected.left} (" in described(left)


@every
def test_a_cut_runs_and_costs_what_was_said(kind: str) -> None:
    _, groups, _, costs, widths, cuts, cut = studied(kind)
    example = inputs(KINDS[kind].shape, 1)
    assert costs.total({}) == count_macs(studied(kind).network, example)
    assert costs.total(widths) <= max(0.6, KINDS[kind].floor) * costs.total({})
    assert bool(cuts) is bool(groups)
    # where an attention went whole, torch still multiplies the zeros of one head; the exported file does not
    heads = {group.name: max(widths[group.name], 1) for group in groups if group.unit > 1}
    assert round(costs.total(widths)) <= count_macs(cut, example) <= round(costs.total(widths | heads))


@every
def test_cutting_is_masking(kind: str) -> None:
    network, groups, _, _, _, cuts, cut = studied(kind)
    by_name, masked = {group.name: group for group in groups}, copy.deepcopy(network)
    with torch.no_grad():
        for name, units in cuts:
            for consumer in by_name[name].consumers:
                weight = masked.get_submodule(consumer).weight
                weight.unflatten(1, (by_name[name].width, -1))[:, units] = 0
        for count in (1, 3):
            batch = inputs(KINDS[kind].shape, count, seed=count)
            for wanted, found in zip(masked(batch), cut(batch)):
                assert float((wanted - found).abs().max()) <= 1e-4 * float(wanted.abs().max())


@every
def test_it_is_built_again_from_its_cuts_and_its_state(kind: str) -> None:
    *_, cuts, cut = studied(kind)
    torch.manual_seed(1)
    body = KINDS[kind].body().eval()
    again = Network(body, cut.classifier).eval()
    replay(again, cuts, torch.zeros(1, *KINDS[kind].shape))
    again.load_state_dict(cut.state_dict())
    batch = inputs(KINDS[kind].shape, 2, seed=5)
    with torch.no_grad():
        for wanted, found in zip(cut(batch), again(batch)):
            assert torch.equal(wanted, found)


@every
def test_its_export_computes_the_same_for_any_number_of_items(kind: str, tmp_path: Path) -> None:
    cut, shape, names = studied(kind).cut, KINDS[kind].shape, ["image", "embedding", "logits"]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            cut,
            (inputs(shape, 2),),
            str(tmp_path / "cut.onnx"),
            dynamo=False,
            opset_version=17,
            input_names=names[:1],
            output_names=names[1:],
            dynamic_axes={name: {0: "items"} for name in names},
        )
    session = open_session(tmp_path / "cut.onnx")
    for count in (1, 3):
        batch = inputs(shape, count, seed=count)
        with torch.no_grad():
            wanted = cut(batch)
        for one, two in zip(wanted, outputs(session, batch.numpy()).values()):
            assert np.abs(one.numpy() - two).max() <= 1e-4 * max(1, float(one.abs().max()))
