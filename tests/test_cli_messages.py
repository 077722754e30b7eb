"""The command line: what it says, how it ends, and that it is quick to say it. The work itself is stood in for."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import chaindiff
from chaindiff import cli
from chaindiff.io.errors import UserError
from chaindiff.io.memory import noted

FIXTURES = Path(__file__).parent / "fixtures"
RECIPE = str(FIXTURES / "recipes" / "vcdm_emoji.yaml")


@pytest.fixture
def work(monkeypatch):
    """A stand-in for the modules of chaindiff.commands that records calls; `work.error` is raised instead."""
    module = types.ModuleType("chaindiff.commands.stand_in")
    module.calls, module.error = [], None

    def record(command):
        def call(loaded, **options):
            if module.error is not None:
                raise module.error
            module.calls.append((command, loaded.recipe.name, options))

        return call

    for command in ("run", "train", "sample", "plan"):
        setattr(module, command, record(command))
        monkeypatch.setitem(sys.modules, f"chaindiff.commands.{command}", module)
    return module


@pytest.fixture
def command(capsys):
    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["run"],
            (
                "run",
                {
                    "out": None,
                    "smoke": False,
                    "replace": False,
                    "count": None,
                    "seed": None,
                    "batch": None,
                    "max_memory": None,
                    "given": None,
                },
            ),
        ),
        (
            [
                "run",
                "--smoke",
                "--out",
                "there",
                "--given",
                "category=3",
                "--count",
                "5",
                "--seed",
                "2",
                "--batch",
                "1",
            ],
            (
                "run",
                {
                    "out": Path("there"),
                    "smoke": True,
                    "replace": False,
                    "count": 5,
                    "seed": 2,
                    "batch": 1,
                    "max_memory": None,
                    "given": {"category": 3},
                },
            ),
        ),
        (
            ["train", "--stage", "clip", "--more", "100"],
            ("train", {"stage": "clip", "more": 100, "out": None, "fresh": False}),
        ),
        (["train", "--fresh"], ("train", {"stage": None, "more": 0, "out": None, "fresh": True})),
        (
            ["sample", "--count", "3", "--seed", "1", "--batch", "2", "--want", "image", "--want", "clip", "--replace"],
            (
                "sample",
                {
                    "out": None,
                    "replace": True,
                    "count": 3,
                    "seed": 1,
                    "batch": 2,
                    "max_memory": None,
                    "want": ["image", "clip"],
                    "given": None,
                },
            ),
        ),
        (
            ["plan", "--given", "clip=x.safetensors", "--picture", "chain.svg"],
            ("plan", {"want": None, "given": {"clip": "x.safetensors"}, "picture": Path("chain.svg")}),
        ),
    ],
)
def test_commands_hand_over(command, work, arguments, expected):
    assert command(arguments[0], RECIPE, *arguments[1:]) == (0, "", "")
    name, options = expected
    assert work.calls == [(name, "vcdm_emoji", options)]


def test_set_reaches_the_recipe(command, work):
    command("run", RECIPE, "--set", "name=other", "--set", "sample.count=2")
    assert work.calls[0][1] == "other"


def test_quiet_silences_the_console_of_one_command_alone(command, work):
    from rich import get_console

    command("run", RECIPE)
    assert get_console().quiet is False
    command("run", RECIPE, "--quiet")
    assert get_console().quiet is True
    command("run", RECIPE)
    assert get_console().quiet is False


def test_a_mistake_is_one_message_and_status_2(command, work):
    work.error = UserError("no such thing", "r.yaml:3", "mend it so")
    assert command("run", RECIPE) == (2, "", "error: r.yaml:3: no such thing\n  mend it so\n")
    with pytest.raises(UserError, match="no such thing"):
        cli.main(["run", RECIPE, "--debug"])


def test_a_full_disk_is_one_message_and_status_2(command, work):
    work.error = OSError(28, "No space left on device", "runs/x/weights")
    assert command("run", RECIPE) == (2, "", "error: runs/x/weights: No space left on device\n")


def test_a_full_memory_is_one_message_and_status_2(command, work):
    work.error = MemoryError()
    expected = "error: the memory is full\n  lower --batch, train.batch or the size of the network\n"
    assert command("run", RECIPE) == (2, "", expected)


def test_a_full_gpu_is_one_message_and_status_2(command, work):
    import torch

    with pytest.raises(torch.OutOfMemoryError) as error, noted("lower the batch"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 8")
    work.error = error.value
    expected = "error: the GPU's memory is full (another 20.00 GiB were requested)\n  lower the batch\n"
    assert command("run", RECIPE) == (2, "", expected)
    with pytest.raises(torch.OutOfMemoryError):
        cli.main(["run", RECIPE, "--debug"])


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), RuntimeError("a bug")])
def test_a_bug_keeps_its_traceback(work, error):
    work.error = error
    with pytest.raises(type(error), match="a bug"), noted("lower the batch"):
        cli.main(["run", RECIPE])
    assert not hasattr(error, "__notes__")


def test_an_interrupt_is_one_line_and_status_130(command, work):
    work.error = KeyboardInterrupt()
    assert command("train", RECIPE) == (130, "", "interrupted; run the same command again to continue\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rnu", "x"], "No such command 'rnu'"),
        (["run"], "Missing argument 'RECIPE'."),
        (["sample", RECIPE, "--count", "none"], "Invalid value for '--count': "),
        (["sample", RECIPE, "--count", "0"], "Invalid value for '--count': "),
        (["run", "vcdm_emogi_"], "error: there is no recipe 'vcdm_emogi_'; did you mean 'vcdm_emoji"),
        (["run", RECIPE, "--given", "label"], "error: --given label: expected NAME=VALUE after --given"),
        (["run", RECIPE, "--given", "a=1", "--given", "a=2"], "error: --given a=2: 'a' is given twice"),
        (["train", RECIPE, "--stage", "clp"], "error: --stage clp: there is no stage 'clp'; did you mean 'clip'?"),
        (["show", RECIPE, "--set", "sample.cuont=1"], "sample: unknown field 'cuont'; did you mean 'count'?"),
        (
            ["compare", "nowhere", "else"],
            "error: there is no run 'nowhere'\n  a run is a directory with recipe.lock.yaml",
        ),
        (["schema", "--out", "/dev/null/schema.json"], "error: cannot write /dev/null/schema.json: a file is where"),
    ],
)
def test_mistakes_on_the_command_line(command, work, arguments, expected):
    status, out, err = command(*arguments)
    assert (status, out) == (2, "") and expected in err
    assert work.calls == []


def test_list_show_schema(command, monkeypatch, tmp_path):
    monkeypatch.chdir(FIXTURES)
    status, out, _ = command("list")
    assert status == 0 and out.startswith("recipes:\n") and "\nstage cards:\n" in out
    assert "vcdm_emoji" in out and "Emoji at 32 pixels, by way of a CLIP embedding and a 16-pixel image\n" in out
    assert "A transformer prior for embeddings\n" in out

    status, out, _ = command("show", "vcdm_emoji", "--set", "sample.count=5")
    assert status == 0
    (tmp_path / "again.yaml").write_text(out)
    assert command("show", str(tmp_path / "again.yaml")) == (0, out, "")
    assert "  count: 5\n" in out

    status, out, _ = command("schema")
    assert status == 0 and json.loads(out)["properties"]["stages"]
    assert command("schema", "--out", str(tmp_path / "schema.json"))[0] == 0
    assert (tmp_path / "schema.json").read_text() == out


def test_a_broken_file_does_not_break_the_list(command, monkeypatch, tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "broken.yaml").write_text("a: [")
    monkeypatch.chdir(tmp_path)
    status, out, _ = command("list")
    assert status == 0 and "(broken: is not valid YAML" in out


def python(code: str, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, **options)


HEAVY = (
    "torch",
    "open_clip",
    "numpy",
    "PIL",
    "matplotlib",
    "networkx",
    "chaindiff.commands.run",
    "chaindiff.chain.chain",
)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], "Commands"),
        (["run", "--help"], "--smoke"),
        (["--version"], f"chaindiff {chaindiff.__version__}"),
        (["list"], "recipes:"),
        (["schema"], "json-schema.org"),
        (["compare", "nowhere", "else"], "there is no run 'nowhere'"),
        (["show", RECIPE], "name: vcdm_emoji"),
        (["show", RECIPE, "--set", "x=1"], "unknown field 'x'"),
        (["run", RECIPE, "--set", "x=1"], "unknown field 'x'"),
        (["plan", RECIPE, "--set", "variables.clip.encoder.model=ViT-B-23"], "did you mean 'ViT-B-32'?"),
    ],
)
def test_nothing_heavy_is_imported_to_answer(arguments, expected):
    code = (
        "import sys\nfrom chaindiff.cli import main\n"
        "try: main()\n"
        f"finally: print('heavy:', [name for name in {HEAVY} if name in sys.modules])"
    )
    result = python(code, *arguments)
    assert expected in result.stdout + result.stderr
    assert result.stdout.endswith("heavy: []\n")


def test_help_is_quick():
    """In processor time, which is what the program can answer for on a machine with other work."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    subprocess.run([sys.executable, "-m", "chaindiff", "--help"], capture_output=True, check=True)
    assert spent() - before < 0.5


def test_public_names():
    code = (
        "import sys, chaindiff\nassert 'torch' not in sys.modules and 'pydantic' not in sys.modules\n"
        "assert set(chaindiff.__all__) <= set(dir(chaindiff))\n"
        "from chaindiff.io.errors import UserError\nassert chaindiff.UserError is UserError\n"
        "from chaindiff import Variable\nassert Variable.vector('v', 3).shape == (3,)\n"
        "try: chaindiff.nothing\nexcept AttributeError as error: print(error)"
    )
    result = python(code)
    assert (result.stdout, result.stderr) == ("module 'chaindiff' has no attribute 'nothing'\n", "")


def test_a_wheel_carries_recipes_within_the_package(tmp_path):
    """The layout of an installed wheel: recipes and stages lie in the package, nothing beside it."""
    home = Path(chaindiff.__file__).parent
    large = shutil.ignore_patterns("*.zip", "*.safetensors", "__pycache__")
    shutil.copytree(home, tmp_path / "chaindiff", ignore=large)
    for folder in ("recipes", "stages"):
        shutil.copytree(FIXTURES / folder, tmp_path / "chaindiff" / folder)
    (tmp_path / "elsewhere").mkdir()
    # Installed packages come after PYTHONPATH, so this copy wins.
    environment = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    code = "import chaindiff.cli as c; assert c.__file__.startswith({!r}); c.main(['show', 'vcdm_emoji'])"
    result = python(code.format(str(tmp_path)), env=environment, cwd=tmp_path / "elsewhere")
    assert result.stderr == "" and "Emoji at 32 pixels" in result.stdout
