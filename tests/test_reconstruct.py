"""Reconstruction: where layers land, and that re-fitted layers are those numpy finds on the inputs they really get."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import images, made
from torch import Tensor, nn

from attar.models.network import Network
from attar.stages.compress.reconstruct import reconstruct, route
from attar.stages.compress.repair import RIDGE


class Stream(nn.Module):
    """Two branches on a stream of tokens, the first scaled channel by channel before it is added, the second added in place."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.a, self.b, self.out = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor([0.5, -2.0, 1.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.into(x))
        x = x + self.scale * self.a(x)
        y = self.b(F.relu(x))
        y += x
        return self.out(y).mean(1)


def _stream() -> Network:
    torch.manual_seed(0)
    return Network(Stream()).eval()


def test_layers_land_where_their_outputs_are_added_to_what_was_there() -> None:
    found = route(_stream(), torch.randn(8, 6, 5))
    assert found.order == ("body.into", "body.a", "body.b", "body.out")
    assert found.positions == dict.fromkeys(found.order, 6)
    assert set(found.landings) == {"body.a", "body.b"}
    first, second = found.landings["body.a"], found.landings["body.b"]
    assert (first.number, first.side, second.number, second.side) == (0, 1, 1, 0)
    torch.testing.assert_close(first.scale.float(), torch.tensor([0.5, -2.0, 1.0, 0.0]))
    torch.testing.assert_close(second.scale.float(), torch.ones(4))


def test_batch_norms_are_seen_through_and_shortcuts_that_come_later_do_not_count() -> None:
    found = route(made("residual"), images(8))
    norm = made("residual").body.n2
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    assert set(found.landings) == {"body.a2", "body.b2"}  # `short` runs before b2, so b2 makes up for it, not the reverse
    torch.testing.assert_close(found.landings["body.a2"].scale.float(), scale.detach(), rtol=1e-3, atol=1e-4)
    assert not found.landings["body.a2"].last
    assert set(route(made("transformer"), images(8)).landings) == {"body.proj", "body.fc2"}


def test_a_layer_that_runs_twice_is_left_out() -> None:
    shared = nn.Linear(3, 3)
    found = route(Network(nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(3, 2))), torch.randn(4, 3))
    assert found.order == ("body.3",)


def _solved(x: np.ndarray, y: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Ridge regression towards `held` (outputs, inputs + 1), by numpy on the data with the ridge as further rows."""
    ridge = np.sqrt(RIDGE * (x[:, :-1] ** 2).mean() + 1e-10) * np.eye(x.shape[1])[:-1]
    rows, wanted = np.concatenate([x / np.sqrt(len(x)), ridge]), np.concatenate([y / np.sqrt(len(x)), ridge @ held.T])
    return np.linalg.lstsq(rows, wanted, rcond=None)[0].T


def test_a_layer_on_a_stream_makes_up_for_what_the_stream_lost() -> None:
    teacher, inputs = _stream(), torch.randn(40, 6, 5)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.body.into.weight[1] = 0  # something was lost before
        stream, lossy = (F.relu(net.body.into(inputs)) for net in (teacher, student))
        wanted = teacher.body.a(stream) + (stream - lossy) / teacher.body.scale
        wanted[:, :, 3] = teacher.body.a(stream)[:, :, 3]  # nothing of this channel reaches the stream
    reconstruct(
        student, teacher, ["body.a"], route(teacher, inputs[:8]), {"body.a": torch.arange(4)}, list(inputs.split(16)), 0, lambda: None
    )
    rows = np.concatenate([lossy.flatten(0, 1).numpy(), np.ones((240, 1), np.float32)], 1).astype(np.float64)
    layer = teacher.body.a
    held = np.concatenate([layer.weight.detach().numpy(), layer.bias.detach().numpy()[:, None]], 1)
    ours = np.concatenate([student.body.a.weight.detach().numpy(), student.body.a.bias.detach().numpy()[:, None]], 1)
    np.testing.assert_allclose(ours, _solved(rows, wanted.flatten(0, 1).numpy(), held), rtol=2e-3, atol=2e-4)


def test_nothing_changes_where_nothing_was_lost() -> None:
    teacher = made("residual")
    student, along = copy.deepcopy(teacher), route(teacher, images(8))
    kept = {name: torch.arange(len(teacher.get_submodule(name).weight)) for name in along.order}
    reconstruct(student, teacher, along.order, along, kept, [images(16), images(16, seed=1)], 0, lambda: None)
    with torch.no_grad():
        for ours, theirs in zip(student(images(8, seed=2)), teacher(images(8, seed=2))):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["residual", "inverted", "transformer"])
def test_no_hooks_are_left_behind(kind: str) -> None:
    network = made(kind)
    before = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())
    route(network, images(4))
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()) == before
