"""Triton kernels of group normalisation with SiLU, for any strides; imported when the first of them runs.

A program has one sample's values in some groups, as blocks [PIXELS, GROUPS, CHANNELS], and reads them twice: the second
time from the cache, as far as they fit. Sums are in float32, and no sum depends on the order of programs.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _channels(groups, width, GROUPS: tl.constexpr, CHANNELS: tl.constexpr):
    """The program's channels, [GROUPS, CHANNELS], and which of them exist."""
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[:, None]
    j = tl.arange(0, CHANNELS)[None, :]
    return g * width + j, (g < groups) & (j < width)


@triton.jit
def _linear(weight, bias, scale, shift, c, valid, SCALED: tl.constexpr):
    """Slope and offset of every channel: what silu sees is slope * normalised + offset."""
    slope = tl.load(weight + c, valid, other=0.0).to(tl.float32)
    offset = tl.load(bias + c, valid, other=0.0).to(tl.float32)
    if SCALED:
        more = tl.load(scale + c, valid, other=0.0).to(tl.float32) + 1
        slope, offset = slope * more, offset * more + tl.load(shift + c, valid, other=0.0).to(tl.float32)
    return slope, offset


@triton.jit
def _added(added, c, valid, ADDED: tl.constexpr):
    bias = tl.zeros(c.shape, tl.float32)
    if ADDED:
        bias = tl.load(added + c, valid, other=0.0).to(tl.float32)
    return bias


@triton.jit
def _block(first, pixels, stride, valid, PIXELS: tl.constexpr):
    """Offsets of a block's pixels, [PIXELS, 1, 1], and which of its values exist."""
    p = first + tl.arange(0, PIXELS)[:, None, None]
    return p.to(tl.int64) * stride, (p < pixels) & valid[None]


@triton.jit
def forward(
    x, out, means, rstds, weight, bias, scale, shift, added,
    groups, width, pixels, eps,  # width: channels of a group
    x_n, x_c, x_p, out_n, out_c, out_p, scale_n, shift_n, added_n,  # strides
    SCALED: tl.constexpr, ADDED: tl.constexpr, PIXELS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    c, valid = _channels(groups, width, GROUPS, CHANNELS)
    slope, offset = _linear(weight, bias, scale + n * scale_n, shift + n * shift_n, c, valid, SCALED)
    more = _added(added + n * added_n, c, valid, ADDED)
    x += n * x_n + c[None].to(tl.int64) * x_c
    out += n * out_n + c[None].to(tl.int64) * out_c

    # Mean and sum of squared deviations, block by block (Chan et al. 1979): no cancellation where the mean is large.
    mean = tl.zeros((GROUPS,), tl.float32)
    squares = tl.zeros((GROUPS,), tl.float32)
    for first in range(0, pixels, PIXELS):
        at, there = _block(first, pixels, x_p, valid, PIXELS)
        value = tl.load(x + at, there, other=0.0).to(tl.float32) + more[None]
        count = tl.minimum(pixels - first, PIXELS) * width * 1.0
        own = tl.sum(tl.sum(tl.where(there, value, 0.0), 2), 0) / count
        centred = tl.where(there, value - own[None, :, None], 0.0)
        before = first * width * 1.0
        apart = own - mean
        mean += apart * (count / (before + count))
        squares += tl.sum(tl.sum(centred * centred, 2), 0) + apart * apart * (before * count / (before + count))
    rstd = 1 / tl.sqrt_rn(squares / (pixels * width * 1.0) + eps)

    for first in range(0, pixels, PIXELS):
        at, there = _block(first, pixels, x_p, valid, PIXELS)
        value = tl.load(x + at, there, other=0.0).to(tl.float32) + more[None]
        seen = (value - mean[None, :, None]) * rstd[None, :, None] * slope[None] + offset[None]
        at, there = _block(first, pixels, out_p, valid, PIXELS)
        tl.store(out + at, (seen * tl.sigmoid(seen)).to(out.dtype.element_ty), there)

    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    tl.store(means + n * groups + g, mean, g < groups)
    tl.store(rstds + n * groups + g, rstd, g < groups)


@triton.jit
def backward(
    grad, x, out,  # out: the gradient with respect to x
    slopes, offsets, adds,  # gradients with respect to slope and offset and to what was added, [batch, channels]
    means, rstds, weight, bias, scale, shift, added,
    groups, width, pixels,
    grad_n, grad_c, grad_p, x_n, x_c, x_p, out_n, out_c, out_p, scale_n, shift_n, added_n,  # strides
    SCALED: tl.constexpr, ADDED: tl.constexpr, PIXELS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    c, valid = _channels(groups, width, GROUPS, CHANNELS)
    slope, offset = _linear(weight, bias, scale + n * scale_n, shift + n * shift_n, c, valid, SCALED)
    more = _added(added + n * added_n, c, valid, ADDED)
    g = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    mean = tl.load(means + n * groups + g, g < groups, other=0.0)[None, :, None]
    rstd = tl.load(rstds + n * groups + g, g < groups, other=0.0)[None, :, None]
    grad += n * grad_n + c[None].to(tl.int64) * grad_c
    x += n * x_n + c[None].to(tl.int64) * x_c
    out += n * out_n + c[None].to(tl.int64) * out_c

    to_slope = tl.zeros((GROUPS, CHANNELS), tl.float32)
    to_offset = tl.zeros((GROUPS, CHANNELS), tl.float32)
    total = tl.zeros((GROUPS, CHANNELS), tl.float32)  # of the normalised values
    for first in range(0, pixels, PIXELS):
        normal, back = _gradient(grad, x, first, pixels, grad_p, x_p, valid, more, mean, rstd, slope, offset, PIXELS)
        to_slope += tl.sum(back * normal, 0)
        to_offset += tl.sum(back, 0)
        if ADDED:
            total += tl.sum(normal, 0)

    # The gradient of normalised values has its mean, and its part along them, taken out.
    count = pixels * width * 1.0
    along = tl.sum(slope * to_slope, 1)[:, None] / count
    level = tl.sum(slope * to_offset, 1)[:, None] / count
    for first in range(0, pixels, PIXELS):
        normal, back = _gradient(grad, x, first, pixels, grad_p, x_p, valid, more, mean, rstd, slope, offset, PIXELS)
        at, there = _block(first, pixels, out_p, valid, PIXELS)
        found = rstd * (slope[None] * back - level[None] - normal * along[None])
        tl.store(out + at, found.to(out.dtype.element_ty), there)

    at = n * groups * width + c
    tl.store(slopes + at, to_slope, valid)
    tl.store(offsets + at, to_offset, valid)
    if ADDED:
        inner = slope * to_offset - pixels * level - total * along
        tl.store(adds + at, tl.sum(rstd, 0) * inner, valid)


@triton.jit
def _gradient(grad, x, first, pixels, grad_p, x_p, valid, more, mean, rstd, slope, offset, PIXELS: tl.constexpr):
    """A block's normalised values, and the gradient before SiLU; both 0 where there is nothing."""
    at, there = _block(first, pixels, x_p, valid, PIXELS)
    value = tl.load(x + at, there, other=0.0).to(tl.float32) + more[None]
    normal = tl.where(there, (value - mean) * rstd, 0.0)
    at, there = _block(first, pixels, grad_p, valid, PIXELS)
    back = tl.load(grad + at, there, other=0.0).to(tl.float32)
    seen = normal * slope[None] + offset[None]
    share = tl.sigmoid(seen)
    return normal, back * share * (1 + seen * (1 - share))
