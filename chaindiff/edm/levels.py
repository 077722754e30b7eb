"""Noise levels: schedules sigma(t) and s(t), grids of steps, and paths on which several variables' levels go down.

All of this is float64 on the host: nothing in the sampling loop waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64

Grid = Sequence[float] | np.ndarray  # levels or times of one variable, largest first


@runtime_checkable
class Schedule(Protocol):
    """sigma(t), scale s(t) and their derivatives; x(t) = s(t) (clean + sigma(t) noise) (EDM, section 2)."""

    def sigma(self, t: float) -> float: ...
    def scale(self, t: float) -> float: ...
    def dsigma(self, t: float) -> float: ...
    def dscale(self, t: float) -> float: ...
    def time(self, sigma: float) -> float: ...


class Linear:
    """EDM's own choice: sigma(t) = t, s(t) = 1, so that a step in t is a step in sigma."""

    def sigma(self, t: float) -> float:
        return t

    def scale(self, t: float) -> float:
        return 1.0

    def dsigma(self, t: float) -> float:
        return 1.0

    def dscale(self, t: float) -> float:
        return 0.0

    def time(self, sigma: float) -> float:
        return sigma


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float) -> Float64[np.ndarray, " steps1"]:
    """EDM's time steps, largest first, then 0 (eq. 5): steps + 1 levels."""
    if steps == 1:
        return np.array([sigma_max, 0.0])
    ramp = np.arange(steps) / (steps - 1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return np.append((high + ramp * (low - high)) ** rho, 0.0)


@dataclass(frozen=True)
class Path:
    """How the noise levels of several variables go down together: each variable's times at every grid point.

    `times[v]` has steps + 1 entries and never rises. A variable rests where two entries are equal. Because a path is
    its grid, every kink is a grid point.
    """

    times: Mapping[str, Float64[np.ndarray, " steps1"]]
    schedules: Mapping[str, Schedule]

    def __post_init__(self) -> None:
        lengths = {name: len(times) for name, times in self.times.items()}
        if len(set(lengths.values())) != 1 or min(lengths.values()) < 2:
            raise ValueError(f"every variable of a path needs the same number of times, at least 2: {lengths}")
        for name, times in self.times.items():
            if np.any(np.diff(times) > 0) or times[-1] < 0:
                raise ValueError(f"the times of '{name}' must never rise and must end at 0 or above")

    @property
    def steps(self) -> int:
        return len(next(iter(self.times.values()))) - 1

    def sigma(self, step: int) -> dict[str, float]:
        return {v: self.schedules[v].sigma(float(times[step])) for v, times in self.times.items()}

    def moves(self, step: int) -> list[str]:
        """The variables whose level changes from this grid point to the next."""
        return [v for v, times in self.times.items() if times[step + 1] != times[step]]

    def evaluations(self, second_order: bool) -> int:
        """NFE of one pass: one a step, and one more where a second-order step corrects a variable short of 0."""
        corrections = sum(any(self.times[v][i + 1] > 0 for v in self.moves(i)) for i in range(self.steps))
        return self.steps + (corrections if second_order else 0)


def together(sigmas: Mapping[str, Grid]) -> Path:
    """All levels go down at once, each on its own grid of the same length (a diagonal path)."""
    return Path({v: np.asarray(s, np.float64) for v, s in sigmas.items()}, {v: Linear() for v in sigmas})


def staggered(sigmas: Mapping[str, Grid], offset: float = 1.0) -> Path:
    """Each variable starts `offset` of a pass after the one before: 0 is together, 1 is one after the other.

    Semantic-first diffusion (arXiv 2512.04926) uses 0.3. The grids must have equal length.
    """
    names, steps = list(sigmas), len(next(iter(sigmas.values()))) - 1
    shift = round(offset * steps)
    total = steps + shift * (len(names) - 1)
    where = {v: np.clip(np.arange(total + 1) - shift * i, 0, steps) for i, v in enumerate(names)}
    return Path({v: np.asarray(sigmas[v], np.float64)[where[v]] for v in names}, {v: Linear() for v in names})
