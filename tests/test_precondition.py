"""Parametrisations against reference networks, what each predicts, its levels, and the denoiser that its loss wants."""

# ruff: noqa: E501 (a table of mistakes has one a line)

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from exact import Mixture, OneVariable, distance, last, normal_batch
from fixture_files import fixture
from recipe_text import changed, message, write
from torch import Tensor, nn

from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.formulation import preconditioning, training_noise
from chaindiff.chain.variable import Variable
from chaindiff.edm.denoiser import Levels, Prediction, State
from chaindiff.edm.random import Draws
from chaindiff.edm.schedules import VP, iddpm_levels
from chaindiff.edm.solvers import solve
from chaindiff.guidance.algebra import Wrapper
from chaindiff.io.errors import UserError
from chaindiff.networks.prior import Prior
from chaindiff.networks.unet import UNet
from chaindiff.specs.network import PriorSpec
from chaindiff.specs.noise import (
    CosineNoiseSpec,
    IddpmSpec,
    LogitNormalSpec,
    NoiseSpec,
    Precondition,
    UniformTimeSpec,
    VeSpec,
    VpSpec,
)
from chaindiff.specs.sampling import SamplerSpec
from chaindiff.specs.stage import StageSpec
from chaindiff.specs.validate import config

KINDS = ["edm", "x0", "v", "flow", "vp", "ve", "iddpm"]
SPREAD = 0.5  # sigma_data
# The level that a label tells, of every kind.
LEVEL = {
    "edm": lambda label: (4 * label).exp(),
    "x0": lambda label: (4 * label).exp(),
    "v": lambda label: (label / 1000 * math.pi / 2).tan(),
    "flow": lambda label: label / 1000 / (1 - label / 1000),
    "vp": lambda label: VP().sigma(label / 999),
    "ve": lambda label: 2 * label.exp(),
    "iddpm": lambda label: torch.tensor(iddpm_levels())[(999 - label).long()],
}


def built(kind: str):
    return preconditioning(config(Precondition, {"kind": kind}, "precondition"), SPREAD)


@pytest.mark.parametrize("kind", ["edm", "vp", "ve", "iddpm"])
def test_preconditioned_networks_equal_the_reference(kind: str) -> None:
    """In float64; iDDPM's network has learned variances besides."""
    tensors, metadata = fixture(f"precond_{kind}")
    kwargs = json.loads(metadata["kwargs"])
    network = UNet(
        16,
        3,
        3,
        learns_variances=kind == "iddpm",
        channels=kwargs["model_channels"],
        mult=kwargs["channel_mult"],
        blocks=kwargs["num_blocks"],
        attention=kwargs["attn_resolutions"],
    )
    prefix = "state.model."
    network.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    stage = Diffusion(Variable.image("image", 3, 16), network=network, precondition=kind).double().eval()
    x, sigma = tensors["in.x"].double(), tensors["in.sigma"].double().flatten()
    denoised = stage.bind({})({"image": x}, {"image": sigma}).x0["image"]
    error = (denoised - tensors["out.D"]).norm() / tensors["out.D"].norm()
    assert error < 1e-5


def published(kind: str, clean: Tensor, noise: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a network sees, what it is asked to predict, and the weight of its squared error, as published."""
    noisy, alpha, t = clean + sigma * noise, 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma)
    one, total = torch.ones_like(sigma), (SPREAD**2 + sigma**2).sqrt()
    return {
        "edm": (noisy / total, (clean * sigma**2 - noise * sigma * SPREAD**2) / (sigma * SPREAD * total), one),
        "x0": (noisy / total, clean, one),
        "v": (alpha * clean + alpha * sigma * noise, alpha * noise - alpha * sigma * clean, one),
        "flow": ((1 - t) * clean + t * noise, noise - clean, one),
        "vp": (alpha * clean + alpha * sigma * noise, noise, one),
        "ve": (noisy, -noise, one),
        "iddpm": (alpha * clean + alpha * sigma * noise, noise, one),
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_networks_see_and_predict_what_was_published(kind: str) -> None:
    sigma = torch.tensor(iddpm_levels()[[990, 900, 600, 300, 20]])
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(5, generator=generator).double() for _ in range(2))
    noisy, parametrisation = clean + sigma * noise, built(kind)
    c, (seen, target, weight) = parametrisation(sigma), published(kind, clean, noise, sigma)
    torch.testing.assert_close(c.input * noisy, seen)
    torch.testing.assert_close((clean - c.skip * noisy) / c.out, target)
    torch.testing.assert_close(parametrisation.weight(sigma) * c.out**2, weight)
    torch.testing.assert_close(LEVEL[kind](c.noise), sigma)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_span_what_a_network_expects(kind: str) -> None:
    known = built(kind)
    low, high = max(known.sigma_min, 0.002), min(known.sigma_max, 80)
    labels = known(torch.tensor([low, high, 0.0])).noise
    assert labels.isfinite().all()
    assert known.label_span / 2 < (labels[1] - labels[0]).abs() < 10 * known.label_span


# ------------------------------------------------------------ training


SQUARE = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])  # clean and noise: unit, uncorrelated


class Scaled(OneVariable):
    """F(x) = theta x: on Gaussian data the exact denoiser of one level is of this form, in every parametrisation."""

    def __init__(self, theta: float):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))

    def one(self, x, noise_labels, class_labels) -> Tensor:
        return self.theta * x


class Known(Draws):
    def normal(self, *role, shape=()) -> Tensor:
        return SQUARE[:, 1:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sigma", [0.05, 0.6, 7.0])
def test_the_loss_is_least_at_the_exact_denoiser(kind: str, sigma: float) -> None:
    """Data of standard deviation s: the gradient vanishes where D = s^2 / (s^2 + sigma^2) x, and the loss is known."""
    spread, parametrisation = 0.3, built(kind)
    level = torch.tensor([sigma]).double()
    c, weight = parametrisation(level), parametrisation.weight(level).item()
    exact = spread**2 / (spread**2 + sigma**2)
    theta = ((exact - c.skip) / (c.out * c.input)).item()
    stage = Diffusion(Variable.vector("v", 1), network=Scaled(theta), precondition=kind)
    stage.noise = lambda draws: torch.full((4,), sigma)
    loss = stage.loss({"v": spread * SQUARE[:, :1]}, Known(range(4), 0, "v")).mean()
    loss.backward()
    curvature = 2 * weight * (c.out * c.input).item() ** 2 * (spread**2 + sigma**2)
    assert stage.network.theta.grad.item() == pytest.approx(0, abs=2e-4 * curvature * max(abs(theta), 1))
    assert loss.item() == pytest.approx(weight * spread**2 * sigma**2 / (spread**2 + sigma**2), rel=1e-3)


def normal_cdf(mean: float, std: float):
    return lambda sigma: torch.special.ndtr((sigma.log() - mean) / std)


NOISES = [
    (NoiseSpec(), normal_cdf(-1.2, 1.2)),
    (LogitNormalSpec(kind="logit_normal"), normal_cdf(0, 1)),
    (UniformTimeSpec(kind="uniform_time"), lambda sigma: (sigma / (1 + sigma) - 1e-3) / 0.998),
    (CosineNoiseSpec(kind="cosine"), lambda sigma: sigma.atan() * 2 / math.pi),
    (VpSpec(kind="vp"), VP().time),
    (VeSpec(kind="ve"), lambda sigma: (sigma / 0.02).log() / math.log(100 / 0.02)),
]


@pytest.mark.parametrize(("spec", "cdf"), NOISES, ids=[spec.kind for spec, _ in NOISES])
def test_levels_of_training_have_the_published_distribution(spec, cdf) -> None:
    count = 4000
    sigma = training_noise(spec)(Draws(range(count), 0, spec.kind))
    assert sigma.shape == (count,)
    assert (sigma > 0).all() and sigma.isfinite().all()
    assert distance(sigma, cdf) < 1.95 / math.sqrt(count)  # 999 in 1000


def test_discrete_levels_are_equally_likely() -> None:
    sigma = training_noise(IddpmSpec(kind="iddpm"))(Draws(range(4000), 0, "iddpm")).double().numpy()
    levels = iddpm_levels()[:-1]
    index = np.abs(sigma[:, None] - levels).argmin(1)
    np.testing.assert_allclose(sigma, levels[index], rtol=1e-6)
    assert (
        distance(torch.tensor((index + np.random.default_rng(0).random(4000)) / 1000), lambda u: u) < 1.95 / 4000**0.5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_finite_at_the_published_levels(kind: str) -> None:
    stage = Diffusion(Variable.vector("v", 4), network=Scaled(0.1), precondition=kind)
    loss = stage.loss({"v": normal_batch((4,), range(500), 0).float() / 2}, Draws(range(500), 0, "v"))
    assert loss.isfinite().all()


# ------------------------------------------------------------ sampling


class ExactNetwork(OneVariable):
    """The network for which a parametrisation is the exact denoiser of a mixture."""

    def __init__(self, kind: str, mixture: Mixture):
        super().__init__()
        self.kind, self.mixture, self.unused = kind, mixture, nn.Parameter(torch.zeros(1))

    def one(self, x, noise_labels, class_labels) -> Tensor:
        sigma = LEVEL[self.kind](noise_labels)[:, None]
        c = built(self.kind)(sigma[:, 0])
        noisy = x / c.input[:, None]
        clean = torch.cat(
            [self.mixture({"x": n[None]}, {"x": float(s)}).x0["x"] for n, s in zip(noisy, sigma, strict=True)]
        )
        return (clean - c.skip[:, None] * noisy) / c.out[:, None]


def mixture() -> Mixture:
    means = torch.tensor([[-0.6, 0.2, 0.1], [0.5, 0.4, -0.3]]).double()
    return Mixture(means, 0.2, torch.tensor([0.3, 0.7]).double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", ["linear", "vp"])
def test_every_parametrisation_of_one_denoiser_gives_the_same_samples(kind: str, schedule: str) -> None:
    """On the same levels; a discrete model's grid is rounded to its own, and the reference runs on the rounded grid."""
    sampler = SamplerSpec(steps=9, sigma_min=0.05, sigma_max=50, schedule=schedule)
    stage = Diffusion(
        Variable.vector("x", 3), network=ExactNetwork(kind, mixture()).double(), precondition=kind, sampler=sampler
    )
    start = normal_batch((3,), range(3), 0, "start")
    found = last(stage.sample({}, Draws(range(3), 0), start={"x": start}))["x"]
    path = stage.path()
    state = {"x": start * path.sigma(0)["x"]}
    torch.testing.assert_close(found, last(solve(mixture(), state, path))["x"], rtol=1e-7, atol=1e-8)


def test_a_discrete_model_samples_on_its_own_levels_alone() -> None:
    network = Scaled(0.1)
    stage = Diffusion(Variable.vector("x", 3), network=network, precondition="iddpm", sampler=SamplerSpec(steps=12))
    levels = [stage.path().sigma(i)["x"] for i in range(13)]
    assert set(levels) <= set(iddpm_levels())
    assert levels[0] == pytest.approx(80, rel=0.1) and levels[-2] == iddpm_levels()[-2] and levels[-1] == 0
    known = stage.precondition
    assert (known.sigma_min, known.sigma_max) == (iddpm_levels()[-2], iddpm_levels()[0])
    assert known.round(70.0) == min(iddpm_levels(), key=lambda u: abs(u - 70))
    seen = []

    class Watched(Wrapper):
        def __call__(self, x: State, sigma: Levels) -> Prediction:
            seen.append(sigma["x"])
            return super().__call__(x, sigma)

    last(stage.sample({}, Draws(range(1), 0), sampler={"churn": {"amount": 10}}, wrap=Watched))
    assert seen and all(np.abs(iddpm_levels() / s - 1).min() < 1e-6 for s in seen)


def test_levels_that_nobody_said_are_kept_within_what_the_network_knows() -> None:
    stage = Diffusion(Variable.vector("x", 3), network=Scaled(0.1), precondition="ve", sampler=SamplerSpec(steps=4))
    assert stage.path().sigma(3)["x"] == pytest.approx(0.02)
    stage = Diffusion(
        Variable.vector("x", 3),
        network=Scaled(0.1),
        precondition=VeSpec(kind="ve", sigma_max=50),
        sampler=SamplerSpec(steps=4, discretisation="ve"),
    )
    assert stage.path().sigma(0)["x"] == pytest.approx(50)


@pytest.mark.parametrize(("field", "level"), [("sigma_min", 0.002), ("sigma_max", 120.0)])
def test_levels_outside_what_the_network_knows_are_refused(field: str, level: float) -> None:
    with pytest.raises(UserError) as error:
        Diffusion(
            Variable.vector("x", 3), network=Scaled(0.1), precondition="ve", sampler=SamplerSpec(**{field: level})
        )
    assert str(error.value) == (
        f"stages.x.sample.{field}: {level:g} is outside the noise levels of preconditioning 've', from 0.02 to 100\n"
        "  leave it out: the default lies within that range"
    )


def test_a_prior_embeds_times_and_logarithms_alike() -> None:
    """Times up to 1000 enter its sinusoids as they are, logarithms a thousandfold."""
    spec = PriorSpec(kind="prior", width=8, depth=1, heads=2)
    for kind, scale in (("edm", 1000), ("x0", 1000), ("ve", 1000), ("v", 1), ("vp", 1), ("iddpm", 1)):
        network = Diffusion(Variable.vector("x", 3), network=spec, precondition=kind).network
        assert isinstance(network, Prior) and network.label_scale == scale


# ------------------------------------------------------------ recipes


def stage_of(**fields) -> StageSpec:
    return StageSpec.model_validate({"network": {"kind": "unet"}, "train": {"images": 1}, **fields})


@pytest.mark.parametrize(
    ("kind", "noise"),
    [("edm", "lognormal"), ("x0", "lognormal"), ("v", "cosine"), ("flow", "logit_normal"), ("vp", "vp"), ("ve", "ve")],
)
def test_every_parametrisation_has_its_published_noise(kind: str, noise: str) -> None:
    spec = stage_of(precondition={"kind": kind})
    assert spec.noise.kind == noise
    assert stage_of(precondition={"kind": kind}, noise={"kind": noise}) == spec
    assert StageSpec.model_validate(spec.model_dump(mode="json")) == spec
    assert type(Diffusion(Variable.vector("x", 3), network=Scaled(0.1), precondition=kind).noise) is type(
        training_noise(spec.noise)
    )


def test_what_is_said_by_default_leaves_no_trace_and_all_else_does() -> None:
    """Weights are found by what remains of these fields without defaults."""

    def trace(**fields) -> dict:
        return stage_of(**fields).model_dump(include={"precondition", "noise"}, exclude_defaults=True)

    assert trace() == trace(precondition={"kind": "edm"}, noise={"mean": -1.2}) == {}
    assert trace(precondition={"kind": "x0"}) == {"precondition": {"kind": "x0"}}
    assert trace(noise={"mean": 0}) == {"noise": {"mean": 0}}
    noises = [{"kind": k} for k in ("cosine", "logit_normal", "uniform_time", "vp", "ve", "iddpm", "lognormal")]
    traces = [json.dumps(trace(precondition=p, noise=n)) for p in ({"kind": "edm"}, {"kind": "v"}) for n in noises]
    assert len(set(traces)) == len(traces)


PLACE = "    train: {images: 1000}\n    sample"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("precondition: {kind: vpp}", "r.yaml:23: stages.image.precondition.kind: unknown kind 'vpp'; did you mean 'vp'?"),
        ("precondition: {kind: v, beta_d: 3}", "r.yaml:23: stages.image.precondition: unknown field 'beta_d'"),
        ("noise: {kind: ve, mean: 3}", "r.yaml:23: stages.image.noise: unknown field 'mean'; known: kind, sigma_min, sigma_max"),
        ("noise: {std: 0}", "r.yaml:23: stages.image.noise.std: should be above 0, not 0"),
        (
            "precondition: {kind: vp}\n    noise: {kind: lognormal}",
            "r.yaml:24: stages.image.noise: a network of kind vp needs training noise of kind vp with the same numbers; "
            "leave `noise` out, or use precondition: {kind: edm}, which takes noise of kind lognormal",
        ),
        ("precondition: {kind: ve}\n    noise: {kind: ve, sigma_max: 50}", "a network of kind ve needs training noise of kind ve"),
        ("precondition: {kind: ve, sigma_min: 200}", "stages.image.precondition.sigma_min: 200 should be below sigma_max, 100"),
        ("noise: {kind: uniform_time, min: 0.5, max: 0.2}", "stages.image.noise.min: 0.5 should be below max, 0.2"),
    ],
)  # fmt: skip
def test_mistakes_in_a_formulation_are_explained(tmp_path, monkeypatch, lines: str, expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, changed(PLACE, f"    {lines}\n{PLACE}"))
    assert expected in message("r.yaml")


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        ("{discretisation: ve, rho: 3}", "r.yaml:24: stages.image.sample.rho: shapes the steps of discretisation edm alone"),
        ("{eta: 1}", "r.yaml:24: stages.image.sample.eta: is for ddim and dpmpp_2m; heun takes its noise from `churn`"),
        ("{solver: ddim, eta: 1, churn: {amount: 3}}", "stages.image.sample.eta: and churn both add noise to every step"),
        ("{sigma_max: 0.001}", "stages.image.sample.sigma_max: 0.001 should be above sigma_min, 0.002"),
        ("{solver: ddim, eta: 1.5}", "stages.image.sample.eta: should be at most 1, not 1.5"),
        ("{schedule: karras}", "stages.image.sample.schedule: 'karras' is not one of linear, vp, ve, iddpm, cosine, logsnr, flow"),
    ],
)  # fmt: skip
def test_mistakes_in_a_sampler_are_explained(tmp_path, monkeypatch, sample: str, expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, changed("{steps: 18}", sample))
    assert expected in message("r.yaml")


def test_random_features_of_ncsnpp_do_not_take_times(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = changed("kind: unet", "kind: unet\n      arch: ncsnpp").replace(
        PLACE, f"    precondition: {{kind: v}}\n{PLACE}"
    )
    write(tmp_path, text)
    assert "r.yaml:20: stages.image.network.arch: ncsnpp embeds the logarithm of a level" in message("r.yaml")


def test_levels_outside_are_found_when_a_recipe_is_planned(tmp_path, monkeypatch) -> None:
    from chaindiff.recipe.assembly import Assembly
    from chaindiff.specs.load import load_recipe

    monkeypatch.chdir(tmp_path)
    text = changed(PLACE, f"    precondition: {{kind: ve}}\n{PLACE}").replace("{steps: 18}", "{sigma_min: 0.01}")
    write(tmp_path, text)
    with pytest.raises(UserError) as error:
        _ = Assembly(load_recipe("r.yaml")).chain().plan(given=["category"]).costs
    assert str(error.value).startswith("r.yaml:25: stages.image.sample.sigma_min: 0.01 is outside the noise levels")
