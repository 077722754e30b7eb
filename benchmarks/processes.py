"""Whole processes: what a person waits for after typing a command, and the memory that it takes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import count

from chaindiff.bench.timing import Side
from chaindiff.io.errors import UserError

PYTHON, CHAINDIFF = [sys.executable, "-c"], [sys.executable, "-m", "chaindiff"]
# As EDM samples, in half its steps: before solver, precision and execution were chosen for speed.
PLAIN = [
    *("sample.execution=eager", "sample.precision=float32"),
    *("stages.*.sample.solver=heun", "stages.*.sample.steps=18"),
]
CACHES = ("CHAINDIFF_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def _side(
    command: Callable[[], list[str]], made: float = 1, cold: Callable[[], str] | None = None, **more: object
) -> Side:
    """A side that runs a command and notes its largest memory; `cold` gives every call a folder for its caches."""
    facts = {"peak_bytes": 0.0}

    def run() -> None:
        caches = dict.fromkeys(CACHES, cold()) if cold else {}
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(words := command(), stdout=said, stderr=said, env={**os.environ, **caches})
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode, end = os.waitstatus_to_exitcode(status), said.seek(0)
            if process.returncode:
                raise UserError(f"`{' '.join(words)}` failed: {said.read()[end - 500 :].decode(errors='replace')}")
        facts["peak_bytes"] = max(facts["peak_bytes"], usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))

    return Side(run, made, facts, warm=0 if cold else 1, keeps=more)


def start() -> dict[str, Side]:
    """The first is `import torch`, which whatever plans or samples cannot do without."""
    scratch = tempfile.TemporaryDirectory()
    again = [*CHAINDIFF, "run", "vcdm_emoji16", "--count", "1", "--out", f"{scratch.name}/run", "--quiet"]
    commands = {
        "import torch": [*PYTHON, "import torch"],
        "chaindiff, import": [*PYTHON, "import chaindiff; chaindiff.Chain"],
        "chaindiff --help": [*CHAINDIFF, "--help"],
        "chaindiff plan vcdm_emoji": [*CHAINDIFF, "plan", "vcdm_emoji", "--quiet"],
        "chaindiff run, nothing to do": again,
    }
    return {name: _side(partial(list, words), scratch=scratch) for name, words in commands.items()}


def run() -> dict[str, Side]:
    """Every call has a run's directory of its own; only the first use has empty caches, too."""
    scratch, number = tempfile.TemporaryDirectory(), count()

    def new() -> str:
        return f"{scratch.name}/{next(number)}"

    def words(*more: str) -> list[str]:
        return [*CHAINDIFF, "run", "vcdm_emoji", "--quiet", "--out", new(), *more]

    plain = [word for change in PLAIN for word in ("--set", change)]
    return {
        "chaindiff": _side(words, 64, scratch=scratch),
        "chaindiff, first use": _side(words, 64, cold=new),
        "chaindiff, one image": _side(partial(words, "--count", "1")),
        "chaindiff, eager float32, Heun 18": _side(partial(words, *plain), 64),
    }
