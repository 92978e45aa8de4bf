"""The one shape of all models: what is taken from any output, which layer is the classifier, and the cluster head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import BODIES, CLASSES, SIDE, hf_folder, images, made
from torch import Tensor, nn

from attar.errors import ModelError
from attar.models.network import ClusterHead, Network, Shipped, count_macs, count_parameters, find_classifier, plain
from attar.records import Head
from attar.stages.cluster.space import head_probabilities


def _head(dim: int = 6, space: int = 3, count: int = 4, seed: int = 0) -> Head:
    rng = np.random.default_rng(seed)
    mean, projection, centroids = (rng.normal(size=shape).astype(np.float32) for shape in (dim, (dim, space), (count, space)))
    return Head(mean=0.1 * mean, projection=projection, centroids=centroids, temperature=0.7)


def test_plain_takes_a_tensor_as_it_is_and_averages_maps_and_tokens() -> None:
    flat, tokens, maps = torch.rand(2, 5), torch.rand(2, 3, 5), torch.rand(2, 5, 4, 6)
    assert plain(flat) is flat
    assert torch.allclose(plain(tokens), torch.stack([row.sum(0) / 3 for row in tokens]))
    assert torch.allclose(plain(maps), torch.stack([torch.stack([one.mean() for one in row]) for row in maps]))
    assert plain((flat, tokens)) is flat
    assert torch.equal(plain([maps]), plain(maps))


def test_plain_prefers_logits_then_the_pooled_then_the_last_state() -> None:
    logits, pooled, last = torch.rand(2, 5), torch.rand(2, 4), torch.rand(2, 3, 4)
    assert plain({"logits": logits, "pooler_output": pooled}) is logits
    assert plain({"logits": None, "pooler_output": pooled, "last_hidden_state": last}) is pooled
    assert torch.equal(plain({"last_hidden_state": last}), last.mean(1))


def test_plain_names_what_it_cannot_take() -> None:
    with pytest.raises(ModelError, match=r"returns \['boxes', 'scores'\]; expected a tensor, or one of logits"):
        plain({"scores": torch.ones(1), "boxes": torch.ones(1)})
    with pytest.raises(ModelError, match="returns str; expected a tensor"):
        plain("ready")


@pytest.mark.parametrize(("kind", "name"), [("residual", "fc"), ("inverted", "classifier"), ("transformer", "head")])
def test_the_classifier_is_the_layer_that_gives_the_output(kind: str, name: str) -> None:
    body = BODIES[kind]().eval()
    assert find_classifier(body, images(2)) == name
    assert not any(module._forward_hooks for module in body.modules()), "the search leaves no hooks behind"


def test_there_is_no_classifier_where_something_follows_the_last_layer() -> None:
    assert find_classifier(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), images(2)) is None
    assert find_classifier(nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, 4), nn.Softmax(1)), images(2)) is None


@pytest.mark.parametrize("kind", sorted(BODIES))
def test_the_embedding_of_a_classifier_is_what_enters_its_last_layer(kind: str) -> None:
    network = made(kind)
    last = network.body.get_submodule(network.classifier)
    with torch.no_grad():
        whole = network.body(images(3))
        embedding, logits = network(images(3))
        weight = last.weight.flatten(1)
        assert logits.shape == (3, CLASSES)
        assert torch.allclose(embedding @ weight.T + last.bias, logits, atol=1e-5)
        assert torch.allclose(logits, whole, atol=1e-6)  # another memory layout
    assert network._tap is None, "no batch is held after the call"


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_transformers_encoders_give_their_pooled_output(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    body = AutoModel.from_pretrained(hf_folder(tmp_path / kind, kind, classifier=False)).eval()
    with torch.no_grad():
        embedding, logits = Network(body)(images(2))
        expected = body(images(2)).pooler_output
    assert logits is None
    assert torch.equal(embedding, expected.flatten(1) if kind == "vit" else expected.flatten(2).mean(2))


class Detector(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"boxes": x}


def test_a_model_of_another_task_is_named() -> None:
    with pytest.raises(ModelError, match="boxes"):
        Network(Detector())(images(1))


@given(st.integers(0, 1000))
def test_the_cluster_head_is_the_formula_of_the_clustering(seed: int) -> None:
    head = _head(seed=seed)
    embeddings = np.random.default_rng(seed).normal(size=(5, 6)).astype(np.float32)
    ours = ClusterHead(head)(torch.from_numpy(embeddings)).numpy()
    np.testing.assert_allclose(ours, head_probabilities(embeddings, head), atol=1e-5)
    np.testing.assert_allclose(ours.sum(1), 1, atol=1e-5)
    e = embeddings[0] / np.linalg.norm(embeddings[0])
    z = (e - head.mean) @ head.projection
    scores = np.array([np.exp(-((z - centroid) ** 2).sum() / head.temperature) for centroid in head.centroids])
    np.testing.assert_allclose(ours[0], scores / scores.sum(), atol=1e-5)


def test_shipped_gives_logits_where_there_are_classes() -> None:
    network = made("residual")
    with torch.no_grad():
        given_logits = Shipped(network, _head(dim=16))(images(2))
        assert [tuple(output.shape) for output in given_logits] == [(2, 16), (2, 4), (2, CLASSES)]
        encoder = Network(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())).eval()
        assert [tuple(output.shape) for output in Shipped(encoder, _head())(images(2))] == [(2, 6), (2, 4)]


def test_macs_and_parameters_are_those_counted_by_hand() -> None:
    network = Network(nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Flatten(), nn.Linear(4 * 16 * 16, 5)))
    assert count_macs(network, images(3)) == 16 * 16 * 4 * 3 * 9 + 4 * 16 * 16 * 5
    assert count_parameters(network) == 4 * 27 + 4 + 4 * 256 * 5 + 5


@pytest.mark.parametrize(
    ("channels", "stride", "layout"), [(8, 2, torch.contiguous_format), (16, 2, torch.channels_last), (8, 1, torch.channels_last)]
)
def test_strided_pointwise_convolutions_of_few_channels_are_kept_out_of_channels_last(
    channels: int, stride: int, layout: torch.memory_format
) -> None:
    body = nn.Sequential(nn.Conv2d(3, channels, 3), nn.Conv2d(channels, 2 * channels, 1, stride))
    assert Network(body).layout == layout


def test_the_layout_does_not_change_what_is_computed() -> None:
    body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
    x = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(Network(body)(x)[0], body(x).mean((2, 3)), rtol=1e-5, atol=1e-6)
