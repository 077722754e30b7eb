"""Guidance as denoisers of denoisers: exact on Gaussians, counted exactly, differentiable."""

from __future__ import annotations

import math

import pytest
import torch
from exact import Exact, Gaussians, JointGaussian, OneVariable, last
from torch import Tensor

import chaindiff as cd
from chaindiff.edm.denoiser import Levels, Prediction, State
from chaindiff.guidance.classifier_free import guidance_terms


class Normal(Exact):
    """The exact denoiser of N(mean, std^2) of one variable called x."""

    def __init__(self, mean: float = 0.0, std: float = 0.5):
        self.mean, self.std = mean, std

    def __call__(self, x: State, sigma: Levels) -> Prediction:
        self.calls += 1
        total = self.std**2 + sigma["x"] ** 2
        return Prediction({"x": (x["x"] * self.std**2 + self.mean * sigma["x"] ** 2) / total})


SIGMAS = cd.karras_sigmas(80, 0.002, 80, 7)
PATH = cd.together({"x": SIGMAS})


def flowed(denoiser: cd.Denoiser, start: Tensor, path: cd.Path = PATH) -> Tensor:
    return last(cd.solve(denoiser, {"x": start}, path))["x"]


# ------------------------------------------------------------ weighted sums


def test_guidance_of_two_gaussians_is_the_flow_of_the_guided_mean() -> None:
    """N(a, s^2) and N(b, s^2) with weights w and 1 - w: D is the denoiser of N(w a + (1 - w) b, s^2), exactly."""
    w, a, b = 3.0, 0.4, -0.1
    mean = w * a + (1 - w) * b
    start = torch.linspace(-160, 160, 7).double()[:, None]
    guided = flowed(cd.guided([(Normal(a), w), (Normal(b), 1 - w)]), start)
    torch.testing.assert_close(guided, flowed(Normal(mean), start))
    closed = mean + (start - mean) * 0.5 / math.sqrt(0.25 + 80**2)
    torch.testing.assert_close(guided, closed, rtol=0, atol=5e-3)


def test_autoguidance_by_a_wider_gaussian_narrows_as_its_closed_form_says() -> None:
    """Autoguidance (Karras et al. 2024): the weak model is too wide. In one dimension, with centred Gaussians of
    variances a and b, dx/ds = s x (w / (a + s^2) + (1 - w) / (b + s^2)): the flow is a product of both flows."""
    strong, weak, w = Normal(0.0, 0.5), Normal(0.0, 1.0), 2.0
    start = torch.tensor([[120.0]]).double()
    found = flowed(cd.guided([(strong, w), (weak, 1 - w)]), start)
    expected = start
    for std, weight in ((0.5, w), (1.0, 1 - w)):
        expected = expected * (std**2 / (std**2 + 80**2)) ** (weight / 2)
    torch.testing.assert_close(found, expected, rtol=5e-3, atol=0)
    assert found.abs() < flowed(strong, start).abs()


def test_terms_are_skipped_where_their_weight_is_0_and_counted_where_it_is_not() -> None:
    conditional, unconditional = Normal(0.4), Normal(-0.1)
    weights = cd.interval(2.0, 0.28, 1.61, outside=1.0), cd.interval(-1.0, 0.28, 1.61)
    guided = cd.guided(list(zip((conditional, unconditional), weights, strict=True)))
    table = cd.updates(PATH)
    last(cd.integrate(guided, {"x": torch.ones(2, 1).double()}, table))
    inside = sum(0.28 < row.sigma["x"] <= 1.61 for row in table if row.sigma is not None)
    assert unconditional.calls == inside > 0
    assert conditional.calls == cd.evaluations(table) == 159
    assert cd.evaluations(table, guided) == 159 + inside
    assert guided.evaluations({"x": 1.61}) == 2 and guided.evaluations({"x": 0.28}) == 1


def test_no_term_at_a_level_is_refused() -> None:
    with pytest.raises(ValueError, match="every term of the guidance has weight 0"):
        cd.guided([(Normal(), 0.0)])({"x": torch.ones(1, 1)}, {"x": 1.0})


# ------------------------------------------------------------ classifier-free guidance of stages


class Counting(OneVariable):
    """A network whose output is the sum of what it is told, and that counts its calls and their rows."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.rows = torch.nn.Parameter(torch.ones(())), []

    def one(self, x, noise_labels, labels):
        self.rows.append(len(x))
        return (x * 0 + labels[:, :1] + 10 * labels[:, 2:3]) * self.scale


A, B, X = cd.Variable.vector("a", 1), cd.Variable.vector("b", 1), cd.Variable.vector("x", 1)


def droppable(**sampler) -> cd.Diffusion:
    links = [(A, {"dropout": 0.1}), (B, {"dropout": 0.1})]
    return cd.Diffusion(X, given=links, network=Counting(), precondition="x0", sampler={"steps": 4, **sampler})


GIVEN = {"a": torch.tensor([[1.0], [2.0]]), "b": torch.tensor([[0.5], [0.25]])}


def test_one_scale_for_each_droppable_variable() -> None:
    """The network tells a + 10 b: with scales (2, 3) the nested differences give 2 a + 30 b (Brooks et al. 2023)."""
    x = {"x": torch.zeros(2, 1)}
    for scales, expected in (
        ({"a": 2.0, "b": 3.0}, 2 * GIVEN["a"] + 30 * GIVEN["b"]),
        ({"b": 3.0}, GIVEN["a"] + 30 * GIVEN["b"]),
        ({"a": 2.0}, 2 * GIVEN["a"] + 10 * GIVEN["b"]),
        (2.0, 2 * GIVEN["a"] + 20 * GIVEN["b"]),
        (1.0, GIVEN["a"] + 10 * GIVEN["b"]),
    ):
        stage = droppable(guidance=scales)
        torch.testing.assert_close(stage.denoiser(GIVEN)(x, {"x": 1.0}).x0["x"], expected)


@pytest.mark.parametrize(
    ("scales", "terms"), [(1.0, 1), (2.0, 2), ({"a": 2.0}, 3), ({"a": 2.0, "b": 2.0}, 2), ({"a": 2.0, "b": 3.0}, 3)]
)
def test_terms_share_one_call_of_the_network(scales, terms) -> None:
    stage = droppable(guidance=scales)
    denoiser = stage.denoiser(GIVEN)
    assert denoiser.evaluations({"x": 1.0}) == terms
    denoiser({"x": torch.zeros(2, 1)}, {"x": 1.0})
    assert stage.network.rows == [2 * terms]


def test_the_plan_counts_what_sampling_evaluates_within_the_interval_and_beyond() -> None:
    stage = droppable(guidance=2.0, guidance_interval=(0.01, 5.0))
    planned = stage.cost(["x"]).nfe
    stage.network.rows.clear()  # to count operations takes a call
    last(stage.sample(GIVEN, cd.Draws(range(2), 0)))
    assert sum(stage.network.rows) == 2 * planned
    assert set(stage.network.rows) == {2, 4} and len(stage.network.rows) == 7


def test_weights_telescope_and_vanish() -> None:
    assert guidance_terms(3.0, ["a", "b"]) == [(frozenset(), 3.0), (frozenset("ab"), -2.0)]
    assert guidance_terms({"a": 2.0, "b": 3.0}, ["a", "b"]) == [
        (frozenset(), 3.0),
        (frozenset("b"), -1.0),
        (frozenset("ab"), -1.0),
    ]
    with pytest.raises(ValueError, match="'c' is never absent in training, so it has no guidance scale"):
        guidance_terms({"c": 2.0}, ["a"])


def test_a_scale_for_what_is_never_absent_is_refused() -> None:
    stage = cd.Diffusion(X, given=[(A, {"dropout": 0.1}), B], network=Counting())
    with pytest.raises(cd.UserError, match=r"stages\.x\.sample\.guidance\.b: .* 'b', which has no `dropout`"):
        last(stage.sample(GIVEN, cd.Draws(range(2), 0), sampler={"guidance": {"b": 2.0}}))


# ------------------------------------------------------------ thresholding


class Constant(Exact):
    def __init__(self, value: Tensor):
        self.value = value

    def __call__(self, x: State, sigma: Levels) -> Prediction:
        return Prediction({"x": self.value})


def test_static_thresholding_cuts_off() -> None:
    value = torch.tensor([[-3.0, 0.2, 1.5]])
    found = cd.thresholded(Constant(value))({"x": value}, {"x": 1.0}).x0["x"]
    assert found.tolist() == [[-1.0, pytest.approx(0.2), 1.0]]
    torch.testing.assert_close(flowed(cd.thresholded(Normal(2.0, 1e-3)), torch.zeros(1, 1).double()).item(), 1.0)


def test_dynamic_thresholding_is_imagens() -> None:
    """Section 2.3: s is a percentile of |x0| of each sample; if s > 1, cut at s and divide by s."""
    value = torch.stack([torch.linspace(-4, 4, 801), torch.linspace(-0.5, 0.5, 801)])
    found = cd.thresholded(Constant(value), percentile=0.9)({"x": value}, {"x": 1.0}).x0["x"]
    s = torch.quantile(value[0].abs(), 0.9)
    torch.testing.assert_close(found[0], value[0].clamp(-s, s) / s)
    assert torch.equal(found[1], value[1])
    with pytest.raises(ValueError, match=r"expected a limit above 0 and a percentile in \(0, 1\], not 1 and 1.5"):
        cd.thresholded(Constant(value), percentile=1.5)


# ------------------------------------------------------------ known values

COVARIANCE = torch.tensor([[0.25, 0.3, -0.1, 0.0], [0.3, 1.0, 0.2, 0.1], [-0.1, 0.2, 0.5, 0.2], [0.0, 0.1, 0.2, 0.4]])


class Correlated(Exact):
    """The exact denoiser of N(0, COVARIANCE) of one variable called x, [batch, 4]."""

    def __call__(self, x: State, sigma: Levels) -> Prediction:
        self.calls += 1
        covariance = COVARIANCE.to(x["x"])
        noisy = covariance + sigma["x"] ** 2 * torch.eye(4).to(x["x"])
        return Prediction({"x": x["x"] @ torch.linalg.solve(noisy, covariance)})


VALUE, MASK = torch.tensor([[0.7, 0.0, -0.4, 0.0]]).double(), torch.tensor([[True, False, True, False]])


def conditional() -> tuple[Tensor, Tensor]:
    """Mean and covariance of the unknown entries given the known ones."""
    c, k, u = COVARIANCE.double(), [0, 2], [1, 3]
    gain = c[u][:, k] @ torch.linalg.inv(c[k][:, k])
    return gain @ VALUE[0, k], c[u][:, u] - gain @ c[k][:, u]


def test_known_entries_are_exact_and_independent_ones_are_left_alone() -> None:
    start = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double() * 80
    found = flowed(cd.known(Gaussians(x=0.5), {"x": VALUE}, {"x": MASK}), start)
    assert torch.equal(found[:, [0, 2]], VALUE[:, [0, 2]].expand(5, 2))
    torch.testing.assert_close(found[:, [1, 3]], flowed(Gaussians(x=0.5), start)[:, [1, 3]])


def test_conditioning_on_known_entries_is_the_exact_conditional_of_a_gaussian() -> None:
    """The flow is affine in the start: its offset is the conditional mean, its matrix squares to the covariance."""
    rows = torch.cat([torch.zeros(1, 4), torch.eye(4)]).double() * 80
    denoiser = cd.known(Correlated(), {"x": VALUE}, {"x": MASK}, solves=2)
    found = flowed(denoiser, rows)
    mean, covariance = conditional()
    torch.testing.assert_close(found[0, [1, 3]], mean, rtol=0, atol=0.01)
    matrix = found[1:, [1, 3]] - found[0, [1, 3]]
    torch.testing.assert_close(matrix.T @ matrix, covariance, rtol=0, atol=0.01)
    replaced = flowed(cd.known(Correlated(), {"x": VALUE}, {"x": MASK}), rows)[0, [1, 3]]
    assert (replaced - mean).abs().max() > 0.02, "replacement alone should be seen to be no conditional"
    assert denoiser.evaluations({"x": 1.0}) == 5


def test_one_prediction_given_known_entries_is_the_posterior_mean() -> None:
    """E[x0 | x, known] by the formula for Gaussians, at several levels; of several variables at levels of their own."""
    joint = JointGaussian(COVARIANCE[:2, :2].double(), "a", "b")
    x = {"a": torch.tensor([[0.9]]).double(), "b": torch.tensor([[-1.2]]).double()}
    for a, b in ((0.3, 2.0), (5.0, 0.4)):
        found = cd.known(
            joint, {"a": torch.tensor([[0.7]])}, {"a": torch.tensor([[True]])}, solves=1
        )(x, {"a": a, "b": b}).x0  # fmt: skip
        (aa, ab), (_, bb) = COVARIANCE[:2, :2].tolist()
        prior, left = ab / aa * 0.7, bb - ab**2 / aa  # of b given a = 0.7
        expected = (prior * b**2 + -1.2 * left) / (left + b**2)
        assert found["a"].item() == pytest.approx(0.7) and found["b"].item() == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------ wrappers of one's own


class Tilted(cd.Wrapper):
    """Guidance by the gradient of log y, y = exp(pull x0): D + sigma^2 grad_x (pull D(x))."""

    def __call__(self, x: State, sigma: Levels) -> Prediction:
        with torch.enable_grad():
            inside = x["x"].detach().requires_grad_()
            clean = self.inner({"x": inside}, sigma).x0["x"]
            (pull,) = torch.autograd.grad(clean.sum(), inside)
        return Prediction({"x": clean.detach() + 0.3 * sigma["x"] ** 2 * pull})


def test_a_wrapper_differentiates_through_the_denoiser() -> None:
    """p(x) exp(0.3 x) for N(0, 0.5^2) is N(0.3 * 0.25, 0.5^2), and the guided denoiser is exactly its denoiser."""
    start = torch.linspace(-100, 100, 5).double()[:, None]
    torch.testing.assert_close(flowed(Tilted(Normal()), start), flowed(Normal(0.3 * 0.25), start))


def test_a_wrapper_differentiates_through_a_stage_in_a_chain() -> None:
    class Linear(OneVariable):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

        def one(self, x, noise_labels, labels):  # F of N(0, 0.5^2) is 0 for EDM's preconditioning
            return x * self.weight

    chain = cd.Chain([cd.Diffusion(X, network=Linear(), sampler={"steps": 80})])
    plain = chain.sample(50)["x"]
    tilted = chain.sample(50, stages={"x": {"wrap": Tilted}})["x"]
    torch.testing.assert_close(tilted - plain, torch.full_like(plain, 0.3 * 0.25), rtol=0, atol=2e-3)
    assert not plain.requires_grad and not tilted.requires_grad


def test_sampling_holds_no_graph() -> None:
    stage = droppable()
    assert not any(step["x"].requires_grad for step in stage.sample(GIVEN, cd.Draws(range(2), 0)))
    assert stage.bind(GIVEN)({"x": torch.zeros(2, 1)}, {"x": 1.0}).x0["x"].requires_grad
