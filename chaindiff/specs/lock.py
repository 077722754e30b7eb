"""The lock file of a run, a fully resolved recipe, and the JSON Schema with which editors check recipes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chaindiff.io.files import write_whole
from chaindiff.specs.load import LOCK
from chaindiff.specs.recipe import Recipe
from chaindiff.specs.stage import StageSpec
from chaindiff.specs.yaml import dump

_STRICT = {"required", "discriminator"}


def resolved(recipe: Recipe) -> str:
    """The recipe as YAML with every default and override in it."""
    return dump(recipe.model_dump(mode="json"))


def write_lock(directory: Path, recipe: Recipe, extra: Mapping[str, Any]) -> Path:
    """Writes recipe.lock.yaml: the resolved recipe, and `extra` (versions, execution, weights digests) under `lock`.

    `load_recipe` reads it back, `extra` as `Loaded.lock`. Writing is atomic.
    """
    plain = json.loads(json.dumps(dict(extra), default=str))
    path = directory / LOCK
    write_whole(path, resolved(recipe) + dump({"lock": plain}))
    return path


def json_schema() -> dict[str, Any]:
    """The JSON Schema of recipe files. A stage that uses a card may leave out any field, at any depth."""
    schema, part = Recipe.model_json_schema(), _partial(StageSpec.model_json_schema())
    use = {"type": "string", "description": "a stage card, by name or path; the fields beside it override the card's"}
    schema["$defs"] |= part.pop("$defs")
    schema["$defs"]["StageSpecPart"] = {**part, "properties": {"use": use, **part["properties"]}, "required": ["use"]}
    stages = schema["properties"]["stages"]
    choice = {
        "if": {"required": ["use"]},
        "then": {"$ref": "#/$defs/StageSpecPart"},
        "else": {"$ref": "#/$defs/StageSpec"},
    }
    stages["patternProperties"] = dict.fromkeys(stages["patternProperties"], choice)
    stages["additionalProperties"] = False
    lock = {"type": "object", "description": "written by chaindiff: what a run resolved besides the recipe"}
    schema["properties"]["lock"] = lock
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _partial(schema: dict[str, Any]) -> dict[str, Any]:
    """A copy of a schema in which no field is required, its definitions and references renamed to NAMEPart."""

    def relaxed(said: dict[str, Any]) -> dict[str, Any]:
        # Without a required `kind`, a mapping may match several members of a union.
        said = {"anyOf" if key == "oneOf" else key: value for key, value in said.items() if key not in _STRICT}
        return said if "$ref" not in said else {**said, "$ref": f"{said['$ref']}Part"}

    copy = json.loads(json.dumps(schema), object_hook=relaxed)
    return {**copy, "$defs": {f"{name}Part": below for name, below in copy["$defs"].items()}}
