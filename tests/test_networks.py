"""Networks against reference outputs, published parameter counts, and the properties that conditioning promises."""

from __future__ import annotations

import json

import pytest
import torch
from exact import call
from fixture_files import fixture

from chaindiff.chain.conditioning import Given, Link, training_level
from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.variable import Variable
from chaindiff.edm.precondition import EDM, SMALLEST_SIGMA, Direct, noise_label
from chaindiff.networks.interface import Condition
from chaindiff.networks.prior import Prior
from chaindiff.networks.unet import UNet
from chaindiff.specs.link import LinkSpec
from chaindiff.specs.network import UNetSpec


def reference_unet(name: str, arch: str) -> tuple[UNet, dict[str, torch.Tensor]]:
    tensors, metadata = fixture(name)
    kwargs = json.loads(metadata["kwargs"])
    network = UNet(
        kwargs.get("img_resolution", 16),
        3,
        3,
        arch=arch,
        label_dim=kwargs.get("label_dim", 0),
        augment_dim=kwargs.get("augment_dim", 0),
        channels=kwargs["model_channels"],
        mult=kwargs["channel_mult"],
        blocks=kwargs["num_blocks"],
        attention=kwargs["attn_resolutions"],
    )
    return network, tensors


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@pytest.mark.parametrize("arch", ["ddpmpp", "ncsnpp", "adm"])
def test_network_equals_the_reference(arch: str) -> None:
    network, tensors = reference_unet(f"{arch}_tiny", arch)
    network.double().load_state_dict({k: v.double() for k, v in part(tensors, "state.").items()})
    inputs = part(tensors, "in.")
    labels = inputs.get("class_labels"), inputs.get("augment_labels")
    out = call(network.eval(), inputs["x"], inputs["noise_labels"], *labels)
    error = (out - tensors["out.y"]).norm() / tensors["out.y"].norm()
    assert error < 1e-5


def test_edm_preconditioning_equals_the_reference() -> None:
    tensors, metadata = fixture("precond_edm")
    kwargs = json.loads(metadata["kwargs"])
    spec = UNetSpec(
        kind="unet",
        channels=kwargs["model_channels"],
        mult=kwargs["channel_mult"],
        blocks=kwargs["num_blocks"],
        attention=kwargs["attn_resolutions"],
    )
    stage = Diffusion(Variable.image("image", 3, 16), network=spec).eval()
    state = {k.removeprefix("model."): v for k, v in part(tensors, "state.").items()}
    stage.network.load_state_dict({k: v.float() for k, v in state.items()})
    bound = stage.bind({})
    denoised = bound({"image": tensors["in.x"]}, {"image": tensors["in.sigma"].flatten()}).x0["image"]
    error = (denoised - tensors["out.D"]).norm() / tensors["out.D"].norm()
    assert error < 1e-5


@pytest.mark.parametrize(
    ("count", "resolution", "settings"),
    [
        (55_733_891, 32, {"mult": [2, 2, 2], "augment_dim": 9}),
        (56_397_827, 32, {"mult": [2, 2, 2], "augment_dim": 9, "arch": "ncsnpp"}),
        (61_805_571, 64, {"augment_dim": 9}),
        (62_761_091, 64, {"augment_dim": 9, "arch": "ncsnpp"}),
        (61_871_235, 64, {"augment_dim": 9, "label_dim": 512}),
        (
            295_899_267,
            64,
            {
                "arch": "adm",
                "label_dim": 1000,
                "channels": 192,
                "mult": [1, 2, 3, 4],
                "blocks": 3,
                "attention": [32, 16, 8],
            },
        ),
    ],
)
def test_parameter_counts_are_the_published_ones(count: int, resolution: int, settings: dict) -> None:
    with torch.device("meta"):
        network = UNet(resolution, 3, 3, **settings)
    assert sum(p.numel() for p in network.parameters()) == count


def test_edm_coefficients_keep_unit_variance() -> None:
    """EDM, appendix B.6: inputs of F and its training target have unit variance, and lambda c_out^2 = 1."""
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    spread = 0.5
    c = EDM(spread)(sigma)
    assert torch.allclose(c.input**2 * (spread**2 + sigma**2), torch.ones(3, dtype=torch.float64))
    target = ((1 - c.skip) ** 2 * spread**2 + c.skip**2 * sigma**2) / c.out**2
    assert torch.allclose(target, torch.ones(3, dtype=torch.float64))
    assert torch.allclose(EDM(spread).weight(sigma) * c.out**2, torch.ones(3, dtype=torch.float64))


def test_direct_prediction_has_no_skip() -> None:
    c = Direct()(torch.tensor([0.1, 10.0]))
    assert c.skip.tolist() == [0, 0]
    assert c.out.tolist() == [1, 1]


def test_noise_label_is_finite_at_zero() -> None:
    assert noise_label(torch.zeros(1)).item() == pytest.approx(torch.tensor(SMALLEST_SIGMA).log().item() / 4)


def test_prior_sees_every_input() -> None:
    """The query is last, so causal attention must let it see the label, the augmentation, the level and the vector."""
    torch.manual_seed(0)
    prior = Prior(8, label_dim=3, augment_dim=9, context_dim=4, context_length=2, width=32, depth=2, heads=4)
    torch.nn.init.normal_(prior.out.weight)
    inputs = [torch.randn(2, 8), torch.randn(2), torch.randn(2, 3), torch.randn(2, 9), torch.randn(2, 2, 4)]
    for tensor in inputs:
        tensor.requires_grad_()
    call(prior, *inputs).square().sum().backward()
    assert all(t.grad is not None and t.grad.abs().max() > 0 for t in inputs)


def test_context_reaches_a_unet_through_its_attention() -> None:
    network = UNet(16, 3, 3, channels=16, mult=[1, 2], blocks=1, attention=[8], context_dim=6).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, t = torch.randn(2, 3, 16, 16), torch.zeros(2)
    one, other = (call(network, x, t, context=torch.randn(2, 5, 6)) for _ in range(2))
    assert (one - other).abs().max() > 1e-4


# ------------------------------------------------------------ conditioning


def test_absent_and_zero_are_told_apart() -> None:
    clip, image = Variable.vector("clip", 4), Variable.image("image", 3, 16)
    link = Link(clip, LinkSpec(variable="clip", dropout=0.5), image)
    like = torch.zeros(1)
    _, told_zero = link(Given(torch.zeros(2, 4)), 2, like)
    _, told_absent = link(Given(None), 2, like)
    assert told_zero is not None and told_absent is not None
    assert not torch.equal(told_zero, told_absent)


def test_published_conditioning_enters_unscaled() -> None:
    clip, image = Variable.vector("clip", 4), Variable.image("image", 3, 16)
    link = Link(clip, LinkSpec(variable="clip"), image)
    value = torch.randn(2, 4)
    received, told = link(Given(value), 2, torch.zeros(1))
    assert torch.equal(received, value)
    assert told is None
    assert link.label_width == 4


def test_noise_on_a_link_keeps_the_variance_and_tells_its_level() -> None:
    small, image = Variable.image("small", 3, 8), Variable.image("image", 3, 16)
    link = Link(small, LinkSpec(variable="small", noise=0.5), image)
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(64, 3, 16, 16, generator=generator) * 0.5
    noise = torch.randn(64, 3, 16, 16, generator=generator)
    received, told = link(Given(value, None, torch.full((64,), 0.5), noise), 64, value)
    assert received.std().item() == pytest.approx(0.5, rel=0.01)
    _, told_exact = link(Given(value, None, torch.zeros(64), noise), 64, value)
    assert told is not None and told_exact is not None
    assert not torch.allclose(told, told_exact)


def test_link_noise_is_added_after_resizing() -> None:
    small, image = Variable.image("small", 3, 8), Variable.image("image", 3, 16)
    link = Link(small, LinkSpec(variable="small", noise=1.0), image)
    assert link.received == (3, 16, 16)
    noise = torch.randn(1, 3, 16, 16)
    received, _ = link(Given(torch.zeros(1, 3, 8, 8), None, torch.ones(1), noise), 1, noise)
    assert torch.allclose(received, noise * 0.5 / (1 + 0.25) ** 0.5)


def test_training_levels_are_exactly_zero_one_time_in_ten() -> None:
    levels = training_level(torch.linspace(0, 1, 1001), 0.3)
    assert (levels == 0).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert levels.max().item() == pytest.approx(0.3)


def test_learned_null_receives_a_gradient_only_where_absent() -> None:
    clip, image = Variable.vector("clip", 4), Variable.image("image", 3, 16)
    link = Link(clip, LinkSpec(variable="clip", dropout=0.5, null="learned"), image)
    present = torch.tensor([True, False, False])
    received, _ = link(Given(torch.ones(3, 4), present), 3, torch.zeros(1))
    received.sum().backward()
    assert link.null is not None and link.null.grad is not None
    assert link.null.grad.tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("arch", ["ddpmpp", "ncsnpp", "adm"])
def test_labels_that_begin_at_zero_change_nothing_at_first_and_are_learned(arch: str) -> None:
    settings = {"arch": arch, "channels": 64, "mult": [1], "blocks": 1, "attention": [], "label_dim": 5}
    level, labels = torch.tensor([0.3, 0.3]), torch.eye(5)[:2]
    for label_init, equal in (("published", False), ("zeros", True)):
        network = UNet(8, 3, 3, label_init=label_init, **settings)
        told = network.embed(level, network.prepare(Condition(labels=labels)))
        assert torch.equal(told[0], told[1]) is equal
        (gradient,) = torch.autograd.grad(told[0].sum(), network.map_label.weight)
        assert gradient[:, 0].abs().max() > 0
