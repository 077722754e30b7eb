"""The lock of a run, and the schema by which editors check recipes."""

from __future__ import annotations

import os
from pathlib import Path

import jsonschema
import pytest
import yaml
from recipe_text import RECIPE

from chaindiff.io.errors import UserError
from chaindiff.specs.load import available, load_recipe
from chaindiff.specs.lock import json_schema, resolved, write_lock
from chaindiff.specs.recipe import Recipe
from chaindiff.specs.yaml import read


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_lock_is_the_same_recipe(here):
    recipe = load_recipe(RECIPE, changes=["stages.clip.train.optimizer.eps=1e-9"]).recipe
    extra = {"versions": {"torch": "2.6"}, "execution": "eager", "digests": ["0e1"], "path": Path("x")}
    path = write_lock(here, recipe, extra)
    assert os.listdir(here) == ["recipe.lock.yaml"] and path == here / "recipe.lock.yaml"
    for source in (path, here, "recipe.lock.yaml"):
        loaded = load_recipe(source)
        assert loaded.recipe == recipe
        assert loaded.lock == {**extra, "path": "x"}
    assert Recipe.model_validate({k: v for k, v in yaml.safe_load(path.read_text()).items() if k != "lock"}) == recipe


def test_a_failed_lock_leaves_the_old_one(here, monkeypatch):
    recipe = load_recipe(RECIPE).recipe
    path = write_lock(here, recipe, {"run": 1})

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("chaindiff.io.files.os.fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*recipe.lock.yaml: No space left on device"):
        write_lock(here, recipe, {"run": 2})
    assert os.listdir(here) == ["recipe.lock.yaml"] and load_recipe(path).lock == {"run": 1}


SCHEMA = json_schema()
SHIPPED = sorted(available("recipe").values())


@pytest.mark.parametrize("path", [RECIPE, *SHIPPED], ids=lambda path: path.stem)
def test_recipes_load_and_satisfy_the_schema(path):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(read(path).plain(), SCHEMA)
    loaded = load_recipe(path)
    assert loaded.recipe.description
    jsonschema.validate(yaml.safe_load(resolved(loaded.recipe)), SCHEMA)


@pytest.mark.parametrize(
    ("path", "change"),
    [
        (("stages", "image"), {"chanels": 3}),
        (("stages", "image"), {"network": {"chanels": 3}}),
        (("stages", "image"), {"use": 3}),
        (("stages",), {"clip": {"given": []}}),  # no card, so fields are required
        (("stages",), {"a b": {"use": "x"}}),
        (("variables", "clip"), {"kind": "vectr"}),
        ((), {"sampel": {}}),
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(path, change):
    tree = read(RECIPE).plain()
    below = tree
    for key in path:
        below = below[key]
    below.update(change)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree, SCHEMA)
