"""Files that a person names or that a run writes: wrong weights, wrong numbers, no room, no permission."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from chaindiff import cli
from chaindiff.io import files, tensorfile
from chaindiff.io.errors import UserError
from chaindiff.training import metrics

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


# ---------------------------------------------------------------- no room, no permission


@pytest.mark.parametrize("command", ["run", "train"])
def test_a_place_where_nothing_can_be_written(refused, tmp_path, command):
    (tmp_path / "file").write_text("a file")
    message = refused(command, out=tmp_path / "file" / "sub")
    assert f"{tmp_path}/file" in message and "Not a directory" in message
    assert (tmp_path / "file").read_text() == "a file" and os.listdir(tmp_path) == ["file"]


class Full:
    """A file on a full disk: a part is written, then it fails."""

    def __init__(self, file: IO[bytes]):
        self.file, self.name = file, file.name

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *failure: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> None:
        self.file.write(b"part")
        raise OSError(28, "No space left on device")


class Disk:
    """Counts the files that are written; from number `room` on the disk is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int):
        self.written, temporary = 0, files._temporary

        def opened(path: Path) -> IO[bytes] | Full:
            self.written += 1
            return Full(temporary(path)) if self.written > room else temporary(path)

        monkeypatch.setattr(files, "_temporary", opened)


def results(out: Path) -> dict[str, bytes]:
    """What a run is for: weights and samples; of a file of tensors, the tensors alone."""
    files = sorted(
        path
        for part in ("stages", "samples")
        for path in (out / part).rglob("*")
        if path.suffix in (".png", ".safetensors")
    )
    found = {}
    for path in files:
        tensors = path.suffix == ".safetensors" and path.name != "state.safetensors"
        found[str(path.relative_to(out))] = (
            b"".join(v.numpy().tobytes() for _, v in sorted(load_file(path).items())) if tensors else path.read_bytes()
        )
    return {name: content for name, content in found.items() if "stages/small" not in name and "state" not in name}


# The writes of this run, in order.
WRITES = [
    "lock",
    "state",
    "state",
    "weights",
    "lock",
    "sample 0",
    "sample 1",
    "group",
    "sample 2",
    "group",
    "grid",
    "chain",
    "report",
]


@pytest.mark.parametrize("room", [0, 1, 3, 4, 7, 10], ids=lambda room: f"{room} {WRITES[room]}")
def test_a_full_disk_is_told_and_the_same_command_continues(recipe, finished, tmp_path, capsys, room):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, room)
        assert status("run", recipe, "--out", out) == 2
        assert disk.written == room + 1, "it stops at once"
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot write {out}/") and "No space left on device" in error
    assert "free some space or choose another folder with --out; the last complete file is untouched" in error
    assert "Traceback" not in error and ".tmp" not in error
    assert [path.name for path in out.rglob("*.tmp")] == []
    for path in out.rglob("*.safetensors"):
        assert tensorfile.load(path)[0]
    if room >= 2:  # the locked recipe comes first
        kept = tensorfile.metadata(out / "stages/image/state.safetensors")
        assert kept["images"] == ("4" if room == 2 else "8")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("weights.safetensors")}
    assert status("run", recipe, "--out", out) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was finished is not done again"
    assert results(out) == results(finished)


def test_a_full_disk_at_the_metrics(recipe, tmp_path, capsys, monkeypatch):
    opened = metrics.regular

    def full(path: Path, *arguments):
        if path.name == "metrics.jsonl":
            raise OSError(28, "No space left on device")  # as writing says it, without the file's name
        return opened(path, *arguments)

    monkeypatch.setattr(metrics, "regular", full)
    assert status("train", recipe, "--stage", "small", "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot write {tmp_path}/run/stages/small/metrics.jsonl: No space left on device\n")


def scalars(folder: Path) -> list[int]:
    """The images at which TensorBoard shows a loss."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder)).Reload()
    assert set(board.Tags()["scalars"]) == {"loss", "lr", "images_per_second"}
    return [point.step for point in board.Scalars("loss")]


def test_a_full_disk_at_tensorboard(recipe, tmp_path, capfd, monkeypatch):
    """One message, from no thread; the same command goes on after the checkpoint, and TensorBoard shows all once."""
    opened, out, written = metrics.regular, tmp_path / "run", []

    def full(path: Path, *arguments):
        written.append(path) if "tfevents" in path.name else None
        # Two records say what the file is, the third is of 4 images, which the checkpoint knows.
        return open("/dev/full", "ab") if len(written) == 4 else opened(path, *arguments)

    command = ("train", recipe, "--stage", "small", "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "regular", full)
        assert status(*command) == 2
    error = capfd.readouterr().err
    board = out / "stages/small/tensorboard"
    assert error.startswith(f"error: cannot write {board}/events.out.tfevents.")
    assert error.count("No space left on device") == 1 and "Traceback" not in error and "Exception" not in error
    assert tensorfile.metadata(out / "stages/small/state.safetensors")["images"] == "4"
    assert scalars(board) == [4]
    assert status(*command) == 0
    assert scalars(board) == [4, 8]


def no_memory(*arguments, **options):
    return torch.empty(1 << 60, dtype=torch.uint8)


def test_a_full_memory_in_training_says_where_and_what_helps(refused, monkeypatch):
    monkeypatch.setattr("chaindiff.chain.diffusion.Diffusion.denoise", no_memory)
    assert refused("train", "--stage", "small") == (
        "error: the memory is full (another 1152921504606846976 bytes were requested)\n"
        "  while training stage 'small'\n"
        "  raise stages.small.train.accumulate, now 1: the same training in smaller parts\n"
        "  or lower stages.small.train.batch, now 4\n"
    )


@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        ("sample", ["--batch", "3", "--seed", "1"], "3 at a time\n  lower sample.batch (--batch), now 3\n"),
        (
            "run",
            ["--set", "sample.exact=true"],
            "16 at a time\n  sample.exact always takes 16 at a time; without it, lower sample.batch (--batch)\n",
        ),
        (
            "evaluate",
            ["--set", "evaluate.judges=['pixels:2']"],
            "125 at a time\n  evaluate samples 125 at a time; --set sample.precision=bf16 needs less\n",
        ),
    ],
)
def test_a_full_memory_in_sampling_says_where_and_what_helps(
    refused, finished, tmp_path, monkeypatch, command, options, expected
):
    out = Path(shutil.copytree(finished, tmp_path / "copy"))
    monkeypatch.setattr("chaindiff.chain.diffusion.Diffusion.preconditioned", no_memory)
    asked = "(another 1152921504606846976 bytes were requested)"
    message = f"error: the memory is full {asked}\n  while sampling stage 'image', {expected}"
    assert refused(command, *options, "--replace", out=out) == message


def test_samples_that_cannot_be_deleted_are_not_taken_for_new_ones(refused, finished, tmp_path, monkeypatch):
    out = Path(shutil.copytree(finished, tmp_path / "copy"))

    def fail(path, *arguments, **options):
        raise PermissionError(13, "Permission denied", str(path))

    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda path, **o: (fail if path.suffix == ".png" else unlink)(path, **o))
    message = refused("sample", "--seed", "9", "--replace", out=out)
    assert f"{out}/samples: cannot be deleted: Permission denied\n  delete it by hand, or choose another" in message
    monkeypatch.undo()
    assert "\n  seed: 0\n" in (out / "recipe.lock.yaml").read_text(), (
        "the lock still tells of the samples that are there"
    )


def test_a_damaged_sample_is_made_again(recipe, finished, tmp_path):
    out = Path(shutil.copytree(finished, tmp_path / "copy"))
    (out / "samples/image/000001.png").write_bytes(b"\x89PNG")
    (out / "samples/image/grid.png").unlink()
    assert status("sample", recipe, "--out", out) == 0
    assert results(out) == results(finished)


def test_a_failed_write_is_an_error_for_people(tmp_path):
    from chaindiff.io.files import write_whole

    (tmp_path / "file").write_text("old")
    with pytest.raises(UserError, match=r"cannot write .*/file/sub: a file is where its folder should be"):
        write_whole(tmp_path / "file" / "sub", "new")
    with pytest.raises(UserError, match=r"cannot write .*: Is a directory"):
        write_whole(tmp_path, "new")
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"
