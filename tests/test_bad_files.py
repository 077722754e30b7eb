"""Files that a person names or that a run writes: wrong weights, wrong numbers, no room, no permission."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from chaindiff import cli
from chaindiff.io import tensorfile

RECIPE = """
name: tiny
data: {{path: {data}}}
variables:
  photo: {{kind: image, shape: [3, 16, 16]}}
  image: {{kind: image, shape: [3, 8, 8], encoder: {{kind: resize, of: photo}}}}
  small: {{kind: image, shape: [3, 4, 4], encoder: {{kind: resize, of: image}}}}
  group: {{kind: label, shape: [2], source: uniform}}
stages:
  image:
    given: [group]
    network: &network {{kind: unet, channels: 8, mult: [1], blocks: 1, attention: [], dropout: 0.0}}
    train: &train {{images: 8, batch: 4, checkpoint_every: 4, execution: eager, log_every: 1}}
    sample: &sample {{steps: 2}}
  small:
    network: *network
    train: *train
    sample: *sample
sample: {{want: [image], count: 3, batch: 2, execution: eager}}
"""

Command = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    rows = [json.dumps({"file_name": f"{index}.png", "group": "ab"[index % 2]}) for index in range(4)]
    for index in range(4):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"data/{index}.png")
    (folder / "data/metadata.jsonl").write_text("\n".join(rows))
    (folder / "tiny.yaml").write_text(RECIPE.format(data=folder / "data"))
    return folder / "tiny.yaml"


def status(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    assert status("run", recipe, "--out", out) == 0
    assert status("train", recipe, "--stage", "small", "--out", out) == 0
    return out


@pytest.fixture
def refused(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`chaindiff COMMAND tiny.yaml ...`, which must end with one message and status 2: the message."""

    def call(name: str, *options: str | Path, out: Path = tmp_path / "run") -> str:
        ended = status(name, recipe, "--out", out, *options)
        error = capsys.readouterr().err
        assert ended == 2 and error.startswith("error: ") and "Traceback" not in error
        return error

    return call


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "w.safetensors is not a complete safetensors file: "),
        (b"\xff" * 8, "w.safetensors is not a complete safetensors file: "),
        (b"\x02\0\0\0\0\0\0\0{}", "w.safetensors is not the weights file of a stage"),
        ({"variables": "no json"}, "w.safetensors is damaged: variables: "),
        ({"variables": "[1]"}, "w.safetensors is damaged: variables: "),
        ({"variables": '{"image": 3, "group": 3}'}, "w.safetensors is damaged: variables.image: "),
        ("truncated", "w.safetensors is not a complete safetensors file: "),
        ("no tensors", "w.safetensors does not fit this stage: missing "),
    ],
    ids=range(8),
)
def test_weights_that_are_none(refused, finished, tmp_path, content, expected):
    path, whole = tmp_path / "w.safetensors", finished / "stages/image/weights.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        save_file({"a": torch.zeros(1)}, path, content)
    elif content == "truncated":
        path.write_bytes(whole.read_bytes()[:-100])
    else:
        save_file({"a": torch.zeros(1)}, path, tensorfile.metadata(whole))
    assert expected in refused("sample", "--set", f"stages.image.weights={path}")
    assert not (tmp_path / "run").exists()


def test_weights_of_another_stage_and_a_directory(refused, finished, tmp_path):
    other = finished / "stages/small/weights.safetensors"
    message = refused("sample", "--set", f"stages.image.weights={other}")
    assert f"stage 'image': the weights in {other} were not trained on this 'image'" in message
    assert f"no stage of the run {tmp_path} was trained like this one, on the same data" in refused(
        "sample", "--set", f"stages.image.weights={tmp_path}"
    )


def test_init_from_what_cannot_begin_a_stage(refused, finished, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"half a file")
    for path, expected in (
        (tmp_path / "nowhere.safetensors", "there is no weights file "),
        (tmp_path / "w.safetensors", "w.safetensors is not a complete safetensors file: "),
        (finished / "samples/group/000000.safetensors", "000000.safetensors cannot initialise this stage: "),
    ):
        assert expected in refused("train", "--stage", "image", "--set", f"stages.image.init={path}")
    assert not (tmp_path / "run" / "stages").exists()


def test_init_is_checked_before_anything_is_planned_or_trained(refused, recipe, finished, tmp_path, capsys):
    """`small` is trained after `image`, but looked at before; a stage that has weights needs no file to begin from."""
    (tmp_path / "half.pkl").write_bytes(b"half a file")
    field = "stages.small.init"
    for path, expected in (
        ("nowhere.safetensors", "there is no weights file nowhere.safetensors\n  correct the path, or leave `init` o"),
        (tmp_path, f"there is no weights file {tmp_path}\n"),
        (tmp_path / "half.pkl", "half.pkl is not a complete safetensors file: "),
        (tmp_path / "half.pkl", "what `chaindiff import SNAPSHOT.pkl` makes of a snapshot"),
        (finished / "stages/image/weights.safetensors", "weights.safetensors cannot initialise this stage: "),
    ):
        assert status("plan", recipe, "--set", f"{field}={path}") == 2
        message = capsys.readouterr().err
        assert message.startswith(f"error: --set {field}={path}: {field}: ") and expected in message
    for command in (["train"], ["train", "--fresh"], ["run", "--set", "sample.want=[small]"]):
        assert refused(*command, "--set", f"{field}={path}") == message
    assert not (tmp_path / "run").exists()
    have = ("--set", f"stages.small.weights={finished}/stages/small/weights.safetensors")
    assert status("plan", recipe, "--set", f"{field}=nowhere.safetensors", *have) == 0
    assert status("plan", recipe, "--set", f"{field}={finished}/stages/small/weights.safetensors") == 0


@pytest.mark.parametrize("content", [b"", b"these are no weights, whatever the name"])
def test_a_damaged_state_is_named_with_what_to_do(refused, finished, tmp_path, content):
    out = Path(shutil.copytree(finished, tmp_path / "copy"))
    for name in ("state", "state.previous"):
        (out / f"stages/image/{name}.safetensors").write_bytes(content)
    message = refused("train", "--stage", "image", out=out)
    assert "state.safetensors is not a complete safetensors file: " in message and "delete it to retrain" in message


# ---------------------------------------------------------------- what is given


def numpy_file(path: Path, array: np.ndarray) -> Path:
    np.save(path, array, allow_pickle=True)
    return path


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.npy", b"", "x.npy is not a complete .safetensors or .npy file of numbers: "),
        (
            "x.npy",
            np.array([{"a": 1}], dtype=object),
            "x.npy is not a complete .safetensors or .npy file of numbers: Object arrays",
        ),
        ("x.npy", np.array(["a"]), "x.npy is not a complete .safetensors or .npy file of numbers: "),
        ("x.npy", np.zeros((1, 3, 8, 8), complex), "or .npy file of numbers: its numbers are complex"),
        ("x.npy", np.zeros((2, 3, 8, 7)), "x.npy holds [2, 3, 8, 7]; expected [rows, *[3, 8, 8]]"),
        ("x.npy", np.full((1, 3, 8, 8), np.nan), "x.npy holds numbers that are not finite (NaN or infinity)"),
        ("x.npy", np.full((1, 3, 8, 8), 255), "x.npy holds numbers from 255 to 255; images lie in [-1, 1]"),
        ("x.safetensors", b"half a file", "x.safetensors is not a complete .safetensors or .npy file of numbers: "),
        ("x.safetensors", {"a": 1, "imag": 2}, "x.safetensors holds no tensor 'image'; did you mean 'imag'?"),
        ("x.png", b"", "x.png: not a readable image: the file is empty"),
        ("x.gif", b"GIF89a", "x.gif: not a readable image: "),
        ("x.zip", b"PK", "x.zip: the data is neither a folder nor a readable zip"),
        ("x.txt", b"hello", "x.txt is not a complete .safetensors or .npy file of numbers: "),
        ("folder", None, "folder: there are no images"),
    ],
    ids=range(14),
)
def test_given_files_that_cannot_be_used(refused, finished, tmp_path, name, content, expected):
    path = tmp_path / name
    if content is None:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        save_file({key: torch.tensor([value]) for key, value in content.items()}, path)
    else:
        numpy_file(path, content)
    assert expected in refused("sample", "--want", "small", "--given", f"image={path}", out=finished)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("group=²", "'²' is not a class of group; known: a, b"),
        ("group=c", "'c' is not a class of group"),
        ("group=2", "2 is not one of 2 classes"),
        ("group=", "expected a class's name or number, or a list of them, not nothing"),
        ("group=[a, b]", "2 values for 3 samples"),
        ("gruop=a", "there is no variable 'gruop'; did you mean 'group'?"),
        ("image=3", "expected a file or folder, not 3"),
        ("group", "expected NAME=VALUE after --given"),
        ("group=[", "is not valid YAML"),
    ],
)
def test_given_values_that_mean_nothing(refused, finished, given, expected):
    assert expected in refused("sample", "--given", given, out=finished)


def test_a_given_image_stands_for_itself_alone(finished, recipe, tmp_path, capsys):
    """Whatever lies beside it: broken metadata, other images, hidden names."""
    for name in ("photo.GIF", ".photo.png"):
        folder = tmp_path / name.strip(".")
        folder.mkdir()
        shutil.copy(recipe.parent / "data/0.png", folder / name)
        (folder / "metadata.jsonl").write_text("{")
        (folder / "other.png").write_bytes(b"")
        out = Path(shutil.copytree(finished, tmp_path / f"run{name}"))
        assert (
            status("sample", recipe, "--out", out, "--want", "image", "--replace", "--given", f"image={folder / name}")
            == 0
        )
        with Image.open(out / "samples/image/000002.png") as made, Image.open(folder / name) as own:
            np.testing.assert_array_equal(np.asarray(made), np.asarray(own.resize((8, 8), Image.Resampling.BOX)))
