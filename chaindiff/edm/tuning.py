"""Paths of noise levels fitted to a denoiser: those on which the steps of a sampler lose least of the variance.

From sigma to r sigma, a step of the probability-flow ODE holds the denoiser's output fixed. Of a Gaussian variable it
so loses, once the exact flow has carried it to the end, (1 - r) / (1 + r) times what the denoiser's squared error falls
by (docs/mathematics.md, eq. 26). Several variables count each with its own r and its own part of the fall.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np
import torch
from jaxtyping import Float64
from scipy.interpolate import PchipInterpolator
from scipy.optimize import minimize
from torch import Tensor
from torch.nn.functional import softplus

from chaindiff.edm.families import Ruler

FINE = {1: 257, 2: 65, 3: 33}  # points of the smooth error along a variable, by the number of variables; of more: 17
STARTS = (-5.0, -2.0)  # a leader that is hardly ahead, and one that is far ahead
LAST = 1 - 1e-4  # the highest progress before the last step, which leads to the clean values


@dataclass(frozen=True)
class Errors:
    """A denoiser's squared error, relative to that from pure noise, as a smooth function of its variables' progress: a
    cubic B-spline with these control points."""

    points: Float64[Tensor, "..."]

    @classmethod
    def of(cls, measured: Float64[np.ndarray, "..."]) -> Errors:
        """From an even grid of progress, with one axis for each variable; an error that rises is the measurement's."""
        for axis, count in enumerate(measured.shape):
            measured = np.flip(np.maximum.accumulate(np.flip(measured, axis), axis), axis)
            fine = np.linspace(0, 1, FINE.get(measured.ndim, 17))
            measured = np.asarray(PchipInterpolator(np.linspace(0, 1, count), measured, axis=axis)(fine))
        return cls(torch.from_numpy(np.pad(measured, 1, mode="reflect", reflect_type="odd")))

    @property
    def variables(self) -> int:
        return self.points.ndim

    def __call__(self, progress: Float64[Tensor, "count variables"]) -> Float64[Tensor, " count"]:
        place = progress * (self.points.shape[0] - 3)
        low = place.detach().floor().clamp(max=self.points.shape[0] - 4)
        t = place - low
        weights = torch.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
        corners = torch.tensor([*product(range(4), repeat=self.variables)])
        weight = torch.stack([weights[corners[:, v], :, v] for v in range(self.variables)]).prod(0)
        return (weight * self.points[(low.long() + corners[:, None]).unbind(2)]).sum(0)


def lost(errors: Errors, progress: Float64[Tensor, "steps1 variables"], ruler: Ruler) -> Float64[Tensor, ""]:
    """The share of their variance that the variables lose by the steps of Euler's method (eq. 27)."""
    sigma = ruler.sigma(progress)
    ratio = torch.where(sigma[:-1] > 0, sigma[1:] / sigma[:-1].clamp_min(1e-12), 1.0)
    share, count = (1 - ratio) / (1 + ratio), errors.variables
    forth = [*range(count)]
    orders = (forth, forth[::-1])  # which of the variables that move together goes first: the mean of both ways
    gone = torch.tensor([[[v in order[:k] for v in forth] for k in range(count + 1)] for order in orders])
    at = torch.where(gone[:, :, None], progress[1:], progress[:-1])  # [order, gone, step, variable]
    falls = -errors(at.flatten(0, 2)).reshape(at.shape[:-1]).diff(dim=1)
    shares = torch.stack([share[:, order].T for order in orders])
    return (shares * falls).sum() / 2


def fitted(errors: Errors, steps: int, ruler: Ruler) -> tuple[Float64[np.ndarray, "steps1 variables"], float]:
    """The progress of every variable after each of so many steps on the best path, and what is `lost` on it.

    One variable leads, and the progress of each later one is a convex function of that of the one before it: no
    variable falls back again. Which leads is tried; of four or more variables the order is the given one.
    """
    count = errors.variables
    orders = [*permutations(range(count))] if count < 4 else [tuple(range(count))]
    found = []
    for order in orders:

        def loss(values: np.ndarray, order: Sequence[int] = order) -> tuple[float, np.ndarray]:
            told = torch.tensor(values, requires_grad=True)
            total = lost(errors, _convex(told.reshape(count, steps), order), ruler)
            total.backward()
            return float(total.detach()), np.asarray(told.grad)

        for start in STARTS:
            begin = np.repeat([0.0, *[start] * (count - 1)], steps)
            best = minimize(loss, begin, jac=True, method="L-BFGS-B", options={"maxiter": 500, "maxfun": 1000})
            path = _convex(torch.from_numpy(best.x).reshape(count, steps), order).numpy()
            found.append((path, float(best.fun)))
    return min(found, key=lambda each: each[1])


def _convex(values: Float64[Tensor, "variables steps"], order: Sequence[int]) -> Float64[Tensor, "steps1 variables"]:
    """Progress along a path by free numbers: the leader's steps are a softmax, and the steps of each that follows are
    those of the one before it times a factor that never falls."""
    columns, logit = {}, torch.zeros_like(values[0])
    for place, v in enumerate(order):
        logit = logit + (values[place] if place == 0 else softplus(values[place]).cumsum(0))
        inside = logit.softmax(0).cumsum(0)[:-1].clamp(max=LAST)
        columns[v] = torch.cat([values.new_zeros(1), inside, values.new_ones(1)])
    return torch.stack([columns[v] for v in range(len(order))], dim=1)
