"""Mean and covariance of features in one pass, and the Frechet distance of two Gaussians."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from chaindiff.io import tensorfile
from chaindiff.io.errors import UserError

FORMAT = "chaindiff-moments/1"


class Moments:
    """Count, mean and covariance of rows [n, width], in float64; memory does not grow with the rows.

    Chunks and whole sets merge exactly (Chan, Golub & LeVeque 1979, equations 1.5).
    """

    def __init__(self, width: int):
        self.count = 0
        self.mean: Float64[Tensor, " width"] = torch.zeros(width, dtype=torch.float64)
        self.scatter: Float64[Tensor, "width width"] = torch.zeros(width, width, dtype=torch.float64)

    @classmethod
    def over(cls, chunks: Iterable[Tensor]) -> Moments:
        """Of all rows of all chunks. Raises UserError if there is none."""
        moments = None
        for chunk in chunks:
            moments = moments or cls(chunk.shape[1])
            moments.update(chunk)
        if moments is None:
            raise UserError("no features to take moments of")
        return moments

    @property
    def width(self) -> int:
        return len(self.mean)

    @property
    def cov(self) -> Float64[Tensor, "width width"]:
        """Unbiased covariance. Raises UserError for fewer than two rows."""
        if self.count < 2:
            raise UserError(f"the covariance of {self.count} samples is not defined")
        return self.scatter / (self.count - 1)

    def update(self, chunk: Float[Tensor, "rows width"]) -> None:
        """Take in more rows. Raises UserError if a number is not finite."""
        if len(chunk) == 0:
            return
        rows = chunk.detach().double().cpu()
        if not rows.isfinite().all():
            raise UserError("features that are not finite: the samples or the feature extractor are broken")
        mean = rows.mean(0)
        centred = rows - mean
        self._merge(len(rows), mean, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Take in all rows of another set."""
        if other.width != self.width:
            raise UserError(f"moments of {self.width} and of {other.width} numbers cannot be merged")
        self._merge(other.count, other.mean, other.scatter)

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.count + count
        if count:
            apart = mean - self.mean
            self.scatter += scatter
            self.scatter += torch.outer(apart, apart) * (self.count * count / total)
            self.mean += apart * (count / total)
        self.count = total

    def save(self, path: Path, **about: str) -> None:
        """Write a safetensors file; `about` goes into its metadata (which extractor, which images)."""
        tensors = {"mean": self.mean, "scatter": self.scatter}
        tensorfile.save(path, tensors, {**about, "format": FORMAT, "count": str(self.count)})

    @classmethod
    def load(cls, path: Path, **about: str) -> Moments:
        """Read a file that was saved with the same `about`. Raises UserError if it is missing, broken or another's."""
        tensors, metadata = tensorfile.load(path)
        for name, expected in {"format": FORMAT, **about}.items():
            if metadata.get(name) != expected:
                raise UserError(f"{name} is '{metadata.get(name)}', expected '{expected}'", str(path))
        moments = cls(len(tensors["mean"]))
        moments.count, moments.mean, moments.scatter = int(metadata["count"]), tensors["mean"], tensors["scatter"]
        return moments


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Frechet (2-Wasserstein) distance of two Gaussians with these moments, in squared feature units.

    |mean_a - mean_b|^2 + tr(cov_a + cov_b - 2 (cov_a cov_b)^1/2)      (Dowson & Landau 1982; FID: Heusel et al. 2017)

    With cov = F F^T, the trace of the root is the sum of the singular values of F_a^T F_b, which stays accurate for
    covariances that are nearly singular, where a matrix root of the product is not.
    Raises UserError for unlike widths, and for fewer samples than dimensions: the covariance is then singular, and
    the distance says more of the number of samples than of the samples.
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
    return max(distance.item(), 0.0)  # equal sets end a rounding error below


def _factor(cov: Float64[Tensor, "d d"]) -> Float64[Tensor, "d d"]:
    variances, directions = torch.linalg.eigh(cov)
    return directions * variances.clamp(min=0).sqrt()
