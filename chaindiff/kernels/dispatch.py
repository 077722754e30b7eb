"""Where Triton runs: on CUDA, for the types that its kernels take. Everything else takes the plain torch path."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

TRITON = find_spec("triton") is not None
# Triton's own switch: its kernels then run on the CPU, slowly, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # sums are in float32: float64 would lose what it is chosen for
enabled = True  # benchmarks set it to False, for their baselines


def fused(*tensors: Tensor) -> bool:
    """Whether Triton takes these tensors. On other devices this costs one look at the first."""
    first = tensors[0]
    if not (first.is_cuda or INTERPRETED) or not (TRITON and enabled):
        return False
    if first.is_cuda and not _able(first.device):
        return False
    return all(t.device == first.device and t.dtype in DTYPES for t in tensors) and not first.is_meta


@cache
def _able(device: torch.device) -> bool:
    """Whether a GPU is there and not older than Triton's oldest."""
    return torch.cuda.is_available() and torch.cuda.get_device_properties(device).major >= 7


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first argument."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants)


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below a number: the sizes that Triton's blocks have."""
    return 1 << (number - 1).bit_length()
