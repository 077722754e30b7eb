"""Recipes: YAML with places, finding files, cards, overrides and their merge."""

from __future__ import annotations

import json
import math
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_text import FIXTURES, LINES, RECIPE, changed, message, write

from chaindiff.io.errors import UserError
from chaindiff.specs import load as load_module
from chaindiff.specs.link import LinkSpec
from chaindiff.specs.load import available, load_recipe
from chaindiff.specs.network import PriorSpec, UNetSpec
from chaindiff.specs.yaml import MAX_DEPTH, assignment, dump, parse, read


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def value(text: str):
    node = parse(text, str)
    return node.plain() if node else None


# ---------------------------------------------------------------- YAML


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-4", 1e-4),
        ("-1E+3", -1000.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("12", 12),
        ("1_000_000", 1_000_000),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("-.inf", -math.inf),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("null", None),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("NO", "NO"),
        ("1:30", "1:30"),
        ("2024-01-02", "2024-01-02"),
        ("'12'", "12"),
        ("1.2.3", "1.2.3"),
        ("_1", "_1"),
        ("e5", "e5"),
    ],
)
def test_scalars_are_read_as_yaml_1_2_does(text, expected):
    got = value(text)
    assert got == expected and type(got) is type(expected)


def test_every_value_knows_its_line(here):
    node = read(write(here, "a: 1\nb:\n  - x\n  -\n    c: 2\n\n    d: &d {e: 3}\nf: *d\n"))
    places = {path: node.deepest(path.split(".")).where for path in ("a", "b", "b.0", "b.1.c", "b.1.d.e", "f", "f.e")}
    assert places == {
        "a": "r.yaml:1",
        "b": "r.yaml:2",
        "b.0": "r.yaml:3",
        "b.1.c": "r.yaml:5",
        "b.1.d.e": "r.yaml:7",
        "f": "r.yaml:8",
        "f.e": "r.yaml:7",
    }
    assert node.plain() == {"a": 1, "b": ["x", {"c": 2, "d": {"e": 3}}], "f": {"e": 3}}


def test_depth_up_to_the_limit_is_read():
    deep = "[" * (MAX_DEPTH - 1) + "1" + "]" * (MAX_DEPTH - 1)
    assert json.dumps(value(deep)) == deep
    with pytest.raises(UserError, match="nested"):
        value(f"[{deep}]")


def test_a_byte_order_mark_is_no_part_of_the_first_name(here):
    (here / "r.yaml").write_bytes(b"\xef\xbb\xbf" + LINES.encode())
    assert load_recipe("r.yaml").recipe.name == "small"


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False) | st.text()
    | st.sampled_from(["1e-4", "on", "no", "0o7", "1_0", "~", "-", ".inf", "1:30", "<<", "=", "&a", "1e5"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(plain)
@settings(deadline=None)
def test_dumped_yaml_reads_back_alike_here_and_in_yaml_1_1(data):
    text = dump({"data": data})
    assert yaml.safe_load(text) == {"data": data}
    if not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", text):
        assert value(text) == {"data": data}


@given(st.text(st.sampled_from("ab01:-[]{},&*!|>'\"#%@`? \n\t<.~")))
@settings(deadline=None, max_examples=300)
def test_any_text_is_read_or_refused_with_a_place(text):
    try:
        parse(text, "r.yaml:{}".format)
    except UserError as error:
        assert re.match(r"r\.yaml:\d+: ", str(error))


# ---------------------------------------------------------------- finding, cards, overrides


def test_names_and_paths(here, monkeypatch):
    monkeypatch.setattr(load_module, "SHIPPED", FIXTURES)
    by_name = load_recipe("vcdm_emoji")
    assert by_name.path == RECIPE
    assert load_recipe("recipes/vcdm_emoji.yaml").recipe == by_name.recipe
    assert load_recipe(RECIPE).recipe == by_name.recipe
    write(here, LINES, "recipes/vcdm_emoji.yaml")
    assert load_recipe("vcdm_emoji").recipe.name == "small"  # the current directory comes first
    write(here, "nonsense", "vcdm_emoji")  # a bare word is no file without a suffix
    assert load_recipe("vcdm_emoji").recipe.name == "small"
    assert list(available("recipe")) == ["vcdm_emoji"]
    assert list(available("card")) == ["clip_prior", "ddpmpp_base", "ddpmpp_small"]


def test_unknown_names(here, monkeypatch):
    monkeypatch.setattr(load_module, "SHIPPED", FIXTURES)
    assert message("vcdm_emogi") == (
        "there is no recipe 'vcdm_emogi'; did you mean 'vcdm_emoji'?\n"
        "  `chaindiff list` shows all; a path such as recipes/NAME.yaml works too"
    )
    assert message("x" * 5000).startswith("there is no recipe 'xxx")
    write(here, changed("given: [clip]", "use: ddpmpp_smal"))
    assert "r.yaml:17: there is no card 'ddpmpp_smal'; did you mean 'ddpmpp_small'?" in message("r.yaml")
    write(here, changed("given: [clip]", "use: [a]"))
    assert "r.yaml:17: use: expected a card's name, not a list" in message("r.yaml")


def test_cards_and_what_stands_beside_use():
    recipe = load_recipe(RECIPE).recipe
    image = recipe.stages["image"]
    assert isinstance(image.network, UNetSpec)
    # channels from the recipe, blocks from the card, mult from the card that the card uses
    assert (image.network.channels, image.network.blocks, image.network.mult) == (48, 2, [1, 2])
    assert image.train.images == 2_000_000 and image.train.optimizer.lr == 1e-4
    assert image.train.optimizer.betas == (0.9, 0.99)
    assert recipe.stages["image16"].network.channels == 32
    assert list(recipe.stages) == ["clip", "image16", "image"]


def test_fields_know_whether_recipe_or_card_said_them():
    loaded = load_recipe(RECIPE, changes=["stages.image.sample.steps=20"])
    places = {
        "stages.image": "recipes/vcdm_emoji.yaml:28",
        "stages.image.network.channels": "recipes/vcdm_emoji.yaml:32",
        "stages.image.network.blocks": "stages/ddpmpp_small.yaml:5",
        "stages.image.network.mult": "stages/ddpmpp_base.yaml:4",
        "stages.image.network.arch": "stages/ddpmpp_base.yaml:2",  # a default: the mapping that could have said it
        "stages.image.sample.steps": "--set stages.image.sample.steps=20",
        "variables.clip.encoder.reduce.k": "recipes/vcdm_emoji.yaml:17",
    }
    for path, place in places.items():
        assert (loaded.where(path) or "").endswith(place), path


def test_a_mistake_in_a_card_is_told_by_the_card(here):
    write(here, "network: {kind: unet}\ntrain:\n  imagse: 3\n", "stages/card.yaml")
    write(here, changed("given: [clip]", "use: card"))
    text = message("r.yaml")
    assert "stages/card.yaml:3: stages.image.train: unknown field 'imagse'; did you mean 'images'?" in text


def test_cards_in_a_circle_are_refused(here):
    write(here, "use: b\n", "stages/a.yaml")
    write(here, "use: a\n", "stages/b.yaml")
    write(here, changed("given: [clip]", "use: a"))
    assert message("r.yaml") == "stages/b.yaml:1: cards use each other in a cycle: a -> b -> a"


def test_set_parses_its_value_as_yaml():
    recipe = load_recipe(
        RECIPE,
        changes=[
            "stages.image.train.optimizer.lr=1e-4",
            "sample.exact=true",
            "sample.want=[image, clip]",
            "name=no",
        ],
    ).recipe
    assert recipe.stages["image"].train.optimizer.lr == 1e-4
    assert recipe.sample.exact is True and recipe.sample.want == ["image", "clip"] and recipe.name == "no"
    assert recipe.sample.count == 16  # what is not named stays


def test_keyword_overrides_are_the_same_merge():
    by_keyword = load_recipe(RECIPE, stages={"image": {"sample": {"steps": 20}}}, sample={"count": 3}).recipe
    by_text = load_recipe(RECIPE, changes=["stages.image.sample.steps=20", "sample.count=3"]).recipe
    assert by_keyword == by_text
    assert by_keyword.stages["image"].sample.steps == 20 and by_keyword.stages["image"].network.channels == 48
    prior = PriorSpec(kind="prior", width=32, heads=4)
    assert load_recipe(RECIPE, stages={"clip": {"network": prior}}).recipe.stages["clip"].network.width == 32
    link = LinkSpec(variable="clip", dropout=0.5)
    given = [link, {"variable": "image16", "noise": 0.3}]
    assert load_recipe(RECIPE, stages={"image": {"given": given}}).recipe.stages["image"].given[0] == link


def test_later_overrides_win():
    recipe = load_recipe(RECIPE, changes=["sample.count=3", "sample.count=4"]).recipe
    assert recipe.sample.count == 4
    assert load_recipe(RECIPE, changes=["sample.count=3"], sample={"count": 5}).recipe.sample.count == 5


def test_another_kind_drops_the_fields_of_the_old_one(here):
    # The card's prior has `width`, which a unet does not know; a vector needs a prior, hence a stage for an image.
    write(here, "network: {kind: prior, width: 64, depth: 2}\ntrain: {images: 10}\n", "stages/card.yaml")
    write(here, changed("given: [clip]\n    network:", "use: card\n    network:"))
    network = load_recipe("r.yaml").recipe.stages["image"].network
    assert network == UNetSpec(kind="unet", channels=32, mult=[1, 2], attention=[16])
    write(here, LINES)
    text = message("r.yaml", changes=["stages.image.network.kind=prior"])
    assert text == (
        "--set stages.image.network.kind=prior: stages.image.network.kind: "
        "a prior generates vectors, not an image; use a unet or a transformer"
    )


def test_another_kind_outside_a_union_keeps_the_other_fields():
    optimizer = {"kind": "adam", "lr": 0.5}
    recipe = load_recipe(
        RECIPE,
        changes=["stages.clip.train.optimizer.kind=adamw"],
        stages={"clip": {"train": {"optimizer": {"lr": 0.5}}}},
    ).recipe
    assert recipe.stages["clip"].train.optimizer.model_dump(include=set(optimizer)) == {"kind": "adamw", "lr": 0.5}


def test_an_override_of_use_changes_the_card_below(here):
    write(here, "network: {kind: unet, mult: [1, 1]}\ntrain: {images: 5}\n", "stages/one.yaml")
    write(here, "network: {kind: unet, mult: [2, 2]}\ntrain: {images: 7}\n", "stages/two.yaml")
    write(here, changed("    train: {images: 1000}\n    sample", "    sample").replace("given: [clip]", "use: one"))
    assert load_recipe("r.yaml").recipe.stages["image"].train.images == 5
    recipe = load_recipe("r.yaml", changes=["stages.image.use=two"]).recipe
    assert recipe.stages["image"].train.images == 7
    assert recipe.stages["image"].network.mult == [1, 2]  # said beside `use`, so it still overrides the card


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stages.image.sampl.steps=2", "stages.image: unknown field 'sampl'; did you mean 'sample'?"),
        ("stages.imag.sample.steps=2", "there is no stage 'imag'; did you mean 'image'?"),
        ("variables.clp.shape=[3]", "there is no variable 'clp'; did you mean 'clip'?"),
        ("sampel.count=2", "unknown field 'sampel'; did you mean 'sample'?"),
        ("sample.count", "expected NAME=VALUE after --set\n  for example --set name=value"),
        ("=3", "expected NAME=VALUE after --set"),
        ("sample..count=3", "expected NAME=VALUE after --set"),
        ("sample.count=[", "is not valid YAML"),
        ("sample.count=x", "sample.count: expected a whole number, not 'x'"),
        ("stages.image.given.7.noise=1", "this list has no item '7'; its items are 0 to 1"),
        ("stages=", "stages: expected fields (a mapping), not nothing"),
    ],
)
def test_set_mistakes_name_the_option(text, expected):
    assert f"--set {text}: {expected}" in message(RECIPE, changes=[text])


def test_keyword_mistakes_say_so():
    assert message(RECIPE, sampel={}) == "keyword argument: unknown field 'sampel'; did you mean 'sample'?"
    assert "keyword argument: there is no stage 'imag'" in message(RECIPE, stages={"imag": {"sample": {"steps": 3}}})


def test_an_override_may_add_a_whole_stage(here):
    write(here, LINES)
    network = "{kind: unet, mult: [1], attention: []}"
    recipe = load_recipe("r.yaml", changes=[f"stages.image16={{network: {network}, train: {{images: 5}}}}"]).recipe
    assert recipe.stages["image16"].train.images == 5 and list(recipe.stages) == ["clip", "image", "image16"]


def test_assignments_keep_equals_signs_of_the_value():
    path, node = assignment("a.b=x=y")
    assert (path, node.plain()) == (["a", "b"], "x=y")


# ---------------------------------------------------------------- every name, and none


def test_a_star_stands_for_every_name_in_its_place(here):
    """Stages of cards too; a later override of one stage goes over it, and an earlier one is gone over."""
    changes = ["stages.image.sample.steps=3", "stages.*.sample.steps=9", "stages.clip.sample.steps=5"]
    stages = load_recipe(RECIPE, changes=changes).recipe.stages
    assert {name: stage.sample.steps for name, stage in stages.items()} == {"clip": 5, "image16": 9, "image": 9}
    assert load_recipe(
        RECIPE, changes=["stages.*.use=ddpmpp_small"], stages={"clip": {"use": "clip_prior"}}
    ).recipe.stages
    by_keyword = load_recipe(RECIPE, stages={"*": {"sample": {"steps": 9}}, "clip": {"sample": {"steps": 5}}})
    assert by_keyword.recipe.stages == load_recipe(RECIPE, changes=changes[1:]).recipe.stages
    again = load_recipe(RECIPE).override(
        {"stages": {"*": {"train": {"images": 8}}}, "variables": {"*": {"sigma_data": 1}}}
    )
    assert {stage.train.images for stage in again.recipe.stages.values()} == {8}
    assert {variable.sigma_data for variable in again.recipe.variables.values()} == {1}
    write(here, changed("want: [image]", "given: {category: 1}"))
    assert load_recipe("r.yaml", changes=["sample.given.*=2"]).recipe.sample.given == {"category": 2}


STANDS = "`*` stands for the names of stages, variables or given values: stages.*, variables.*, sample.given.*"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stages.*.sample.stps=9", "stages.image.sample: unknown field 'stps'; did you mean 'steps'?"),
        ("stages.*.network.chanels=8", "stages.image16.network: unknown field 'chanels'; did you mean 'channels'?"),
        ("sample.*=9", f"sample.*: {STANDS}"),
        ("*=9", f"*: {STANDS}"),
        ("stages.image.given.*.noise=1", f"stages.image.given.*: {STANDS}"),
        ("sample.given.*=1", "sample.given.*: `*` matches nothing, since there are no entries"),
    ],
)
def test_stars_that_mean_nothing(text, expected):
    assert f"--set {text}: {expected}" in message(RECIPE, changes=[text])


def test_values_of_names_are_cleared_and_taken_away(here):
    write(here, changed("path: emoji64}", "path: emoji64, where: {style: google}}").replace(
        "want: [image]", "given: {category: 1, clip: x.npy}"))  # fmt: skip
    assert set(load_recipe("r.yaml").recipe.sample.given) == {"category", "clip"}
    for change, left in (
        ("sample.given={}", {}),
        ("sample.given.clip=null", {"category": 1}),
        ("sample.given.*=null", {}),
        ("sample={}", {"category": 1, "clip": "x.npy"}),  # of a model, nothing is said
    ):
        assert load_recipe("r.yaml", changes=[change]).recipe.sample.given == left, change
    cleared = load_recipe("r.yaml", changes=["sample.given={}", "sample.given.category=2", "data.where={}"]).recipe
    assert cleared.sample.given == {"category": 2} and cleared.data.where == {}
    assert load_recipe("r.yaml").override({"sample": {"given": {"category": None}}}).recipe.sample.given == {
        "clip": "x.npy"
    }
    assert "there is no variable 'catgory'; did you mean 'category'?" in message(
        "r.yaml", changes=["sample.given.catgory=null"]
    )
    assert len(load_recipe("r.yaml", changes=["stages={}", "variables={}"]).recipe.stages) == 2
