"""Weighted sums and the weighted error, by Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from chaindiff.edm.solvers import Row
from chaindiff.kernels.dispatch import fused
from chaindiff.kernels.sums import weighted_error, weighted_sum

SHAPES = [(1, 1), (3, 7), (2, 3, 5, 4), (1, 3, 40, 39)]  # the last has several blocks


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def over(weight, value):
    return weight.reshape(-1, *[1] * (value.ndim - 1)) if isinstance(weight, torch.Tensor) else weight


def with_gradients(run, tensors, grad):
    own = [t.detach().clone().requires_grad_() for t in tensors]
    out = run(*own)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(t.grad for t in own)]


def compare(run, exact, tensors, grad, tolerance=1e-5):
    found = with_gradients(run, tensors, grad)
    right = with_gradients(exact, [t.double() for t in tensors], grad.double())
    for ours, theirs in zip(found, right, strict=True):
        # The interpreter cuts bf16 off where CUDA rounds to the nearest.
        limit = 2**-7 if ours.dtype == torch.bfloat16 else tolerance
        assert (ours.double() - theirs).abs().max() <= limit * max(1.0, float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_preconditioning_and_noise_have_the_gradients_of_float64(shape, dtype) -> None:
    """c x; c_skip x + c_out F, where F may be in bf16; y + sigma n: with weights for each sample and for all."""
    x, f = drawn(*shape), drawn(*shape, dtype=dtype, seed=1)
    a, b, one = drawn(shape[0], seed=2), drawn(shape[0], seed=3), torch.tensor(0.7)
    grad = drawn(*shape, seed=4)
    assert fused(x, f, a)
    if dtype == torch.float32:
        compare(lambda a, x: weighted_sum((a, x)), lambda a, x: over(a, x) * x, [a, x], grad)
        compare(lambda o, x, f: weighted_sum((o, x), (o, f)), lambda o, x, f: o * x + o * f, [one, x, f], grad)
    compare(
        lambda a, x, b, f: weighted_sum((a, x), (b, f)),
        lambda a, x, b, f: over(a, x) * x + over(b, f) * f,
        [a, x, b, f],
        grad,
    )
    compare(lambda x, b, f: weighted_sum((1.0, x), (b, f)), lambda x, b, f: x + over(b, f) * f, [x, b, f], grad)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_weighted_error_has_the_gradients_of_float64(shape) -> None:
    found, clean, weight = drawn(*shape), drawn(*shape, seed=1), drawn(shape[0], seed=2).abs()
    exact = lambda d, y, w: w * (d - y).square().flatten(1).mean(1)  # noqa: E731
    compare(weighted_error, exact, [found, clean, weight], drawn(shape[0], seed=3))


def test_memory_formats_may_differ_and_the_first_one_counts() -> None:
    x, f = drawn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), drawn(2, 3, 4, 5, seed=1)
    for first, second in ((x, f), (f, x), (x[:, :2], f[:, 1:]), (f.mT, x.mT)):
        found = weighted_sum((0.5, first), (torch.tensor([2.0, 3.0]), second))
        right = 0.5 * first.double() + over(torch.tensor([2.0, 3.0]), second) * second.double()
        assert (found - right).abs().max() < 1e-6
    assert weighted_sum((0.5, x), (2.0, f)).stride() == x.stride()
    assert weighted_sum((0.5, f), (2.0, x)).stride() == f.stride()


TERMS = ["x", "kept", "clean", "before", "noise"]


@pytest.mark.parametrize("used", [("x", "clean"), ("clean",), ("x", "kept", "clean", "before"), tuple(TERMS)])
def test_a_row_of_a_solver_is_one_sum(used) -> None:
    numbers = {name: 0.3 + place for place, name in enumerate(TERMS) if name in used}
    tensors = {name: drawn(2, 3, 4, 5, seed=place) for place, name in enumerate(TERMS)}
    right = sum(number * tensors[name].double() for name, number in numbers.items())
    others = {name: value.clone() for name, value in tensors.items()}
    found = Row(**numbers)(*tensors.values())
    assert (found - right).abs().max() < 1e-5
    assert all(torch.equal(tensors[name], others[name]) for name in TERMS)
    wide = Row(**numbers)(*(value.double() for value in others.values()))  # the plain way
    assert wide.dtype == torch.float64 and (wide - right).abs().max() < 1e-12


def test_the_operators_are_well_registered() -> None:
    x, f, a = drawn(2, 3, 4, 5), drawn(2, 3, 4, 5, seed=1), drawn(2, seed=2)
    ours, terms = torch.ops.chaindiff, ([0, 1], [1.0, 1.0])
    opcheck(ours.weighted_sum.default, ([x.requires_grad_(), f], [a.requires_grad_(), a], *terms, torch.float32))
    opcheck(ours.weighted_error.default, (x, f, a))


def test_compiled_and_meta() -> None:
    x, f, a = drawn(2, 3, 4, 5), drawn(2, 3, 4, 5, seed=1), drawn(2, seed=2)
    run = lambda x, f, a: weighted_error(weighted_sum((a, x), (0.5, f)), f, a.abs()).sum()  # noqa: E731
    own, same = (x.clone().requires_grad_() for _ in range(2))
    torch.compile(run, backend="aot_eager", fullgraph=True)(own, f, a).backward()
    run(same, f, a).backward()
    torch.testing.assert_close(own.grad, same.grad)
    out = torch.ops.chaindiff.weighted_sum([x.to("meta")], [], [], [2.0], torch.bfloat16)
    assert out.is_meta and out.dtype == torch.bfloat16 and out.shape == x.shape
