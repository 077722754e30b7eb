"""An encoder of one's own: any object that makes values of values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from chaindiff.encoders.base import Encoder
from chaindiff.io.errors import UserError
from chaindiff.specs.code import CodeEncoderSpec
from chaindiff.specs.recipe import VariableSpec


class OwnEncoder(Encoder):
    """What `made` makes of a batch of values, computed whenever it is needed: nothing is cached, fitted or scaled."""

    def __init__(self, name: str, spec: CodeEncoderSpec, variable: VariableSpec, made: Callable[[Any], Tensor]):
        self.name, self.of, self.spec = name, spec.of, spec
        self.shape = [] if variable.kind == "label" else variable.shape
        self.made = made.eval() if isinstance(made, nn.Module) else made

    @torch.no_grad()
    def features(self, x: Any) -> Tensor:
        if isinstance(self.made, nn.Module) and isinstance(x, Tensor):
            self.made.to(x.device)
        values = self.made(x)
        found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        if found != (expected := [len(x), *self.shape]):
            problem = f"'{self.spec.kind}' makes {found} of {len(x)} values of '{self.of}'; expected {expected}"
            raise UserError(problem, f"variables.{self.name}.encoder")
        return values
