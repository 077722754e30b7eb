"""The page of a run, put together from what sampling left behind."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from chaindiff.evaluation.report import METRICS, sections
from chaindiff.io.digest import digest, file_digest
from chaindiff.io.files import read_within, regular
from chaindiff.recipe.assembly import Assembly
from chaindiff.show.page import Page, Picture, StageRow, write_report
from chaindiff.specs.load import LOCK

if TYPE_CHECKING:
    from chaindiff.commands.run import Sampled


def shows(assembly: Assembly, banner: str = "") -> str:
    """A fingerprint of all that the page is made of, but for the seconds that sampling took."""
    out = assembly.out
    files = [out / LOCK, out / METRICS, *sorted(out.glob("evaluation/*.png")), *sorted(out.glob("samples/*/grid.png"))]
    found = {str(path.relative_to(out)): file_digest(path) for path in files if path.is_file()}
    return digest([found, banner, version("chain-diffusion-models")])


def is_current(path: Path, assembly: Assembly, banner: str = "") -> bool:
    """Whether the page is there and shows what there is now, with the chain's picture beside it."""
    try:
        with regular(path) as page:
            start = page.read(4000).decode(errors="replace")
        return f'"{shows(assembly, banner)}"' in start and path.with_name("chain.svg").exists()
    except OSError:
        return False


def write_run_report(path: Path, assembly: Assembly, sampled: Sampled, banner: str = "") -> None:
    """One self-contained HTML file: chain, grids, costs, provenance and the locked recipe."""
    recipe, found, samples = assembly.recipe, sampled.plan, sampled.samples
    pictures = [
        Picture(
            variable.name,
            read_within(assembly.out, grid),
            f"{variable}, the first {min(samples.count, 64)} of {samples.count}",
        )
        for variable in reversed(samples.variables)
        if variable.kind == "image" and (grid := samples.folder / variable.name / "grid.png").exists()
    ]
    rows = []
    for step in found.plan.steps:
        name, kind = step.producer.name, step.producer.kind
        if kind != "stage":
            rows.append(StageRow(name, kind))
            continue
        spec, cost = recipe.stages[name], found.costs[name]
        what = f"{', '.join(step.outputs)}{' given ' * bool(step.inputs)}{', '.join(step.inputs)}"
        network, gflops, seconds = (spec.network or spec).kind, cost.total_flops / 1e9, sampled.stage_seconds.get(name)
        rows.append(StageRow(name, what, network, cost.parameters, cost.nfe, gflops, seconds))
    lock = sampled.lock
    sampling = {name: getattr(recipe.sample, name) for name in ("seed", "count", "batch")}
    provenance = {
        "Weights (sha256)": lock["weights"],
        "Given (sha256)": lock["given"],
        "Sampling": {**sampling, **{name: lock[name] for name in ("threads", "machine")}},
        "Execution": {name: " ".join(map(str, how.values())) for name, how in lock["execution"].items()},
        "Versions": lock["versions"],
    }
    parts, locked = sections(assembly.out), read_within(assembly.out, assembly.out / LOCK).decode()
    shown = (found.svg(), pictures, rows, parts, provenance, locked, shows(assembly, banner))
    write_report(path, Page(recipe.name, recipe.description, banner, *shown))
