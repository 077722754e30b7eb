"""Whole networks and samplers with every kernel, by Triton's interpreter, against the plain operations."""

from __future__ import annotations

import pytest
import torch

import chaindiff as cd
from chaindiff.kernels import dispatch


@pytest.mark.parametrize("arch", ["ddpmpp", pytest.param("adm", marks=pytest.mark.slow)])
def test_a_stage_samples_and_learns_the_same_with_kernels(arch, monkeypatch) -> None:
    torch.manual_seed(0)
    network = cd.UNet(arch=arch, channels=8, mult=[1], blocks=1, attention=[], dropout=0.0)
    stage = cd.Diffusion(cd.Variable.image("image", 3, 2), network=network)
    for parameter in stage.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    calls = []
    launch = dispatch.launch

    def counted(kernel, *rest, **more):
        calls.append(kernel.fn.__name__)
        launch(kernel, *rest, **more)

    for module in ("group_norm", "sums"):
        monkeypatch.setattr(f"chaindiff.kernels.{module}.launch", counted)
    found = {}
    for enabled in (True, False):
        monkeypatch.setattr(dispatch, "enabled", enabled)
        draws = cd.Draws(range(2), 0)
        *_, last = stage.sample({}, draws, sampler={"steps": 2})
        stage.zero_grad()
        loss = stage.loss({"image": torch.linspace(-1, 1, 24).reshape(2, 3, 2, 2)}, draws)
        loss.mean().backward()
        found[enabled] = [last["image"], loss.detach(), *(p.grad for p in stage.parameters())]
        assert bool(calls) == enabled
        if enabled:
            assert {*calls} == {"forward", "backward", "weighted_sum", "weighted_error"}
        calls.clear()
    for ours, plain in zip(found[True], found[False], strict=True):
        assert (ours is None) == (plain is None)
        if ours is not None:
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
