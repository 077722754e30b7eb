"""K-means clusters by scikit-learn, of data that comes in chunks [rows, width] and can be iterated repeatedly."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from chaindiff.edm.random import generator
from chaindiff.io.errors import UserError

RESTARTS, ITERATIONS = 4, 300
MOST = 2**26  # numbers that clusters are fitted to, 512 MiB in float64: a random subset of the rows if there are more

Chunks = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class Clusters:
    """Centroids with the number of rows nearest to each, the largest cluster first.

    `inertia` is the sum of all squared distances to the nearest centroid.
    """

    centroids: Float[Tensor, "k width"]
    counts: Int64[Tensor, " k"]
    inertia: float


def nearest(rows: Float[Tensor, "n width"], centroids: Float[Tensor, "k width"]) -> Int64[Tensor, " n"]:
    """The index of the centroid nearest to each row, the first one in a tie. In float64."""
    rows, centroids = rows.double(), centroids.double()
    return (centroids.square().sum(1) - 2 * rows @ centroids.T).argmin(1)  # the row's own norm does not matter


def cluster(chunks: Chunks, k: int, seed: int) -> Clusters:
    """The clusters of least inertia over several restarts, a function of the data and (k, seed) alone.

    Raises UserError for fewer distinct rows than clusters.
    """
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    sizes, draw = [len(chunk) for chunk in chunks()], generator(seed, "kmeans")
    rows = _some(chunks, sizes, draw)
    distinct = len({hash(row.tobytes()) for row in rows})
    if distinct < k:
        raise UserError(
            f"{k} clusters cannot be fitted to {distinct} different embeddings ({sum(sizes)} in all)",
            hint="choose a smaller k",
        )
    state = int(draw.integers(2**32))
    restarts: Any = RESTARTS  # annotated as a string in scikit-learn
    fit = KMeans(k, n_init=restarts, max_iter=ITERATIONS, tol=0, random_state=state, copy_x=False)
    with threadpool_limits(1):  # several threads would sum in arbitrary order
        labels = fit.fit_predict(rows.astype(np.float64))
    order = np.argsort(-np.bincount(labels, minlength=k), kind="stable")
    centroids = torch.from_numpy(fit.cluster_centers_[order]).float()  # as they are stored: counts refer to these
    counts, inertia = torch.zeros(k, dtype=torch.int64), 0.0
    for chunk in chunks():
        found = nearest(chunk, centroids)
        counts += found.bincount(minlength=k)
        inertia += (chunk.double() - centroids[found]).square().sum().item()
    return Clusters(centroids, counts, inertia)


def _some(chunks: Chunks, sizes: list[int], draw: np.random.Generator) -> Float32[np.ndarray, "rows width"]:
    """As many rows as should fit into memory, in order, independent of the chunks."""
    total, width = sum(sizes), next(iter(chunks())).shape[1]
    chosen = torch.zeros(total, dtype=torch.bool)
    chosen[draw.choice(total, min(total, MOST // width), replace=False)] = True
    parts = zip(chunks(), chosen.split(sizes), strict=True)
    return torch.cat([chunk[part] for chunk, part in parts]).float().numpy()
