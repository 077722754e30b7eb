"""What `chaindiff evaluate` does: rows of a comparison, their samples and figures, and what the page shows of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from chaindiff.evaluation.report import Report
from chaindiff.evaluation.rows import BATCH, Row
from chaindiff.evaluation.study import Study
from chaindiff.evaluation.tables import Group, Measured, Results
from chaindiff.io.errors import UserError
from chaindiff.io.memory import noted
from chaindiff.io.processes import processes, share
from chaindiff.io.progress import say, shown
from chaindiff.recipe.assembly import Assembly, default_out
from chaindiff.specs.load import LOCK, Loaded, load_recipe
from chaindiff.specs.merge import nest
from chaindiff.specs.yaml import assignment, wrap


@dataclass(frozen=True)
class Sweep:
    """One setting and the values that it takes."""

    field: str
    values: tuple[Any, ...]

    @classmethod
    def parse(cls, text: str) -> Sweep:
        """`stages.image.sample.steps=6,9,18`. Raises UserError if it is not a sweep."""
        path, node = assignment(text, "--sweep")
        values = node.plain()
        if isinstance(values, str):
            values = [assignment(f"x={part}", "--sweep")[1].plain() for part in values.split(",")]
        if not isinstance(values, list) or not values:
            values = [values]
        return cls(".".join(path), tuple(values))


class Rows:
    """Makes the rows of one recipe that share a folder and a variable."""

    def __init__(self, loaded: Loaded, of: str, folder: Path, count: int, seeds: Sequence[int], out: Path | None):
        self.loaded, self.of, self.folder, self.count, self.seeds, self.out = loaded, of, folder, count, seeds, out

    def __call__(
        self,
        label: str,
        oracle: Sequence[str] = (),
        changes: Mapping[str, Any] | None = None,
        loaded: Loaded | None = None,
        out: Path | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Row]:
        """One row for each seed; its label names what the recipe gives."""
        recipe = (loaded or self.loaded).override(changes) if changes else loaded or self.loaded
        told = [f"{name} {'...' if isinstance(v, Tensor) else v}" for name, v in recipe.recipe.sample.given.items()]
        label += f", given {', '.join(told)}" * bool(told)
        row = partial(Row, label, recipe, self.of, self.folder, self.count, oracle=tuple(oracle), out=out or self.out)
        return [row(seed=seed) for seed in (seeds or self.seeds)]


def measured_variable(assembly: Assembly, of: str | None) -> str:
    """The image variable that is measured: as asked, or the last image that the recipe wants."""
    images = [n for n in assembly.chain().generated() if assembly.variables[n].kind == "image"]
    wanted = [n for n in assembly.recipe.sample.want if n in images] or images
    if of is not None and of not in images:
        raise UserError(
            f"--of {of}: no stage of this recipe generates an image of that name", hint=f"there is {images}"
        )
    if not wanted:
        raise UserError("this recipe generates no images, and only images are measured so far")
    return of or wanted[-1]


def link_rows(make: Rows, assembly: Assembly) -> Group[list[Row]]:
    """Every subset of the stages upstream of the measured one, replaced by ground truth.

    Subsets that run the same stages on the same values are one row.
    """
    first = make(assembly.recipe.name)[0]
    upstream = [name for name in first.made if name != make.of]
    group, seen = Group[list[Row]]("What each link costs", "links"), set()
    for size in range(len(upstream) + 1):
        for oracle in itertools.combinations(upstream, size):
            label = f"{', '.join(oracle)} from the data" if oracle else "the whole chain"
            try:
                rows = make(label, oracle)
                found = rows[0].plan
            except UserError:
                continue  # sampling would ignore what is given: no such row
            key = (tuple(found.running), tuple(sorted(found.plan.given)))
            if key not in seen:
                seen.add(key)
                group.rows.append(rows)
    return group


def sweep_rows(make: Rows, sweep: Sweep, oracle: Sequence[str] = ()) -> Group[list[Row]]:
    """One row for each value of a setting. Raises UserError for values that the recipe refuses."""
    tail = f", {', '.join(oracle)} from the data" if oracle else ""
    group = Group[list[Row]](f"{sweep.field}{tail}", "sweep")
    for value in sweep.values:
        changes = nest(sweep.field.split("."), wrap(value, None)).plain()
        group.rows.append(make(f"{sweep.field.split('.')[-1]} {value}{tail}", oracle, changes, seeds=make.seeds[:1]))
        group.x.append(value)
    return group


def baseline_rows(make: Rows, recipe: str) -> list[Row]:
    """The same variable by another recipe, given the same values where they affect it."""
    other = load_recipe(recipe, allow_code=make.loaded.allow_code)
    chain = Assembly(other).chain()
    if make.of not in (makes := chain.generated()):
        raise UserError(f"--baseline {recipe}: that recipe generates no '{make.of}', but {', '.join(makes)}")
    given = {n: v for n, v in make.loaded.recipe.sample.given.items() if n in other.recipe.variables}
    for name in chain.plan([make.of], list(given)).plan.unused:
        del given[name]
    run, label = default_out(other), other.recipe.name
    own = run if run.is_dir() else None  # a recipe without a run of its own takes the weights of this one
    if other.path.name == LOCK:
        label = other.spoken
    elif own and label == make.loaded.recipe.name:
        label = str(own)  # two runs of one recipe
    return make(label, loaded=other.override({"sample": {"given": given}}) if given else other, out=own)


# ------------------------------------------------------------ everything in one go


def evaluate(
    loaded: Loaded,
    *,
    of: str | None = None,
    links: bool = False,
    sweeps: Sequence[str] = (),
    baselines: Sequence[str] = (),
    oracle: Sequence[str] = (),
    out: Path | None = None,
    ready: Callable[[], object] = bool,
) -> Report:
    """Sample the rows, measure them, and write `metrics.json` and plots into the run's directory.

    What was sampled or measured before is not done again. `ready` is called when all has been checked.
    Raises UserError for recipes without weights, sweeps of unknown fields, and judges that are not there.
    """
    assembly, asked = Assembly(loaded, out), loaded.recipe.evaluate
    if (oracle or links) and (given := loaded.recipe.sample.given):
        option = "--links" if links else f"--oracle {oracle[0]}"
        raise UserError(
            f"the given '{next(iter(given))}' and the data's values would be of different images",
            option,
            f"leave out {option}, or what is given: --set sample.given={{}}",
        )
    name = measured_variable(assembly, of)
    folder = assembly.out / "evaluation"
    make = Rows(loaded, name, folder, asked.count, asked.seeds, assembly.out)
    groups = [Group(f"Quality of '{name}'", "main", [make(loaded.recipe.name, oracle)])]
    groups[0].rows += [baseline_rows(make, recipe) for recipe in baselines]
    if links:
        groups.append(link_rows(make, assembly))
    groups += [sweep_rows(make, Sweep.parse(text), oracle) for text in sweeps]
    study = Study(folder, asked.judges, asked.reference, asked.held_out)
    for judge in asked.judges:
        study.judge(judge)  # a missing judge should fail before sampling
    state = processes()
    weights = {rows[0].label: rows[0].assembly.weights(rows[0].plan.running) for rows in groups[0].rows}
    for label, paths in weights.items():
        for stage, path in paths.items():
            say(f"{label}: stage {stage}: weights {path}")
    ready()
    draw_all([row for group in groups for rows in group.rows for row in rows])
    state.wait_for_everyone()
    report = Report(folder, weights)
    if not state.is_main_process:
        return report
    main = groups[0].rows[0][0]
    for group in groups:
        report.add_group(measure_group(group, study), [made for made in main.made if made != name])
    report.add_memorisation(study, main)
    report.add_priors(study, main)
    report.write()
    return report


def draw_all(rows: Sequence[Row]) -> None:
    """Sample what is missing of all rows; several processes divide them.

    Raises UserError for any of them before the first is sampled.
    """
    # The longest of the rows that share samples; a row's folder is known once it is planned and its weights found.
    own = {row.store.folder: row for row in sorted(rows, key=lambda row: row.count)}
    less = f"evaluate samples {BATCH} at a time; --set sample.precision=bf16 needs less"
    for row in share(list(own.values())):
        with noted(less):
            shown(f"sample {row.label}, seed {row.seed}", row.draw())


def measure_group(group: Group[list[Row]], study: Study) -> Results:
    """The rows with their figures, one row for a list of its seeds."""
    measured = [
        Measured(rows[0].label, [row.about() for row in rows], [study.figures(row) for row in rows])
        for rows in group.rows
    ]
    return Results(group.title, group.kind, measured, group.x)
