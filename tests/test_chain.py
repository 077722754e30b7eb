"""Chains of real stages with exact Gaussian denoisers: conditionals, sameness of samples, memory, refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from exact import OneVariable
from torch import Tensor, nn

import chaindiff as cd
from chaindiff.chain.chain import Chain, Source
from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.variable import Variable
from chaindiff.io.errors import UserError
from chaindiff.specs.link import LinkSpec
from chaindiff.specs.network import PriorSpec, UNetSpec
from chaindiff.specs.sampling import ChurnSpec, LinkSampling, SamplerSpec

# A chain of Gaussians a -> b -> c, with a -> c as well: x = W parents + N(0, variance).
VARIABLES = {name: Variable.vector(name, 2) for name in "abc"}
PARENTS = {"a": [], "b": ["a"], "c": ["a", "b"]}
WEIGHT = {
    "a": np.zeros((2, 0)),
    "b": np.array([[0.8, -0.3], [0.2, 0.5]]),
    "c": np.array([[0.5, 0.1, -0.4, 0.3], [0.0, -0.6, 0.7, 0.2]]),
}
VARIANCE = {"a": 0.25, "b": 0.16, "c": 0.09}


class ExactNetwork(OneVariable):
    """The network F for which EDM's preconditioning gives the exact denoiser of N(W given, variance)."""

    def __init__(self, name: str):
        super().__init__()
        self.weight = nn.Parameter(torch.from_numpy(WEIGHT[name]))
        self.variance = VARIANCE[name]

    def one(self, x, noise_labels, class_labels) -> Tensor:
        spread = 0.5
        sigma = (noise_labels * 4).exp()[:, None]
        noisy = x * (sigma**2 + spread**2).sqrt()
        mean = class_labels @ self.weight.T if class_labels is not None else torch.zeros_like(noisy)
        exact = (noisy * self.variance + mean * sigma**2) / (self.variance + sigma**2)
        skip = spread**2 / (sigma**2 + spread**2)
        return (exact - skip * noisy) / (sigma * spread / (sigma**2 + spread**2).sqrt())


def gaussian_chain(**sampler) -> Chain:
    settings = SamplerSpec(steps=40, **sampler)
    stages = [
        Diffusion(v, given=[VARIABLES[p] for p in PARENTS[n]], network=ExactNetwork(n), sampler=settings).double()
        for n, v in VARIABLES.items()
    ]
    return Chain(stages)


def joint_covariance() -> np.ndarray:
    """Of (a, b, c), from x = (I - W)^-1 noise."""
    coefficients, noise = np.zeros((6, 6)), np.zeros((6, 6))
    place = {n: slice(2 * i, 2 * i + 2) for i, n in enumerate("abc")}
    for n in "abc":
        for j, parent in enumerate(PARENTS[n]):
            coefficients[place[n], place[parent]] = WEIGHT[n][:, 2 * j : 2 * j + 2]
        noise[place[n], place[n]] = np.eye(2) * VARIANCE[n]
    inverse = np.linalg.inv(np.eye(6) - coefficients)
    return inverse @ noise @ inverse.T


def rows(names: tuple[str, ...]) -> list[int]:
    return [2 * "abc".index(n) + i for n in names for i in range(2)]


SUBSETS = [s for k in range(4) for s in itertools.combinations("abc", k)]
REQUESTS = [(want, given) for want in SUBSETS for given in SUBSETS if want and not set(want) & set(given)]


@pytest.mark.parametrize(("want", "given"), REQUESTS, ids=lambda names: "".join(names) or "-")
def test_accepted_requests_have_the_exact_conditional_and_others_are_refused(want, given) -> None:
    """Against the closed form: mean within 5 standard errors, covariance within 4% of the larger deviation product."""
    count = 4000
    point = {n: torch.tensor([[0.4, -0.7]], dtype=torch.float64) * (1 + "abc".index(n)) for n in given}
    # What is sampled may not be an ancestor of what is given: a is an ancestor of b and c, b of c.
    sampled = {n for w in want for n in ancestors(w, given)}
    exact_possible = not any(g in descendants(s) for s in sampled for g in given)
    chain = gaussian_chain()
    if not exact_possible:
        with pytest.raises(UserError, match="|".join(given)):
            chain.sample(8, want=want, given=point)
        return
    out = chain.sample(count, want=want, given=point, batch=count)
    got = torch.cat([out[n] for n in want], dim=1).double().numpy()
    covariance = joint_covariance()
    w, g = rows(want), rows(given)
    known = np.concatenate([point[n][0].numpy() for n in given]) if given else np.zeros(0)
    gain = covariance[np.ix_(w, g)] @ np.linalg.inv(covariance[np.ix_(g, g)]) if given else np.zeros((len(w), 0))
    mean = gain @ known
    expected = covariance[np.ix_(w, w)] - gain @ covariance[np.ix_(g, w)]
    deviation = np.sqrt(np.diag(expected))
    assert np.all(np.abs(got.mean(0) - mean) < 5 * deviation / np.sqrt(count) + 1e-3)
    error = np.abs(np.cov(got.T) - expected) / np.outer(deviation, deviation)
    assert error.max() < 5 * np.sqrt(2 / count)


def ancestors(name: str, given: tuple[str, ...]) -> set[str]:
    """What must be sampled for `name`: itself and, through what is not given, its ancestors."""
    if name in given:
        return set()
    return {name}.union(*(ancestors(p, given) for p in PARENTS[name]))


def descendants(name: str) -> set[str]:
    children = {n for n, parents in PARENTS.items() if name in parents}
    return children.union(*(descendants(c) for c in children))


# ------------------------------------------------------------ sameness


def small_chain() -> Chain:
    torch.manual_seed(0)
    clip, image = Variable.vector("clip", 6), Variable.image("image", 3, 8)
    prior = PriorSpec(kind="prior", width=16, depth=1, heads=2)
    unet = UNetSpec(kind="unet", channels=16, mult=[1, 2], blocks=1, attention=[4], dropout=0)
    churned = SamplerSpec(steps=4, churn=ChurnSpec(amount=2))
    noisy = churned.model_copy(update={"links": {"clip": LinkSampling(noise=0.2)}})
    stages = [
        Diffusion(clip, network=prior, sampler=churned, precondition="x0"),
        Diffusion(image, given=[(clip, LinkSpec(variable="clip", noise=0.5))], network=unet, sampler=noisy),
    ]
    for stage in stages:
        for parameter in stage.parameters():  # zero-initialised outputs would hide the conditions
            nn.init.normal_(parameter, std=0.1)
    return Chain([stage.eval().requires_grad_(False) for stage in stages])


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    return small_chain().sample(64, seed=3, batch=64)


@pytest.mark.parametrize("batch", [1, 7])
def test_samples_do_not_depend_on_the_batch_size(whole: dict[str, Tensor], batch: int) -> None:
    parts = small_chain().sample(64, seed=3, batch=batch)
    assert all((whole[name] - parts[name]).abs().max() < 1e-3 for name in whole)


def test_exact_samples_are_bit_identical_for_any_batch_size() -> None:
    results = [small_chain().sample(21, seed=3, batch=batch, exact=True) for batch in (1, 7, 64)]
    assert all(torch.equal(results[0][n], other[n]) for other in results[1:] for n in ("clip", "image"))


def test_exact_samples_agree_with_the_others(whole: dict[str, Tensor]) -> None:
    exact = small_chain().sample(21, seed=3, exact=True)
    assert (exact["image"] - whole["image"][:21]).abs().max() < 1e-3


def test_an_unrelated_stage_changes_nothing(whole: dict[str, Tensor]) -> None:
    """More steps in the image stage leave the embedding bit for bit as it was."""
    chain = small_chain()
    chain.stages["image"].sampler = SamplerSpec(steps=9)
    assert torch.equal(chain.sample(64, seed=3, want=["clip"])["clip"], whole["clip"])


def test_given_values_continue_where_the_stage_left_off(whole: dict[str, Tensor]) -> None:
    again = small_chain().sample(64, seed=3, given={"clip": whole["clip"]})
    assert "clip" not in again
    assert torch.equal(again["image"], whole["image"])


def test_a_stream_can_start_in_the_middle(whole: dict[str, Tensor]) -> None:
    tail = list(small_chain().stream(64, seed=3, batch=16, first=48))
    assert len(tail) == 1
    assert (tail[0]["image"] - whole["image"][48:]).abs().max() < 1e-3


def test_seeds_differ(whole: dict[str, Tensor]) -> None:
    assert (small_chain().sample(2, seed=4)["image"] - whole["image"][:2]).abs().max() > 0.01


# ------------------------------------------------------------ guidance


def test_guidance_is_the_weighted_sum_of_both_predictions() -> None:
    torch.manual_seed(1)
    clip, image = Variable.vector("clip", 4), Variable.image("image", 3, 8)
    unet = UNetSpec(kind="unet", channels=16, mult=[1], blocks=1, attention=[], dropout=0)
    link = LinkSpec(variable="clip", dropout=0.1)
    stage = Diffusion(image, given=[(clip, link)], network=unet, sampler=SamplerSpec(guidance=3.0)).eval()
    for parameter in stage.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, given = {"image": torch.randn(5, 3, 8, 8)}, {"clip": torch.randn(5, 4)}
    guided = stage.denoiser(given)(x, {"image": 1.5}).x0["image"]
    assert stage.cost(["image"]).nfe == 70
    conditional = stage.bind(given)(x, {"image": 1.5}).x0["image"]
    unconditional = stage.bind(given, absent=["clip"])(x, {"image": 1.5}).x0["image"]
    assert (conditional - unconditional).abs().max() > 1e-3
    assert torch.allclose(guided, 3 * conditional - 2 * unconditional, atol=1e-5)


def test_guidance_without_dropout_is_refused() -> None:
    clip, image = Variable.vector("clip", 4), Variable.image("image", 3, 8)
    unet = UNetSpec(kind="unet", channels=16, mult=[1], blocks=1, attention=[])
    for guidance in (2.0, {"clip": 2.0}):
        with pytest.raises(UserError, match=r"stages\.image\.sample\.guidance.* needs .*prediction.* no .*dropout"):
            Diffusion(image, given=[clip], network=unet, sampler=SamplerSpec(guidance=guidance))


# ------------------------------------------------------------ Python, sources, refusals


def test_the_public_names() -> None:
    assert cd.Variable.image("image", 3, 32).shape == (3, 32, 32)
    assert cd.Chain is Chain
    assert cd.Diffusion is Diffusion and isinstance(Diffusion(cd.Variable.vector("x", 2), network=cd.Prior()), cd.Stage)


def test_an_empirical_source_has_the_frequencies_of_the_data() -> None:
    source = Source(Variable.label("group", 3), [1, 2, 5])
    labels = source.sample(range(8000), seed=0)
    assert torch.allclose(labels.bincount(minlength=3) / 8000, torch.tensor([1, 2, 5]) / 8, atol=0.02)
    assert torch.equal(labels[10:20], source.sample(range(10, 20), seed=0))


def test_links_of_different_meaning_are_refused() -> None:
    one = Variable("clip", "vector", (4,), meaning="encoder A")
    other = Variable("clip", "vector", (4,), meaning="encoder B")
    prior = PriorSpec(kind="prior", width=16, depth=1, heads=2)
    with pytest.raises(
        UserError,
        match="a different 'clip' from the rest of the chain: its meaning is encoder B, not encoder A",
    ):
        Chain([Diffusion(one, network=prior), Diffusion(Variable.vector("y", 2), given=[other], network=prior)])


def test_given_of_the_wrong_shape_is_refused() -> None:
    with pytest.raises(UserError, match=r"given 'clip' has shape \[2, 5\]; expected \[4, 6\]"):
        small_chain().sample(4, given={"clip": torch.zeros(2, 5)})


def test_an_unknown_given_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="clip"):
        small_chain().sample(4, given={"clp": torch.zeros(4, 6)})


def test_costs_are_those_of_the_whole_chain() -> None:
    found = small_chain().plan()
    assert found.running == ["clip", "image"]
    assert sum(found.share(name) for name in found.running) == pytest.approx(1)
    assert "NFE 7" in str(found)
    assert found.svg().startswith("<svg") or "<svg" in found.svg()
