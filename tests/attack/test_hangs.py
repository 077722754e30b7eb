"""A pipe or a device where a file is expected is refused: its reader would wait, or read, for ever."""

from __future__ import annotations

import ast
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_bad_files import status
from test_tracebacks import JUDGED, clip_folder, vector

import chaindiff
from chaindiff.io import files
from chaindiff.io.errors import UserError
from chaindiff.training import metrics

PACKAGE = Path(chaindiff.__file__).parent
PATIENCE = 5.0  # seconds


@contextmanager
def pipe(path: Path) -> Iterator[str]:
    """A pipe at a path. Whoever still reads of it after some seconds is let go, and the test fails."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    hung = []

    def release() -> None:
        hung.append(path)
        for _ in range(3):
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            except OSError:
                return

    timer = threading.Timer(PATIENCE, release)
    timer.start()
    try:
        yield str(path)
    finally:
        timer.cancel()
    assert not hung


INSTEAD = {  # in a run's directory -> the command that would read it
    "stages/image/weights.safetensors": ("sample",),
    "stages/image/state.safetensors": ("train",),
    "stages/image/metrics.jsonl": ("train", "--stage", "image", "--more", "4"),
    "recipe.lock.yaml": ("sample",),
}


@pytest.mark.parametrize("name", INSTEAD)
def test_a_pipe_in_a_run(explained, recipe, run, name):
    with pipe(run / name) as path:
        command, *options = INSTEAD[name]
        message = explained(command, recipe, "--out", run, *options)
    assert str(run) in message and Path(path).name in message and "not a regular file" in message


@pytest.mark.parametrize(
    "name", ["metrics.json", "samples/group/000000.safetensors", "samples/image/000001.png", "report.html"]
)
def test_a_pipe_in_a_run_that_is_gone_around(recipe, run, name):
    """What can be made again is; an evaluation that cannot be read is left out of the page."""
    with pipe(run / name):
        (run / "chain.svg").unlink()
        assert status("run", recipe, "--out", run) == 0


def test_a_pipe_that_is_written_to(tmp_path):
    with pipe(tmp_path / "metrics.jsonl") as path, pytest.raises(UserError, match=r"cannot write .*not a regular file"):
        metrics.append(Path(path), b"{}")
    assert metrics.append(tmp_path / "new.jsonl", b"{}") is None and (tmp_path / "new.jsonl").read_bytes() == b"{}"


def test_a_pipe_that_takes_the_place_of_a_file(tmp_path, monkeypatch):
    """Between the look at a file and its opening: what was opened is looked at."""
    (tmp_path / "file").write_bytes(b"x")
    status = os.stat(tmp_path / "file")
    with pipe(tmp_path / "x.json") as path, monkeypatch.context() as patch:
        patch.setattr(files.os, "stat", lambda *_, **__: status)
        for read in (files.regular, files.read_whole, files.regular_path):
            with pytest.raises(OSError, match="not a regular file"):
                read(Path(path))


def test_a_pipe_in_a_run_beside(recipe, run, tmp_path, explained):
    with pipe(tmp_path / "other/stages/image/weights.safetensors"):
        message = explained("sample", recipe, "--out", tmp_path / "new", "--set", "stages.image.train.images=16")
    assert "stage 'image' has no weights yet" in message


@pytest.mark.parametrize("option", ["stages.image.weights", "stages.image.init"])
def test_a_pipe_for_weights(explained, recipe, run, tmp_path, option):
    with pipe(tmp_path / "w.safetensors") as path:
        command = ("train", "--fresh") if "init" in option else ("sample",)
        message = explained(*command, recipe, "--out", run, "--set", f"{option}={path}")
    assert path in message


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".png", ".zip", ".txt"])
def test_a_pipe_that_is_given(explained, recipe, run, tmp_path, suffix):
    with pipe(tmp_path / f"x{suffix}") as path:
        message = explained("sample", recipe, "--out", run, "--want", "small", "--given", f"image={path}")
    assert path in message


@pytest.mark.parametrize("name", ["x.npy", "x.safetensors"])
def test_a_pipe_for_vectors(explained, recipe, run, tmp_path, name):
    with pipe(tmp_path / name) as path:
        assert path in explained("train", recipe, "--out", run, *vector(kind="file", path=path))


@pytest.mark.parametrize("name", ["0.png", "metadata.jsonl", "dataset.json"])
def test_a_pipe_in_the_data(explained, recipe, run, tmp_path, name):
    data = Path(shutil.copytree(recipe.parent / "data", tmp_path / "data"))
    with pipe(data / name):
        message = explained("train", recipe, "--fresh", "--out", run, "--set", f"data.path={data}")
    assert str(data) in message


def test_a_pipe_for_the_data(explained, recipe, run, tmp_path):
    with pipe(tmp_path / "data.zip") as path:
        assert path in explained("train", recipe, "--fresh", "--out", run, "--set", f"data.path={path}")


@pytest.mark.parametrize("name", ["open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json"])
def test_a_pipe_in_a_model(explained, recipe, run, tmp_path, name):
    folder = clip_folder(tmp_path / "clip", lambda _: None)
    with pipe(folder / name):
        encoder = {"kind": "open_clip", "of": "image", "model": str(folder)}
        assert str(folder) in explained("train", recipe, "--out", run, *vector(**encoder))
        judge = f"open_clip:{folder}"
        assert str(folder) in explained("evaluate", recipe, "--out", run, *JUDGED, "--judge", judge)


def test_a_pipe_for_a_snapshot(explained, tmp_path):
    with pipe(tmp_path / "x.pkl") as path:
        assert explained("import", path) == f"error: cannot read {path}: it is not a regular file\n"
    with pipe(tmp_path / "stages/s/snapshots/000000001-0.1.safetensors") as path:
        message = explained("ema", tmp_path / "stages/s", "--std", "0.1", "--out", tmp_path / "w.safetensors")
    assert path in message


def test_pipes_in_lists(tmp_path, run, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, tmp_path / "runs/tiny")
    names = ["recipes/a.yaml", "stages/b.yaml", "runs/tiny/stages/image/weights.safetensors"]
    names += ["runs/tiny/samples/group/000000.safetensors", "runs/other/recipe.lock.yaml"]
    for name in names:
        with pipe(tmp_path / name):
            assert status("list") == 0
            shown = capsys.readouterr().out
            assert "(broken: " in shown or "(not a complete weights file)" in shown, name
            assert status("list", "--json") == 0


@pytest.mark.parametrize("command", ["show", "plan", "run"])
def test_a_pipe_for_a_recipe_or_a_card(explained, tmp_path, command, recipe):
    with pipe(tmp_path / "r.yaml") as path:
        assert f"{path} is not a regular file" in explained(command, path)
        explained(command, recipe, "--set", f"stages.image.use={path}")


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/full", "/dev/tty"])
def test_a_device_for_a_file(explained, recipe, run, tmp_path, device):
    for name in ("x.npy", "x.safetensors", "x.png", "x.zip"):
        (tmp_path / name).symlink_to(device)
        path = str(tmp_path / name)
        assert path in explained("sample", recipe, "--out", run, "--want", "small", "--given", f"image={path}")
    assert "not a regular file" in explained("import", device)
    weights = f"stages.image.weights={tmp_path / 'x.safetensors'}"
    assert "not a regular file" in explained("sample", recipe, "--out", run, "--set", weights)
    (tmp_path / "r.yaml").symlink_to(device)
    assert "is not a regular file" in explained("show", tmp_path / "r.yaml")
    again = Path(shutil.copytree(run, tmp_path / "again"))
    (again / "metrics.json").symlink_to(device)
    assert "metrics.json: is not the output of an evaluation" in explained("compare", run, again)


# ---------------------------------------------------------------- every place that reads a file

READERS = {"read_text", "read_bytes", "safe_open", "load_file", "is_zipfile", "ZipFile"}
OF_LIBRARIES = {("np", "load"), ("torch", "load"), ("jit", "load"), ("Image", "open")}
# What they read is bytes in memory, and a file that is open already.
KNOWN = {"Image.open(io.BytesIO(content))", "zipfile.is_zipfile(opened)"}


def reads(node: ast.Call) -> bool:
    called = node.func
    name = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
    owner = called.value if isinstance(called, ast.Attribute) else None
    of = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
    opens = name == "open" and any(isinstance(a, ast.Constant) and a.value in ("r", "rb") for a in node.args)
    return name in READERS or (of, name) in OF_LIBRARIES or opens


def test_nothing_is_read_but_regular_files():
    """Libraries open `regular_path(PATH)`, all else is `regular` or `read_whole`: a new place cannot be forgotten."""
    loose = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and reads(node):
                text = ast.unparse(node)
                if "regular_path(" not in text and text not in KNOWN and "temporary" not in text:
                    loose.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {text}")
    assert loose == []
