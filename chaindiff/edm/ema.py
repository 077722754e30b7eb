"""Running averages of weights: EDM's, by half-life in images, and EDM2's, by a power function of training time."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

from chaindiff.edm.power_ema import gamma_of

Module = TypeVar("Module", bound=nn.Module)


class Average(Generic[Module]):
    """Keeps `model` as the running average of another module's parameters; buffers are copied."""

    def __init__(self, source: Module):
        self.model = copy.deepcopy(source).eval().requires_grad_(False)

    def keep(self, batch: int, images: float) -> float:
        """Share of the old average that one step of `batch` images keeps; `images` counts that step."""
        raise NotImplementedError

    @torch.no_grad()
    def update(self, source: nn.Module, batch: int, images: float) -> None:
        keep = self.keep(batch, images)
        for mine, theirs in zip(self.model.parameters(), source.parameters(), strict=True):
            mine.lerp_(theirs, 1 - keep)
        for mine, theirs in zip(self.model.buffers(), source.buffers(), strict=True):
            mine.copy_(theirs)


class Ema(Average[Module]):
    """EDM's average: exponential, with a half-life in images (EDM, appendix F.2 and table 7).

    The half-life is at most `rampup` times the images seen so far, so that early weights are forgotten.
    """

    def __init__(self, source: Module, half_life: float, rampup: float | None):
        super().__init__(source)
        self.half_life, self.rampup = half_life, rampup

    def keep(self, batch: int, images: float) -> float:
        longest = self.half_life if self.rampup is None else min(self.half_life, images * self.rampup)
        return 0.5 ** (batch / max(longest, 1e-8))


class PowerEma(Average[Module]):
    """EDM2's average: a power function of training time, `sigma_rel` being its width as a share of that time.

    Over weights that stay the same for the length of a step, it is exactly the integral of the profile (EDM2, eq. 2).
    """

    def __init__(self, source: Module, sigma_rel: float):
        super().__init__(source)
        self.sigma_rel, self.gamma = sigma_rel, gamma_of(sigma_rel)

    def keep(self, batch: int, images: float) -> float:
        return max(0.0, 1 - batch / images) ** (self.gamma + 1)
