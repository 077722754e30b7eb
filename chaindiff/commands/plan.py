"""`chaindiff plan`: what a request would run, and what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chaindiff.chain.plan import ChainPlan
from chaindiff.chain.stage import learns
from chaindiff.io.errors import UserError
from chaindiff.io.files import write_whole
from chaindiff.io.progress import say
from chaindiff.recipe.assembly import Assembly
from chaindiff.show.drawing import chain_png
from chaindiff.specs.load import Loaded, load_recipe
from chaindiff.specs.yaml import wrap


def recipe_of(recipe: Loaded | str | Path) -> Loaded:
    """In Python, too, a recipe may be given by name."""
    return recipe if isinstance(recipe, Loaded) else load_recipe(recipe)


def asking(loaded: Loaded, **options: Any) -> Loaded:
    """The recipe with a command's sampling options applied; None leaves a setting as it is."""
    return loaded.override({"sample": {n: wrap(v, f"--{n}") for n, v in options.items() if v is not None}})


def plan(
    loaded: Loaded,
    want: Sequence[str] | None = None,
    given: Mapping[str, Any] | None = None,
    picture: Path | None = None,
) -> ChainPlan:
    """Check a request, and print what it would run and what that costs; needs no weights, data or memory."""
    loaded = asking(loaded, want=want, given=given)
    assembly = Assembly(loaded)
    found = assembly.request
    for stage in assembly.stages.values():
        stage.check_begin()
    say(str(found))
    for name in found.running:
        path = next(assembly.stages[name].known_weights(), None)  # whose content is compared when they are used
        if learns(found.chain.stages.outlines[name]) and path is not None:
            found.chain.weights[name] = path
            say(f"stage {name}: weights {path}")
    if picture is not None:
        draw(found, picture)
        say("", f"wrote {picture}")
    return found


def draw(found: ChainPlan, path: Path) -> None:
    """The chain's picture as SVG or PNG, by the file's suffix."""
    if path.suffix == ".svg":
        write_whole(path, found.svg().encode())
    elif path.suffix == ".png":
        chain_png(*found.drawing(), path)
    else:
        raise UserError(f"--picture {path}: pictures are .svg or .png")
