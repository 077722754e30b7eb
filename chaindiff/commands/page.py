"""The page of a run, put together from what sampling left behind."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from chaindiff.evaluation.report import sections
from chaindiff.recipe.assembly import Assembly
from chaindiff.show.page import Page, Picture, StageRow, write_report
from chaindiff.specs.load import LOCK

if TYPE_CHECKING:
    from chaindiff.commands.run import Sampled


def write_run_report(path: Path, assembly: Assembly, sampled: Sampled, banner: str = "") -> None:
    """One self-contained HTML file: chain, grids, costs, provenance and the locked recipe."""
    recipe, found, samples = assembly.recipe, sampled.plan, sampled.samples
    pictures = [
        Picture(variable.name, grid.read_bytes(), f"{variable}, the first {min(samples.count, 64)} of {samples.count}")
        for variable in reversed(samples.variables)
        if variable.kind == "image" and (grid := samples.folder / variable.name / "grid.png").exists()
    ]
    rows = []
    for step in found.plan.steps:
        name, spec = step.producer.name, recipe.stages.get(step.producer.name)
        if step.producer.kind != "stage" or spec is None:
            rows.append(StageRow(name, step.producer.kind))
            continue
        cost = found.costs[name]
        reads = f" given {', '.join(step.inputs)}" if step.inputs else ""
        rows.append(
            StageRow(
                name,
                f"{', '.join(step.outputs)}{reads}",
                (spec.network or spec).kind,
                cost.parameters,
                cost.nfe,
                cost.total_flops / 1e9,
                sampled.stage_seconds.get(name),
            )
        )
    lock = sampled.lock
    provenance = {
        "Weights (sha256)": lock["weights"],
        "Given (sha256)": lock["given"],
        "Sampling": {
            "seed": recipe.sample.seed,
            "count": recipe.sample.count,
            "batch": recipe.sample.batch,
            "execution": lock["execution"],
            "threads": lock["threads"],
            "machine": lock["machine"],
        },
        "Versions": lock["versions"],
    }
    page = Page(
        recipe.name,
        recipe.description,
        banner,
        found.svg(),
        pictures,
        rows,
        sections=sections(assembly.out),
        provenance=provenance,
        recipe=(assembly.out / LOCK).read_text(),
    )
    write_report(path, page)
