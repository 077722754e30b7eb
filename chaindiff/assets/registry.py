"""Shipped weights, found by identity rather than by name; `tools/ship.py` puts them here."""

from __future__ import annotations

from pathlib import Path

SHIPPED = Path(__file__).parent / "weights"


def file_name(name: str, identity: str) -> str:
    """The name under which a stage's or encoder's file is shipped."""
    return f"{name}-{identity}.safetensors"


def shipped(identity: str) -> Path | None:
    """The shipped file of this identity, whatever its stage is called."""
    return next(iter(sorted(SHIPPED.glob(f"*-{identity}.safetensors"))), None)
