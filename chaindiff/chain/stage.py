"""All that a chain knows of a stage. Most stages are diffusion models (`diffusion.py`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor, nn

from chaindiff.chain.variable import Variable
from chaindiff.edm.denoiser import State
from chaindiff.edm.random import Draws
from chaindiff.io.errors import did_you_mean

Values = Mapping[str, Tensor]  # a variable's clean values, [batch, *shape]


@dataclass(frozen=True)
class Cost:
    """What one sample costs: evaluations, multiply-adds x 2 of one evaluation, and bytes (weights, activations).

    `how` describes the sampler, for display; `notes` say, by name, what sampling does to given variables; `warning`:
    what about the request training has not prepared the stage for.
    """

    parameters: int = 0
    flops: int = 0
    nfe: int = 1
    weight_bytes: int = 0
    activation_bytes: int = 0
    how: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)
    warning: str = ""

    @property
    def total_flops(self) -> int:
        """For one whole sample."""
        return self.flops * self.nfe


@runtime_checkable
class Stage(Protocol):
    """A model of p(generated | given): any object with these members works in a chain, in its plans and in training.

    `conditionals`: the sets of its own variables that it can be given, generating the others; for one variable, none.
    A trainable stage is also a `torch.nn.Module`.
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
    """What is known of a recipe's stage before its network is built: enough to resolve requests."""

    def __init__(self, stage: Stage | None, build: Callable[[], Stage], **known: Any):
        """`stage` exists already, or `build` makes it when costs are asked for; `known` are its other attributes."""
        self.name: str = known["name"] if stage is None else stage.name
        self.generates: Mapping[str, Variable] = known["generates"] if stage is None else stage.generates
        self.given: Sequence[Variable] = known["given"] if stage is None else stage.given
        self.conditionals: frozenset[frozenset[str]] = known["conditionals"] if stage is None else stage.conditionals
        self.learns = stage is None or learns(stage)
        self._build = build if stage is None else lambda: stage

    @cached_property
    def built(self) -> Stage:
        return self._build()

    def cost(self, moving: Collection[str], **settings: Any) -> Cost:
        return self.built.cost(moving, **settings)

    def sample(self, given: Values, draws: Draws) -> Iterator[State]:
        return self.built.sample(given, draws)

    def loss(self, batch: Values, draws: Draws) -> Tensor:
        return self.built.loss(batch, draws)


class Stages(Mapping[str, Stage]):
    """Stages by name. A recipe's stage loads its weights on first use; until then its outline stands in for it."""

    def __init__(
        self,
        stages: Iterable[Stage],
        load: Callable[[str], Stage] | None = None,
        begin: Callable[[str], Stage] | None = None,
    ):
        self.outlines = {stage.name: stage for stage in stages}
        self.loaded: dict[str, Stage] = {} if load else dict(self.outlines)
        self._load, self._begin, self._device = load, begin, None
        self._read: dict[str, list[Any] | None] = {}  # stages' tensors as they were read; None: released again

    def __getitem__(self, name: str) -> Stage:
        if name not in self.outlines:
            raise KeyError(f"there is no stage '{name}'{did_you_mean(name, self.outlines)}")
        found = self.loaded.get(name)
        if found is None or self._read.get(name, ()) is None:
            assert self._load is not None
            read = _moved(self._load(name), self._device)
            for own, value in zip(_tensors(found), _tensors(read) if found else (), strict=True):
                own.data = value.data
            found = self.loaded[name] = found or read
            self._read[name] = _versions(found)
        return found

    def releasable(self, name: str) -> bool:
        """Whether a stage's weights can be read again: nobody has changed them since they were."""
        found = self.loaded.get(name)
        return self._load is not None and (found is None or self._read.get(name) in (None, _versions(found)))

    def only(self, name: str) -> Stage:
        """A stage, while the others' weights take no memory: they are read again when these are next used."""
        for other in self.loaded:
            if other != name and self.releasable(other):
                for tensor in _tensors(self.loaded[other]):
                    tensor.data = tensor.new_empty(0)
                self._read[other] = None
        return self[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.outlines)

    def __len__(self) -> int:
        return len(self.outlines)

    def trainable(self) -> Iterator[tuple[str, Stage]]:
        """Trainable stages; one without weights yet as initialised."""
        for name, outline in self.outlines.items():
            if learns(outline):
                yield name, self._begin(name) if self._begin is not None and name not in self.loaded else self[name]

    def to(self, device: str | torch.device) -> None:
        """Move the stages that are loaded, and later ones as they are."""
        self._device = device
        for stage in self.loaded.values():
            _moved(stage, device)

    def __repr__(self) -> str:
        return f"{{{', '.join(f'{name}: {stage!r}' for name, stage in self.outlines.items())}}}"


def _tensors(stage: Stage | None) -> list[Tensor]:
    return [*stage.parameters(), *stage.buffers()] if isinstance(stage, nn.Module) else []


def _versions(stage: Stage) -> list[Any]:
    """Equal as long as its weights are those tensors, and nothing was written into them."""
    return [(id(tensor), tensor._version) for tensor in _tensors(stage)]


def _moved(stage: Stage, device: str | torch.device | None) -> Stage:
    return stage.to(device) if isinstance(stage, nn.Module) and device is not None else stage


def learns(stage: object) -> TypeGuard[Any]:
    """Whether a stage is trainable: a `torch.nn.Module` with parameters."""
    if isinstance(stage, Outline):
        return stage.learns
    return isinstance(stage, nn.Module) and any(True for _ in stage.parameters())


@contextmanager
def evaluating(stage: object) -> Iterator[None]:
    """Evaluation mode inside, without dropout and the like; training mode is restored afterwards."""
    training = [part for part in stage.modules() if part.training] if isinstance(stage, nn.Module) else []
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True
