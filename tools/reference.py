"""The recipe reference, generated from the JSON Schema: `python -m tools.reference` prints it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from chaindiff.specs.recipe import Recipe

HEAD = """# Recipe reference

Every field of a recipe, of a stage and of the objects in them. `chaindiff schema` prints the same for editors, and
`chaindiff show RECIPE` a recipe with every default in place. A field without a default must be given. Unknown fields
are refused, with the line and the nearest name.

A stage with `use: CARD` starts from that stage card; the fields beside `use` override the card's, one by one. The same
names work on the command line, `--set stages.image.sample.steps=20`, and in Python,
`chaindiff.load(recipe, stages={"image": {"sample": {"steps": 20}}})`. In place of the name of a stage, a variable or a
given value, `*` means all of them: `--set "stages.*.sample.steps=20"`. The fields that map names to plain values
(`sample.given`, `data.where`) are cleared with `{}`; `null` removes one entry: `--set sample.given.group=null`.

*This page is generated: `python -m tools.reference > docs/recipe-reference.md`.*
"""
_PLAIN = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
_LIMITS = {"exclusiveMinimum": "above", "minimum": "at least", "exclusiveMaximum": "below", "maximum": "at most"}

Schema = Mapping[str, Any]


def page() -> str:
    """The page in Markdown: a section for every model, in reading order."""
    recipe = Recipe.model_json_schema()
    models = {"Recipe": recipe, **recipe["$defs"]}
    return "\n".join([HEAD, *(_section(name, models) for name in _reached("Recipe", models, []))])


def _reached(name: str, models: Schema, seen: list[str]) -> list[str]:
    """The model and all models reachable from its fields, depth first, each once."""
    if name not in seen:
        seen.append(name)
        for below in re.findall(r'"\$ref": "#/\$defs/(\w+)"', json.dumps(models[name]["properties"])):
            _reached(below, models, seen)
    return seen


def _title(name: str, models: Schema) -> str:
    """A heading: the model's name, and the `kind` that selects it among others."""
    kind = models[name]["properties"].get("kind", {}).get("const")
    return name.removesuffix("Spec").lower() + (f" (`kind: {kind}`)" if kind else "")


def _section(name: str, models: Schema) -> str:
    model = models[name]
    lines = [f"## {_title(name, models)}", ""]
    if "description" in model:
        lines += [" ".join(model["description"].split()), ""]
    lines += ["| field | type | default | |", "|---|---|---|---|"]
    if name == "StageSpec":
        lines.append("| `use` | text | none | a stage card, by name or path; these fields override the card's |")
    for field, said in model["properties"].items():
        default = "**required**" if field in model.get("required", ()) else _default(said["default"])
        cells = [f"`{field}`", _type(said, models), default, said.get("description", "")]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |".replace("|  |", "| |"))
    return "\n".join([*lines, ""])


def _default(value: Any) -> str:
    if value is None:
        return "none"
    return "its defaults" if isinstance(value, dict) and value else f"`{json.dumps(value)}`"


def _type(said: Any, models: Schema) -> str:
    """A type in words, models as links to their sections."""
    match said:
        case {"$ref": reference}:
            title = _title(reference.rpartition("/")[2], models).replace("`", "")
            anchor = re.sub(r"[^\w-]", "", title.replace(" ", "-"))
            return f"[{title}](#{anchor})"
        case {"enum": choices}:
            return ", ".join(f"`{choice}`" for choice in choices)
        case {"const": choice}:
            return f"`{choice}`"
        case {"anyOf": parts} | {"oneOf": parts}:
            return " or ".join(dict.fromkeys(_type(part, models) for part in parts if part != {"type": "null"}))
        case {"prefixItems": parts}:
            return f"list: {', '.join(_type(part, models) for part in parts)}"
        case {"items": item}:
            return f"list of {_type(item, models)}"
        case {"patternProperties": values}:
            return f"mapping of text to {_type(next(iter(values.values())), models)}"
        case {"additionalProperties": value}:
            return f"mapping of text to {_type(value, models)}"
        case {"type": kind}:
            limits = ", ".join(f"{word} {said[name]:.7g}" for name, word in _LIMITS.items() if name in said)
            return f"{_PLAIN[kind]} {limits}".strip()
    return "anything"


if __name__ == "__main__":
    print(page(), end="")
