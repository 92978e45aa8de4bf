"""The objectives as they train an encoder: each learns on made images, resumes to the same bits, and a collapse is stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attar.config import OBJECTIVES, Embed
from attar.models import learners
from attar.models.autoencoder import PATCHES, Decoder, hide
from attar.models.learners import Learner, Prototypes, learner
from attar.models.network import Network
from attar.models.objectives import spread
from attar.models.students import Encoder
from attar.records import Items, Policy, Preprocess
from attar.stages import signals, train
from attar.stages.augment.policy import DEFAULTS
from attar.workspace import Job

PREPROCESS = Preprocess(size=(16, 16), resize_shortest=16, mean=(0.5,) * 3, std=(0.25,) * 3)
POLICY = Policy(families=DEFAULTS)
SETTINGS = Embed(batch_size=16, self_kinds=3)

Make = Callable[..., Job]
Curve = tuple[dict[str, float], ...]


@pytest.fixture(scope="module")
def halved(items: Items) -> Items:
    """Every other item held out: enough to tell whether something was learned."""
    split = pa.array(["validation" if item % 2 else "train" for item in range(len(items))])
    return replace(items, table=items.table.set_column(items.table.column_names.index("split"), "split", split))


def _encoder() -> Network:
    torch.manual_seed(0)
    return Network(Encoder(16, 8)).eval()


def _learn(items: Items, job: Job, objective: str, steps: int) -> tuple[Network, Curve]:
    network = _encoder()
    job = Job("train", job.folder, quiet=True)  # draws depend on the stage's name
    return network, train.learn(network, items, items.ids("train"), PREPROCESS, POLICY, None, steps, SETTINGS, job, objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_learns_and_does_not_collapse(objective: str, halved: Items, job: Make) -> None:
    network, curve = _learn(halved, job(), objective, 25)
    assert min(seen["validation_loss"] for seen in curve) < curve[0]["validation_loss"]
    assert signals.verdict(curve).state in ("learning", "plateau")
    assert not network.training
    assert np.isfinite([value for seen in curve for value in seen.values()]).all()
    moved = any(name.startswith("strength") for seen in curve for name in seen)
    assert moved == (objective in ("nt-xent", "vicreg")), "the others do not want every item to be found by its views"


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "nt-xent"])  # NT-Xent: test_train.py
def test_every_objective_is_resumed_to_the_same_bits(objective: str, halved: Items, job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learners, "SETTLED", 2.0)  # to the last step
    whole, curve = _learn(halved, job("whole"), objective, 9)
    streamer = train._streamer

    class Stopped(Exception):
        pass

    def broken(*given: Any) -> Callable[[range], Iterator[tuple[int, np.ndarray, np.ndarray]]]:
        def stream(wanted: range) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
            for step, batch, images in streamer(*given)(wanted):
                if step == 6:
                    raise Stopped
                yield step, batch, images

        return stream

    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(train, "_streamer", broken)
    with pytest.raises(Stopped):
        _learn(halved, job("broken"), objective, 9)
    monkeypatch.setattr(train, "_streamer", streamer)
    assert job("broken").recall(f"{objective}-training.pt")["step"] == 6
    resumed, again = _learn(halved, job("broken"), objective, 9)
    assert again == curve
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))


class Alike(Learner):
    """All items together and nothing apart: what every encoder does best by giving all of them one vector."""

    moves_dials = False

    def project(self, embeddings: Tensor) -> Tensor:
        return embeddings

    def compare(self, first: Tensor, second: Tensor, rows: np.ndarray) -> Tensor:
        return 1 - F.cosine_similarity(first, second.roll(1, 0)).mean()


def test_a_collapse_stops_training_and_the_state_before_it_is_kept(halved: Items, job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "learner", lambda *_: Alike())
    monkeypatch.setattr(signals, "SPREAD", 0.25)  # reached in a few steps; the untrained encoder has 0.37
    network, curve = _learn(halved, job(), "alike", 200)
    assert signals.has_collapsed(curve)
    assert curve[-1]["step"] < 100, "no step is taken past it"
    assert curve[-1]["validation_loss"] < curve[0]["validation_loss"], "the loss alone would not tell"
    kept = spread(torch.from_numpy(train.embeddings_of(network, halved, halved.ids("validation"), PREPROCESS, job("look"))))
    assert kept > signals.SPREAD
    said = signals.closing(curve, 64)
    assert said.startswith("the encoder collapsed: ")


# deep clustering


def _groups(count: int = 40) -> Tensor:
    """Embeddings of four groups, far apart."""
    generator = torch.Generator().manual_seed(0)
    return (8 * torch.eye(4, 8)[torch.arange(count) % 4] + 0.1 * torch.randn(count, 8, generator=generator)).float()


def test_deep_clustering_finds_groups_agrees_with_itself_and_settles() -> None:
    torch.manual_seed(0)
    made = Prototypes(8, 40, 4, steps=40, seed=0)
    made.prepare(0, _groups)
    first = made.kinds.clone()
    assert float(made.agreement) == 0, "one clustering agrees with nothing yet"
    assert all(len(set(first[torch.arange(40) % 4 == group].tolist())) == 1 for group in range(4))
    assert torch.allclose(made.centroids.norm(dim=1), torch.ones(4), atol=1e-5)
    made.prepare(1, lambda: pytest.fail("between two clusterings nothing is embedded"))
    for turn in range(1, learners.CALM + 1):
        assert not made.settled()
        made.prepare(turn * made.every, _groups)
    assert made.settled()
    assert made.figures() == {"agreement": 1.0}
    made.prepare(10 * made.every, lambda: _groups()[torch.randperm(40, generator=torch.Generator().manual_seed(1))])
    assert not made.settled(), "items that change their groups start it again"


def test_held_out_items_take_the_kind_of_their_first_view() -> None:
    torch.manual_seed(0)
    made = Prototypes(8, 40, 4, steps=40, seed=0)
    made.prepare(0, _groups)
    with torch.no_grad():
        points = made.project(_groups())
        known = float(made.compare(points, points, np.arange(40)))
        held = float(made.compare(points, points, np.full(40, -1)))
        wrong = float(made.compare(points, points, np.roll(np.arange(40), 1)))
    assert held == pytest.approx(known, rel=1e-4)
    assert wrong > known


@pytest.mark.parametrize("items", [3, 4, 1000])
def test_there_are_never_more_kinds_than_items(items: int) -> None:
    made = learner("cluster", 8, (16, 16), items, 0, 10, 0.2, 0)
    assert isinstance(made, Prototypes)
    assert len(made.centroids) <= items
    made.prepare(0, lambda: torch.ones(items, 8))  # one place only: k-means must not fail
    assert bool(torch.isfinite(made.centroids).all())


def test_training_by_clusters_ends_when_they_have_settled(halved: Items, job: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learners, "SETTLED", 0.0)
    _, curve = _learn(halved, job(), "cluster", 100)
    assert curve[-1]["step"] < 100
    assert "agreement" in curve[-1]


# autoencoder


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (64, 64), (24, 40)])
def test_the_decoder_gives_images_of_the_size(size: tuple[int, int]) -> None:
    with torch.no_grad():
        assert Decoder(32, size)(torch.zeros(2, 32)).shape == (2, 3, *size)


def test_what_is_hidden_is_zero_and_as_much_as_asked() -> None:
    images = torch.full((5, 3, 32, 24), 2.0)
    seen, hidden = hide(images, np.random.default_rng(0), 0.25, 0.0)
    assert hidden.shape == (5, 1, 32, 24)
    assert set(hidden.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(hidden.mean((1, 2, 3)), torch.full((5,), round(0.25 * PATCHES**2) / PATCHES**2))
    assert torch.equal(seen, images * (1 - hidden))
    assert len({tuple(row.flatten().tolist()) for row in hidden}) == 5, "each image loses patches of its own"
    noisy, again = (hide(images, np.random.default_rng(1))[0] for _ in range(2))
    assert torch.equal(noisy, again)
    assert float(noisy[noisy != 0].std()) == pytest.approx(0.2, rel=0.1)
