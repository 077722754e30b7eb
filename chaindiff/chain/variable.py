"""Variables: the named random quantities of a chain, and what a value of one looks like as a tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic_core import from_json

from chaindiff.io.digest import digest
from chaindiff.specs.clip_models import is_file, placed_folder
from chaindiff.specs.recipe import FileSpec, OpenClipSpec, VariableSpec


@dataclass(frozen=True)
class Variable:
    """A named random quantity.

    A value is a tensor [batch, *shape]; a label's is an integer [batch] below `shape[0]`. Images lie in [-1, 1];
    a map is a grid of features that is no image, such as patch tokens or a latent.
    `meaning` says what the numbers are (for an encoder's output: which encoder, of what, how scaled), by default what
    the data holds under this name. `version` is a digest of the encoder's files and statistics, where they are known.
    Two variables may be joined by a link only if they agree in all of this.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    sigma_data: float = 0.5
    meaning: str = ""
    version: str = ""

    @classmethod
    def image(cls, name: str, channels: int, size: int) -> Variable:
        return cls(name, "image", (channels, size, size))

    @classmethod
    def map(cls, name: str, channels: int, height: int, width: int) -> Variable:
        return cls(name, "map", (channels, height, width))

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
        said = {"kind": self.kind, "shape": self.shape, "sigma_data": self.sigma_data}
        return digest({**said, "meaning": self.meaning or json.dumps(self._plain_meaning, sort_keys=True)})

    def agrees(self, other: Variable) -> bool:
        """Whether the identities are equal, and the versions where both are known."""
        return self.identity == other.identity and (
            self.version == other.version or not (self.version and other.version)
        )

    @property
    def _plain_meaning(self) -> dict[str, Any]:
        """What the data itself holds under this name: for an image, what a recipe means by one without an encoder."""
        own = {"image": {}, "label": {"field": self.name}, "text": {"field": self.name}}
        return {"kind": self.kind, "shape": list(self.shape), **own.get(self.kind, {"name": self.name})}

    @property
    def value_shapes(self) -> list[tuple[int, ...]]:
        """The shapes that one row of a value may have: a label is a number, or a distribution over its classes."""
        return [(), self.shape] if self.kind == "label" else [self.shape]

    def __str__(self) -> str:
        return f"{self.name} [{' x '.join(map(str, self.shape))}]"


def meaning(name: str, specs: Mapping[str, VariableSpec]) -> dict[str, Any]:
    """What a variable's numbers are, as plain data: its encoder with the variable that it reads in place of a name."""
    spec = specs[name]
    plain: dict[str, Any] = {"kind": spec.kind, "shape": list(spec.shape)}
    if spec.encoder is not None:
        encoder = spec.encoder.model_dump(exclude={"of", "path"})
        if isinstance(spec.encoder, OpenClipSpec):  # weights say by `content` which files they were
            if placed_folder(spec.encoder.model) is not None:
                encoder["model"] = "a folder"
            if spec.encoder.pretrained is not None and is_file(spec.encoder.pretrained):
                encoder["pretrained"] = "a file"
        if isinstance(spec.encoder, FileSpec):
            plain["encoder"] = {**encoder, "identity": spec.encoder.called}
        else:
            plain["encoder"] = {**encoder, "of": meaning(spec.encoder.of, specs)}
    elif spec.kind in ("label", "text"):
        plain["field"] = spec.of or name
    return plain


def variable_entry(variable: Variable, fitted: str = "") -> dict[str, Any]:
    """A variable in a weights file: its identity, the digest of what was fitted for it, and its description."""
    return {"identity": variable.identity, "fitted": fitted, **asdict(variable)}


def difference(one: Variable, other: Variable) -> str:
    """How two variables differ, in words: "its shape is [4], not [8]"."""
    mine, theirs = _facts(one), _facts(other)
    different = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
    said = [f"its {key} is {mine.get(key, 'nothing')}, not {theirs.get(key, 'nothing')}" for key in different]
    return "; ".join(said) or "its encoder has other weights or statistics"


def _facts(variable: Variable) -> dict[str, str]:
    """All that tells variables apart, flat, by names such as encoder.reduce.k."""
    try:
        said = from_json(variable.meaning) if variable.meaning else {}
    except ValueError:
        said = variable.meaning
    facts = {"kind": variable.kind, "shape": list(variable.shape), "sigma_data": variable.sigma_data, "meaning": said}
    flat: dict[str, str] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, below in value.items():
                walk(below, f"{path}.{key}" if path else key)
        else:
            flat.setdefault(path.removeprefix("meaning."), json.dumps(value).strip('"'))

    walk(facts, "")
    return flat
