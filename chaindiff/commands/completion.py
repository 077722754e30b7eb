"""What the shell offers after TAB: recipes, and the names that a recipe declares. Imports no torch, raises nothing.

Typer itself leaves out what does not begin with what was typed.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stderr
from glob import escape, glob
from pathlib import Path
from typing import Any

import typer

from chaindiff.io.errors import UserError

Offers = list[tuple[str, str]]  # a word and its explanation


def recipes(incomplete: str) -> Offers:
    """Bare names; once something is typed, files and folders on the way to them too."""
    from chaindiff.specs.load import available, summary

    names = [(name, summary(path)) for name, path in available("recipe").items() if name.startswith(incomplete)]
    return names + _paths(incomplete)


def _paths(incomplete: str) -> Offers:
    """Recipe files, runs and folders on the way to them, once something is typed."""
    from chaindiff.specs.load import LOCK

    paths = [Path(path) for path in (sorted(glob(f"{escape(incomplete)}*")) if incomplete else [])]
    files = [(str(path), "") for path in paths if path.suffix in (".yaml", ".yml") or (path / LOCK).is_file()]
    folders = [(f"{path}/", "") for path in paths if path.is_dir() and not (path / LOCK).is_file()]
    return files + folders


def runs(incomplete: str) -> Offers:
    """Names under `runs`, and paths of other runs."""
    from chaindiff.commands.catalogue import runs

    names = [(name, str(path)) for name, path in runs().items()]
    return names + [offer for offer in _paths(incomplete) if not offer[0].endswith((".yaml", ".yml"))]


def groups() -> Offers:
    from chaindiff.commands.catalogue import GROUPS, TITLES

    return [(name, TITLES.get(name, name)) for name in GROUPS]


def stages(context: typer.Context) -> Offers:
    return [(name, stage.description) for recipe in _recipe(context) for name, stage in recipe.stages.items()]


def variables(context: typer.Context) -> Offers:
    return [(name, variable.kind) for recipe in _recipe(context) for name, variable in recipe.variables.items()]


def assignments(context: typer.Context) -> Offers:
    """`--given NAME=`."""
    return [(f"{name}=", kind) for name, kind in variables(context)]


def fields(context: typer.Context) -> Offers:
    """`--set FIELD=`: every field of the recipe as it stands, with its value."""
    return [leaf for recipe in _recipe(context) for leaf in _leaves(recipe.model_dump(mode="json"))]


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from _leaves(below, f"{path}.{key}" if path else key)
    else:
        yield f"{path}=", str(value)


def _recipe(context: typer.Context) -> list[Any]:
    """The recipe on the command line so far; None if it is missing or invalid, which the command reports."""
    from chaindiff.specs.load import load_recipe

    # An option that still lacks its value stops the parser, and leaves the recipe among the arguments.
    words = [word for word in (context.params.get("recipe"), *context.args) if word]
    try:
        with redirect_stderr(io.StringIO()):
            return [load_recipe(word, changes=context.params.get("changes") or ()).recipe for word in words[:1]]
    except (UserError, OSError):
        return []
