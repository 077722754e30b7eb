"""Nothing finished is lost: what a refusal leaves alone, what `--replace` deletes, and when the page is made."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import HEAD, Command, prepared, state

from chaindiff import cli
from chaindiff.io.errors import UserError
from chaindiff.recipe import samples as samples_module
from chaindiff.show import page as page_module
from chaindiff.specs.load import load_recipe

RECIPE = (
    HEAD
    + """\
  small: {kind: image, shape: [3, 4, 4], encoder: {kind: resize, of: image}}
  group: {kind: label, shape: [2], source: uniform}
stages:
  small:
    given: [group]
    network: &network {kind: unet, channels: 16, mult: [1], blocks: 1, attention: [], dropout: 0.0}
    train: &train {images: 16, batch: 8, execution: eager}
    sample: {steps: 2}
  image:
    given: [small]
    network: *network
    train: *train
    sample: {steps: 2}
sample: {want: [image], count: 5, batch: 2, execution: eager}
evaluate: {count: 30, judges: ["pixels:2"], held_out: null}
"""
)


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    return ended.value.code


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = prepared(tmp_path_factory.mktemp("finished"), RECIPE, 8)
    rows = [f'{{"file_name": "{index}.png", "group": "{"ab"[index % 2]}"}}' for index in range(8)]
    (folder / "data/metadata.jsonl").write_text("\n".join(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run("run", "tiny.yaml") == 0
    return folder


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copied = Path(shutil.copytree(finished, tmp_path / "here"))
    monkeypatch.chdir(copied)
    return copied / "runs/tiny"


def own_files(folder: Path) -> dict[Path, str]:
    """Files of the user's own, in the middle of ours."""
    names = ("notes.txt", "samples/best.png", "samples/image/000001 (copy).png", "samples/group/mine.safetensors")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    (folder / "samples/mine/000000.png/deep").mkdir(parents=True)
    return {folder / name: "mine" for name in names}


# ------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--given", "group=[0, 1]"], "2 values for 5 samples"),
        (["--given", "group=[0, 1]", "--replace"], "2 values for 5 samples"),
        (["--given", "group=c", "--replace"], "'c' is not a class of group"),
        (["--given", "small=data/0.png", "--given", "image=nowhere.png", "--replace"], "there is no file"),
        (["--set", "stages.image.weights=runs/tiny/stages/small/weights.safetensors", "--replace"], "not trained on"),
        (["--seed", "1"], "(sample.seed)\n  --replace deletes them and samples again; --out FOLDER keeps them"),
        (["--set", "stages.*.sample.steps=3"], "(stages.small.sample.steps, stages.image.sample.steps)\n  --replace"),
        (["--set", "stages.image.train.batch=4"], "(stages.image.train.batch)"),  # before anything is trained
    ],
)
def test_a_refused_request_deletes_nothing(here: Path, command: Command, words: list[str], expected: str) -> None:
    own_files(here)
    before = state(here)
    status, _, error = command("run", "tiny.yaml", *words)
    assert status == 2 and expected in error, error
    assert state(here) == before


def test_an_evaluation_that_is_refused_replaces_nothing(here: Path, command: Command) -> None:
    before = state(here)
    seed = ["evaluate", "tiny.yaml", "--set", "sample.seed=1"]
    for words in (["--judge", "pixls"], ["--of", "photo"], ["--sweep", "stages.image.sample.stps=1,2"]):
        assert command(*seed, "--replace", *words)[0] == 2
    assert "(sample.seed)\n  --replace" in command(*seed)[2]
    assert state(here) == before


def test_samples_of_unknown_settings_are_refused(here: Path, command: Command) -> None:
    (here / "recipe.lock.yaml").unlink()
    before = state(here)
    assert "are of other weights" in command("run", "tiny.yaml", "--seed", "0")[2]
    assert state(here) == before


def test_replacing_deletes_what_chaindiff_wrote_alone(here: Path, command: Command) -> None:
    own, before = own_files(here), state(here / "samples")
    status, said, error = command("run", "tiny.yaml", "--seed", "1", "--replace")
    assert (status, "they are replaced" in said) == (0, True), error
    assert {path: path.read_text() for path in own} == own and (here / "samples/mine/000000.png/deep").is_dir()
    after = state(here / "samples")
    assert after.keys() == before.keys() and load_recipe(here).recipe.sample.seed == 1
    images = [name for name in after if name.startswith("image/0") and "copy" not in name]
    assert len(images) == 5 and all(after[name][1] != before[name][1] for name in images)
    assert command("sample", "tiny.yaml", "--given", "group=a", "--replace")[0] == 0
    assert [path.name for path in (here / "samples/group").iterdir()] == ["mine.safetensors"]


def test_a_request_that_fails_after_the_check_can_be_made_again(here: Path, command: Command, monkeypatch) -> None:
    whole = state(here / "samples")

    def full(*arguments: object, **options: object) -> None:
        raise UserError("cannot write")

    with monkeypatch.context() as patch:
        patch.setattr(samples_module, "save_png", full)
        assert command("sample", "tiny.yaml", "--seed", "1", "--replace")[0] == 2
    assert command("sample", "tiny.yaml", "--seed", "1")[0] == 0, "what was asked for goes on without --replace"
    assert command("sample", "tiny.yaml", "--seed", "0", "--replace")[0] == 0
    assert {n: d for n, (_, d) in state(here / "samples").items()} == {n: d for n, (_, d) in whole.items()}


# ------------------------------------------------------------ more, and fewer


@pytest.mark.parametrize("batch", ["2", "64"])
def test_eight_after_five_makes_three_more(here: Path, command: Command, batch: str) -> None:
    options = ["tiny.yaml", "--batch", batch]
    assert command("run", *options, "--replace")[0] == 0
    before = state(here / "samples/image")
    status, _, error = command("run", *options, "--count", "8")
    assert status == 0, error
    after = state(here / "samples/image")
    assert sorted(after.keys() - before.keys()) == [f"{number:06d}.png" for number in (5, 6, 7)]
    assert {name for name in before if after[name] != before[name]} == {"grid.png"}
    assert "nothing to do" in command("run", *options, "--count", "8")[1]
    fresh = [
        *options,
        "--count",
        "8",
        "--out",
        "fresh",
        "--set",
        "stages.small.weights=runs/tiny/stages/small/weights.safetensors",
    ]
    assert command("sample", *fresh, "--set", "stages.image.weights=runs/tiny/stages/image/weights.safetensors")[0] == 0
    for number in range(8):
        one, other = (
            np.array(Image.open(folder / f"samples/image/{number:06d}.png")) for folder in (here, Path("fresh"))
        )
        assert np.abs(one.astype(int) - other).max() <= 1


def test_five_after_eight_leaves_eight_and_uses_five(here: Path, command: Command) -> None:
    assert command("run", "tiny.yaml", "--count", "8")[0] == 0
    before = state(here / "samples")
    status, said, _ = command("run", "tiny.yaml", "--count", "5")
    assert status == 0 and "page: " in said
    after = state(here / "samples")
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} == {"image/grid.png", "small/grid.png"}
    assert "the first 5 of 5" in (here / "report.html").read_text()
    assert "nothing to do" in command("run", "tiny.yaml", "--count", "5")[1]
    assert "8 samples of group, image, small" in command("list", "runs")[1]


# ------------------------------------------------------------ the page


def test_the_page_is_made_when_what_it_shows_has_changed(here: Path, command: Command) -> None:
    page = here / "report.html"
    assert "nothing to do" in command("run", "tiny.yaml")[1]
    changes: list[Callable[[], object]] = [
        lambda: (here / "samples/image/grid.png").write_bytes((here / "samples/small/grid.png").read_bytes()),
        lambda: (here / "samples/image/000001.png").unlink(),
        lambda: Path("tiny.yaml").write_text(RECIPE + "description: another\n"),
        lambda: (here / "chain.svg").unlink(),
        page.unlink,
        lambda: page.write_text(""),
        lambda: command("evaluate", "tiny.yaml", "--count", "30") and (here / "metrics.json").unlink(),
    ]
    for change in changes:
        change()
        status, said, error = command("run", "tiny.yaml")
        assert status == 0 and "page: runs/tiny/report.html" in said, error
        assert "nothing to do" in command("run", "tiny.yaml")[1]
    assert "another" in page.read_text() and (here / "chain.svg").exists()


@pytest.mark.parametrize("name", ["run", "evaluate"])
def test_a_page_that_failed_is_made_by_the_next_run(here: Path, command: Command, monkeypatch, name: str) -> None:
    old = (here / "report.html").read_bytes()

    def full(*arguments: object) -> None:
        raise UserError("cannot write the page")

    words = [name, "tiny.yaml", *(["--seed", "1", "--replace"] if name == "run" else [])]
    with monkeypatch.context() as patch:
        patch.setattr(page_module, "write_whole", full)
        assert command(*words)[0] == 2
    assert (here / "report.html").read_bytes() == old
    again = ["run", "tiny.yaml", *words[2:4]]
    assert "page: runs/tiny/report.html" in command(*again)[1]
    assert (here / "report.html").read_bytes() != old
    assert "nothing to do" in command(*again)[1]
