"""Recipes: YAML with places, merging, messages, the lock, the schema."""

# ruff: noqa: E501 (a table of mistakes has one a line)

from __future__ import annotations

import copy
import json
import math
import os
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chaindiff.specs import load as load_module
from chaindiff.specs.errors import UserError
from chaindiff.specs.load import available, load_recipe
from chaindiff.specs.lock import json_schema, resolved, write_lock
from chaindiff.specs.recipe import LinkSpec, PriorSpec, Recipe, UNetSpec
from chaindiff.specs.yaml import MAX_DEPTH, assignment, dump, parse, read

FIXTURES = Path(__file__).parent / "fixtures"
RECIPE = FIXTURES / "recipes" / "vcdm_emoji.yaml"

# A recipe with every sort of variable and stage, whose lines the messages below count on.
LINES = """\
name: small
data: {path: emoji64}
variables:
  image: {kind: image, shape: [3, 32, 32]}
  clip:
    kind: vector
    shape: [128]
    encoder: {kind: open_clip, model: clip_emoji, of: image}
  image16: {kind: image, shape: [3, 16, 16], encoder: {kind: resize, of: image}}
  category: {kind: label, shape: [9]}
stages:
  clip:
    given: [category]
    network: {kind: prior, width: 64}
    train: {images: 1000}
  image:
    given: [clip]
    network:
      kind: unet
      channels: 32
      mult: [1, 2]
      attention: [16]
    train: {images: 1000}
    sample: {steps: 18}
sample: {want: [image]}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def message(source, **options) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(source, **options)
    return str(caught.value)


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


# A bomb of seven doublings of a tenfold list, and aliases that build depth rather than size.
BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 8)
)
TOWER = "a0: &a0 {b: 1}\n" + "".join(f"a{i}: &a{i} {{b: *a{i - 1}}}\n" for i in range(1, 80))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "r.yaml: is empty"),
        (b"# only a comment\n", "r.yaml: is empty"),
        (b"- a\n- b\n", "r.yaml:1: should hold fields (`name: value`), not a list"),
        (b"hello", "r.yaml:1: should hold fields (`name: value`), not 'hello'"),
        (b"name: a\n\x89PNG\r\n\x1a\n", "r.yaml:2: is not a text file in UTF-8"),
        (b"name: a\nb: \x00\n", "r.yaml:2: is not a text file: it has the control character '\\x00'"),
        (b"name: a\ndata:\n\tpath: x\n", "r.yaml:3: a tab cannot indent YAML; use spaces"),
        (b"name: a\ndata: {}\nname: b\n", "r.yaml:3: 'name' is said twice; first at r.yaml:1"),
        (b"name: a\ndata: {path: [}\n", "r.yaml:2: is not valid YAML: did not find expected node content"),
        (b"name: 'a\n\n", "is not valid YAML: found unexpected end of stream"),
        (b"a: *b\n", "r.yaml:1: the alias *b stands for nothing: no &b ends before it"),
        (b"a: &a\n  b: *a\n", "r.yaml:2: the alias *a stands for nothing"),
        (BOMB.encode(), "r.yaml:5: holds more than 100000 values, counting what aliases repeat"),
        (TOWER.encode(), "is nested more than 50 levels deep"),
        (b"a: " + b"[" * 400_000, "r.yaml:1: is nested more than 50 levels deep"),
        (b"a: " + b"{b: " * 60, "r.yaml:1: is nested more than 50 levels deep"),
        (b"a: " + b"x" * 1_000_001, "r.yaml: is larger than 1 MB"),
        (b"a: 1\n---\nb: 2\n", "r.yaml:2: holds more than one document (`---`)"),
        (b"a: 1\nb: !!python/object/apply:os.system [ls]\n", "r.yaml:2: the tag 'tag:yaml.org,2002:python/object"),
        (b"? [a, b]\n: 1\n", "r.yaml:1: a field's name should be plain text"),
        (b"a: &a {b: 1}\nc:\n  <<: *a\n", "r.yaml:3: merge keys (`<<`) are not read"),
        (b"a: " + b"9" * 5000, "r.yaml:1: is too long a number"),
    ],
)
def test_files_that_are_no_recipe(here, content, expected):
    (here / "r.yaml").write_bytes(content)
    assert expected in message("r.yaml")


def test_depth_up_to_the_limit_is_read():
    deep = "[" * (MAX_DEPTH - 1) + "1" + "]" * (MAX_DEPTH - 1)
    assert json.dumps(value(deep)) == deep
    with pytest.raises(UserError, match="nested"):
        value(f"[{deep}]")


def test_a_byte_order_mark_is_no_part_of_the_first_name(here):
    (here / "r.yaml").write_bytes(b"\xef\xbb\xbf" + LINES.encode())
    assert load_recipe("r.yaml").recipe.name == "small"


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
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


# ---------------------------------------------------------------- messages


def changed(old: str, new: str) -> str:
    assert LINES.count(old) == 1, old
    return LINES.replace(old, new)


MISTAKES = [
    # fields and their types
    (changed("name: small\n", ""), "r.yaml:1: missing field 'name'"),
    (changed("  image:\n    given", "  image:\n    gvien"), "r.yaml:17: stages.image: unknown field 'gvien'; did you mean 'given'?"),
    (changed("channels: 32", "chanels: 32"), "r.yaml:20: stages.image.network: unknown field 'chanels'; did you mean 'channels'?"),
    (changed("channels: 32", "width: 32"), "r.yaml:20: stages.image.network: unknown field 'width'; known: kind, arch, channels"),
    (changed("      kind: unet\n", ""), "r.yaml:18: stages.image.network: missing field 'kind'; known: unet, prior"),
    (changed("kind: unet", "kind: unett"), "r.yaml:19: stages.image.network.kind: unknown kind 'unett'; did you mean 'unet'?"),
    (changed("kind: unet", "kind: gan"), "r.yaml:19: stages.image.network.kind: unknown kind 'gan'; known: unet, prior"),
    (changed("{steps: 18}", "{steps: many}"), "r.yaml:24: stages.image.sample.steps: expected a whole number, not 'many'"),
    (changed("{steps: 18}", "{steps: '18'}"), "r.yaml:24: stages.image.sample.steps: expected a whole number, not '18'"),
    (changed("{steps: 18}", "{steps: true}"), "r.yaml:24: stages.image.sample.steps: expected a whole number, not true"),
    (changed("{steps: 18}", "{steps: 1.5}"), "r.yaml:24: stages.image.sample.steps: expected a whole number, not 1.5"),
    (changed("{steps: 18}", "{steps: }"), "r.yaml:24: stages.image.sample.steps: expected a whole number, not nothing"),
    (changed("{steps: 18}", "{steps: 0}"), "r.yaml:24: stages.image.sample.steps: should be above 0, not 0"),
    (changed("{steps: 18}", "{sigma_max: .inf}"), "r.yaml:24: stages.image.sample.sigma_max: should be a finite number, not inf"),
    (changed("{steps: 18}", "{solver: huen}"), "stages.image.sample.solver: 'huen' is not one of euler, heun, dpmpp_2m; did you mean 'heun'?"),
    (changed("{steps: 18}", "18"), "r.yaml:24: stages.image.sample: expected fields (a mapping), not 18"),
    (changed("[1, 2]", "2"), "r.yaml:21: stages.image.network.mult: expected a list, not 2"),
    (changed("      channels: 32", "      dropout: 1.5"), "r.yaml:20: stages.image.network.dropout: should be at most 1, not 1.5"),
    (changed("{images: 1000}\n    sample", "{images: 1000, optimizer: {betas: [0.9]}}\n    sample"), "r.yaml:23: stages.image.train.optimizer.betas: missing item 2 of the list"),
    (changed("want: [image]", "exact: on"), "r.yaml:25: sample.exact: expected true or false, not 'on'"),
    (changed("want: [image]", "exact: 1"), "r.yaml:25: sample.exact: expected true or false, not 1"),
    (changed("name: small", "name: so small"), "r.yaml:1: name: 'so small' is not a name: letters, digits and underscores"),
    (changed("path: emoji64", "path: 64"), "r.yaml:2: data.path: expected text, not 64"),
    (changed("  category:", "  cate gory:"), "r.yaml:10: variables.cate gory: 'cate gory' is not a name"),
    (changed("{kind: label, shape: [9]}", ""), "r.yaml:10: variables.category: expected fields (a mapping), not nothing"),
    (changed("kind: label", "kind: lable"), "variables.category.kind: 'lable' is not one of image, vector, tokens, label, text; did you mean 'label'?"),
    (changed("kind: open_clip", "kind: openclip"), "r.yaml:8: variables.clip.encoder.kind: unknown kind 'openclip'; did you mean 'open_clip'?"),
    (changed("given: [clip]", "given: [{variabel: clip}]"), "r.yaml:17: stages.image.given.0: unknown field 'variabel'; did you mean 'variable'?"),
    (changed("given: [clip]", "given: [{variabel: clip}]"), "r.yaml:17: stages.image.given.0: missing field 'variable'"),
    (changed("given: [clip]", "given: [3]"), "r.yaml:17: stages.image.given.0: expected fields (a mapping), not 3"),
    (changed("given: [clip]", "ues: card"), "r.yaml:17: stages.image: unknown field 'ues'; did you mean 'use'?"),
    (changed("given: [clip]", "generates: [image, clip]"), "r.yaml:17: stages.image.generates: expected at most 1 item, not 2"),
    (changed("name: small", "name: small\nlock: 3"), "r.yaml:2: lock: expected fields (a mapping), not 3"),
    # variables
    (changed("shape: [9]", "shape: [9, 2]"), "r.yaml:10: variables.category.shape: expected [number of classes] for kind label, not [9, 2]"),
    (changed("shape: [3, 32, 32]", "shape: [3, 32, 16]"), "r.yaml:4: variables.image.shape: images are square, not 32 x 16"),
    (changed("model: clip_emoji, of: image", "model: clip_emoji, of: imgae"), "r.yaml:8: variables.clip.encoder.of: there is no variable 'imgae'; did you mean 'image'?"),
    (changed("model: clip_emoji, of: image", "model: clip_emoji, of: category"), "variables.clip.encoder.of: open_clip makes a vector of an image or a text, not a vector of a label"),
    (changed("resize, of: image", "resize, of: clip"), "r.yaml:9: variables.image16.encoder.of: resize makes an image of an image, not an image of a vector"),
    (changed("resize, of: image", "resize, of: image16"), "r.yaml:9: variables.image16.encoder: encoders read each other in a circle: image16 -> image16"),
    (changed("[3, 16, 16]", "[1, 16, 16]"), "r.yaml:9: variables.image16.encoder.of: 'image' has 3 channels, but this variable 1"),
    (changed("[3, 16, 16]", "[3, 64, 64]"), "r.yaml:9: variables.image16.encoder.of: resize makes images smaller, but 'image' is 32 pixels wide"),
    (changed("of: image}\n  image16", "of: image, reduce: {kind: pca, k: 64}}\n  image16"), "variables.clip.encoder.reduce.k: 64 components do not make a vector of shape [128]"),
    (changed(", encoder: {kind: resize, of: image}}", "}"), "r.yaml:9: variables.image16: images without an encoder are the data, and 'image' is that already\n  give one"),
    (changed("    encoder: {kind: open_clip, model: clip_emoji, of: image}\n", ""), "r.yaml:5: variables.clip: stage 'clip' trains with 'clip', which needs an encoder: data holds no vector"),
    (changed("[3, 32, 32]}", "[3, 32, 32], of: x}"), "r.yaml:4: variables.image.of: only a label or a text is read from a field"),
    (changed("    shape: [128]", "    shape: [128]\n    source: uniform"), "r.yaml:8: variables.clip.source: only a label can be drawn uniformly"),
    # stages
    (changed("  image:\n    given", "  imgae:\n    given"), "r.yaml:16: stages.imgae: there is no variable 'imgae'; did you mean 'image'?\n  a stage generates what bears its name"),
    (changed("given: [clip]", "generates: [picture]"), "r.yaml:17: stages.image.generates: there is no variable 'picture'"),
    (changed("given: [clip]", "generates: [clip]"), "r.yaml:17: stages.image.generates: stage 'clip' generates 'clip' already"),
    (changed("given: [clip]", "given: [clipp]"), "r.yaml:17: stages.image.given.0: there is no variable 'clipp'; did you mean 'clip'?"),
    (changed("given: [clip]", "given: [clip, image]"), "r.yaml:17: stages.image.given.1: the stage generates 'image' itself, so it cannot be given it"),
    (changed("given: [clip]", "given:\n    - clip\n    - clip"), "r.yaml:19: stages.image.given.1: 'clip' is given twice"),
    (changed("given: [category]", "given: [image]"), "r.yaml:13: stages.clip.given: stages are given each other in a circle: clip -> image -> clip"),
    (changed("given: [category]", "given: [image16]"), "r.yaml:13: stages.clip.given.0: a prior takes no images"),
    (changed("{kind: label, shape: [9]}", "{kind: text}"), "r.yaml:13: stages.clip.given.0: a network cannot take text; give a variable that encodes 'category'"),
    (changed("{kind: prior, width: 64}", "{kind: unet}"), "r.yaml:14: stages.clip.network.kind: a unet generates images, not a vector; use a prior"),
    (changed("  image:\n    given", "  category:\n    given"), "r.yaml:19: stages.category.network.kind: a unet generates images, not a label"),
    (changed("width: 64", "width: 60"), "r.yaml:14: stages.clip.network.width: should be even and a multiple of heads (8), not 60"),
    (changed("[1, 2]", "[1, 2, 2, 2, 2, 2, 2]"), "stages.image.network.mult: 7 levels halve the image 6 times, but 32 pixels do not allow it"),
    (changed("[1, 2]", "[]"), "stages.image.network.mult: expected a factor for at least one resolution"),
    (changed("[16]", "[16, 8]"), "r.yaml:22: stages.image.network.attention: 8 is none of this network's resolutions, which are 32, 16"),
    (changed("kind: unet", "kind: unet\n      arch: adm").replace("[1, 2]", "[1, 1]"), "r.yaml:21: stages.image.network.channels: adm attends with heads of 64 channels, which do not divide 32"),
    (changed("{steps: 18}", "{guidance: 2}"), "r.yaml:24: stages.image.sample.guidance: 2 compares with an absent value, but no link of this stage has a `dropout`"),
    (changed("given: [clip]", "given: [{variable: clip, noise: 0.1, sample_noise: 0.5}]"), "stages.image.given.0.sample_noise: 0.5 is above 0.1, the largest level in training"),
    (changed("given: [clip]", "given: [{variable: clip, null: learned}]"), "r.yaml:17: stages.image.given.0.null: is never used"),
    (changed("{steps: 18}", "{sigma_min: 90}"), "stages.image.sample.sigma_min: 90 should be below sigma_max, 80"),
    (changed("{steps: 18}", "{churn: {min: 3, max: 2}}"), "stages.image.sample.churn.min: 3 should not be above churn.max, 2"),
    (changed("{images: 1000}\n    sample", "{images: 1000, batch: 10, accumulate: 3}\n    sample"), "stages.image.train.accumulate: 3 micro-batches do not divide a batch of 10"),
    # sampling
    (changed("want: [image]", "want: [imag]"), "r.yaml:25: sample.want: there is no variable 'imag'; did you mean 'image'?"),
    (changed("want: [image]", "given: {categry: 1}"), "r.yaml:25: sample.given: there is no variable 'categry'; did you mean 'category'?"),
    (changed("want: [image]", "given: {category: 9}"), "r.yaml:25: sample.given.category: 9 is not one of 9 classes, which count from 0"),
]  # fmt: skip


def test_the_unspoiled_recipe_loads(here):
    write(here, LINES)
    assert load_recipe("r.yaml").recipe.stages["image"].given == [LinkSpec(variable="clip")]


@pytest.mark.parametrize(("text", "expected"), MISTAKES, ids=[expected[:60] for _, expected in MISTAKES])
def test_mistakes_are_explained_with_their_place(here, text, expected):
    write(here, text)
    assert expected in message("r.yaml")


def test_all_mistakes_are_listed_at_once(here):
    write(here, LINES.replace("channels", "chanels").replace("steps: 18", "steps: many").replace("name", "nmae"))
    assert message("r.yaml").splitlines() == [
        "4 mistakes",
        "  r.yaml:1: missing field 'name'",
        "  r.yaml:20: stages.image.network: unknown field 'chanels'; did you mean 'channels'?",
        "  r.yaml:24: stages.image.sample.steps: expected a whole number, not 'many'",
        "  r.yaml:1: unknown field 'nmae'; did you mean 'name'?",
    ]


def test_a_long_list_of_mistakes_is_cut(here):
    write(here, LINES + "".join(f"extra{i}: 1\n" for i in range(15)))
    lines = message("r.yaml").splitlines()
    assert lines[0] == "15 mistakes" and lines[-1] == "  and 5 more" and len(lines) == 12


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
        "  `chaindiff list` shows all; a path such as recipes/NAME.yaml is found too"
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
    loaded = load_recipe(RECIPE, set=["stages.image.sample.steps=20"])
    places = {
        "stages.image": "recipes/vcdm_emoji.yaml:28",
        "stages.image.network.channels": "recipes/vcdm_emoji.yaml:31",
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
    assert message("r.yaml") == "stages/b.yaml:1: cards use each other in a circle: a -> b -> a"


def test_set_parses_its_value_as_yaml():
    recipe = load_recipe(
        RECIPE,
        set=["stages.image.train.optimizer.lr=1e-4", "sample.exact=true", "sample.want=[image, clip]", "name=no"],
    ).recipe
    assert recipe.stages["image"].train.optimizer.lr == 1e-4
    assert recipe.sample.exact is True and recipe.sample.want == ["image", "clip"] and recipe.name == "no"
    assert recipe.sample.count == 16  # what is not named stays


def test_keyword_overrides_are_the_same_merge():
    by_keyword = load_recipe(RECIPE, stages={"image": {"sample": {"steps": 20}}}, sample={"count": 3}).recipe
    by_text = load_recipe(RECIPE, set=["stages.image.sample.steps=20", "sample.count=3"]).recipe
    assert by_keyword == by_text
    assert by_keyword.stages["image"].sample.steps == 20 and by_keyword.stages["image"].network.channels == 48
    prior = PriorSpec(kind="prior", width=32, heads=4)
    assert load_recipe(RECIPE, stages={"clip": {"network": prior}}).recipe.stages["clip"].network.width == 32
    link = LinkSpec(variable="clip", dropout=0.5)
    assert load_recipe(RECIPE, stages={"image": {"given": [link, "image16"]}}).recipe.stages["image"].given[0] == link


def test_later_overrides_win():
    recipe = load_recipe(RECIPE, set=["sample.count=3", "sample.count=4"]).recipe
    assert recipe.sample.count == 4
    assert load_recipe(RECIPE, set=["sample.count=3"], sample={"count": 5}).recipe.sample.count == 5


def test_another_kind_drops_the_fields_of_the_old_one(here):
    # The card's prior has `width`, which a unet does not know; a vector needs a prior, hence a stage for an image.
    write(here, "network: {kind: prior, width: 64, depth: 2}\ntrain: {images: 10}\n", "stages/card.yaml")
    write(here, changed("given: [clip]\n    network:", "use: card\n    network:"))
    network = load_recipe("r.yaml").recipe.stages["image"].network
    assert network == UNetSpec(kind="unet", channels=32, mult=[1, 2], attention=[16])
    write(here, LINES)
    text = message("r.yaml", set=["stages.image.network.kind=prior"])
    assert text == (
        "--set stages.image.network.kind=prior: stages.image.network.kind: "
        "a prior generates vectors, not an image; use a unet"
    )


def test_another_kind_outside_a_union_keeps_the_other_fields():
    optimizer = {"kind": "adam", "lr": 0.5}
    recipe = load_recipe(
        RECIPE, set=["stages.clip.train.optimizer.kind=adamw"], stages={"clip": {"train": {"optimizer": {"lr": 0.5}}}}
    ).recipe
    assert recipe.stages["clip"].train.optimizer.model_dump(include=set(optimizer)) == {"kind": "adamw", "lr": 0.5}


def test_an_override_of_use_changes_the_card_below(here):
    write(here, "network: {kind: unet, mult: [1, 1]}\ntrain: {images: 5}\n", "stages/one.yaml")
    write(here, "network: {kind: unet, mult: [2, 2]}\ntrain: {images: 7}\n", "stages/two.yaml")
    write(here, changed("    train: {images: 1000}\n    sample", "    sample").replace("given: [clip]", "use: one"))
    assert load_recipe("r.yaml").recipe.stages["image"].train.images == 5
    recipe = load_recipe("r.yaml", set=["stages.image.use=two"]).recipe
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
        ("stages.image.given.0.noise=1", "a list is replaced as a whole, not by its items"),
        ("stages=", "stages: expected fields (a mapping), not nothing"),
    ],
)
def test_set_mistakes_name_the_option(text, expected):
    assert f"--set {text}: {expected}" in message(RECIPE, set=[text])


def test_keyword_mistakes_say_so():
    assert message(RECIPE, sampel={}) == "keyword argument: unknown field 'sampel'; did you mean 'sample'?"
    assert "keyword argument: there is no stage 'imag'" in message(RECIPE, stages={"imag": {"sample": {"steps": 3}}})


def test_an_override_may_add_a_whole_stage(here):
    write(here, LINES)
    network = "{kind: unet, mult: [1], attention: []}"
    recipe = load_recipe("r.yaml", set=[f"stages.image16={{network: {network}, train: {{images: 5}}}}"]).recipe
    assert recipe.stages["image16"].train.images == 5 and list(recipe.stages) == ["clip", "image", "image16"]


# ---------------------------------------------------------------- lock and schema


def test_a_lock_is_the_same_recipe(here):
    recipe = load_recipe(RECIPE, set=["stages.clip.train.optimizer.eps=1e-9"]).recipe
    extra = {"versions": {"torch": "2.6"}, "execution": "eager", "digests": ["0e1"], "path": Path("x")}
    path = write_lock(here, recipe, extra)
    assert os.listdir(here) == ["recipe.lock.yaml"] and path == here / "recipe.lock.yaml"
    for source in (path, here, "recipe.lock.yaml"):
        loaded = load_recipe(source)
        assert loaded.recipe == recipe
        assert loaded.lock == {**extra, "path": "x"}
    assert Recipe.model_validate({k: v for k, v in yaml.safe_load(path.read_text()).items() if k != "lock"}) == recipe


def test_a_failed_lock_leaves_the_old_one(here, monkeypatch):
    recipe = load_recipe(RECIPE).recipe
    path = write_lock(here, recipe, {"run": 1})

    def full(self, *arguments, **options):
        self.touch()
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_lock(here, recipe, {"run": 2})
    assert os.listdir(here) == ["recipe.lock.yaml"] and load_recipe(path).lock == {"run": 1}


SCHEMA = json_schema()
SHIPPED = sorted(available("recipe").values())


@pytest.mark.parametrize("path", [RECIPE, *SHIPPED], ids=lambda path: path.stem)
def test_recipes_load_and_satisfy_the_schema(path):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(read(path).plain(), SCHEMA)
    loaded = load_recipe(path)
    assert loaded.recipe.description
    jsonschema.validate(yaml.safe_load(resolved(loaded.recipe)), SCHEMA)


@pytest.mark.parametrize(
    ("path", "change"),
    [
        (("stages", "image"), {"chanels": 3}),
        (("stages", "image"), {"network": {"chanels": 3}}),
        (("stages", "image"), {"use": 3}),
        (("stages",), {"clip": {"given": []}}),  # no card, so fields are required
        (("stages",), {"a b": {"use": "x"}}),
        (("variables", "clip"), {"kind": "vectr"}),
        ((), {"sampel": {}}),
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(path, change):
    tree = read(RECIPE).plain()
    below = tree
    for key in path:
        below = below[key]
    below.update(change)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree, SCHEMA)


# ---------------------------------------------------------------- any mutation is answered by a message

BASES = [read(RECIPE).plain(), yaml.safe_load(resolved(load_recipe(RECIPE).recipe))]


def spots(tree, path=()):
    """Every path in a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, below in items:
        yield (*path, key)
        yield from spots(below, (*path, key))


junk = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        3,
        10**30,
        1e308,
        0.5,
        "",
        "image",
        "x y",
        [],
        [1],
        ["clip"],
        {},
        {"kind": "prior"},
        {"use": "x"},
    ]
) | st.text("ab1_-. :", max_size=5)


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mutated_recipe_loads_or_is_explained(tmp_path, data):
    tree = copy.deepcopy(data.draw(st.sampled_from(BASES)))
    for _ in range(data.draw(st.integers(1, 3))):
        places = list(spots(tree))
        if not places:
            break
        *way, last = data.draw(st.sampled_from(places))
        below = tree
        for key in way:
            below = below[key]
        action = data.draw(st.sampled_from(["delete", "retype", "rename"]))
        if action == "delete":
            del below[last]
        elif action == "retype" or isinstance(below, list):
            below[last] = data.draw(junk)
        else:
            below[str(last) + data.draw(st.sampled_from(["s", "_", " "]))] = below.pop(last)
    path = tmp_path / "recipes" / "m.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(dump(tree))
    if not (tmp_path / "stages").exists():
        (tmp_path / "stages").symlink_to(FIXTURES / "stages")
    try:
        loaded = load_recipe(path)
    except UserError as error:
        assert "Traceback" not in str(error) and re.search(r"\.yaml(:\d+)?: |mistakes\n", str(error))
    else:
        assert Recipe.model_validate(loaded.recipe.model_dump()) == loaded.recipe


def test_assignments_keep_equals_signs_of_the_value():
    path, node = assignment("a.b=x=y")
    assert (path, node.plain()) == (["a", "b"], "x=y")
