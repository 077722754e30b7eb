"""A finished run to damage, and commands in this process that must end with one message."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from test_bad_files import finished, recipe, status  # noqa: F401  (fixtures)
from tiny import Command


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:  # noqa: F811
    """A copy of the finished run, without the checkpoints before the last ones: damage has no way around it."""
    return Path(shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("state.previous.*")))


@pytest.fixture
def explained(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`chaindiff ARGUMENTS...`, which must end with one message and status 2, and raise nothing: the message."""

    def call(*arguments: str | Path) -> str:
        ended = status(*arguments)
        error = capsys.readouterr().err
        assert ended == 2 and error.startswith("error: ") and "Traceback" not in error
        return error

    return call


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """`chaindiff ARGUMENTS...`: its status, stdout and stderr."""
    return lambda *words: (status(*words), *capsys.readouterr())
