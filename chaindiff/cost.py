"""What a stage costs, counted on the meta device: nothing is allocated, whatever the size of the network."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from chaindiff.stage import Stage


@dataclass(frozen=True)
class Cost:
    """Parameters, multiply-adds x 2 of one evaluation of one sample, and bytes: weights, and activations a sample."""

    parameters: int
    flops: int
    nfe: int
    weight_bytes: int
    activation_bytes: int

    @property
    def total_flops(self) -> int:
        """For one whole sample."""
        return self.flops * self.nfe


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


def measure(stage: Stage, moving: Iterable[str] | None = None) -> Cost:
    """The cost of one sample of a stage whose parameters may be on any device, the meta device included.

    `moving` are the variables that are sampled, all that the stage generates unless told otherwise.
    """
    network = stage.network
    tensors = {k: v.to("meta") for k, v in [*network.named_parameters(), *network.named_buffers()]}
    conditioner, values = stage.conditioner, []
    for variable in stage.generates.values():
        extra = conditioner.image_channels if variable.kind == "image" else 0
        values.append(torch.empty(1, variable.shape[0] + extra, *variable.shape[1:], device="meta"))
    labels_of_noise = [torch.empty(1, device="meta")] * len(values)
    labels = torch.empty(1, conditioner.label_dim, device="meta") if conditioner.label_dim else None
    augment = torch.empty(1, stage.augment_dim, device="meta") if stage.augment_dim else None
    context = torch.empty(1, *conditioner.context, device="meta") if conditioner.context else None
    noisy = (values, labels_of_noise) if len(values) > 1 else (values[0], labels_of_noise[0])
    inputs = (*noisy, labels, augment, context)
    counter, peak = FlopCounterMode(display=False), _Peak(*tensors.values())
    with torch.no_grad(), counter, peak:
        torch.func.functional_call(network, tensors, inputs)
    parameters = sum(p.numel() for p in stage.parameters())
    size = sum(p.numel() * p.element_size() for p in stage.parameters())
    return Cost(parameters, counter.get_total_flops(), stage.nfe(moving), size, peak.peak)
