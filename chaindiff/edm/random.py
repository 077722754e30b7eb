"""Randomness that is a pure function of its key: the same numbers for any batch size, rank or order.

Every draw has a key such as (seed, candidate, stage, variable, role, number). It is hashed to the key of a
counter-based generator (Philox; Salmon et al. 2011) that counts samples and elements, so no draw depends on what was
drawn before it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from copy import copy

import numpy as np
import torch
from torch import Tensor

from chaindiff.kernels import noise

Key = int | str


def digest(*key: Key) -> bytes:
    """128 bits that depend on every part of the key and on the boundaries between parts."""
    return hashlib.blake2b(repr(key).encode(), digest_size=16).digest()


def generator(*key: Key) -> np.random.Generator:
    """A generator that depends on the key alone."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest(*key), "little")))


def seed(*key: Key) -> int:
    """A 63-bit seed that depends on the key alone, for generators that take at most that."""
    return int.from_bytes(digest(*key)[:8], "little") >> 1


class Draws:
    """Randomness for a batch of samples, each a pure function of (seed, key, role, sample number).

    `key` names their owner: a stage, and below it (`of`) one of its variables. In training, sample
    numbers count the images seen, so that a step's draws do not depend on ranks or micro-batches; in sampling they
    are the samples' own. Numbers are made on a device (`on`), where they are the same to rounding errors: normals in
    float32, converted to `dtype`.
    """

    def __init__(self, samples: Iterable[int], seed: Key, *key: Key, dtype: torch.dtype = torch.float32):
        self.samples, self.key, self.dtype = list(samples), (seed, *key), dtype
        self.numbers = torch.tensor(self.samples, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.samples)

    def of(self, *key: Key) -> Draws:
        """The draws of a part: a stage of a chain, a variable of a stage."""
        part = copy(self)
        part.key = (*self.key, *key)
        return part

    def on(self, device: torch.device) -> Draws:
        """The same draws, made on a device: nothing there waits for the host."""
        if device == self.numbers.device:
            return self
        moved, first, count = copy(self), self.samples[0] if self.samples else 0, len(self)
        if self.samples == list(range(first, first + count)):
            moved.numbers = torch.arange(first, first + count, device=device)
        else:
            numbers = torch.tensor(self.samples, dtype=torch.int64, pin_memory=device.type == "cuda")
            moved.numbers = numbers.to(device, non_blocking=True)
        return moved

    def normal(self, *role: Key, shape: Iterable[int] = ()) -> Tensor:
        """Standard normal, [batch, *shape]."""
        shape = tuple(shape)
        found = noise.normal(seed(*self.key, *role), self.numbers, math.prod(shape))
        return found.view(len(self), *shape).to(self.dtype)

    def uniform(self, *role: Key) -> Tensor:
        """Uniform in [0, 1), [batch], float32."""
        return noise.uniform(noise.words(seed(*self.key, *role), self.numbers, 1)[:, 0])

    def integers(self, *role: Key, below: int) -> Tensor:
        """Uniform whole numbers from 0 to `below` - 1, [batch]."""
        return noise.integers(noise.words(seed(*self.key, *role), self.numbers, 2), below)
