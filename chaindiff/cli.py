"""The command line. Each command declares its options and hands over to `commands/`; torch is imported only then."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from chaindiff.commands import completion
from chaindiff.io import memory
from chaindiff.io.errors import UserError, quoted
from chaindiff.io.files import folder_path, user_path
from chaindiff.io.processes import first_to_fail, processes

app = typer.Typer(
    name="chaindiff",
    help="Declare, train, sample and measure chains of diffusion models.",
    epilog="RECIPE is a path, a name from `chaindiff list`, or a run's directory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", show_default=False, autocompletion=completion.recipes)]


def _named(option: str, metavar: str, says: str, offers: Any = None) -> Any:
    return typer.Option(option, metavar=metavar, help=says, autocompletion=offers)


_OVERRIDE = "Override: stages.image.sample.steps=20; or @FILE, a YAML file of fields."
Set = Annotated[list[str], _named("--set", "FIELD=VALUE", _OVERRIDE, completion.fields)]
Out = Annotated[
    Path | None, typer.Option("--out", help="The run's directory (default: runs/NAME).", parser=folder_path)
]
Given = Annotated[list[str], _named("--given", "NAME=VALUE", "Condition on this value.", completion.assignments)]
Want = Annotated[list[str], _named("--want", "NAME", "A variable to sample.", completion.variables)]
Sweep = Annotated[list[str], _named("--sweep", "FIELD=A,B", "Measure at several values of a field.", completion.fields)]
Baseline = Annotated[list[str], _named("--baseline", "RECIPE", "A recipe to compare with.")]
Oracle = Annotated[list[str], _named("--oracle", "NAME", "Condition on its ground truth.")]
Judge = Annotated[list[str], _named("--judge", "NAME", "A feature extractor.")]
Count = Annotated[int | None, typer.Option("--count", min=1, help="Number of samples.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Sampling seed.")]
Batch = Annotated[int | None, typer.Option("--batch", min=1, help="Samples per batch.")]
MaxMemory = Annotated[str | None, typer.Option("--max-memory", metavar="4GB", help="For weights and activations.")]
Replace = Annotated[bool, typer.Option("--replace", help="Delete samples of other settings first.")]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Run the code that the recipe names (`kind: MODULE:NAME`).")
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print only JSON to stdout; messages go to stderr.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 on success, 2 after a user's error, 130 when interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = app(arguments, prog_name="chaindiff", standalone_mode=False)
    except Exception as error:
        status = _explain(error, debug="--debug" in arguments)
    if status == 130:
        print("interrupted; run the same command again to continue", file=sys.stderr)
    sys.exit(status if isinstance(status, int) else 0)


def _explain(error: Exception, debug: bool) -> int:
    """Print a user's error, in only the first of several processes to fail. Reraises every other error."""
    if not (debug or first_to_fail()):
        return 2  # the same error, or a consequence of another process's failure
    show = getattr(error, "show", None)
    if show is not None:
        show()  # Typer's usage errors print themselves
    elif isinstance(error, (UserError, OSError)) and not debug:
        print(f"error: {error if isinstance(error, UserError) else quoted(_system(error))}", file=sys.stderr)
    elif memory.full(error) and not debug:
        print(f"error: {memory.told(error)}", file=sys.stderr)
    else:
        raise error
    return 2


def _system(error: OSError) -> str:
    """The operating system's error: disk full, permission denied."""
    what = error.strerror or str(error)
    return f"{error.filename}: {what}" if error.filename else what


def _load(recipe: str, changes: list[str], allow_code: bool = False) -> Any:
    from chaindiff.specs.load import load_recipe

    return load_recipe(recipe, changes=changes, allow_code=allow_code)


def _work(module: str, quiet: bool, as_json: bool = False) -> Any:
    """A module that does the work, which imports torch. With `as_json`, its messages go to stderr."""
    import rich

    rich.reconfigure(stderr=as_json, quiet=quiet or not processes().is_main_process)
    return importlib.import_module(f"chaindiff.{module}")


def _json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=2))


def _facts(done: Any, as_json: bool) -> None:
    """What a command did, as JSON, once for all processes."""
    if as_json and processes().is_main_process:
        _json(done.facts())


def _values(given: list[str]) -> dict[str, Any] | None:
    from chaindiff.specs.yaml import assignment

    values: dict[str, Any] = {}
    for path, node in (assignment(text, "--given") for text in given):
        if (name := ".".join(path)) in values:
            raise UserError(f"'{name}' is given twice", node.where)
        values[name] = node.plain()
    return values or None


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
    count: Count = None,
    seed: Seed = None,
    batch: Batch = None,
    max_memory: MaxMemory = None,
    given: Given = [],  # noqa: B006 (Typer copies it)
    out: Out = None,
    replace: Replace = False,
    changes: Set = [],  # noqa: B006
    allow_code: AllowCode = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="Run every part once, at tiny sizes.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run whatever a recipe still needs: training, sampling, the report."""
    loaded = _load(recipe, changes, allow_code)
    asked = {"count": count, "seed": seed, "batch": batch, "max_memory": max_memory, "given": _values(given)}
    _facts(_work("commands.run", quiet, as_json).run(loaded, out=out, smoke=smoke, replace=replace, **asked), as_json)


@app.command()
def train(
    recipe: RecipeName,
    stage: Annotated[
        str | None, typer.Option("--stage", help="Only this stage.", autocompletion=completion.stages)
    ] = None,
    more: Annotated[int, typer.Option("--more", min=0, metavar="IMAGES", help="Train beyond the recipe's images.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Train from scratch even if there are weights.")] = False,
    out: Out = None,
    changes: Set = [],  # noqa: B006
    allow_code: AllowCode = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train the stages of a recipe, or continue training."""
    loaded = _load(recipe, changes, allow_code)
    if stage is not None and stage not in loaded.recipe.stages:
        from chaindiff.io.errors import did_you_mean

        raise UserError(f"there is no stage '{stage}'{did_you_mean(stage, loaded.recipe.stages)}", f"--stage {stage}")
    _work("commands.train", quiet).train(loaded, stage=stage, more=more, out=out, fresh=fresh)


@app.command()
def sample(
    recipe: RecipeName,
    count: Count = None,
    seed: Seed = None,
    batch: Batch = None,
    max_memory: MaxMemory = None,
    want: Want = [],  # noqa: B006
    given: Given = [],  # noqa: B006
    out: Out = None,
    replace: Replace = False,
    changes: Set = [],  # noqa: B006
    allow_code: AllowCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Sample from a chain."""
    loaded = _load(recipe, changes, allow_code)
    asked = {"count": count, "seed": seed, "batch": batch, "max_memory": max_memory}
    asked |= {"want": want or None, "given": _values(given)}
    _facts(_work("commands.sample", quiet, as_json).sample(loaded, out=out, replace=replace, **asked), as_json)


@app.command()
def evaluate(
    recipe: RecipeName,
    of: Annotated[str | None, typer.Option("--of", metavar="NAME", help="The image variable to measure.")] = None,
    links: Annotated[bool, typer.Option("--links", help="What each link costs, by ground-truth conditioning.")] = False,
    sweep: Sweep = [],  # noqa: B006
    baseline: Baseline = [],  # noqa: B006
    oracle: Oracle = [],  # noqa: B006
    given: Given = [],  # noqa: B006
    count: Annotated[int | None, typer.Option("--count", min=2, help="Samples per row.")] = None,
    seed: Annotated[list[int], typer.Option("--seed", min=0, help="A sampling seed; repeat it for intervals.")] = [],  # noqa: B006
    judge: Judge = [],  # noqa: B006
    out: Out = None,
    replace: Replace = False,
    changes: Set = [],  # noqa: B006
    allow_code: AllowCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure a chain: distances to the data, what each link costs, sweeps, memorisation."""
    loaded = _load(recipe, changes, allow_code)
    asked = {"count": count, "seeds": seed, "judges": judge, "replace": replace}
    options = asked | {"of": of, "links": links, "sweeps": sweep, "baselines": baseline, "oracle": oracle}
    _facts(
        _work("commands.evaluate", quiet, as_json).evaluate(loaded, out=out, given=_values(given), **options), as_json
    )


@app.command()
def tune(
    recipe: RecipeName,
    path: Annotated[
        bool, typer.Option("--path", help="The path on which a joint stage's noise levels go down together.")
    ] = False,
    stage: Annotated[
        str | None, typer.Option("--stage", help="Of this stage.", autocompletion=completion.stages)
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=2, help="As many (default: the present number).")] = None,
    count: Annotated[int, typer.Option("--count", min=2, help="Rows of the data that errors are measured on.")] = 128,
    out: Annotated[
        Path | None, typer.Option("--out", help="The file to write (default: RUN/STAGE.path.yaml).", parser=user_path)
    ] = None,
    changes: Set = [],  # noqa: B006
    allow_code: AllowCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Fit sampling settings to a trained chain; writes a file for `--set @FILE`."""
    if not path:
        raise UserError("nothing to fit was named", hint="--path fits the path of a joint stage")
    loaded = _load(recipe, changes, allow_code)
    _facts(_work("commands.tune", quiet, as_json).tune(loaded, stage=stage, steps=steps, count=count, out=out), as_json)


@app.command()
def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN RUN...", show_default=False, autocompletion=completion.runs)
    ],
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show two or more runs side by side: the settings in which they differ, and their figures."""
    from chaindiff.commands.compare import compare

    found = compare(runs)
    _json(found.facts()) if as_json else print(quoted(str(found)))


@app.command()
def plan(
    recipe: RecipeName,
    want: Want = [],  # noqa: B006
    given: Given = [],  # noqa: B006
    picture: Annotated[Path | None, typer.Option("--picture", help="Draw the chain: a .svg or .png.")] = None,
    changes: Set = [],  # noqa: B006
    allow_code: AllowCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check a recipe and show what a request would run, and what it costs."""
    loaded = _load(recipe, changes, allow_code)
    # The JSON holds everything that the table shows.
    plan = _work("commands.plan", quiet or as_json).plan
    _facts(plan(loaded, want=want or None, given=_values(given), picture=picture), as_json)


@app.command()
def bench(
    names: Annotated[list[str], typer.Argument(metavar="[NAMES]", help="Cases or groups (default: all).")] = [],  # noqa: B006
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Fewer are made where each takes seconds.")] = 10,
    quick: Annotated[bool, typer.Option("--quick", help="Three repeats: to see that it works.")] = False,
    results: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all times to it.")] = None,
    earlier: Annotated[Path | None, typer.Option("--compare", metavar="JSON", help="Name what is slower.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="List what can be measured.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure how fast chaindiff is here; exit with 1 if --compare finds it slower."""
    from chaindiff.bench.suite import CASES, chosen

    if listed:
        for name in chosen(names):
            print(f"{name:16}  {CASES[name].group:10}  {CASES[name].about}")
        return
    chosen(names)  # a mistake is told before torch is imported
    _, compared = _work("commands.bench", quiet).bench(names, repeats, quick, results, earlier)
    if compared is not None and compared.slower:
        raise typer.Exit(1)


@app.command()
def ema(
    stage: Annotated[Path, typer.Argument(metavar="RUN/stages/STAGE", show_default=False)],
    std: Annotated[float, typer.Option("--std", help="Its relative width, sigma_rel in EDM2, such as 0.07.")],
    out: Annotated[Path, typer.Option("--out", help="The weights file to write.")],
    images: Annotated[
        int | None, typer.Option("--images", help="After this many training images (default: all).")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Reconstruct an EMA of another length from the snapshots of `train: {ema: {kind: power}}`."""
    said = _work("training.snapshots", quiet).reconstruct_stage(stage, std, out, images)
    if not quiet:
        print(said)


@app.command("import")
def import_(
    snapshot: Annotated[Path, typer.Argument(metavar="SNAPSHOT.pkl", show_default=False)],
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe", metavar="RECIPE", help="The recipe to write weights for.", autocompletion=completion.recipes
        ),
    ] = None,
    stage: Annotated[str | None, typer.Option("--stage", help="The recipe's stage to write.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="The file to write (default: SNAPSHOT.safetensors).")
    ] = None,
    changes: Set = [],  # noqa: B006
    allow_code: AllowCode = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Convert an EDM or VCDM snapshot to safetensors, executing none of its code."""
    if recipe is None and (stage is not None or changes):
        raise UserError("--stage and --set apply to a recipe: add --recipe RECIPE")
    loaded = None if recipe is None else _load(recipe, changes, allow_code)
    _work("commands.importing", quiet).import_snapshot(snapshot, out=out, loaded=loaded, stage=stage)


@app.command("list")
def list_(
    group: Annotated[
        str | None,
        typer.Argument(
            metavar="[GROUP]",
            help="One group: recipes, cards, encoders, reducers, networks, judges, weights or runs.",
            show_default=False,
            autocompletion=completion.groups,
        ),
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List recipes, stage cards, a recipe's other building blocks, weights and runs."""
    from chaindiff.commands.catalogue import GROUPS, TITLES
    from chaindiff.io.errors import did_you_mean

    if group is not None and group not in GROUPS:
        raise UserError(f"there is no group '{group}' to list{did_you_mean(group, GROUPS)}")
    found = {name: GROUPS[name]() for name in ([group] if group else GROUPS)}
    if as_json:
        _json({name: [vars(entry) for entry in entries] for name, entries in found.items()})
        return
    for name, entries in found.items():
        width = max((len(entry.name) for entry in entries), default=0)
        print(f"{TITLES.get(name, name)}:{'' if entries else ' none'}")
        for entry in entries:
            print(quoted(f"  {entry.name:{width}}  {entry.description}").rstrip())


@app.command()
def show(recipe: RecipeName, changes: Set = [], as_json: AsJson = False, debug: Debug = False) -> None:  # noqa: B006
    """Print a recipe with every default and override resolved."""
    from chaindiff.specs.lock import resolved

    found = _load(recipe, changes).recipe
    if as_json:
        _json(found.model_dump(mode="json"))
    else:
        print(resolved(found), end="")


@app.command()
def schema(
    out: Annotated[Path | None, typer.Option("--out", help="Write it to this file.")] = None, debug: Debug = False
) -> None:
    """Print the JSON Schema of recipes, for editors."""
    import json

    from chaindiff.io.files import write_whole
    from chaindiff.specs.lock import json_schema

    text = json.dumps(json_schema(), indent=2) + "\n"
    if out is None:
        print(text, end="")
    else:
        write_whole(out, text)
