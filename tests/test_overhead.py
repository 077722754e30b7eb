"""What a sampling step does outside its network: few operations, and on CUDA nothing that waits."""

from __future__ import annotations

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
