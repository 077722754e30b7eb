"""Solvers, schedules and paths against reference samplers and exact denoisers."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import pytest
import torch
from conftest import fixture
from torch import Tensor

from chaindiff.edm.denoiser import Levels, Prediction, State
from chaindiff.edm.ema import Ema, ema_decay
from chaindiff.edm.levels import Linear, Path, karras_sigmas, staggered, together
from chaindiff.edm.random import generator, normal_batch
from chaindiff.edm.solvers import SECOND_ORDER, SOLVERS, Churn, solve


class Mixture:
    """The exact posterior mean under a mixture of isotropic Gaussians, of one variable called x."""

    sigma_min, sigma_max = 0.0, math.inf

    def __init__(self, means: Tensor, std: Tensor, weights: Tensor):
        self.means, self.std, self.weights, self.calls = means, std, weights, 0

    def __call__(self, x: State, sigma: Levels) -> Prediction:
        self.calls += 1
        flat, level = x["x"].flatten(1), sigma["x"]
        variance = self.std**2 + level**2
        logits = self.weights.log() - (flat[:, None] - self.means).square().sum(-1) / (2 * variance)
        posterior = (self.means * level**2 + flat[:, None] * self.std**2) / variance
        return Prediction({"x": (logits.softmax(1)[..., None] * posterior).sum(1).reshape(x["x"].shape)})


class Gaussians:
    """Exact denoiser of independent N(mean, std^2) variables; counts its calls."""

    sigma_min, sigma_max = 0.0, math.inf

    def __init__(self, **stds: float):
        self.stds, self.calls = stds, 0

    def __call__(self, x: State, sigma: Levels) -> Prediction:
        self.calls += 1
        return Prediction({v: x[v] * s**2 / (s**2 + sigma[v] ** 2) for v, s in self.stds.items()})


def last(states):
    return deque(states, maxlen=1).pop()


@pytest.mark.parametrize(
    ("name", "solver", "steps", "churn"),
    [
        ("heun18", "heun", 18, None),
        ("heun40", "heun", 40, None),
        ("euler_edm", "euler", 24, None),
        ("churn", "heun", 32, Churn(40, 0.05, 50, 1.003)),
    ],
)
def test_samplers_equal_the_reference(name: str, solver: str, steps: int, churn: Churn | None) -> None:
    f, _ = fixture("samplers")
    denoiser = Mixture(f["mixture.means"], f["mixture.std"], f["mixture.weights"])
    path = together({"x": karras_sigmas(steps, 0.002, 80, 7)})
    start = {"x": f["in.latents"] * path.sigma(0)["x"]}
    out = last(solve(denoiser, start, path, solver=solver, churn=churn, noise=lambda v, k: f["in.noise"][k]))
    assert (out["x"] - f[f"out.{name}"]).abs().max() < 1e-9
    assert denoiser.calls == path.evaluations(SECOND_ORDER[solver])


def exact_flow(x: Tensor, sigma: float, end: float, std: float) -> Tensor:
    """The probability flow of N(0, std^2): x grows with sqrt(std^2 + sigma^2)."""
    return x * math.sqrt((std**2 + end**2) / (std**2 + sigma**2))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_solvers_converge_at_their_order(solver: str, order: int) -> None:
    """Against the closed-form flow of a Gaussian, from sigma 10 to 0.01: the error falls with steps^-order."""
    errors, counts, std = [], [64, 128, 256], 0.5
    for steps in counts:
        grid = karras_sigmas(steps, 0.01, 10, 7)[:-1]
        x = torch.ones(1, dtype=torch.float64) * 10
        out = last(solve(Gaussians(x=std), {"x": x}, together({"x": grid}), solver=solver))
        errors.append((out["x"] - exact_flow(x, 10, 0.01, std)).abs().item())
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("offset", [0.0, 0.3, 1.0])
def test_every_path_ends_at_the_same_point(solver: str, offset: float) -> None:
    """Independent variables: together, staggered or one after the other, each flows as it would alone."""
    grid = karras_sigmas(40, 0.002, 80, 7)
    start = {"a": torch.full((1,), 40.0, dtype=torch.float64), "b": torch.full((1,), -70.0, dtype=torch.float64)}
    out = last(solve(Gaussians(a=0.5, b=1.0), start, staggered({"a": grid, "b": grid}, offset), solver=solver))
    for v, std in (("a", 0.5), ("b", 1.0)):
        alone = last(solve(Gaussians(x=std), {"x": start[v]}, together({"x": grid}), solver=solver))
        assert out[v].item() == pytest.approx(alone["x"].item(), rel=1e-9)


def test_landing_variable_keeps_its_euler_step_while_others_are_corrected() -> None:
    path = Path({"a": np.array([1.0, 0.0]), "b": np.array([1.0, 0.5])}, {"a": Linear(), "b": Linear()})
    start = {"a": torch.ones(1, dtype=torch.float64), "b": torch.ones(1, dtype=torch.float64)}
    denoiser = Gaussians(a=0.5, b=0.5)
    out = last(solve(denoiser, start, path, solver="heun"))
    assert denoiser.calls == path.evaluations(True) == 2
    assert out["a"].item() == pytest.approx(0.25 / 1.25)  # x + (0 - 1)(x - D) / 1 = D
    euler = 1 - 0.5 * (1 - 0.2)
    corrected = 1 - 0.5 * ((1 - 0.2) + (euler - euler * 0.5) / 0.5) / 2
    assert out["b"].item() == pytest.approx(corrected)


def test_churn_leaves_the_distribution_as_it_is() -> None:
    """With the exact denoiser of N(0, 0.5^2) and S_noise 1, stochastic sampling ends with that variance."""
    noise = generator(0, "churn")
    shape = (50_000,)
    grid = karras_sigmas(256, 0.002, 80, 7)
    start = {"x": torch.from_numpy(noise.standard_normal(shape)) * 80}
    draw = lambda v, k: torch.from_numpy(noise.standard_normal(shape))  # noqa: E731
    out = last(solve(Gaussians(x=0.5), start, together({"x": grid}), churn=Churn(30), noise=draw))["x"]
    assert out.std().item() == pytest.approx(0.5, rel=0.02)
    assert out.mean().item() == pytest.approx(0, abs=0.01)


def test_churn_without_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="source of noise"):
        solve(Gaussians(x=1.0), {"x": torch.ones(1)}, together({"x": [1.0, 0.0]}), churn=Churn(1))


def test_karras_steps_are_edm_equation_5() -> None:
    sigmas = karras_sigmas(18, 0.002, 80, 7)
    assert len(sigmas) == 19
    assert sigmas[0] == pytest.approx(80)
    assert sigmas[-2] == pytest.approx(0.002)
    assert sigmas[-1] == 0
    i = 5
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert sigmas[i] == pytest.approx(expected)


def test_rising_times_are_refused() -> None:
    with pytest.raises(ValueError, match="must never rise"):
        together({"x": [1.0, 2.0, 0.0]})


# ------------------------------------------------------------ averages and randomness


def test_ema_halves_what_is_old_after_its_half_life() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        module.weight.fill_(1)
    ema = Ema(module, half_life=1000, rampup=None)
    with torch.no_grad():
        module.weight.fill_(0)
    for _ in range(10):
        ema.update(module, 100, images=0)
    assert ema.model.weight.item() == pytest.approx(0.5)


def test_ema_rampup_limits_the_half_life() -> None:
    assert ema_decay(100, images=1000, half_life=1e9, rampup=0.05) == pytest.approx(0.5 ** (100 / 50))


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_noise_is_bit_identical_for_any_batch(batch: int) -> None:
    whole = normal_batch((3, 4), range(64), 0, "image", "start")
    parts = [normal_batch((3, 4), range(i, min(i + batch, 64)), 0, "image", "start") for i in range(0, 64, batch)]
    assert torch.equal(whole, torch.cat(parts))


def test_noise_depends_on_every_part_of_its_key() -> None:
    keys = [(0, 1, "image"), (1, 0, "image"), (0, 1, "clip"), (0, "1", "image"), (0, 1, "im", "age")]
    values = {float(generator(*key).standard_normal()) for key in keys}
    assert len(values) == len(keys)


def test_noise_is_standard_normal() -> None:
    x = normal_batch((500,), range(400), 3, "check").flatten()
    assert x.mean().item() == pytest.approx(0, abs=0.01)
    assert x.std().item() == pytest.approx(1, abs=0.01)
    assert (x[:-1] * x[1:]).mean().item() == pytest.approx(0, abs=0.01)
