"""Path families: which noise levels of several variables training draws together, and sampling goes through.

A variable's pass goes from pure noise, progress 0, to its clean value, progress 1; a `Ruler` says which level lies
where. On a path, the progress of every variable is a function of the progress of the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from chaindiff.edm.levels import Path
from chaindiff.edm.noise import TrainingNoise
from chaindiff.edm.random import Draws
from chaindiff.edm.schedules import Linear, Schedule, schedule

Curve = Sequence[tuple[float, float]]  # points (progress of the path, progress of the variable), from (0, 0) to (1, 1)
NEAR = 0.1  # in progress: levels this near to a path count as drawn along it


@dataclass(frozen=True)
class Ruler:
    """Progress of a level, even in EDM's time steps (eq. 5), or in the time of a schedule; above `high` there is none.

    The lowest level of `edm` and `logsnr` is `low`; from there the clean value, level 0, is one step away.
    """

    time: str = "edm"
    low: float = 0.002
    high: float = 80.0
    rho: float = 7.0

    def _even(self, sigma: Tensor) -> Tensor:
        """The quantity in which progress is even; falls with progress."""
        match self.time:
            case "edm":
                return sigma ** (1 / self.rho)
            case "logsnr":
                return sigma.log()
        return schedule(self.time, self.low, self.high).time(sigma)  # type: ignore[arg-type, return-value]

    @property
    def _ends(self) -> tuple[float, float]:
        """The even quantity at progress 0 and at progress 1."""
        if self.time in ("edm", "logsnr"):
            high, low = self._even(torch.tensor([self.high, self.low], dtype=torch.float64)).tolist()
            return high, low
        return 1.0, 0.0  # times of a schedule: pure noise lies at infinity, cut at `high`

    def progress(self, sigma: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """From 0, at `high`, to 1."""
        first, last = self._ends
        reached = (first - self._even(sigma.double().clamp_min(1e-12))) / (first - last)
        return torch.where(sigma >= self.high, 0.0, reached.clamp(0, 1)).to(sigma.dtype)

    def sigma(self, progress: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """The level at this progress: `high` at 0, and 0 at 1."""
        first, last = self._ends
        even = first + progress.double() * (last - first)
        match self.time:
            case "edm":
                level = even**self.rho
            case "logsnr":
                level = even.exp()
            case _:
                inner = even.clamp(1e-9, 1 - 1e-9)
                level = schedule(self.time, self.low, self.high).sigma(inner)  # type: ignore[arg-type]
        level = torch.where(progress >= 1, 0.0, torch.as_tensor(level).clamp(max=self.high))
        return level.to(progress.dtype)


def follow(curve: Curve, progress: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """A variable's progress along a curve: linear between its points."""
    total = torch.zeros_like(progress)
    for (x, y), (end, top) in pairwise(curve):
        total = total + (progress - x).clamp(0, end - x) * ((top - y) / (end - x))
    return torch.where(progress >= curve[-1][0], 1.0, total)


def staggered_curves(names: Sequence[str], offset: float) -> dict[str, Curve]:
    """Every variable's pass starts `offset` of a pass after the one before: v_i = clip(total u - i offset, 0, 1).

    For two variables and 0.3 these are semantic-first diffusion's: min(1, 1.3 t) and max(0, 1.3 t - 0.3).
    """
    total = 1 + offset * (len(names) - 1)
    corners = {name: [(0.0, 0.0), (offset * i / total, 0.0), ((1 + offset * i) / total, 1.0), (1.0, 1.0)]
               for i, name in enumerate(names)}  # fmt: skip
    return {name: [p for p, q in pairwise([*points, (2.0, 1.0)]) if q[0] > p[0]] for name, points in corners.items()}


# ---------------------------------------------------------------- families


@dataclass(frozen=True)
class Drawn:
    """Levels of a batch by variable, [batch]; where their losses count; and which variables the network cannot see."""

    levels: dict[str, Float[Tensor, " batch"]]
    counted: dict[str, Bool[Tensor, " batch"]] = field(default_factory=dict)  # a variable that is missing: everywhere
    absent: dict[str, Bool[Tensor, " batch"]] = field(default_factory=dict)  # likewise: nowhere


@runtime_checkable
class Family(Protocol):
    """How training draws the levels of several variables, and which combinations of levels it so covers."""

    def draw(self, draws: Draws, noises: Mapping[str, TrainingNoise], pure: Mapping[str, float]) -> Drawn:
        """Levels for every sample; `noises` are the variables' own, `pure` their levels of pure noise."""
        ...

    def drew(self, levels: Mapping[str, float]) -> bool:
        """Whether training draws such levels, as nearly as a network can tell."""
        ...

    def known(self, names: Sequence[str]) -> set[frozenset[str]]:
        """The subsets of the variables, in their order, that training has at level 0 while others are noisy."""
        ...


@dataclass(frozen=True)
class Independent:
    """Every variable's level is drawn alone."""

    def draw(self, draws: Draws, noises: Mapping[str, TrainingNoise], pure: Mapping[str, float]) -> Drawn:
        return Drawn({v: noise(draws.of(v) if len(noises) > 1 else draws) for v, noise in noises.items()})

    def drew(self, levels: Mapping[str, float]) -> bool:
        return all(level > 0 for level in levels.values())

    def known(self, names: Sequence[str]) -> set[frozenset[str]]:
        return set()


@dataclass(frozen=True)
class Along:
    """One draw, the progress of the first variable's training noise, places every variable on its curve."""

    curves: Mapping[str, Curve]
    ruler: Ruler = Ruler()

    def draw(self, draws: Draws, noises: Mapping[str, TrainingNoise], pure: Mapping[str, float]) -> Drawn:
        whole = self.ruler.progress(next(iter(noises.values()))(draws.of("path")))
        levels = {v: self.ruler.sigma(follow(self.curves[v], whole)) for v in noises}
        return Drawn({v: level.clamp(max=pure[v]) for v, level in levels.items()})

    def drew(self, levels: Mapping[str, float]) -> bool:
        whole, far = torch.linspace(0, 1, 1001, dtype=torch.float64), torch.zeros(1001, dtype=torch.float64)
        for v, level in levels.items():
            here = self.ruler.progress(torch.tensor([level], dtype=torch.float64))
            far = torch.maximum(far, (follow(self.curves[v], whole) - here).abs())
        return bool(far.min() <= NEAR)

    def known(self, names: Sequence[str]) -> set[frozenset[str]]:
        ends = {v: min(x for x, y in self.curves[v] if y == 1) for v in names}
        return {frozenset(v for v in names if ends[v] <= end) for end in ends.values() if end < max(ends.values())}

    def path(self, names: Sequence[str], steps: int, schedules: Mapping[str, Schedule] | None = None) -> Path:
        """The curves as a path for sampling: even steps of the whole, and its kinks where a moving variable has one."""
        kinks = {x for v in names for x, _ in self.curves[v]}
        moving = [(min(x for (x, _), (_, y) in pairwise(self.curves[v]) if y > 0),
                   min(x for x, y in self.curves[v] if y == 1)) for v in names]  # fmt: skip
        first, last = min(begin for begin, _ in moving), max(end for _, end in moving)
        inside = {x for x in kinks if first < x < last}
        even = np.linspace(first, last, steps + 1)
        even = [x for x in even if all(abs(x - kink) > 0.25 * (last - first) / steps for kink in inside)]
        whole = torch.tensor(sorted({*even, *inside, first, last}), dtype=torch.float64)
        chosen = {v: (schedules or {}).get(v, Linear()) for v in names}
        levels = {v: self.ruler.sigma(follow(self.curves[v], whole)).tolist() for v in names}
        return Path({v: np.array([chosen[v].time(s) for s in levels[v]]) for v in names}, chosen)


@dataclass(frozen=True)
class Cascaded:
    """One variable is learned: those before it are finished, up to noise of times in (0, `finished`), those after it
    are pure noise (Latent Forcing, arXiv 2602.11401: 0.25)."""

    shares: Mapping[str, float]
    finished: float = 0.0

    def draw(self, draws: Draws, noises: Mapping[str, TrainingNoise], pure: Mapping[str, float]) -> Drawn:
        which = _chosen([self.shares.get(v, 1.0) for v in noises], draws.uniform("which"))
        levels, counted = {}, {}
        for place, (v, noise) in enumerate(noises.items()):
            own = draws.of(v)
            time = own.uniform("finished") * self.finished
            level = torch.where(which > place, time / (1 - time), noise(own))
            levels[v], counted[v] = level.masked_fill(which < place, pure[v]), which == place
        return Drawn(levels, counted)

    def drew(self, levels: Mapping[str, float]) -> bool:
        done = self.finished / (1 - self.finished) if self.finished < 1 else float("inf")
        ruler, values = Ruler(), [*levels.values()]
        begun = [float(ruler.progress(torch.tensor([level], dtype=torch.float64))) > NEAR for level in values]
        return any(
            all(level <= max(done, 1e-9) for level in values[:place]) and not any(begun[place + 1 :])
            for place in range(len(values))
        )

    def known(self, names: Sequence[str]) -> set[frozenset[str]]:
        return {frozenset(names[:count]) for count in range(1, len(names))}


def _chosen(shares: Sequence[float], uniform: Float[Tensor, " batch"]) -> Tensor:
    """Numbers of what was chosen, in proportion to the shares; no table waits to be copied to the device."""
    edges = [*accumulate(shares)]
    return sum((uniform >= edge / edges[-1] for edge in edges[:-1]), torch.zeros_like(uniform, dtype=torch.long))


@dataclass(frozen=True)
class Mixture:
    """Every sample's levels come from one of several families, by their shares."""

    parts: Sequence[tuple[float, Family]]

    def draw(self, draws: Draws, noises: Mapping[str, TrainingNoise], pure: Mapping[str, float]) -> Drawn:
        which = _chosen([share for share, _ in self.parts], draws.uniform("mixture"))
        drawn = [family.draw(draws.of(str(place)), noises, pure) for place, (_, family) in enumerate(self.parts)]
        yes = torch.ones_like(which, dtype=torch.bool)

        def chosen(parts: Sequence[Tensor]) -> Tensor:
            return torch.stack([*parts]).gather(0, which[None])[0]

        return Drawn(
            {v: chosen([part.levels[v] for part in drawn]) for v in noises},
            {v: chosen([part.counted.get(v, yes) for part in drawn]) for v in noises},
            {v: chosen([part.absent.get(v, ~yes) for part in drawn]) for v in noises if any(p.absent for p in drawn)},
        )

    def drew(self, levels: Mapping[str, float]) -> bool:
        return any(family.drew(levels) for _, family in self.parts)

    def known(self, names: Sequence[str]) -> set[frozenset[str]]:
        return {subset for _, family in self.parts for subset in family.known(names)}


@dataclass(frozen=True)
class Beside:
    """A family, but in shares of the samples some of its variables (not all; each subset equally likely) are known
    `exact`ly, are `pure` noise, or are `absent`: unseen and not learned. `only` names those that these can be."""

    family: Family
    exact: float = 0.0
    pure: float = 0.0
    absent: float = 0.0
    only: Sequence[str] = ()

    def _subsets(self, names: Sequence[str]) -> tuple[list[str], range]:
        """The variables that can be chosen, and numbers whose bits choose among them: not none, and not all."""
        free = [v for v in names if v in (self.only or names)]
        return free, range(1, 2 ** len(free) - (len(free) == len(names)))

    def draw(self, draws: Draws, noises: Mapping[str, TrainingNoise], pure: Mapping[str, float]) -> Drawn:
        drawn = self.family.draw(draws, noises, pure)
        if len(noises) < 2 or not (self.exact or self.pure or self.absent):
            return drawn
        free, numbers = self._subsets([*noises])
        which, how = draws.integers("which", below=len(numbers)) + 1, draws.uniform("how")
        without = (how >= self.exact + self.pure) & (how < self.exact + self.pure + self.absent)
        levels, counted, absent = {}, {}, {}
        for v, level in drawn.levels.items():
            chosen = (which >> free.index(v)) % 2 == 1 if v in free else torch.zeros_like(which, dtype=torch.bool)
            level = level.masked_fill(chosen & (how < self.exact), 0.0)
            levels[v] = level.masked_fill(chosen & (how >= self.exact) & (how < self.exact + self.pure), pure[v])
            gone = drawn.absent.get(v, torch.zeros_like(chosen)) | (chosen & without)
            # Where the family's own variable is out of its reach, those that are left are learned.
            reached = drawn.counted.get(v, torch.ones_like(chosen))
            counted[v] = torch.where(how < self.exact + self.pure + self.absent, ~chosen | (levels[v] > 0), reached)
            counted[v] &= ~gone
            if self.absent or v in drawn.absent:
                absent[v] = gone
        return Drawn(levels, counted, absent)

    def drew(self, levels: Mapping[str, float]) -> bool:
        if self.family.drew(levels):
            return True
        for share, out in ((self.exact, 0.0), (self.pure, max(levels.values()))):
            rest = {v: level for v, level in levels.items() if level != out or v not in (self.only or levels)}
            if share and len(rest) < len(levels) and (not rest or self.family.drew(rest)):
                return True
        return False

    def known(self, names: Sequence[str]) -> set[frozenset[str]]:
        free, numbers = self._subsets(names)
        every = (frozenset(v for i, v in enumerate(free) if bits >> i & 1) for bits in numbers)
        return set(every) if self.exact else self.family.known(names)
