"""The arithmetic around a network: weighted sums of batches, and the weighted error of a batch, in one pass each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from chaindiff.kernels.dispatch import fused, launch, power_of_two

MOST = 5  # terms of a sum: those of a solver's row
BLOCK = 1024  # values of a program
LARGEST = 65_535  # samples: the second side of CUDA's grid


def expand(value: Tensor, like: Tensor) -> Tensor:
    """A number for each sample, [batch], or for all, [], such that it broadcasts against [batch, *shape]."""
    return _typed(value.reshape(-1, *[1] * (like.ndim - 1)) if value.ndim else value, like.dtype)


def weighted_sum(*terms: tuple[float | Tensor, Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """The sum of weight times value, [batch, *shape]; a weight is a number, or a tensor [batch] or [].

    The sum has the first value's type, or `dtype`.
    """
    (weight, first), *more = terms
    dtype, values = dtype or first.dtype, [value for _, value in terms]
    if fused(*values) and len(terms) <= MOST and len(first) <= LARGEST and first.numel():
        weights = {place: weight for place, (weight, _) in enumerate(terms) if isinstance(weight, Tensor)}
        numbers = [1.0 if isinstance(weight, Tensor) else float(weight) for weight, _ in terms]
        return torch.ops.chaindiff.weighted_sum(values, [*weights.values()], [*weights], numbers, dtype)
    total = _typed(first, dtype)
    own = not more or isinstance(weight, Tensor) or weight != 1  # and not a value itself
    if own:
        total = total * (expand(weight, total) if isinstance(weight, Tensor) else weight)
    for weight, value in more:
        value = _typed(value, dtype)
        if isinstance(weight, Tensor):
            each = expand(weight, value)
            total = total.addcmul_(value, each) if own else torch.addcmul(total, value, each)
        else:
            total = total.add_(value, alpha=weight) if own else torch.add(total, value, alpha=weight)
        own = True
    return total


def _typed(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value if value.dtype == dtype else value.to(dtype)  # to() takes longer to find out


def weighted_error(
    a: Float[Tensor, "batch *shape"], b: Float[Tensor, "batch *shape"], weight: Float[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """weight |a - b|^2 of every sample, the mean over its elements."""
    if fused(a, b, weight) and a.numel():
        return torch.ops.chaindiff.weighted_error(a, b, weight)
    return weight * (a - b).square().flatten(1).mean(1)


# ---------------------------------------------------------------- the operators


def _alike(values: Sequence[Tensor]) -> list[Tensor]:
    """Dense values in the memory format of the first."""
    wide = values[0].ndim == 4 and values[0].is_contiguous(memory_format=torch.channels_last)
    return [v.contiguous(memory_format=torch.channels_last if wide else torch.contiguous_format) for v in values]


# A number for each term; the weights belong to the terms at `places`.
TERMS = "Tensor[] values, Tensor[] weights, int[] places, float[] numbers"


@torch.library.custom_op("chaindiff::weighted_sum", mutates_args=(), schema=f"({TERMS}, ScalarType dtype) -> Tensor")
def _sum(values, weights, places, numbers, dtype):
    from chaindiff.kernels.triton_sums import weighted_sum as kernel

    values = _alike(values)
    out = torch.empty_like(values[0], dtype=dtype)
    batch, absent = len(out), MOST - len(values)
    size = out.numel() // batch
    weighed = dict(zip(places, [weight.expand(batch) for weight in weights], strict=True))
    each = [weighed.get(place, out) for place in range(MOST)]  # any tensor in place of one that is not read
    launch(
        kernel, (-(-size // BLOCK), batch), out, *values, *[out] * absent, *each, *[w.stride(0) for w in each],
        *numbers, *[0.0] * absent, size,
        TERMS=len(values), WEIGHTED=sum(1 << place for place in places), BLOCK=min(BLOCK, power_of_two(size)),
    )  # fmt: skip
    return out


@_sum.register_fake
def _(values, weights, places, numbers, dtype):
    return torch.empty_like(_alike(values[:1])[0], dtype=dtype)


def _keep_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, weights, ctx.places, ctx.numbers, _ = inputs
    ctx.save_for_backward(*values, *weights)


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Of a value: its weight times the gradient, another weighted sum. Of a weight: their product, summed by sample."""
    values, weights = ctx.saved_tensors[: len(ctx.numbers)], ctx.saved_tensors[len(ctx.numbers) :]
    weighed = dict(zip(ctx.places, weights, strict=True))
    to_values = [
        weighted_sum((weighed.get(place, number), grad), dtype=value.dtype) if wanted else None
        for place, (value, number, wanted) in enumerate(zip(values, ctx.numbers, ctx.needs_input_grad[0], strict=True))
    ]
    to_weights = [
        (grad * values[place]).flatten(1).sum(1, dtype=weight.dtype).sum_to_size(weight.shape) if wanted else None
        for place, weight, wanted in zip(ctx.places, weights, ctx.needs_input_grad[1], strict=True)
    ]
    return to_values, to_weights, None, None, None


_sum.register_autograd(_sum_backward, setup_context=_keep_sum)


@torch.library.custom_op(
    "chaindiff::weighted_error", mutates_args=(), schema="(Tensor a, Tensor b, Tensor weight) -> Tensor"
)
def _error(a, b, weight):
    from chaindiff.kernels.triton_sums import weighted_error as kernel

    a, b = _alike([a, b])
    out, size = a.new_empty(len(a), dtype=torch.float32), a.numel() // len(a)
    launch(kernel, (len(a),), out, a, b, weight, weight.stride(0), size, BLOCK=min(BLOCK, power_of_two(size)))
    return out


@_error.register_fake
def _(a, b, weight):
    return a.new_empty(a.shape[0], dtype=torch.float32)


def _keep_error(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _error_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Of a value: 2 weight (a - b) / size times the gradient, another weighted sum."""
    a, b, weight = ctx.saved_tensors
    slope = 2 * grad * weight / (a.numel() // len(a))
    to_a = weighted_sum((slope, a), (-slope, b)) if ctx.needs_input_grad[0] else None
    to_b = weighted_sum((slope, b), (-slope, a)) if ctx.needs_input_grad[1] else None
    to_weight = grad * weighted_error(a, b, torch.ones_like(weight)) if ctx.needs_input_grad[2] else None
    return to_a, to_b, to_weight if to_weight is None else to_weight.to(weight)


_error.register_autograd(_error_backward, setup_context=_keep_error)
