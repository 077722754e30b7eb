"""The signature that all denoisers share, and its types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from chaindiff.kernels.sums import expand as expand

# A variable's noisy value, [batch, *shape]: the clean value plus sigma times unit noise.
State = dict[str, Tensor]
# A variable's noise level: one for the whole batch (on the host), or one for each sample, [batch].
Levels = Mapping[str, float | Tensor]


@dataclass(frozen=True)
class Prediction:
    """A denoiser's output: the expected clean value of every moving variable.

    `variance`: the raw output of a network that learns variances (Nichol & Dhariwal 2021, eq. 15: where
    the log-variance of a step lies between its two bounds).
    """

    x0: State
    variance: State | None = None


@runtime_checkable
class Denoiser(Protocol):
    """D(x; sigma): expected clean values given noisy ones (EDM, eq. 2); conditioning is bound beforehand.

    Guidance, thresholding and known values wrap one denoiser in another. None of them disables gradients: that is
    left to the solver, so a wrapper may differentiate through what it wraps.
    """

    def __call__(self, x: State, sigma: Levels) -> Prediction: ...

    def evaluations(self, sigma: Levels) -> int:
        """Evaluations of a network that a call at these levels costs."""
        ...
