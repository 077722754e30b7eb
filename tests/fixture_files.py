"""Files of reference numbers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

FIXTURES = Path(__file__).parent / "fixtures"


def fixture(name: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a file of reference numbers."""
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
