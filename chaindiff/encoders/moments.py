"""Mean and covariance of features in one pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from chaindiff.io.errors import UserError


class Moments:
    """Count, mean and scatter matrix of rows [n, width], in float64; memory does not grow with their number.

    Chunks are merged by pairwise updates (Chan, Golub & LeVeque 1979, equations 1.5).
    """

    def __init__(self, width: int):
        self.count = 0
        self.mean: Float64[Tensor, " width"] = torch.zeros(width, dtype=torch.float64)
        self.scatter: Float64[Tensor, "width width"] = torch.zeros(width, width, dtype=torch.float64)

    @classmethod
    def over(cls, chunks: Iterable[Tensor]) -> Moments:
        """Of all rows of all chunks. Raises UserError if there is no chunk."""
        moments = None
        for chunk in chunks:
            moments = moments or cls(chunk.shape[1])
            moments.update(chunk)
        if moments is None:
            raise UserError("there are no features to take moments of")
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
        """Add rows. Raises UserError if a number is not finite."""
        if len(chunk) == 0:
            return
        rows = chunk.detach().double().cpu()
        if not rows.isfinite().all():
            raise UserError("features that are not finite: the samples or the feature extractor are broken")
        mean, before = rows.mean(0), self.count
        centred, apart = rows - mean, mean - self.mean
        self.count += len(rows)
        self.scatter += centred.T @ centred
        self.scatter += torch.outer(apart, apart) * (before * len(rows) / self.count)
        self.mean += apart * (len(rows) / self.count)
