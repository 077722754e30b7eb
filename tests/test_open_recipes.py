"""Recipes that name code of one's own: what runs, only with permission, and what is said of mistakes."""

# ruff: noqa: E501, F811 (a table of mistakes has one a line; fixtures)

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from open_recipe import HINT, OWN_STAGE, PLAIN, RECIPE, assembly, chaindiff, here, refused  # noqa: F401  (fixtures)
from recipe_text import message, write

import chaindiff as cd
from chaindiff.io import code
from chaindiff.io.errors import UserError
from chaindiff.recipe.assembly import Assembly
from chaindiff.specs.load import load_recipe
from chaindiff.specs.lock import write_lock

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
