"""Decoders: what is sampled is decoded, what is given is encoded; in Python, in recipes, in plans and pictures."""

# ruff: noqa: E501 (a table of mistakes has one a line)

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from recipe_text import message, write
from torch import Tensor

import chaindiff as cd
from chaindiff import cli
from chaindiff.chain.variable import Variable
from chaindiff.encoders import build_decoder
from chaindiff.encoders.resize import resize
from chaindiff.evaluation.rows import Row
from chaindiff.io.errors import UserError
from chaindiff.recipe.assembly import Assembly
from chaindiff.specs.load import load_recipe
from chaindiff.specs.network import UNetSpec
from chaindiff.specs.recipe import Recipe
from chaindiff.specs.sampling import SamplerSpec

LATENT = """\
name: latent
data: {path: emoji64, split: test, where: {style: google}}
variables:
  image: {kind: image, shape: [3, 32, 32], decoder: {kind: resize, of: latent}}
  latent: {kind: image, shape: [3, 8, 8], encoder: {kind: resize, of: image}}
stages:
  latent:
    network: {kind: unet, channels: 16, mult: [1, 1], blocks: 1, attention: []}
    train: {images: 16, batch: 8, execution: eager}
    sample: {steps: 2}
sample: {count: 3, batch: 2, execution: eager}
"""


def changed(old: str, new: str) -> str:
    assert LATENT.count(old) == 1, old
    return LATENT.replace(old, new)


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write(tmp_path, LATENT)


# ------------------------------------------------------------ in Python


class Twice:
    """Every pixel as 2 x 2."""

    name, of = "image", "latent"

    def __call__(self, value: Tensor) -> Tensor:
        return value.repeat_interleave(2, 2).repeat_interleave(2, 3)


class Half:
    name, of = "latent", "image"

    def __call__(self, value: Tensor) -> Tensor:
        return value[..., ::2, ::2]


def chain(**parts) -> cd.Chain:
    unet = UNetSpec(kind="unet", channels=16, mult=[1, 1], blocks=1, attention=[])
    stage = cd.Diffusion(Variable.image("latent", 3, 8), network=unet, sampler=SamplerSpec(steps=2))
    return cd.Chain([stage], encoders=[Half()], decoders=[Twice()], **parts)


def test_what_is_sampled_is_decoded_and_wanted_by_default() -> None:
    out = chain().sample(3, batch=2)
    assert list(out) == ["latent", "image"] and out["image"].shape == (3, 3, 16, 16)
    assert torch.equal(out["image"], Twice()(out["latent"]))
    assert torch.equal(chain().sample(3, want=["image"], batch=2)["image"].isfinite(), out["image"].isfinite())


def test_a_given_image_is_encoded_and_no_stage_runs() -> None:
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    sampled = chain()
    out = sampled.sample(2, given={"image": image})
    assert list(out) == ["latent"] and torch.equal(out["latent"], Half()(image)) and not sampled.seconds
    latent = torch.rand(1, 3, 8, 8)
    assert torch.equal(chain().sample(2, given={"latent": latent})["image"], Twice()(latent).expand(2, -1, -1, -1))


def test_decoders_may_follow_each_other_in_any_order() -> None:
    class Again(Twice):
        name, of = "big", "image"

    stage = chain().stages["latent"]
    both = cd.Chain([stage], decoders=[Again(), Twice()])
    assert both.generated() == ["latent", "image", "big"] and both.generated(["latent"]) == ["image", "big"]
    assert both.sample(1)["big"].shape == (1, 3, 32, 32)

    class Other(Twice):
        of = "code"

    assert cd.Chain([stage], decoders=[Other()]).generated() == ["latent"], "nothing makes what it reads"


@pytest.mark.parametrize("declared", [True, False])
def test_a_plan_shows_the_decoder(declared) -> None:
    variables = {"image": Variable.image("image", 3, 16)} if declared else {}
    plan = chain(variables=variables).plan()
    assert "  latent -> image (decoded)" in str(plan) and "2. decoder image: image" in str(plan)
    assert plan.facts()["steps"][1]["makes"] == {"image": [3, 16, 16] if declared else None}
    boxes, arrows = plan.drawing()
    assert {box.name for box in boxes} == {"latent", "image", "stage latent"}
    styles = {(arrow.src, arrow.dst): arrow.style for arrow in arrows}
    assert styles[("latent", "image")] == "decoder" and styles[("image", "latent")] == "idle"
    assert "stroke-dasharray" not in plan.svg(), "only encoders are dashed"
    given = chain(variables=variables).plan(["latent"], ["image"])
    styles = {(arrow.src, arrow.dst): arrow.style for arrow in given.drawing()[1]}
    assert styles[("latent", "image")] == "idle" and styles[("image", "latent")] == "encoder"
    assert given.svg().count("stroke-dasharray") == 1


# ------------------------------------------------------------ in recipes


def test_plan_of_a_recipe_with_a_latent(recipe) -> None:
    plan = Assembly(load_recipe(recipe)).request
    assert plan.plan.want == ("latent", "image") and plan.running == ["latent"]
    assert Assembly(load_recipe(recipe)).chain().plan(["latent"], ["image"]).running == []


def test_trained_sampled_and_given(recipe, capsys) -> None:
    named = ["--set", "stages.latent.weights=runs/latent"]
    for command in (["train", "r.yaml"], ["sample", "r.yaml", "--out", "runs/out", *named]):
        with pytest.raises(SystemExit) as ended:
            cli.main(command)
        assert ended.value.code == 0, capsys.readouterr().err
    weights = "stages.latent.weights=runs/latent/stages/latent/weights.safetensors"
    made = cd.load(recipe, changes=[weights]).sample(3, batch=2)
    torch.testing.assert_close(made["image"], resize(made["latent"], 32, "bilinear"))
    assert sorted(p.name for p in Path("runs/out/samples/image").glob("*.png")) == sorted(
        p.name for p in Path("runs/out/samples/latent").glob("*.png")
    )
    Image.new("RGB", (40, 40), (255, 0, 0)).save("red.png")
    with pytest.raises(SystemExit) as ended:
        cli.main(["sample", "r.yaml", "--out", "runs/given", "--want", "latent", "--given", "image=red.png"])
    assert ended.value.code == 0
    with Image.open(next(Path("runs/given/samples/latent").glob("0*.png"))) as image:
        assert image.size == (8, 8) and image.convert("RGB").getpixel((4, 4)) == (255, 0, 0)
    row = Row("row", load_recipe(recipe), "image", Path("rows"), out=Path("runs/latent"))
    assert row.made == ["latent", "image"]
    smooth = load_recipe(recipe, changes=["variables.image.decoder.filter=bicubic"])
    assert Row("row", smooth, "image", Path("rows"), out=Path("runs/latent")).key != row.key


def test_a_decoder_is_no_part_of_what_a_variable_is(recipe) -> None:
    specs = Recipe.model_validate(load_recipe(recipe).tree).variables
    bare = specs | {"image": specs["image"].model_copy(update={"decoder": None})}
    for name in specs:
        assert Variable.from_specs(name, specs).identity == Variable.from_specs(name, bare).identity


@pytest.mark.parametrize("kernel", ["box", "bilinear", "bicubic"])
def test_enlarging(recipe, kernel) -> None:
    specs = load_recipe(recipe, changes=[f"variables.image.decoder.filter={kernel}"]).recipe.variables
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    out = build_decoder("image", specs)(x)
    assert out.shape == (2, 3, 32, 32) and float(out.abs().max()) <= 1
    torch.testing.assert_close(out, resize(x, 32, kernel))
    flat = build_decoder("image", specs)(torch.full((1, 3, 8, 8), 0.25))
    torch.testing.assert_close(flat, torch.full((1, 3, 32, 32), 0.25))
    with pytest.raises(UserError, match="variable 'latent' has no decoder"):
        build_decoder("latent", specs)


TWO = "  image: {kind: image, shape: [3, 32, 32], decoder: {kind: resize, of: latent}}\n"
DECODER = ", decoder: {kind: resize, of: latent}}"
MISTAKES = [
    (changed("resize, of: latent", "resize, of: latnet"), "r.yaml:4: variables.image.decoder.of: there is no variable 'latnet'; did you mean 'latent'?"),
    (changed("resize, of: latent", "resise, of: latent"), "r.yaml:4: variables.image.decoder.kind: 'resise' is not one of resize"),
    (changed("resize, of: latent", "resize, of: latent, fliter: box"), "r.yaml:4: variables.image.decoder: unknown field 'fliter'; did you mean 'filter'?"),
    (changed("[3, 8, 8]", "[3, 64, 64]"), "r.yaml:4: variables.image.decoder.of: a decoder only enlarges images, but 'latent' is 64 pixels wide"),
    (changed("[3, 8, 8]", "[4, 8, 8]"), "r.yaml:4: variables.image.decoder.of: 'latent' has 4 channels, but this variable has 3"),
    (changed("stages:\n", "  tag: {kind: label, shape: [9], decoder: {kind: resize, of: latent}}\nstages:\n"), "r.yaml:6: variables.tag.decoder.of: resize maps an image to an image, not an image to a label"),
    (changed("encoder: {kind: resize, of: image}", "encoder: {kind: resize, of: image}, decoder: {kind: resize, of: image}"), "r.yaml:4: variables.image.decoder: decoders form a cycle: image -> latent -> image"),
    (changed("    network", "    given: [image]\n    network"), "r.yaml:8: stages.latent.given: stages and decoders form a cycle: image -> latent -> image"),
    (changed("  latent:\n", "  image:\n"), "r.yaml:4: variables.image.decoder: stage 'image' already generates 'image'; a variable has a stage or a decoder, not both"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), MISTAKES, ids=[expected[:60] for _, expected in MISTAKES])
def test_mistakes_are_explained_with_their_place(recipe, text, expected) -> None:
    write(Path.cwd(), text)
    assert expected in message("r.yaml")


def test_encoder_and_decoder_of_one_pair_are_no_circle_but_two_encoders_are(recipe) -> None:
    assert load_recipe(recipe).recipe.variables["image"].decoder is not None
    write(recipe.parent, changed("decoder:", "encoder:"))
    assert "encoders form a cycle: image -> latent -> image" in message("r.yaml")
