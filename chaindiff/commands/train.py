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
        stages = {name: assembly.stages[name] for name in ([stage] if stage else assembly.recipe.stages)}
        for part in stages.values():
            part.check_begin(fresh)
        for name, part in stages.items():
            unfinished = part.unfinished
            processes().wait_for_everyone()  # all of them have looked before one changes anything
            if fresh and not unfinished:
                states.discard(part.folder)
            weights = None if fresh else part.find_weights()
            if weights is not None and weights.exists() and not more and not unfinished:
                tail = "--more IMAGES continues from them, --fresh trains from scratch"
                say(f"stage {name} has weights: {weights} ({tail})")
                continue
            if more and weights is not None and not unfinished:
                say(f"stage {name}: continues from the weights {weights}")
            say(f"stage {name}: weights {train_stage(assembly, name, start=weights, more=more)}")
