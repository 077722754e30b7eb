"""What the shell offers after TAB: recipes, and the names that a recipe declares. Imports no torch, raises nothing."""

from __future__ import annotations

from collections.abc import Iterator
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

    names = [(name, str(path)) for name, path in runs().items() if name.startswith(incomplete)]
    return names + [offer for offer in _paths(incomplete) if not offer[0].endswith((".yaml", ".yml"))]


def groups(incomplete: str) -> Offers:
    from chaindiff.commands.catalogue import GROUPS, TITLES

    return [(name, TITLES.get(name, name)) for name in GROUPS if name.startswith(incomplete)]


def stages(context: typer.Context, incomplete: str) -> Offers:
    recipe = _recipe(context)
    return [(n, s.description) for n, s in recipe.stages.items() if n.startswith(incomplete)] if recipe else []


def variables(context: typer.Context, incomplete: str) -> Offers:
    recipe = _recipe(context)
    return [(n, v.kind) for n, v in recipe.variables.items() if n.startswith(incomplete)] if recipe else []


def assignments(context: typer.Context, incomplete: str) -> Offers:
    """`--given NAME=`."""
    return [(f"{name}=", kind) for name, kind in variables(context, incomplete)]


def fields(context: typer.Context, incomplete: str) -> Offers:
    """`--set FIELD=`: every field of the recipe as it stands, with its value."""
    recipe = _recipe(context)
    return (
        [offer for offer in _leaves(recipe.model_dump(mode="json")) if offer[0].startswith(incomplete)]
        if recipe
        else []
    )


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from _leaves(below, f"{path}.{key}" if path else key)
    else:
        yield f"{path}=", str(value)


def _recipe(context: typer.Context) -> Any:
    """The recipe on the command line so far; None if there is none or it is wrong, which the command will say."""
    from chaindiff.specs.load import load_recipe

    # An option that still lacks its value ends the parser's work, and leaves the recipe among the arguments.
    words = [word for word in (context.params.get("recipe"), *context.args) if word]
    try:
        return load_recipe(words[0], changes=context.params.get("changes") or ()).recipe if words else None
    except (UserError, OSError):
        return None
