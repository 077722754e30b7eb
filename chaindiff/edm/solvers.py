"""Solvers of the probability-flow ODE and its stochastic relatives, as generators over steps.

They know no networks, chains or files: a denoiser, a state and a path go in, states come out. A yielded state is valid
until the next step. One step moves every variable whose level moves, by

    dx/dt = (sigma'/sigma + s'/s) x - (sigma' s / sigma) D(x / s; sigma)        (EDM, eq. 81 and algorithm 1)

which for s = 1 and sigma = t is d = (x - D) / sigma.

At level 0 the slope is not defined. A variable that lands there takes one Euler step from the level before, for itself
alone. A variable that leaves 0, which happens in inversion, takes that step backwards: an Euler step with the slope at
the level that it goes to, where the clean value stands for the noisy one. Landing undoes leaving up to the second order
in the size of that step, so that inversion and then sampling return the data on one and the same path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from chaindiff.edm.denoiser import Denoiser, State, round_level
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
    eta: float = 0.0,
    noise: Noise | None = None,
) -> Iterator[State]:
    """Integrate along the path; yields the state s x after every step.

    `x` holds each variable's value, scale included, at the path's first level. `noise` is needed only where `churn`, or
    `eta` in ddim and dpmpp_2m, adds some: eta 0 is deterministic, eta 1 is ancestral sampling and DPM-Solver++(2M) SDE.
    Raises ValueError for combinations without meaning.
    """
    stochastic = bool(eta or (churn and churn.amount))
    if stochastic and noise is None:
        raise ValueError(f"{'eta' if eta else 'churn'} needs a source of noise")
    if stochastic and path.rising:
        raise ValueError("a path upwards is followed deterministically: it takes neither churn nor eta")
    if eta and churn and churn.amount:
        raise ValueError("churn and eta both add noise to a step; choose one")
    if eta and solver in ("euler", "heun"):
        raise ValueError(f"eta is for ddim and dpmpp_2m; {solver} takes its noise from churn")
    return SOLVERS[solver](denoiser, dict(x), path, churn or Churn(), eta, noise)


def invert(denoiser: Denoiser, x: State, path: Path, *, solver: str = "heun") -> Iterator[State]:
    """From data up to noise, on the path that `solve` goes down; yields the state after every step.

    `x` holds values at the path's last level. `solve` from the last state returns them, to the solver's accuracy.
    """
    return solve(denoiser, x, path.reversed(), solver=solver)


# ---------------------------------------------------------------- parts of a step


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


def _churned(
    denoiser: Denoiser, x: State, t: Times, path: Path, step: int, churn: Churn, noise: Noise | None
) -> tuple[State, Times]:
    """Raise the level of every moving variable from sigma to (1 + gamma) sigma by fresh noise."""
    for v in path.moves(step):
        schedule, sigma = path.schedules[v], path.schedules[v].sigma(t[v])
        gamma = churn.gamma(sigma, path.steps)
        if not gamma:
            continue
        assert noise is not None
        level = round_level(denoiser, sigma * (1 + gamma))
        raised = schedule.time(level)
        added = math.sqrt(max(level**2 - sigma**2, 0)) * schedule.scale(raised) * churn.noise
        ratio = schedule.scale(raised) / schedule.scale(t[v])
        x, t = {**x, v: x[v] * ratio + added * noise(v, step)}, {**t, v: raised}
    return x, t


def _lifted(x: State, t: Times, path: Path, step: int) -> tuple[State, Times]:
    """A variable about to leave level 0, where slopes are not defined, as if it were at the level that it goes to."""
    for v in path.moves(step):
        schedule, after = path.schedules[v], float(path.times[v][step + 1])
        if schedule.sigma(t[v]) == 0:
            x, t = {**x, v: x[v] * (schedule.scale(after) / schedule.scale(t[v]))}, {**t, v: after}
    return x, t


# ---------------------------------------------------------------- solvers


def _runge_kutta(
    denoiser: Denoiser, x: State, path: Path, churn: Churn, eta: float, noise: Noise | None, *, correct: bool
) -> Iterator[State]:
    """Euler's method, or Heun's (EDM, algorithms 1 and 2)."""
    for step in range(path.steps):
        after, moves = path.time(step + 1), path.moves(step)
        if moves:
            x, t = _churned(denoiser, x, path.time(step), path, step, churn, noise)
            seen, at = _lifted(x, t, path, step)
            clean = _denoise(denoiser, seen, at, path)
            slope = {v: _slope(seen[v], clean[v], v, at[v], path) for v in moves}
            there = {**x, **{v: x[v] + (after[v] - t[v]) * slope[v] for v in moves}}
            corrected = path.corrects(step) if correct else []
            if corrected:
                clean = _denoise(denoiser, there, after, path)
                for v in corrected:
                    second = _slope(there[v], clean[v], v, after[v], path)
                    there[v] = x[v] + (after[v] - t[v]) * (slope[v] + second) / 2
            x = there
        yield x


def _exponential(
    denoiser: Denoiser, x: State, path: Path, churn: Churn, eta: float, noise: Noise | None, *, multistep: bool
) -> Iterator[State]:
    """DDIM with eta (Song et al. 2021a, eq. 12 and 16), or DPM-Solver++(2M) and its SDE (Lu et al. 2022b, algorithm 2).

    Both are exact in lambda = -ln sigma, on x / s, where D is constant (ddim) or linear (dpmpp_2m). With r = sigma' /
    sigma of a step, `keep` is the part of the new level that is old noise:

        x' = r keep x + (1 - r keep) D + sigma' sqrt(1 - keep^2) noise
    """
    history: dict[str, tuple[float, Tensor]] = {}  # last step length in lambda, and last prediction
    moved: list[str] = []
    for step in range(path.steps):
        after, moves = path.time(step + 1), path.moves(step)
        if moves != moved:  # a kink of the path: predictions on its other side say nothing of this one
            history, moved = {}, moves
        if moves:
            x, t = _churned(denoiser, x, path.time(step), path, step, churn, noise)
            seen, at = _lifted(x, t, path, step)
            clean = _denoise(denoiser, seen, at, path)
            x = dict(x)
            for v in moves:
                schedule = path.schedules[v]
                sigma, target, scale = schedule.sigma(t[v]), schedule.sigma(after[v]), schedule.scale(after[v])
                if target == 0:
                    x[v] = clean[v] * scale
                elif sigma == 0:
                    x[v] = 2 * seen[v] - clean[v] * scale
                else:
                    ratio, h, guess = target / sigma, math.log(sigma / target), clean[v]
                    if v in history and t[v] == path.times[v][step]:  # a level that was raised has no usable past
                        last, before = history[v]
                        guess = guess + (guess - before) * (h / (2 * last))
                    keep = ratio**eta if multistep else math.sqrt(1 - eta**2 * (1 - ratio**2)) if eta else 1.0
                    x[v] = scale * (ratio * keep / schedule.scale(t[v]) * x[v] + (1 - ratio * keep) * guess)
                    if keep != 1:
                        assert noise is not None
                        x[v] = x[v] + scale * target * math.sqrt(1 - keep**2) * noise(v, step)
                    if multistep:
                        history[v] = (h, clean[v])
        yield x


SOLVERS: dict[str, Callable[..., Iterator[State]]] = {
    "euler": partial(_runge_kutta, correct=False),
    "heun": partial(_runge_kutta, correct=True),
    "ddim": partial(_exponential, multistep=False),
    "dpmpp_2m": partial(_exponential, multistep=True),
}
SECOND_ORDER = {name: name == "heun" for name in SOLVERS}  # whether a step evaluates the denoiser twice
