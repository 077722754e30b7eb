"""The noise of `chaindiff.kernels.noise` made on the device: no key and no number is copied from the host."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Int64, Shaped
from torch import Tensor

BLOCK = 256  # counters of a program


@triton.jit(do_not_specialize=["key", "count"])
def _generate(out, samples, key, count, BLOCK: tl.constexpr, NORMAL: tl.constexpr):
    """Four words for each of BLOCK counters of one sample, or the four normals that they make."""
    chunks = tl.cdiv(tl.cdiv(count, 4), BLOCK)
    row, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    sample = tl.load(samples + row).to(tl.uint64)
    block = chunk * BLOCK + tl.arange(0, BLOCK)
    c0, zero = block.to(tl.uint32), tl.zeros([BLOCK], tl.uint32)
    c1, c2 = zero + (sample & 0xFFFFFFFF).to(tl.uint32), zero + (sample >> 32).to(tl.uint32)
    word0, word1, word2, word3 = tl.philox(key, c0, c1, c2, zero)
    if NORMAL:
        first, second = _normals(word0, word1)
        third, fourth = _normals(word2, word3)
    else:
        first, second, third, fourth = word0.to(tl.int64), word1.to(tl.int64), word2.to(tl.int64), word3.to(tl.int64)
    place, start = block * 4, out + row.to(tl.int64) * count
    tl.store(start + place, first, mask=place < count)
    tl.store(start + place + 1, second, mask=place + 1 < count)
    tl.store(start + place + 2, third, mask=place + 2 < count)
    tl.store(start + place + 3, fourth, mask=place + 3 < count)


@triton.jit
def _normals(word0, word1):
    uniform = word0.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32, 2^-33
    angle = word1.to(tl.float32) * 1.4629180792671596e-09  # 2 pi 2^-32
    radius = tl.sqrt_rn(-2.0 * tl.log(uniform))
    return radius * tl.cos(angle), radius * tl.sin(angle)


def generate(
    key: int, samples: Int64[Tensor, " batch"], count: int, dtype: torch.dtype
) -> Shaped[Tensor, "batch count"]:
    """Words (int64) or standard normal numbers (float32) of every sample, on the device of `samples`."""
    out = torch.empty(len(samples), count, dtype=dtype, device=samples.device)
    if out.numel():
        signed = key - 2**64 if key >= 2**63 else key
        programs = len(samples) * triton.cdiv(triton.cdiv(count, 4), BLOCK)
        launch: Any = _generate[(programs,)]
        launch(out, samples, signed, count, BLOCK=BLOCK, NORMAL=dtype.is_floating_point)
    return out
