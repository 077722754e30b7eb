"""Solvers of the probability-flow ODE and its stochastic relatives: tables of affine updates, and one loop.

A state x holds for every variable the clean value plus sigma times unit noise; the scale s of a schedule is not part
of it. Every solver on every path is then a table, computed on the host in float64 before sampling, whose rows read

    x' = a x + k x_kept + b D + c D_before + d noise

for each variable that moves. `D` is the denoiser at the row's levels, `D_before` its value at the previous evaluation,
`x_kept` the state before the previous row. The network evaluations of a sample are the rows that have levels.

The coefficients follow from the equation of s x (EDM, eq. 81 and algorithm 1),

    d(s x)/dt = (sigma'/sigma + s'/s) s x - (sigma' s / sigma) D(x; sigma)

which for s = 1 and sigma = t is dx/dt = (x - D) / sigma.

At level 0 the slope is undefined. A variable that lands there takes a single Euler step from the previous
level. A variable that leaves 0, which happens in inversion, takes that step backwards: an Euler step with the slope at
the level that it goes to, where the clean value stands for the noisy one. Landing undoes leaving up to second order
in the size of that step, so that inversion followed by sampling on the same path returns the data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from chaindiff.edm.denoiser import Denoiser, State
from chaindiff.edm.levels import Path
from chaindiff.kernels.sums import weighted_sum

# noise(variable, number) -> unit noise of the variable's shape; the number is that of the step that uses it.
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


@dataclass(frozen=True)
class Row:
    """The coefficients of one variable: x' = x x + kept x_kept + clean D + before D_before + noise z."""

    x: float = 0.0
    kept: float = 0.0
    clean: float = 0.0
    before: float = 0.0
    noise: float = 0.0

    def __call__(self, x: Tensor, kept: Tensor, clean: Tensor, before: Tensor, noise: Tensor) -> Tensor:
        """x', in the type of x."""
        terms = ((self.x, x), (self.kept, kept), (self.clean, clean), (self.before, before), (self.noise, noise))
        used = [(weight, value) for weight, value in terms if weight] or [(0.0, x)]
        return weighted_sum(*used, dtype=x.dtype)


@dataclass(frozen=True)
class Update:
    """One row of a solver's table; variables without coefficients do not change.

    `sigma`: the levels at which the denoiser is evaluated first; None: it is not. `step`: the index of its step on the
    path, which keys its noise. `ends`: the step is complete, and the state is at `level`.
    """

    rows: Mapping[str, Row]
    step: int
    sigma: Mapping[str, float] | None = None
    ends: bool = False
    level: Mapping[str, float] = field(default_factory=dict)


class Step(dict[str, Tensor]):
    """The state after a step, `number` of `total`: its levels, and the last prediction of the clean values."""

    def __init__(self, x: State, sigma: Mapping[str, float], x0: State, number: int, total: int):
        super().__init__(x)
        self.sigma, self.x0, self.number, self.total = sigma, x0, number, total


def integrate(denoiser: Denoiser, x: State, table: Sequence[Update], noise: Noise | None = None) -> Iterator[Step]:
    """Follow a solver's table from the state `x`; yields after every step, without waiting for the device."""
    kept = clean = before = x  # placeholders: the first rows have no coefficients for them
    for row in table:
        with torch.no_grad():
            if row.sigma is not None:
                before, clean = clean, denoiser(x, row.sigma).x0
            moved = {}
            for v, take in row.rows.items():
                fresh = noise(v, row.step) if noise is not None and take.noise else x[v]
                moved[v] = take(x[v], kept[v], clean[v], before[v], fresh)
            kept, x = x, {**x, **moved}
        if row.ends:
            yield Step(x, row.level, clean, row.step + 1, table[-1].step + 1)


def evaluations(table: Sequence[Update], denoiser: Denoiser | None = None) -> int:
    """NFE of a table: evaluations of the denoiser, times what each costs (guidance counts every term)."""
    levels = [row.sigma for row in table if row.sigma is not None]
    return len(levels) if denoiser is None else sum(denoiser.evaluations(sigma) for sigma in levels)


# ---------------------------------------------------------------- tables


def updates(
    path: Path,
    solver: str = "heun",
    *,
    churn: Churn | None = None,
    eta: float = 0.0,
    round: Callable[[float], float] = lambda sigma: sigma,
) -> list[Update]:
    """The table of a solver on a path. `round` gives the nearest level that the denoiser accepts, for churn.

    eta 0 is deterministic, eta 1 is ancestral sampling (ddim) and DPM-Solver++(2M) SDE (dpmpp_2m).
    Raises ValueError for meaningless combinations.
    """
    if solver not in SOLVERS:
        raise ValueError(f"no solver is called '{solver}'; known: {', '.join(SOLVERS)}")
    churn = churn or Churn()
    if (eta or churn.amount) and path.rising:
        raise ValueError("inversion is deterministic: it takes neither churn nor eta")
    if eta and churn.amount:
        raise ValueError("churn and eta both add noise to a step; choose one")
    if eta and solver in ("euler", "heun"):
        raise ValueError(f"eta is for ddim and dpmpp_2m; {solver} takes its noise from churn")
    table: list[Update] = []
    history: dict[str, float] = {}
    moved: list[str] = []
    for number in range(path.steps):
        moves = path.moves(number)
        if moves != moved:  # a kink of the path: predictions before it do not apply after it
            history, moved = {}, moves
        rows: list[Update] = []
        if moves:
            raised, at = _raised(path, number, churn, round)
            rows = [Update(raised, number)] if raised else []
            rows += SOLVERS[solver](_Span(path, number, moves, at, eta, history))
        rows = rows or [Update({}, number)]
        table += [*rows[:-1], Update(rows[-1].rows, number, rows[-1].sigma, True, path.sigma(number + 1))]
    return table


def _raised(path: Path, number: int, churn: Churn, round: Callable[[float], float]) -> tuple[dict[str, Row], Times]:
    """Fresh noise that raises every moving variable from sigma to (1 + gamma) sigma, and the times that follow."""
    rows, times = {}, path.time(number)
    for v in path.moves(number):
        sigma = path.schedules[v].sigma(times[v])
        if gamma := churn.gamma(sigma, path.steps):
            level = round(sigma * (1 + gamma))
            rows[v] = Row(x=1.0, noise=math.sqrt(max(level**2 - sigma**2, 0)) * churn.noise)
            times[v] = path.schedules[v].time(level)
    return rows, times


@dataclass(frozen=True)
class _Span:
    """One step of a path: the variables that move from their times `at`, which churn may have raised."""

    path: Path
    number: int
    moves: list[str]
    at: Times
    eta: float
    history: dict[str, float]  # each variable's last step in ln sigma, while it can be used

    @property
    def after(self) -> Times:
        return self.path.time(self.number + 1)

    def sigma(self, v: str, t: float) -> float:
        return self.path.schedules[v].sigma(t)

    def scale(self, v: str, t: float) -> float:
        return self.path.schedules[v].scale(t)

    @property
    def seen(self) -> Times:
        """The levels of the evaluation: a variable that leaves level 0 is evaluated at the level that it goes to."""
        leaving = {v: self.after[v] for v in self.moves if self.sigma(v, self.at[v]) == 0}
        return {**self.at, **leaving}

    def levels(self, times: Times) -> dict[str, float]:
        return {v: self.sigma(v, t) for v, t in times.items()}

    def slope(self, v: str, t: float) -> tuple[float, float]:
        """(p, q) of d(s x)/dt = p (s x) - q D at time t."""
        schedule = self.path.schedules[v]
        sigma, scale = schedule.sigma(t), schedule.scale(t)
        rate = schedule.dsigma(t) / sigma
        return rate + schedule.dscale(t) / scale, rate * scale


def _euler(span: _Span) -> list[Update]:
    """Euler's method (EDM, algorithm 1 without its correction)."""
    rows = {}
    for v in span.moves:
        seen, after = span.seen[v], span.after[v]
        (p, q), h, scale = span.slope(v, seen), after - span.at[v], span.scale(v, after)
        rows[v] = Row(x=(span.scale(v, span.at[v]) + h * p * span.scale(v, seen)) / scale, clean=-h * q / scale)
    return [Update(rows, span.number, span.levels(span.seen))]


def _heun(span: _Span) -> list[Update]:
    """Heun's method (EDM, algorithms 1 and 2): variables that neither land on 0 nor leave it are corrected."""
    first, rows, after = _euler(span), {}, span.after
    for v in span.moves:
        if span.sigma(v, after[v]) > 0 and span.path.sigma(span.number)[v] > 0:
            (p, q), (p2, q2) = span.slope(v, span.at[v]), span.slope(v, after[v])
            half, here, there = (after[v] - span.at[v]) / 2, span.scale(v, span.at[v]), span.scale(v, after[v])
            kept = here * (1 + half * p) / there
            rows[v] = Row(half * p2, kept=kept, clean=-half * q2 / there, before=-half * q / there)
    return [*first, Update(rows, span.number, span.levels(after))] if rows else first


def _exponential(span: _Span, *, multistep: bool) -> list[Update]:
    """Solves the ODE in ln sigma in closed form for constant D, and for linear D as a multistep method.

    With r = sigma' / sigma of a step, `keep` is the part of the new level that is old noise:

    x' = r keep x + (1 - r keep) D + sigma' sqrt(1 - keep^2) noise
    """
    rows = {}
    for v in span.moves:
        sigma, target = span.sigma(v, span.at[v]), span.sigma(v, span.after[v])
        if target == 0:
            rows[v] = Row(clean=1.0)
        elif sigma == 0:
            rows[v] = Row(x=2.0, clean=-1.0)
        else:
            ratio, h, past = target / sigma, math.log(sigma / target), 0.0
            if multistep:
                if v in span.history and span.at[v] == span.path.time(span.number)[v]:  # not after churn
                    past = h / (2 * span.history[v])
                span.history[v] = h
            keep = ratio**span.eta if multistep else math.sqrt(1 - span.eta**2 * (1 - ratio**2))
            share = 1 - ratio * keep
            noise = target * math.sqrt(max(1 - keep**2, 0.0))
            rows[v] = Row(ratio * keep, clean=share * (1 + past), before=-share * past, noise=noise)
    return [Update(rows, span.number, span.levels(span.seen))]


SOLVERS: dict[str, Callable[[_Span], list[Update]]] = {
    "euler": _euler,
    "heun": _heun,
    "ddim": partial(_exponential, multistep=False),  # with eta (Song et al. 2021a, eq. 12 and 16)
    "dpmpp_2m": partial(_exponential, multistep=True),  # DPM-Solver++(2M) and its SDE (Lu et al. 2022b, algorithm 2)
}


# ---------------------------------------------------------------- solving


def solve(
    denoiser: Denoiser,
    x: State,
    path: Path,
    *,
    solver: str = "heun",
    churn: Churn | None = None,
    eta: float = 0.0,
    noise: Noise | None = None,
) -> Iterator[Step]:
    """`integrate` the table of a solver on a path; `x` holds each variable at the path's first level.

    Raises ValueError for meaningless combinations, and where `churn` or `eta` adds noise but none is given.
    """
    table = updates(path, solver, churn=churn, eta=eta)
    if noise is None and (eta or (churn is not None and churn.amount)):
        raise ValueError(f"{'eta' if eta else 'churn'} needs a source of noise")
    return integrate(denoiser, x, table, noise)


def invert(denoiser: Denoiser, x: State, path: Path, *, solver: str = "heun") -> Iterator[Step]:
    """From data up to noise, on the path of `solve` in reverse; `x` holds values at the path's last level.

    `solve` from the last state returns them, to the solver's accuracy.
    """
    return solve(denoiser, x, path.reversed(), solver=solver)
