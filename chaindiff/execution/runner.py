"""What stands in for a network while sampling: the same signature, evaluated in batches of one static shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from chaindiff.edm.denoiser import State
from chaindiff.networks.interface import Condition, Interface

Call = Callable[[list[Tensor]], Sequence[Tensor]]  # what a package or a graph is
PARTS = ("labels", "images", "context", "augment")


def flat(x: State, noise: Mapping[str, Tensor], condition: Condition) -> list[Tensor]:
    """A network's inputs as a list of contiguous tensors; parts that a condition lacks are left out."""
    parts = [part for name in PARTS if (part := getattr(condition, name)) is not None]
    return [tensor.contiguous() for tensor in (*x.values(), *noise.values(), *parts)]


def example(interface: Interface, rows: int, device: torch.device) -> tuple[State, dict[str, Tensor], Condition]:
    """Inputs of a network as sampling gives them; without augmentation."""

    def drawn(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, device=device)

    x = {name: drawn(*shape) for name, shape in interface.variables.items()}
    size = next((shape[1:] for shape in interface.variables.values() if len(shape) == 3), ())
    given = ((interface.label_dim,), (interface.image_channels, *size), interface.context or (0,))
    return x, {name: drawn() for name in x}, Condition(*(drawn(*shape) if shape[0] else None for shape in given))


class Flat(nn.Module):
    """A network as a function of a list of tensors, in the precision in which it is compiled."""

    def __init__(self, network: nn.Module, interface: Interface, dtype: torch.dtype | None):
        super().__init__()
        self.network, self.dtype, self.names = network, dtype, [*interface.variables]
        told = (interface.label_dim, interface.image_channels, interface.context)
        self.parts = [name for name, width in zip(PARTS, told, strict=False) if width]

    def forward(self, tensors: list[Tensor]) -> list[Tensor]:
        count = len(self.names)
        x = dict(zip(self.names, tensors, strict=False))
        noise = dict(zip(self.names, tensors[count:], strict=False))
        condition = Condition(**dict(zip(self.parts, tensors[2 * count :], strict=True)))
        with torch.autocast(tensors[0].device.type, self.dtype, enabled=self.dtype is not None):
            found = self.network(x, noise, condition)
        return [found[name] for name in self.names]


class Tiled:
    """A network of which `rows` samples at a time are evaluated by `call`: short batches are padded, long ones split.

    Whatever is compiled is compiled for this shape alone.
    """

    def __init__(self, network: nn.Module, call: Call, interface: Interface, rows: int):
        self.network, self.call, self.rows = network, call, rows
        self.shapes = [t.shape[1:] for t in flat(*example(interface, 0, torch.device("cpu")))]

    def __call__(self, x: State, noise: Mapping[str, Tensor], condition: Condition) -> State:
        tensors = flat(x, noise, condition)
        if [tensor.shape[1:] for tensor in tensors] != self.shapes:  # machine code does not check: such as augmentation
            return self.network(x, noise, condition)
        made = [self._tile([t[i : i + self.rows] for t in tensors]) for i in range(0, len(tensors[0]), self.rows)]
        return {name: torch.cat(parts) for name, parts in zip(x, zip(*made, strict=True), strict=True)}

    def _tile(self, tensors: list[Tensor]) -> list[Tensor]:
        count = len(tensors[0])
        if missing := self.rows - count:
            tensors = [F.pad(t, (0, 0) * (t.ndim - 1) + (0, missing)) for t in tensors]
        return [found[:count] for found in self.call(tensors)]
