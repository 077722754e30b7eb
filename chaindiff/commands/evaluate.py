"""`chaindiff evaluate`: how good a chain is, and what each of its links costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chaindiff.commands.page import write_run_report
from chaindiff.commands.plan import asking, recipe_of
from chaindiff.commands.sample import sample_chain
from chaindiff.evaluation.evaluate import evaluate as measure
from chaindiff.evaluation.report import METRICS, Report
from chaindiff.evaluation.tables import plain
from chaindiff.io.processes import processes
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
    **options: Any,
) -> Report:
    """Measure a chain, print the results and show them on the run's page, which is made if there is none."""
    asked = {"count": count, "seeds": list(seeds), "judges": list(judges)}
    changed = {"evaluate": {key: value for key, value in asked.items() if value}}
    loaded = asking(recipe_of(recipe).override(changed), given=given)
    report, assembly = measure(loaded, out=out, **options), Assembly(loaded, out)
    sampled, page = sample_chain(assembly), assembly.out / "report.html"
    if not processes().is_main_process:
        return report
    for part in report.parts:
        say(f"\n{part['title']}\n{part['note']}\n\n{plain(part['table']) if part['table'] else ''}")
    write_run_report(page, assembly, sampled)
    say(f"\nfigures: {assembly.out / METRICS}\npage: {page}")
    return report
