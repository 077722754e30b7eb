"""Triton kernels of weighted sums and of the weighted error; imported when the first of them runs.

Tensors are dense and of one memory format, so that a sample is a run of `size` values in all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _term(value, weight, stride, scalar, n, at, mask, WEIGHTED: tl.constexpr):
    if WEIGHTED:
        scalar = scalar * tl.load(weight + n * stride).to(tl.float32)
    return scalar * tl.load(value + at, mask, other=0.0).to(tl.float32)


@triton.jit
def weighted_sum(
    out, v0, v1, v2, v3, v4,
    w0, w1, w2, w3, w4, n0, n1, n2, n3, n4,  # weights of samples, read with these strides; 0: one for all
    s0, s1, s2, s3, s4,  # weights of terms
    size,
    TERMS: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,  # WEIGHTED: a bit for each term
):  # fmt: skip
    n = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask, at = i < size, n * size + i
    total = _term(v0, w0, n0, s0, n, at, mask, WEIGHTED & 1)
    if TERMS > 1:
        total += _term(v1, w1, n1, s1, n, at, mask, WEIGHTED & 2)
    if TERMS > 2:
        total += _term(v2, w2, n2, s2, n, at, mask, WEIGHTED & 4)
    if TERMS > 3:
        total += _term(v3, w3, n3, s3, n, at, mask, WEIGHTED & 8)
    if TERMS > 4:
        total += _term(v4, w4, n4, s4, n, at, mask, WEIGHTED & 16)
    tl.store(out + at, total.to(out.dtype.element_ty), mask)


@triton.jit
def weighted_error(out, a, b, weight, stride, size, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        apart = tl.load(a + n * size + i, i < size, other=0.0).to(tl.float32)
        apart -= tl.load(b + n * size + i, i < size, other=0.0).to(tl.float32)
        total += apart * apart
    scale = tl.load(weight + n * stride).to(tl.float32)
    tl.store(out + n, scale * (tl.sum(total, 0) / (size * 1.0)))
