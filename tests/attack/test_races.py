"""One writer for a run's directory: a second command says who has it, and readers do not mind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import HEAD, Command, prepared

import chaindiff as cd
from chaindiff.io import processes
from chaindiff.io.errors import UserError
from chaindiff.io.processes import sole_writer

RECIPE = (
    HEAD
    + """\
stages:
  image:
    network: {kind: unet, channels: 16, mult: [1], blocks: 1, attention: [], dropout: 0.0}
    train: {images: 16, batch: 8, execution: eager}
    sample: {steps: 2}
sample: {want: [image], count: 2, batch: 2, execution: eager}
evaluate: {count: 30, judges: ["pixels:2"], held_out: null}
"""
)
HOLD = """
import sys
from pathlib import Path
from chaindiff.io.processes import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(prepared(tmp_path, RECIPE, 8))
    monkeypatch.setattr(processes, "MOMENT", 0.1)
    return tmp_path / "runs/tiny"


def test_a_second_writer_is_told_who_has_the_directory(here: Path, command: Command) -> None:
    assert command("run", "tiny.yaml")[0] == 0
    owner = f"error: runs/tiny is in use by process {os.getpid()} on {socket.gethostname()}\n  wait until"
    with sole_writer(here):
        before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
        for words in (["run"], ["train", "--more", "8"], ["sample", "--seed", "1", "--replace"], ["evaluate"]):
            status, _, error = command(words[0], "tiny.yaml", *words[1:])
            assert status == 2 and error.startswith(owner), (words, error)
        with pytest.raises(UserError, match="is in use by process"):
            cd.train(cd.load("tiny.yaml"), images=24)
        with pytest.raises(UserError, match="is in use by process"):
            cd.train(cd.load("tiny.yaml"), {"image": np.zeros((4, 3, 8, 8))}, folder=here, images=8)
        with pytest.raises(UserError, match="is in use by process"):
            cd.load("runs/tiny").save(here)
        for words in (["plan", "tiny.yaml"], ["show", "runs/tiny"], ["list", "runs"]):
            assert command(*words)[0] == 0
        assert cd.load("runs/tiny").sample(1)["image"].shape == (1, 3, 8, 8)
        assert command("sample", "runs/tiny", "--out", "runs/other")[0] == 0
        assert command("compare", "tiny", "other")[0] == 0
        assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before
    assert "nothing to do" in command("run", "tiny.yaml")[1]
    assert not (here / ".lock").exists()


@pytest.mark.slow
def test_two_ranks_of_torchrun_hold_the_directory(here: Path, command: Command, tmp_path: Path) -> None:
    (tmp_path / "hold.py").write_text(HOLD.replace("sys.stdin.read()", "time.sleep(60)").replace("sys", "sys, time", 1))
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29517", "hold.py", str(here)]
    holder = subprocess.Popen([sys.executable, *launch], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and [holder.stdout.readline() for _ in range(2)] == ["held\n"] * 2
        for words in (["run"], ["train"], ["sample"]):
            status, _, error = command(words[0], "tiny.yaml")
            assert status == 2 and error.startswith("error: runs/tiny is in use by process "), (words, error)
    finally:
        holder.terminate()
        holder.communicate()
    assert command("run", "tiny.yaml")[0] == 0


def test_a_killed_writer_is_in_nobodys_way(here: Path, command: Command) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(here)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    status, _, error = command("sample", "tiny.yaml")
    assert (status, f"in use by process {holder.pid} on " in error) == (2, True)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert command("run", "tiny.yaml")[0] == 0
    assert not (here / ".lock").exists()


def test_a_refused_request_leaves_no_directory(here: Path, command: Command) -> None:
    assert command("sample", "tiny.yaml", "--out", "some/place/else")[0] == 2  # there are no weights
    assert not Path("some").exists() and not here.exists()


def test_a_directory_that_cannot_be_written_is_read_without_a_lock(here: Path, command: Command, monkeypatch) -> None:
    import filelock

    assert command("run", "tiny.yaml")[0] == 0

    def refused(self: object, **options: object) -> None:
        raise OSError(30, "Read-only file system", str(here / ".lock"))

    monkeypatch.setattr(filelock.FileLock, "acquire", refused)
    assert "nothing to do" in command("run", "tiny.yaml")[1]


def test_two_evaluations_at_once_measure_what_one_does(here: Path, command: Command) -> None:
    assert command("train", "tiny.yaml")[0] == 0
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "chaindiff", "evaluate", "tiny.yaml"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    assert set(codes) <= {0, 2} and 0 in codes, said
    assert all("in use" in text for text, code in zip(said, codes, strict=True) if code), said
    figures = (here / "metrics.json").read_bytes()
    assert command("evaluate", "tiny.yaml")[0] == 0 and (here / "metrics.json").read_bytes() == figures
