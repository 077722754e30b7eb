"""What a stage costs, counted on the meta device: nothing is allocated, whatever the size of the network."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from chaindiff.chain.stage import Cost
from chaindiff.networks.interface import Condition, Interface


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


def measure(
    stage: nn.Module, network: nn.Module, interface: Interface, nfe: int, how: str, notes: Mapping[str, str]
) -> Cost:
    """The cost of one sample of a stage by `nfe` evaluations of its network, of which one is counted."""
    tensors = {k: v.to("meta") for k, v in [*network.named_parameters(), *network.named_buffers()]}

    def empty(*shape: int) -> Tensor | None:
        return torch.empty(1, *shape, device="meta") if all(shape) else None

    x = {name: torch.empty(1, *shape, device="meta") for name, shape in interface.variables.items()}
    noise = {name: torch.empty(1, device="meta") for name in x}
    size = next((shape[1:] for shape in interface.variables.values() if len(shape) == 3), ())
    images = empty(interface.image_channels, *size) if size else None
    context = empty(*interface.context) if interface.context else None
    condition = Condition(empty(interface.label_dim), images, context, empty(interface.augment_dim))
    counter, peak = FlopCounterMode(display=False), _Peak(*tensors.values())
    with torch.no_grad(), counter, peak:
        torch.func.functional_call(network, tensors, (x, noise, condition))
    parameters = list(stage.parameters())
    return Cost(
        parameters=sum(p.numel() for p in parameters),
        flops=counter.get_total_flops(),
        nfe=nfe,
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        activation_bytes=peak.peak,
        how=how,
        notes=notes,
    )
