"""What every encoder offers: values of a variable, and what says how its features come about."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor


class Encoder:
    """A deterministic map from the variable `of` to the variable `name`: value = scale(features(x)).

    The features of expensive encoders are kept, under their `features_identity`; `scale` reduces and standardises them.
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
