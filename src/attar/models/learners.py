"""What an encoder can learn from unlabelled items: each objective as a module that turns two views of a batch into a loss.

Its parameters and buffers (a projector, a decoder, centroids) are trained and checkpointed with the encoder and then thrown away.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import normalized_mutual_info_score
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from attar.models.autoencoder import Decoder, hide
from attar.models.network import Network
from attar.models.objectives import masked_error, nt_xent, prototypes, vicreg

Pair = tuple[Tensor, Tensor]


class Seen(NamedTuple):
    loss: Tensor  # ()
    embeddings: Pair  # (n, dim) of the two views
    projected: Pair  # where two views of an item should be alike


def _pair(both: Tensor) -> Pair:
    first, second = both.chunk(2)
    return first, second


class Learner(nn.Module):
    """Base of the objectives that compare two views; `project` leads from embeddings to where they are compared, `compare` gives the loss."""

    moves_dials = True
    """Whether the augmentation's dials can be steered by how alike two views are."""
    watches_plateau = True
    """Whether training ends when the held-out loss no longer falls."""

    def project(self, embeddings: Tensor) -> Tensor:
        raise NotImplementedError

    def compare(self, first: Tensor, second: Tensor, rows: np.ndarray) -> Tensor:
        """Loss of the projections of two views; `rows` are the items' places in the training set, −1 for held-out items."""
        raise NotImplementedError

    def forward(self, network: Network, first: Tensor, second: Tensor, rows: np.ndarray, rng: np.random.Generator) -> Seen:
        """What becomes of two views (n, 3, h, w) of the items in these rows."""
        embeddings = network(torch.cat([first, second]))[0]
        projected = _pair(self.project(embeddings))
        return Seen(self.compare(*projected, rows), _pair(embeddings), projected)

    def prepare(self, step: int, embeddings: Callable[[], Tensor]) -> None:
        """Called before every step; `embeddings` gives those of all training items as they are."""

    def figures(self) -> dict[str, float]:
        """Further figures of a look."""
        return {}

    def settled(self) -> bool:
        """Whether there is nothing left to learn."""
        return False


class Contrastive(Learner):
    """NT-Xent: views of one item together, views of different items apart."""

    def __init__(self, dim: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.projector = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 64))

    def project(self, embeddings: Tensor) -> Tensor:
        return self.projector(embeddings)

    def compare(self, first: Tensor, second: Tensor, rows: np.ndarray) -> Tensor:
        return nt_xent(first, second, self.temperature)


class Varied(Learner):
    """VICReg: views of one item together, every channel of the expander spread over the batch, no two channels alike."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        wide = 4 * dim
        hidden = [nn.Linear(dim, wide), nn.BatchNorm1d(wide), nn.ReLU(), nn.Linear(wide, wide), nn.BatchNorm1d(wide), nn.ReLU()]
        self.expander = nn.Sequential(*hidden, nn.Linear(wide, wide))

    def project(self, embeddings: Tensor) -> Tensor:
        return self.expander(embeddings)

    def compare(self, first: Tensor, second: Tensor, rows: np.ndarray) -> Tensor:
        return vicreg(first, second)


class Reconstruction(Learner):
    """Autoencoder: both views again from what is left of them after noise and hidden patches."""

    moves_dials = False  # what is to be told from the embedding again is not to be invariant

    def __init__(self, dim: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.decoder = Decoder(dim, size)

    def project(self, embeddings: Tensor) -> Tensor:
        return embeddings

    def forward(self, network: Network, first: Tensor, second: Tensor, rows: np.ndarray, rng: np.random.Generator) -> Seen:
        views = torch.cat([first, second])
        seen, hidden = hide(views, rng)
        embeddings = network(seen)[0]
        pair = _pair(embeddings)
        return Seen(masked_error(self.decoder(embeddings), views, hidden), pair, pair)


SETTLED, CALM = 0.99, 3
"""Normalised mutual information of successive assignments, and how many times in a row it must be reached, for deep clustering to have settled."""
ROUNDS = 20
"""Times the items are clustered anew at most."""
COMPONENTS = 32
"""Principal components items are clustered in."""
STARTS = 4
"""Starts of k-means, of which the best counts."""
SHARPNESS = 0.1
"""Temperature of the assignment to centroids."""


class Prototypes(Learner):
    """Deep clustering: k-means on all training items gives pseudo-labels and centroids; both views are trained towards their item's; again.

    After DeepCluster (Caron et al. 2018) with centroids for a classifier (DeepCluster-v2, 2020). Clusters are found on principal components of
    the unit embeddings, each divided by the root of its standard deviation: whitening by half, which lets the finer components have a say and
    does not blow up noise.
    """

    moves_dials = False  # items of one kind are to lie together: that another view finds its own item is not wanted
    watches_plateau = False
    mean: Tensor  # (dim,)
    axes: Tensor  # (dim, components)
    centroids: Tensor  # (kinds, components) unit
    kinds: Tensor  # (items,) of the last clustering
    agreement: Tensor  # () NMI of the last two clusterings
    calm: Tensor  # () how many times in a row they agreed

    def __init__(self, dim: int, items: int, kinds: int, steps: int, seed: int) -> None:
        super().__init__()
        self.every, self.seed, components = max(1, -(-steps // ROUNDS)), seed, min(COMPONENTS, dim)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("axes", torch.zeros(dim, components))
        self.register_buffer("centroids", torch.zeros(min(kinds, items), components))
        self.register_buffer("kinds", torch.full((items,), -1))
        self.register_buffer("agreement", torch.zeros(()))
        self.register_buffer("calm", torch.zeros(()))

    def project(self, embeddings: Tensor) -> Tensor:
        return (F.normalize(embeddings, dim=1) - self.mean) @ self.axes

    def prepare(self, step: int, embeddings: Callable[[], Tensor]) -> None:
        """Clusters anew every so many steps: a function of the weights and the step alone."""
        if step % self.every:
            return
        made = embeddings()
        units = F.normalize(made, dim=1).double()
        self.mean.copy_(units.mean(0))
        variances, directions = torch.linalg.eigh(torch.cov(units.T, correction=0))
        variances, directions = variances.flip(0)[: self.axes.shape[1]], directions.flip(1)[:, : self.axes.shape[1]]
        self.axes.copy_(directions * (variances > 1e-6 * variances[0]) / variances.clamp_min(1e-12) ** 0.25)
        with threadpool_limits(1), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct items than kinds: some kinds stay empty
            points = F.normalize(self.project(made), dim=1).numpy()
            found = KMeans(len(self.centroids), n_init=STARTS, max_iter=50, random_state=self.seed).fit(points)
        if self.kinds[0] >= 0:
            self.agreement.fill_(normalized_mutual_info_score(self.kinds.numpy(), found.labels_))
            self.calm.copy_((self.calm + 1) * (self.agreement >= SETTLED))
        self.kinds.copy_(torch.from_numpy(found.labels_))
        self.centroids.copy_(F.normalize(torch.from_numpy(found.cluster_centers_), dim=1))

    def compare(self, first: Tensor, second: Tensor, rows: np.ndarray) -> Tensor:
        places = torch.from_numpy(rows)
        nearest = (F.normalize(first, dim=1) @ self.centroids.T).argmax(1)  # the kind of a held-out item is that of its first view
        wanted = torch.where(places < 0, nearest, self.kinds[places.clamp_min(0)])
        return sum(prototypes(view, self.centroids, wanted, SHARPNESS) for view in (first, second)) / 2  # type: ignore[return-value]

    def figures(self) -> dict[str, float]:
        return {"agreement": round(float(self.agreement), 4)}

    def settled(self) -> bool:
        return float(self.calm) >= CALM


def learner(objective: str, dim: int, size: tuple[int, int], items: int, kinds: int, steps: int, temperature: float, seed: int) -> Learner:
    """The module of an objective for embeddings of `dim` channels, images of a size (height, width) and so many training items and steps."""
    made: Mapping[str, Callable[[], Learner]] = {
        "nt-xent": lambda: Contrastive(dim, temperature),
        "vicreg": lambda: Varied(dim),
        "autoencoder": lambda: Reconstruction(dim, size),
        "cluster": lambda: Prototypes(dim, items, kinds or default_kinds(items), steps, seed),
    }
    return made[objective]()


def default_kinds(items: int) -> int:
    """Pseudo-classes of deep clustering for so many items: their square root, 4 to 500; finer than the groups that are looked for.

    >>> [default_kinds(items) for items in (10, 400, 50_000, 10**7)]
    [4, 20, 223, 500]
    """
    return int(np.clip(np.sqrt(items), 4, 500))
