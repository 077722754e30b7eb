"""The machine that networks are executed on: what compiled code depends on, and how it computes in float32."""

from __future__ import annotations

import os
import platform
import re
import shutil
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from chaindiff import networks
from chaindiff.io.digest import digest, file_digest
from chaindiff.io.files import regular

SETTINGS = {  # what torch is told on CUDA, in the metadata of what was trained
    "tf32": False,  # float32 is float32: samples agree with the CPU's; bf16 is the fast precision, and is asked for
    "cudnn_benchmark": True,  # batches have one shape, so that the fastest convolution is looked for once
}


def settle(exact: bool = False) -> None:
    """Tell torch the settings; `exact` results do not depend on which convolution is fastest."""
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = SETTINGS["tf32"]
        torch.backends.cudnn.benchmark = SETTINGS["cudnn_benchmark"] and not exact
        torch.backends.cudnn.deterministic = exact


def machine(device: torch.device) -> str:
    """A fingerprint of all that machine code depends on: processor or GPU, threads, torch, and the code compiled."""
    gpu = [torch.cuda.get_device_name(device), torch.version.cuda] if device.type == "cuda" else []
    return digest([device.type, *gpu, _processor(), torch.get_num_threads(), torch.__version__, _code()])


@cache
def _processor() -> list[str]:
    """The processor's model and instructions, where the system tells them."""
    told = ""
    with suppress(OSError), regular(Path("/proc/cpuinfo")) as file:
        told = file.read().decode(errors="replace")
    lines = (re.search(rf"^{key}\s*:.*", told, re.MULTILINE) for key in ("model name", "flags", "Features"))
    return [platform.platform(), torch.backends.cpu.get_cpu_capability(), *(line[0] for line in lines if line)]


@cache
def _code() -> str:
    """A digest of the code of networks and of what compiles them."""
    root = Path(networks.__file__).parents[1]
    files = (path for part in ("kernels", "networks", "execution") for path in sorted((root / part).glob("*.py")))
    return digest([file_digest(path) for path in files])


def bf16(device: torch.device) -> bool:
    """Whether the processor or GPU computes in bf16, rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", line) for line in _processor())


def compiler() -> str | None:
    """The C++ compiler that compiled networks need, None without one."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))), None)
