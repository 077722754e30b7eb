"""The command line. Every command says what it needs and hands over to `chaindiff.run`; torch is imported only then."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from chaindiff.specs.errors import UserError

app = typer.Typer(
    name="chaindiff",
    help="Declare, train, sample and measure chains of diffusion models.",
    epilog="RECIPE is a path, a name that `chaindiff list` shows, or the directory of a run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", show_default=False)]
Set = Annotated[list[str], typer.Option("--set", metavar="FIELD=VALUE", help="Override: stages.image.sample.steps=20.")]
Out = Annotated[Path | None, typer.Option("--out", help="The run's directory (default: runs/NAME).")]
Given = Annotated[list[str], typer.Option("--given", metavar="NAME=VALUE", help="A variable that is known.")]
Want = Annotated[list[str], typer.Option("--want", metavar="NAME", help="A variable to sample.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and exits: 0, 2 after a mistake that one message explains, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = app(arguments, prog_name="chaindiff", standalone_mode=False)
    except (UserError, OSError) as error:
        if "--debug" in arguments:
            raise
        status = _fail(str(error) if isinstance(error, UserError) else _system(error))
    except Exception as error:
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()  # Typer's own errors of usage know how to print themselves
        status = 2
    if status == 130:
        print("interrupted; the same command continues", file=sys.stderr)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _system(error: OSError) -> str:
    """The operating system's refusal: disk full, no permission."""
    what = error.strerror or str(error)
    return f"{error.filename}: {what}" if error.filename else what


def _load(recipe: str, changes: list[str]) -> Any:
    from chaindiff.specs.load import load_recipe

    return load_recipe(recipe, set=changes)


def _work(quiet: bool) -> Any:
    """The module that does the work, which imports torch."""
    if quiet:
        import rich

        rich.get_console().quiet = True
    return importlib.import_module("chaindiff.run")


def _values(given: list[str]) -> dict[str, Any] | None:
    from chaindiff.specs.yaml import assignment

    pairs = [assignment(text, "--given") for text in given]
    return {".".join(path): node.plain() for path, node in pairs} or None


def _version(wanted: bool) -> None:
    if wanted:
        from chaindiff import __version__

        print(f"chaindiff {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None: ...


@app.command()
def run(
    recipe: RecipeName,
    out: Out = None,
    changes: Set = [],  # noqa: B006 (Typer copies it)
    given: Given = [],  # noqa: B006
    smoke: Annotated[bool, typer.Option("--smoke", help="Go through everything once, as small as possible.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Do what is missing of a recipe: train, sample, evaluate, report."""
    loaded = _load(recipe, changes)
    _work(quiet).run(loaded, out=out, smoke=smoke, given=_values(given))


@app.command()
def train(
    recipe: RecipeName,
    stage: Annotated[str | None, typer.Option("--stage", help="Only this stage.")] = None,
    more: Annotated[int, typer.Option("--more", min=0, metavar="IMAGES", help="Train beyond the recipe's images.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train anew even where there are weights.")] = False,
    out: Out = None,
    changes: Set = [],  # noqa: B006
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train the stages of a recipe, or go on with it."""
    loaded = _load(recipe, changes)
    if stage is not None and stage not in loaded.recipe.stages:
        from chaindiff.specs.errors import did_you_mean

        raise UserError(f"there is no stage '{stage}'{did_you_mean(stage, loaded.recipe.stages)}", f"--stage {stage}")
    _work(quiet).train(loaded, stage=stage, more=more, out=out, fresh=fresh)


@app.command()
def sample(
    recipe: RecipeName,
    count: Annotated[int | None, typer.Option("--count", min=1, help="How many samples.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0)] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="How many at a time.")] = None,
    want: Want = [],  # noqa: B006
    given: Given = [],  # noqa: B006
    out: Out = None,
    changes: Set = [],  # noqa: B006
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Sample from a chain."""
    loaded = _load(recipe, changes)
    _work(quiet).sample(loaded, out=out, count=count, seed=seed, batch=batch, want=want or None, given=_values(given))


@app.command()
def plan(
    recipe: RecipeName,
    want: Want = [],  # noqa: B006
    given: Given = [],  # noqa: B006
    picture: Annotated[Path | None, typer.Option("--picture", help="Draw the chain: a .svg or .png.")] = None,
    changes: Set = [],  # noqa: B006
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check a recipe and show what a request would run, and what it costs."""
    loaded = _load(recipe, changes)
    _work(quiet).plan(loaded, want=want or None, given=_values(given), picture=picture)


@app.command("list")
def list_(debug: Debug = False) -> None:
    """List the recipes and stage cards that a bare name finds."""
    from chaindiff.specs.load import available, summary

    for title, known in (("recipes", available("recipe")), ("stage cards", available("card"))):
        width = max(map(len, known), default=0)
        print(f"{title}:" if known else f"{title}: none")
        for name, path in known.items():
            print(f"  {name:{width}}  {summary(path)}".rstrip())


@app.command()
def show(recipe: RecipeName, changes: Set = [], debug: Debug = False) -> None:  # noqa: B006
    """Print a recipe with every default and override resolved."""
    from chaindiff.specs.lock import resolved

    print(resolved(_load(recipe, changes).recipe), end="")


@app.command()
def schema(
    out: Annotated[Path | None, typer.Option("--out", help="Write it to this file.")] = None, debug: Debug = False
) -> None:
    """Print the JSON Schema of recipes, for editors."""
    import json

    from chaindiff.specs.files import write_whole
    from chaindiff.specs.lock import json_schema

    text = json.dumps(json_schema(), indent=2) + "\n"
    if out is None:
        print(text, end="")
    else:
        write_whole(out, text)
