"""What every encoder offers: values of a variable, and an identity that says what the values are."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor

from chaindiff.io.digest import fingerprint


class Encoder:
    """A deterministic map from the variable `of` to the variable `name`: value = scale(features(x)).

    The features are what is worth keeping in a cache if the encoder is `cached`, that is, expensive; `scale` reduces
    and standardises them, which needs statistics in some cases: `fitted` tells whether they are there.
    """

    name: str
    of: str
    cached = False

    def features(self, x: Any) -> Tensor:
        raise NotImplementedError

    def scale(self, features: Tensor) -> Tensor:
        return features

    def __call__(self, x: Any) -> Tensor:
        return self.scale(self.features(x))

    @property
    def fitted(self) -> bool:
        return True

    @cached_property
    def features_identity(self) -> dict[str, Any]:
        """What the features are: the kind of encoder, its weights and its preprocessing; never its name in a recipe."""
        raise NotImplementedError

    @property
    def identity(self) -> dict[str, Any]:
        """What the values are: the features, and how they are reduced and scaled."""
        return self.features_identity

    @property
    def key(self) -> str:
        """sha256 of the identity, in hexadecimal."""
        return fingerprint(self.identity)
