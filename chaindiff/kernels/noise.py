"""Counter-based noise: Philox4x32-10 (Salmon et al. 2011) and Box-Muller, the same function on every device.

A draw has a key of 64 bits. Four words of 32 bits come of every counter

    (block of four elements, sample mod 2^32, sample / 2^32, 0)

so that an element depends on its key, its sample's number and its place alone. Two words make two normals: with
u = (word0 + 1/2) / 2^32, rounded to float32, and angle = 2 pi word1 / 2^32,

    sqrt(-2 ln u) cos(angle),  sqrt(-2 ln u) sin(angle)

The smallest u is 2^-33, so that normals reach 6.76 standard deviations; one in 10^11 would lie beyond.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt64
from torch import Tensor

MULTIPLIERS, WEYL, ROUNDS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 10
LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
COUNTERS = 16384  # at once: what they become stays in a core's cache
TURN = np.float32(2 * math.pi * 2.0**-32)  # the angle of one unit of a word

Words = UInt64[np.ndarray, "..."]  # of 32 bits each, in the lower half


def words(key: int, samples: Int64[Tensor, " batch"], count: int) -> Int64[Tensor, "batch count"]:
    """The first `count` words of 32 bits of every sample, on the device of `samples`."""
    if (kernel := _kernel(samples)) is not None:
        return kernel(key, samples, count, torch.int64)
    out = torch.empty(len(samples), _padded(count), dtype=torch.int64)

    def keep(pairs: Words, rows: slice, places: slice) -> None:
        into = out.numpy()[rows, places]
        into[:, 0::2], into[:, 1::2] = pairs >> HALF, pairs & LOW

    _each_chunk(key, samples, count, keep)
    return out[:, :count].to(samples.device)


def normal(key: int, samples: Int64[Tensor, " batch"], count: int) -> Float32[Tensor, "batch count"]:
    """The first `count` standard normal numbers of every sample, on the device of `samples`."""
    if (kernel := _kernel(samples)) is not None:
        return kernel(key, samples, count, torch.float32)
    out = torch.empty(len(samples), _padded(count))

    def keep(pairs: Words, rows: slice, places: slice) -> None:
        # The words of a pair as two halves, whichever comes first in this machine's memory.
        word0, word1 = (1, 0) if np.little_endian else (0, 1)
        values = pairs.view(np.uint32).astype(np.float32)
        angle, radius = values[:, word1::2] * TURN, values[:, word0::2] * np.float32(2.0**-32)
        radius += np.float32(2.0**-33)
        np.log(radius, out=radius)
        radius *= np.float32(-2)
        np.sqrt(radius, out=radius)
        into = out.numpy()[rows, places]
        np.multiply(np.cos(angle), radius, out=into[:, 0::2])
        np.multiply(np.sin(angle), radius, out=into[:, 1::2])

    _each_chunk(key, samples, count, keep)
    return out[:, :count].to(samples.device)


def uniform(words: Int64[Tensor, " batch"]) -> Float32[Tensor, " batch"]:
    """A word as a number in [0, 1), a multiple of 2^-24."""
    return (words >> 8).float() * 2.0**-24


def integers(words: Int64[Tensor, "batch 2"], below: int) -> Int64[Tensor, " batch"]:
    """Two words as a whole number from 0 to `below` - 1: the upper half of their product with `below`.

    No number's probability is further than 2^-64 from 1 / below. Raises ValueError unless 1 <= below <= 2^31.
    """
    if not 1 <= below <= 2**31:
        raise ValueError(f"below should be from 1 to 2^31, not {below}")
    return (words[:, 0] * below + (words[:, 1] * below >> 32)) >> 32


def _padded(count: int) -> int:
    return -(-count // 4) * 4


def _kernel(samples: Tensor) -> Callable[[int, Tensor, int, torch.dtype], Tensor] | None:
    """The Triton kernel, for tensors on CUDA."""
    if not samples.is_cuda or find_spec("triton") is None:
        return None
    from chaindiff.kernels.noise_triton import generate

    return generate


# ------------------------------------------------------------ on the host


def _each_chunk(key: int, samples: Tensor, count: int, keep: Callable[[Words, slice, slice], None]) -> None:
    """Calls `keep` with pairs of words, word0 * 2^32 + word1, for the rows and places that they are of."""
    numbers, blocks = samples.cpu().numpy().astype(np.uint64), -(-count // 4)
    height = max(1, COUNTERS // max(blocks, 1))
    make = native() or pairs_of
    for row in range(0, len(numbers), height):
        some = numbers[row : row + height]
        for first in range(0, blocks, COUNTERS):
            last = min(first + COUNTERS, blocks)
            fits = make is pairs_of or int(some.max()) >> 32 == 0
            made = (make if fits else pairs_of)(key, some, first, last - first)
            keep(made, slice(row, row + len(some)), slice(4 * first, 4 * last))


def philox(c0: Words, c1: Words, c2: Words, c3: Words, key: int) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10 of counters of four words, and of a key of 64 bits."""
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(ROUNDS):
        first, second = (c * np.uint64(m) for c, m in zip((c0, c2), MULTIPLIERS, strict=True))
        # The lower halves of products are the next c1 and c3; their upper halves are cut off with those of c0 and c2.
        c0, c2 = second >> HALF ^ c1, first >> HALF ^ c3
        for c, k in ((c0, k0), (c2, k1)):
            c ^= np.uint64(k)
            c &= LOW
        c1, c3 = second, first
        k0, k1 = (k + w & 0xFFFFFFFF for k, w in zip((k0, k1), WEYL, strict=True))
    return c0, c1 & LOW, c2, c3 & LOW


def pairs_of(key: int, samples: UInt64[np.ndarray, " rows"], first: int, blocks: int) -> UInt64[np.ndarray, "rows n"]:
    """Pairs of words, word0 * 2^32 + word1, of so many counters from block `first` on."""
    block, sample = np.arange(first, first + blocks, dtype=np.uint64)[None], samples[:, None]
    word0, word1, word2, word3 = philox(block, sample & LOW, sample >> HALF, np.zeros((1, 1), np.uint64), key)
    return np.stack([word0 << HALF | word1, word2 << HALF | word3], axis=-1).reshape(len(samples), -1)


@cache
def native() -> Callable[[int, np.ndarray, int, int], Words] | None:
    """`pairs_of` by torch's own Philox, for samples below 2^32, if this torch has it and agrees; three times faster."""
    generate: Any = getattr(torch.ops.aten, "_philox_randint_", None)
    if generate is None:
        return None

    def pairs(key: int, samples: np.ndarray, first: int, blocks: int) -> Words:
        keys = np.empty((len(samples), 1, 2), np.uint64)
        keys[:, :, 0], keys[:, 0, 1] = np.uint64(key), samples << HALF | np.uint64(first)
        out = torch.empty(len(samples), 2 * blocks, dtype=torch.int64)
        generate(out, torch.from_numpy(keys), -(2**63), None)  # from the least whole number to the greatest
        return out.numpy().view(np.uint64)

    probe = 0x0123456789ABCDEF, np.array([0, 7, 2**32 - 1], np.uint64), 2**30 - 1, 3
    try:  # it is not a public function yet
        return pairs if np.array_equal(pairs(*probe), pairs_of(*probe)) else None
    except (RuntimeError, TypeError):
        return None
