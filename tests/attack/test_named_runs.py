"""A run is the run that was named: every command given a directory uses it, its recipe and its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny import HEAD, Command, prepared, state

import chaindiff as cd
from chaindiff import cli
from chaindiff.io import tensorfile
from chaindiff.io.digest import file_digest

RECIPE = (
    HEAD
    + """\
stages:
  image:
    network: {kind: unet, channels: 16, mult: [1], blocks: 1, attention: [], dropout: 0.0}
    train:
      {images: 16, batch: 8, execution: eager, log_every: 1, optimizer: {lr: 0.01},
      ema: {kind: power, snapshot_every: 8}}
    sample: {steps: 2}
sample: {want: [image], count: 3, batch: 2, execution: eager}
evaluate: {count: 60, judges: ["pixels:2"], held_out: null}
"""
)
WEIGHTS = "stages/image/weights.safetensors"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs of one recipe: its usual directory, and two others, of which `b` trained on."""
    folder = prepared(tmp_path_factory.mktemp("trained"), RECIPE, 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in (["train", "tiny.yaml"], ["train", "tiny.yaml", "--more", "8"]):
            with pytest.raises(SystemExit) as ended:
                cli.main(words)
            assert ended.value.code == 0
        for name in ("a", "b"):
            with pytest.raises(SystemExit) as ended:
                cli.main(["train", "tiny.yaml", "--out", f"results/{name}", "--quiet", "--fresh"])
            assert ended.value.code == 0
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", "results/b", "--more", "16"])
        assert ended.value.code == 0
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copied = Path(shutil.copytree(trained, tmp_path / "here"))
    monkeypatch.chdir(copied)
    return copied


def test_training_goes_on_in_the_directory_that_was_named(here: Path) -> None:
    images = {name: tensorfile.metadata(Path(name) / WEIGHTS)["images"] for name in ("results/a", "results/b")}
    assert images == {"results/a": "16", "results/b": "32"}
    assert tensorfile.metadata(Path("runs/tiny") / WEIGHTS)["images"] == "24"


def test_commands_use_the_weights_of_the_directory_and_write_into_it(here: Path, command: Command) -> None:
    before, digests = state("runs/tiny"), set()
    for name in ("results/a", "results/b"):
        weights = f"{name}/{WEIGHTS}"
        said = command("plan", name)[1]
        assert f"stage image: weights {here}/{weights}" in said or f"stage image: weights {weights}" in said
        assert Path(json.loads(command("plan", name, "--json")[1])["weights"]["image"]).samefile(weights)
        for words in (["sample", name], ["run", name]):
            status, said, _ = command(*words)
            assert status == 0 and f"stage image: weights {weights}" in said.replace(f"{here}/", "")
            found = json.loads(command(*words, "--json")[1])
            assert Path(found["weights"]["image"]).samefile(weights) and Path(found["out"]).samefile(name)
        assert f"stage image has weights: {weights}" in command("train", name)[1].replace(f"{here}/", "")
        assert Path(cd.load(name).weights.get("image", "") or weights).samefile(weights)
        digests.add((Path(name) / "samples/image/000000.png").read_bytes())
    assert len(digests) == 2
    assert state("runs/tiny") == before, "the recipe's usual directory was not named"


def test_python_uses_the_directory_that_was_named(here: Path) -> None:
    one, other = (cd.load(here / "results" / name).sample(2)["image"] for name in ("a", "b"))
    assert not (one == other).all()
    for name in ("a", "b"):
        sampled = cd.run(here / "results" / name)
        assert sampled.weights["image"].samefile(here / "results" / name / WEIGHTS)


def test_a_run_sampled_elsewhere_keeps_its_weights(here: Path, command: Command) -> None:
    """Not those of a run beside the other directory, nor those that lie in it."""
    for name in ("results/b", "results/a"):
        found = json.loads(command("sample", name, "--out", "results/c", "--replace", "--json")[1])
        assert Path(found["weights"]["image"]).samefile(f"{name}/{WEIGHTS}") and found["out"] == "results/c"
    found = json.loads(command("sample", "results/b", "--out", "results/a", "--json")[1])
    assert Path(found["weights"]["image"]).samefile(f"results/b/{WEIGHTS}")


def test_a_baseline_is_measured_with_its_own_weights(here: Path, command: Command) -> None:
    status, said, error = command(
        "evaluate", "results/b", "--baseline", "results/a", "--baseline", "tiny.yaml", "--json"
    )
    assert status == 0, error
    found = json.loads(said)
    figures = {f["row"]: f["value"] for f in found["figures"] if f["metric"] == "swd"}
    assert [row.removeprefix(f"{here}/") for row in found["weights"]] == ["tiny", "results/a", "runs/tiny"]
    assert len(figures) == len(set(figures.values())) == 3
    homes = [Path(paths["image"]).resolve().relative_to(here.resolve()) for paths in found["weights"].values()]
    assert homes == [Path(name) / WEIGHTS for name in ("results/b", "results/a", "runs/tiny")]
    assert "stage image: weights" in error


def test_runs_are_moved_and_copied(here: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    command("sample", "results/b")
    before = (Path("results/b/samples/image/000000.png")).read_bytes()
    shutil.copytree("results/b", "elsewhere/copy")
    Path("results/b").rename("moved")
    shutil.rmtree("results"), shutil.rmtree("runs")
    for name in ("moved", "elsewhere/copy"):
        shutil.rmtree(f"{name}/samples")
        assert command("sample", name)[0] == 0
        assert (Path(name) / "samples/image/000000.png").read_bytes() == before
    assert not Path("runs").exists()


def test_compare_tells_runs_of_one_recipe_apart(here: Path, command: Command) -> None:
    for name in ("results/a", "results/b"):
        assert command("sample", name)[0] == 0
    found = json.loads(command("compare", "results/a", "results/b", "--json")[1])
    assert [*found["settings"]] == ["weights.image"]
    digests = found["settings"]["weights.image"]
    assert digests == {n: file_digest(Path(n) / WEIGHTS)[:12] for n in ("results/a", "results/b")}


def test_averages_are_of_the_directory_that_was_named(here: Path, command: Command) -> None:
    for name, images in (("results/a", 16), ("results/b", 32)):
        status, said, error = command("ema", f"{name}/stages/image", "--std", "0.05", "--out", f"{name}.safetensors")
        assert status == 0 and f"at {images} images" in said, error
