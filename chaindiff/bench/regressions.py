"""Two runs of the suite compared: what has become slower or faster beyond noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import median

import numpy as np

from chaindiff.bench.suite import Results, SideResult

LEVEL = 0.01  # probability of naming anything when nothing changed, over all rows together
TOLERANCE = 0.03  # the same code differs by this much between processes: memory layout, threads, caches


@dataclass(frozen=True)
class Change:
    """A side's time relative to its earlier time, with a 95% interval."""

    name: str
    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        word = "slower" if self.ratio > 1 else "faster"
        return f"{word}: {self.name}: {abs(self.ratio - 1):.1%} (time x {self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Comparison:
    """What changed, out of `judged` rows; `unjudged` rows have too few repeats, or are in one run alone."""

    slower: list[Change]
    faster: list[Change]
    judged: int
    unjudged: list[str]

    def __str__(self) -> str:
        said = [*map(str, [*self.slower, *self.faster])]
        said.append(f"{self.judged} rows compared: {len(self.slower)} slower, {len(self.faster)} faster beyond noise")
        few = f"not compared, for too few repeats or in one run alone: {'; '.join(self.unjudged)}"
        return "\n".join([*said, few] if self.unjudged else said)


def compare(old: Results, new: Results) -> Comparison:
    """Our own sides in both runs. Peers tell how fast the machine was, not how fast we are.

    Times are divided by those of the reference workload beside them. A row is named if a rank test finds them changed
    (one-sided, `LEVEL` divided by the number of rows), and the 95% interval of the change lies beyond `TOLERANCE`.
    """
    before, after = (
        {f"{name}, {side}": relative(found) for name, c in run.cases.items() for side, found in c.sides.items()}
        for run in (old, new)
    )
    names = [name for name in {**before, **after} if name.split(", ", 1)[1].startswith("chaindiff")]
    pairs = {name: (before.get(name, []), after.get(name, [])) for name in names}
    enough = {
        n: (b, a) for n, (b, a) in pairs.items() if b and a and 1 / comb(len(b) + len(a), len(b)) < LEVEL / len(pairs)
    }
    slower, faster = [], []
    for name, (b, a) in enough.items():
        change = Change(name, median(a) / median(b), *interval(b, a))
        if change.low > 1 + TOLERANCE and p_larger(b, a) < LEVEL / len(enough):
            slower.append(change)
        elif change.high < 1 - TOLERANCE and p_larger(a, b) < LEVEL / len(enough):
            faster.append(change)
    return Comparison(slower, faster, len(enough), [name for name in names if name not in enough])


def relative(side: SideResult) -> list[float]:
    """A side's times in units of the reference workload's."""
    return [own / beside for own, beside in zip(side.seconds, side.beside, strict=True)]


def p_larger(before: Sequence[float], after: Sequence[float]) -> float:
    """The exact one-sided probability of Mann and Whitney's U, that `after` lies this far above `before` by chance."""
    from scipy.stats import mannwhitneyu  # slow to import

    less = [value * (1 - 1e-12) for value in after]  # a tie counts against a change
    return float(mannwhitneyu(less, before, alternative="greater", method="exact").pvalue)


def interval(before: Sequence[float], after: Sequence[float], draws: int = 4000) -> tuple[float, float]:
    """A 95% interval of the ratio of medians, by bootstrap."""
    random = np.random.default_rng(0)
    old, new = (np.median(random.choice(np.array(v), (draws, len(v))), axis=1) for v in (before, after))
    low, high = np.quantile(new / old, (0.025, 0.975))
    return float(low), float(high)
