"""Noise levels of training: distributions of sigma, each a function of only a batch's draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from chaindiff.edm.random import Draws
from chaindiff.edm.schedules import VP, Cosine, Flow, iddpm_table

LARGEST_LOG_SNR = 20.0  # Salimans & Ho 2022 clip log-SNR to [-20, 20]


TrainingNoise = Callable[[Draws], Tensor]  # a level for every sample of a batch, [batch]


@dataclass(frozen=True)
class LogNormal:
    """ln sigma ~ N(mean, std^2) (EDM, table 1).

    In the time t = sigma / (1 + sigma) of flow matching this is the logit-normal distribution (Esser et al. 2024,
    section 3.1), since ln sigma = logit t.
    """

    mean: float = -1.2
    std: float = 1.2

    def __call__(self, draws: Draws) -> Float[Tensor, " batch"]:
        return (draws.normal("sigma") * self.std + self.mean).exp()


@dataclass(frozen=True)
class VPTime:
    """The time of a VP schedule is uniform in (eps, 1) (EDM, table 1)."""

    schedule: VP
    eps: float = 1e-5

    def __call__(self, draws: Draws) -> Float[Tensor, " batch"]:
        return self.schedule.sigma(1 + draws.uniform("sigma") * (self.eps - 1))


@dataclass(frozen=True)
class LogUniform:
    """ln sigma is uniform between two levels (VE; EDM, table 1)."""

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def __call__(self, draws: Draws) -> Float[Tensor, " batch"]:
        return self.sigma_min * (draws.uniform("sigma") * math.log(self.sigma_max / self.sigma_min)).exp()


@dataclass(frozen=True)
class DiscreteLevels:
    """iDDPM's levels but the last, which is 0, all equally likely (EDM, table 1)."""

    levels: int = 1000

    def __call__(self, draws: Draws) -> Float[Tensor, " batch"]:
        chosen = draws.integers("sigma", below=self.levels)
        return iddpm_table(self.levels, chosen.device)[chosen]


@dataclass(frozen=True)
class CosineTime:
    """The time of the cosine schedule is uniform in (0, 1), log-SNR within 20 of 0 (Salimans & Ho 2022)."""

    def __call__(self, draws: Draws) -> Float[Tensor, " batch"]:
        largest = math.exp(LARGEST_LOG_SNR / 2)
        latest = Cosine().time(largest)
        return Cosine().sigma(draws.uniform("sigma").clamp(max=latest)).clamp(1 / largest, largest)


@dataclass(frozen=True)
class FlowTime:
    """The time of flow matching is uniform (Liu et al. 2022)."""

    min: float = 1e-3
    max: float = 1 - 1e-3

    def __call__(self, draws: Draws) -> Float[Tensor, " batch"]:
        return Flow().sigma(self.min + draws.uniform("sigma") * (self.max - self.min))


def one_of(values: Sequence[int], index: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """The values at these places: arithmetic, since a table would wait to be copied to the device."""
    return sum((value * (index == place) for place, value in enumerate(values)), torch.zeros_like(index))


@dataclass(frozen=True)
class Shifted:
    """Levels times `shift`: in the time of flow matching, t' = shift t / (1 + (shift - 1) t) (Esser et al. 2024)."""

    noise: TrainingNoise
    shift: float

    def __call__(self, draws: Draws) -> Float[Tensor, " batch"]:
        return self.noise(draws) * self.shift
