"""Compilation of a network by its repeated blocks: each kind of block once, whatever their number."""

from __future__ import annotations

import shutil

import torch
from torch import nn

KINDS = 64  # of blocks: torch stops compiling a module's code after 8 shapes


def able() -> bool:
    """Whether there is what torch compiles with: a GPU or a C++ compiler."""
    return torch.cuda.is_available() or any(shutil.which(name) for name in ("g++", "clang++"))


def compile_network(network: nn.Module) -> None:
    """Compile a network in place, for batches of one shape: by blocks where they repeat, else as a whole."""
    blocks = repeated(network)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KINDS)
    for module in blocks or [network]:
        module.compile(dynamic=False)


def repeated(network: nn.Module) -> list[nn.Module]:
    """The outermost modules whose shapes of parameters occur in others as well, if they are most of the network."""
