"""Preconditioning: how a network F becomes a denoiser D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (EDM eq. 7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# c_noise = ln(sigma) / 4 grows without bound as sigma -> 0; below this level a denoiser is told this one.
SMALLEST_SIGMA = 1e-5


@dataclass(frozen=True)
class Coefficients:
    skip: Tensor
    out: Tensor
    input: Tensor
    noise: Tensor


def noise_label(sigma: Tensor) -> Tensor:
    """c_noise = ln(sigma) / 4 (EDM, table 1), clamped so that it is finite at sigma = 0."""
    return sigma.clamp_min(SMALLEST_SIGMA).log() / 4


@dataclass(frozen=True)
class EDM:
    """EDM's preconditioning and loss weight (Karras et al. 2022, table 1); `sigma_data` is the data's deviation."""

    sigma_data: float = 0.5

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
class Direct:
    """The network predicts the clean value itself, with weight 1 (VCDM's auxiliary model; unCLIP's prior)."""

    sigma_data: float = 0.5

    def __call__(self, sigma: Tensor) -> Coefficients:
        return Coefficients(
            skip=torch.zeros_like(sigma),
            out=torch.ones_like(sigma),
            input=1 / (sigma**2 + self.sigma_data**2).sqrt(),
            noise=noise_label(sigma),
        )

    def weight(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)


PRECONDITIONINGS = {"edm": EDM, "x0": Direct}
