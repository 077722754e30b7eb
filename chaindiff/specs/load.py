"""Recipes and stage cards: found by path or name, merged with their overrides, validated and checked."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from chaindiff.io.errors import UserError, did_you_mean, note
from chaindiff.io.files import user_path
from chaindiff.specs.check import check
from chaindiff.specs.code import HINT, code_in
from chaindiff.specs.merge import merge, nest, refuse_strangers, spread
from chaindiff.specs.recipe import Recipe
from chaindiff.specs.stage import StageSpec
from chaindiff.specs.validate import raise_all, validate
from chaindiff.specs.yaml import Node, assignment, describe, display, read, wrap

LOCK = "recipe.lock.yaml"
PACKAGE = Path(__file__).resolve().parents[1]
# A wheel carries recipes and stages within the package, a checkout beside it.
SHIPPED = PACKAGE if (PACKAGE / "recipes").is_dir() else PACKAGE.parent

What = Literal["recipe", "card"]
_FOLDERS = {"recipe": "recipes", "card": "stages"}
_WHOLE = {"data", "variables", "stages"}  # fields of a recipe that no card has


@dataclass(frozen=True)
class Loaded:
    """A recipe and where it came from. `lock` is what a lock file holds besides the recipe: versions, digests."""

    recipe: Recipe
    path: Path
    node: Node
    lock: dict[str, Any]
    allow_code: bool = False  # set by the caller alone; no file can set it

    @property
    def tree(self) -> dict[str, Any]:
        """The merged fields, without defaults."""
        return self.node.plain()

    def where(self, path: str) -> str | None:
        """The "file:line" of a field such as "stages.image.sample", or of its nearest parent that was set."""
        return self.node.deepest(path.split(".")).where

    @property
    def digests(self) -> dict[str, Any]:
        """Of the weights with which the run was made, by stage: those that no override has named since."""
        found = self.lock.get("weights")
        return found if isinstance(found, dict) else {}

    @property
    def spoken(self) -> str:
        """The recipe as a command names it: by its bare name if it is shipped, else by its path or its run's."""
        shipped = self.path.parent == SHIPPED / _FOLDERS["recipe"]
        path = self.path.parent if self.path.name == LOCK else self.path
        here = path.is_relative_to(Path.cwd())
        return self.path.stem if shipped else os.fspath(path.relative_to(Path.cwd()) if here else path)

    def override(self, changes: Mapping[str, Any]) -> Loaded:
        """This recipe with more overrides, nested mappings, merged and checked like the first ones."""
        layer = spread(wrap(changes, "override"), self.node, Recipe)
        refuse_strangers(self.node, layer)
        return _finish(merge(self.node, layer, Recipe), self.node, self.path, self.lock, self.allow_code)

    def refuse_code(self) -> None:
        """Raises UserError if the recipe names code that was not allowed. Called before anything is built."""
        named = [] if self.allow_code else code_in(self.recipe)
        what = "is code, which runs only if you allow it"
        raise_all([UserError(f"{path}: '{kind}' {what}", self.where(path), HINT) for path, kind in named])


def load_recipe(source: str | Path, changes: Sequence[str] = (), allow_code: bool = False, **overrides: Any) -> Loaded:
    """The recipe at a path, by its name, or in a run's directory.

    `changes` are texts such as "stages.image.sample.steps=20", or "@FILE", a YAML file of a recipe's fields; keyword
    overrides are nested mappings of the same names.
    Code that the recipe names is not imported here, and later only with `allow_code`.
    Raises UserError with file, line, what is wrong and the nearest valid name.
    """
    path = find(source, "recipe")
    recipe = read(path)
    if "network" in recipe.value and not _WHOLE & recipe.value.keys():
        hint = f"a stage of a recipe takes it by `use: {path.stem}`"
        raise UserError("is a stage card, not a recipe", recipe.where, hint)
    lock = recipe.value.pop("lock", Node({}, None))
    if not isinstance(lock.value, dict):
        raise UserError(f"lock: expected fields (a mapping), not {describe(lock.value)}", lock.where)
    layers = [_change(text) for text in changes]
    if overrides:
        layers.append(wrap(overrides, "keyword argument"))
    return _finish(_assemble(recipe, layers, path), recipe, path, lock.plain(), allow_code)


def _change(text: str) -> Node:
    """`FIELD=VALUE`, or `@FILE`: the fields in a YAML file."""
    if not text.startswith("@"):
        return nest(*assignment(text))
    path = user_path(text[1:], f"--set {text}")
    if not path.exists():
        hint = "after @ comes the path of a YAML file with fields of a recipe, as `chaindiff tune` writes it"
        raise UserError(f"there is no file {display(path)}", f"--set {text}", hint)
    return read(path)


def _finish(tree: Node, before: Node, path: Path, lock: dict[str, Any], allow_code: bool) -> Loaded:
    if isinstance(digests := lock.get("weights"), dict):  # of weights that nobody has named since
        said, now = (node.fields("stages") for node in (before, tree))
        kept = {n for n in now if n in said and said[n].get("weights") is now[n].get("weights")}
        lock = {**lock, "weights": {name: digest for name, digest in digests.items() if name in kept}}
    loaded = Loaded(validate(Recipe, tree), path, tree, lock, allow_code)
    check(loaded.recipe, loaded.where)
    return loaded


def find(source: str | Path, what: What, near: Path | None = None, where: str | None = None) -> Path:
    """A recipe or card by path or bare name: in the current directory, beside the file that uses it, as shipped."""
    name = os.path.expanduser(os.fspath(source))
    plain = name.endswith((".yaml", ".yml"))
    if what == "recipe" and os.path.isdir(name) and not plain:
        name, plain = os.path.join(name, LOCK), True
    # A bare word means a recipe or card of that name, never some file without a suffix.
    names = [name] if plain else [*([name] if os.path.basename(name) != name else []), f"{name}.yaml", f"{name}.yml"]
    folders = [folder for root in _roots(near) for folder in (root, root / _FOLDERS[what])]
    found = [path for path in (folder / candidate for folder in folders for candidate in names) if os.path.isfile(path)]
    if found:
        shadows = not plain and names[0] != name and SHIPPED in found[-1].parents
        if shadows and not filecmp.cmp(found[0], found[-1], shallow=False):
            note(f"the {what} '{name}' is {display(found[0])}, not the shipped one of that name")
        return found[0]
    for folder in folders:
        if reason := _unfit(folder / name, what):
            raise UserError(f"{source} {reason[0]}", where, reason[1])
    known = available(what, near)
    hint = f"`chaindiff list` shows all; a path such as {_FOLDERS[what]}/NAME.yaml works too"
    raise UserError(f"there is no {what} '{source}'{did_you_mean(Path(name).stem, known)}", where, hint)


def _unfit(path: Path, what: What) -> tuple[str, str | None] | None:
    """Why the file at a path is not a recipe or card, and how to fix it; None if there is no file."""
    if path.name == LOCK and path.parent.is_dir() and not os.path.lexists(path):
        hint = "name a recipe, or the directory of a run"
        return f"is a directory without {LOCK}, so it is not a run", hint
    if path.suffix not in (".yaml", ".yml") or not os.path.lexists(path):
        return None
    if path.is_dir():
        return f"is a directory, not a {what}", None
    try:
        path.stat()
    except FileNotFoundError:
        return f"is a link to {os.readlink(path)}, which does not exist", None
    except OSError as error:
        return f"cannot be read: {error.strerror}", None
    return f"has a {LOCK} that is not a regular file" if path.name == LOCK else "is not a regular file", None


def available(what: What, near: Path | None = None) -> dict[str, Path]:
    """The recipes or cards that a bare name finds, in alphabetical order."""
    found: dict[str, Path] = {}
    for root in _roots(near):
        for path in sorted([*(root / _FOLDERS[what]).glob("*.yaml"), *(root / _FOLDERS[what]).glob("*.yml")]):
            found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def _roots(near: Path | None) -> list[Path]:
    beside = [near.parent, near.parent.parent] if near else []
    return [Path.cwd(), *beside, SHIPPED]


def _without_use(node: Node) -> Node:
    fields = node.value
    return Node({k: v for k, v in fields.items() if k != "use"}, node.where) if isinstance(fields, dict) else node


def _assemble(recipe: Node, layers: Sequence[Node], path: Path) -> Node:
    """Cards lowest, the recipe's own fields on top of them, then the overrides in order.

    An override of `use` replaces the card beneath the recipe's own fields.
    """
    said, known = recipe, []
    for layer in layers:
        known.append(spread(layer, said, Recipe))
        refuse_strangers(said, known[-1])
        said = merge(said, known[-1], Recipe)
    cards: dict[str, Node] = {}
    for name, stage in said.fields("stages").items():
        use = stage.get("use")
        cards[name] = Node(_card(use, path, ()).value if use else {}, stage.where)
    tree = Node({"stages": Node(cards, said.deepest(["stages"]).where)}, recipe.where)
    for layer in (recipe, *known):
        tree = merge(tree, layer, Recipe)
    stages = tree.fields("stages")
    stages.update({name: _without_use(stage) for name, stage in stages.items()})
    return tree


def _card(use: Node, near: Path, chain: tuple[Path, ...]) -> Node:
    """A card's fields, on top of those of the card that it uses itself."""
    if not isinstance(use.value, str):
        raise UserError(f"use: expected a card's name, not {describe(use.value)}", use.where)
    path = find(use.value, "card", near, use.where)
    if path in chain:
        names = " -> ".join(link.stem for link in (*chain, path))
        raise UserError(f"cards use each other in a cycle: {names}", use.where)
    card = read(path)
    for field in sorted(_WHOLE & card.value.keys()):
        message = f"is a recipe, not a stage card: it has a field '{field}'"
        raise UserError(message, card.where, "copy the stage that you want into a stage card")
    below = card.get("use")
    return merge(_card(below, path, (*chain, path)), _without_use(card), StageSpec) if below else card


def summary(path: Path) -> str:
    """The description of a recipe or card, or what is wrong with its file."""
    try:
        description = read(path).value.get("description")
    except UserError as error:
        return f"(broken: {error.message})"
    return " ".join(str(description.value).split()) if description else ""
