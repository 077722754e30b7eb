"""No room, no permission: on the disk, in memory, in a folder."""

# ruff: noqa: F811 (fixtures)

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import IO

import pytest
import torch
from safetensors.torch import load_file
from test_bad_files import finished, recipe, refused, status  # noqa: F401  (fixtures)

from chaindiff.io import files, tensorfile
from chaindiff.io.errors import UserError
from chaindiff.training import metrics


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
            if files.cache_folder() in path.parents:  # on another disk
                return temporary(path)
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
