"""The one signature that everything which denoises shares, and the words it uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

# A variable's noisy value, [batch, *shape]: the clean value plus sigma times unit noise.
State = dict[str, Tensor]
# A variable's noise level: one for the whole batch (on the host), or one for each sample, [batch].
Levels = Mapping[str, float | Tensor]


@dataclass(frozen=True)
class Prediction:
    """What a denoiser says: the expected clean value of every moving variable, and its learned log-variance if any."""

    x0: State
    log_var: State | None = None


@runtime_checkable
class Denoiser(Protocol):
    """D(x; sigma): expected clean values given noisy ones (EDM, eq. 2); conditions are bound beforehand.

    It knows levels from sigma_min to sigma_max, and every variable may rest at 0.
    """

    @property
    def sigma_min(self) -> float: ...
    @property
    def sigma_max(self) -> float: ...

    def __call__(self, x: State, sigma: Levels) -> Prediction: ...


@runtime_checkable
class Rounding(Protocol):
    """What a denoiser may offer besides: the nearest level that it knows, where it was trained on discrete ones."""

    def round(self, sigma: float) -> float: ...


def round_level(denoiser: Denoiser, sigma: float) -> float:
    """The level that a denoiser knows nearest to this one; most know all."""
    return denoiser.round(sigma) if isinstance(denoiser, Rounding) else sigma


def expand(value: float | Tensor, like: Tensor) -> float | Tensor:
    """A level with one entry a sample, shaped so that it multiplies [batch, *shape]."""
    return value.reshape(-1, *[1] * (like.ndim - 1)).to(like.dtype) if isinstance(value, Tensor) else value
