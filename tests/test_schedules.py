"""Schedules against finite differences and round trips, and the published grids of steps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fixture_files import fixture

from chaindiff.edm.levels import (
    Path,
    even_sigmas,
    geometric_sigmas,
    grid,
    iddpm_sigmas,
    karras_sigmas,
    staggered,
    together,
)
from chaindiff.edm.schedules import (
    VE,
    VP,
    Cosine,
    Flow,
    Linear,
    LogSNR,
    Scaled,
    Schedule,
    Unscaled,
    iddpm_levels,
    schedule,
)
from chaindiff.edm.solvers import evaluations, updates
from chaindiff.specs.sampling import SamplerSpec

SCHEDULES = [
    Linear(),
    VP(),
    VP.between(0.002, 80),
    VE(),
    Cosine(),
    Cosine(0.008),
    Flow(),
    LogSNR(),
    Unscaled(VP()),
    Scaled(VE()),
]
LEVELS = [1e-4, 0.002, 0.03, 0.9, 4.0, 80.0]

each = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)


@each
def test_derivatives_are_those_of_finite_differences(schedule: Schedule) -> None:
    for level in LEVELS:
        t = schedule.time(level)
        h = 1e-6 * max(min(abs(t), 1 - t if level > 1 and t < 1 else abs(t)), 1e-6)
        for f, derivative in ((schedule.sigma, schedule.dsigma), (schedule.scale, schedule.dscale)):
            expected = (f(t + h) - f(t - h)) / (2 * h)
            assert derivative(t) == pytest.approx(expected, rel=1e-5, abs=1e-9 / h)


@each
def test_time_is_the_inverse_of_sigma(schedule: Schedule) -> None:
    for level in LEVELS:
        assert schedule.sigma(schedule.time(level)) == pytest.approx(level, rel=1e-10)
    times = [schedule.time(level) for level in LEVELS]
    assert times == sorted(times)


@each
def test_level_0_is_reached_exactly_and_unscaled(schedule: Schedule) -> None:
    end = schedule.time(0.0)
    assert schedule.sigma(end) == 0
    assert schedule.scale(end) == 1


@each
def test_scales_are_those_of_their_kind(schedule: Schedule) -> None:
    """s = 1, or s^2 (1 + sigma^2) = 1 (variance preserving), or s (1 + sigma) = 1 (straight lines)."""
    for level in LEVELS:
        scale = schedule.scale(schedule.time(level))
        if isinstance(schedule, (Linear, VE, Unscaled)):
            assert scale == 1
        elif isinstance(schedule, Flow):
            assert scale * (1 + level) == pytest.approx(1)
        else:
            assert scale**2 * (1 + level**2) == pytest.approx(1)


@pytest.mark.parametrize(
    "schedule", [VP(), Cosine(), Cosine(0.008), Flow()], ids=lambda schedule: type(schedule).__name__
)
def test_tensors_are_taken_as_floats_are(schedule: VP | Cosine | Flow) -> None:
    levels = torch.tensor([0.0, *LEVELS]).double()
    times = schedule.time(levels)
    torch.testing.assert_close(times, torch.tensor([schedule.time(float(x)) for x in levels]).double())
    torch.testing.assert_close(schedule.sigma(times), levels)


def test_vp_is_the_published_process() -> None:
    """alpha bar is exp of minus the integral of beta, beta_min to beta_min + beta_d (Song et al. 2021b, eq. 33)."""
    t = 0.37
    beta = 0.1 + 19.9 * np.linspace(0, t, 100_001)
    alpha = math.exp(-np.trapezoid(beta, dx=t / 100_000))
    assert 1 / (1 + VP().sigma(t) ** 2) == pytest.approx(alpha, rel=1e-8)
    assert VP().scale(t) == pytest.approx(math.sqrt(alpha), rel=1e-8)


def test_betas_between_two_levels() -> None:
    """The published range gives the published betas; of any range, the ends are at 1 and at eps (EDM's code)."""
    assert VP.between(VP().sigma(1e-3), VP().sigma(1.0)).beta_d == pytest.approx(19.9, rel=1e-9)
    for low, high in [(0.002, 80), (0.02, 100), (1e-4, 1000), (0.4, 1)]:
        found = VP.between(low, high)
        assert found.sigma(1.0) == pytest.approx(high)
        assert found.time(low) == pytest.approx(1e-3)


def test_levels_of_iddpm() -> None:
    """Up to the clipped last, the cosine that they were cut from (Nichol & Dhariwal 2021, eq. 17); EDM's own numbers.

    Those were computed one from the other in float32: the last differ in the fourth digit.
    """
    levels = iddpm_levels()
    np.testing.assert_allclose(levels[1:], [Cosine(0.008).sigma(j / 1000) for j in range(999, -1, -1)], rtol=1e-10)
    assert levels[0] ** 2 + 1 == pytest.approx((levels[1] ** 2 + 1) / 0.001)
    published = fixture("precond_iddpm")[0]["state.u"].numpy()
    np.testing.assert_allclose(levels, published, rtol=5e-4)
    np.testing.assert_allclose(levels[:900], published[:900], rtol=1e-5)


# ------------------------------------------------------------ grids


def test_grids_are_the_published_ones() -> None:
    """EDM, table 1: VP's times, VE's variances, iDDPM's indices."""
    i, n = np.arange(10), 10
    low, high = VP().sigma(1e-3), VP().sigma(1.0)
    times = [VP().time(s) for s in grid("vp", n, low, high, 7, Linear())[:-1]]
    np.testing.assert_allclose(times, 1 + i / (n - 1) * (1e-3 - 1), rtol=1e-8)
    variances = 100**2 * (0.02**2 / 100**2) ** (i / (n - 1))
    np.testing.assert_allclose(geometric_sigmas(n, 0.02, 100)[:-1] ** 2, variances)
    u = iddpm_levels()
    np.testing.assert_array_equal(
        iddpm_sigmas(n, 0.0, u[8])[:-1], u[np.round(8 + (1000 - 8) / (n - 1) * i).astype(int)]
    )


@pytest.mark.parametrize("discretisation", ["edm", "vp", "ve", "iddpm", "time"])
@pytest.mark.parametrize("steps", [1, 2, 17])
def test_every_grid_falls_from_sigma_max_to_0(discretisation: str, steps: int) -> None:
    (low, high), levels_of_iddpm = SamplerSpec(discretisation=discretisation).levels, iddpm_levels()
    levels = grid(discretisation, steps, low, high, 7, schedule("cosine", low, high))
    assert len(levels) == steps + 1
    assert (np.diff(levels) < 0).all()
    assert levels[-1] == 0
    assert levels[0] == pytest.approx(high, rel=0.02 if discretisation == "iddpm" else 1e-9)
    if steps > 1:
        assert levels[-2] == pytest.approx(
            max(low, levels_of_iddpm[-2]) if discretisation == "iddpm" else low, rel=1e-9
        )


def test_even_steps_in_the_time_of_flow_matching() -> None:
    times = [Flow().time(s) for s in even_sigmas(5, 0.01, 80, Flow())[:-1]]
    np.testing.assert_allclose(np.diff(times), np.diff(times)[0])


def test_more_steps_than_discrete_levels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"60 steps, but iDDPM has \d+ levels from 0.1 to 0.11"):
        iddpm_sigmas(60, 0.1, 0.11)


# ------------------------------------------------------------ paths


def test_a_reversed_path_rises_over_the_same_levels() -> None:
    sigmas = karras_sigmas(6, 0.002, 80, 7)
    path = staggered({"a": sigmas, "b": sigmas}, 0.5, {"a": Cosine(), "b": LogSNR()})
    back = path.reversed()
    assert back.rising and not path.rising
    assert [back.sigma(i) for i in range(back.steps + 1)] == [path.sigma(path.steps - i) for i in range(path.steps + 1)]
    assert evaluations(updates(back)) == evaluations(updates(path))
    assert path.sigma(0)["a"] == pytest.approx(80)


def test_paths_that_turn_round_or_sink_below_0_are_refused() -> None:
    with pytest.raises(ValueError, match="'b' must never fall, if others rise"):
        Path({"a": np.array([0.0, 1.0]), "b": np.array([1.0, 0.0])}, {"a": Linear(), "b": Linear()})
    with pytest.raises(ValueError, match="levels of 'a' must be at 0 or above"):
        together({"a": [1.0, -1.0]})
