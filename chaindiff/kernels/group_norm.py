"""Group normalisation and SiLU as one operation, with the two ways in which U-Nets condition it."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from chaindiff.kernels.dispatch import fused, launch, power_of_two

WIDEST = 4096  # channels of a group: a block of the kernel has at least one pixel of a whole group
BLOCK = 4096  # values of a block: 16 for each of 256 threads, which by ptxas fit their registers
LINE = 64  # bytes that neighbouring values should have, where channels are neighbours in memory
PROGRAMS = 264  # two for each of an H100's multiprocessors


def group_norm_silu(
    x: Float[Tensor, "batch channels *space"],
    groups: int,
    weight: Float[Tensor, " channels"],
    bias: Float[Tensor, " channels"],
    eps: float,
    *,
    scale: Float[Tensor, "batch channels"] | None = None,
    shift: Float[Tensor, "batch channels"] | None = None,
    added: Float[Tensor, "batch channels"] | None = None,
) -> Float[Tensor, "batch channels *space"]:
    """silu(norm(x + added) (1 + scale) + shift), in the memory format of x.

    `scale` with `shift` is ADM's conditioning, `added` that of DDPM++ and NCSN++.
    """
    more = [t for t in (scale, shift, added) if t is not None]
    if fused(x, weight, bias, *more) and x.ndim > 2 and x.numel() and weight.numel() <= WIDEST * groups:
        return torch.ops.chaindiff.group_norm_silu(x, groups, weight, bias, eps, scale, shift, added)[0]
    if added is not None:
        x = x + _over_space(added, x)
    y = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)
    if scale is not None and shift is not None:
        y = torch.addcmul(_over_space(shift, y), y, _over_space(scale, y) + 1)
    return F.silu(y)


def _over_space(value: Tensor, like: Tensor) -> Tensor:
    return value.reshape(*value.shape, *[1] * (like.ndim - 2))


# ---------------------------------------------------------------- the operator


def _out(x: Tensor) -> tuple[Tensor, Tensor]:
    """x as [batch, channels, pixels], and an empty tensor in its memory format."""
    flat = x.flatten(2)
    return flat, torch.empty_like(flat)


def _rows(*tensors: Tensor | None) -> list[Tensor | None]:
    """[batch, channels] with neighbouring channels."""
    return [t if t is None or t.stride(1) == 1 else t.contiguous() for t in tensors]


def _grid(x: Tensor, groups: int) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid of programs, and the sizes of their blocks, for x [batch, channels, pixels]."""
    batch, channels, pixels = x.shape
    width, at_once = channels // groups, 1
    if x.stride(1) == 1:  # channels-last: neighbouring groups fill a line
        while (
            at_once < groups
            and at_once * width * x.element_size() < LINE
            and batch * groups // (2 * at_once) >= PROGRAMS
        ):
            at_once *= 2
    wide = power_of_two(width)
    tall = min(power_of_two(pixels), max(BLOCK // (wide * at_once), 1))
    return (batch, -(-groups // at_once)), {"PIXELS": tall, "GROUPS": at_once, "CHANNELS": wide, "num_warps": 8}


def _or_x(x: Tensor, *tensors: Tensor | None) -> tuple[list[Tensor], list[int]]:
    """Tensors, any in place of absent ones that are not read, and the strides of their rows."""
    return [x if t is None else t for t in tensors], [0 if t is None else t.stride(0) for t in tensors]


@torch.library.custom_op(
    "chaindiff::group_norm_silu",
    mutates_args=(),
    schema="(Tensor x, int groups, Tensor weight, Tensor bias, float eps, Tensor? scale, Tensor? shift, Tensor? added)"
    " -> (Tensor, Tensor, Tensor)",
)
def _operator(x, groups, weight, bias, eps, scale, shift, added):
    """The value, and the mean and inverse deviation of every group, [batch, groups]."""
    from chaindiff.kernels.triton_group_norm import forward

    flat, out = _out(x)
    mean, rstd = (flat.new_empty(len(x), groups, dtype=torch.float32) for _ in range(2))
    grid, sizes = _grid(flat, groups)
    more, rows = _or_x(weight, *_rows(scale, shift, added))
    launch(
        forward, grid, flat, out, mean, rstd, weight.contiguous(), bias.contiguous(), *more,
        groups, flat.shape[1] // groups, flat.shape[2], eps, *flat.stride(), *out.stride(), *rows,
        SCALED=scale is not None, ADDED=added is not None, **sizes,
    )  # fmt: skip
    return out.view(x.shape), mean, rstd


@_operator.register_fake
def _(x, groups, weight, bias, eps, scale, shift, added):
    mean, rstd = (x.new_empty(x.shape[0], groups, dtype=torch.float32) for _ in range(2))
    return _out(x)[1].view(x.shape), mean, rstd


@torch.library.custom_op(
    "chaindiff::group_norm_silu_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, int groups, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, Tensor? scale,"
    " Tensor? shift, Tensor? added) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward_operator(grad, x, groups, weight, bias, mean, rstd, scale, shift, added):
    """Gradients with respect to x and, summed over pixels, to slope, offset and what was added."""
    from chaindiff.kernels.triton_group_norm import backward

    flat, out = _out(x)
    sums = [flat.new_empty(flat.shape[:2], dtype=torch.float32) for _ in range(3)]
    grid, sizes = _grid(flat, groups)
    flat_grad = grad.flatten(2)
    more, rows = _or_x(weight, *_rows(scale, shift, added))
    launch(
        backward, grid, flat_grad, flat, out, *sums, mean, rstd, weight.contiguous(), bias.contiguous(), *more,
        groups, flat.shape[1] // groups, flat.shape[2], *flat_grad.stride(), *flat.stride(), *out.stride(), *rows,
        SCALED=scale is not None, ADDED=added is not None, **sizes,
    )  # fmt: skip
    return out.view(x.shape), *sums


@_backward_operator.register_fake
def _(grad, x, groups, weight, bias, mean, rstd, scale, shift, added):
    sums = [x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(3)]
    return _out(x)[1].view(x.shape), *sums


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, ctx.groups, weight, bias, _, scale, shift, added = inputs
    ctx.save_for_backward(x, weight, bias, scale, shift, added, *output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    x, weight, bias, scale, shift, added, mean, rstd = ctx.saved_tensors
    found = torch.ops.chaindiff.group_norm_silu_backward(
        grad, x, ctx.groups, weight, bias, mean, rstd, scale, shift, added
    )
    to_x, to_slope, to_offset, to_added = found
    more = 1 if scale is None else scale.float() + 1
    to_weight, to_bias = (to_slope * more).sum(0).to(weight), (to_offset * more).sum(0).to(bias)
    to_scale = to_shift = None
    if scale is not None:
        to_scale = (to_slope * weight.float() + to_offset * bias.float()).to(scale)
        to_shift = to_offset.to(shift)
    return to_x, None, to_weight, to_bias, None, to_scale, to_shift, None if added is None else to_added.to(added)


_operator.register_autograd(_backward, setup_context=_keep)
