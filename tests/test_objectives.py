"""Losses and signals against their formulas written out, under symmetries, and on inputs of the wrong shape."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor

from attar.models.objectives import distillation, effective_rank, masked_error, nt_xent, prototypes, spread, vicreg

seeds = st.integers(0, 10_000)


def _pair(seed: int, items: int = 6, dim: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(items, dim, generator=generator), torch.randn(items, dim, generator=generator)


def _cosine(a: list[float], b: list[float]) -> float:
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b)) / norms


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_nt_xent_is_the_double_loop_of_its_formula(temperature: float) -> None:
    first, second = _pair(0)
    views, n = [*first.tolist(), *second.tolist()], len(first)
    total = 0.0
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        others = sum(math.exp(_cosine(views[i], views[k]) / temperature) for k in range(2 * n) if k != i)
        total -= math.log(math.exp(_cosine(views[i], views[j]) / temperature) / others)
    assert float(nt_xent(first, second, temperature)) == pytest.approx(total / (2 * n), rel=1e-5)


@given(seeds, st.floats(0.1, 100))
def test_nt_xent_does_not_see_scale_order_or_which_view_is_first(seed: int, scale: float) -> None:
    first, second = _pair(seed)
    loss = float(nt_xent(first, second, 0.2))
    order = torch.randperm(len(first), generator=torch.Generator().manual_seed(seed))
    assert float(nt_xent(first * scale, second, 0.2)) == pytest.approx(loss, rel=1e-4, abs=1e-5)
    assert float(nt_xent(second, first, 0.2)) == pytest.approx(loss, rel=1e-4, abs=1e-5)
    assert float(nt_xent(first[order], second[order], 0.2)) == pytest.approx(loss, rel=1e-4, abs=1e-5)


@given(seeds)
def test_nt_xent_is_lower_for_true_pairs_than_for_mixed_ones(seed: int) -> None:
    first, noise = _pair(seed, 8, 16)
    second = first + 0.05 * noise
    assert float(nt_xent(first, second, 0.2)) < float(nt_xent(first, second.roll(1, 0), 0.2))


def test_nt_xent_pulls_pairs_together() -> None:
    first, second = (view.requires_grad_() for view in _pair(1))
    nt_xent(first, second, 0.2).backward()
    stepped = nt_xent(first - 0.1 * first.grad, second - 0.1 * second.grad, 0.2)
    assert float(stepped) < float(nt_xent(first, second, 0.2))


def test_nt_xent_refuses_views_of_different_shapes() -> None:
    with pytest.raises(TypeCheckError, match="second"):
        nt_xent(torch.ones(4, 3), torch.ones(5, 3), 0.2)


def test_effective_rank_is_the_exponential_of_the_entropy_of_singular_values() -> None:
    embeddings = _pair(2, 40, 12)[0]
    values = np.linalg.svd(embeddings.numpy().astype(np.float64), compute_uv=False)
    shares = values / values.sum()
    assert effective_rank(embeddings) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)


@given(st.integers(1, 10), seeds)
def test_effective_rank_counts_equal_directions(rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.linalg.qr(torch.randn(n, 10, generator=generator))[0][:, :rank] for n in (30, 12))
    assert effective_rank(3.7 * rows @ columns.T) == pytest.approx(rank, abs=0.02)


def test_effective_rank_tells_collapse_and_survives_zeros() -> None:
    assert effective_rank(torch.ones(20, 1) @ torch.randn(1, 16, generator=torch.Generator().manual_seed(0))) == pytest.approx(1, abs=0.01)
    assert effective_rank(torch.zeros(4, 3)) == pytest.approx(1, abs=0.01)


def test_effective_rank_refuses_a_vector() -> None:
    with pytest.raises(TypeCheckError, match="embeddings"):
        effective_rank(torch.ones(4))


@given(seeds)
def test_vicreg_is_its_formula_in_loops(seed: int) -> None:
    first, second = _pair(seed, 7, 4)
    n, d = first.shape
    total = 25 * sum((float(a) - float(b)) ** 2 for a, b in zip(first.flatten(), second.flatten())) / (n * d)
    for view in (first.tolist(), second.tolist()):
        mean = [sum(row[c] for row in view) / n for c in range(d)]

        def covariance(a: int, b: int) -> float:
            return sum((row[a] - mean[a]) * (row[b] - mean[b]) for row in view) / (n - 1)  # noqa: B023

        total += 25 / 2 * sum(max(0.0, 1 - math.sqrt(covariance(c, c) + 1e-4)) for c in range(d)) / d
        total += sum(covariance(a, b) ** 2 for a in range(d) for b in range(d) if a != b) / d
    assert float(vicreg(first, second)) == pytest.approx(total, rel=1e-4)


@given(seeds)
def test_vicreg_sees_views_apart_and_collapse(seed: int) -> None:
    first, noise = _pair(seed, 40, 6)
    spread_out = torch.linalg.qr(first - first.mean(0))[0] * math.sqrt(39)
    assert float(vicreg(spread_out, spread_out)) < 0.1, "unit variance, no covariance, equal views"
    assert float(vicreg(spread_out, spread_out + 0.3 * noise)) > float(vicreg(spread_out, spread_out))
    assert float(vicreg(0 * first, 0 * first)) == pytest.approx(25 * 0.99, rel=1e-3)


def test_prototypes_is_its_formula() -> None:
    points, centroids = _pair(3, 5, 6)
    centroids = torch.nn.functional.normalize(centroids, dim=1)
    kinds = torch.tensor([0, 1, 2, 3, 4])
    total = 0.0
    for row, kind in zip(points.tolist(), kinds.tolist()):
        scores = [math.exp(_cosine(row, centroid) / 0.1) for centroid in centroids.tolist()]
        total -= math.log(scores[kind] / sum(scores))
    assert float(prototypes(points, centroids, kinds, 0.1)) == pytest.approx(total / 5, rel=1e-4)


def test_masked_error_counts_seen_and_hidden_half_each() -> None:
    wanted, made = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    hidden = torch.zeros(2, 1, 4, 4)
    hidden[:, :, 0] = 1  # a quarter of the pixels
    made[:, :, 0], made[:, :, 1:] = 2.0, 1.0
    assert float(masked_error(made, wanted, hidden)) == pytest.approx((4 + 1) / 2)
    assert float(masked_error(made, wanted, 0 * hidden)) == pytest.approx(float(made.square().mean()))


@given(seeds)
def test_spread_is_the_distance_from_the_mean_of_unit_vectors(seed: int) -> None:
    first, _ = _pair(seed)
    units = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in first.tolist()]
    mean = [sum(column) / len(units) for column in zip(*units)]
    expected = math.sqrt(sum(sum((x - m) ** 2 for x, m in zip(row, mean)) for row in units) / len(units))
    assert spread(first) == pytest.approx(expected, rel=1e-4)
    assert spread(7 * first) == pytest.approx(spread(first), rel=1e-4)
    assert spread(first[:1].repeat(5, 1)) == pytest.approx(0, abs=1e-6)


@given(seeds)
def test_distillation_is_zero_at_equality_and_positive_elsewhere(seed: int) -> None:
    embedding, other = _pair(seed)
    logits, other_logits = _pair(seed + 1, dim=3)
    assert float(distillation((embedding, logits), (embedding, logits))) == pytest.approx(0, abs=1e-5)
    assert float(distillation((other, logits), (embedding, logits))) > 1e-3
    assert float(distillation((embedding, other_logits), (embedding, logits))) > 1e-3
    assert float(distillation((2 * embedding, None), (embedding, None))) == pytest.approx(1, abs=1e-4)  # scale counts


def test_distillation_is_its_formula() -> None:
    (e, t), (s, c) = _pair(3), _pair(4, dim=3)
    hot = 1000.0
    p, q = (np.exp(x.double().numpy() / hot) / np.exp(x.double().numpy() / hot).sum(1, keepdims=True) for x in (c, s))
    divergence = hot**2 * (p * np.log(p / q)).sum(1).mean()
    scale = float(((e - t) ** 2).mean() / (t**2).mean())
    direction = 1 - np.mean([_cosine(a, b) for a, b in zip(e.tolist(), t.tolist())])
    assert float(distillation((e, s), (t, c))) == pytest.approx(divergence + scale + direction, rel=1e-3)
    assert float(distillation((e, s + 5), (t, c))) == pytest.approx(
        float(distillation((e, s), (t, c))), rel=1e-4
    )  # softmax does not see it
    assert float(distillation((e, None), (t, c))) == pytest.approx(scale + direction, rel=1e-5)


def test_losses_are_bit_equal_when_repeated() -> None:
    first, second = _pair(5)
    assert torch.equal(nt_xent(first, second, 0.3), nt_xent(first, second, 0.3))
    assert torch.equal(distillation((first, None), (second, None)), distillation((first, None), (second, None)))
    assert effective_rank(first) == effective_rank(first)
