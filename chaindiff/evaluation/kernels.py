"""Maximum mean discrepancies of two sets of features: KID and CMMD. Kernel matrices are summed in blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Num
from torch import Tensor

from chaindiff.edm.random import generator
from chaindiff.evaluation.blocks import blocks
from chaindiff.evaluation.interval import REPLICATES, Interval, resamples
from chaindiff.io.errors import UserError
from chaindiff.io.shards import Vectors

Kernel = Callable[[Tensor, Tensor], Tensor]

CMMD_SCALE = 1000.0  # as CMMD is reported


def kid(
    a: Float[Vectors, "rows width"],
    b: Float[Vectors, "samples width"],
    *,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 0,
) -> Interval:
    """Kernel distance: the unbiased squared MMD with the kernel (x.y / width + 1)^3 (Binkowski et al. 2018).

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
        return (x @ y.T / x.shape[1] + 1) ** 3

    fewest = min(len(a), len(b))
    if subsets and fewest >= 2 * size:
        values = torch.empty(subsets, dtype=torch.float64)
        for number in range(subsets):
            draw = generator(seed, "kid", number)
            x, y = (rows[torch.from_numpy(draw.choice(len(rows), size, replace=False))] for rows in (a, b))
            values[number] = _mmd(x, y, kernel)
        mean = values.mean()
        shrink = (size / (fewest - size) + 1 / subsets) ** 0.5
        return Interval.of(mean.item(), (mean + (values - mean) * shrink).numpy())
    weights = [
        torch.cat([torch.ones(1, len(rows), dtype=torch.int16), resamples(len(rows), REPLICATES, seed, role)])
        for rows, role in ((a, "a"), (b, "b"))
    ]
    values = _mmd(a, b, kernel, weights)
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

    return CMMD_SCALE * _mmd(a, b, kernel, own=True).item()


def _comparable(a: Vectors, b: Vectors) -> None:
    if a.shape[1] != b.shape[1]:
        raise UserError(f"features of {a.shape[1]} and of {b.shape[1]} numbers cannot be compared")
    if min(len(a), len(b)) < 2:
        raise UserError(f"a kernel distance needs two samples of each set; there are {len(a)} and {len(b)}")


def _mmd(
    a: Vectors, b: Vectors, kernel: Kernel, weights: Sequence[Num[Tensor, "sets _"]] | None = None, own: bool = False
) -> Float64[Tensor, " sets"]:
    """Squared MMD (Gretton et al. 2012), for several weightings of both sets' rows at once; by default all are 1.

    Unbiased (equation 3), or, including each row's `own` pair with itself, biased (equation 5).
    """
    weights_a, weights_b = weights or [torch.ones(1, len(rows)) for rows in (a, b)]
    value = -2 * _mean(a, b, kernel, weights_a, weights_b)
    for rows, weights_of in ((a, weights_a), (b, weights_b)):
        value += _mean(rows, rows, kernel, weights_of, weights_of, own)
    return value


def _mean(
    a: Vectors, b: Vectors, kernel: Kernel, weights_a: Tensor, weights_b: Tensor, own: bool = True
) -> Float64[Tensor, " sets"]:
    """Mean of k(a_i, b_j) by the weights w_i w_j, for each pair of rows of weights; `own`: with i = j."""
    total = torch.zeros(len(weights_a), dtype=torch.float64)
    pairs = weights_a.sum(1).double() * weights_b.sum(1)
    for i, j, rows, others in blocks(a, b):
        values = kernel(rows, others)
        if not own and i == j:
            values.fill_diagonal_(0)
        w, v = weights_a[:, i].to(values), weights_b[:, j].to(values)
        total += ((w @ values) * v).sum(1).cpu()
    return total / (pairs if own else pairs - (weights_a**2).sum(1))
