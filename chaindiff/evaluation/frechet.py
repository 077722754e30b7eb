"""The Frechet distance of two Gaussians."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from chaindiff.encoders.moments import Moments
from chaindiff.io.errors import UserError


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians with these moments, in squared feature units.

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^1/2)      (Dowson & Landau 1982; FID: Heusel et al. 2017)

    With cov = F F^T, the trace of the root is the sum of the singular values of F_a^T F_b, which stays accurate for
    covariances that are nearly singular, where a matrix root of the product is not.
    Raises UserError for unlike widths, and for fewer samples than dimensions: the covariance is then singular, and
    the distance says more about the number of samples than about the samples.
    """
    if a.width != b.width:
        raise UserError(f"features of {a.width} and of {b.width} numbers cannot be compared")
    fewest = min(a.count, b.count)
    if fewest <= a.width:
        raise UserError(
            f"the Frechet distance of {a.width}-dimensional features needs more than {a.width} samples; "
            f"there are {fewest}, so the covariance is singular",
            hint="take more samples, features of fewer dimensions, or a metric that needs fewer: KID, CMMD",
        )
    root = torch.linalg.svdvals(_factor(a.cov).T @ _factor(b.cov)).sum()
    distance = (a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace() - 2 * root
    return max(distance.item(), 0.0)  # equal sets may give a rounding error below 0


def _factor(cov: Float64[Tensor, "d d"]) -> Float64[Tensor, "d d"]:
    variances, directions = torch.linalg.eigh(cov)
    return directions * variances.clamp(min=0).sqrt()
