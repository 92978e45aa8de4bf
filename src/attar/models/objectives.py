"""Losses and the signals that tell whether a run is learning. Pure functions of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
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
