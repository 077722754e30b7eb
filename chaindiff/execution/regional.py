"""Compilation of a network by its repeated blocks: each kind of block once, whatever their number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

KINDS = 64  # of blocks in a network; torch gives up on a class after 8
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def compile_network(network: nn.Module) -> None:
    """Compile a network in place, for batches of one shape: its repeated blocks, or the whole if nothing repeats."""
    config = torch._dynamo.config
    config.cache_size_limit = max(config.cache_size_limit, KINDS)
    for module in list(repeated(network)) or [network]:
        module.compile(dynamic=False)


def release(network: nn.Module) -> None:
    """Execute a network eagerly again."""
    for module in network.modules():
        module._compiled_call_impl = None


def repeated(network: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules with parts of their own whose class occurs more than once."""
    counts = Counter(type(module) for module in network.modules() if any(module.children()))

    def within(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if counts[type(child)] > 1 and not isinstance(child, CONTAINERS):
                yield child
            else:
                yield from within(child)

    return within(network)
