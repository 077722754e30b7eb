"""The interface of encoders: values of a variable, and the identity of their features."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from chaindiff.io.errors import UserError
from chaindiff.specs.code import CodeEncoderSpec
from chaindiff.specs.recipe import VariableSpec


class Encoder:
    """A deterministic map from the variable `of` to the variable `name`: value = scale(features(x)).

    The features of expensive encoders are cached, under their `features_identity`; `scale` reduces and
    standardises them.
    """

    name: str
    of: str

    def features(self, x: Any) -> Tensor:
        raise NotImplementedError

    def scale(self, features: Tensor) -> Tensor:
        return features

    def __call__(self, x: Any) -> Tensor:
        return self.scale(self.features(x))

    @cached_property
    def features_identity(self) -> dict[str, Any]:
        """What the features are: the kind of encoder, its weights and its preprocessing; never its name in a recipe."""
        return {}


class OwnEncoder(Encoder):
    """A user-defined encoder, computed whenever it is needed: nothing is cached, fitted or scaled."""

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
            problem = f"'{self.spec.kind}' returns {found} for {len(x)} values of '{self.of}'; expected {expected}"
            raise UserError(problem, f"variables.{self.name}.encoder")
        return values
