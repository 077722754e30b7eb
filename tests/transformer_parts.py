"""Small transformers, what they take, and how far two outputs are apart."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from chaindiff.networks.interface import Interface
from chaindiff.networks.transformer import Transformer

MIX = {"image": (3, 8, 8), "map": (4, 4, 4), "vector": (5,), "words": (3, 6)}
GRIDS = {"image": (3, 8, 8), "map": (4, 4, 4), "vector": (5,)}
TINY = {"width": 16, "depth": 2, "heads": 2}
PATCH = {"image": 2, "map": 1}


def moved(network: nn.Module, scale: float = 0.1) -> nn.Module:
    """Away from the zeros that it begins with."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator).to(parameter)
    return network.eval()


def transformer(shapes: Mapping[str, tuple[int, ...]] = MIX, scale: float = 0.1, **said) -> nn.Module:
    torch.manual_seed(0)
    known = {name: said.pop(name) for name in ("label_dim", "image_channels", "context", "augment_dim") if name in said}
    grids = [name for name, shape in shapes.items() if len(shape) == 3]
    patch = said.pop("patch", {name: PATCH.get(name, 2) for name in grids})
    return moved(Transformer(Interface(shapes, **known), **{**TINY, "patch": patch, **said}), scale)


def state(shapes: Mapping[str, tuple[int, ...]] = MIX, rows: int = 2) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    x = {name: torch.randn(rows, *shape, generator=generator) for name, shape in shapes.items()}
    return x, {name: torch.randn(rows, generator=generator) / 4 for name in shapes}


def largest(one: Tensor, other: Tensor) -> float:
    return float((one - other).detach().abs().max())
