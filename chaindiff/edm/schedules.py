"""Schedules: noise level and scale as functions of time; x(t) = s(t) (clean + sigma(t) noise) (EDM, section 2).

The sampling loop passes them floats (float64, on the host); those that training draws times from accept tensors too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

Number = TypeVar("Number", float, Tensor)


def _math(x: float | Tensor) -> Any:
    """The module whose sqrt, exp, ... fit a value: torch and math use the same names."""
    return torch if isinstance(x, Tensor) else math


@runtime_checkable
class Schedule(Protocol):
    """sigma(t), scale s(t), their derivatives, and the time of a level; sigma rises with t."""

    def sigma(self, t: float) -> float: ...
    def scale(self, t: float) -> float: ...
    def dsigma(self, t: float) -> float: ...
    def dscale(self, t: float) -> float: ...
    def time(self, sigma: float) -> float: ...


class VarianceExploding:
    """Schedules without a scale: s(t) = 1."""

    def scale(self, t: float) -> float:
        return 1.0

    def dscale(self, t: float) -> float:
        return 0.0


class VariancePreserving:
    """Variance-preserving schedules: s(t) = 1 / sqrt(1 + sigma(t)^2)."""

    def sigma(self, t: float) -> float:
        raise NotImplementedError

    def dsigma(self, t: float) -> float:
        raise NotImplementedError

    def scale(self, t: float) -> float:
        return 1 / math.sqrt(1 + self.sigma(t) ** 2)

    def dscale(self, t: float) -> float:
        return -self.sigma(t) * self.dsigma(t) * self.scale(t) ** 3


class Linear(VarianceExploding):
    """EDM's own choice: sigma(t) = t, s(t) = 1, so that a step in t is a step in sigma."""

    def sigma(self, t: float) -> float:
        return t

    def dsigma(self, t: float) -> float:
        return 1.0

    def time(self, sigma: float) -> float:
        return sigma


@dataclass(frozen=True)
class VP(VariancePreserving):
    """Variance preserving: ln(1 + sigma^2) = beta_d t^2 / 2 + beta_min t (Song et al. 2021b; EDM, table 1)."""

    beta_d: float = 19.9
    beta_min: float = 0.1

    @classmethod
    def between(cls, sigma_min: float, sigma_max: float, eps: float = 1e-3) -> VP:
        """The betas with sigma(1) = sigma_max and sigma(eps) = sigma_min, as in EDM's general sampler.

        For a low sigma_min, beta_min is slightly negative: between t = 0 and a time below eps there is no level.
        """
        low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
        beta_d = 2 * (high - low / eps) / (1 - eps)
        return cls(beta_d, high - beta_d / 2)

    def sigma(self, t: Number) -> Number:
        return _math(t).expm1(self.beta_d / 2 * t**2 + self.beta_min * t) ** 0.5

    def dsigma(self, t: float) -> float:
        sigma = self.sigma(t)
        return (self.beta_d * t + self.beta_min) / 2 * (sigma + 1 / sigma)

    def time(self, sigma: Number) -> Number:
        exponent = _math(sigma).log1p(sigma**2)
        root = (self.beta_min**2 + 2 * self.beta_d * exponent) ** 0.5
        if self.beta_min < 0:  # of sampling, which passes floats
            return (root - self.beta_min) / self.beta_d if exponent else sigma
        return 2 * exponent / (root + self.beta_min)


class VE(VarianceExploding):
    """Variance exploding: sigma(t) = sqrt(t), s(t) = 1 (Song et al. 2021b; EDM, table 1)."""

    def sigma(self, t: float) -> float:
        return math.sqrt(t)

    def dsigma(self, t: float) -> float:
        return 0.5 / math.sqrt(t)

    def time(self, sigma: float) -> float:
        return sigma**2


@dataclass(frozen=True)
class Cosine(VariancePreserving):
    """Cosine log-SNR, variance preserving: sigma(t) = tan(pi t / 2), s(t) = cos(pi t / 2) (Salimans & Ho 2022).

    With an offset o the angle is pi (t + o) / (2 (1 + o)) and s is 1 at t = 0 (Nichol & Dhariwal 2021, eq. 17; their
    offset is 0.008).
    """

    offset: float = 0.0

    @property
    def _rate(self) -> float:
        """d(angle) / dt."""
        return math.pi / 2 / (1 + self.offset)

    @property
    def _first(self) -> float:
        """The angle at t = 0."""
        return self._rate * self.offset

    def sigma(self, t: Number) -> Number:
        angle, lib = self._first + self._rate * t, _math(t)
        # 1 + sigma^2 = 1 / s^2, with the difference of squares, accurate for small levels
        return (lib.sin(self._rate * t) * lib.sin(angle + self._first)) ** 0.5 / lib.cos(angle)

    def dsigma(self, t: float) -> float:
        angle = self._first + self._rate * t
        return self._rate * math.cos(self._first) ** 2 * math.tan(angle) / (math.cos(angle) ** 2 * self.sigma(t))

    def time(self, sigma: Number) -> Number:
        first, rise = math.tan(self._first), sigma**2 / math.cos(self._first) ** 2
        tangent = (first**2 + rise) ** 0.5  # of the angle; its difference from the first angle is 0 at level 0
        return _math(sigma).atan2(rise, (tangent + first) * (1 + tangent * first)) / self._rate


class Flow:
    """Flow matching on straight lines: s x = (1 - t) clean + t noise, sigma(t) = t / (1 - t) (Liu et al. 2022)."""

    def sigma(self, t: Number) -> Number:
        return t / (1 - t)

    def scale(self, t: float) -> float:
        return 1 - t

    def dsigma(self, t: float) -> float:
        return 1 / (1 - t) ** 2

    def dscale(self, t: float) -> float:
        return -1.0

    def time(self, sigma: Number) -> Number:
        return sigma / (1 + sigma)


@dataclass(frozen=True)
class LogSNR(VariancePreserving):
    """Linear log-SNR, variance preserving: t = ln(sigma / sigma_min) (Kingma et al. 2021).

    Log-SNR diverges at level 0: below sigma_min, sigma continues along its tangent and is 0 at t = -1.
    """

    sigma_min: float = 0.002

    def sigma(self, t: float) -> float:
        return self.sigma_min * (math.exp(t) if t > 0 else 1 + t)

    def dsigma(self, t: float) -> float:
        return max(self.sigma(t), self.sigma_min)

    def time(self, sigma: float) -> float:
        ratio = sigma / self.sigma_min
        return math.log(ratio) if ratio > 1 else ratio - 1


@dataclass(frozen=True)
class _LevelsOf:
    """The levels of another schedule."""

    of: Schedule

    def sigma(self, t: float) -> float:
        return self.of.sigma(t)

    def dsigma(self, t: float) -> float:
        return self.of.dsigma(t)

    def time(self, sigma: float) -> float:
        return self.of.time(sigma)


class Unscaled(_LevelsOf, VarianceExploding):
    """The levels of another schedule, with s(t) = 1."""


class Scaled(_LevelsOf, VariancePreserving):
    """The levels of another schedule, with s(t) = 1 / sqrt(1 + sigma(t)^2)."""


def schedule(kind: str, sigma_min: float, sigma_max: float, scaling: str | None = None) -> Schedule:
    """The schedule that a recipe names, for sampling between two levels; `scaling` replaces its scale."""
    found = {
        "linear": Linear,
        "vp": lambda: VP.between(sigma_min, sigma_max),
        "ve": VE,
        "cosine": Cosine,
        "iddpm": lambda: Cosine(IDDPM_OFFSET),
        "logsnr": lambda: LogSNR(sigma_min),
        "flow": Flow,
    }[kind]()
    return found if scaling is None else {"vp": Scaled, "none": Unscaled}[scaling](found)


IDDPM_CLIP, IDDPM_OFFSET = 0.001, 0.008  # C_1 and C_2 of EDM, table 1


@lru_cache
def iddpm_levels(count: int = 1000) -> Float64[np.ndarray, " count1"]:
    """The discrete levels u_0 > u_1 > ... > u_count = 0 of iDDPM (EDM, table 1); read-only."""
    levels = np.zeros(count + 1)
    fraction = np.sin(np.pi / 2 * np.arange(count + 1) / count / (IDDPM_OFFSET + 1)) ** 2  # alpha bar
    for j in range(count, 0, -1):
        levels[j - 1] = np.sqrt((levels[j] ** 2 + 1) / max(fraction[j - 1] / fraction[j], IDDPM_CLIP) - 1)
    levels.setflags(write=False)
    return levels


@lru_cache
def iddpm_table(count: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """`iddpm_levels` on a device, copied once."""
    return torch.tensor(iddpm_levels(count), device="cpu").to(device, dtype)
