"""Metrics of embeddings themselves: of a prior without its image model, and of images with their texts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from chaindiff.edm.random import generator
from chaindiff.evaluation.interval import Interval, mean_interval
from chaindiff.evaluation.kernels import kid
from chaindiff.evaluation.memorisation import memorisation
from chaindiff.evaluation.moments import Moments, frechet_distance
from chaindiff.evaluation.neighbours import density_coverage, precision_recall
from chaindiff.io.errors import UserError
from chaindiff.io.shards import Vectors

BLOCK = 4096  # rows read at once


def alignment(
    image_embeddings: Float[Vectors, "images width"],
    text_embeddings: Float[Vectors, "texts _"],
    pairs: Int64[Tensor, "n 2"] | None = None,
) -> Interval:
    """Mean cosine of each image's embedding and its own text's (the CLIP score of Hessel et al. 2021, unscaled).

    `pairs` are numbers of an image and of its text; without them row i of both belongs together.
    Raises UserError for unlike widths, and without `pairs` for unlike counts.
    """
    a, b = image_embeddings, text_embeddings
    if a.shape[1] != b.shape[1] or (pairs is None and len(a) != len(b)):
        shapes = f"{list(a.shape)} and {list(b.shape)}"
        raise UserError(f"images and texts must be embedded in pairs into one space; got {shapes}")
    if pairs is None:
        pairs = torch.arange(len(a))[:, None].expand(-1, 2)
    parts = [F.cosine_similarity(a[x].double(), b[y].double(), dim=1) for x, y in (p.T for p in pairs.split(BLOCK))]
    return mean_interval(torch.cat(parts))


def vector_report(
    sampled: Float[Vectors, "samples width"],
    held_out: Float[Vectors, "rows width"],
    train: Float[Vectors, "train width"],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """A prior alone: sampled embeddings against training ones, each figure beside its floor.

    Every comparison is made twice, with the same number of rows (the smaller of both sets', drawn at random): sampled
    against train, and held-out against train, which is what a perfect prior could reach. `frechet` is None with its
    reason beside it where there are too few rows. `precision` and `recall` take k = 3, `density` and `coverage` k = 5.
    `norm` and `cosine` (between rows of a set) are means and deviations of each set. `novelty` is `memorisation`.
    """
    count = min(len(sampled), len(held_out))
    sets = {"sampled": _some(sampled, count, seed, "sampled"), "floor": _some(held_out, count, seed, "held_out")}
    report: dict[str, Any] = {"count": count, "width": sampled.shape[1], "train": len(train)}
    reference = Moments.over(train.split(BLOCK))
    try:
        report["frechet"] = {k: frechet_distance(Moments.over(v.split(BLOCK)), reference) for k, v in sets.items()}
    except UserError as error:
        report["frechet"], report["frechet_refused"] = None, error.message
    report["kid"] = {k: vars(kid(v, train, seed=seed)) for k, v in sets.items()}
    shares = {k: (*precision_recall(train, v), *density_coverage(train, v)) for k, v in sets.items()}
    for position, name in enumerate(("precision", "recall", "density", "coverage")):
        report[name] = {k: values[position] for k, values in shares.items()}
    everything = {"sampled": sampled, "held_out": held_out, "train": train}
    report["norm"] = {k: _spread(_norms(v)) for k, v in everything.items()}
    report["cosine"] = {k: _cosines(v) for k, v in everything.items()}
    report["novelty"] = memorisation(sampled, train, held_out).summary()
    return report


def _some(rows: Vectors, count: int, seed: int, role: str) -> Tensor:
    chosen = generator(seed, "vectors", role).choice(len(rows), count, replace=False)
    return rows[torch.from_numpy(chosen)]


def _norms(rows: Vectors) -> Float64[Tensor, " rows"]:
    return torch.cat([part.double().norm(dim=1) for part in rows.split(BLOCK)])


def _spread(values: Tensor) -> dict[str, float]:
    return {"mean": values.mean().item(), "std": values.std().item()}


def _cosines(rows: Vectors) -> dict[str, float]:
    """Mean and deviation over all pairs of different rows, from sums over rows: sum u_i.u_j = |sum u|^2, and
    sum (u_i.u_j)^2 = |U^T U|^2."""
    count, width = rows.shape
    total = torch.zeros(width, dtype=torch.float64)
    products = torch.zeros(width, width, dtype=torch.float64)
    for part in rows.split(BLOCK):
        u = F.normalize(part.double(), dim=1).cpu()
        total += u.sum(0)
        products += u.T @ u
    pairs = count * (count - 1)
    mean = (total.square().sum() - count) / pairs
    square = (products.square().sum() - count) / pairs
    return {"mean": mean.item(), "std": (square - mean**2).clamp(min=0).sqrt().item()}
