"""The kernels' tests run in a process of their own: Triton decides when it is imported whether it interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", ["group_norm", "sums", pytest.param("network", marks=pytest.mark.slow)])
def test_kernels_in_the_interpreter(name: str) -> None:
    pytest.importorskip("triton", reason="Triton has no build for this system")
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / f"interpreted_{name}.py"],
        cwd=HERE.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert tested.returncode == 0, tested.stdout[-5000:] + tested.stderr[-2000:]
    assert " passed" in tested.stdout and " skipped" not in tested.stdout
