"""What a sampling step does outside its network: few operations, and on CUDA nothing that waits."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import chaindiff as cd
from chaindiff.kernels import noise

# Input scaling (1), output (2), a row of Euler (2) or Heun (4): on average 6 for an evaluation.
MOST = 6


class Outside(TorchDispatchMode):
    """Counts the operations that a network does not do, by name, and what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Nothing(nn.Module):
    """Costs no operation."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.out: dict[str, Tensor] = {}

    def forward(self, x, noise, condition):
        return self.out or x


def counted(stage: cd.Diffusion, steps: int, given: dict[str, Tensor], **sampler) -> Counter[str]:
    noise.native()  # compares two generators, once in a process
    with Outside() as mode:
        for _ in stage.sample(given, cd.Draws(range(4), 0, dtype=torch.float64), sampler={"steps": steps, **sampler}):
            pass
    return mode.found


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m"])
def test_a_step_costs_few_operations_outside_the_network(solver: str) -> None:
    stage = cd.Diffusion(cd.Variable.image("image", 3, 4), network=Nothing())
    more = counted(stage, 9, {}, solver=solver) - counted(stage, 8, {}, solver=solver)
    evaluations = 2 if solver == "heun" else 1
    assert 0 < more.total() <= MOST * evaluations + (solver == "dpmpp_2m"), more
    assert not [name for name in more if any(word in name for word in ("copy", "clone", "full", "zeros"))], more


def test_guided_steps_join_conditions_once() -> None:
    label = cd.Variable.vector("label", 5)
    stage = cd.Diffusion(
        cd.Variable.vector("x", 6), given=[(label, {"dropout": 0.1})], network=Nothing(), sampler={"guidance": 2.0}
    )
    given = {"label": torch.randn(4, 5)}
    more = counted(stage, 9, given, solver="euler") - counted(stage, 8, given, solver="euler")
    assert more["aten.cat.default"] == 1  # the state, for both terms
    assert more.total() <= MOST + 5, more  # cat, and the weighted sum of two terms


def test_levels_are_uploaded_once_and_coefficients_shared() -> None:
    """However many steps there are, one tensor is made of the levels."""
    stage = cd.Diffusion(cd.Variable.vector("x", 6), network=Nothing())
    few, many = (counted(stage, steps, {}) for steps in (4, 40))
    for name in ("aten.log.default", "aten.sqrt.default", "aten.reciprocal.default", "aten.detach.default"):
        assert few[name] == many[name], name


@pytest.mark.parametrize(
    ("kind", "settings", "once"),
    [
        ("unet", {"channels": 8, "mult": [1, 1], "blocks": 1, "attention": [8]}, "map_label|map_augment|context_kv"),
        ("prior", {"width": 16, "depth": 1, "heads": 2}, "map_label|map_context"),
        ("transformer", {"width": 16, "depth": 2, "heads": 2, "qk_norm": True}, "label|context|context_kv"),
    ],
)
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_what_depends_on_the_condition_alone_is_computed_once(kind: str, settings: dict, once: str, precision) -> None:
    made = cd.Variable.vector("x", 6) if kind == "prior" else cd.Variable.image("x", 3, 8)
    given = {"label": cd.Variable.vector("label", 5), "tokens": cd.Variable("tokens", "tokens", (4, 6))}
    stage = cd.Diffusion(
        made,
        given=[(variable, {"dropout": 0.1}) for variable in given.values()],
        network={"kind": kind, **settings},
        sampler={"steps": 3, "guidance": 2.0, "guidance_interval": [0.5, 20.0]},
    ).eval()
    for parameter in stage.parameters():
        nn.init.normal_(parameter, std=0.1)
    stage.autocast = precision
    values, calls = {name: torch.randn(4, *v.shape) for name, v in given.items()}, Counter[str]()
    layers = [(n, m) for n, m in stage.network.named_modules() if re.fullmatch(f"({once})", n.rpartition(".")[2])]
    for name, layer in layers:
        layer.register_forward_hook(lambda *_, name=name: calls.update([name]))

    def sampled(steps: int) -> Tensor:
        return list(stage.sample(values, cd.Draws(range(4), 0), sampler={"steps": steps}))[-1]["x"]

    found = sampled(7)
    assert len(calls) == len(layers) >= 2 and set(calls.values()) == {2}, (
        "for guided batches and for those that are not"
    )
    stage.run = stage.network.forward  # as what is compiled, which takes plain conditions
    assert torch.equal(sampled(7), found) and set(calls.values()) == {2 + 13}
