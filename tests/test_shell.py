"""Shell comfort: what TAB offers, what `list` knows, and JSON that a script can rely on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import rich
import yaml
from safetensors import safe_open

from chaindiff import cli
from chaindiff.assets.registry import SHIPPED
from chaindiff.evaluation.features import BUILDERS
from chaindiff.specs.load import available

QUICK = [f"stages.{stage}.sample.steps=2" for stage in ("clip", "image16")]


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs the command line: (status, stdout, stderr). The console is left as it was found."""
    console, before = rich.get_console(), dict(rich.get_console().__dict__)

    def call(*arguments: str) -> tuple[int, str, str]:
        try:
            with pytest.raises(SystemExit) as ended:
                cli.main(arguments)
        finally:
            console.__dict__ = dict(before)
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call


@pytest.fixture
def offers(command, monkeypatch):
    """What bash is offered for the last of these words."""

    def call(*words: str) -> list[str]:
        monkeypatch.setenv("_CHAINDIFF_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", " ".join(["chaindiff", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        status, out, err = command()
        assert (status, err) == (0, "")
        return out.split()

    return call


# ---------------------------------------------------------------- completion


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sch"], ["schema"]),
        (["run", "vcdm_emoji1"], ["vcdm_emoji16"]),
        (["train", "vcdm_emoji", "--stage", ""], ["clip", "image16", "image"]),
        (["train", "vcdm_emoji", "--stage", "im"], ["image16", "image"]),
        (["sample", "deep_emoji", "--want", "i"], ["image64", "image", "image16"]),
        (["run", "deep_emoji", "--given", "g"], ["group="]),
        (["plan", "vcdm_emoji", "--set", "stages.clip.sample.st"], ["stages.clip.sample.steps="]),
        (["plan", "vcdm_emoji", "--set", "name=x", "--set", "nam"], ["name="]),
        (["list", "w"], ["weights"]),
        (["list", "ru"], ["runs"]),
        (["train", "no_such_recipe", "--stage", ""], []),
        (["train", "--stage", ""], []),
    ],
)
def test_tab_offers(offers, words, expected):
    assert offers(*words) == expected


def test_tab_offers_every_recipe_and_card_field(offers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert offers("show", "") == list(available("recipe"))
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    (tmp_path / "more").mkdir()
    (tmp_path / "mug.txt").touch()
    (tmp_path / "made" / "run").mkdir(parents=True)
    (tmp_path / "made" / "run" / "recipe.lock.yaml").touch()
    assert offers("show", "m") == ["mine.yaml", "made/", "more/"]
    assert offers("show", "made/") == ["made/run"]  # a run is a recipe


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shells_script_is_shown(command, monkeypatch, shell):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    status, out, err = command("--show-completion", shell)
    assert (status, err) == (0, "")
    assert "_CHAINDIFF_COMPLETE" in out


# ---------------------------------------------------------------- list


def test_list_of_one_group(command):
    assert command("list", "networks") == (
        0,
        "networks:\n"
        "  unet         A U-Net of EDM's family: DDPM++ by default, NCSN++ and ADM as options of the same blocks; "
        "or EDM2's.\n"
        "  prior        A DALL-E 2 style decoder-only transformer for vectors.\n"
        "  transformer  A diffusion transformer (DiT) for one variable or several, each image, map, vector or tokens.\n"
        "  joint        One network for an image and vectors: "
        "a U-Net and priors conditioned on each other's features.\n",
        "",
    )
    status, out, err = command("list", "wieghts")
    assert (status, out) == (2, "") and "did you mean 'weights'?" in err


def test_list_as_json_names_all_that_there_is(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, _ = command("list", "--json")
    found = json.loads(out)
    assert status == 0 and list(found) == [
        "recipes",
        "cards",
        "encoders",
        "reducers",
        "networks",
        "judges",
        "weights",
        "runs",
    ]
    for group, folder in (("recipes", "recipe"), ("cards", "card")):
        assert [entry["name"] for entry in found[group]] == list(available(folder))
    assert {"open_clip", "resize"} <= {entry["name"] for entry in found["encoders"]}
    assert {entry["name"] for entry in found["reducers"]} == {"pca", "kmeans"}
    assert {entry["name"] for entry in found["judges"]} == set(BUILDERS)
    assert found["runs"] == []
    assert all(entry["description"] for entries in found.values() for entry in entries)
    assert {Path(entry["path"]) for entry in found["weights"]} == set(SHIPPED.glob("*.safetensors"))


def test_list_says_what_weights_were_trained_on(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "half" / "stages" / "clip"
    folder.mkdir(parents=True)
    (folder / "weights.safetensors").write_bytes(b"no weights")
    lines = {line.split()[0]: line for line in command("list", "weights")[1].splitlines()[1:]}
    assert "not a complete weights file" in lines["runs/half/stages/clip/weights.safetensors"]
    for path in SHIPPED.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        if "stage" in metadata:
            assert f"{int(metadata['images']):,} images" in lines[path.stem]
            assert json.loads(metadata["stage"])["network"]["kind"] in lines[path.stem]
            assert all(variable in lines[path.stem] for variable in json.loads(metadata["variables"]))


# ---------------------------------------------------------------- JSON


def test_show_as_json_is_what_show_prints(command):
    changes = ("--set", "sample.count=5")
    shown = json.loads(command("show", "vcdm_emoji", "--json", *changes)[1])
    assert shown == yaml.safe_load(command("show", "vcdm_emoji", *changes)[1])
    assert shown["sample"]["count"] == 5


def test_plan_as_json(command):
    status, out, err = command("plan", "vcdm_emoji16", "--json")
    found = json.loads(out)
    assert (status, err) == (0, "")
    clip, image = found["steps"]
    assert (clip["name"], clip["makes"], clip["drops"]) == ("clip", {"clip": [32]}, [])
    assert (image["reads"], image["drops"]) == (["clip"], ["clip"])
    with safe_open(SHIPPED / "clip-1a938520bc86605d.safetensors", "pt") as file:
        assert clip["parameters"] == sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert (clip["nfe"], image["nfe"]) == (2 * 18 - 1, 10)
    assert image["weight_bytes"] == 4 * image["parameters"]
    assert found["nfe"] == 45
    assert found["total_flops"] == 35 * clip["flops"] + 10 * image["flops"]
    assert clip["share"] + image["share"] == pytest.approx(1)


def test_plan_with_everything_given_runs_nothing(command):
    found = json.loads(command("plan", "vcdm_emoji16", "--json", "--want", "clip", "--given", "clip=x.npy")[1])
    assert found["given"] == ["clip"] and found["steps"] == [] and found["total_flops"] == 0


def test_sample_and_run_as_json(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [*(word for change in QUICK for word in ("--set", change)), "--out", "there"]
    status, out, err = command("sample", "vcdm_emoji16", "--count", "2", *options, "--json")
    found = json.loads(out)
    assert status == 0 and "2 samples in" in err
    assert found["count"] == 2 and found["page"] is None and set(found["samples"]) == {"clip", "image16"}
    assert len(list(Path(found["samples"]["image16"]).glob("00000?.png"))) == 2
    assert all(Path(path).is_file() for path in [*found["grids"], *found["weights"].values(), found["lock"]])
    assert set(found["stage_seconds"]) == {"clip", "image16"} and found["seconds"] > 0

    status, out, err = command("run", "vcdm_emoji16", "--set", "sample.count=2", *options, "--json", "--quiet")
    again = json.loads(out)
    assert (status, err) == (0, "")
    assert again["seconds"] == 0 and Path(again["page"]).is_file()  # the samples were there


def test_list_says_what_runs_hold(command, offers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [*(word for change in QUICK for word in ("--set", change)), "--quiet"]
    assert command("sample", "vcdm_emoji16", "--count", "3", "--batch", "2", *options, "--out", "runs/whole")[0] == 0
    for name in ("part", "spoiled"):
        shutil.copytree("runs/whole", f"runs/{name}")
    Path("runs/part/samples/image16/000002.png").unlink()
    Path("runs/part/metrics.json").write_text("{}")
    Path("runs/part/stages/clip").mkdir(parents=True)
    Path("runs/part/stages/clip/weights.safetensors").touch()
    Path("runs/spoiled/samples/clip/000002.safetensors").write_bytes(b"half")
    Path("runs/broken").mkdir()
    Path("runs/broken/recipe.lock.yaml").write_text("name: [")
    Path("runs/training").mkdir()  # has not begun to sample
    status, out, _ = command("list", "runs")
    assert status == 0
    assert out.splitlines() == [
        "runs, in the folder runs:",
        "  broken   (broken: is not valid YAML: did not find expected node content; while parsing a flow node)",
        "  part     3 samples of clip; 2 of 3 samples of image16; evaluated; trained clip",
        "  spoiled  (broken: a file of samples is not complete)",
        "  whole    3 samples of clip, image16; not evaluated",
    ]
    found = json.loads(command("list", "runs", "--json")[1])["runs"]
    assert [entry["path"] for entry in found] == [f"runs/{name}" for name in ("broken", "part", "spoiled", "whole")]
    assert offers("compare", "w") == ["whole"] and offers("compare", "whole", "runs/p") == ["runs/part"]


def test_a_mistake_leaves_stdout_empty(command):
    status, out, err = command("plan", "vcdm_emoji", "--want", "imgae", "--json")
    assert (status, out) == (2, "") and "did you mean 'image" in err


# ---------------------------------------------------------------- no waiting

HEAVY = ("torch", "numpy", "PIL", "networkx", "chaindiff.commands.run")
CODE = f"""
import resource, sys
from chaindiff.cli import main
try:
    main()
finally:
    heavy = [name for name in {HEAVY} if name in sys.modules]
    print(heavy, resource.getrusage(resource.RUSAGE_SELF).ru_utime, file=sys.stderr)
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["list"],
        ["list", "weights", "--json"],
        ["list", "runs"],
        ["show", "vcdm_ffhq", "--json"],
        ["--help"],
        ["complete"],
    ],
)
def test_what_imports_no_torch_answers_at_once(arguments, monkeypatch):
    """In processor time, which is what the program can answer for on a machine with other work."""
    if arguments == ["complete"]:
        monkeypatch.setenv("_CHAINDIFF_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", "chaindiff train vcdm_emoji --stage ")
        monkeypatch.setenv("COMP_CWORD", "4")
        arguments = []
    done = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True)
    heavy, seconds = done.stderr.rsplit(" ", 1)
    assert done.stdout and heavy == "[]"
    assert float(seconds) < 0.5
