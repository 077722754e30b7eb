"""Solvers, schedules and paths against reference samplers and exact denoisers."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from exact import Gaussians, JointGaussian, Mixture, distance, last, noise_of, normal_batch, two_modes
from fixture_files import fixture
from torch import Tensor

from chaindiff.edm.ema import Ema
from chaindiff.edm.levels import Path, even_sigmas, geometric_sigmas, karras_sigmas, staggered, together
from chaindiff.edm.random import generator
from chaindiff.edm.schedules import VE, VP, Linear, schedule
from chaindiff.edm.solvers import SOLVERS, Churn, Row, Update, evaluations, integrate, solve, updates


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
    assert denoiser.calls == evaluations(updates(path, solver)) == (steps if solver == "euler" else 2 * steps - 1)


@pytest.mark.parametrize("name", ["heun_vp", "heun_ve"])
def test_samplers_of_other_formulations_equal_the_reference(name: str) -> None:
    """EDM's general sampler with the discretisation, schedule and scaling that were published with VP and VE."""
    f, _ = fixture("samplers")
    denoiser = Mixture(f["mixture.means"], f["mixture.std"], f["mixture.weights"])
    if name == "heun_vp":
        chosen = VP.between(VP().sigma(1e-3), VP().sigma(1.0))
        sigmas = even_sigmas(24, VP().sigma(1e-3), VP().sigma(1.0), chosen)
    else:
        chosen, sigmas = VE(), geometric_sigmas(24, 0.02, 100)
    path = together({"x": sigmas}, {"x": chosen})
    start = {"x": f["in.latents"] * path.sigma(0)["x"]}
    out = last(solve(denoiser, start, path))
    assert (out["x"] - f[f"out.{name}"]).abs().max() < 1e-9


def general(denoise, x, sigmas, sigma, slope, time, scale, dscale):
    """Heun's method in the time of a schedule (EDM, algorithm 1), on the scaled state."""
    times = [*map(time, sigmas[:-1]), 0.0]
    x = x * sigmas[0] * scale(times[0])

    def derivative(x, t):
        rate = slope(t) / sigma(t)
        return (rate + dscale(t) / scale(t)) * x - rate * scale(t) * denoise(x / scale(t), sigma(t))

    for now, then in pairwise(times):
        first = derivative(x, now)
        moved = x + (then - now) * first
        x = moved if then == 0 else x + (then - now) * (first + derivative(moved, then)) / 2
    return x


@pytest.mark.parametrize("scaling", ["vp", "none"])
@pytest.mark.parametrize("kind", ["vp", "ve", "linear"])
def test_edms_grid_on_other_schedules_and_scales(kind: str, scaling: str) -> None:
    """EDM, figure 2 and table 1, with the betas of its general sampler; on N(0, 1), whose denoiser is linear."""
    low, high, eps = 0.002, 80.0, 1e-3
    sigmas = karras_sigmas(24, low, high, 7)
    beta_d = 2 * (math.log(low**2 + 1) / eps - math.log(high**2 + 1)) / (eps - 1)
    beta_min = math.log(high**2 + 1) - beta_d / 2
    levels = {
        "vp": (
            lambda t: math.sqrt(math.exp(beta_d * t**2 / 2 + beta_min * t) - 1),
            lambda t: (beta_min + beta_d * t) / 2 * (level(t) + 1 / level(t)),
            lambda s: (math.sqrt(beta_min**2 + 2 * beta_d * math.log(s**2 + 1)) - beta_min) / beta_d,
        ),
        "ve": (math.sqrt, lambda t: 0.5 / math.sqrt(t), lambda s: s**2),
        "linear": (lambda t: t, lambda t: 1.0, lambda s: s),
    }
    level, slope, time = levels[kind]
    if scaling == "vp":
        scale, dscale = lambda t: (1 + level(t) ** 2) ** -0.5, lambda t: -level(t) * slope(t) * scale(t) ** 3
    else:
        scale, dscale = lambda t: 1.0, lambda t: 0.0
    expected = general(lambda x, s: x / (1 + s**2), 1.7, sigmas, level, slope, time, scale, dscale)

    chosen = schedule(kind, low, high, scaling)
    path = together({"x": sigmas}, {"x": chosen})
    denoiser = Gaussians(x=1.0)
    out = last(solve(denoiser, {"x": torch.full((1, 1), 1.7 * 80).double()}, path))
    assert out["x"].item() == pytest.approx(expected, rel=1e-6)


def exact_flow(x: Tensor, sigma: float, end: float, std: float) -> Tensor:
    """The probability flow of N(0, std^2): x grows with sqrt(std^2 + sigma^2)."""
    return x * math.sqrt((std**2 + end**2) / (std**2 + sigma**2))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
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


def fine_flow(denoiser: Mixture, x: Tensor, sigma: float, end: float, steps: int = 600) -> Tensor:
    """The probability flow of one variable by the classical Runge-Kutta method in ln sigma, dx/d(ln sigma) = x - D."""

    def slope(x: Tensor, log: float) -> Tensor:
        return x - denoiser({"x": x}, {"x": math.exp(log)}).x0["x"]

    log, h = math.log(sigma), (math.log(end) - math.log(sigma)) / steps
    for _ in range(steps):
        one = slope(x, log)
        two = slope(x + h / 2 * one, log + h / 2)
        three = slope(x + h / 2 * two, log + h / 2)
        four = slope(x + h * three, log + h)
        x, log = x + h / 6 * (one + 2 * two + 2 * three + four), log + h
    return x


@pytest.fixture(scope="module")
def flow() -> tuple[Tensor, Tensor]:
    """Some values at level 10, and where the probability flow of a mixture takes them at level 0.01."""
    x = torch.tensor([[-20.0], [-6.0], [-0.5], [3.0], [15.0]]).double()
    return x, fine_flow(two_modes(), x, 10, 0.01)


SCHEDULES = ("linear", "vp", "ve", "iddpm", "cosine", "logsnr", "flow")


@pytest.mark.parametrize(
    ("solver", "kind", "order"),
    [("euler", "linear", 1), ("euler", "flow", 1), ("ddim", "cosine", 1), ("dpmpp_2m", "linear", 2)]
    + [("heun", kind, 2) for kind in SCHEDULES],
)
def test_solvers_converge_at_their_order_on_every_schedule(flow, solver: str, kind: str, order: int) -> None:
    """Down to a level of 0.01, against the fine solution of a mixture: the error falls with steps^-order."""
    x, expected = flow
    errors, counts, chosen = [], [40, 80, 160], schedule(kind, 0.01, 10)
    for steps in counts:
        path = together({"x": karras_sigmas(steps, 0.01, 10, 7)[:-1]}, {"x": chosen})
        out = last(solve(two_modes(), {"x": x}, path, solver=solver))
        errors.append((out["x"] - expected).abs().max().item())
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.35)
    assert errors[-1] < (0.05 if order == 1 else 0.005)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_exponential_solvers_do_not_depend_on_the_schedule(kind: str) -> None:
    """They are exact in ln sigma, so that a schedule changes where steps lie and nothing else."""
    chosen, sigmas = schedule(kind, 0.002, 80), karras_sigmas(12, 0.002, 80, 7)
    start = torch.linspace(-60, 60, 5).double()[:, None]
    for solver in ("ddim", "dpmpp_2m"):
        out = last(solve(two_modes(), {"x": start}, together({"x": sigmas}, {"x": chosen}), solver=solver))
        expected = last(solve(two_modes(), {"x": start}, together({"x": sigmas}), solver=solver))
        torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-10)


def test_ddim_without_noise_is_eulers_method_in_sigma() -> None:
    path, x = together({"x": karras_sigmas(9, 0.002, 80, 7)}), torch.linspace(-60, 60, 5).double()[:, None]
    out = [last(solve(two_modes(), {"x": x}, path, solver=solver))["x"] for solver in ("ddim", "euler")]
    torch.testing.assert_close(*out, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("offset", [0.0, 0.3, 1.0])
def test_every_path_ends_at_the_same_point(solver: str, offset: float) -> None:
    """Independent variables: together, staggered or one after the other, each flows as it would alone.

    Multistep history is dropped where another variable starts or stops, so there the two agree to their order only.
    """
    grid = karras_sigmas(40, 0.002, 80, 7)
    start = {"a": torch.full((1,), 40.0, dtype=torch.float64), "b": torch.full((1,), -70.0, dtype=torch.float64)}
    out = last(solve(Gaussians(a=0.5, b=1.0), start, staggered({"a": grid, "b": grid}, offset), solver=solver))
    kinked = solver == "dpmpp_2m" and offset == 0.3
    for v, std in (("a", 0.5), ("b", 1.0)):
        alone = last(solve(Gaussians(x=std), {"x": start[v]}, together({"x": grid}), solver=solver))
        assert out[v].item() == pytest.approx(alone["x"].item(), rel=0.01 if kinked else 1e-9)


COVARIANCE = torch.tensor([[0.25, 0.3, -0.1], [0.3, 1.0, 0.2], [-0.1, 0.2, 0.5]]).double()


@pytest.mark.parametrize(("solver", "kind"), [("heun", "linear"), ("heun", "cosine"), ("dpmpp_2m", "linear")])
@pytest.mark.parametrize("offset", [0.0, 0.3, 0.7, 1.0])
def test_every_path_of_dependent_variables_ends_in_their_distribution(solver: str, kind: str, offset: float) -> None:
    """The flow of a joint Gaussian is linear: its matrix, from unit starts, tells the covariance of what is sampled."""
    names, sigmas, chosen = "abc", karras_sigmas(64, 0.002, 80, 7), schedule(kind, 0.002, 80)
    path = staggered(dict.fromkeys(names, sigmas), offset, dict.fromkeys(names, chosen))
    unit = torch.eye(3, dtype=torch.float64) * 80
    start = dict(zip(names, unit.split(1, dim=1), strict=True))
    out = last(solve(JointGaussian(COVARIANCE, *names), start, path, solver=solver))
    matrix = torch.cat([out[v] for v in names], dim=1)
    torch.testing.assert_close(matrix.T @ matrix, COVARIANCE, rtol=0, atol=0.01)


def test_a_resting_variable_is_not_touched_and_nothing_is_evaluated_where_all_rest() -> None:
    path = Path({"a": np.array([1.0, 0.5, 0.5, 0.0]), "b": np.full(4, 2.0)}, {"a": Linear(), "b": Linear()})
    start = {v: torch.ones(1, 1).double() for v in "ab"}
    for solver in SOLVERS:
        denoiser = JointGaussian(COVARIANCE[:2, :2], "a", "b")
        out = last(solve(denoiser, dict(start), path, solver=solver))
        assert out["b"].item() == 1
        assert denoiser.calls == evaluations(updates(path, solver)) == (3 if solver == "heun" else 2)


def test_landing_variable_keeps_its_euler_step_while_others_are_corrected() -> None:
    path = Path({"a": np.array([1.0, 0.0]), "b": np.array([1.0, 0.5])}, {"a": Linear(), "b": Linear()})
    start = {"a": torch.ones(1, dtype=torch.float64), "b": torch.ones(1, dtype=torch.float64)}
    denoiser = Gaussians(a=0.5, b=0.5)
    out = last(solve(denoiser, start, path, solver="heun"))
    assert denoiser.calls == evaluations(updates(path, "heun")) == 2
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


COUNT = 10_000  # samples; Kolmogorov's distance between so many and their distribution is below 0.0163 in 99 of 100


@pytest.mark.parametrize(
    ("solver", "settings", "kind"),
    [
        ("ddim", {"eta": 1.0}, "linear"),
        ("ddim", {"eta": 0.5}, "vp"),
        ("dpmpp_2m", {"eta": 1.0}, "linear"),
        ("dpmpp_2m", {"eta": 0.5}, "flow"),
        ("heun", {"churn": Churn(20)}, "cosine"),
        ("euler", {}, "linear"),
    ],
)
def test_stochastic_solvers_end_in_the_distribution(solver: str, settings: dict, kind: str) -> None:
    """Of a mixture in one dimension; 0.016 is chance, the rest what is left of the steps' own error."""
    chosen, noise, denoiser = schedule(kind, 0.002, 80), noise_of(COUNT, "mixture"), two_modes()
    start = {"x": noise("x", -1) * 80}
    path = together({"x": karras_sigmas(128, 0.002, 80, 7)}, {"x": chosen})
    out = last(solve(denoiser, start, path, solver=solver, noise=noise, **settings))["x"]
    assert distance(out, denoiser.cdf) < 0.022


def test_stochastic_sampling_of_dependent_variables_keeps_their_covariance() -> None:
    names, sigmas, noise = "abc", karras_sigmas(80, 0.002, 80, 7), noise_of(COUNT, "joint")
    start = {v: noise(v, -1) * 80 for v in names}
    path = staggered(dict.fromkeys(names, sigmas), 0.3)
    out = last(solve(JointGaussian(COVARIANCE, *names), start, path, solver="dpmpp_2m", eta=1.0, noise=noise))
    found = torch.cat([out[v] for v in names], dim=1).T.cov()
    torch.testing.assert_close(found, COVARIANCE, rtol=0, atol=0.05)


def test_ancestral_sampling_adds_the_published_noise() -> None:
    """One step of DDPM's posterior q(x' | x, clean): its mean and variance (Ho et al. 2020, eq. 7)."""
    high, low, clean = 3.0, 1.2, 0.4
    alpha, before = 1 / (1 + high**2), 1 / (1 + low**2)  # alpha bar at the two levels
    x = torch.tensor([[2.0]]).double()
    beta = 1 - alpha / before
    mean = before**0.5 * beta / (1 - alpha) * clean
    mean = mean + (alpha / before) ** 0.5 * (1 - before) / (1 - alpha) * (x * alpha**0.5)
    std = ((1 - before) / (1 - alpha) * beta) ** 0.5

    class Known(Gaussians):
        def __call__(self, x, sigma):
            return type(super().__call__(x, sigma))({"x": torch.full_like(x["x"], clean)})

    path = together({"x": [high, low]})
    out = [
        last(solve(Known(x=1.0), {"x": x}, path, solver="ddim", eta=1.0, noise=lambda v, k, n=n: torch.full((1, 1), n)))
        for n in (0.0, 1.0)
    ]
    torch.testing.assert_close(out[0]["x"] * before**0.5, mean)
    assert (out[1]["x"] - out[0]["x"]).item() * before**0.5 == pytest.approx(std, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"churn": Churn(1)}, "churn needs a source of noise"),
        ({"solver": "ddim", "eta": 1.0}, "eta needs a source of noise"),
        ({"eta": 1.0, "noise": noise_of(1, "")}, "eta is for ddim and dpmpp_2m; heun takes its noise from churn"),
        ({"solver": "ddim", "eta": 1.0, "churn": Churn(1), "noise": noise_of(1, "")}, "choose one"),
    ],
)
def test_noise_without_meaning_is_refused(settings: dict, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        solve(Gaussians(x=1.0), {"x": torch.ones(1)}, together({"x": [1.0, 0.0]}), **settings)


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
    ema = Ema(torch.nn.Linear(1, 1), half_life=1e9, rampup=0.05)
    assert ema.keep(100, images=1100) == pytest.approx(0.5 ** (100 / 50))


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


@pytest.mark.parametrize(
    ("name", "solver", "settings"),
    [
        ("euler", "euler", {}),
        ("euler", "ddim", {}),
        ("heun", "heun", {}),
        ("dpmpp_2m", "dpmpp_2m", {}),
        ("ancestral", "ddim", {"eta": 1.0}),
        ("ancestral_half", "ddim", {"eta": 0.5}),
        ("sde", "dpmpp_2m", {"eta": 1.0}),
        ("churn", "heun", {"churn": Churn(4.0, 0.05, 50.0, 1.003)}),
    ],
)
def test_tables_give_the_samples_of_k_diffusion(name: str, solver: str, settings: dict) -> None:
    """`tests/make_k_diffusion.py` wrote what its samplers make of the same start, noise and levels."""
    f, _ = fixture("k_diffusion")
    sigmas = f["sigmas"].numpy()
    start, noise = {"x": f["start"] * sigmas[0]}, lambda v, n: f["noise"][n]
    out = last(solve(two_modes(), start, together({"x": sigmas}), solver=solver, noise=noise, **settings))["x"]
    assert (out - f[f"out.{name}"]).abs().max() < 1e-9


def test_a_table_of_ones_own_is_followed() -> None:
    """Rows are plain numbers: the midpoint method, written by hand, is of second order at least."""
    errors, counts = [], [64, 128, 256]
    for steps in counts:
        table, levels = [], karras_sigmas(steps, 0.01, 10, 7)[:-1]
        for n, (s, t) in enumerate(pairwise(levels)):
            middle = (s + t) / 2
            half, whole = (middle - s) / s, (t - s) / middle  # of dx/ds = (x - D) / s
            table.append(Update({"x": Row(x=1 + half, clean=-half)}, n, {"x": float(s)}))
            second = Row(x=whole, kept=1.0, clean=-whole)
            table.append(Update({"x": second}, n, {"x": float(middle)}, ends=True, level={"x": float(t)}))
        x = torch.full((1,), 10.0, dtype=torch.float64)
        out = last(integrate(Gaussians(x=0.5), {"x": x}, table))
        assert (out.number, out.total, out.sigma["x"]) == (steps - 1, steps - 1, pytest.approx(0.01))
        errors.append((out["x"] - exact_flow(x, 10, 0.01, 0.5)).abs().item())
    assert -np.polyfit(np.log(counts), np.log(errors), 1)[0] > 1.75


def test_a_step_says_its_levels_and_what_was_predicted() -> None:
    path = staggered({"a": [1.0, 0.5, 0.0], "b": [1.0, 0.5, 0.0]}, 1.0)
    start = {v: torch.ones(1).double() for v in "ab"}
    steps = list(solve(Gaussians(a=0.5, b=0.5), start, path, solver="euler"))
    assert [(s.number, s.total) for s in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [s.sigma for s in steps] == [{"a": 0.5, "b": 1.0}, {"a": 0, "b": 1.0}, {"a": 0, "b": 0.5}, {"a": 0, "b": 0}]
    assert steps[0].x0["a"].item() == pytest.approx(0.25 / 1.25) and torch.equal(steps[3]["b"], steps[3].x0["b"])
    with pytest.raises(ValueError, match="no solver is called 'hern'; known: euler, heun, ddim, dpmpp_2m"):
        updates(path, "hern")
