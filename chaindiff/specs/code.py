"""User-defined code in a recipe, `kind: "my.module:Net"`: its specs, and where a recipe names it. Imports no code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from pydantic import BaseModel, Discriminator, Field, Tag

from chaindiff.specs.base import Name, Spec

CODE = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"
HINT = "add --allow-code if you trust this recipe and the code that it names (in Python, allow_code=True)"


class CodeSpec(Spec):
    """A user-defined class, imported from its module; needs `--allow-code`."""

    kind: str = Field(pattern=f"^{CODE}$", description="`MODULE:NAME`, such as `my_package.networks:Mixer`")
    settings: dict[str, Any] = Field(default={}, description="its keyword arguments")


class CodeEncoderSpec(CodeSpec):
    """A user-defined encoder, imported from its module; needs `--allow-code`."""

    of: Name


class CodeDataSpec(CodeSpec):
    """User-defined data, imported from its module; needs `--allow-code`."""

    @property
    def split(self) -> str | None:
        """The split, if the code takes one: then it has others too."""
        return self.settings.get("split")


# Tags of a union of built-in specs and user-defined code, which separate the two before `kind` selects a built-in one.
OURS, THEIRS = "ours", "code"
Ours, Theirs = Tag(OURS), Tag(THEIRS)


def is_code(kind: Any) -> TypeGuard[str]:
    """Whether a `kind` names code rather than something built in."""
    return isinstance(kind, str) and ":" in kind


def _tag(said: Any) -> str:
    kind = said.get("kind") if isinstance(said, Mapping) else getattr(said, "kind", None)
    return THEIRS if is_code(kind) else OURS


OURS_OR_CODE = Discriminator(_tag)


def code_in(spec: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """All code that a spec names, as (field, kind)."""
    if isinstance(spec, BaseModel):
        if is_code(kind := getattr(spec, "kind", None)):
            yield f"{path}kind", kind
        parts = [(name, part) for name, part in spec if name != "settings"]
    else:
        parts = list(spec.items() if isinstance(spec, dict) else enumerate(spec) if isinstance(spec, list) else ())
    for name, part in parts:
        yield from code_in(part, f"{path}{name}.")
