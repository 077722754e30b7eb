"""What one network evaluation costs, counted on the meta device, where nothing is allocated."""

from __future__ import annotations

import weakref
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import BaseModel, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from chaindiff import networks
from chaindiff.chain.variable import digest
from chaindiff.io.errors import UserError
from chaindiff.io.files import cache_folder, read_whole, write_whole
from chaindiff.networks.interface import Condition, Interface


@dataclass(frozen=True)
class Counts:
    """Of one evaluation for one sample: parameters and their bytes, multiply-adds x 2, bytes of activations."""

    parameters: int
    weight_bytes: int
    flops: int
    activation_bytes: int


class Counted(nn.Module):
    """Stands in for a network that a plan only counts: it is built unless the same one was counted before.

    Counts are cached on disk: torch's first operation on the meta device takes longer than a whole plan.
    """

    def __init__(self, spec: BaseModel, interface: Interface):
        super().__init__()
        said = [spec.model_dump(mode="json"), asdict(interface), torch.__version__, _code()]
        path, kept = cache_folder() / "counts" / f"{digest(said)}.json", TypeAdapter(Counts)
        try:
            self.counts = kept.validate_json(read_whole(path))
        except (OSError, ValidationError):
            self.counts = count(networks.build(cast(Any, spec), interface), interface)
            with suppress(UserError):  # it is counted again the next time
                write_whole(path, kept.dump_json(self.counts))


@cache
def _code() -> str:
    """A digest of the code of networks and of their operations."""
    package = Path(networks.__file__).parents[1]
    paths = [path for folder in ("kernels", "networks") for path in sorted((package / folder).glob("*.py"))]
    return digest([read_whole(path).decode() for path in paths])


class _Peak(TorchDispatchMode):
    """The largest sum of bytes of tensors alive at once, as the allocator of an eager run would see it."""

    def __init__(self, *owned: Tensor):
        super().__init__()
        self.live = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in owned}  # weights and inputs do not count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.seen:
                    self.seen.add(key)
                    self.live += size
                    weakref.finalize(storage, self._free, key, size)
        self.peak = max(self.peak, self.live)
        return out

    def _free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


def count(network: nn.Module, interface: Interface) -> Counts:
    """What one evaluation costs; the network's parameters may lie on any device."""
    if isinstance(network, Counted):
        return network.counts
    from torch.utils.flop_counter import FlopCounterMode

    tensors = {k: v.to("meta") for k, v in [*network.named_parameters(), *network.named_buffers()]}

    def empty(*shape: int) -> Tensor | None:
        return torch.empty(1, *shape, device="meta") if all(shape) else None

    x = {name: torch.empty(1, *shape, device="meta") for name, shape in interface.variables.items()}
    noise = {name: torch.empty(1, device="meta") for name in x}
    grid = interface.grid
    images = empty(interface.image_channels, *interface.variables[grid][1:]) if grid else None
    context = empty(*interface.context) if interface.context else None
    condition = Condition(empty(interface.label_dim), images, context, empty(interface.augment_dim))
    counter, peak = FlopCounterMode(display=False), _Peak(*tensors.values())
    with torch.no_grad(), counter, peak:
        torch.func.functional_call(network, tensors, (x, noise, condition))
    return Counts(*weighed(network), counter.get_total_flops(), peak.peak)


def weighed(module: nn.Module) -> tuple[int, int]:
    """The number of a module's parameters, and their bytes."""
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)
