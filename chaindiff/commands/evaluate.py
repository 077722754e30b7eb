"""`chaindiff evaluate`: how good a chain is, and what each of its links costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chaindiff.commands.page import is_current, write_run_report
from chaindiff.commands.plan import asking, recipe_of
from chaindiff.commands.sample import asked_samples, sample_chain
from chaindiff.evaluation.evaluate import evaluate as measure
from chaindiff.evaluation.report import METRICS, Report
from chaindiff.evaluation.tables import plain
from chaindiff.io.processes import processes, sole_writer
from chaindiff.io.progress import say
from chaindiff.recipe.assembly import Assembly
from chaindiff.specs.load import Loaded


def evaluate(
    recipe: Loaded | str | Path,
    out: Path | None = None,
    given: Mapping[str, Any] | None = None,
    count: int | None = None,
    seeds: Sequence[int] = (),
    judges: Sequence[str] = (),
    replace: bool = False,
    **options: Any,
) -> Report:
    """Measure a chain, print the results and show them on the run's page, which is made if there is none."""
    asked = {"count": count, "seeds": list(seeds), "judges": list(judges)}
    changed = {"evaluate": {key: value for key, value in asked.items() if value}}
    loaded = asking(recipe_of(recipe).override(changed), given=given)
    assembly = Assembly(loaded, out)
    page = assembly.out / "report.html"
    with sole_writer(assembly.out):
        report = measure(loaded, out=out, ready=lambda: asked_samples(assembly, replace), **options)
        sampled = sample_chain(assembly, replace)
        if not processes().is_main_process:
            return report
        for part in report.parts:
            table = plain(part["table"]) if part["table"] else ""
            say("", part["title"], *part["note"].split("\n"), "", table)
        if sampled.seconds or not is_current(page, assembly):
            write_run_report(page, assembly, sampled)
    say("", f"figures: {assembly.out / METRICS}", f"page: {page}")
    return report
