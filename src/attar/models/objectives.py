"""Losses and the signals that tell whether a run is learning. Pure functions of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def nt_xent(first: Float[Tensor, "items dim"], second: Float[Tensor, "items dim"], temperature: float) -> Float[Tensor, ""]:
    """Normalised temperature-scaled cross entropy of two views of the same items (SimCLR, Chen et al. 2020, eq. 1).

    For each of the 2n views z_i with positive z_j: −log( exp(cos(z_i, z_j)/τ) / Σ_{k≠i} exp(cos(z_i, z_k)/τ) ), averaged.
    With orthogonal negatives and identical positives at τ = 1 it is log(1 + (2n−2)/e):

    >>> views = torch.eye(4)
    >>> round(float(nt_xent(views, views, 1.0)), 4) == round(float(torch.log(1 + 6 / torch.tensor(1.0).exp())), 4)
    True
    """
    views = F.normalize(torch.cat([first, second]), dim=1)
    count = len(first)
    similarity = views @ views.T / temperature
    similarity.fill_diagonal_(float("-inf"))
    positives = torch.arange(2 * count, device=views.device).roll(count)
    return F.cross_entropy(similarity, positives)


def vicreg(first: Float[Tensor, "items dim"], second: Float[Tensor, "items dim"]) -> Float[Tensor, ""]:
    """Variance, invariance and covariance of two views of the same items, without negatives (VICReg, Bardes et al. 2022, eq. 6, weights 25, 25, 1).

    25 · mean squared difference of the views + 25 · mean over the channels of max(0, 1 − standard deviation), averaged over the views, + the
    sum of the squared covariances between different channels over the number of channels, of both views. A representation in which all
    items are alike costs 25:

    >>> round(float(vicreg(torch.ones(4, 3), torch.ones(4, 3))), 1)
    24.8
    """
    apart = F.mse_loss(first, second)
    narrow, mixed = first.new_zeros(()), first.new_zeros(())
    for view in (first, second):
        centred = view - view.mean(0)
        covariance = centred.T @ centred / (len(view) - 1)
        narrow = narrow + F.relu(1 - (covariance.diagonal() + 1e-4).sqrt()).mean() / 2
        mixed = mixed + (covariance.square().sum() - covariance.diagonal().square().sum()) / view.shape[1]
    return 25 * apart + 25 * narrow + mixed


def prototypes(
    points: Float[Tensor, "items dim"], centroids: Float[Tensor, "kinds dim"], kinds: Int[Tensor, " items"], temperature: float
) -> Float[Tensor, ""]:
    """Cross entropy of each item's kind under softmax(cosine to the unit centroids / temperature) (DeepCluster-v2, Caron et al. 2020).

    >>> float(prototypes(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), 0.1)) < 1e-4
    True
    """
    return F.cross_entropy(F.normalize(points, dim=1) @ centroids.T / temperature, kinds)


def masked_error(
    made: Float[Tensor, "items channels height width"],
    wanted: Float[Tensor, "items channels height width"],
    hidden: Float[Tensor, "items 1 height width"],
) -> Float[Tensor, ""]:
    """Mean squared error of a reconstruction; hidden pixels (1 in `hidden`, else 0) and seen ones count half each, where there are hidden ones."""
    squared = (made - wanted).square().mean(1, keepdim=True)
    seen = (squared * (1 - hidden)).sum() / (1 - hidden).sum().clamp_min(1)
    unseen = (squared * hidden).sum() / hidden.sum().clamp_min(1)
    return (seen + unseen) / 2 if bool(hidden.any()) else seen


def spread(embeddings: Float[Tensor, "items dim"]) -> float:
    """How far unit embeddings lie from their mean: the root of the mean squared distance, 0 (all alike) … 1 (in every direction).

    >>> round(spread(torch.eye(4)), 3), spread(torch.ones(4, 3))
    (0.866, 0.0)
    """
    units = F.normalize(embeddings.float(), dim=1)
    return float((units - units.mean(0)).square().sum(1).mean().sqrt())


def effective_rank(embeddings: Float[Tensor, "items dim"]) -> float:
    """RankMe (Garrido et al. 2023): exp of the entropy of the normalised singular values; 1 (collapsed) … min(items, dim).

    >>> round(effective_rank(torch.eye(8)), 3)
    8.0
    """
    values = torch.linalg.svdvals(embeddings.float())
    shares = values / values.sum().clamp_min(1e-12) + 1e-7
    return float(torch.exp(-(shares * shares.log()).sum()))


def distillation(student: tuple[Tensor, Tensor | None], teacher: tuple[Tensor, Tensor | None]) -> Float[Tensor, ""]:
    """How far a student's (embedding, logits) are from its teacher's on the same images.

    Logits: half the mean squared difference, each about its mean over the classes: τ²·KL of the softened outputs in the limit of a high
    temperature (Hinton et al. 2015, eq. 4), which follows the teacher in classes it finds unlikely too. Embeddings: mean squared error over
    the mean square of the teacher's, plus 1 − cosine: scale and direction. A classifier gets both terms, an encoder the second.

    >>> e = torch.randn(4, 3)
    >>> abs(float(distillation((e, e), (e, e)))) < 1e-5
    True
    """
    embedding, logits = student
    target, target_logits = teacher
    direction = 1 - F.cosine_similarity(embedding, target).mean()
    loss = F.mse_loss(embedding, target) / target.square().mean().clamp_min(1e-12) + direction
    if logits is not None and target_logits is not None:
        difference = logits - target_logits
        loss = loss + 0.5 * (difference - difference.mean(1, keepdim=True)).square().mean()
    return loss
