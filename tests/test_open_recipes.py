"""Recipes that name code of one's own: what runs, only with permission, and what is said of mistakes."""

# ruff: noqa: E501 (a table of mistakes has one a line)

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import rich
import torch
import yaml
from recipe_text import message, write
from safetensors.torch import load_file

import chaindiff as cd
from chaindiff import cli
from chaindiff.commands.smoke import smoke_version
from chaindiff.io import code
from chaindiff.io.errors import UserError
from chaindiff.recipe.assembly import Assembly
from chaindiff.recipe.training import prepare
from chaindiff.specs.code import CodeDataSpec, CodeEncoderSpec, CodeSpec
from chaindiff.specs.load import load_recipe
from chaindiff.specs.lock import json_schema, write_lock

# A network of one's own; its `forward` is the signature that all networks have.
NETWORK = """
class MLP(torch.nn.Module):
    def __init__(self, interface, width, depth=1):
        super().__init__()
        (self.size,) = interface.variables["colour"]
        if width < 0:
            raise ValueError("a negative width")
        self.layers = torch.nn.Sequential(torch.nn.Linear(self.size + 1, width), torch.nn.Linear(width, self.size))

    def forward(self, x, noise, condition):
        ((name, value),) = x.items()
        return {name: self.layers(torch.cat([value, noise[name][:, None]], dim=1))}
"""
CODE = (
    """
from pathlib import Path

import torch

import chaindiff as cd
from chaindiff.data import ImageData

Path("imported").touch()
WIDTH = 3
"""
    + NETWORK
    + """
class Colour:
    def __init__(self, times=1.0, shout=False):
        self.times = times
        if shout:
            raise SystemExit(3)

    def __call__(self, image):
        return self.times * image.mean(dim=(2, 3))


class Flat(Colour):
    def __call__(self, image):
        return image.flatten(1)


class Bright:
    def __call__(self, image):
        return (image.mean(dim=(1, 2, 3)) > 0).long()


class Squares(ImageData):
    def __init__(self, count, split=None):
        self.names = [f"{split}{number}" for number in range(count)]
        self.digest = " ".join(self.names)

    def images(self, rows, size):
        return torch.stack([torch.full((3, size, size), 10 * int(row), dtype=torch.uint8) for row in rows])


class Own:
    def __init__(self, generates, given, name, steps=3):
        self.told = (generates, given, name, steps)
        self.name, self.given, self.conditionals = name, given, frozenset()
        self.generates = {variable.name: variable for variable in generates}

    def sample(self, given, draws):
        yield {name: draws.normal("sample", shape=v.shape) for name, v in self.generates.items()}

    def loss(self, batch, draws):
        raise NotImplementedError

    def cost(self, moving):
        return cd.Cost(how="normal numbers")


def broken(**settings):
    return 3
"""
)
RECIPE = """\
name: open
data: {path: emoji64, split: test, where: {style: google}}
variables:
  image: {kind: image, shape: [3, 8, 8]}
  colour:
    kind: vector
    shape: [3]
    encoder: {kind: "my_code:Colour", of: image}
stages:
  colour:
    network:
      kind: my_code:MLP
      settings: {width: 16}
    train: {images: 16, batch: 8, execution: eager}
    sample: {steps: 2}
  image:
    given: [colour]
    network: {kind: unet, channels: 16, mult: [1], blocks: 1, attention: []}
    train: {images: 16, batch: 8, execution: eager}
    sample: {steps: 2}
sample: {count: 4}
"""
OWN_STAGE = RECIPE.replace(
    """    network:
      kind: my_code:MLP
      settings: {width: 16}
    train: {images: 16, batch: 8, execution: eager}
    sample: {steps: 2}
""",
    """    kind: my_code:Own
    settings: {steps: 5}
    train: {images: 16, batch: 8}
""",
)
PLAIN = """\
name: plain
data: {path: emoji64, split: test, where: {style: google}}
variables:
  image: {kind: image, shape: [3, 8, 8]}
stages:
  image:
    network: {kind: unet, channels: 16, mult: [1], blocks: 1, attention: []}
    train: {images: 16, batch: 8, execution: eager}
"""
HINT = "add --allow-code if you trust this recipe and the code that it names (in Python, allow_code=True)"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with the recipe, and beside it one that is searched for modules."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    write(tmp_path / "lib", CODE, "my_code.py")
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    write(tmp_path / "work", RECIPE)
    yield tmp_path / "work"
    sys.modules.pop("my_code", None)


@pytest.fixture
def chaindiff(capsys):
    """Runs the command line: (status, stdout, stderr). The console is left as it was found."""
    console, before = rich.get_console(), dict(rich.get_console().__dict__)

    def call(*arguments: str) -> tuple[int, str, str]:
        try:
            with pytest.raises(SystemExit) as ended:
                cli.main(arguments)
        finally:
            console.__dict__ = dict(before)
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return ended.value.code, out, err

    return call


def assembly(*changes: str, text: str | None = None) -> Assembly:
    if text is not None:
        write(Path(), text)
    return Assembly(load_recipe("r.yaml", changes=changes, allow_code=True))


def refused(*changes: str, text: str | None = None, of=lambda a: a.stages["colour"].build()) -> str:
    with pytest.raises(UserError) as caught:
        of(assembly(*changes, text=text))
    return str(caught.value)


# ---------------------------------------------------------------- permission


@pytest.mark.parametrize("command", ["plan", "run", "train", "sample", "evaluate"])
def test_code_is_refused_before_it_is_imported(here, chaindiff, command):
    status, out, err = chaindiff(command, "r.yaml")
    assert (status, out) == (2, "") and not (here / "imported").exists()
    first = "'my_code:Colour' is code, which runs only if you allow it"
    second = "'my_code:MLP' is code, which runs only if you allow it"
    assert err.splitlines() == [
        "error: 2 mistakes",
        f"  r.yaml:8: variables.colour.encoder.kind: {first}",
        f"    {HINT}",
        f"  r.yaml:12: stages.colour.network.kind: {second}",
        f"    {HINT}",
    ]


def test_python_says_so_too(here):
    with pytest.raises(UserError, match="allow_code=True"):
        cd.load("r.yaml")
    assert not (here / "imported").exists()
    chain = cd.load("r.yaml", allow_code=True)
    with pytest.raises(UserError, match="stage 'colour' has no weights yet"):
        _ = chain.stages["colour"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            PLAIN.replace("{path: emoji64, split: test, where: {style: google}}", "{kind: 'my_code:Squares'}"),
            "r.yaml:2: data.kind: 'my_code:Squares' is code, which runs only if you allow it",
        ),
        (OWN_STAGE, "r.yaml:11: stages.colour.kind: 'my_code:Own' is code"),
        (RECIPE.replace("name: open", "name: open\nallow_code: true"), "r.yaml:2: unknown field 'allow_code'"),
        (RECIPE + "lock: {allow_code: true}\n", "'my_code:MLP' is code, which runs only if you allow it"),
    ],
)
def test_nothing_that_is_read_gives_permission(here, chaindiff, text, expected):
    write(here, text)
    status, _, err = chaindiff("plan", "r.yaml")
    assert status == 2 and expected in err and not (here / "imported").exists()


def test_nor_does_an_override_or_a_card(here, chaindiff):
    write(here, PLAIN)
    for change, expected in (
        ("stages.image.network.kind=evil:Net", "stages.image.network.kind: 'evil:Net' is code, which runs only"),
        ("data.kind=evil:Net", "data.kind: 'evil:Net' is code, which runs only"),
        ("allow_code=true", "unknown field 'allow_code'"),
    ):
        status, _, err = chaindiff("plan", "r.yaml", "--set", change)
        assert status == 2 and err.startswith(f"error: --set {change}: ") and expected in err
    write(here, "network: {kind: 'my_code:MLP'}\ntrain: {images: 1}\nallow_code: true\n", "stages/card.yaml")
    write(here, RECIPE.replace("  colour:\n    network:", "  colour:\n    use: card\n    network:"))
    assert "unknown field 'allow_code'" in message("r.yaml")


def test_a_lock_needs_permission_again(here):
    loaded = load_recipe("r.yaml", allow_code=True)
    write_lock(here / "run", loaded.recipe, {"allow_code": True})
    again = load_recipe("run")
    assert again.recipe == loaded.recipe and not again.allow_code
    with pytest.raises(UserError, match="is code, which runs only if you allow it"):
        Assembly(again)
    assert loaded.override({"sample": {"count": 2}}).allow_code


def test_show_reads_and_imports_nothing(here, chaindiff):
    status, out, err = chaindiff("show", "r.yaml")
    assert (status, err) == (0, "") and not (here / "imported").exists()
    assert yaml.safe_load(out)["stages"]["colour"]["network"] == {"kind": "my_code:MLP", "settings": {"width": 16}}


# ---------------------------------------------------------------- finding


@pytest.mark.parametrize("way", ["-c", "-m", "script"])
def test_the_current_directory_is_not_searched(here, way):
    """However Python was started: -c and -m search the current directory, a script its own folder."""
    write(here, "from pathlib import Path\nPath('imported').touch()\nclass Net: pass\n", "near_code.py")
    program = "from chaindiff.io import code\nprint(code.resolve('near_code:Net').__name__)\n"
    write(here, program, "program.py")
    command = [sys.executable, *{"-c": ["-c", program], "-m": ["-m", "program"], "script": ["program.py"]}[way]]
    root = str(Path(cd.__file__).parents[1])

    def python(path: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, path])}
        return subprocess.run(command, capture_output=True, text=True, cwd=here, env=environment)

    done = python("")
    assert done.returncode == 1 and not (here / "imported").exists()
    assert done.stderr.endswith(
        "UserError: there is no module 'near_code'\n"
        "  the current directory is not searched: install the package, or set PYTHONPATH=FOLDER before the command\n"
    )
    done = python(".")
    assert (done.returncode, done.stdout) == (0, "Net\n") and (here / "imported").exists()


@pytest.mark.parametrize("entry", ["", "{here}"])
def test_nor_is_what_the_interpreter_adds_of_it(here, monkeypatch, entry):
    write(here, "import near_two\n", "near_one.py")
    write(here, "class Net: pass\n", "near_two.py")
    monkeypatch.setattr(sys, "path", [entry.format(here=here), *sys.path])
    before = list(sys.path)
    with pytest.raises(UserError, match="there is no module 'near_one'"):
        code.resolve("near_one:Net")
    write(here.parent / "lib", "import near_two\n", "far_one.py")
    with pytest.raises(UserError, match="'far_one' could not be imported: ModuleNotFoundError: No module named 'near"):
        code.resolve("far_one:Net")
    assert sys.path == before
    monkeypatch.setenv("PYTHONPATH", str(here))
    assert code.resolve("near_two:Net").__name__ == "Net"
    monkeypatch.delenv("PYTHONPATH")
    assert code.resolve("near_two:Net").__name__ == "Net"  # it is imported already
    del sys.modules["near_two"]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("no_such_module:Net", "there is no module 'no_such_module'\n  the current directory is not searched"),
        ("os.no_such.thing:Net", "there is no module 'os.no_such'"),
        ("my_code:MPL", "there is no 'MPL' in 'my_code'; did you mean 'MLP'?"),
        ("my_code:WIDTH", "'my_code:WIDTH' is not a class, but 3"),
        ("bad_code:Net", "'bad_code' could not be imported: ZeroDivisionError: division by zero\n  --debug shows"),
        ("ill_code:Net", "'ill_code' could not be imported: SyntaxError: "),
        ("my_code:Bright", "'my_code:Bright' cannot be called by a recipe: too many positional arguments"),
        ("my_code:broken", "'my_code:broken' cannot be called by a recipe: too many positional arguments"),
        ("builtins:dict", "'builtins:dict' could not be created: TypeError: "),
        ("types:SimpleNamespace", "'types:SimpleNamespace' could not be created: TypeError: "),
    ],
)
def test_what_cannot_be_had(here, kind, expected):
    write(here.parent / "lib", "1 / 0\n", "bad_code.py")
    write(here.parent / "lib", "class\n", "ill_code.py")
    found = refused(f"stages.colour.network={{kind: '{kind}'}}")
    assert found.startswith("--set stages.colour.network=") and f": stages.colour.network: {expected}" in found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("{width: 16, dpeth: 2}", "takes no setting 'dpeth'; did you mean 'depth'?"),
        ("{width: 16, interface: 2}", "takes no setting 'interface'; known: width, depth"),
        ("{}", "needs the setting 'width'\n  add settings: {width: ...}"),
        ("{width: -1}", "could not be created: ValueError: a negative width\n  --debug shows the traceback"),
        ("{width: many}", "could not be created: TypeError: "),
    ],
)
def test_settings_that_do_not_fit(here, settings, expected):
    found = refused(text=RECIPE.replace("{width: 16}", settings))
    assert found.startswith(f"r.yaml:11: stages.colour.network: 'my_code:MLP' {expected}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (RECIPE.replace("my_code:MLP", "my_code.MLP"), "r.yaml:12: stages.colour.network.kind: unknown kind 'my_code.MLP'"),
        (
            RECIPE.replace("my_code:MLP", "'my code:MLP'"),
            "r.yaml:12: stages.colour.network.kind: expected user-defined code, such as my_package.module:Name, not 'my code:MLP'",
        ),
        (
            OWN_STAGE.replace("my_code:Own", "difusion"),
            "r.yaml:11: stages.colour.kind: expected 'diffusion' or user-defined code, such as my_package.module:Name, "
            "not 'difusion'",
        ),
        (RECIPE.replace("settings: {width", "setings: {width"), "network: unknown field 'setings'; did you mean 'settings'?"),
        (RECIPE.replace("{width: 16}", "16"), "stages.colour.network.settings: expected fields (a mapping), not 16"),
        (RECIPE.replace("of: image}", "of: imgae}"), "encoder.of: there is no variable 'imgae'; did you mean 'image'?"),
        (
            RECIPE.replace("    sample: {steps: 2}\n  image", "    settings: {a: 1}\n  image"),
            "r.yaml:15: stages.colour.settings: are for user-defined stages, whose kind is MODULE:NAME",
        ),
        (
            OWN_STAGE.replace("    settings:", "    sample: {steps: 9}\n    settings:"),
            "r.yaml:12: stages.colour.sample: is for diffusion stages; arguments of this stage's code go into",
        ),
        (
            OWN_STAGE.replace("    settings:", "    network: {kind: prior}\n    settings:"),
            "r.yaml:12: stages.colour.network: is for diffusion stages",
        ),
        (
            OWN_STAGE.replace("    settings:", "    given: [{variable: image, noise: 0.1}]\n    settings:"),
            "r.yaml:12: stages.colour.given.0.noise: is for diffusion stages",
        ),
        (
            RECIPE.replace("kind: vector\n    shape: [3]", "kind: label\n    shape: [3]\n    source: empirical"),
            "r.yaml:8: variables.colour.source: the class frequencies of a user-defined encoder are not known",
        ),
    ],
)  # fmt: skip
def test_mistakes_that_need_no_import(here, text, expected):
    write(here, text)
    assert expected in message("r.yaml") and not (here / "imported").exists()


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
