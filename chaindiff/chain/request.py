"""Requests to a chain, read and checked, and previews of their progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from chaindiff.chain.diffusion import Diffusion
from chaindiff.chain.graph import Plan
from chaindiff.chain.stage import Stage
from chaindiff.chain.variable import Variable
from chaindiff.edm.denoiser import State
from chaindiff.io.errors import UserError, did_you_mean

TILE = 16  # samples per call whenever results must not depend on the batch size
Value = Tensor | list[str]  # texts are lists
Given = Mapping[str, Any]  # values as a user gives them


@dataclass(frozen=True)
class Preview:
    """A stage's progress: its variables after a step, their denoised values and their noise levels.

    A stage that is not a diffusion model may report its state alone. `done` is the share of the whole request.
    """

    stage: str
    samples: Sequence[int]
    x: State
    x0: State
    sigma: Mapping[str, float]
    step: int
    steps: int
    done: float


@dataclass(frozen=True)
class Request:
    """A request to a chain; see `Chain.sample`."""

    plan: Plan
    given: Mapping[str, Value]
    count: int
    seed: int
    batch: int
    exact: bool
    noise: int | Sequence[int]
    settings: Mapping[str, Mapping[str, Any]]
    placement: tuple[str | torch.device | None, torch.dtype | None] = (None, None)
    ways: Mapping[str, str] = field(default_factory=dict)  # how networks are executed, by fields of `sample`
    frugal: bool = False  # no weights are kept but those of the stage that runs

    @property
    def size(self) -> int:
        """Samples of one call."""
        return TILE if self.exact else self.batch


# ------------------------------------------------------------ what is given


def plain_values(given: Given, variables: Mapping[str, Variable]) -> dict[str, Value]:
    """Values for a chain without a recipe: tensors, numbers, texts, classes by number."""
    found: dict[str, Value] = {}
    for name, value in given.items():
        variable = variables.get(name)
        if isinstance(value, Tensor) or (variable is None and not _texts(value)):
            found[name] = value if isinstance(value, Tensor) else torch.as_tensor(value)
        elif _texts(value):
            if variable is not None and variable.kind != "text":
                raise UserError(f"given '{name}' is text, but {variable} takes numbers here")
            found[name] = [value] if isinstance(value, str) else list(value)
        else:
            tensor = torch.as_tensor(value)
            found[name] = tensor[None] if tensor.ndim == 0 else tensor
    return found


def checked(name: str, value: Value, variables: Mapping[str, Variable], count: int) -> Value:
    """A given value, checked to fit the request's count and the variable's shape."""
    variable = variables.get(name)
    if variable is None:
        return value  # a text that an encoder reads; or the resolver refuses it with the nearest name
    shape = tuple(value.shape[1:]) if isinstance(value, Tensor) else ()
    if shape not in variable.value_shapes or len(value) not in (1, count):
        said = list(value.shape) if isinstance(value, Tensor) else [len(value)]
        expected = ", ".join(map(str, (count, *variable.value_shapes[0])))
        raise UserError(f"given '{name}' has shape {said}; expected [{expected}]", hint="or one row for all samples")
    return value


def _texts(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(part, str) for part in value)
    )


def rows_of(value: Value, rows: Sequence[int]) -> Value:
    """These rows of a value; one row stands for all."""
    if len(value) == 1:
        return value.expand(len(rows), *value.shape[1:]) if isinstance(value, Tensor) else value * len(rows)
    return value[list(rows)] if isinstance(value, Tensor) else [value[row] for row in rows]


# ------------------------------------------------------------ settings of a call


def tuned(running: Sequence[Stage], said: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A call's settings for each diffusion stage, which takes the guidance scales of its own given variables only.

    Raises UserError for settings that no stage takes.
    """
    stages = {stage.name: stage for stage in running if isinstance(stage, Diffusion)}
    droppable = {name: stage.sampling().droppable for name, stage in stages.items()}
    guidance, rest = said.get("guidance"), {key: value for key, value in said.items() if key != "guidance"}
    if rest and not stages:
        raise UserError(f"{', '.join(rest)}: no diffusion stage runs here")
    known = [variable for names in droppable.values() for variable in names]
    scaled = guidance if isinstance(guidance, Mapping) else {}
    if strange := [variable for variable in scaled if variable not in known]:
        raise UserError(f"guidance: no stage that runs can go without '{strange[0]}'{did_you_mean(strange[0], known)}")
    if guidance is not None and guidance != 1 and not known:
        raise UserError("guidance: no stage that runs was trained with dropout on what it is given")
    found = {}
    for name, own in droppable.items():
        mine = {variable: scale for variable, scale in scaled.items() if variable in own}
        asks = mine if scaled else guidance if own else None
        found[name] = {**rest, "guidance": asks} if asks else dict(rest)
    return found
