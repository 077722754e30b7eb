"""Noise levels while sampling: grids of steps, and paths on which several variables' levels go down together.

All of this is float64 on the host: the sampling loop never waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from chaindiff.edm.schedules import VP, Linear, Schedule, iddpm_levels

Grid = Sequence[float] | np.ndarray  # levels of one variable, in descending order


# ---------------------------------------------------------------- grids: steps + 1 levels, largest first, then 0


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float) -> Float64[np.ndarray, " steps1"]:
    """EDM's time steps, largest first, then 0 (eq. 5): steps + 1 levels."""
    if steps == 1:
        return np.array([sigma_max, 0.0])
    ramp = np.arange(steps) / (steps - 1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return np.append((high + ramp * (low - high)) ** rho, 0.0)


def geometric_sigmas(steps: int, sigma_min: float, sigma_max: float) -> Float64[np.ndarray, " steps1"]:
    """Even steps in ln sigma, as published with VE (EDM, table 1), and so in log-SNR."""
    return np.append(np.geomspace(sigma_max, sigma_min, steps), 0.0)


def even_sigmas(steps: int, sigma_min: float, sigma_max: float, schedule: Schedule) -> Float64[np.ndarray, " steps1"]:
    """Even steps in a schedule's time; with VP's own schedule as published with VP (EDM, table 1)."""
    times = np.linspace(schedule.time(sigma_max), schedule.time(sigma_min), steps)
    return np.array([*(schedule.sigma(float(t)) for t in times), 0.0])


def iddpm_sigmas(steps: int, sigma_min: float, sigma_max: float) -> Float64[np.ndarray, " steps1"]:
    """Even steps over iDDPM's discrete levels within the range (EDM, table 1, as its general sampler selects them).

    Raises ValueError if there are fewer such levels than steps.
    """
    levels = iddpm_levels()
    levels = levels[(levels >= sigma_min) & (levels <= sigma_max)]
    if len(levels) < steps:
        raise ValueError(f"{steps} steps, but iDDPM has {len(levels)} levels from {sigma_min:g} to {sigma_max:g}")
    index = np.round((len(levels) - 1) / max(steps - 1, 1) * np.arange(steps)).astype(int)
    return np.append(levels[index], 0.0)


def grid(
    discretisation: str, steps: int, sigma_min: float, sigma_max: float, rho: float, schedule: Schedule
) -> Float64[np.ndarray, " steps1"]:
    """The levels of a discretisation that a recipe may name; `time` is even in the time of `schedule`."""
    match discretisation:
        case "edm":
            return karras_sigmas(steps, sigma_min, sigma_max, rho)
        case "vp":
            return even_sigmas(steps, sigma_min, sigma_max, VP.between(sigma_min, sigma_max))
        case "ve":
            return geometric_sigmas(steps, sigma_min, sigma_max)
        case "iddpm":
            return iddpm_sigmas(steps, sigma_min, sigma_max)
        case "time":
            return even_sigmas(steps, sigma_min, sigma_max, schedule)
    raise ValueError(f"no discretisation is called '{discretisation}'")


# ---------------------------------------------------------------- paths


@dataclass(frozen=True)
class Path:
    """How the noise levels of several variables go down together: each variable's times at every grid point.

    `times[v]` has steps + 1 entries and never rises, or, on a reversed path, none ever falls. A variable is held
    where two entries are equal. Every kink of a path is a grid point.
    """

    times: Mapping[str, Float64[np.ndarray, " steps1"]]
    schedules: Mapping[str, Schedule]

    def __post_init__(self) -> None:
        lengths = {name: len(times) for name, times in self.times.items()}
        if len(set(lengths.values())) != 1 or min(lengths.values()) < 2:
            raise ValueError(f"every variable of a path needs the same number of times, at least 2: {lengths}")
        for name, times in self.times.items():
            if np.any(np.diff(times) * (-1 if self.rising else 1) > 0):
                raise ValueError(
                    f"the times of '{name}' must never {'fall, if others rise' if self.rising else 'rise'}"
                )
            if self.schedules[name].sigma(float(times.min())) < 0:
                raise ValueError(f"the levels of '{name}' must be at 0 or above")

    @property
    def rising(self) -> bool:
        """Whether the levels go up, from data to noise."""
        return any(times[-1] > times[0] for times in self.times.values())

    @property
    def steps(self) -> int:
        return len(next(iter(self.times.values()))) - 1

    def time(self, step: int) -> dict[str, float]:
        return {v: float(times[step]) for v, times in self.times.items()}

    def sigma(self, step: int) -> dict[str, float]:
        return {v: self.schedules[v].sigma(t) for v, t in self.time(step).items()}

    def moves(self, step: int) -> list[str]:
        """The variables whose level changes from this grid point to the next."""
        return [v for v, times in self.times.items() if times[step + 1] != times[step]]

    def reversed(self) -> Path:
        """The same levels in reverse, for inversion."""
        return Path({v: times[::-1] for v, times in self.times.items()}, self.schedules)


def _timed(sigmas: Grid, schedule: Schedule) -> Float64[np.ndarray, " steps1"]:
    return np.array([schedule.time(float(sigma)) for sigma in sigmas], np.float64)


def together(sigmas: Mapping[str, Grid], schedules: Mapping[str, Schedule] | None = None) -> Path:
    """All levels go down at once, each on its own grid of the same length (a diagonal path).

    `schedules` are Linear, where a step in time is one in sigma, unless given.
    """
    chosen = {v: (schedules or {}).get(v, Linear()) for v in sigmas}
    return Path({v: _timed(s, chosen[v]) for v, s in sigmas.items()}, chosen)


def staggered(sigmas: Mapping[str, Grid], offset: float = 1.0, schedules: Mapping[str, Schedule] | None = None) -> Path:
    """Each variable starts `offset` of a pass after the one before: 0 is together, 1 is one after the other.

    Semantic-first diffusion (arXiv 2512.04926) uses 0.3. A pass has as many steps as its variable's grid.
    """
    chosen = {v: (schedules or {}).get(v, Linear()) for v in sigmas}
    steps, begin, start = {v: len(grid) - 1 for v, grid in sigmas.items()}, 0, {}
    for v in sigmas:
        start[v], begin = begin, begin + round(offset * steps[v])
    count = np.arange(max(start[v] + steps[v] for v in sigmas) + 1)
    return Path({v: _timed(s, chosen[v])[np.clip(count - start[v], 0, steps[v])] for v, s in sigmas.items()}, chosen)
