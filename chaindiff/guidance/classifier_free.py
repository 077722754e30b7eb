"""Classifier-free guidance, with a guidance scale for each given variable that can be absent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from chaindiff.edm.denoiser import Denoiser
from chaindiff.guidance.algebra import Weight, guided, interval

Terms = list[tuple[frozenset[str], Weight]]  # which given variables are absent, and the weight


def classifier_free(
    bind: Callable[[frozenset[str]], Denoiser],
    scale: float | Mapping[str, float],
    droppable: Sequence[str],
    *,
    within: tuple[float, float] | None = None,
) -> Denoiser:
    """w c + (1 - w) u (Ho & Salimans 2022): w = 1 is off, and terms of weight 0 are not evaluated.

    `bind(absent)` gives the denoiser without these variables; `droppable` are those that can be absent, in the
    order in which they are added to the conditioning where scales differ; `within` is the guidance interval.
    """
    terms = [(bind(absent), weight) for absent, weight in guidance_terms(scale, droppable, within)]
    return terms[0][0] if len(terms) == 1 else guided(terms)


def guidance_terms(
    scale: float | Mapping[str, float],
    droppable: Sequence[str],
    within: tuple[float, float] | None = None,
    variable: str | None = None,
) -> Terms:
    """D = D() + sum over i of w_i (D(1..i) - D(1..i-1)), where D(1..i) is given the first i droppable variables.

    So for equal scales D = w D(all) + (1 - w) D(none); different ones are those of Brooks et al. 2023, eq. 3, for any
    number of variables. A scale that is not given is 1; `within` is an interval of the level of `variable`, or of the
    largest. Raises ValueError for a variable that cannot be absent.
    """
    scales = dict(scale) if isinstance(scale, Mapping) else dict.fromkeys(droppable, scale)
    if strange := [name for name in scales if name not in droppable]:
        raise ValueError(f"'{strange[0]}' is never absent in training, so it has no guidance scale")
    w = [1.0, *(scales.get(name, 1.0) for name in droppable), 0.0]
    # D(1..i) has weight w_i - w_(i+1), the first of which, of D(), counts from w_0 = 1.
    weights = {frozenset(droppable[i:]): w[i] - w[i + 1] for i in range(len(droppable))}
    terms: Terms = [(frozenset(), _only(w[-2], 1.0, within, variable))]
    terms += [(absent, _only(weight, 0.0, within, variable)) for absent, weight in reversed(weights.items()) if weight]
    return terms


def _only(weight: float, outside: float, within: tuple[float, float] | None, variable: str | None) -> Weight:
    """The weight within the interval; outside it, guidance is off."""
    if within is None or weight == outside:
        return weight
    return interval(weight, *within, outside=outside, variable=variable)
