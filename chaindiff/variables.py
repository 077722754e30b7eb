"""Variables: the named random quantities of a chain, and what a value of one looks like as a tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from chaindiff.specs.recipe import FileSpec, VariableSpec


def digest(value: Any) -> str:
    """A short, stable fingerprint of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Variable:
    """A named random quantity.

    A value is a tensor [batch, *shape]; a label's is an integer [batch] below `shape[0]`. Images lie in [-1, 1].
    `meaning` says what the numbers are (for an encoder's output: which encoder, of what, how scaled); two variables may
    be joined by a link only if their identities agree.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    sigma_data: float = 0.5
    meaning: str = ""

    @classmethod
    def image(cls, name: str, channels: int, size: int) -> Variable:
        return cls(name, "image", (channels, size, size))

    @classmethod
    def vector(cls, name: str, width: int) -> Variable:
        return cls(name, "vector", (width,))

    @classmethod
    def label(cls, name: str, classes: int) -> Variable:
        return cls(name, "label", (classes,))

    @classmethod
    def tokens(cls, name: str, length: int, width: int) -> Variable:
        return cls(name, "tokens", (length, width))

    @classmethod
    def from_specs(cls, name: str, specs: Mapping[str, VariableSpec]) -> Variable:
        """The variable that a recipe declares; its meaning covers the encoders behind it, whatever they are called."""
        spec = specs[name]
        return cls(
            name, spec.kind, tuple(spec.shape), spec.sigma_data, json.dumps(meaning(name, specs), sort_keys=True)
        )

    @property
    def identity(self) -> str:
        """Equal for equal meaning, whatever the variable's name in a recipe."""
        meaning = self.meaning or self.name
        return digest({"kind": self.kind, "shape": self.shape, "sigma_data": self.sigma_data, "meaning": meaning})

    def __str__(self) -> str:
        return f"{self.name} [{' x '.join(map(str, self.shape))}]"


def meaning(name: str, specs: Mapping[str, VariableSpec]) -> dict[str, Any]:
    """What a variable's numbers are, as plain data: its encoder with the variable that it reads in place of a name."""
    spec = specs[name]
    plain: dict[str, Any] = {"kind": spec.kind, "shape": list(spec.shape)}
    if spec.encoder is not None:
        encoder = spec.encoder.model_dump(exclude={"of", "path"})
        if isinstance(spec.encoder, FileSpec):
            plain["encoder"] = {**encoder, "identity": spec.encoder.called}
        else:
            plain["encoder"] = {**encoder, "of": meaning(spec.encoder.of, specs)}
    elif spec.kind in ("label", "text"):
        plain["field"] = spec.of or name
    return plain
