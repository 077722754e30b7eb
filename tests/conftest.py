"""Shapes in signatures are checked while the tests run; and helpers that several tests share."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores out
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

# Functions of these packages whose annotations carry shapes are checked at every call (edm, networks, data, ...).
HOOK = install_import_hook(
    [
        f"chaindiff.{part}"
        for part in (
            "edm",
            "guidance",
            "networks",
            "data",
            "show.images",
            "encoders",
            "chain.bound",
            "chain.conditioning",
            "chain.diffusion",
            "chain.stage",
            "training",
            "evaluation",
        )
    ],
    "checker.check",
)

import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or fills the caches of the person who runs it."""
    monkeypatch.setenv("CHAINDIFF_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
