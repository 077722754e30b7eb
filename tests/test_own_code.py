"""Networks, encoders, data and stages of one's own in recipes: what they are called with, and that they work."""

# ruff: noqa: F811 (fixtures)

from __future__ import annotations

import pytest
import torch
import yaml
from open_recipe import OWN_STAGE, RECIPE, assembly, chaindiff, here, refused  # noqa: F401  (fixtures)
from recipe_text import write
from safetensors.torch import load_file

import chaindiff as cd
from chaindiff.commands.smoke import smoke_version
from chaindiff.io.errors import UserError
from chaindiff.recipe.assembly import Assembly
from chaindiff.recipe.training import prepare
from chaindiff.specs.code import CodeDataSpec, CodeEncoderSpec, CodeSpec
from chaindiff.specs.load import load_recipe
from chaindiff.specs.lock import json_schema, write_lock

# ---------------------------------------------------------------- what it is called with, and works


TOLD = """
import torch


class Told(torch.nn.Linear):
    def __init__(self, interface, **settings):
        super().__init__(1, 1)
        self.told = interface, settings


def empty(interface):
    return {}
"""


def test_a_network_is_told_its_interface(here):
    write(here.parent / "lib", TOLD, "told_code.py")
    stage = (
        assembly("stages.image.network={kind: 'told_code:Told', settings: {a: [1, {b: 2}]}}").stages["image"].build()
    )
    interface, settings = stage.network.told
    assert interface.variables == {"image": (3, 8, 8)} and settings == {"a": [1, {"b": 2}]}
    assert (interface.label_dim, interface.image_channels, interface.context, interface.augment_dim) == (3, 0, None, 0)
    found = refused("stages.colour.network={kind: 'told_code:empty'}")
    assert found.endswith("'told_code:empty' returns an object of type dict, not Module")


def test_a_recipe_with_code_runs_from_training_to_samples(here, chaindiff):
    command = ("run", "r.yaml", "--allow-code", "--quiet")
    assert chaindiff(*command) == (0, "", "")
    lock = load_recipe("runs/open").recipe
    assert lock.stages["colour"].network == CodeSpec(kind="my_code:MLP", settings={"width": 16})
    assert lock.variables["colour"].encoder == CodeEncoderSpec(kind="my_code:Colour", of="image")
    chain = cd.load("r.yaml", allow_code=True)
    out = chain.sample(2, want=["colour"], given={"image": torch.full((1, 3, 8, 8), 0.25)})
    assert out["colour"].tolist() == [[0.25] * 3] * 2
    assert chaindiff("run", "runs/open", "--quiet")[0] == 2
    weights = chaindiff("list", "weights")[1]
    assert "my_code:MLP: colour; 16 images of emoji64" in weights


def test_an_encoder_that_makes_something_else(here):
    def encode(a: Assembly) -> None:
        a.encoders["colour"].build()(torch.zeros(2, 3, 8, 8))

    text = RECIPE.replace('"my_code:Colour"', '"my_code:Flat"')
    expected = "'my_code:Flat' returns [2, 192] for 2 values of 'image'; expected [2, 3]"
    assert refused(text=text, of=encode) == f"variables.colour.encoder: {expected}"
    changed = "variables.colour.encoder.settings={shout: true}"
    assert "variables.colour.encoder: 'my_code:Flat' could not be created: SystemExit: 3" in refused(changed, of=encode)
    text = RECIPE.replace('"my_code:Colour"', '"my_code:broken"')
    expected = "r.yaml:8: variables.colour.encoder: 'my_code:broken' returns an object of type int, not Callable"
    assert refused(text=text, of=encode) == expected


def test_an_encoder_in_training_batches(here):
    batches = prepare(assembly("variables.colour.encoder.settings={times: 2.0}"), "image")
    batch = batches([0, 1, 2])
    assert torch.allclose(batch["colour"], 2 * batch["image"].mean((2, 3)))
    labels = assembly("variables.colour={kind: label, shape: [2], encoder: {kind: 'my_code:Bright', of: image}}")
    assert prepare(labels, "image")([0, 1])["colour"].dtype == torch.int64


def test_data_of_ones_own(here):
    change = "data={kind: 'my_code:Squares', settings: {count: 5}}"
    own = assembly(change)
    assert own.recipe.data == CodeDataSpec(kind="my_code:Squares", settings={"count": 5}) and len(own.data) == 5
    batch = prepare(own, "image")([0, 1, 2, 3, 4])
    assert sorted(batch["colour"][:, 0].tolist()) == pytest.approx([row * 10 / 127.5 - 1 for row in range(5)])
    expected = ": data: 'my_code:Squares' needs the setting 'count'\n  add settings: {count: ...}"
    assert expected in refused("data={kind: 'my_code:Squares'}", of=lambda a: a.data)


def test_another_split_of_data_of_ones_own(here):
    from chaindiff.evaluation.oracle import split_of

    own = assembly("data={kind: 'my_code:Squares', settings: {count: 2, split: train}}")
    assert split_of(own, "train").names == ["train0", "train1"] and split_of(own, "test").names == ["test0", "test1"]
    with pytest.raises(UserError, match="the data are 'my_code:Squares', whose settings name no split"):
        split_of(assembly("data={kind: 'my_code:Squares', settings: {count: 2}}"), "test")


def test_a_stage_is_called_with_its_variables_and_settings(here):
    own = assembly("stages.colour.given=[image]", "stages.image.given=[]", text=OWN_STAGE)
    generates, given, name, steps = own.stages["colour"].build().told
    assert (generates, given) == ([own.variables["colour"]], [own.variables["image"]])
    assert (name, steps) == ("colour", 5)
    found = refused("stages.colour.settings.stpes=3", text=OWN_STAGE)
    assert found.endswith(": stages.colour: 'my_code:Own' takes no setting 'stpes'; did you mean 'steps'?")


def test_a_lock_of_a_stage_of_ones_own_loads(here):
    loaded = load_recipe(write(here, OWN_STAGE))
    write_lock(here / "run", loaded.recipe, {})
    assert load_recipe("run").recipe == loaded.recipe


# ---------------------------------------------------------------- identity, merge, smoke, schema


def test_identity_is_name_and_settings(here):
    base = assembly().stages["colour"].identity
    assert base == assembly("stages.colour.sample.steps=9").stages["colour"].identity
    changes = ("stages.colour.network.settings.width=8", "stages.colour.network.kind=my_code:MLQ",
               "variables.colour.encoder.settings={times: 2.0}", "data.split=train")  # fmt: skip
    others = [assembly(change).stages["colour"].identity for change in changes]
    own = [
        assembly(*change, text=OWN_STAGE).stages["colour"].identity
        for change in ((), ("stages.colour.settings.steps=6",))
    ]
    assert len({base, *others, *own}) == 1 + len(changes) + 2


def test_what_is_shipped_is_found_as_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = Assembly(load_recipe("deep_emoji"))
    weights = [shipped.stages[name].find_weights() for name in shipped.recipe.stages]
    assert all(path is not None and path.parent.name == "weights" for path in weights)


def test_another_kind_drops_settings_and_the_same_keeps_them(here):
    network = load_recipe("r.yaml", changes=["stages.colour.network.settings.depth=2"]).recipe.stages["colour"].network
    assert network == CodeSpec(kind="my_code:MLP", settings={"width": 16, "depth": 2})
    other = load_recipe("r.yaml", changes=["stages.colour.network={kind: 'a.b:C'}"]).recipe.stages["colour"].network
    assert other == CodeSpec(kind="a.b:C")


def test_smoke_leaves_code_as_it_is(here):
    tiny = smoke_version(load_recipe("r.yaml", allow_code=True))
    assert tiny.allow_code and tiny.recipe.stages["colour"].network == CodeSpec(
        kind="my_code:MLP", settings={"width": 16}
    )
    assert tiny.recipe.stages["image"].network.channels == 16 and tiny.recipe.stages["colour"].sample.steps == 3
    own = load_recipe(write(here, OWN_STAGE), data={"kind": "my_code:Squares", "settings": {"count": 4}})
    tiny = smoke_version(own).recipe
    assert tiny.data == own.recipe.data and tiny.stages["colour"].settings == {"steps": 5}
    assert tiny.stages["colour"].train.images == 24


def test_editors_know_code(here):
    jsonschema = pytest.importorskip("jsonschema")
    for text in (RECIPE, OWN_STAGE):
        jsonschema.validate(yaml.safe_load(text), json_schema())
    for wrong in (RECIPE.replace("my_code:MLP", "my_code.MLP"), OWN_STAGE.replace("my_code:Own", "diffusion")):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(yaml.safe_load(wrong), json_schema())


# ---------------------------------------------------------------- a chain without images


PAIRS = """
import torch


class Pairs(torch.utils.data.Dataset):
    def __init__(self, rows=64):
        self.x = torch.randn(rows, 1, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        return {"x": self.x[row], "y": torch.cat([self.x[row], -self.x[row]])}
"""
VECTORS = """\
name: vectors
data: {kind: "my_pairs:Pairs", settings: {rows: 32}}
variables:
  x: {kind: vector, shape: [1]}
  y: {kind: vector, shape: [2]}
stages:
  x:
    network: {kind: prior, width: 16, depth: 1, heads: 2}
    train: {images: 32, batch: 16}
    sample: {steps: 2}
  y:
    given: [x]
    network: {kind: prior, width: 16, depth: 1, heads: 2}
    train: {images: 32, batch: 16}
    sample: {steps: 2}
sample: {count: 3}
"""


def test_vectors_of_a_dataset_of_ones_own_need_no_encoder_and_no_image(here, chaindiff) -> None:
    write(here.parent / "lib", PAIRS, "my_pairs.py")
    write(here, VECTORS, "vectors.yaml")
    status, _, error = chaindiff("run", "vectors.yaml", "--allow-code")
    assert status == 0, error
    out = load_file(here / "runs/vectors/samples/y/000000.safetensors")
    assert out["y"].shape == (3, 2)
