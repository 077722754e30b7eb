"""What a chain knows of a stage, and nothing else. Most stages are diffusion models (`diffusion.py`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any, Protocol, TypeGuard, runtime_checkable

from torch import Tensor, nn

from chaindiff.edm.denoiser import State
from chaindiff.edm.random import Draws
from chaindiff.variables import Variable

Values = Mapping[str, Tensor]  # a variable's clean values, [batch, *shape]


@dataclass(frozen=True)
class Cost:
    """What one sample costs: evaluations, multiply-adds x 2 of one evaluation, and bytes (weights, activations).

    `how` says how the stage samples, for people; `notes` what sampling does to given variables, by their names.
    """

    parameters: int = 0
    flops: int = 0
    nfe: int = 1
    weight_bytes: int = 0
    activation_bytes: int = 0
    how: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def total_flops(self) -> int:
        """For one whole sample."""
        return self.flops * self.nfe


@runtime_checkable
class Stage(Protocol):
    """A model of p(generated | given): anything with these names works in a chain, in its plans and in training.

    `conditionals`: the sets of its own variables that it can be given, generating the others; for one variable, none.
    A stage that trains is a `torch.nn.Module` too.
    """

    @property
    def name(self) -> str: ...
    @property
    def generates(self) -> Mapping[str, Variable]: ...
    @property
    def given(self) -> Sequence[Variable]: ...
    @property
    def conditionals(self) -> frozenset[frozenset[str]]: ...

    def sample(self, given: Values, draws: Draws) -> Iterator[State]:
        """States of the variables that are not in `given`, the last of which is the sample; one for each of `draws`."""
        ...

    def loss(self, batch: Values, draws: Draws) -> Tensor:
        """The loss of every sample, [batch]."""
        ...

    def cost(self, moving: Collection[str]) -> Cost:
        """What a sample of these variables costs; parameters may lie on any device, the meta device included."""
        ...


class Outline:
    """What is known of a recipe's stage before its network is built: enough to resolve requests with."""

    def __init__(self, stage: Stage | None, build: Callable[[], Stage], **known: Any):
        """`stage` is there already, or will be `build`t when costs are asked for; `known` are its other names."""
        self.name: str = known["name"] if stage is None else stage.name
        self.generates: Mapping[str, Variable] = known["generates"] if stage is None else stage.generates
        self.given: Sequence[Variable] = known["given"] if stage is None else stage.given
        self.conditionals: frozenset[frozenset[str]] = known["conditionals"] if stage is None else stage.conditionals
        self.learns = stage is None or learns(stage)
        self._build = build if stage is None else lambda: stage

    @cached_property
    def built(self) -> Stage:
        return self._build()

    def cost(self, moving: Collection[str]) -> Cost:
        return self.built.cost(moving)

    def sample(self, given: Values, draws: Draws) -> Iterator[State]:
        return self.built.sample(given, draws)

    def loss(self, batch: Values, draws: Draws) -> Tensor:
        return self.built.loss(batch, draws)


def subsets(names: Sequence[str]) -> frozenset[frozenset[str]]:
    """All that can be given of several variables while others are left to generate."""
    sizes = range(1, len(names))
    return frozenset(frozenset(known) for size in sizes for known in combinations(names, size))


def learns(stage: object) -> TypeGuard[Any]:
    """Whether a stage has anything to train: it is a `torch.nn.Module` then."""
    if isinstance(stage, Outline):
        return stage.learns
    return isinstance(stage, nn.Module) and any(True for _ in stage.parameters())


@contextmanager
def evaluating(stage: object) -> Iterator[None]:
    """Dropout and the like are off inside; what was in training mode is so again afterwards."""
    training = [part for part in stage.modules() if part.training] if isinstance(stage, nn.Module) else []
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True
