"""Exponential moving average of weights, with EDM's half-life in images and its warm-up."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def ema_decay(batch: int, images: float, half_life: float, rampup: float | None) -> float:
    """Share of the old average that one step of `batch` images keeps (EDM, appendix F.2 and table 7).

    The half-life is at most `rampup` times the images seen so far, so that early weights are forgotten.
    """
    if rampup is not None:
        half_life = min(half_life, images * rampup)
    return 0.5 ** (batch / max(half_life, 1e-8))


class Ema(Generic[Module]):
    """Keeps `model` as the running average of another module's parameters; buffers are copied."""

    def __init__(self, source: Module, half_life: float, rampup: float | None):
        self.model = copy.deepcopy(source).eval().requires_grad_(False)
        self.half_life, self.rampup = half_life, rampup

    @torch.no_grad()
    def update(self, source: nn.Module, batch: int, images: float) -> None:
        keep = ema_decay(batch, images, self.half_life, self.rampup)
        for mine, theirs in zip(self.model.parameters(), source.parameters(), strict=True):
            mine.lerp_(theirs, 1 - keep)
        for mine, theirs in zip(self.model.buffers(), source.buffers(), strict=True):
            mine.copy_(theirs)
