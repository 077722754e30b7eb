"""Metrics of embeddings themselves: of a prior without its image model, and of images with their texts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from chaindiff.edm.random import generator
from chaindiff.encoders.moments import Moments
from chaindiff.evaluation.interval import Interval, mean_interval
from chaindiff.evaluation.memorisation import memorisation
from chaindiff.evaluation.metrics import distances
from chaindiff.io.errors import UserError
from chaindiff.io.shards import Vectors

BLOCK = 4096  # rows read at once


def alignment(
    image_embeddings: Float[Vectors, "images width"],
    text_embeddings: Float[Vectors, "texts _"],
    pairs: Int64[Tensor, "n 2"],
) -> Interval:
    """Mean cosine of each image's embedding and its own text's (the CLIP score of Hessel et al. 2021, unscaled).

    `pairs` are numbers of an image and of its text. Raises UserError for unlike widths.
    """
    a, b = image_embeddings, text_embeddings
    if a.shape[1] != b.shape[1]:
        raise UserError(f"images and texts must be embedded into one space; got {list(a.shape)} and {list(b.shape)}")
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
    against train, and held-out against train, which is what a perfect prior could reach. `frechet` is None where there
    are too few rows. `precision` and `recall` take k = 3, `density` and `coverage` k = 5. `norm` and `cosine` (between
    rows of a set) are means and deviations of each set. `novelty` is `memorisation`.
    """
    count = min(len(sampled), len(held_out))
    sets = {"sampled": _some(sampled, count, seed, "sampled"), "floor": _some(held_out, count, seed, "held_out")}
    found = {k: _plain(distances(train, v, seed=seed)) for k, v in sets.items()}
    report: dict[str, Any] = {"count": count, "width": sampled.shape[1], "train": len(train), "frechet": None}
    for metric in found["floor"]:
        report["frechet" if metric == "fd" else metric] = {k: values[metric] for k, values in found.items()}
    everything = {"sampled": sampled, "held_out": held_out, "train": train}
    report["norm"] = {k: _norms(v) for k, v in everything.items()}
    report["cosine"] = {k: _cosines(v) for k, v in everything.items()}
    report["novelty"] = memorisation(sampled, train, held_out).summary()
    return report


def _some(rows: Vectors, count: int, seed: int, role: str) -> Tensor:
    chosen = generator(seed, "vectors", role).choice(len(rows), count, replace=False)
    return rows[torch.from_numpy(chosen)]


def _plain(values: dict[str, float | Interval]) -> dict[str, Any]:
    return {name: vars(value) if isinstance(value, Interval) else value for name, value in values.items()}


def _norms(rows: Vectors) -> dict[str, float]:
    norms = torch.cat([part.double().norm(dim=1) for part in rows.split(BLOCK)])
    return {"mean": norms.mean().item(), "std": norms.std().item()}


def _cosines(rows: Vectors) -> dict[str, float]:
    """Mean and deviation over all pairs of different rows, from sums over rows: sum u_i.u_j = |sum u|^2, and
    sum (u_i.u_j)^2 = |U^T U|^2."""
    units = Moments.over(F.normalize(part.double(), dim=1) for part in rows.split(BLOCK))
    count, products = units.count, units.scatter + units.count * torch.outer(units.mean, units.mean)
    pairs = count * (count - 1)
    mean = ((count * units.mean).square().sum() - count) / pairs
    square = (products.square().sum() - count) / pairs
    return {"mean": mean.item(), "std": (square - mean**2).clamp(min=0).sqrt().item()}
