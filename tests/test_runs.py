"""Whole runs of a tiny chain through the command line: what is missing is made, and nothing else; what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from chaindiff import cli
from chaindiff.specs.load import load_recipe

CLASSES = ("animals", "flags", "food")
COUNT = 5  # samples, in batches of 2
RECIPE = """
name: tiny
data: {{path: {data}}}
variables:
  photo: {{kind: image, shape: [3, 32, 32]}}
  image: {{kind: image, shape: [3, 16, 16], encoder: {{kind: resize, of: photo}}}}
  small: {{kind: image, shape: [3, 8, 8], encoder: {{kind: resize, of: image}}}}
  group: {{kind: label, shape: [3], source: empirical}}
stages:
  small:
    given: [group]
    network: &network {{kind: unet, channels: 16, mult: [1, 2], blocks: 1, attention: [], dropout: 0.0}}
    train: &train {{images: 16, batch: 8, execution: eager, log_every: 1}}
    sample: {{steps: 2}}
  image:
    given: [small]
    network: *network
    train: *train
    sample: {{steps: 2}}
sample: {{want: [image], count: 5, batch: 2, seed: 0}}
"""

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    data, rng = folder / "data", np.random.default_rng(0)
    data.mkdir()
    rows = []
    for index in range(9):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(data / f"{index}.png")
        rows.append(json.dumps({"file_name": f"{index}.png", "group": CLASSES[index % 3]}))
    (data / "metadata.jsonl").write_text("\n".join(rows))
    path = folder / "tiny.yaml"
    path.write_text(RECIPE.format(data=data))
    return path


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that went through once."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", str(recipe), "--out", str(out)])
    assert ended.value.code == 0
    return out


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "again"))


@pytest.fixture
def command(recipe: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """`chaindiff COMMAND tiny.yaml --out OUT OPTIONS`: its exit status and what it printed."""

    def call(name: str, *options: str | Path, out: Path | None = None) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main([name, str(recipe), *map(str, options), *(["--out", str(out)] if out else [])])
        return (ended.value.code, *capsys.readouterr())

    return call


def times(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def pictures(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted((out / "samples").rglob("*.png"))}


def stage_line(recipe: Path, stage: str) -> str:
    lines = recipe.read_text().splitlines()
    first = lines.index("stages:")
    return f"{recipe}:{lines.index(f'  {stage}:', first) + 1}"


# ------------------------------------------------------------ what a run makes


def test_a_run_leaves_weights_samples_lock_and_page(finished: Path) -> None:
    samples = [
        f"samples/{v}/{name}.png" for v in ("small", "image") for name in ("grid", *(f"00000{n}" for n in range(5)))
    ]
    labels = [f"samples/group/00000{first}.safetensors" for first in (0, 2, 4)]
    stages = [
        f"stages/{s}/{f}"
        for s in ("small", "image")
        for f in ("weights.safetensors", "state.safetensors", "metrics.jsonl")
    ]
    made = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    boards = {name for name in made if "/tensorboard/" in name}
    assert made - boards == {"recipe.lock.yaml", "report.html", "chain.svg", *samples, *labels, *stages}
    with Image.open(finished / "samples/image/000004.png") as image:
        assert (image.size, image.mode) == ((16, 16), "RGB")
    with safe_open(finished / "samples/group/000004.safetensors", "pt") as file:
        assert file.get_tensor("group").shape == (1,)
    assert ElementTree.parse(finished / "chain.svg").getroot().tag.endswith("svg")
    page = (finished / "report.html").read_text()
    assert all(text in page for text in ("tiny", "image [3 x 16 x 16], the first 5 of 5", "data:image/png;base64,"))


def test_the_lock_holds_the_recipe_and_what_it_resolved(recipe: Path, finished: Path) -> None:
    locked = load_recipe(finished)
    assert locked.recipe == load_recipe(recipe).recipe
    assert {(how["mode"], how["precision"]) for how in locked.lock["execution"].values()} == {("eager", "float32")}
    assert locked.lock["weights"].keys() == {"small", "image"}
    assert locked.lock["versions"].keys() == {"chain-diffusion-models", "torch", "numpy"}


def test_a_second_run_does_nothing(command: Command, finished: Path) -> None:
    before = times(finished)
    status, said, _ = command("run", out=finished)
    assert status == 0
    assert f"nothing to do: {finished} is complete (delete {finished}/samples to sample again)" in said
    assert times(finished) == before


def test_deleted_samples_come_again_to_the_bit(command: Command, finished: Path, again: Path) -> None:
    weights = {path: time for path, time in times(again).items() if "stages" in path.parts}
    shutil.rmtree(again / "samples")
    status, said, _ = command("run", out=again)
    assert status == 0
    assert "5 samples in " in said
    assert len(pictures(again)) == 2 * (COUNT + 1)
    assert pictures(again) == pictures(finished)
    assert {path: time for path, time in times(again).items() if "stages" in path.parts} == weights


def test_an_interrupted_run_makes_the_missing_samples_alone(command: Command, finished: Path, again: Path) -> None:
    (again / "samples/image/000004.png").unlink()
    before = times(again)
    assert command("run", out=again)[0] == 0
    assert pictures(again) == pictures(finished)
    kept = [path for path, time in times(again).items() if time == before.get(path) and "samples" in path.parts]
    numbers = {(path.parent.name, path.stem) for path in kept}
    assert numbers == {("small", f"00000{n}") for n in range(5)} | {("image", f"00000{n}") for n in range(4)} | {
        ("group", f"00000{n}") for n in (0, 2, 4)
    }


def test_samples_of_another_seed_are_replaced_where_that_is_said(command: Command, finished: Path, again: Path) -> None:
    status, _, error = command("run", "--set", "sample.seed=1", out=again)
    assert (status, error) == (
        2,
        f"error: the samples in {again}/samples are of other settings (sample.seed)\n"
        "  --replace deletes them and samples again; --out FOLDER keeps them and samples there, with the weights of "
        f'this run if you add --set "stages.*.weights={again}"\n',
    )
    assert pictures(again) == pictures(finished)
    status, said, _ = command("run", "--set", "sample.seed=1", "--replace", out=again)
    assert status == 0
    assert f"the samples in {again}/samples are of other settings or weights; they are replaced" in said
    theirs = pictures(finished)
    assert [name for name, bytes_ in pictures(again).items() if bytes_ == theirs[name]] == []
    assert load_recipe(again).recipe.sample.seed == 1
    # Back to the first seed: the first pictures.
    assert command("sample", "--seed", "0", "--replace", out=again)[0] == 0
    assert pictures(again) == theirs


def test_samples_of_weights_that_changed_are_replaced_where_that_is_said(
    command: Command, finished: Path, again: Path
) -> None:
    status, said, _ = command("train", "--stage", "image", "--more", "8", out=again)
    assert (status, "train image: 24 of 24" in said) == (0, True)
    assert "are of other weights\n  --replace" in command("run", out=again)[2]
    assert "they are replaced" in command("run", "--replace", out=again)[1]
    one, other = pictures(again), pictures(finished)
    assert {name for name in one if one[name] == other[name]} == {name for name in one if "/small/" in name}


def test_a_class_is_given_by_name_or_number(command: Command, again: Path) -> None:
    status, said, _ = command("run", "--given", "group=food", "--replace", out=again)
    assert (status, "they are replaced" in said) == (0, True)
    assert not (again / "samples/group").exists()
    status, said, _ = command("run", "--given", "group=2", out=again)
    assert (status, "nothing to do" in said) == (0, True), "food is class 2"


def test_run_takes_what_sample_takes(command: Command, again: Path) -> None:
    status, _, _ = command("run", "--count", "3", "--seed", "1", "--batch", "3", "--replace", out=again)
    asked = load_recipe(again).recipe.sample
    assert (status, asked.count, asked.seed, asked.batch) == (0, 3, 1, 3)
    assert sorted(path.name for path in (again / "samples/image").iterdir()) == [
        *(f"00000{n}.png" for n in range(3)),
        "grid.png",
    ]
    assert "nothing to do" in command("run", "--set", "sample.count=3", "--seed", "1", "--batch", "3", out=again)[1]


def test_each_sample_may_have_a_class_of_its_own(command: Command, again: Path) -> None:
    assert command("sample", "--given", "group=[animals, 1, food, 0, 0]", "--replace", out=again)[0] == 0
    labels = np.array([0, 1, 2, 0, 0], dtype=np.int64)
    assert load_recipe(again).lock["given"] == {"group": hashlib.sha256(labels.tobytes()).hexdigest()}


def test_a_class_by_number_needs_no_data(command: Command, finished: Path, tmp_path: Path) -> None:
    """Only a name does; weights that the recipe names may be of other data, which need not be here."""
    weights = [f"stages.{name}.weights={finished}/stages/{name}/weights.safetensors" for name in ("small", "image")]
    away = ["--count", "2", *(part for said in ("data.path=nowhere", *weights) for part in ("--set", said))]
    status, _, error = command("sample", *away, "--given", "group=[2, 0]", out=tmp_path / "run")
    assert (status, error) == (0, "")
    assert len(list((tmp_path / "run/samples/image").glob("0*.png"))) == 2
    status, _, error = command("sample", *away, "--given", "group=food", out=tmp_path / "named")
    assert status == 2 and "no data at" in error


def test_a_list_of_another_length_is_refused_and_leaves_the_samples(command: Command, again: Path) -> None:
    before = times(again)
    status, _, error = command("run", "--given", "group=[0, 1]", out=again)
    assert (status, error) == (
        2,
        "error: --given group: 2 values for 5 samples\n  give one for all samples, or one for each: sample.count=2\n",
    )
    assert times(again) == before
    assert command("run", "--given", "group=[0, xyz, 1, 1, 1]", out=again)[2] == (
        "error: --given group: 'xyz' is not a class of group; known: animals, flags, food\n"
    )


def test_what_the_recipe_gives_can_be_taken_away(command: Command, again: Path) -> None:
    given = ["--set", "sample.given.group=food"]
    assert command("run", *given, "--replace", out=again)[0] == 0
    for change in (("--given", "group=null"), ("--set", "sample.given={}"), ("--set", "sample.given.group=null")):
        assert json.loads(command("plan", *given, *change, "--json")[1])["given"] == []
    assert "group" in json.loads(command("plan", *given, "--json")[1])["given"]
    assert command("run", *given, "--given", "group=null", "--replace", out=again)[0] == 0
    assert load_recipe(again).recipe.sample.given == {}
    assert (again / "samples/group/000004.safetensors").exists()


def test_a_request_that_runs_no_stage_says_so(command: Command, again: Path, tmp_path: Path) -> None:
    picture = tmp_path / "p.png"
    Image.new("RGB", (32, 32)).save(picture)
    status, said, _ = command("sample", "--given", f"photo={picture}", "--replace", out=again)
    assert status == 0
    assert (
        "no stage runs: 'image' is computed from the given 'photo'; to sample variations of a picture, condition "
        f"its stage on one: --given small={picture}\n"
    ) in said
    said = command("sample", "--given", f"image={picture}", "--replace", out=again)[1]
    assert "no stage runs: 'image' is given; to sample variations of a picture, condition" in said
    assert "no stage runs" not in command("sample", "--given", f"small={picture}", "--replace", out=again)[1]


def test_a_run_uses_the_weights_of_a_run_that_is_named(command: Command, finished: Path) -> None:
    beside = finished.parent / "beside"
    assert command("sample", "--count", "1", out=beside)[0] == 2
    status, said, _ = command("sample", "--count", "1", "--set", f"stages.*.weights={finished}", out=beside)
    assert (status, "1 samples in " in said) == (0, True)
    assert not (beside / "stages").exists()
    assert (beside / "samples/image/000000.png").exists()


# ------------------------------------------------------------ what is refused


def test_an_unknown_class_is_refused_before_training(command: Command, tmp_path: Path) -> None:
    assert command("run", "--given", "group=fod", out=tmp_path / "run") == (
        2,
        "",
        "error: --given group: 'fod' is not a class of group; did you mean 'food'?\n",
    )
    assert not (tmp_path / "run").exists()


def test_an_unknown_class_is_refused_when_sampling(command: Command, finished: Path) -> None:
    status, _, error = command("sample", "--given", "group=xyz", out=finished)
    assert status == 2
    assert error == "error: --given group: 'xyz' is not a class of group; known: animals, flags, food\n"


def test_a_given_file_that_is_not_there(command: Command, tmp_path: Path) -> None:
    status, _, error = command("run", "--given", "small=nowhere.png", out=tmp_path / "run")
    assert (status, error) == (
        2,
        "error: --given small: there is no file or folder nowhere.png\n"
        "  give small [3 x 8 x 8] as an image, a folder of images, or numbers in a .safetensors or .npy file\n",
    )
    assert not (tmp_path / "run").exists()


def test_sampling_without_weights(command: Command, recipe: Path, tmp_path: Path) -> None:
    status, _, error = command("sample", out=tmp_path / "run")
    assert status == 2
    assert error == (
        f"error: {stage_line(recipe, 'small')}: stage 'small' has no weights yet\n"
        f"  train it: chaindiff train {recipe} --stage small\n"
        "  or take it from a run that has it: --set stages.small.weights=RUN\n"
    )
    missing = tmp_path / "w.safetensors"
    status, _, error = command("run", "--set", f"stages.small.weights={missing}", out=tmp_path / "run")
    assert (status, f"stage 'small': there is no weights file {missing}\n  correct the path" in error) == (2, True)
    assert not (tmp_path / "run").exists()


def test_weights_of_another_stage(command: Command, finished: Path, tmp_path: Path) -> None:
    wrong = finished / "stages/small/weights.safetensors"
    status, _, error = command("run", "--set", f"stages.image.weights={wrong}", out=tmp_path / "run")
    assert status == 2
    assert f"stage 'image': the weights in {wrong} were not trained on this 'image'" in error
    assert not (tmp_path / "run").exists(), "the other stage must not be trained first"


def test_weights_trained_on_another_variable(command: Command, recipe: Path, finished: Path, tmp_path: Path) -> None:
    """The same names and shapes, but an image that another filter made."""
    weights = finished / "stages/image/weights.safetensors"
    changes = ["--set", f"stages.image.weights={weights}", "--set", "variables.small.encoder.filter=bicubic"]
    changes += ["--set", f"stages.small.weights={finished}/stages/small/weights.safetensors"]
    status, _, error = command("sample", *changes, out=tmp_path / "run")
    assert status == 2
    assert "were not trained on this 'small'\n  its kind, shape, encoder or scaling differs" in error


def test_weights_that_are_no_stage(command: Command, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3)}, tmp_path / "w.safetensors")
    status, _, error = command(
        "sample", "--set", f"stages.small.weights={tmp_path}/w.safetensors", out=tmp_path / "run"
    )
    assert (status, error) == (
        2,
        f"error: {tmp_path}/w.safetensors is not the weights file of a stage\n  its metadata names no variables\n",
    )


@pytest.mark.parametrize("name", ["run", "train"])
def test_a_file_in_the_place_of_the_directory(command: Command, tmp_path: Path, name: str) -> None:
    (tmp_path / "run").write_text("a file")
    status, _, error = command(name, out=tmp_path / "run")
    assert status == 2
    assert error.startswith(f"error: {tmp_path}/run")
    assert error.count("\n") == 1
    assert (tmp_path / "run").read_text() == "a file"


# ------------------------------------------------------------ plan


@pytest.mark.parametrize(("suffix", "begins"), [("svg", b"<svg"), ("png", b"\x89PNG\r\n")])
def test_plan_draws_the_chain(command: Command, tmp_path: Path, suffix: str, begins: bytes) -> None:
    path = tmp_path / f"chain.{suffix}"
    status, said, _ = command("plan", "--picture", path)
    assert status == 0
    assert "tiny: sample image\n" in said
    assert f"wrote {path}" in said
    assert path.read_bytes().startswith(begins)


def test_plan_draws_no_other_pictures(command: Command, tmp_path: Path) -> None:
    status, _, error = command("plan", "--picture", tmp_path / "chain.gif")
    assert (status, error) == (2, f"error: --picture {tmp_path}/chain.gif: pictures are .svg or .png\n")
    assert list(tmp_path.iterdir()) == []
