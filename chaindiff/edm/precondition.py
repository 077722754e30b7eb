"""Preconditioning: how a network F becomes a denoiser D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (EDM eq. 7).

Every published parametrisation is one choice of the four coefficients, with a loss weight lambda(sigma): what the
network predicts (noise, velocity, clean value) is a choice of c_skip and c_out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from chaindiff.edm.schedules import VP as VPSchedule
from chaindiff.edm.schedules import Cosine, Flow, iddpm_levels, iddpm_table

# c_noise = ln(sigma) / 4 grows without bound as sigma -> 0; lower levels are clamped to this one.
SMALLEST_SIGMA = 1e-5
SMALLEST_TIME = 0.05  # of the velocity that a predicted clean value implies
TIMES = 1000  # networks conditioned on a time receive it in thousandths, as the published ones do


@dataclass(frozen=True)
class Coefficients:
    skip: Tensor
    out: Tensor
    input: Tensor
    noise: Tensor


@runtime_checkable
class Preconditioning(Protocol):
    """Coefficients and loss weight of every level, and the levels that the denoiser accepts."""

    kind: ClassVar[str]  # its name in a recipe
    label_span: ClassVar[float]  # the order of magnitude of c_noise

    @property
    def sigma_min(self) -> float: ...
    @property
    def sigma_max(self) -> float: ...

    def __call__(self, sigma: Tensor) -> Coefficients: ...
    def weight(self, sigma: Tensor) -> Tensor: ...
    def round(self, sigma: float) -> float: ...


class Shared(dict[float, Coefficients]):
    """Coefficients, [] each but the label, [rows], at levels that all samples share; `levels` are uploaded at once."""

    def __init__(
        self, coefficients: Callable[[Tensor], Coefficients], like: Tensor, levels: Iterable[float] = (), rows: int = 1
    ):
        super().__init__()
        self.coefficients, self.like, self.rows = coefficients, like, rows
        self.add(levels)

    def __missing__(self, level: float) -> Coefficients:
        self.add([level])
        return self[level]

    @torch.no_grad()
    def add(self, levels: Iterable[float]) -> None:
        if not (new := [*dict.fromkeys(levels)]):
            return
        sigma = torch.tensor(new, dtype=self.like.dtype, pin_memory=self.like.is_cuda)
        at = self.coefficients(sigma.to(self.like.device, non_blocking=True))
        columns = (part.expand(len(new)).unbind() for part in (at.skip, at.out, at.input))
        labels = at.noise[:, None].expand(-1, self.rows).contiguous().unbind()
        self.update(zip(new, map(Coefficients, *columns, labels), strict=True))


def noise_label(sigma: Tensor) -> Tensor:
    """c_noise = ln(sigma) / 4 (EDM, table 1), clamped so that it is finite at sigma = 0."""
    return sigma.clamp_min(SMALLEST_SIGMA).log() / 4


class AnyLevel:
    """Preconditionings that accept every level."""

    label_span: ClassVar[float] = 1

    @property
    def sigma_min(self) -> float:
        return 0.0

    @property
    def sigma_max(self) -> float:
        return math.inf

    def round(self, sigma: float) -> float:
        """The nearest level that the denoiser accepts, on the host."""
        return sigma


class PredictsNoise(AnyLevel):
    """The network sees the noisy value at unit variance and predicts the noise; the loss is that of the noise."""

    label_span: ClassVar[float] = TIMES

    def told(self, sigma: Tensor) -> Tensor:
        """c_noise."""
        raise NotImplementedError

    def __call__(self, sigma: Tensor) -> Coefficients:
        return Coefficients(
            skip=torch.ones_like(sigma), out=-sigma, input=1 / (sigma**2 + 1).sqrt(), noise=self.told(sigma)
        )

    def weight(self, sigma: Tensor) -> Tensor:
        return 1 / sigma**2


@dataclass(frozen=True)
class EDM(AnyLevel):
    """EDM's preconditioning and loss weight (Karras et al. 2022, table 1); `sigma_data` is the data's deviation."""

    sigma_data: float = 0.5
    kind: ClassVar[str] = "edm"

    def __call__(self, sigma: Tensor) -> Coefficients:
        total = sigma**2 + self.sigma_data**2
        return Coefficients(
            skip=self.sigma_data**2 / total,
            out=sigma * self.sigma_data / total.sqrt(),
            input=1 / total.sqrt(),
            noise=noise_label(sigma),
        )

    def weight(self, sigma: Tensor) -> Tensor:
        """lambda(sigma) = 1 / c_out^2."""
        return (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2


@dataclass(frozen=True)
class Direct(AnyLevel):
    """The network predicts the clean value itself, with weight 1 (VCDM's auxiliary model; unCLIP's prior).

    With `velocity` the loss is flow matching's: weight 1 / t^2, t = sigma / (1 + sigma) at least 0.05 (JiT,
    arXiv 2511.13720).
    """

    sigma_data: float = 0.5
    velocity: bool = False
    kind: ClassVar[str] = "x0"

    def __call__(self, sigma: Tensor) -> Coefficients:
        return Coefficients(
            skip=torch.zeros_like(sigma),
            out=torch.ones_like(sigma),
            input=1 / (sigma**2 + self.sigma_data**2).sqrt(),
            noise=noise_label(sigma),
        )

    def weight(self, sigma: Tensor) -> Tensor:
        return Flow().time(sigma).clamp_min(SMALLEST_TIME) ** -2 if self.velocity else torch.ones_like(sigma)


@dataclass(frozen=True)
class V(AnyLevel):
    """The network sees a clean + b noise with a^2 + b^2 = 1 and predicts v = a noise - b clean (Salimans & Ho 2022).

    The network is conditioned on the time of the cosine schedule; the loss is that of v, "SNR + 1" in terms of the
    clean value.
    """

    kind: ClassVar[str] = "v"
    label_span: ClassVar[float] = TIMES

    def __call__(self, sigma: Tensor) -> Coefficients:
        total = sigma**2 + 1
        return Coefficients(
            skip=1 / total,
            out=-sigma / total.sqrt(),
            input=1 / total.sqrt(),
            noise=TIMES * Cosine().time(sigma),
        )

    def weight(self, sigma: Tensor) -> Tensor:
        return (sigma**2 + 1) / sigma**2


@dataclass(frozen=True)
class Velocity(AnyLevel):
    """The network predicts the velocity, noise - clean, of x_t = (1 - t) clean + t noise (Liu et al. 2022).

    The network sees x_t and the time; the loss is that of the velocity.
    """

    kind: ClassVar[str] = "flow"
    label_span: ClassVar[float] = TIMES

    def __call__(self, sigma: Tensor) -> Coefficients:
        t = Flow().time(sigma)
        return Coefficients(skip=1 - t, out=-t, input=1 - t, noise=TIMES * t)

    def weight(self, sigma: Tensor) -> Tensor:
        return 1 / Flow().time(sigma) ** 2


@dataclass(frozen=True)
class VP(PredictsNoise):
    """The network predicts the noise of the variance-preserving process, given its time (EDM, table 1)."""

    beta_d: float = 19.9
    beta_min: float = 0.1
    eps: float = 1e-5  # the smallest time of training
    kind: ClassVar[str] = "vp"

    @property
    def schedule(self) -> VPSchedule:
        return VPSchedule(self.beta_d, self.beta_min)

    @property
    def sigma_min(self) -> float:
        return self.schedule.sigma(self.eps)

    @property
    def sigma_max(self) -> float:
        return self.schedule.sigma(1.0)

    def told(self, sigma: Tensor) -> Tensor:
        return (TIMES - 1) * self.schedule.time(sigma)


@dataclass(frozen=True)
class VE:
    """The network predicts sigma times the score of the variance-exploding process (EDM, table 1)."""

    sigma_min: float = 0.02
    sigma_max: float = 100.0
    kind: ClassVar[str] = "ve"
    label_span: ClassVar[float] = 1

    def round(self, sigma: float) -> float:
        return sigma

    def __call__(self, sigma: Tensor) -> Coefficients:
        return Coefficients(
            skip=torch.ones_like(sigma),
            out=sigma,
            input=torch.ones_like(sigma),
            noise=(sigma / 2).clamp_min(SMALLEST_SIGMA).log(),
        )

    def weight(self, sigma: Tensor) -> Tensor:
        return 1 / sigma**2


@dataclass(frozen=True)
class IDDPM(PredictsNoise):
    """The network predicts the noise of a discrete process, given the index of the nearest level (EDM, table 1).

    A network that learns variances outputs them in extra channels, which are not part of the prediction.
    """

    levels: int = 1000
    kind: ClassVar[str] = "iddpm"

    @property
    def sigma_min(self) -> float:
        return float(iddpm_levels(self.levels)[-2])

    @property
    def sigma_max(self) -> float:
        return float(iddpm_levels(self.levels)[0])

    def round(self, sigma: float) -> float:
        known = iddpm_levels(self.levels)
        return float(known[np.abs(known - sigma).argmin()])

    def told(self, sigma: Tensor) -> Tensor:
        known = iddpm_table(self.levels, sigma.device, sigma.dtype)[: self.levels]
        nearest = (sigma[..., None] - known).abs().argmin(-1)
        return (self.levels - 1 - nearest).to(sigma.dtype)
