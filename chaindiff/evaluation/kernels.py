"""Maximum mean discrepancies of two sets of features: KID and CMMD. Kernel matrices are summed in blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Num
from torch import Tensor

from chaindiff.edm.random import generator
from chaindiff.evaluation.interval import REPLICATES, Interval, resamples
from chaindiff.io.errors import UserError
from chaindiff.io.shards import Vectors

Kernel = Callable[[Tensor, Tensor], Tensor]

BLOCK = 512  # rows of a block of the kernel matrix: 2 MiB in float64
CMMD_SCALE = 1000.0  # as CMMD is reported


def kid(
    a: Float[Vectors, "rows width"],
    b: Float[Vectors, "samples width"],
    *,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 0,
    degree: int = 3,
) -> Interval:
    """Kernel distance: the unbiased squared MMD with the kernel (x.y / width + 1)^degree (Binkowski et al. 2018).

    The value is the mean over `subsets` pairs of random subsets of `size` rows, as published. Its expectation does not
    depend on `size`, and the mean over all subsets is the estimate from all pairs; so sets of fewer than 2 `size` rows
    are compared whole, as are all sets for `subsets=0`.

    The 95% interval is of the samples' randomness. Subsets: the delete-d jackknife (Shao & Wu 1989), by which the
    scatter over subsets of m of n rows shrinks by sqrt(m / (n - m)), and the error of finitely many subsets. Whole
    sets: a bootstrap of rows in which no row is paired with itself. Near a distance of 0 both are rough.
    Raises UserError for sets of one row or of unlike widths.
    """
    _comparable(a, b)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** degree

    fewest = min(len(a), len(b))
    if subsets and fewest >= 2 * size:
        values = torch.empty(subsets, dtype=torch.float64)
        for number in range(subsets):
            draw = generator(seed, "kid", number)
            x, y = (rows[torch.from_numpy(draw.choice(len(rows), size, replace=False))] for rows in (a, b))
            values[number] = _unbiased(x, y, kernel, torch.ones(1, size), torch.ones(1, size))
        mean = values.mean()
        shrink = (size / (fewest - size) + 1 / subsets) ** 0.5
        return Interval.of(mean.item(), (mean + (values - mean) * shrink).numpy())
    weights = [
        torch.cat([torch.ones(1, len(rows), dtype=torch.int16), resamples(len(rows), REPLICATES, seed, role)])
        for rows, role in ((a, "a"), (b, "b"))
    ]
    values = _unbiased(a, b, kernel, *weights)
    return Interval.of(values[0].item(), values[1:].numpy())


def cmmd(a: Float[Vectors, "rows width"], b: Float[Vectors, "samples width"], sigma: float = 10.0) -> float:
    """CLIP-MMD: 1000 times the squared MMD of embeddings on the unit sphere, kernel exp(-|x - y|^2 / 2 sigma^2).

    Jayasumana et al. 2024 (arXiv 2401.09603). Like the published program it takes the biased estimate, with the pairs
    of a row with itself, which adds about 1000 (1 - mean kernel) (1/n + 1/m). Rows are normalised here.
    Raises UserError for sets of one row or of unlike widths.
    """
    _comparable(a, b)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp((F.normalize(x, dim=1) @ F.normalize(y, dim=1).T - 1) / sigma**2)  # |x - y|^2 = 2 - 2 xy

    return CMMD_SCALE * _biased(a, b, kernel)


def gaussian_mmd(a: Float[Vectors, "rows width"], b: Float[Vectors, "samples width"], sigma: float) -> float:
    """Squared MMD, biased estimate, with the kernel exp(-|x - y|^2 / 2 sigma^2) (Gretton et al. 2012, equation 5)."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        squared = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
        return torch.exp(squared.clamp(min=0) / (-2 * sigma**2))

    return _biased(a, b, kernel)


def _biased(a: Vectors, b: Vectors, kernel: Kernel) -> float:
    """Mean kernel within a and within b, minus twice that between them."""

    def mean(x: Vectors, y: Vectors) -> float:
        return _sums(x, y, kernel, torch.ones(1, len(x)), torch.ones(1, len(y))).item() / (len(x) * len(y))

    return mean(a, a) + mean(b, b) - 2 * mean(a, b)


def _comparable(a: Vectors, b: Vectors) -> None:
    if a.shape[1] != b.shape[1]:
        raise UserError(f"features of {a.shape[1]} and of {b.shape[1]} numbers cannot be compared")
    if min(len(a), len(b)) < 2:
        raise UserError(f"a kernel distance needs two samples of each set; there are {len(a)} and {len(b)}")


def _unbiased(
    a: Vectors,
    b: Vectors,
    kernel: Kernel,
    weights_a: Num[Tensor, "sets rows"],
    weights_b: Num[Tensor, "sets samples"],
) -> Float64[Tensor, " sets"]:
    """Squared MMD without the pairs of a row with itself, for several weightings of the rows at once.

    Weights of one for all rows: Gretton et al. 2012, equation 3.
    """
    within = []
    for rows, weights in ((a, weights_a), (b, weights_b)):
        squares = weights**2
        pairs = weights.sum(1).double() ** 2 - squares.sum(1)
        own = torch.cat([kernel(x.double(), x.double()).diagonal() for x in rows.split(64)]).cpu()
        own_pairs = torch.stack([line.double() @ own for line in squares])  # all at once would be eight bytes a weight
        within.append((_sums(rows, rows, kernel, weights, weights) - own_pairs) / pairs)
    total = weights_a.sum(1).double() * weights_b.sum(1)
    return within[0] + within[1] - 2 * _sums(a, b, kernel, weights_a, weights_b) / total


def _sums(a: Vectors, b: Vectors, kernel: Kernel, weights_a: Tensor, weights_b: Tensor) -> Float64[Tensor, " sets"]:
    """Sum over i and j of w_i w_j k(a_i, b_j), for each pair of rows of weights."""
    total = torch.zeros(len(weights_a), dtype=torch.float64)
    for i in range(0, len(a), BLOCK):
        rows, w = a[i : i + BLOCK].double(), weights_a[:, i : i + BLOCK].to(a.device, torch.float64)
        for j in range(0, len(b), BLOCK):
            v = weights_b[:, j : j + BLOCK].to(a.device, torch.float64)
            total += ((w @ kernel(rows, b[j : j + BLOCK].double())) * v).sum(1).cpu()
    return total
