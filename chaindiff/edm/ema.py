"""Exponential moving averages (EMA) of weights: EDM's, by half-life in images, and EDM2's power-function EMA.

EDM2's can be given other lengths after training (EDM2, section 3). A profile

    p_gamma(tau) = (gamma + 1) tau^gamma / t^(gamma + 1)

weights the parameters at every time tau in [0, t] (eq. 1). It is named by sigma_rel, its standard deviation as a share
of t (section 3.1). Times are in images.
"""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Float64
from torch import nn

UNIFORM = 12**-0.5  # sigma_rel of the plain average of all weights so far, gamma = 0: the longest there is

Module = TypeVar("Module", bound=nn.Module)
Numbers = float | Float64[np.ndarray, "..."]


class Average(Generic[Module]):
    """Maintains `model` as the running average of another module's parameters; buffers are copied."""

    def __init__(self, source: Module):
        self.model = copy.deepcopy(source).eval().requires_grad_(False)

    def keep(self, batch: int, images: float) -> float:
        """Weight of the old average in a step of `batch` images; `images` includes that step."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, source: nn.Module, batch: int, images: float) -> None:
        keep = self.keep(batch, images)
        parameters: list[Any] = [*self.model.parameters()]
        torch._foreach_lerp_(parameters, [*source.parameters()], 1 - keep)  # pyright: ignore[reportPrivateImportUsage]
        for mine, theirs in zip(self.model.buffers(), source.buffers(), strict=True):
            mine.copy_(theirs)


class Ema(Average[Module]):
    """EDM's average: exponential, with a half-life in images (EDM, appendix F.2 and table 7).

    The half-life is at most `rampup` times the images seen before the step, so that early weights are forgotten.
    """

    def __init__(self, source: Module, half_life: float, rampup: float | None):
        super().__init__(source)
        self.half_life, self.rampup = half_life, rampup

    def keep(self, batch: int, images: float) -> float:
        longest = self.half_life if self.rampup is None else min(self.half_life, (images - batch) * self.rampup)
        return 0.5 ** (batch / max(longest, 1e-8))


class PowerEma(Average[Module]):
    """EDM2's average: a power function of training time, `sigma_rel` being its width as a share of that time.

    For weights that are constant within a step, it equals the integral of the profile (EDM2, eq. 2).
    """

    def __init__(self, source: Module, sigma_rel: float):
        super().__init__(source)
        self.sigma_rel, self.gamma = sigma_rel, gamma_of(sigma_rel)

    def keep(self, batch: int, images: float) -> float:
        return max(0.0, 1 - batch / images) ** (self.gamma + 1)


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a profile: the largest root of (g + 2)^2 (g + 3) = (g + 1) / sigma_rel^2 (EDM2, appendix C).

    Raises ValueError unless sigma_rel lies above 0 and below 0.2887.
    """
    if not 0 < sigma_rel < UNIFORM:
        raise ValueError(f"sigma_rel should be above 0 and below {UNIFORM:.4f}, not {sigma_rel}")
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots[roots.imag == 0].real.max())


def inner(gamma_a: Numbers, end_a: Numbers, gamma_b: Numbers, end_b: Numbers) -> Numbers:
    """The integral of the product of two profiles, in closed form (EDM2, appendix C)."""
    first = end_a <= end_b
    early, late = np.where(first, end_a, end_b), np.where(first, end_b, end_a)
    exponent = np.where(first, gamma_b, gamma_a)  # of the profile that ends later
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * (early / late) ** exponent / late


def coefficients(
    gammas: Float64[np.ndarray, " n"], ends: Float64[np.ndarray, " n"], gamma: float, end: float
) -> tuple[Float64[np.ndarray, " n"], float]:
    """The combination of snapshots' profiles that is nearest to a given one, and the relative error in the L2 norm.

    Least squares as in EDM2, appendix C, with one more constraint: the coefficients sum to 1. Without it they miss 1 by
    some percent where snapshots are few, which does not matter to EDM2's networks, invariant to the scale of weights.
    """
    count = len(gammas)
    gram = inner(gammas[:, None], ends[:, None], gammas, ends)
    target, size = inner(gammas, ends, gamma, end), inner(gamma, end, gamma, end)
    norm = np.sqrt(np.diag(gram))  # profiles of unit norm are well conditioned
    # Stationary point of the Lagrangian: [G 1; 1' 0] [x; multiplier] = [b; 1].
    system = np.zeros((count + 1, count + 1))
    system[:count, :count] = gram / np.outer(norm, norm)
    system[:count, count] = system[count, :count] = norm.min() / norm
    solved = np.linalg.lstsq(system, np.append(target / norm, norm.min()), rcond=None)[0]
    found = solved[:count] / norm
    residual = size - 2 * target @ found + found @ gram @ found
    return found, float(np.sqrt(max(residual, 0.0) / size))
