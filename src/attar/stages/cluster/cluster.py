"""Groups of alike items on two levels: density inside k-means or its like, or k-means inside density; and how typical each item is of its group.

Everything is fitted on the distinct training items (each content once, so that a photo saved five hundred times pulls
nothing towards itself) and then applied to all. Only the reduced points (items × components) are held in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
from threadpoolctl import threadpool_limits

from attar import config
from attar.records import CLUSTER_SCHEMA, Clusters, Head, Items, Vectors
from attar.stages.cluster.choose import DENSE, find_clusters
from attar.stages.cluster.count import SAMPLED, round_groups, separation
from attar.stages.cluster.density import density_groups, neighbour_distances, outlier_scores
from attar.stages.cluster.head import middles, regress, spread_of
from attar.stages.cluster.methods import Partition, reordered
from attar.stages.cluster.space import axes_of, head_scores, place, squared_distances
from attar.workspace import Job


def _ordered(found: Partition, points: np.ndarray, fitted: np.ndarray, train: np.ndarray) -> tuple[Partition, np.ndarray]:
    """The clusters that have fitted items by descending number of training items, ties by their middles' coordinates: numbers that people
    can refer to; and their middles: the centroids of k-means, else the mean of the fitted items."""
    labels = found.place(points)
    present = np.unique(labels[fitted])
    centroids = found.centroids if found.centroids is not None else middles(points[fitted], labels[fitted], found.clusters)
    sizes = np.bincount(labels[train], minlength=found.clusters)
    order = present[np.lexsort((*centroids[present].T[::-1], -sizes[present]))]
    return reordered(found, order), centroids[order]


def _groups(
    points: np.ndarray, labels: np.ndarray, fitted: np.ndarray, settings: config.Cluster, job: Job
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(items, group inside, numbered across the whole table) of each coarse cluster: density clusters, or inside density clusters k-means."""
    number, inside = 0, round_groups if settings.cluster_method in DENSE else density_groups
    with job.progress(len(points), "groups inside the clusters") as bar:
        for label in range(int(labels.max()) + 1):
            members = np.flatnonzero(labels == label)
            found = inside(points[members], fitted[members], settings.min_subcluster, job.rng("density", label))
            yield members, np.where(found < 0, -1, found + number)
            number += int(found.max(initial=-1)) + 1
            bar.update(len(members))


NOISE = 0.9
"""Least outlier score of what a density method calls noise: shown as strange, not dropped by the default cut unless it is also far."""
PER_AXIS = 8
"""Items an axis needs before what lies off the axes is told from chance: with fewer, a tenth to all of the held-out items look strange."""


def _first_of(content: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """(n,) bool: the first chosen item of each content."""
    rows = np.flatnonzero(chosen)
    first = np.zeros(len(content), bool)
    first[rows[np.unique(content[rows], return_index=True)[1]]] = True
    return first


def _head(part: Partition, blank: Head, points: np.ndarray, labels: np.ndarray, fitted: np.ndarray) -> tuple[Head, str]:
    """What places further items, and in words how well it does where the partition has other borders than a head can have."""
    points, labels = points[fitted], labels[fitted]
    head = replace(blank, temperature=spread_of(points, labels, blank.centroids) / 4 or 1e-6)
    if part.centroids is not None:
        return head, ""
    weights, bias = (part.weights, part.bias) if part.weights is not None else regress(points, labels, part.clusters)
    head = replace(head, weights=weights, bias=bias)
    alike = float((head_scores(points, head).argmax(1) == labels).mean())
    return (
        head,
        ""
        if part.weights is not None
        else f"; the model's cluster head, which has flat borders, places {alike:.1%} of the training items alike",
    )


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
        mean, projection = axes_of(items, vectors, fitted, settings.components, job)
        points, residual = place(vectors, mean, projection, job)
        found = find_clusters(items, points, fitted, settings, job)
        part, centroids = _ordered(found.partition, points, fitted, train)
        labels = part.place(points).astype(np.int32)
        squared = squared_distances(points, centroids)
        own = squared[np.arange(len(points)), labels]
        reach = neighbour_distances(points, labels, content, fitted)
        noise = part.noise(points) if part.noise else np.zeros(len(points), bool)
        subcluster = np.full(len(points), -1, np.int32)
        for members, numbers in _groups(points, labels, fitted & ~noise, settings, job):
            subcluster[members] = numbers
        subcluster[noise] = -1
        head, said = _head(part, Head(mean=mean, projection=projection, centroids=centroids, temperature=1.0), points, labels, fitted)
        sample = np.sort(job.rng("separation").permutation(np.flatnonzero(fitted))[:SAMPLED])
        separated = separation(points[sample], labels[sample])
    # Axes through nearly as many items as there are leave all others far outside: what counts as outside is what fewer axes leave.
    sure = max(1, int(fitted.sum()) // PER_AXIS)
    outside = residual.astype(np.float64) ** 2 + (points[:, sure:] ** 2).sum(1)
    # A floor of a tenth of the spread: when the space holds nearly everything, what is left outside it is rounding noise.
    spread = float(np.mean((points[fitted] ** 2).sum(1) + residual[fitted] ** 2))
    residual = np.sqrt(outside + 0.01 * spread)
    columns = {
        "id": items.ids(),
        "cluster": labels,
        "subcluster": subcluster,
        "distance": np.sqrt(own),
        "density": (1 / np.maximum(reach, 1e-6)).astype(np.float32),
        "outlier": np.maximum(outlier_scores(reach, residual, labels, fitted), np.where(noise, NOISE, 0)).astype(np.float32),
    }
    medoids = items.ids()[np.where(fitted[:, None] & (labels[:, None] == np.arange(part.clusters)), squared, np.inf).argmin(0)]
    method = found.method + said
    if part.clusters < found.asked:
        method += f"; {part.clusters} kept, the vectors have no more distinct places"
    job.say(method)
    table = pa.table(columns, schema=CLUSTER_SCHEMA)
    return Clusters(table=table, head=head, medoids=medoids, curve=tuple(found.curve), separation=separated, method=method)
