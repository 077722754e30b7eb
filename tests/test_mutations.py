"""Any mutation of any recipe loads, or is explained by one message that names its file."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recipe_text import FIXTURES

from chaindiff import cli
from chaindiff.io.errors import UserError
from chaindiff.specs.load import SHIPPED, load_recipe
from chaindiff.specs.lock import resolved
from chaindiff.specs.recipe import Recipe
from chaindiff.specs.yaml import dump, read

RECIPES = [*sorted((SHIPPED / "recipes").glob("*.yaml")), *sorted((FIXTURES / "recipes").glob("*.yaml"))]
TEXTS = [path.read_text() for path in RECIPES]
# As said, and with every default and every field of the cards said too.
TREES = [read(path).plain() for path in RECIPES] + [
    yaml.safe_load(resolved(load_recipe(path).recipe)) for path in RECIPES
]

fixed = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the mutated recipe is written, with the fixtures' cards beside it."""
    home = tmp_path_factory.mktemp("mutations")
    (home / "recipes").mkdir()
    (home / "stages").symlink_to(FIXTURES / "stages")
    return home / "recipes"


def loads_or_is_explained(path: Path) -> None:
    """`load_recipe` checks too; whatever is wrong, the message names the file, or the card that the file uses."""
    try:
        loaded = load_recipe(path)
    except UserError as error:
        text = str(error)
        assert re.search(r"\w\.yaml\b", text) and "Traceback" not in text, text
        assert all(line.strip() for line in text.splitlines())
    else:
        assert Recipe.model_validate(loaded.recipe.model_dump()) == loaded.recipe
        assert load_again(resolved(loaded.recipe), path) == loaded.recipe


def load_again(text: str, beside: Path) -> Recipe:
    path = beside.with_name("again.yaml")
    path.write_text(text)
    return load_recipe(path).recipe


def spots(tree, path=()):
    """Every path in a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, below in items:
        yield (*path, key)
        yield from spots(below, (*path, key))


NAMES = sorted({str(path[-1]) for tree in TREES for path in spots(tree)})
WORDS = ["", "image", "clip", "x y", "no", "on", "null", "~", "1e-4", "é", "[key]", "a" * 200, "\u2028", "0x1F", "<<"]
junk = (
    st.sampled_from(WORDS)
    | st.sampled_from([None, True, False, -1, 0, 3, 2**62, -(2**62), 10**30, 1e308, 0.5, -0.0, math.nan, math.inf])
    | st.sampled_from(
        [[], [1], ["clip"], [[]], [None], {}, {"kind": "prior"}, {"use": "x"}, {"kind": ["unet"]}, {"0": 1}]
    )
    | st.text("ab1_-. :", max_size=5)
)


def mutate(tree, draw) -> None:
    """One change somewhere: a part deleted, swapped, repeated, renamed, moved or of another type."""
    places = list(spots(tree))
    if not places:
        return
    *way, last = draw(st.sampled_from(places))
    parent = tree
    for key in way:
        parent = parent[key]
    action = draw(st.sampled_from(["delete", "retype", "name", "copy", "add"]))
    if action == "delete":
        del parent[last]
    elif action == "copy":
        *other, key = draw(st.sampled_from(places))
        found = tree
        for step in other:
            found = found[step]
        parent[last] = copy.deepcopy(found[key])
    elif action == "add" and isinstance(parent, list):
        parent.insert(last, copy.deepcopy(draw(junk | st.sampled_from(parent))))
    elif action in ("name", "add") and isinstance(parent, dict):
        new = draw(st.sampled_from(NAMES) | st.sampled_from([f"{last}s", f"{last}"[:-1], f"{last} "]))
        parent[new] = parent.pop(last) if action == "name" else copy.deepcopy(parent[last])
    else:
        parent[last] = draw(junk)


@given(st.data())
@settings(fixed, max_examples=250)
def test_mutated_trees(folder, data):
    tree = copy.deepcopy(data.draw(st.sampled_from(TREES)))
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(tree, data.draw)
    path = folder / "mutant.yaml"
    path.write_text(dump(tree))
    loads_or_is_explained(path)


inserts = st.sampled_from(
    ["\t", "  ", "\n", ":", ": ", "- ", "[", "]", "{", "}", "'", '"', "#", " #", "&a ", "*a", "!x ", "|", "%", "@"]
)
inserts |= st.sampled_from(
    ["---\n", "<<: ", "? ", "\x00", "\r", "\ufeff", "\x85", "9" * 400, "name: x\n", "!!python/name:os "]
)


@given(st.data())
@settings(fixed, max_examples=200)
def test_mutated_texts(folder, data):
    text = data.draw(st.sampled_from(TEXTS))
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 12)))
        new = data.draw(inserts | st.just("") | st.text(max_size=4))
        lines = text.splitlines(keepends=True)
        action = data.draw(st.sampled_from(["insert", "replace", "cut", "line"]))
        if action == "insert":
            text = text[:start] + new + text[start:]
        elif action == "replace":
            text = text[:start] + new + text[end:]
        elif action == "cut":
            text = text[:start]
        elif lines:
            line = data.draw(st.integers(0, len(lines) - 1))
            text = "".join([*lines[:line], *([lines[line]] * data.draw(st.sampled_from([0, 2]))), *lines[line + 1 :]])
    path = folder / "mutant.yaml"
    path.write_text(text, "utf-8", "surrogatepass")
    loads_or_is_explained(path)


@given(st.data())
@settings(fixed, max_examples=60)
def test_mutated_bytes(folder, data):
    content = bytearray(data.draw(st.sampled_from(TEXTS)).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = folder / "mutant.yaml"
    path.write_bytes(content)
    loads_or_is_explained(path)


@given(st.data())
@settings(fixed, max_examples=60)
def test_mutated_options(data):
    """`--set` of any field, at any depth, to anything."""
    path = data.draw(st.sampled_from(RECIPES))
    spot = ".".join(map(str, data.draw(st.sampled_from(list(spots(read(path).plain()))))))
    tail = data.draw(st.sampled_from(["", ".x", ".0", ".99999999999999999999999", "s"]))
    new = data.draw(
        st.sampled_from(["", "3", "-1", "[]", "{}", "x", "[", "'", "{a: 1}", "\ud800", "*a", "1e999", "0x" + "f" * 99])
    )
    option = f"{spot}{tail}={new}"
    try:
        load_recipe(path, changes=[option])
    except UserError as error:
        assert "--set" in str(error) or ".yaml" in str(error)


@given(st.data())
@settings(fixed, max_examples=25)
def test_mutants_on_the_command_line(folder, data):
    """Status 0, or 2 and one message that names the file."""
    tree = copy.deepcopy(data.draw(st.sampled_from(TREES)))
    mutate(tree, data.draw)
    path = folder / "mutant.yaml"
    path.write_text(dump(tree))
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr(
            "sys.stderr", type("Stderr", (), {"write": lambda _, text: printed.append(text), "flush": lambda _: None})()
        )
        with pytest.raises(SystemExit) as ended:
            cli.main(["show", str(path)])
    error = "".join(printed)
    assert ended.value.code in (0, 2)
    assert (error.startswith("error: ") and ".yaml" in error and "Traceback" not in error) == (ended.value.code == 2)
