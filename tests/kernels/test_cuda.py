"""The kernels on a GPU, against float64 on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from chaindiff.kernels.dispatch import fused
from chaindiff.kernels.group_norm import group_norm_silu
from chaindiff.kernels.sums import weighted_error, weighted_sum


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(4, 128, 64, 64), (2, 256, 8, 8), (3, 6, 5, 7)])
def test_group_norm_on_a_gpu(shape, layout, dtype) -> None:
    groups = min(32, shape[1] // 3)
    groups = next(g for g in range(groups, 0, -1) if shape[1] % g == 0)
    x = torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=layout)
    added, weight, grad = x.new_ones(shape[:2]), torch.rand(shape[1], device="cuda"), torch.randn_like(x)
    found = []
    for wide in (False, True):
        own = [(t.double().cpu() if wide else t).detach().requires_grad_() for t in (x, added, weight)]
        assert fused(*own) != wide
        if wide:
            y = F.silu(F.group_norm(own[0] + own[1][..., None, None], groups, own[2], own[2], 1e-6))
        else:
            y = group_norm_silu(own[0], groups, own[2], own[2], 1e-6, added=own[1])
        y.backward(grad.double().cpu() if wide else grad)
        found.append([y.detach(), *(t.grad for t in own)])
    for ours, exact in zip(*found, strict=True):
        assert ours is not None and exact is not None
        limit = 2**-8 if ours.dtype == torch.bfloat16 else 1e-5
        assert (ours.double().cpu() - exact).abs().max() <= limit * max(1.0, float(exact.abs().max()))


@pytest.mark.gpu
def test_sums_on_a_gpu() -> None:
    x, f, w = torch.randn(5, 3, 17, 16), torch.randn(5, 3, 17, 16).bfloat16(), torch.rand(5)
    on = [t.cuda() for t in (x, f, w)]
    exact = w[:, None, None, None].double() * x.double() + 0.5 * f.double()
    found = weighted_sum((on[2], on[0]), (0.5, on[1]))
    assert (found.cpu() - exact).abs().max() < 1e-6
    error = w.double() * (exact - x.double()).square().flatten(1).mean(1)
    assert (weighted_error(found, on[0], on[2]).cpu() - error).abs().max() < 1e-6
    kept = on[0].clone()
    assert weighted_sum((0.5, kept), (2.0, on[1]), out=kept) is kept
    assert (kept.cpu() - (0.5 * x.double() + 2 * f.double())).abs().max() < 1e-5
