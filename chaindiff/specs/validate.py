"""Pydantic's errors in plain words: file and line, the field, what is wrong, the nearest valid name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from chaindiff.io.errors import Lines, UserError, did_you_mean
from chaindiff.specs.base import PROBLEM
from chaindiff.specs.code import CODE
from chaindiff.specs.fields import child, kinds, model_of, tagged
from chaindiff.specs.stage import StageSpec
from chaindiff.specs.yaml import Node, describe, wrap

# Sampling options of a link are under `sample.links`; they used to be beside its training options.
MOVED = {"sample_noise": "noise", "sample_keep": "keep", "sample_absent": "absent"}
MOST = 10  # mistakes that one message lists

Model = TypeVar("Model", bound=BaseModel)

_EXPECTED = {
    "int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "list": "a list",
    "tuple": "a list", "dict": "fields (a mapping)", "model": "fields (a mapping)",
}  # fmt: skip
_LIMITS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def config(kind: Any, said: Any, where: str) -> Any:
    """The config object that a Python mapping describes, or the object itself; `where` is for messages.

    Raises UserError as `validate` does.
    """
    return validate(kind, wrap(said, where)) if isinstance(said, Mapping) else said


def validate(model: type[Model], tree: Node) -> Model:
    """The config object of a type (a model, or a union of them) that a tree describes.

    Raises one UserError that lists what is wrong.
    """
    try:
        result = TypeAdapter(model).validate_python(tree.plain())
    except ValidationError as errors:
        raise_all(_merged([_translate(error, tree, model) for error in errors.errors(include_url=False)]))
        raise  # not reached: a ValidationError lists at least one error
    raise_all(list(_coerced(tree, result, ())))
    return result


def raise_all(problems: Sequence[UserError]) -> None:
    """Raises nothing for no problem, the problem itself for one, and a list of them for several."""
    if not problems:
        return
    if len(problems) == 1:
        raise problems[0]
    lines = [str(problem) for problem in problems[:MOST]]
    if len(problems) > MOST:
        lines.append(f"and {len(problems) - MOST} more")
    raise UserError(Lines("\n  ".join([f"{len(problems)} mistakes", *(line.replace("\n", "\n  ") for line in lines)])))


def _merged(problems: Sequence[UserError]) -> list[UserError]:
    """Where a value may have several types, pydantic reports an error for each; they are one mistake."""
    merged: dict[tuple[str | None, str], UserError] = {}
    for problem in problems:
        field, expected, rest = problem.message.partition(": expected ")
        first = merged.setdefault((problem.where, field if expected else problem.message), problem)
        word, _, value = rest.partition(", not ")
        if first is not problem and value:
            known, _, same = first.message.rpartition(", not ")
            first.message = f"{known} or {word}, not {same}"
    return list(merged.values())


def dotted(path: Sequence[str | int]) -> str:
    return ".".join(map(str, path))


def _translate(error: Any, tree: Node, annotation: Any) -> UserError:
    """One of pydantic's errors, with its location stripped of the tags of unions, as a UserError."""
    path: list[str | int] = []
    owner: type[BaseModel] | None = None
    for part in error["loc"]:
        if part in (tags := tagged(annotation)):
            annotation = tags[part]
            continue
        # What pydantic adds to the path: "[key]" for a field's name, or the alternative of a type that it tried.
        kind = tree.deepest(path).get("kind")
        model = model_of(annotation, kind and kind.plain())
        added = part == "[key]" or model is None
        if added and error["type"] != "missing" and tree.deepest(path).get(part) is None:
            continue
        owner, annotation = model, child(model or annotation, part)
        path.append(part)
    code, shown = error["type"], path
    if code == "extra_forbidden":
        *shown, last = path
        names = [*(owner.model_fields if owner else ()), *(["use"] if owner is StageSpec else [])]
        problem = f"unknown field '{last}'{did_you_mean(str(last), names)}"
        if last in MOVED:
            link = tree.deepest(shown).get("variable")
            now = f"sample.links.{link.value if link else 'NAME'}.{MOVED[str(last)]}"
            problem = f"unknown field '{last}'; it is now {now}"
    elif code == "missing":
        *shown, last = path
        problem = f"missing field '{last}'" if isinstance(last, str) else f"missing item {last + 1} of the list"
    elif code == "union_tag_not_found":
        problem = f"missing field 'kind'; known: {', '.join(kinds(annotation))}"
    elif code == "union_tag_invalid":
        said = error["ctx"]["tag"]
        path.append("kind")
        problem = f"unknown kind '{said}'{did_you_mean(said, kinds(annotation))}"
    else:
        problem = _explain(code, error["input"], error.get("ctx", {}), error["msg"])
    return UserError(f"{dotted(shown)}: {problem}" if shown else problem, tree.deepest(path).where)


def _explain(code: str, value: Any, context: dict[str, Any], message: str) -> str:
    """What is wrong with a value, by pydantic's name for the error."""
    if code == PROBLEM:
        return message
    if code == "literal_error":
        names = [name for name in context["expected"].replace(" or ", ", ").replace("'", "").split(", ") if name]
        return f"{describe(value)} is not one of {', '.join(names)}" + (
            did_you_mean(value, names) if isinstance(value, str) else ""
        )
    if code == "finite_number":
        return f"should be a finite number, not {describe(value)}"
    if bound := next((f"{word} {context[name]:.7g}" for name, word in _LIMITS.items() if name in context), None):
        return f"should be {bound}, not {describe(value)}"
    if code == "string_pattern_mismatch" and CODE in context["pattern"]:
        ours = "'diffusion' or " if context["pattern"] != f"^{CODE}$" else ""
        return f"expected {ours}user-defined code, such as my_package.module:Name, not {describe(value)}"
    if code == "string_pattern_mismatch" and context["pattern"].endswith("B$"):
        return f"expected an amount of memory, such as 4GB, not {describe(value)}"
    if code == "string_pattern_mismatch":
        return f"{describe(value)} is not a name: letters, digits and underscores, a letter first"
    if code in ("too_short", "too_long"):
        least = context.get("min_length", context.get("max_length"))
        bound = "at least" if code == "too_short" else "at most"
        return f"expected {bound} {least} item{'s' * (least != 1)}, not {context['actual_length']}"
    if expected := _EXPECTED.get(code.split("_")[0]):
        return f"expected {expected}, not {describe(value)}"
    return f"{message[:1].lower()}{message[1:]} ({describe(value)})"


def _coerced(node: Node, result: Any, path: tuple[str | int, ...]) -> Iterator[UserError]:
    """Values that pydantic turned into another type: a quoted "20" is not a number here, nor is `true`."""
    if isinstance(node.value, dict):
        for key, below in node.value.items():
            if isinstance(result, dict):
                yield from _coerced(below, result[key], (*path, key))
            elif isinstance(result, BaseModel):
                yield from _coerced(below, getattr(result, key), (*path, key))
    elif isinstance(node.value, list) and isinstance(result, (list, tuple)):
        for index, (below, value) in enumerate(zip(node.value, result, strict=True)):
            yield from _coerced(below, value, (*path, index))
    elif isinstance(result, (bool, int, float)) and _species(node.value) != _species(result):
        expected = _EXPECTED[type(result).__name__]
        yield UserError(f"{dotted(path)}: expected {expected}, not {describe(node.value)}", node.where)


def _species(value: Any) -> type:
    """bool, float (for any number), or the value's own type."""
    return float if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value)
