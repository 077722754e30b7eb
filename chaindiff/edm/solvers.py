"""Solvers of the probability-flow ODE and its stochastic relatives, as generators over steps.

They know no networks, chains or files: a denoiser, a state and a path go in, states come out. A yielded state is valid
until the next step. One step moves every variable whose level moves, by

    dx/dt = (sigma'/sigma + s'/s) x - (sigma' s / sigma) D(x / s; sigma)        (EDM, eq. 81 and algorithm 1)

which for s = 1 and sigma = t is d = (x - D) / sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from chaindiff.edm.denoiser import Denoiser, State
from chaindiff.edm.levels import Path

# noise(variable, number) -> unit noise of the variable's shape; the number is the step that uses it.
Noise = Callable[[str, int], Tensor]
Times = dict[str, float]


@dataclass(frozen=True)
class Churn:
    """Noise added before every step (EDM, algorithm 2): S_churn, S_min, S_max, S_noise."""

    amount: float = 0.0
    min: float = 0.0
    max: float = math.inf
    noise: float = 1.0

    def gamma(self, sigma: float, steps: int) -> float:
        return min(self.amount / steps, math.sqrt(2) - 1) if self.min <= sigma <= self.max else 0.0


def solve(
    denoiser: Denoiser,
    x: State,
    path: Path,
    *,
    solver: str = "heun",
    churn: Churn | None = None,
    noise: Noise | None = None,
) -> Iterator[State]:
    """Integrate down the path; yields the state after every step.

    `x` holds each variable's value at the path's first level. `noise` is needed only where `churn` adds some.
    """
    if churn and churn.amount and noise is None:
        raise ValueError("churn needs a source of noise")
    return SOLVERS[solver](denoiser, dict(x), path, churn or Churn(), noise)


def _denoise(denoiser: Denoiser, x: State, t: Times, path: Path) -> State:
    scale = {v: path.schedules[v].scale(t[v]) for v in x}
    sigma = {v: path.schedules[v].sigma(t[v]) for v in x}
    clean = denoiser({v: x[v] / scale[v] if scale[v] != 1 else x[v] for v in x}, sigma).x0
    return {v: clean[v].to(x[v].dtype) for v in clean}


def _slope(x: Tensor, clean: Tensor, v: str, t: float, path: Path) -> Tensor:
    schedule = path.schedules[v]
    sigma, scale = schedule.sigma(t), schedule.scale(t)
    rate = schedule.dsigma(t) / sigma
    return (rate + schedule.dscale(t) / scale) * x - rate * scale * clean


def _churned(x: State, t: Times, path: Path, step: int, churn: Churn, noise: Noise | None) -> tuple[State, Times]:
    """Raise the level of every moving variable from sigma to (1 + gamma) sigma by fresh noise."""
    for v in path.moves(step):
        schedule, sigma = path.schedules[v], path.schedules[v].sigma(t[v])
        gamma = churn.gamma(sigma, path.steps)
        if not gamma:
            continue
        assert noise is not None
        raised = schedule.time(sigma * (1 + gamma))
        added = math.sqrt(schedule.sigma(raised) ** 2 - sigma**2) * schedule.scale(raised) * churn.noise
        ratio = schedule.scale(raised) / schedule.scale(t[v])
        x, t = {**x, v: x[v] * ratio + added * noise(v, step)}, {**t, v: raised}
    return x, t


def _runge_kutta(
    denoiser: Denoiser, x: State, path: Path, churn: Churn, noise: Noise | None, correct: bool
) -> Iterator[State]:
    for step in range(path.steps):
        t = {v: float(times[step]) for v, times in path.times.items()}
        after = {v: float(times[step + 1]) for v, times in path.times.items()}
        moves = path.moves(step)
        x, t = _churned(x, t, path, step, churn, noise)
        clean = _denoise(denoiser, x, t, path)
        slope = {v: _slope(x[v], clean[v], v, t[v], path) for v in moves}
        there = {**x, **{v: x[v] + (after[v] - t[v]) * slope[v] for v in moves}}
        # At level 0 the slope is not defined: a variable that lands there keeps its Euler step.
        corrected = [v for v in moves if path.schedules[v].sigma(after[v]) > 0] if correct else []
        if corrected:
            clean = _denoise(denoiser, there, after, path)
            for v in corrected:
                second = _slope(there[v], clean[v], v, after[v], path)
                there[v] = x[v] + (after[v] - t[v]) * (slope[v] + second) / 2
        x = there
        yield x


def _euler(denoiser: Denoiser, x: State, path: Path, churn: Churn, noise: Noise | None) -> Iterator[State]:
    return _runge_kutta(denoiser, x, path, churn, noise, correct=False)


def _heun(denoiser: Denoiser, x: State, path: Path, churn: Churn, noise: Noise | None) -> Iterator[State]:
    return _runge_kutta(denoiser, x, path, churn, noise, correct=True)


def _dpmpp_2m(denoiser: Denoiser, x: State, path: Path, churn: Churn, noise: Noise | None) -> Iterator[State]:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2), in lambda = -ln sigma on x / s."""
    history: dict[str, tuple[float, Tensor]] = {}  # last step length in lambda, and last prediction
    for step in range(path.steps):
        t = {v: float(times[step]) for v, times in path.times.items()}
        moves, raised = path.moves(step), dict(t)
        x, raised = _churned(x, raised, path, step, churn, noise)
        clean = _denoise(denoiser, x, raised, path)
        x = dict(x)
        # A variable that rests, or whose level was raised, has no usable past.
        history = {v: past for v, past in history.items() if v in moves and raised[v] == t[v]}
        for v in moves:
            schedule, after = path.schedules[v], float(path.times[v][step + 1])
            sigma, target = schedule.sigma(raised[v]), schedule.sigma(after)
            if target == 0:
                x[v] = clean[v] * schedule.scale(after)
                continue
            h = math.log(sigma / target)
            guess = clean[v]
            if v in history:
                last, before = history[v]
                guess = clean[v] + (clean[v] - before) * (h / (2 * last))
            ratio = target / sigma
            x[v] = schedule.scale(after) * (ratio * x[v] / schedule.scale(raised[v]) + (1 - ratio) * guess)
            history[v] = (h, clean[v])
        yield x


SOLVERS = {"euler": _euler, "heun": _heun, "dpmpp_2m": _dpmpp_2m}
SECOND_ORDER = {"euler": False, "heun": True, "dpmpp_2m": False}  # whether a step evaluates the denoiser twice
