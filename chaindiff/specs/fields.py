"""Pydantic annotations: the models that a place allows, and the types of their fields."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel

from chaindiff.specs.code import OURS, THEIRS, CodeSpec, is_code


def options(annotation: Any) -> list[Any]:
    """The alternatives of a type, without Annotated and None."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return options(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [option for part in get_args(annotation) for option in options(part)]
    return [] if annotation in (None, NoneType) else [annotation]


def models(annotation: Any) -> list[type[BaseModel]]:
    """The models among a type's alternatives; two or more make a union discriminated by `kind`."""
    return [option for option in options(annotation) if isinstance(option, type) and issubclass(option, BaseModel)]


def kinds(annotation: Any) -> dict[str, type[BaseModel]]:
    """The models of a discriminated union by their `kind`; empty for a single model."""
    found = models(annotation)
    if len(found) < 2:
        return {}
    return {kind: model for model in found for kind in get_args(model.model_fields["kind"].annotation)}


def default_kind(annotation: Any) -> str | None:
    """The default kind of a discriminated union."""
    return next((kind for kind, model in kinds(annotation).items() if model.model_fields["kind"].default == kind), None)


def model_of(annotation: Any, kind: Any = None) -> type[BaseModel] | None:
    """The model that validates a mapping in this place, given the mapping's `kind`."""
    found = models(annotation)
    if len(found) == 1:
        return found[0]
    if is_code(kind):
        return next((model for model in found if issubclass(model, CodeSpec)), None)
    return kinds(annotation).get(kind) if isinstance(kind, str) else None


def tagged(annotation: Any) -> dict[str, Any]:
    """The types behind pydantic's tags, which discriminate the members of a union."""
    theirs = [model for model in models(annotation) if issubclass(model, CodeSpec)]
    ours = [model for model in models(annotation) if model not in theirs]
    # `|` cannot make a union of a tuple.
    return {OURS: Union[tuple(ours)], THEIRS: theirs[0]} if ours and theirs else dict(kinds(annotation))  # noqa: UP007


def child(annotation: Any, key: str | int, kind: Any = None) -> Any:
    """The type of the value under a field, key or index; None if nothing is known about it."""
    model = model_of(annotation, kind)
    if model is not None:
        return model.model_fields[key].annotation if key in model.model_fields else None
    for option in options(annotation):
        if get_origin(option) in (dict, list, tuple):
            return get_args(option)[-1 if get_origin(option) is dict else 0]
    return None


def named(annotation: Any) -> bool:
    """Whether this is a mapping from names: stages, variables, given values."""
    return any(get_origin(option) is dict for option in options(annotation))


def named_values(annotation: Any) -> bool:
    """Whether its entries are plain values, which can be removed; stages and variables cannot."""
    return named(annotation) and not models(child(annotation, ""))
