"""An estimate with its uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int16
from torch import Tensor

from chaindiff.edm.random import generator

REPLICATES = 200  # of a bootstrap


@dataclass(frozen=True)
class Interval:
    """A value, its standard error, and the ends of its 95% interval."""

    value: float
    standard_error: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, replicates: Sequence[float] | np.ndarray) -> Interval:
        """From values that scatter as the estimate does: their deviation and percentiles (Efron 1979)."""
        low, high = np.quantile(replicates, [0.025, 0.975])
        return cls(float(value), float(np.std(replicates, ddof=1)), float(low), float(high))


def resamples(rows: int, count: int, seed: int, role: str) -> Int16[Tensor, "count rows"]:
    """How often each row is drawn, in `count` draws of as many rows with replacement; two bytes a number."""
    draw, even = generator(seed, "bootstrap", role), np.full(rows, 1 / rows)
    counts = np.empty((count, rows), np.int16)
    for line in counts:
        line[:] = draw.multinomial(rows, even)
    return torch.from_numpy(counts)


def mean_interval(values: Float[Tensor, " rows"], seed: int = 0) -> Interval:
    """The mean of independent values, with a bootstrap over them."""
    values = values.double().cpu()
    means = [(line.double() @ values).item() / len(values) for line in resamples(len(values), REPLICATES, seed, "mean")]
    return Interval.of(values.mean().item(), means)
