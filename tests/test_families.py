"""Path families: the levels that training draws against published formulas, and the paths that sampling follows."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from chaindiff.chain.formulation import curves, family
from chaindiff.edm.families import Along, Drawn, Independent, Ruler, follow, staggered_curves
from chaindiff.edm.noise import LogNormal, Shifted
from chaindiff.edm.precondition import Direct
from chaindiff.edm.random import Draws
from chaindiff.edm.schedules import Flow
from chaindiff.specs.path import TrainPath
from chaindiff.specs.validate import config

COUNT = 40_000
NAMES = ["semantic", "texture"]
NORMAL = LogNormal(0, 1)
ERROR = 4 / math.sqrt(COUNT)  # four standard deviations of a share, at most 1/2 each


def draw(said: dict, noise: Callable[[Draws], Tensor] = NORMAL, names: list[str] = NAMES) -> Drawn:
    known = family(config(TrainPath, said, "path"), names)
    return known.draw(Draws(range(COUNT), 0, "stage"), dict.fromkeys(names, noise), dict.fromkeys(names, 80.0))


def times(levels: Tensor) -> Tensor:
    """The published time: 1 at the data."""
    return 1 - Flow().time(levels.double())


def test_semantic_first_diffusion_draws_its_published_times() -> None:
    """t ~ logit-normal(0, 1), t_sem = min(1, 1.3 t), t_tex = max(0, 1.3 t - 0.3): 11.4% lie at each clipped end."""
    drawn = draw({"kind": "offset", "offset": 0.3, "time": "flow"})
    semantic, texture = (times(drawn.levels[name]) for name in NAMES)
    atom = stats.norm.cdf(-math.log((1 / 1.3) / (1 - 1 / 1.3)))
    assert atom == pytest.approx(0.114, abs=5e-4)
    pure = float(times(torch.tensor(80.0)))  # our pure noise is a finite level
    assert abs(float((semantic == 1).double().mean()) - atom) < ERROR
    assert abs(float((texture <= pure + 1e-7).double().mean()) - stats.norm.cdf(_logit((0.3 + pure) / 1.3))) < ERROR
    inside = (semantic < 1) & (texture > pure + 1e-7)
    assert (semantic - texture)[inside].sub(0.3).abs().max() < 1e-4
    whole = (texture[inside] + 0.3) / 1.3
    low, high = stats.norm.cdf([_logit((0.3 + pure) / 1.3), _logit(1 / 1.3)])
    shares = (stats.norm.cdf(np.array([_logit(float(t)) for t in whole])) - low) / (high - low)
    assert stats.kstest(shares, "uniform").pvalue > 1e-3


def _logit(t: float) -> float:
    return math.log(t / (1 - t))


def test_latent_forcing_learns_one_variable_at_a_time() -> None:
    """With probability 0.4 the features, images pure noise; else images, features at times within 0.25 of the data."""
    drawn = draw({"kind": "cascaded", "shares": {"semantic": 0.4, "texture": 0.6}, "finished": 0.25})
    first, second = (drawn.counted[name] for name in NAMES)
    assert torch.equal(first, ~second) and abs(float(first.double().mean()) - 0.4) < ERROR
    assert (drawn.levels["texture"][first] == 80).all()
    finished = Flow().time(drawn.levels["semantic"][second].double())
    assert stats.kstest(finished.numpy(), stats.uniform(0, 0.25).cdf).pvalue > 1e-3
    for name, learned in ((NAMES[0], first), (NAMES[1], second)):
        assert stats.kstest(drawn.levels[name][learned].double().log().numpy(), "norm").pvalue > 1e-3
    exact = draw({"kind": "cascaded"})
    assert (exact.levels["semantic"][exact.counted["texture"]] == 0).all()


def test_redi_and_reg_share_one_level() -> None:
    levels = draw({"kind": "shared", "time": "flow"}).levels
    assert torch.allclose(levels["semantic"], levels["texture"])
    assert stats.kstest(levels["semantic"].clamp(max=79.9).double().log().numpy(), "norm").pvalue > 1e-3


def test_rae_shifts_the_time_by_the_root_of_its_dimension() -> None:
    """t' = s t / (1 + (s - 1) t) with s = sqrt(16 * 16 * 768 / 4096), t the time of flow matching."""
    shift = math.sqrt(16 * 16 * 768 / 4096)
    draws = Draws(range(1000), 0, "stage")
    before, after = (Flow().time(noise(draws).double()) for noise in (LogNormal(0, 1), Shifted(LogNormal(0, 1), shift)))
    assert torch.allclose(after, shift * before / (1 + (shift - 1) * before), atol=1e-6)


def test_a_predicted_clean_value_with_velocity_loss_is_the_loss_of_the_velocity() -> None:
    """v = (x0 - z) / max(1 - t, 0.05) with z = t x + (1 - t) noise, on both sides of the error."""
    generator = torch.Generator().manual_seed(0)
    clean, guess, noise = torch.randn(3, 64, dtype=torch.float64, generator=generator)
    sigma = torch.logspace(-3, 2, 64, dtype=torch.float64)
    t = 1 / (1 + sigma)
    seen, width = t * clean + (1 - t) * noise, (1 - t).clamp_min(0.05)
    published = ((guess - seen) / width - (clean - seen) / width).square()
    assert torch.allclose(Direct(velocity=True).weight(sigma) * (guess - clean).square(), published)


@pytest.mark.parametrize("time", ["edm", "flow", "cosine", "logsnr"])
def test_a_ruler_reads_what_it_marks(time: str) -> None:
    ruler, progress = Ruler(time), torch.linspace(0.03, 0.97, 50, dtype=torch.float64)
    assert torch.allclose(ruler.progress(ruler.sigma(progress)), progress, atol=1e-9)
    ends = ruler.sigma(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([80.0, 0.0]) and (ruler.sigma(progress).diff() < 0).all()


def test_curves_of_an_offset_are_clipped_lines() -> None:
    names, whole = ["a", "b", "c"], torch.linspace(0, 1, 101, dtype=torch.float64)
    for offset in (0.0, 0.3, 1.0):
        for place, curve in enumerate(staggered_curves(names, offset).values()):
            expected = ((1 + 2 * offset) * whole - offset * place).clamp(0, 1)
            assert torch.allclose(follow(curve, whole), expected, atol=1e-12)


def test_shares_and_mixtures_are_as_often_as_said() -> None:
    names = ["a", "b", "c"]
    drawn = draw({"exact": 0.3, "pure": 0.2, "absent": 0.1}, names=names)
    levels = torch.stack([drawn.levels[name] for name in names])
    absent = torch.stack([drawn.absent[name] for name in names])
    known, pure = (levels == 0).any(0), (levels == 80).any(0)
    for share, seen in ((0.3, known), (0.2, pure), (0.1, absent.any(0))):
        assert abs(float(seen.double().mean()) - share) < ERROR
    assert not (known & pure).any() and not (levels == 0).all(0).any() and not absent.all(0).any()
    subsets = (levels[:, known] == 0).long().T @ torch.tensor([1, 2, 4])
    assert (subsets.bincount(minlength=8)[1:7] / len(subsets) - 1 / 6).abs().max() < 0.02
    counted = torch.stack([drawn.counted[name] for name in names])
    assert torch.equal(counted, (levels > 0) & ~absent)
    parts = [{"share": 3, "levels": {"kind": "shared"}}, {"levels": {"kind": "cascaded"}}]
    mixed = draw({"kind": "mixture", "parts": parts})
    together = mixed.levels["semantic"] == mixed.levels["texture"]
    assert abs(float(together.double().mean()) - 0.75) < ERROR


def test_shares_can_be_of_some_variables_only() -> None:
    """ReDi: the features alone are dropped, in a fifth of the samples; the image is learned there."""
    said = {"kind": "shared", "absent": 0.2, "exact": 0.1, "only": ["semantic"]}
    drawn, known = draw(said), family(config(TrainPath, said, "path"), NAMES)
    assert abs(float(drawn.absent["semantic"].double().mean()) - 0.2) < ERROR and not drawn.absent["texture"].any()
    assert abs(float((drawn.levels["semantic"] == 0).double().mean()) - 0.1) < ERROR
    assert (drawn.levels["texture"] > 0).all() and drawn.counted["texture"].all()
    assert torch.equal(drawn.counted["semantic"], ~drawn.absent["semantic"] & (drawn.levels["semantic"] > 0))
    assert known.known(NAMES) == {frozenset({"semantic"})}
    assert known.drew({"semantic": 0.0, "texture": 3.0}) and not known.drew({"semantic": 3.0, "texture": 0.0})
    three = ["a", "b", "c"]
    subsets = draw({"exact": 1.0, "pure": 0.0, "only": ["c", "b"]}, names=three).levels
    chosen = torch.stack([subsets[name] == 0 for name in three])
    assert not chosen[0].any() and chosen.any(0).all()
    for pair in ((True, True), (True, False), (False, True)):
        here = (chosen[1] == pair[0]) & (chosen[2] == pair[1])
        assert abs(float(here.double().mean()) - 1 / 3) < ERROR


def test_one_variable_alone_draws_its_own_noise() -> None:
    draws, noise = Draws(range(50), 0, "stage"), LogNormal()
    for said in ({}, {"exact": 0.5, "absent": 0.5, "pure": 0.0}):
        drawn = family(config(TrainPath, said, "path"), ["a"]).draw(draws, {"a": noise}, {"a": 80.0})
        assert torch.equal(drawn.levels["a"], noise(draws)) and not drawn.absent
    assert Independent().known(["a"]) == set()


def test_a_table_is_followed_with_its_kinks() -> None:
    points = {"a": [(0, 0), (0.4, 1), (1, 1)], "b": [(0, 0), (0.37, 0.1), (1, 1)]}
    known = curves(config(TrainPath, {"kind": "table", "points": points}, "path"), ["a", "b"])
    path = known.path(["a", "b"], 10)
    whole = np.unique(np.round(np.linspace(0, 1, 101), 3))
    levels = {v: path.times[v] for v in "ab"}
    assert levels["a"][0] == levels["b"][0] == pytest.approx(80) and levels["a"][-1] == levels["b"][-1] == 0
    kink = float(Ruler().sigma(torch.tensor([0.1], dtype=torch.float64)))
    assert np.abs(levels["b"] - kink).min() < 1e-9 and 10 <= path.steps <= 12
    for step in range(path.steps + 1):  # every grid point lies on the curves
        at = {v: float(Ruler().progress(torch.tensor([levels[v][step]], dtype=torch.float64))) for v in "ab"}
        miss = [
            max(abs(np.interp(u, *zip(*points[v], strict=True)) - at[v]) for v in "ab")
            for u in [*whole, *np.linspace(0, 1, path.steps + 1), 0.37, 0.4]
        ]
        assert min(miss) < 0.03
    alone = known.path(["a"], 4)  # the other is given: no step is lost on its part of the path
    assert alone.steps == 4 and (np.diff(alone.times["a"]) < 0).all()


@pytest.mark.parametrize(
    ("trained", "levels", "drawn"),
    [
        ({"kind": "shared"}, (1.0, 1.0), True),
        ({"kind": "shared"}, (0.1, 10.0), False),
        ({"kind": "shared"}, (0.0, 1.0), False),
        ({"kind": "shared", "exact": 0.1}, (0.0, 1.0), True),
        ({"kind": "shared", "pure": 0.1}, (1.0, 80.0), True),
        ({"kind": "offset", "offset": 0.3}, (1.0, 1.0), False),
        ({"kind": "offset", "offset": 1.0}, (1.0, 80.0), True),
        ({"kind": "offset", "offset": 1.0}, (0.0, 1.0), True),
        ({"kind": "cascaded"}, (0.0, 1.0), True),
        ({"kind": "cascaded"}, (0.2, 1.0), False),
        ({"kind": "cascaded", "finished": 0.25}, (0.2, 1.0), True),
        ({"kind": "independent", "exact": 0, "pure": 0}, (0.1, 10.0), True),
        ({"kind": "independent", "exact": 0, "pure": 0}, (0.0, 10.0), False),
        ({"kind": "mixture", "parts": [{"levels": {"kind": "shared"}}, {"levels": {"kind": "cascaded"}}]}, (0, 1), 1),
    ],
)  # fmt: skip
def test_a_family_knows_which_levels_it_draws(trained: dict, levels: tuple[float, float], drawn: bool) -> None:
    assert family(config(TrainPath, trained, "path"), NAMES).drew(dict(zip(NAMES, levels, strict=True))) == drawn


def test_what_can_be_given_is_what_training_had_at_level_zero() -> None:
    def known(said: dict) -> set[frozenset[str]]:
        return family(config(TrainPath, said, "path"), ["a", "b", "c"]).known(["a", "b", "c"])

    first, two = frozenset("a"), frozenset("ab")
    assert known({"kind": "shared"}) == set() and known({"kind": "independent", "exact": 0}) == set()
    assert known({"kind": "offset", "offset": 0.2}) == known({"kind": "cascaded"}) == {first, two}
    assert len(known({"kind": "shared", "exact": 0.1})) == 6
    assert isinstance(family(config(TrainPath, {"kind": "shared"}, "path"), NAMES), Along)
