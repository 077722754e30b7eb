"""The lock of a run, which is a recipe with everything resolved, and the schema by which editors check recipes."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chaindiff.io.files import write_whole
from chaindiff.specs.load import LOCK
from chaindiff.specs.recipe import Recipe
from chaindiff.specs.yaml import dump

_STRICT = {"required", "discriminator"}


def resolved(recipe: Recipe) -> str:
    """The recipe as YAML with every default and override in it."""
    return dump(recipe.model_dump(mode="json"))


def write_lock(directory: Path, recipe: Recipe, extra: Mapping[str, Any]) -> Path:
    """Writes recipe.lock.yaml: the resolved recipe, and `extra` (versions, execution, weights digests) under `lock`.

    `load_recipe` reads it again, `extra` as `Loaded.lock`. The file is whole at any moment.
    """
    plain = json.loads(json.dumps(dict(extra), default=str))
    path = directory / LOCK
    write_whole(path, resolved(recipe) + dump({"lock": plain}))
    return path


def json_schema() -> dict[str, Any]:
    """The JSON Schema of recipe files. A stage that uses a card may leave out any field, at any depth."""
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    partial: dict[str, Any] = {}
    _relax("StageSpec", definitions, partial)
    use = {"type": "string", "description": "a stage card, by name or path; the fields beside it override the card's"}
    part = partial["StageSpecPart"]
    part["properties"] = {"use": use, **part["properties"]}
    part["required"] = ["use"]
    stages = schema["properties"]["stages"]
    choice = {
        "if": {"required": ["use"]},
        "then": {"$ref": "#/$defs/StageSpecPart"},
        "else": {"$ref": "#/$defs/StageSpec"},
    }
    stages["patternProperties"] = dict.fromkeys(stages["patternProperties"], choice)
    stages["additionalProperties"] = False
    definitions.update(partial)
    lock = {"type": "object", "description": "written by chaindiff: what a run resolved beside the recipe"}
    schema["properties"]["lock"] = lock
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _relax(name: str, definitions: Mapping[str, Any], partial: dict[str, Any]) -> str:
    """Adds a copy of a definition in which no field is required, and of all that it refers to; returns its name."""
    part = f"{name}Part"
    if part not in partial:
        partial[part] = {}
        partial[part] = _relaxed(copy.deepcopy(definitions[name]), definitions, partial)
    return part


def _relaxed(schema: Any, definitions: Mapping[str, Any], partial: dict[str, Any]) -> Any:
    if isinstance(schema, list):
        return [_relaxed(item, definitions, partial) for item in schema]
    if not isinstance(schema, dict):
        return schema
    # Without a required `kind` a mapping may fit several members of a union.
    renamed = {"anyOf" if key == "oneOf" else key: value for key, value in schema.items() if key not in _STRICT}
    for key, value in renamed.items():
        if key == "$ref":
            renamed[key] = f"#/$defs/{_relax(value.rsplit('/', 1)[1], definitions, partial)}"
        elif key != "default":
            renamed[key] = _relaxed(value, definitions, partial)
    return renamed
