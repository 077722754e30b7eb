"""An encoder of one's own: any object that makes values of values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from chaindiff.encoders.base import Encoder
from chaindiff.specs.code import CodeEncoderSpec
from chaindiff.specs.errors import UserError


class OwnEncoder(Encoder):
    """What `made` makes of a batch of values, computed whenever it is needed: nothing is cached, fitted or scaled."""

    def __init__(self, name: str, spec: CodeEncoderSpec, shape: Sequence[int], made: Callable[[Any], Tensor]):
        if not callable(made):
            problem = f"'{spec.kind}' makes {type(made).__name__}, which cannot be called with a batch of values"
            raise UserError(problem, f"variables.{name}.encoder")
        self.name, self.of, self.spec, self.shape = name, spec.of, spec, list(shape)
        self.made = made.eval() if isinstance(made, nn.Module) else made

    @torch.no_grad()
    def features(self, x: Any) -> Tensor:
        values = self.made(x)
        found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        expected = [len(x)] if isinstance(values, Tensor) and not values.is_floating_point() else [len(x), *self.shape]
        if found != expected:
            problem = f"'{self.spec.kind}' makes {found} of {len(x)} values of '{self.of}'; expected {expected}"
            raise UserError(problem, f"variables.{self.name}.encoder")
        return values

    @cached_property
    def features_identity(self) -> dict[str, Any]:
        return self.spec.model_dump(exclude={"of"})
