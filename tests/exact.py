"""Denoisers of distributions whose posterior mean is known, and what the tests of samplers measure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from chaindiff.edm.denoiser import Levels, Prediction, State
from chaindiff.edm.random import Draws, Key, generator
from chaindiff.networks.interface import Condition


def normal_batch(shape: Iterable[int], samples: Iterable[int], *key: Key) -> Tensor:
    """Noise for several samples in float64, [len(samples), *shape]; each row depends only on its own sample number."""
    return Draws(samples, *key, dtype=torch.float64).normal(shape=shape)


def normal(shape: Iterable[int], *key: Key) -> Tensor:
    """Standard normal noise in float64."""
    return normal_batch(shape, [0], *key)[0]


class OneVariable(nn.Module):
    """A network of one variable, which a test writes as `one(x, noise_labels, labels)`."""

    def forward(self, x, noise, condition):
        ((name, value),) = x.items()
        return {name: self.one(value, noise[name], condition.labels)}


def call(network, x: Tensor, noise_labels: Tensor, labels=None, augment=None, context=None, images=None) -> Tensor:
    """A network's output for one variable."""
    return network({"x": x}, {"x": noise_labels}, Condition(labels, images, context, augment))["x"]


class Exact:
    """What all denoisers here share: each call costs one evaluation, and is counted."""

    calls = 0

    def evaluations(self, sigma: Levels) -> int:
        return 1


class Mixture(Exact):
    """The exact posterior mean under a mixture of isotropic Gaussians, of one variable called x."""

    def __init__(self, means: Tensor, std: Tensor | float, weights: Tensor):
        self.means, self.std, self.weights, self.calls = means, std, weights, 0

    def __call__(self, x: State, sigma: Levels) -> Prediction:
        self.calls += 1
        flat, level = x["x"].flatten(1), sigma["x"]
        variance = self.std**2 + level**2
        logits = self.weights.log() - (flat[:, None] - self.means).square().sum(-1) / (2 * variance)
        posterior = (self.means * level**2 + flat[:, None] * self.std**2) / variance
        return Prediction({"x": (logits.softmax(1)[..., None] * posterior).sum(1).reshape(x["x"].shape)})

    def cdf(self, x: Tensor) -> Tensor:
        """Of a mixture in one dimension, at [count]."""
        return (self.weights * torch.special.ndtr((x[:, None] - self.means[:, 0]) / self.std)).sum(1)


def two_modes() -> Mixture:
    """A mixture in one dimension, in float64."""
    means, weights = torch.tensor([[-0.8], [0.5]]).double(), torch.tensor([0.3, 0.7]).double()
    return Mixture(means, 0.25, weights)


class Gaussians(Exact):
    """Exact denoiser of independent N(mean, std^2) variables; counts its calls."""

    def __init__(self, **stds: float):
        self.stds, self.calls = stds, 0

    def __call__(self, x: State, sigma: Levels) -> Prediction:
        self.calls += 1
        return Prediction({v: x[v] * s**2 / (s**2 + sigma[v] ** 2) for v, s in self.stds.items()})


class JointGaussian(Exact):
    """Exact denoiser of variables [batch, 1] that are jointly N(0, covariance), each with a noise level of its own."""

    def __init__(self, covariance: Tensor, *names: str):
        self.covariance, self.names, self.calls = covariance, names, 0

    def __call__(self, x: State, sigma: Levels) -> Prediction:
        self.calls += 1
        noise = torch.diag(torch.tensor([float(sigma[v]) ** 2 for v in self.names]).double())
        noisy = torch.cat([x[v] for v in self.names], dim=1)
        clean = noisy @ torch.linalg.solve(self.covariance + noise, self.covariance)
        return Prediction(dict(zip(self.names, clean.split(1, dim=1), strict=True)))


def last(states):
    return deque(states, maxlen=1).pop()


def noise_of(count: int, name: str) -> Callable[[str, int], Tensor]:
    """Unit noise [count, 1] for a solver, a function of the variable and the step."""
    return lambda v, step: torch.from_numpy(generator(0, name, v, step).standard_normal((count, 1)))


def distance(samples: Tensor, cdf: Callable[[Tensor], Tensor]) -> float:
    """Kolmogorov's: the largest difference between the distribution of samples [count] and another."""
    ordered = samples.double().flatten().sort().values
    steps = torch.arange(len(ordered) + 1).double() / len(ordered)
    expected = cdf(ordered)
    return float(torch.maximum((expected - steps[:-1]).abs(), (expected - steps[1:]).abs()).max())
