"""Stages that begin from published networks, and from other stages."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from exact import call
from test_interop import IMAGE, off, reference
from torch import Tensor, nn

from chaindiff.chain.conditioning import Given
from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.variable import Variable
from chaindiff.data.augment import GEOMETRIC
from chaindiff.interop.edm import load_edm_network, published
from chaindiff.io.errors import UserError
from chaindiff.specs.link import LinkSpec
from chaindiff.specs.network import UNetSpec
from chaindiff.specs.sampling import SamplerSpec
from chaindiff.training.begin import Begun, begin, columns


def spec_of(arch: str) -> UNetSpec:
    class_name, kwargs, _, _ = reference(arch)
    return published(class_name, kwargs).network


def both(arch: str, given: list, **settings) -> tuple[Diffusion, Diffusion, Begun]:
    """A stage that is the published network, another that begins from it, and what that was told."""
    class_name, kwargs, state, _ = reference(arch)
    network = load_edm_network(class_name, kwargs, state)
    label = [Variable.label("label", 10)] if kwargs["label_dim"] else []
    teacher = Diffusion(IMAGE, given=label, network=network).eval()
    stage = Diffusion(IMAGE, given=given, network=spec_of(arch), **settings).eval()
    begun = begin(stage, network.state_dict(), {}, arch)
    return teacher, stage, begun


def link(variable: Variable, **said) -> tuple[Variable, LinkSpec]:
    return variable, LinkSpec(variable=variable.name, **said)


X = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SIGMA = torch.tensor([0.01, 0.5, 40.0])
LABEL, CLIP, SMALL = Variable.label("label", 10), Variable.vector("clip", 512), Variable.image("small", 3, 8)
VALUES = {
    "label": Given(torch.tensor([3, 0, 9])),
    "clip": Given(torch.randn(3, 512)),
    "small": Given(torch.randn(3, 3, 8, 8)),
}


def denoised(stage: Diffusion, augment: Tensor | None = None) -> Tensor:
    given = {link.variable.name: VALUES[link.variable.name] for link in stage.conditioner}
    with torch.no_grad():
        condition = replace(stage.conditioner(given, 3, X), augment=augment)
        return stage.denoise({"image": X}, {"image": SIGMA}, condition).x0["image"]


@pytest.mark.parametrize("order", [[LABEL, CLIP], [CLIP, LABEL]])
@pytest.mark.parametrize("arch", ["ddpmpp", "adm"])
def test_a_conditional_network_keeps_its_classes_and_ignores_the_embedding(arch, order) -> None:
    """VCDM, section 4. DDPM++ scales labels by the square root of their width, which must not change the output."""
    teacher, stage, begun = both(arch, [link(v, dropout=0.1) for v in order])
    assert {name for name in begun.new if "map_label" in name} == {
        f"network.map_label.weight of {name}"
        for name in ("clip", "the link features of clip", "the link features of label")
    }
    expected = denoised(teacher)
    assert off(denoised(stage), expected) < 1e-6
    others = {**VALUES, "label": Given(torch.tensor([4, 1, 8]))}
    with torch.no_grad():
        other = stage.denoise({"image": X}, {"image": SIGMA}, stage.conditioner(others, 3, X)).x0["image"]
    assert off(other, expected) > 1e-5, "the classes must matter"


def test_an_unconditional_network_ignores_embedding_and_images(tmp_path) -> None:
    teacher, stage, begun = both("ncsnpp", [link(CLIP), link(SMALL)])
    assert off(denoised(stage), denoised(teacher)) < 1e-6
    assert {"network.map_label.weight of clip", "network.map_label.bias"} < set(begun.new)
    assert "network.enc.16x16_conv.weight" in begun.new
    assert "network.enc.8x8_aux_residual.weight" in begun.new


def test_the_augmentation_projection() -> None:
    """Carried over where both know it; nothing else changes what the network does to images as they are."""
    label = torch.randn(3, GEOMETRIC)
    teacher, same, begun = both("ncsnpp", [], augment_dim=GEOMETRIC)
    assert begun == Begun((), ())
    assert torch.equal(denoised(same, label), denoised(teacher, label))
    _, without, begun = both("ncsnpp", [])
    assert begun.left == ("network.map_augment.weight",)
    assert torch.equal(denoised(without), denoised(teacher))
    _, coloured, begun = both("ncsnpp", [], augment_dim=GEOMETRIC + 5)
    assert begun.new == ("network.map_augment.weight",)
    wider = torch.cat([label, torch.randn(3, 5)], dim=1)
    assert off(denoised(coloured, wider), denoised(teacher, label)) < 1e-6


def test_labels_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(UserError, match=r"it has a label of 10 entries; of this stage's \(clip 512\) none fits"):
        both("ddpmpp", [link(CLIP)])
    with pytest.raises(UserError, match=r"\(one 10, two 10\) one and two all fit"):
        both("ddpmpp", [link(Variable.label("one", 10)), link(Variable.vector("two", 10))])
    with pytest.raises(UserError, match=r"network\.map_label\.weight is unexpected"):
        both("ddpmpp", [])


def test_a_stage_that_begins_from_a_stage_finds_its_variables_by_name() -> None:
    """The file of a stage says what it was given, so that columns move to where the variable is now."""
    first = [link(LABEL, dropout=0.2), link(CLIP, noise=0.3)]
    old = Diffusion(IMAGE, given=first, network=spec_of("adm")).eval()
    for parameter in old.parameters():
        nn.init.normal_(parameter, std=0.05)
    kept = {
        "stage": json.dumps({"given": [spec.model_dump() for _, spec in first], "precondition": {"kind": "edm"}}),
        "variables": json.dumps({v.name: {"identity": v.identity} for v, _ in first}),
    }
    extra = Variable.vector("extra", 4)
    new = Diffusion(IMAGE, given=[link(extra), *reversed(first)], network=spec_of("adm")).eval()
    begun = begin(new, old.state_dict(), kept, "old")
    assert begun.new == ("network.map_label.weight of extra",)
    places = columns(new.conditioner)
    weights = [stage.network.state_dict()["map_label.weight"] for stage in (old, new)]
    for name, place in columns(old.conditioner).items():
        assert torch.equal(weights[1][:, places[name]], weights[0][:, place])
    changed = Diffusion(IMAGE, given=[link(LABEL, dropout=0.2), link(CLIP)], network=spec_of("adm"))
    with pytest.raises(UserError, match=r"it has 17 entries of the link features of clip, this stage 0"):
        begin(changed, old.state_dict(), kept, "old")


def test_variances_that_were_learned_are_left_out() -> None:
    kwargs = {"img_resolution": 16, "img_channels": 3, "model_channels": 64, "channel_mult": [1], "num_blocks": 1}
    described = published("iDDPMPrecond", {**kwargs, "attn_resolutions": []})
    network = described.build().to_empty(device="cpu")
    for value in network.state_dict().values():
        nn.init.normal_(value, std=0.1)
    stage = Diffusion(IMAGE, network=described.network, precondition="iddpm", sampler=SamplerSpec(sigma_max=80))
    begun = begin(stage, network.state_dict(), {}, "iddpm")
    assert begun.left == ("network.out_conv.weight of variances", "network.out_conv.bias of variances")
    x, level = torch.randn(2, 3, 16, 16), torch.zeros(2)
    with torch.no_grad():
        assert torch.allclose(call(stage.eval().network, x, level), call(network.eval(), x, level)[:, :3], atol=1e-6)
