"""Stages that generate several variables together, against the exact conditionals of a Gaussian."""

from __future__ import annotations

import re
from collections import deque

import pytest
import torch
from torch import Tensor, nn

import chaindiff as cd
from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.variable import Variable
from chaindiff.edm.random import Draws
from chaindiff.edm.solvers import evaluations
from chaindiff.io.errors import UserError
from chaindiff.networks.interface import Condition, Interface
from chaindiff.networks.joint import Joint
from chaindiff.recipe.assembly import Assembly
from chaindiff.recipe.execution import sampler_settings
from chaindiff.specs.link import LinkSpec
from chaindiff.specs.load import load_recipe
from chaindiff.specs.network import JointNetworkSpec
from chaindiff.specs.noise import NoiseSpec

A, B = Variable.vector("a", 1), Variable.vector("b", 2)
COVARIANCE = torch.tensor([[0.30, 0.20, -0.10], [0.20, 0.40, 0.05], [-0.10, 0.05, 0.20]], dtype=torch.float64)


class ExactGaussian(nn.Module):
    """The joint network for which EDM's preconditioning is the exact denoiser of N(0, COVARIANCE) over (a, b)."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.levels: list[tuple[float, float]] = []

    def forward(self, x, noise, condition) -> dict[str, Tensor]:
        x, noise_labels = x.values(), noise.values()
        sigma = [float((4 * label[0]).exp()) for label in noise_labels]
        self.levels.append((sigma[0], sigma[1]))
        total = [(s**2 + 0.25) ** 0.5 for s in sigma]
        noisy = [value * t for value, t in zip(x, total, strict=True)]
        spread = torch.diag(torch.tensor([sigma[0] ** 2, sigma[1] ** 2, sigma[1] ** 2], dtype=torch.float64))
        clean = torch.cat(noisy, dim=1) @ torch.linalg.solve(COVARIANCE + spread, COVARIANCE)
        parts = (clean[:, :1], clean[:, 1:])
        found = [
            (part - 0.25 / t**2 * value) * t / (s * 0.5)
            for part, value, s, t in zip(parts, noisy, sigma, total, strict=True)
        ]
        return dict(zip(noise, found, strict=True))


def chain(offset: float = 0.0, exact: float = 0.2, steps: int = 40) -> cd.Chain:
    sampler = {"steps": steps, "path": {"kind": "offset", "offset": offset}}
    return cd.Chain([Diffusion([A, B], network=ExactGaussian(), path={"exact": exact}, sampler=sampler, name="both")])


@pytest.mark.parametrize("offset", [0.0, 0.3, 1.0])
def test_every_path_samples_the_joint_distribution(offset: float) -> None:
    out = chain(offset).sample(6000, batch=6000)
    found = torch.cat([out["a"], out["b"]], dim=1).double()
    # Four standard deviations of an entry of the sample covariance, sqrt((c_ii c_jj + c_ij^2) / n).
    diagonal = COVARIANCE.diagonal()
    bound = 4 * ((torch.outer(diagonal, diagonal) + COVARIANCE**2) / 6000).sqrt() + 0.005
    assert ((found.T @ found / 6000 - COVARIANCE).abs() < bound).all()


@pytest.mark.parametrize(("given", "wanted"), [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_each_variable_given_the_other_has_its_exact_conditional(given: str, wanted: str, offset: float) -> None:
    places = {"a": slice(0, 1), "b": slice(1, 3)}
    known = torch.tensor([[0.7]]) if given == "a" else torch.tensor([[0.4, -0.3]])
    out = chain(offset).sample(6000, batch=6000, given={given: known}, want=[wanted])[wanted].double()
    own, other = places[wanted], places[given]
    gain = COVARIANCE[own, other] @ torch.linalg.inv(COVARIANCE[other, other])
    covariance = COVARIANCE[own, own] - gain @ COVARIANCE[other, own]
    error = (covariance.diagonal() / 6000).sqrt()
    assert ((out.mean(0) - gain @ known[0].double()).abs() < 4 * error + 0.003).all()
    assert torch.allclose(out.T.cov().reshape(covariance.shape), covariance, rtol=0.08, atol=0.004)


def test_the_first_leads_by_the_offset_and_what_is_given_rests_at_zero() -> None:
    model = chain(offset=0.5, steps=4)
    stage = model.stages["both"]
    times = stage.path().times
    assert stage.path().steps == 6 and times["a"][-3:].tolist() == [0, 0, 0]
    assert times["b"][:3].tolist() == [80, 80, 80] and times["b"][2:].tolist() == times["a"][:5].tolist()
    assert [evaluations(stage.sampling().table(stage.path(moving))) for moving in (None, ["b"])] == [11, 7]
    network = stage.network
    assert isinstance(network, ExactGaussian)
    model.sample(1, given={"a": torch.zeros(1, 1)}, want=["b"])
    assert len(network.levels) == 7 and max(level for level, _ in network.levels) < 1e-4


def test_a_plan_counts_only_what_moves() -> None:
    skeleton = Assembly(load_recipe("joint_emoji16", changes=["stages.both.sample.path.offset=1"])).chain()
    assert skeleton.plan().costs["both"].nfe == 28
    assert skeleton.plan(["image16"], ["clip"]).costs["both"].nfe == 14


def test_a_stage_that_never_saw_a_known_value_refuses_one() -> None:
    with pytest.raises(UserError, match="generates 'a' and 'b' together and was not trained to generate 'b' given 'a'"):
        chain(exact=0).sample(2, given={"a": torch.zeros(1, 1)}, want=["b"])


def test_samples_do_not_depend_on_the_batch() -> None:
    whole = chain(0.3, steps=6).sample(7, batch=7)
    parts = chain(0.3, steps=6).sample(7, batch=2)
    assert all(torch.allclose(whole[name], parts[name], atol=1e-6) for name in ("a", "b"))


def test_inversion_returns_to_the_values() -> None:
    stage = chain(0.3, steps=100).stages["both"]
    values = {"a": torch.tensor([[0.3]]).double(), "b": torch.tensor([[-0.2, 0.5]]).double()}
    start = deque(stage.invert(values, {}), maxlen=1).pop()
    back = deque(stage.sample({}, Draws(range(1), 0), start=start), maxlen=1).pop()
    assert all((back[name] - values[name]).abs().max() < 5e-3 for name in values)


# ------------------------------------------------------------ training


def test_the_loss_of_the_exact_denoiser_is_what_no_denoiser_can_undercut() -> None:
    """The expected error is the trace of the posterior covariance; a variable known exactly adds none."""
    stage = Diffusion([A, B], network=ExactGaussian(), path={"exact": 1.0, "pure": 0.0}, name="both")
    stage.noise = lambda draws: torch.full((len(draws.samples),), 0.5)  # the network takes one level for a batch
    root = torch.linalg.cholesky(COVARIANCE)
    values = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) @ root.T
    draws = Draws(range(4000), 0, "both")
    known = stage.family.draw(draws, dict.fromkeys("ab", stage.noise), {"a": 80.0, "b": 80.0}).levels["a"] == 0
    losses = []
    for rows in (known, ~known):  # a is known, b is known
        chosen = Draws(rows.nonzero()[:, 0].tolist(), 0, "both")
        losses.append(stage.loss({"a": values[rows, :1], "b": values[rows, 1:]}, chosen).mean())
    weight = (0.25 + 0.25) / (0.5 * 0.5) ** 2
    for loss, own, other in ((losses[0], slice(1, 3), slice(0, 1)), (losses[1], slice(0, 1), slice(1, 3))):
        gain = COVARIANCE[own, other] @ torch.linalg.inv(COVARIANCE[other, other])
        left = COVARIANCE[own, own] - gain @ COVARIANCE[other, own]
        posterior = left - left @ torch.linalg.inv(left + 0.25 * torch.eye(len(left))) @ left
        assert float(loss) == pytest.approx(float(weight * posterior.diagonal().mean() / 2), rel=0.08)


# ------------------------------------------------------------ the network

IMAGE, CLIP, TEXT = Variable.image("image", 3, 8), Variable.vector("clip", 5), Variable.vector("text", 4)
SMALL = {
    "image": {"channels": 16, "mult": [1, 1], "blocks": 1, "attention": [4], "dropout": 0.0},
    "vector": {"width": 16, "depth": 1, "heads": 2},
}


def network(*shapes: tuple[int, ...], **options) -> Joint:
    torch.manual_seed(0)
    made = Joint(Interface(dict(zip("xyz", shapes, strict=False)), **options), seen=6, **SMALL)
    for parameter in made.parameters():  # the last layers begin at zero
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return made.eval()


@pytest.mark.parametrize("order", [[0, 1, 2], [1, 0, 2], [2, 1, 0]])
def test_every_output_depends_on_every_input_and_level(order: list[int]) -> None:
    variables = [[IMAGE, CLIP, TEXT][i] for i in order]
    model = network(*(v.shape for v in variables))
    x = {name: torch.randn(2, *v.shape) for name, v in zip("xyz", variables, strict=True)}
    levels = {name: torch.tensor([-0.3, 0.2]) for name in x}
    with torch.no_grad():
        before = model(x, levels, Condition())
        assert {name: out.shape for name, out in before.items()} == {name: value.shape for name, value in x.items()}
        for changed in x:
            other = {name: value + (name == changed) for name, value in x.items()}
            louder = {name: level + 0.4 * (name == changed) for name, level in levels.items()}
            for after in (model(other, levels, Condition()), model(x, louder, Condition())):
                assert all((after[name] - before[name]).abs().max() > 1e-6 for name in x)


def test_given_labels_reach_both_streams_and_dropped_ones_do_not() -> None:
    links = [(Variable.label("group", 3), LinkSpec(variable="group", dropout=0.5))]
    recipe = load_recipe("joint_emoji16").recipe.stages["both"]
    spec = recipe.network.model_copy(
        update={
            "image": recipe.network.image.model_copy(update={"channels": 16, "attention": [4]}),
            "vector": recipe.network.vector.model_copy(update={"width": 16, "depth": 1, "heads": 2}),
        }
    )
    stage = Diffusion([CLIP, IMAGE], given=links, network=spec, name="both").eval()
    for parameter in stage.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    x = {"clip": torch.randn(1, 5), "image": torch.randn(1, 3, 8, 8)}
    outs = [stage.bind({"group": torch.tensor([k])})(x, {"clip": 1.0, "image": 2.0}).x0 for k in (0, 1)]
    assert all((outs[0][name] - outs[1][name]).abs().max() > 1e-6 for name in x)


@pytest.mark.slow
def test_one_network_learns_each_variable_given_the_other() -> None:
    """A vector, and an image that is as bright as its first entry: each tells the other, and both agree together."""
    torch.manual_seed(0)
    vector, image = Variable.vector("vector", 2), Variable.image("image", 3, 8)
    network = JointNetworkSpec(
        kind="joint",
        image={"kind": "unet", "channels": 16, "mult": [1, 1], "blocks": 1, "attention": [], "label_init": "zeros"},
        vector={"kind": "prior", "width": 64, "depth": 2, "heads": 2},
    )
    noise, sampler = NoiseSpec(mean=-0.4, std=1.4), {"steps": 12, "path": {"kind": "offset", "offset": 0.25}}
    stage = Diffusion([vector, image], network=network, noise=noise, sampler=sampler, name="both")
    optimizer = torch.optim.Adam(stage.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=800)

    def data(count: int) -> dict[str, Tensor]:
        value = 0.5 * torch.randn(count, 2)
        return {"vector": value, "image": value[:, :1, None, None] + 0.1 * torch.randn(count, 3, 8, 8)}

    for step in range(800):
        loss = stage.loss(data(64), Draws(range(step * 64, (step + 1) * 64), 0, "both")).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    chain, known = cd.Chain([stage.eval()]), data(200)

    def brightness(images: Tensor) -> Tensor:
        return images.mean((1, 2, 3))

    both = chain.sample(200)
    bright = chain.sample(200, given={"vector": known["vector"]})["image"]
    told = chain.sample(200, given={"image": known["image"]})["vector"]
    pairs = [
        (brightness(both["image"]), both["vector"][:, 0]),
        (brightness(bright), known["vector"][:, 0]),
        (told[:, 0], known["vector"][:, 0]),
    ]
    for left, right in pairs:
        assert float(torch.corrcoef(torch.stack([left, right]))[0, 1]) > 0.85
        assert float((left - right).abs().mean()) < 0.2
    assert abs(float(torch.corrcoef(torch.stack([told[:, 1], known["vector"][:, 1]]))[0, 1])) < 0.3  # nothing tells it


# ------------------------------------------------------------ recipes


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("stages.both.generates=[image16]", "a joint network generates one image or map and one or more vectors, not"),
        ("stages.both.generates=[clip, image16, image]", "not 'clip' (vector), 'image16' (image), 'image' (image)"),
        ("stages.both.path.pure=0.9", "stages.both.path.exact: the shares exact, pure and absent should sum to"),
        ("stages.both.network.vector.heads=7", "both.network.vector.width: should be even and a multiple of heads (7)"),
        ("stages.both.network.image.attention=[5]", "stages.both.network.image.attention: 5 is not one of this"),
        ("stages.both.init=x.safetensors", "initialises one network with another's weights; a joint network"),
        ("stages.both.precondition.kind=vp", "a network of kind vp does not accept level 0"),
    ],
)  # fmt: skip
def test_mistakes_are_explained(change: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("joint_emoji16", changes=[change])
    assert expected in str(caught.value)


@pytest.mark.parametrize("change", ["stages.image16.path.exact=0.5", "stages.image16.sample.path={kind: shared}"])
def test_one_variable_has_nothing_to_go_together_with(change: str) -> None:
    with pytest.raises(UserError, match="is for stages that generate several variables together"):
        load_recipe("vcdm_emoji16", changes=[change])


def test_several_variables_need_a_joint_network() -> None:
    with pytest.raises(UserError, match="a unet generates one variable, not 2; use a joint network"):
        load_recipe("vcdm_emoji16", changes=["stages.image16.generates=[image16, image]"])


def test_the_path_is_part_of_what_samples_depend_on_for_several_variables_alone() -> None:
    for name, expected in (("joint_emoji16", True), ("edm_emoji16", False)):
        (stage,) = load_recipe(name).recipe.stages.values()
        assert ("path" in sampler_settings(stage)) is expected


# ------------------------------------------------------------ settings of each variable, guidance by generated ones


class ExactPair(nn.Module):
    """The exact denoiser of N(0, COVARIANCE) over (a, b), or of one where the other is unseen; predicts clean values.

    It takes c_noise = ln(sigma) / 4, and inputs scaled by 1 / sqrt(sigma^2 + 0.25).
    """

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.calls: list[int] = []

    def forward(self, x, noise, condition) -> dict[str, Tensor]:
        self.calls.append(len(x["a"]))
        sigma = {v: (4 * noise[v]).exp()[:, None] for v in x}
        noisy = torch.cat([x[v] * (sigma[v] ** 2 + 0.25).sqrt() for v in x], dim=1)
        seen = torch.cat([(x[v] != 0).any(1, keepdim=True).expand_as(x[v]) for v in x], dim=1)
        spread = torch.cat([sigma[v].expand_as(x[v]) ** 2 for v in x], dim=1)
        spread = torch.where(seen, spread, torch.full_like(spread, 1e12))  # unseen: as good as pure noise
        gain = COVARIANCE @ torch.linalg.inv(COVARIANCE + torch.diag_embed(spread))
        clean = (gain @ noisy[..., None])[..., 0]
        return {"a": clean[:, :1], "b": clean[:, 1:]}


@pytest.mark.parametrize("share", ["absent", "pure"])
def test_guidance_by_a_generated_variable_is_the_sum_of_its_terms(share: str) -> None:
    """D_a = w D_a(a, b) + (1 - w) D_a(a), and b is not guided; in one call of the network."""
    shares = {"exact": 0.1, "pure": 0.1} | {share: 0.2}
    stage = Diffusion(
        [A, B], network=ExactPair(), precondition="x0", path=shares, sampler={"guidance": {"b": 2.5}}, name="both"
    )
    x = {"a": torch.tensor([[0.6], [-1.0]]).double(), "b": torch.tensor([[0.3, -0.8], [1.0, 0.2]]).double()}
    levels = {"a": 0.4, "b": 0.7}
    draws = Draws(range(2), 0, "both", dtype=torch.float64)
    denoiser = stage.denoiser({}, draws)
    found = denoiser(x, levels).x0
    full = stage.bind({}, draws)(x, levels).x0
    alone = COVARIANCE[0, 0] / (COVARIANCE[0, 0] + 0.4**2) * x["a"]
    near = 1e-6 if share == "absent" else 0.02  # pure noise at level 80 tells a little
    assert (found["a"] - (2.5 * full["a"] - 1.5 * alone)).abs().max() < near
    assert torch.equal(found["b"], full["b"])
    assert stage.network.calls[:1] == [4] and denoiser.evaluations(levels) == 2
    known = {"b": x["b"]}  # classifier-free guidance by a variable that is given (UniDiffuser)
    given = stage.denoiser(known, draws)({"a": x["a"]}, {"a": 0.4}).x0["a"]
    plain = stage.bind(known, draws)({"a": x["a"]}, {"a": 0.4}).x0["a"]
    assert (given - (2.5 * plain - 1.5 * alone)).abs().max() < near


def test_guidance_by_a_generated_variable_needs_training_without_it() -> None:
    with pytest.raises(UserError, match="needs a prediction without 'b'"):
        Diffusion([A, B], network=ExactPair(), precondition="x0", path={"pure": 0}, sampler={"guidance": {"b": 2}})


def test_each_variable_has_its_own_formulation_noise_weight_and_steps() -> None:
    """Exact denoisers in different parametrisations sample the same distribution, each with its own steps."""
    wide = cd.Variable("a", "vector", (1,), sigma_data=1.3)
    own = {"precondition": {"kind": "x0"}, "noise": {"mean": 0.4, "std": 1.0}, "weight": 3.0}

    class Mixed(ExactPair):
        def forward(self, x, noise, condition) -> dict[str, Tensor]:
            sigma = {v: (4 * noise[v]).exp()[:, None] for v in x}
            scale = (sigma["a"] ** 2 + 1.3**2).sqrt() / (sigma["a"] ** 2 + 0.25).sqrt()
            clean = super().forward({"a": x["a"] * scale, "b": x["b"]}, noise, condition)
            total = (sigma["b"] ** 2 + 0.25).sqrt()
            noisy = x["b"] * total
            clean["b"] = (clean["b"] - 0.25 / total**2 * noisy) * total / (sigma["b"] * 0.5)
            return clean

    sampler = {"steps": 60, "variables": {"a": {"steps": 40}}, "path": {"kind": "offset", "offset": 1.0}}
    stage = Diffusion([(wide, own), B], network=Mixed(), sampler=sampler, name="both")
    assert stage.path().steps == 100
    assert [evaluations(stage.sampling().table(stage.path([name]))) for name in "ab"] == [79, 119]
    out = cd.Chain([stage]).sample(6000, batch=6000)
    found = torch.cat([out["a"], out["b"]], dim=1).double()
    diagonal = COVARIANCE.diagonal()
    bound = 4 * ((torch.outer(diagonal, diagonal) + COVARIANCE**2) / 6000).sqrt() + 0.006
    assert ((found.T @ found / 6000 - COVARIANCE).abs() < bound).all()
    values = {"a": torch.zeros(2000, 1).double(), "b": torch.zeros(2000, 2).double()}
    draws = Draws(range(2000), 0, "both")
    heavy = stage.loss(values, draws).mean()
    stage.own["a"] = stage.own["a"].model_copy(update={"weight": 0.000001})
    assert heavy > stage.loss(values, draws).mean() > 0


CURVES = {"a": [[0, 0], [0.5, 0.9], [1, 1]], "b": [[0, 0], [1, 1]]}


@pytest.mark.parametrize("path", [{"kind": "shared"}, {"kind": "table", "points": CURVES}])
def test_paths_of_every_kind_sample_the_joint_distribution(path: dict) -> None:
    sampler = {"steps": 40, "path": path}
    stage = Diffusion([A, B], network=ExactGaussian(), path={"kind": "independent"}, sampler=sampler, name="both")
    out = cd.Chain([stage]).sample(6000, batch=6000)
    found = torch.cat([out["a"], out["b"]], dim=1).double()
    diagonal = COVARIANCE.diagonal()
    bound = 4 * ((torch.outer(diagonal, diagonal) + COVARIANCE**2) / 6000).sqrt() + 0.005
    assert ((found.T @ found / 6000 - COVARIANCE).abs() < bound).all()


def test_a_plan_warns_of_a_path_that_training_never_drew() -> None:
    changes = ["stages.both.path={kind: shared, exact: 0.1}"]
    said = str(Assembly(load_recipe("joint_emoji16", changes=changes)).chain().plan())
    found = re.search(r"warning: the path goes through levels \(clip ([\d.]+), image16 80\) that training, with", said)
    assert found and float(found[1]) < 40  # the embedding leads by half a pass
    changes += ["stages.both.sample.path={kind: shared}"]
    assert "warning" not in str(Assembly(load_recipe("joint_emoji16", changes=changes)).chain().plan())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("stages.both.sample.path={kind: table, points: {clip: [[0, 0], [1, 1]]}}", "has no curve for 'image16'"),
        ("stages.both.sample.path={kind: table, points: {clip: [[0, 0], [1, 0.5]]}}", "should go from [0, 0] to"),
        ("stages.both.path={kind: cascaded, shares: {klip: 1}}", "the stage does not generate 'klip'; did you mean"),
        ("stages.both.sample.variables={klip: {steps: 3}}", "the stage does not generate 'klip'; did you mean 'clip'?"),
        ("stages.both.generates=[clip, clip]", "'clip' is named twice"),
        ("stages.both.path={kind: shared, exact: 0.1, only: [klip]}", "does not generate 'klip'; did you mean"),
        ("stages.both.path={kind: shared, only: [clip]}", "the shares exact, pure and absent are 0"),
        ("stages.both={path: {only: [clip]}, sample: {guidance: {image16: 2}}}", "prediction without 'image16', which"),
        ("stages.both.precondition.loss=velocity", "'velocity' is for networks that predict x0, not edm"),
    ],
)  # fmt: skip
def test_mistakes_in_paths_are_explained(change: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("joint_emoji16", changes=[change])
    assert expected in str(caught.value)
