"""K-means clusters: k-means++ (Arthur & Vassilvitskii 2007), Lloyd's iterations (1982), the best of some restarts.

All in float64, over data that comes in chunks [rows, width], as often as asked: memory holds one chunk, and two numbers
for every row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from chaindiff.edm.random import generator
from chaindiff.io.errors import UserError

RESTARTS, ITERATIONS = 4, 300

Chunks = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class Clusters:
    """Centroids with the number of rows nearest to each, the largest cluster first.

    `inertia` is the sum of all squared distances to the nearest centroid.
    """

    centroids: Float[Tensor, "k width"]
    counts: Int64[Tensor, " k"]
    inertia: float


@dataclass(frozen=True)
class Assignment:
    """Every row's nearest centroid and squared distance to it; the count and the sum of every cluster's rows."""

    labels: Int64[Tensor, " rows"]
    distances: Float64[Tensor, " rows"]
    counts: Int64[Tensor, " k"]
    sums: Float64[Tensor, "k width"]

    @property
    def inertia(self) -> float:
        return self.distances.sum().item()


def nearest(rows: Float[Tensor, "n width"], centroids: Float[Tensor, "k width"]) -> Int64[Tensor, " n"]:
    """The number of the centroid nearest to each row; of equally near ones the first. In float64."""
    rows, centroids = rows.double(), centroids.double()
    return (centroids.square().sum(1) - 2 * rows @ centroids.T).argmin(1)  # the row's own square is no matter


def cluster(chunks: Chunks, k: int, seed: int) -> Clusters:
    """The clusters with the least inertia of some restarts, a function of the data and (k, seed) alone.

    Raises UserError for fewer distinct rows than clusters.
    """
    ends = []
    for restart in range(RESTARTS):
        steps = lloyd(chunks, plus_plus(chunks, k, (seed, "kmeans", restart)))
        ends.append(deque(steps, maxlen=1).pop())
    best, found = min(ends, key=lambda end: end[1].inertia)
    order = found.counts.argsort(descending=True, stable=True)
    centroids = best[order].float()  # as they are kept: counts are of these
    assigned = assign(chunks, centroids)
    return Clusters(centroids, assigned.counts, assigned.inertia)


def plus_plus(chunks: Chunks, k: int, key: tuple[int | str, ...]) -> Float64[Tensor, "k width"]:
    """k rows: each drawn with a probability that grows with its squared distance to the nearest of those before."""
    rows = sum(len(chunk) for chunk in chunks())
    draw, far = generator(*key), torch.ones(rows, dtype=torch.float64)
    chosen: list[Tensor] = []
    for _ in range(k):
        edges = far.cumsum(0)
        if rows == 0 or edges[-1] == 0:
            raise UserError(
                f"{k} clusters cannot be fitted to {len(chosen)} different embeddings ({rows} in all)",
                hint="choose a smaller k",
            )
        # `right`: a row at distance 0 spans nothing, and is not drawn even by a 0.
        drawn = int(torch.searchsorted(edges, draw.random() * edges[-1], right=True))
        chosen.append(_row(chunks, min(drawn, int(far.nonzero()[-1]))))
        apart = torch.cat([(chunk.double() - chosen[-1]).square().sum(1) for chunk in chunks()])
        far = apart if len(chosen) == 1 else torch.minimum(far, apart)
    return torch.stack(chosen)


def lloyd(
    chunks: Chunks, centroids: Float64[Tensor, "k width"]
) -> Iterator[tuple[Float64[Tensor, "k width"], Assignment]]:
    """Yields centroids with the rows assigned to them, better every time, until no row changes its cluster.

    One centroid at a time that has lost all its rows moves to the row that is farthest from its own.
    """
    before: Tensor | None = None
    for _ in range(ITERATIONS):
        found = assign(chunks, centroids)
        yield centroids, found
        if before is not None and torch.equal(found.labels, before):
            return
        before, counts = found.labels, found.counts[:, None]
        centroids = torch.where(counts > 0, found.sums / counts.clamp_min(1), centroids)
        if not counts.all():
            centroids[int(counts.argmin())] = _row(chunks, int(found.distances.argmax()))


def assign(chunks: Chunks, centroids: Float[Tensor, "k width"]) -> Assignment:
    """One pass over the data."""
    centroids = centroids.double()
    labels, distances = [], []
    counts, sums = torch.zeros(len(centroids), dtype=torch.int64), torch.zeros_like(centroids)
    for chunk in chunks():
        rows = chunk.double()
        found = nearest(rows, centroids)
        labels.append(found)
        distances.append((rows - centroids[found]).square().sum(1))
        counts += torch.bincount(found, minlength=len(centroids))
        sums.index_add_(0, found, rows)
    return Assignment(torch.cat(labels), torch.cat(distances), counts, sums)


def _row(chunks: Chunks, number: int) -> Float64[Tensor, " width"]:
    for chunk in chunks():
        if number < len(chunk):
            return chunk[number].double()
        number -= len(chunk)
    raise IndexError(number)
