"""The reference of recipes, written from their schema: `python -m chaindiff.specs.reference` prints it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, is_dataclass
from types import NoneType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from chaindiff.specs.fields import limit, models
from chaindiff.specs.recipe import Recipe
from chaindiff.specs.stage import StageSpec

HEAD = """# Recipe reference

Every field of a recipe, of a stage and of what they hold. `chaindiff schema` prints the same for editors, and
`chaindiff show RECIPE` a recipe with every default in place. A field without a default must be given. Unknown fields
are refused, with the line and the nearest name.

A stage that says `use: CARD` starts from that stage card; what stands beside `use` goes over the card's fields, one by
one. The same names work on the command line, `--set stages.image.sample.steps=20`, and in Python,
`chaindiff.load(recipe, stages={"image": {"sample": {"steps": 20}}})`. In place of the name of a stage, a variable or a
given value, `*` means all of them: `--set "stages.*.sample.steps=20"`. The fields that map names to plain values
(`sample.given`, `data.where`) are cleared by `{}`, and lose one entry by `null`: `--set sample.given.group=null`.

*This page is generated: `python -m chaindiff.specs.reference > docs/recipe-reference.md`.*
"""
_PLAIN = {int: "whole number", float: "number", str: "text", bool: "true or false", Any: "anything"}


def page() -> str:
    """The page in Markdown: a section for every model, in the order in which a reader meets them."""
    return "\n".join([HEAD, *(_section(model) for model in _reached(Recipe, []))])


def _reached(model: type[BaseModel], seen: list[type[BaseModel]]) -> list[type[BaseModel]]:
    """The model and all that its fields may hold, depth first, each once."""
    if model not in seen:
        seen.append(model)
        for field in model.model_fields.values():
            for below in _models(field.annotation):
                _reached(below, seen)
    return seen


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a type mentions at any depth."""
    yield from (found := models(annotation))
    if not found:
        for part in get_args(annotation):
            yield from _models(part)


def title(model: type[BaseModel]) -> str:
    """A heading: the model's name, and the `kind` that chooses it where others may stand."""
    name = model.__name__.removesuffix("Spec").lower()
    kind = model.model_fields.get("kind")
    choices = get_args(kind.annotation) if kind else ()
    return f"{name} (`kind: {choices[0]}`)" if len(choices) == 1 else name


def _anchor(model: type[BaseModel]) -> str:
    return "".join(c for c in title(model).lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _section(model: type[BaseModel]) -> str:
    lines = [f"## {title(model)}", ""]
    if model.__doc__:
        lines += [" ".join(model.__doc__.split()), ""]
    lines += ["| field | type | default | |", "|---|---|---|---|"]
    if model is StageSpec:
        lines.append("| `use` | text | none | a stage card, by name or path; these fields go over the card's |")
    lines += [_row(name, field) for name, field in model.model_fields.items()]
    return "\n".join([*lines, ""])


def _row(name: str, field: FieldInfo) -> str:
    cells = [f"`{name}`", _limited(field.annotation, field.metadata), _default(field), field.description or ""]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |".replace("|  |", "| |")


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "**required**"
    value = field.default
    if isinstance(value, BaseModel):
        said = value.model_dump(mode="json", exclude_defaults=True)
        return f"`{json.dumps(said)}`" if said else "its defaults"
    return "none" if value is None else f"`{json.dumps(value)}`"


def _type(annotation: Any) -> str:
    """A type in words, models as links to their sections."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _limited(arguments[0], arguments[1:])
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin is Union or type(annotation).__name__ == "UnionType":
        return " or ".join(dict.fromkeys(_type(part) for part in arguments if part is not NoneType))
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is tuple:
        return f"list: {', '.join(map(_type, arguments))}"
    if origin is dict:
        return f"mapping of {_type(arguments[0])} to {_type(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{title(annotation).replace('`', '')}](#{_anchor(annotation)})"
    return _PLAIN.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _limited(annotation: Any, metadata: Sequence[Any]) -> str:
    """A type and the limits of its numbers, whether given bare or within pydantic's Field."""
    parts = [m for part in metadata for m in (part.metadata if isinstance(part, FieldInfo) else [part])]
    limits = [limit(asdict(part)) for part in parts if is_dataclass(part)]
    return " ".join([_type(annotation), ", ".join(filter(None, limits))]).strip()


if __name__ == "__main__":
    print(page(), end="")
