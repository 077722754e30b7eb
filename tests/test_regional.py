"""Compilation of a network's repeated blocks: which they are, and that the compiled network computes the same."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.variable import Variable
from chaindiff.edm.random import Draws
from chaindiff.execution.machine import compiler
from chaindiff.execution.regional import compile_network, release, repeated
from chaindiff.networks.blocks import Block
from chaindiff.networks.prior import TransformerBlock
from chaindiff.specs.network import PriorSpec, UNetSpec
from chaindiff.training.loop import pays

UNET = UNetSpec(kind="unet", channels=16, mult=[1, 2], blocks=2, attention=[8])
PRIOR = PriorSpec(kind="prior", width=16, depth=3, heads=2)


def stage_of(network) -> Diffusion:
    variable = Variable.image("v", 3, 16) if network is UNET else Variable.vector("v", 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Diffusion(variable, network=network)


@pytest.mark.parametrize(("network", "kind", "count"), [(UNET, Block, 14), (PRIOR, TransformerBlock, 3)])
def test_the_repeated_blocks_are_found(network, kind, count) -> None:
    found = list(repeated(stage_of(network).network))
    assert [type(module) for module in found] == [kind] * count


def test_blocks_within_blocks_are_not_compiled_twice() -> None:
    inner = lambda: nn.TransformerEncoderLayer(4, 1)  # noqa: E731
    network = nn.Sequential(
        nn.Linear(4, 4), nn.ModuleList([nn.ModuleDict({"a": inner()}), nn.ModuleDict({"a": inner()})])
    )
    assert [type(module) for module in repeated(network)] == [nn.TransformerEncoderLayer] * 2
    assert list(repeated(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))) == []


def test_what_does_not_repeat_is_compiled_whole(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, **how: asked.append((module, how)))
    single, stage = nn.Sequential(nn.Linear(4, 4)), stage_of(UNET)
    compile_network(single)
    compile_network(stage.network)
    assert asked[0] == (single, {"dynamic": False})
    assert [module for module, _ in asked[1:]] == list(repeated(stage.network))


def test_what_compilation_needs(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/clang++" if name == "clang++" else None)
    assert compiler() == "/usr/bin/clang++"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert compiler() is None and not pays(1e9)


def test_blocks_compile_to_the_same_loss_and_gradients_and_are_released() -> None:
    """By dynamo and autograd alone, without a C++ compiler."""
    plain, stage = stage_of(PRIOR), stage_of(PRIOR)
    kinds = []

    def backend(graph, inputs):
        kinds.append(graph)
        return graph

    for module in repeated(stage.network):
        module.compile(dynamic=False, backend=backend)
    batch, draws = {"v": torch.randn(8, 4, generator=torch.Generator().manual_seed(0))}, Draws(range(8), 0, "v")
    for one in (plain, stage):
        one.loss(batch, draws).mean().backward()
    assert len(kinds) == 1, "blocks of one kind are compiled once"
    for mine, theirs in zip(stage.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    release(stage.network)
    stage.loss({"v": batch["v"][:3]}, Draws(range(3), 0, "v"))
    assert len(kinds) == 1


@pytest.mark.slow
@pytest.mark.parametrize("network", [UNET, PRIOR])
def test_compiled_networks_train_as_eager_ones(network) -> None:
    plain, stage = stage_of(network), stage_of(network)
    compile_network(stage.network)
    shape = stage.generates["v"].shape
    batch = {"v": torch.randn(8, *shape, generator=torch.Generator().manual_seed(0)) / 2}
    for one in (plain, stage):
        one.eval().loss(batch, Draws(range(8), 0, "v")).mean().backward()
    for mine, theirs in zip(stage.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5)
