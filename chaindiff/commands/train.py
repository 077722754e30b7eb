"""`chaindiff train`: trains the stages of a recipe that have no weights yet."""

from __future__ import annotations

from pathlib import Path

from chaindiff.io.processes import processes, sole_writer
from chaindiff.io.progress import say
from chaindiff.recipe.assembly import Assembly
from chaindiff.recipe.training import train_stage
from chaindiff.specs.load import Loaded
from chaindiff.training import states


def train(
    loaded: Loaded, stage: str | None = None, more: int = 0, out: Path | None = None, fresh: bool = False
) -> None:
    """Train one stage, or all in order; with `more`, continue from the run's or the shipped weights.

    Interrupted training always resumes; `fresh` retrains finished stages from scratch.
    """
    assembly = Assembly(loaded, out)
    with sole_writer(assembly.out):
        train_assembly(assembly, stage, more, fresh)


def train_assembly(assembly: Assembly, stage: str | None, more: int, fresh: bool) -> None:
    """`train` in a directory that nobody else writes to."""
    names = [stage] if stage else list(assembly.recipe.stages)
    for name in names:
        assembly.stages[name].check_begin(fresh)
    for name in names:
        unfinished = assembly.stages[name].unfinished
        processes().wait_for_everyone()  # all of them have looked before one changes anything
        if fresh and not unfinished:
            states.discard(assembly.stages[name].folder)
        weights = None if fresh else assembly.stages[name].find_weights()
        if weights is not None and weights.exists() and not more and not unfinished:
            say(f"stage {name} has weights: {weights} (--more IMAGES continues from them, --fresh trains from scratch)")
        else:
            if more and weights is not None and not unfinished:
                say(f"stage {name}: continues from the weights {weights}")
            say(f"stage {name}: weights {train_stage(assembly, name, start=weights, more=more)}")
