"""Groups of alike items: k-means for the coarse level, HDBSCAN inside it, and how typical each item is of its group.

Everything is fitted on the distinct training items (each content once, so that a photo saved five hundred times pulls
nothing towards itself) and then applied to all. Only the reduced points (items × components) are held in memory.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
from scipy.special import erf, softmax
from sklearn.cluster import HDBSCAN, KMeans, MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score, silhouette_score
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from attar import config
from attar.errors import DataError, UsageError
from attar.records import CLUSTER_SCHEMA, Clusters, Head, Items, Vectors
from attar.workspace import Job

SPREAD = 1e-7  # total variance of unit vectors below which they are one vector up to float16 rounding
RANK = 1e-6  # principal components with less than this share of the first one's variance are rounding noise
NEIGHBOURS = 10
FITTED = 10_000  # items a number of clusters is scored on
SAMPLED = 2_000  # items a silhouette is averaged over: its cost is quadratic
REPEATS = 6  # pairs of halves behind a stability figure
DENSE = 5_000  # items of a cluster HDBSCAN looks at
EXACT = 50_000  # training items up to which k-means is Lloyd's algorithm, not the mini-batch one


def unit(values: np.ndarray) -> np.ndarray:
    """Rows scaled to length one: (n, d) of any float to (n, d) float32; rows without a direction become NaN or infinite."""
    values = np.asarray(values, np.float32)
    with np.errstate(all="ignore"):
        return values / np.linalg.norm(values.astype(np.float64), axis=1, keepdims=True).astype(np.float32)


def project(vectors: np.ndarray, head: Head) -> np.ndarray:
    """Embeddings in the clustering space: (e/‖e‖ − mean) · projection, (n, d) → (n, p) float32."""
    return (unit(vectors) - head.mean) @ head.projection


def squared_distances(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """‖z − c‖² of every point to every centroid: (n, p), (k, p) → (n, k) float32."""
    out = np.empty((len(points), len(centroids)), np.float32)
    for column, centroid in enumerate(centroids):  # the difference itself: ‖z‖² − 2z·c + ‖c‖² loses the small distances in float32
        difference = points - centroid
        out[:, column] = np.einsum("np,np->n", difference, difference)
    return out


def head_probabilities(vectors: np.ndarray, head: Head) -> np.ndarray:
    """Cluster probabilities softmax(−‖z − c‖² / temperature) of embeddings: (n, d) → (n, k) float32, rows sum to 1.

    This is the posterior of equally likely spherical Gaussians of variance temperature/2; its argmax is the nearest centroid.
    """
    return softmax(-squared_distances(project(vectors, head), head.centroids) / np.float32(head.temperature), axis=1)


def principal_axes(covariance: np.ndarray, components: int) -> np.ndarray:
    """The first principal axes of a (d, d) float64 covariance: (d, p) float32, p = min(components, numerical rank).

    Each axis points to where its largest loading is positive, so that the result does not depend on the solver's signs.
    """
    values, axes = np.linalg.eigh(covariance)
    values, axes = values[::-1], axes[:, ::-1]
    axes = axes[:, : min(components, int((values > values[0] * RANK).sum()))]
    signs = np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    return (axes * signs).astype(np.float32)


def fit_centroids(points: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """k-means centroids of (n, p) points, best of four starts: (≤ k, p) float32; fewer only when fewer points are distinct."""
    seed = int(rng.integers(2**31))
    small = len(points) <= EXACT
    model = KMeans(k, n_init=4, random_state=seed) if small else MiniBatchKMeans(k, n_init=4, batch_size=4096, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters: the empty ones are dropped below
        model.fit(points)
    centroids = model.cluster_centers_.astype(np.float32)
    return centroids[np.unique(squared_distances(points, centroids).argmin(1))]


def separation(points: np.ndarray, labels: np.ndarray) -> float:
    """Mean silhouette (Rousseeuw 1987) of (n, p) points, −1 … 1; 0 where it is undefined (one group, or every item its own)."""
    return float(silhouette_score(points, labels)) if 2 <= len(np.unique(labels)) < len(labels) else 0.0


def score_count(points: np.ndarray, reference: np.ndarray, k: int, rng: np.random.Generator) -> dict[str, float]:
    """How natural a number of clusters is: score = √(silhouette⁺ · stability⁺), 0 … 1.

    silhouette: of k-means on all (n, p) points, on a sample. stability: adjusted Rand index, on the (m, p) reference, between
    k-means fitted to two random halves of the points, mean of a few pairs (Ben-Hur et al. 2002; Lange et al. 2004).
    Neither is enough alone: silhouette climbs on to over-fine partitions of high-dimensional data (MNIST pixels: 0.13 at 7,
    0.14 at 14) where halves no longer agree (0.84, then 0.57); stability is perfect for coarse partitions that join whole
    groups (five blobs: 1.0 at 3 and at 5) where the silhouette is low. Their geometric mean is high only where both are, and
    needs no weights. The same generator state for every k pairs the comparisons: the same halves, the same sample.
    """
    halves = [np.array_split(rng.permutation(len(points)), 2) for _ in range(REPEATS)]
    sample = rng.permutation(len(points))[:SAMPLED]
    silhouette = separation(points[sample], squared_distances(points[sample], fit_centroids(points, k, rng)).argmin(1))
    agreement = [
        adjusted_rand_score(*(squared_distances(reference, fit_centroids(points[half], k, rng)).argmin(1) for half in pair))
        for pair in halves
    ]
    stability = float(np.mean(agreement))
    score = float(np.sqrt(max(silhouette, 0) * max(stability, 0)))
    return {"k": k, "score": score, "silhouette": silhouette, "stability": stability}


def candidate_counts(most: int) -> list[int]:
    """Numbers of clusters to try: every one from 2 to 12, then steps of about 15 %, up to and including `most`."""
    counts = list(range(2, min(most, 12) + 1))
    while counts[-1] < most:
        counts.append(min(most, max(counts[-1] + 2, round(counts[-1] * 1.15))))
    return counts


def neighbour_distances(points: np.ndarray, labels: np.ndarray, content: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """Mean distance of each item to its 10 nearest neighbours among the pool's items of the same cluster: (n,) float64.

    content (n,) int: items of equal content are no neighbours of each other, so copies do not make an outlier look typical.
    pool (n,) bool: one item per content. Infinite where the cluster has no other item. Blocked: memory grows with n only.
    """
    reach = np.full(len(points), np.inf)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        known = members[pool[members]]
        if not len(known):
            continue
        search = NearestNeighbors(n_neighbors=min(NEIGHBOURS + 1, len(known)), algorithm="brute").fit(points[known])
        distance, index = search.kneighbors(points[members])
        distance = distance.astype(np.float64)
        distance[content[known[index]] == content[members][:, None]] = np.inf
        distance = np.sort(distance, axis=1)[:, :NEIGHBOURS]
        found = np.isfinite(distance)
        reach[members] = np.where(found, distance, 0).sum(1) / np.maximum(found.sum(1), 1)
        reach[members[~found.any(1)]] = np.inf
    return reach


def _surprise(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Robust z of positive values on a log scale: (log v − median) / σ, where σ comes from the upper quartile of the known ones.

    The upper quartile, because distances are skewed and only the far side matters; never under 0.1, so that being 40 % further
    than the median is the least that can count as far, however alike the others are.
    """
    typical = np.log(values[known & np.isfinite(values)])
    middle, upper = np.quantile(typical, [0.5, 0.75]) if len(typical) else (0.0, 0.0)
    return (np.log(values) - middle) / max((upper - middle) / 0.6745, 0.1)


def outlier_scores(reach: np.ndarray, residual: np.ndarray, labels: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """How far from everything each item is: erf(z / (1.5 √2)), 0 (typical) … 1, (n,) float32; 0.98 is z = 3.5.

    z is the larger of two robust z-scores of the logarithm, 0 if negative: of `reach`, the mean distance to the nearest
    neighbours, within the item's cluster (over all items where the cluster has fewer than 20 in the pool); and of `residual`,
    the distance to the clustering space, over all items. The second is what shows an image unlike anything in the folder: it has
    no place among the principal components, so its projection lands in the middle of the others (the Q statistic beside T² of
    Jackson & Mudholkar 1979). The squashing is that of LoOP (Kriegel et al. 2009).
    reach, residual: (n,) distances ≥ 0, reach may be infinite (score 1); labels (n,) int; pool (n,) bool: what is typical is
    learned from these.
    """
    finite = reach[pool & np.isfinite(reach)]
    reach = np.maximum(reach, max(1e-3 * float(np.median(finite)) if len(finite) else 0.0, 1e-12))
    score = np.maximum(_surprise(reach, pool), 0)
    for label in np.unique(labels):
        inside = labels == label
        if (inside & pool).sum() >= 20:
            score[inside] = np.maximum(_surprise(reach, inside & pool)[inside], 0)
    score = np.maximum(score, _surprise(np.maximum(residual, 1e-12), pool))
    return erf(score / (1.5 * np.sqrt(2))).astype(np.float32)


def density_groups(points: np.ndarray, fitted: np.ndarray, smallest: int, rng: np.random.Generator) -> np.ndarray:
    """Density clusters of one coarse cluster's (n, p) points: (n,) int, 0 … g−1, −1 for items between them.

    HDBSCAN (Campello et al. 2013) on the fitted (n,) bool ones, at most 5,000 drawn at random; the others take the label of the
    nearest of those. All −1 when there are not two groups of the smallest size: one group would only repeat the coarse cluster.
    """
    chosen = np.flatnonzero(fitted)
    chosen = np.sort(rng.choice(chosen, DENSE, replace=False)) if len(chosen) > DENSE else chosen
    if len(chosen) < 2 * smallest:
        return np.full(len(points), -1)
    labels = HDBSCAN(min_cluster_size=smallest, algorithm="kd_tree", copy=True).fit(points[chosen]).labels_
    if labels.max() < 1:
        return np.full(len(points), -1)
    nearest = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(points[chosen]).kneighbors(points, return_distance=False)[:, 0]
    return labels[nearest]


def _read(vectors: Vectors, job: Job, label: str) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows of the table, unit vectors) of each shard."""
    start = 0
    with job.progress(vectors.count, label) as bar:
        for shard in vectors.batches():
            yield slice(start, start := start + len(shard.ids)), unit(shard.values)
            bar.update(len(shard.ids))


def place(vectors: Vectors, mean: np.ndarray, projection: np.ndarray, job: Job) -> tuple[np.ndarray, np.ndarray]:
    """All items in the clustering space, (n, p) float32, and how far from it each lies, (n,) float32; reads one shard at a time."""
    points = np.empty((vectors.count, projection.shape[1]), np.float32)
    residual = np.empty(vectors.count, np.float32)
    for rows, values in _read(vectors, job, "placing vectors"):
        centred = values - mean
        points[rows] = centred @ projection
        residual[rows] = np.sqrt(np.maximum((centred**2).sum(1) - (points[rows] ** 2).sum(1), 0))
    return points, residual


def _moments(items: Items, vectors: Vectors, fitted: np.ndarray, job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and covariance (d, d), float64, of the fitted items' unit vectors; refuses vectors without a direction."""
    total, second = np.zeros(vectors.dim), np.zeros((vectors.dim, vectors.dim))
    bad: list[int] = []
    for rows, values in _read(vectors, job, "principal components"):
        whole = np.isfinite(values).all(1)
        bad.extend((rows.start + np.flatnonzero(~whole)).tolist())
        values = values[whole & fitted[rows]].astype(np.float64)
        total += values.sum(0)
        second += values.T @ values
    if bad:
        names = ", ".join(items.table["path"].take(bad[:3]).to_pylist())
        raise DataError(
            f"{len(bad)} of {vectors.count} vectors have no direction (all zero, NaN or infinite), the first of {names}; "
            "the encoder collapsed or overflowed on these images: choose another with --model, or take the images out"
        )
    mean = total / fitted.sum()
    return mean, second / fitted.sum() - np.outer(mean, mean)


def _axes(items: Items, vectors: Vectors, fitted: np.ndarray, components: int, job: Job) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and projection (d, p), float32, of the clustering space; refuses data that is all one point."""
    train = int((items.column("split") == "train").sum())
    if fitted.sum() < 2:
        raise DataError(
            f"training images: {train}, different ones among them: {int(fitted.sum())}; clustering needs at least 2 that differ in their "
            "pixels: add other images"
        )
    mean, covariance = _moments(items, vectors, fitted, job)
    spread = float(np.trace(covariance))
    if spread < SPREAD:
        raise DataError(
            f"the encoder gives all {train} training images the same vector (variance {spread:.1e}, expected above {SPREAD:.0e}): "
            "it has collapsed; choose another with --model, or train it longer with --self-steps"
        )
    return mean.astype(np.float32), principal_axes(covariance, components)


def _choose(points: np.ndarray, reference: np.ndarray, most: int, job: Job) -> tuple[int, list[dict[str, float]]]:
    """The number of clusters with the best score and the scores of all that were tried; the best one's neighbours are tried too."""
    curve: dict[int, dict[str, float]] = {}
    grid = candidate_counts(most)

    def best() -> int:
        return max(curve, key=lambda k: (curve[k]["score"], -k))

    with job.progress(len(grid), "choosing the number of clusters", "counts") as bar:

        def score(counts: Iterable[int]) -> None:
            for k in counts:
                curve[k] = job.once(f"count-{k:05d}.json", functools.partial(score_count, points, reference, k, job.rng("score")))
                bar.update()

        score(grid)
        at = grid.index(best())
        skipped = range(grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)])
        score(k for k in skipped if k not in curve)
    return best(), [curve[k] for k in sorted(curve)]


def _count(
    items: Items, points: np.ndarray, fitted: np.ndarray, settings: config.Cluster, job: Job
) -> tuple[int, list[dict[str, float]], str]:
    """How many clusters, the scores behind it, and in words what chose it."""
    distinct = int(fitted.sum())
    if settings.clusters > distinct:
        raise UsageError(
            f"clusters: {settings.clusters}; there are {distinct} different training items, which cannot make more clusters than that; "
            f"choose at most {distinct}, or 0 to let the data decide"
        )
    if settings.clusters:
        return settings.clusters, [], f"k-means, {settings.clusters} clusters: as asked for"
    most = max(2, min(settings.max_clusters, distinct // 4))
    if most == 2:
        return 2, [], f"k-means, 2 clusters: {distinct} different training items and max_clusters {settings.max_clusters} leave no choice"
    draw = job.rng("sample")
    train = np.flatnonzero(fitted)
    train = np.sort(draw.permutation(train)[:FITTED])
    other = draw.permutation(np.flatnonzero(items.column("split") == "validation"))[:SAMPLED]
    other = np.r_[other, draw.permutation(train)[: max(200 - len(other), 0)]]  # few validation items would leave stability to chance
    k, curve = _choose(points[train], points[other], most, job)
    score = next(row for row in curve if row["k"] == k)
    method = (
        f"k-means, {k} clusters: of 2 to {most} the best score {score['score']:.2f}, the geometric mean of "
        f"silhouette {score['silhouette']:.2f} and stability {score['stability']:.2f} (agreement of fits to halves of the data)"
    )
    if score["stability"] < 0.2:
        method += "; no clear groups: those fits hardly agree, so take the clusters as a partition of convenience"
    return k, curve, method


def _ordered(points: np.ndarray, centroids: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Centroids by descending number of training items, ties by their coordinates: numbers that people can refer to."""
    sizes = np.bincount(squared_distances(points, centroids).argmin(1)[train], minlength=len(centroids))
    return centroids[np.lexsort((*centroids.T[::-1], -sizes))]


def _groups(
    points: np.ndarray, labels: np.ndarray, fitted: np.ndarray, settings: config.Cluster, job: Job
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(items, density cluster numbered across the whole table) of each coarse cluster."""
    number = 0
    with job.progress(len(points), "density inside the clusters") as bar:
        for label in range(int(labels.max()) + 1):
            members = np.flatnonzero(labels == label)
            found = density_groups(points[members], fitted[members], settings.min_subcluster, job.rng("density", label))
            yield members, np.where(found < 0, -1, found + number)
            number += int(found.max(initial=-1)) + 1
            bar.update(len(members))


def _first_of(content: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """(n,) bool: the first chosen item of each content."""
    rows = np.flatnonzero(chosen)
    first = np.zeros(len(content), bool)
    first[rows[np.unique(content[rows], return_index=True)[1]]] = True
    return first


def cluster(items: Items, vectors: Vectors, settings: config.Cluster, job: Job) -> Clusters:
    """Gives every item a cluster, a density cluster inside it, its distance, density and outlier score.

    Space: principal components of the unit vectors. Temperature of the head: a quarter of the mean squared distance of a training
    item to its centroid; with it the mean largest probability is within 0.07 of the share of held-out items that a second
    k-means, fitted to half of the data, places alike (digits 0.86 and 0.80, MNIST 0.76 and 0.81, photos 0.69 and 0.63, noise 0.25 and 0.26).
    Raises DataError for vectors without a direction and for data that is all one point, UsageError for more clusters than items.
    """
    assert vectors.count == len(items), f"{vectors.count} vectors of {len(items)} items"
    train = items.column("split") == "train"
    content = np.unique(items.column("content"), return_inverse=True)[1]
    fitted = _first_of(content, train)
    with threadpool_limits(1):  # sums over threads come in any order: the same bits on any number of cores
        mean, projection = _axes(items, vectors, fitted, settings.components, job)
        points, residual = place(vectors, mean, projection, job)
        k, curve, method = _count(items, points, fitted, settings, job)
        centroids = _ordered(points, fit_centroids(points[fitted], k, job.rng("fit")), train)
        squared = squared_distances(points, centroids)
        labels = squared.argmin(1).astype(np.int32)
        own = squared[np.arange(len(points)), labels]
        reach = neighbour_distances(points, labels, content, fitted)
        subcluster = np.full(len(points), -1, np.int32)
        for members, numbers in _groups(points, labels, fitted, settings, job):
            subcluster[members] = numbers
        sample = np.sort(job.rng("separation").permutation(np.flatnonzero(fitted))[:SAMPLED])
        separated = separation(points[sample], labels[sample])
    # A floor of a tenth of the spread: when the space holds nearly everything, what is left outside it is rounding noise.
    spread = float(np.mean((points[fitted] ** 2).sum(1) + residual[fitted] ** 2))
    residual = np.sqrt(residual.astype(np.float64) ** 2 + 0.01 * spread)
    columns = {
        "id": items.ids(),
        "cluster": labels,
        "subcluster": subcluster,
        "distance": np.sqrt(own),
        "density": (1 / np.maximum(reach, 1e-6)).astype(np.float32),
        "outlier": outlier_scores(reach, residual, labels, fitted),
    }
    head = Head(mean=mean, projection=projection, centroids=centroids, temperature=float(own[fitted].mean()) / 4 or 1e-6)
    medoids = items.ids()[np.where(fitted[:, None], squared, np.inf).argmin(0)]
    if len(centroids) < k:
        method += f"; {len(centroids)} kept, the vectors have no more distinct places"
    job.say(method)
    table = pa.table(columns, schema=CLUSTER_SCHEMA)
    return Clusters(table=table, head=head, medoids=medoids, curve=tuple(curve), separation=separated, method=method)
