"""Inversion: from data up to noise and back, for every solver, schedule and path."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from exact import Gaussians, JointGaussian, Mixture, OneVariable, distance, last, normal_batch, two_modes
from torch import Tensor, nn

from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.variable import Variable
from chaindiff.edm.levels import karras_sigmas, staggered, together
from chaindiff.edm.random import Draws, generator
from chaindiff.edm.schedules import schedule
from chaindiff.edm.solvers import SOLVERS, Churn, evaluations, invert, solve, updates
from chaindiff.io.errors import UserError
from chaindiff.specs.sampling import ChurnSpec, SamplerSpec


def data(count: int) -> Tensor:
    """Values of the mixture of `two_modes`, [count, 1]."""
    rng, mixture = generator(0, "data"), two_modes()
    mode = torch.from_numpy((rng.random(count) > 0.3).astype(int))
    return mixture.means[mode] + 0.25 * torch.from_numpy(rng.standard_normal((count, 1)))


@pytest.mark.parametrize(
    ("solver", "kind", "accuracy"),
    [("euler", "linear", 0.15), ("ddim", "linear", 0.15), ("dpmpp_2m", "linear", 0.01)]
    + [("heun", kind, 0.01) for kind in ("linear", "vp", "ve", "iddpm", "cosine", "logsnr", "flow")],
)
def test_sampling_returns_the_data_that_was_inverted(solver: str, kind: str, accuracy: float) -> None:
    """On one path, last interval to 0 included; the noise that the data leads to has the distribution of the start."""
    chosen, x = schedule(kind, 0.002, 80), data(2000)
    path = together({"x": karras_sigmas(128, 0.002, 80, 7)}, {"x": chosen})
    noise = last(invert(two_modes(), {"x": x}, path, solver=solver))
    back = last(solve(two_modes(), noise, path, solver=solver))
    assert (back["x"] - x).abs().max() < accuracy
    unit = noise["x"] / 80
    assert distance(unit, lambda u: torch.special.ndtr(u)) < 1.95 / math.sqrt(2000) + 0.01


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_the_way_there_and_back_closes_at_the_order_of_the_solver(solver: str, order: int) -> None:
    x, errors, counts = torch.linspace(-1.4, 1.1, 9).double()[:, None], [], [40, 80, 160]
    for steps in counts:
        path = together({"x": karras_sigmas(steps, 0.002, 80, 7)})
        noise = last(invert(two_modes(), {"x": x}, path, solver=solver))
        errors.append(float((last(solve(two_modes(), noise, path, solver=solver))["x"] - x).abs().max()))
    assert -np.polyfit(np.log(counts), np.log(errors), 1)[0] > order - 0.35


def test_the_interval_next_to_0_closes_up_to_the_second_order() -> None:
    """Leaving 0 takes the step that landing there undoes: what is lost is the square of that step's part."""
    std, level = 0.5, 0.01
    path, x = together({"x": [level, 0.0]}), torch.ones(1, 1).double()
    for solver in SOLVERS:
        noise = last(invert(Gaussians(x=std), {"x": x}, path, solver=solver))
        part = level**2 / (std**2 + level**2)  # of the way from x to its denoised value
        assert noise["x"].item() == pytest.approx(1 + part)
        back = last(solve(Gaussians(x=std), noise, path, solver=solver))
        assert back["x"].item() - 1 == pytest.approx(-(part**2), rel=1e-6)


@pytest.mark.parametrize("offset", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m"])
def test_dependent_variables_are_inverted_along_every_path(solver: str, offset: float) -> None:
    """What was generated last is inverted first; NFE are those of sampling."""
    covariance = torch.tensor([[0.25, 0.3], [0.3, 1.0]]).double()
    sigmas = karras_sigmas(64, 0.002, 80, 7)
    path = staggered({"a": sigmas, "b": sigmas}, offset)
    x = {"a": torch.tensor([[0.4], [-0.2]]).double(), "b": torch.tensor([[1.1], [0.3]]).double()}
    denoiser = JointGaussian(covariance, "a", "b")
    noise = last(invert(denoiser, x, path, solver=solver))
    assert denoiser.calls == evaluations(updates(path, solver))
    back = last(solve(denoiser, noise, path, solver=solver))
    for v in x:
        torch.testing.assert_close(back[v], x[v], rtol=0, atol=0.01)
    # The flow keeps a whitened length: noise is as likely under N(0, sigma_max^2) as the data under its Gaussian.
    whole = torch.cat([x["a"], x["b"]], dim=1)
    likely = (whole @ torch.linalg.inv(covariance) * whole).sum(1)
    found = sum(((noise[v] / 80) ** 2).sum(1) for v in x)
    torch.testing.assert_close(found, likely, rtol=0.03, atol=0)


def test_noise_on_the_way_up_is_refused() -> None:
    path = together({"x": [1.0, 0.0]}).reversed()
    for settings in ({"churn": Churn(1)}, {"solver": "ddim", "eta": 0.5}):
        with pytest.raises(ValueError, match="inversion is deterministic"):
            solve(Gaussians(x=1.0), {"x": torch.ones(1)}, path, noise=lambda v, n: torch.ones(1), **settings)


class ExactNetwork(OneVariable):
    """The network for which EDM's preconditioning is the exact denoiser of a mixture."""

    def __init__(self, mixture: Mixture):
        super().__init__()
        self.mixture, self.unused = mixture, nn.Parameter(torch.zeros(1))

    def one(self, x, noise_labels, class_labels) -> Tensor:
        sigma, spread = float((4 * noise_labels[0]).exp()), 0.5
        total = math.sqrt(sigma**2 + spread**2)
        clean = self.mixture({"x": x * total}, {"x": sigma}).x0["x"]
        return (clean - spread**2 / total**2 * x * total) * total / (sigma * spread)


@pytest.mark.parametrize("kind", ["linear", "vp"])
def test_a_stage_returns_what_it_inverted(kind: str) -> None:
    sampler = SamplerSpec(steps=100, schedule=kind)
    stage = Diffusion(Variable.vector("x", 1), network=ExactNetwork(two_modes()).double(), sampler=sampler)
    x = data(50)
    start = last(stage.invert({"x": x}, {}))
    back = last(stage.sample({}, Draws(range(50), 0), start=start))
    assert (back["x"] - x).abs().max() < 0.01
    assert 0.6 < start["x"].std() < 1.4


def test_a_stage_that_adds_noise_cannot_invert() -> None:
    sampler = SamplerSpec(churn=ChurnSpec(amount=3))
    stage = Diffusion(Variable.vector("x", 1), network=ExactNetwork(two_modes()), sampler=sampler)
    with pytest.raises(UserError, match=r"stages\.x\.sample\.churn\.amount: a stochastic sampler cannot be inverted"):
        last(stage.invert({"x": normal_batch((1,), range(2), 0)}, {}))
