"""Group normalisation with SiLU, by Triton's interpreter, against the plain operations in float64."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional as F

from chaindiff.kernels.dispatch import INTERPRETED, fused
from chaindiff.kernels.group_norm import group_norm_silu

EPS = 1e-5
BF16 = 2**-7  # the interpreter cuts numbers off where CUDA rounds them to the nearest, 2^-8
MODES = [(), ("scale", "shift"), ("added",), ("scale", "shift", "added")]
SHAPES = [  # of x, and the groups
    ((2, 8, 4, 4), 2),
    ((1, 6, 5, 3), 3),  # batch 1, nothing a power of two
    ((2, 6, 1, 1), 2),  # one pixel
    ((3, 5, 3, 7), 5),  # as many groups as channels
    ((2, 7, 2, 3), 1),  # one group
    ((2, 6, 9), 3),  # one dimension
    ((1, 4, 50, 47), 2),  # several blocks, the last not full
]


def inputs(shape, dtype=torch.float32, last=False, seed=0):
    made = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=made, dtype=torch.float64)  # noqa: E731
    x = (draw(*shape) * 2 + 3).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    more = {name: draw(*shape[:2]).to(dtype) for name in ("scale", "shift", "added")}
    return x, draw(shape[1]).float(), draw(shape[1]).float(), more, draw(*shape).to(dtype)


def expected(x, groups, weight, bias, more):
    """From the formula, in float64."""
    over = lambda t: t.reshape(*t.shape, *[1] * (x.ndim - 2))  # noqa: E731
    x = x + over(more["added"]) if "added" in more else x
    parts = x.reshape(len(x), groups, -1)
    spread = (parts.var(2, unbiased=False, keepdim=True) + EPS).sqrt()
    y = ((parts - parts.mean(2, keepdim=True)) / spread).reshape(x.shape)
    y = y * over(weight[None]) + over(bias[None])
    y = y * (1 + over(more["scale"])) + over(more["shift"]) if "scale" in more else y
    return y / (1 + (-y).exp())


def both(shape, groups, mode, dtype, last):
    """Value and gradients by the kernel and by the formula; bf16 inputs are exact in float64."""
    x, weight, bias, more, grad = inputs(shape, dtype, last)
    found = []
    for wide in (False, True):
        own = [t.double() if wide else t for t in (x, weight, bias, *(more[name] for name in mode))]
        own = [t.detach().clone().requires_grad_() for t in own]
        given = own[0], groups, own[1], own[2]
        named = dict(zip(mode, own[3:], strict=True))
        y = expected(*given, named) if wide else group_norm_silu(*given, EPS, **named)
        y.backward(grad.to(y.dtype))
        found.append([y.detach(), *(t.grad for t in own)])
    return x, *found


def same_format(x, *others):
    for layout in (torch.contiguous_format, *([torch.channels_last] if x.ndim == 4 else [])):
        assert len({t.is_contiguous(memory_format=layout) for t in (x, *others)}) == 1


def near(found, right, tolerance):
    found, right = found.detach(), right.detach()
    assert found.shape == right.shape
    assert (found.double() - right).abs().max() <= tolerance * max(1.0, float(right.abs().max()))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_values_and_gradients_are_those_of_float64(shape, groups, last) -> None:
    last = last and len(shape) == 4
    for mode in MODES if shape[0] == 3 else MODES[3:]:
        x, found, right = both(shape, groups, mode, torch.float32, last)
        assert fused(x) and INTERPRETED
        same_format(x, found[0], found[1])
        for ours, exact in zip(found, right, strict=True):
            near(ours, exact, 1e-5)


@pytest.mark.parametrize("last", [False, True])
def test_bf16_is_rounded_once(last) -> None:
    """Statistics and sums are in float32: only what is written is rounded, to 8 bits."""
    for mode in MODES[1:3]:
        x, found, right = both((2, 12, 4, 3), 3, mode, torch.bfloat16, last)
        assert found[0].dtype == found[1].dtype == torch.bfloat16 and found[2].dtype == torch.float32
        same_format(x, found[0], found[1])
        for ours, exact in zip(found, right, strict=True):
            near(ours, exact, BF16 if ours.dtype == torch.bfloat16 else 1e-5)


def test_a_large_mean_does_not_cancel() -> None:
    """Deviations of 1 around a mean of 3,000: the difference of two sums of squares would keep no digit."""
    x, weight, bias, *_ = inputs((1, 4, 8, 8))
    x = x + 3000
    found = group_norm_silu(x, 2, weight, bias, EPS)
    near(found, expected(x.double(), 2, weight.double(), bias.double(), {}), 2e-4)  # x itself is rounded at 1.2e-4


def test_any_strides_are_read() -> None:
    """Part of a wider tensor, transposed pixels, a gradient that is one number for all."""
    x, weight, bias, more, _ = inputs((2, 12, 4, 5))
    for view in (x[:, 2:8], x.mT[:, ::2]):
        own = view.detach().requires_grad_()
        exact = view.detach().double().requires_grad_()
        y = group_norm_silu(own, 3, weight[:6], bias[:6], EPS, scale=more["scale"][:, 1::2], shift=more["shift"][:, :6])
        wide = {"scale": more["scale"][:, 1::2].double(), "shift": more["shift"][:, :6].double()}
        right = expected(exact, 3, weight[:6].double(), bias[:6].double(), wide)
        near(y, right, 1e-5)
        y.sum().backward()
        right.sum().backward()
        near(own.grad, exact.grad, 1e-5)


@pytest.mark.parametrize("mode", [MODES[3], *(pytest.param(mode, marks=pytest.mark.slow) for mode in MODES[:3])])
def test_the_operator_is_well_registered(mode) -> None:
    x, weight, bias, more, _ = inputs((2, 6, 3, 4), last=True)
    named = [more[name].requires_grad_() if name in mode else None for name in ("scale", "shift", "added")]
    weight, bias, x = (t.requires_grad_() for t in (weight, bias, x))
    opcheck(torch.ops.chaindiff.group_norm_silu.default, (x, 2, weight, bias, EPS, *named))


def test_compiled_autocast_and_meta() -> None:
    x, weight, bias, more, _ = inputs((2, 6, 3, 4))
    run = lambda x: group_norm_silu(x, 2, weight, bias, EPS, added=more["added"])  # noqa: E731
    own, same = (x.detach().clone().requires_grad_() for _ in range(2))
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    compiled(own).sum().backward()
    run(same).sum().backward()
    torch.testing.assert_close(own.grad, same.grad)
    with torch.autocast("cpu", torch.bfloat16):  # the operator takes what it is given
        assert run(x.bfloat16()).dtype == torch.bfloat16 and run(x).dtype == torch.float32
    found = torch.ops.chaindiff.group_norm_silu(
        *(t if isinstance(t, float | int) else t.to("meta") for t in (x, 2, weight, bias, EPS)), None, None, None
    )
    assert found[0].is_meta and found[0].shape == x.shape and found[1].shape == (2, 2)


def test_what_no_kernel_takes_goes_the_plain_way() -> None:
    x, weight, bias, *_ = inputs((3, 6, 2, 2))
    plain = lambda x: F.silu(F.group_norm(x, 2, weight.to(x.dtype), bias.to(x.dtype), EPS))  # noqa: E731
    for case in (x.double(), x[..., 0, 0], x.to("meta")):
        assert not (fused(case) and case.ndim > 2)
        found = group_norm_silu(case, 2, weight.to(case.device), bias.to(case.device), EPS)
        assert found.is_meta or torch.equal(found, plain(case))
