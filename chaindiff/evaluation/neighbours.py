"""Nearest neighbours between sets of features, and the metrics made of them."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from chaindiff.evaluation.blocks import blocks
from chaindiff.io.errors import UserError
from chaindiff.io.shards import Vectors

SAME = 1e-12  # squared distances below this share of the squared norms are rounding errors of equal rows


def nearest(
    queries: Float[Vectors, "rows width"], bank: Float[Vectors, "bank width"], k: int = 1
) -> tuple[Float64[Tensor, "rows k"], Int64[Tensor, "rows k"]]:
    """Euclidean distances to, and row numbers of, the k nearest rows of the bank, nearest first.

    Raises UserError if the bank has fewer than k rows.
    """
    if len(bank) < k:
        raise UserError(f"{k} nearest neighbours need as many samples; there are {len(bank)}")
    best = torch.full((len(queries), k), torch.inf, dtype=torch.float64, device=queries.device)
    where = torch.zeros_like(best, dtype=torch.int64)
    for i, j, rows, others in blocks(queries, bank):
        found = torch.cat([best[i], _squared(rows, others)], 1)
        numbers = torch.arange(j.start, j.stop, device=queries.device).expand(len(rows), -1)
        best[i], order = found.topk(k, largest=False)
        where[i] = torch.cat([where[i], numbers], 1).gather(1, order)
    return best.sqrt(), where


def precision_recall(
    real: Float[Vectors, "rows width"], fake: Float[Vectors, "samples width"], k: int = 3
) -> tuple[float, float]:
    """Share of the fake inside the real manifold, and of the real inside the fake one.

    A set's manifold is the union of balls around its points that reach to the k-th nearest of its own other points
    (Kynkaanniemi et al. 2019, equations 1 and 2). Both shares depend on the counts: compare equal ones.
    Raises UserError for sets of k points or fewer.
    """
    precision = _inside(fake, real, _radii(real, k))[0] > 0
    recall = _inside(real, fake, _radii(fake, k))[0] > 0
    return precision.double().mean().item(), recall.double().mean().item()


def density_coverage(
    real: Float[Vectors, "rows width"], fake: Float[Vectors, "samples width"], k: int = 5
) -> tuple[float, float]:
    """How densely the fake fill the real balls (1: as the real do), and the share of real balls that hold a fake.

    Naeem et al. 2020, equations 3 and 4. Raises UserError for a real set of k points or fewer.
    """
    balls, covered = _inside(fake, real, _radii(real, k))
    return balls.mean().item() / k, covered.double().mean().item()


def _radii(points: Vectors, k: int) -> Float64[Tensor, " rows"]:
    """Distance to the k-th nearest other point."""
    if len(points) <= k:
        raise UserError(f"neighbourhoods of {k} need more than {k} samples; there are {len(points)}")
    return nearest(points, points, k + 1)[0][:, k]  # the nearest is the point itself


def _inside(
    points: Vectors, centres: Vectors, radii: Float64[Tensor, " centres"]
) -> tuple[Float64[Tensor, " points"], Bool[Tensor, " centres"]]:
    """In how many closed balls each point lies, and which balls hold a point."""
    counts = torch.zeros(len(points), dtype=torch.float64, device=centres.device)
    held = torch.zeros(len(centres), dtype=torch.bool, device=centres.device)
    for i, j, rows, others in blocks(points, centres):
        within = _squared(rows, others).sqrt() <= radii[j]
        counts[i] += within.sum(1)
        held[j] |= within.any(0)
    return counts, held


def _squared(a: Float64[Tensor, "n d"], b: Float64[Tensor, "m d"]) -> Float64[Tensor, "n m"]:
    """Squared distances |a|^2 + |b|^2 - 2 ab, where equal rows have distance 0."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    squared = torch.addmm(norms, a, b.T, alpha=-2)
    return squared.masked_fill_(squared <= SAME * norms, 0.0)
