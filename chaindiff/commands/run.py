"""`chaindiff run`: whatever a recipe still needs, in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chaindiff.chain.stage import learns
from chaindiff.commands.page import is_current, write_run_report
from chaindiff.commands.plan import asking, draw, recipe_of
from chaindiff.commands.sample import Sampled, other_samples, sample_chain
from chaindiff.commands.smoke import smoke_version
from chaindiff.io.errors import UserError, in_lines
from chaindiff.io.processes import processes, sole_writer
from chaindiff.io.progress import say
from chaindiff.recipe.assembly import Assembly
from chaindiff.recipe.given import check_given
from chaindiff.recipe.samples import Samples
from chaindiff.recipe.training import train_stage
from chaindiff.specs.load import Loaded


def run(
    recipe: Loaded | str | Path,
    out: Path | None = None,
    *,
    smoke: bool = False,
    replace: bool = False,
    **asked: Any,
) -> Sampled:
    """Everything a recipe makes: weights (shipped or found, else trained), samples, pictures and the page.

    `asked`: fields of the recipe's `sample`, where they are not None.
    """
    loaded, banner = recipe_of(recipe), ""
    if smoke:
        loaded, replace = smoke_version(loaded), replace or out is None  # no results, in a place of their own
        out = out or Path("runs") / loaded.recipe.name
        banner = "SMOKE RUN: tiny networks, a few training steps, the embedded images. Not results."
        say(banner)
    loaded = asking(loaded, **asked)
    assembly = Assembly(loaded, out)
    with sole_writer(assembly.out):
        return run_assembly(assembly, replace, banner)


def run_assembly(assembly: Assembly, replace: bool, banner: str) -> Sampled:
    """What is missing of a run whose directory nobody else writes to."""
    asked = assembly.recipe.sample
    found = assembly.request
    learning = [name for name in found.running if learns(found.chain.stages.outlines[name])]
    untrained = [name for name in learning if assembly.stages[name].find_weights() is None]
    assembly.weights(name for name in learning if name not in untrained)  # raises, if they are another stage's
    if untrained:  # wrong weights, a mistyped class or other samples must fail before training
        if not replace and Samples(assembly.out / "samples", [], 0, 1).files:
            raise other_samples(assembly)
        explain_missing_data(assembly)
        check_given(assembly, asked.given)
        for name in untrained:
            assembly.stages[name].check_begin()
    for name in untrained:
        train_stage(assembly, name)
    sampled = sample_chain(assembly, replace)
    page = assembly.out / "report.html"
    if not sampled.seconds and is_current(page, assembly, banner):
        say(f"nothing to do: {assembly.out} is complete (delete {sampled.samples.folder} to sample again)")
        return sampled
    if processes().is_main_process:
        draw(sampled.plan, assembly.out / "chain.svg")
        write_run_report(page, assembly, sampled, banner)
    if sampled.seconds:
        say(f"{sampled.samples.count} samples in {sampled.seconds:.1f} s")
    say(*(f"grid: {path}" for path in reversed(sampled.samples.grids)))
    say(f"page: {page}")
    return sampled


def explain_missing_data(assembly: Assembly) -> None:
    """Check before training that the data is there; if not, list everything that the user can do about it."""
    recipe = assembly.recipe
    try:
        len(assembly.data)
    except UserError as error:
        image_stages = [n for n in recipe.stages if [v.kind for v in assembly.stages[n].generates] == ["image"]]
        begin = f"--set stages.{image_stages[-1]}.init=WEIGHTS.safetensors" if image_stages else ""
        raise UserError(
            error.message,
            error.where,
            in_lines(
                error.hint or "",
                f"  {recipe.name} has no shipped weights, so it trains on its own images first. You can",
                f"    train on any folder of images:   chaindiff run {assembly.loaded.spoken} --set data.path=FOLDER",
                f"    begin from EDM weights:          add {begin}",
                f"    see the whole pipeline at once:  chaindiff run {assembly.loaded.spoken} --smoke",
                "    sample a chain that is trained:  chaindiff run vcdm_emoji",
            ),
        ) from error
