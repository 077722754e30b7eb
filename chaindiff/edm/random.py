"""Randomness that is a pure function of its key: the same numbers for any batch size, rank or order.

Every draw has a key such as (seed, sample, candidate, stage, variable, role, number). The key is hashed to the 128-bit
key of a counter-based generator (Philox; Salmon et al. 2011), so no draw depends on what was drawn before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

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


def normal(shape: Iterable[int], *key: Key) -> Tensor:
    """Standard normal noise in float64, on the host."""
    return torch.from_numpy(generator(*key).standard_normal(tuple(shape)))


def normal_batch(shape: Iterable[int], samples: Iterable[int], seed: int, *key: Key) -> Tensor:
    """Noise for several samples, [len(samples), *shape]; each row depends only on its own sample number."""
    shape = tuple(shape)
    return torch.stack([normal(shape, seed, int(sample), *key) for sample in samples])


class Draws:
    """Randomness for a batch of samples, each a pure function of (seed, sample number, key, role).

    `key` names their owner: a stage, and below it (`of`) one of its variables. In training, sample
    numbers count the images seen, so that a step's draws do not depend on ranks or micro-batches; in sampling they
    are the samples' own. Noise is drawn in float64 and converted to `dtype`.
    """

    def __init__(self, samples: Iterable[int], seed: int, *key: Key, dtype: torch.dtype = torch.float32):
        self.samples, self.seed, self.key, self.dtype = list(samples), seed, key, dtype

    def __len__(self) -> int:
        return len(self.samples)

    def of(self, *key: Key) -> Draws:
        """The draws of a part: a stage of a chain, a variable of a stage."""
        return Draws(self.samples, self.seed, *self.key, *key, dtype=self.dtype)

    def normal(self, *role: Key, shape: Iterable[int] = ()) -> Tensor:
        """Standard normal, [batch, *shape]."""
        return normal_batch(shape, self.samples, self.seed, *self.key, *role).to(self.dtype)

    def uniform(self, *role: Key) -> Tensor:
        """Uniform in [0, 1), [batch], float32."""
        values = [generator(self.seed, sample, *self.key, *role).random() for sample in self.samples]
        return torch.tensor(values, dtype=torch.float32)

    def integers(self, *role: Key, below: int) -> Tensor:
        """Uniform whole numbers from 0 to `below` - 1, [batch]."""
        return torch.tensor([int(generator(self.seed, s, *self.key, *role).integers(below)) for s in self.samples])
