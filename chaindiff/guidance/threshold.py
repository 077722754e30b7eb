"""Thresholding of the predicted clean value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chaindiff.edm.denoiser import Denoiser, Levels, Prediction, State, expand
from chaindiff.guidance.algebra import Wrapper


@dataclass(frozen=True)
class Thresholded(Wrapper):
    """See `thresholded`."""

    limit: float
    percentile: float | None

    def __call__(self, x: State, sigma: Levels) -> Prediction:
        found = self.inner(x, sigma)
        return Prediction({v: self.cut(value) for v, value in found.x0.items()}, found.variance)

    def cut(self, value: Tensor) -> Tensor:
        if self.percentile is None:
            return value.clamp(-self.limit, self.limit)
        largest = torch.quantile(value.flatten(1).abs().float(), self.percentile, dim=1)
        bound = expand(largest, value).clamp_min(self.limit)
        return value.clamp(-bound, bound) * (self.limit / bound)


def thresholded(inner: Denoiser, limit: float = 1.0, *, percentile: float | None = None) -> Denoiser:
    """Limit the clean value to [-limit, limit]: clamped (static), or with `percentile`, such as 0.995, dynamically.

    Dynamic thresholding (Saharia et al. 2022, section 2.3) takes that percentile s of every sample's |x0|, and where s
    is above the limit clamps to s and divides by it, so that high guidance scales do not saturate.
    Raises ValueError for a limit that is not above 0, and a percentile outside (0, 1].
    """
    if limit <= 0 or (percentile is not None and not 0 < percentile <= 1):
        raise ValueError(f"expected a limit above 0 and a percentile in (0, 1], not {limit:g} and {percentile}")
    return Thresholded(inner, limit, percentile)
