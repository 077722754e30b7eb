"""Weighted sums of denoisers: classifier-free guidance, autoguidance, and other combinations of predictions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from chaindiff.edm.denoiser import Denoiser, Levels, Prediction, State

Weight = float | Callable[[Levels], float]  # of a term: a number, or a function of the levels
Weights = Weight | Mapping[str, Weight]  # one for all variables, or one for each


@dataclass(frozen=True)
class Wrapper:
    """The base of denoisers around another one, `inner`: a subclass transforms its prediction in `__call__`."""

    inner: Denoiser

    def evaluations(self, sigma: Levels) -> int:
        return self.inner.evaluations(sigma)

    def __call__(self, x: State, sigma: Levels) -> Prediction:
        return self.inner(x, sigma)


@dataclass(frozen=True)
class Guided:
    """The weighted sum of predictions; see `guided`."""

    terms: Sequence[tuple[Denoiser, Weights]]

    def active(self, sigma: Levels) -> list[tuple[Denoiser, Mapping[str, float]]]:
        """The terms with a weight that is not 0 at these levels, and the weights of every variable that moves."""
        found = []
        for term, said in self.terms:
            each = said if isinstance(said, Mapping) else dict.fromkeys(sigma, said)
            weights = {v: weight(sigma) if callable(weight) else weight for v, weight in each.items()}
            if any(weights.values()):
                found.append((term, weights))
        return found

    def evaluations(self, sigma: Levels) -> int:
        return sum(term.evaluations(sigma) for term, _ in self.active(sigma))

    def __call__(self, x: State, sigma: Levels) -> Prediction:
        active = self.active(sigma)
        if not active:
            raise ValueError("every term of the guidance has weight 0 at this level")
        found = _predictions([term for term, _ in active], x, sigma)
        x0 = {}
        for v in found[0].x0:
            parts = [(weights.get(v, 0.0), p.x0[v]) for (_, weights), p in zip(active, found, strict=True)]
            x0[v] = _sum([(weight, value) for weight, value in parts if weight])
        return Prediction(x0, found[0].variance)


def guided(terms: Sequence[tuple[Denoiser, Weights]]) -> Denoiser:
    """D = sum of weight times D_i over the terms, whose weights should sum to 1; variances are those of the first.

    A weight may be a mapping, with one for each of several variables. Terms of one network are evaluated as one batch,
    and those with weight 0 at a level are skipped. With weights (w, 1 - w): classifier-free guidance (Ho & Salimans
    2022) if the second is unconditional, autoguidance (Karras et al. 2024) if it is a weaker network.
    """
    return Guided(list(terms))


def interval(weight: float, low: float, high: float, *, outside: float = 0.0, variable: str | None = None) -> Weight:
    """`weight` where low < sigma <= high, else `outside` (Kynkäänniemi et al. 2024).

    The level is that of `variable`, or else the largest of all.
    """

    def at(sigma: Levels) -> float:
        level = max(float(s) for s in sigma.values()) if variable is None else float(sigma[variable])
        return weight if low < level <= high else outside

    return at


def _predictions(terms: Sequence[Denoiser], x: State, sigma: Levels) -> list[Prediction]:
    """Each term's prediction; those of equal `kin`, if they have one, in one call of the first's `batch`."""
    groups: dict[Hashable, list[int]] = {}
    for place, term in enumerate(terms):
        groups.setdefault(getattr(term, "kin", (place,)), []).append(place)
    found: dict[int, Prediction] = {}
    for places in groups.values():
        first: Any = terms[places[0]]
        alike = first.batch([terms[p] for p in places], x, sigma) if hasattr(first, "kin") else [first(x, sigma)]
        found.update(zip(places, alike, strict=True))
    return [found[place] for place in range(len(terms))]


def _sum(parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    (weight, total), *rest = parts
    total = total if weight == 1 else total * weight
    for weight, value in rest:
        total = total.add(value, alpha=weight)
    return total
