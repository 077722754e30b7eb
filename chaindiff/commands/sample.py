"""`chaindiff sample`: makes the missing samples of a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaindiff.chain.plan import ChainPlan
from chaindiff.chain.request import TILE, Value, rows_of
from chaindiff.commands.compare import differences, settings_of
from chaindiff.commands.plan import asking
from chaindiff.execution.prepare import Preparation, kept, locked
from chaindiff.io.errors import UserError
from chaindiff.io.memory import noted
from chaindiff.io.processes import processes, share, sole_writer
from chaindiff.io.progress import say, shown
from chaindiff.recipe.assembly import Assembly
from chaindiff.recipe.execution import lock_of
from chaindiff.recipe.given import read_given
from chaindiff.recipe.samples import GRID, Samples
from chaindiff.recipe.samples import draw as draw_samples
from chaindiff.recipe.stage import check_fitted
from chaindiff.specs.load import LOCK, Loaded
from chaindiff.specs.lock import write_lock


@dataclass(frozen=True)
class Sampled:
    """What sampling left behind; `seconds` is 0 if everything was there already."""

    samples: Samples
    plan: ChainPlan
    weights: dict[str, Path]
    lock: dict[str, Any]
    seconds: float
    stage_seconds: dict[str, float]

    def facts(self) -> dict[str, Any]:
        """Where everything is, as plain data for scripts."""
        out = self.samples.folder.parent
        page = out / "report.html"
        return {
            "out": str(out),
            "count": self.samples.count,
            "samples": {v.name: str(self.samples.folder / v.name) for v in self.samples.variables},
            "grids": [str(path) for path in self.samples.grids],
            "page": str(page) if page.exists() else None,
            "lock": str(out / LOCK),
            "weights": {name: str(path) for name, path in self.weights.items()},
            "seconds": self.seconds,
            "stage_seconds": self.stage_seconds,
        }


def sample(loaded: Loaded, out: Path | None = None, *, replace: bool = False, **asked: Any) -> Sampled:
    """Sample with existing weights; `asked`: fields of the recipe's `sample`, where they are not None."""
    assembly = Assembly(asking(loaded, **asked), out)
    with sole_writer(assembly.out):
        sampled = sample_chain(assembly, replace)
    say(f"{sampled.samples.count} samples in {sampled.samples.folder}")
    return sampled


@dataclass(frozen=True)
class Asked:
    """A request that can be answered: its samples, what they depend on, and whether others are in their place."""

    samples: Samples
    weights: dict[str, Path]
    values: dict[str, Value]
    lock: dict[str, Any]
    stale: bool


def asked_samples(assembly: Assembly, replace: bool = False) -> Asked:
    """What a recipe asks to sample. Raises UserError for samples of other settings that it may not replace."""
    asked, found = assembly.recipe.sample, assembly.request
    weights = assembly.weights(found.running)
    check_fitted(weights)
    made = [v for step in found.plan.steps if step.producer.kind != "encoder" for v in step.outputs]
    keep = [assembly.versioned(name) for name in dict.fromkeys([*made, *asked.want])]
    size = TILE if asked.exact else asked.batch  # as the chain streams them
    values = read_given(assembly, asked.given, asked.count)
    texts = [rows_of(value, range(min(asked.count, GRID))) for value in values.values() if isinstance(value, list)]
    captions = [", ".join(row) for row in zip(*texts, strict=True)]
    samples = Samples(assembly.out / "samples", keep, asked.count, size, captions)
    held = assembly.held()
    before = held.lock if held else {}
    lock = lock_of(assembly, found, weights, values, before)
    stale = bool(samples.files) and (before.get("samples") != lock["samples"] or lock["execution"] is None)
    if stale and not replace:
        raise other_samples(assembly)
    return Asked(samples, weights, values, lock, stale)


def sample_chain(assembly: Assembly, replace: bool = False) -> Sampled:
    """Make the samples that are missing from a run; with `replace`, in place of those of other settings or weights.

    Several processes divide the batches. A batch does not depend on its process, so the files are those of one.
    Raises UserError, before anything is deleted, for a request that cannot be answered, and as `asked_samples` does.
    """
    recipe, out, state, found = assembly.recipe, assembly.out, processes(), assembly.request
    asked = recipe.sample
    if all(step.producer.kind == "encoder" for step in found.plan.steps):
        say(nothing_runs(assembly))
    said = asked_samples(assembly, replace)
    samples, weights, lock = said.samples, said.weights, said.lock
    for name, path in weights.items():
        say(f"stage {name}: weights {path}")
    complete = samples.complete and not said.stale
    held = assembly.held() or assembly.loaded
    recounted = held.lock.get("count") != asked.count
    if complete:
        lock |= held.lock | {"count": asked.count}
    chain = assembly.chain(() if complete else found.running)  # weights that do not load are found now
    settings = {"seed": asked.seed, "batch": asked.batch, "exact": asked.exact, "given": said.values}
    settings |= {"want": [variable.name for variable in samples.variables], "max_memory": asked.max_memory}
    began, ready, choices = time.perf_counter(), None, {}
    if not complete:
        ready = Preparation(chain, chain.request(asked.count, **settings), asked)
        choices = ready.together(kept(lock, asked))
        lock["execution"] = locked(choices)
    state.wait_for_everyone()  # all of them have looked before one changes anything
    if state.is_main_process:
        if said.stale:
            say(f"the samples in {samples.folder} are of other settings or weights; they are replaced")
            samples.clear()
        for path in samples.grids if recounted else ():
            path.unlink(missing_ok=True)
        if not complete or recounted or settings_of(held, "sample") != settings_of(assembly.loaded, "sample"):
            write_lock(out, recipe, lock)
        if complete and recounted:
            samples.write_grids()
    state.wait_for_everyone()
    if ready is None:
        return Sampled(samples, found, weights, lock, 0.0, {})
    mine = share(samples.missing())
    less = f"lower sample.batch (--batch), now {samples.size}"
    if asked.exact:
        less = f"sample.exact always takes {samples.size} at a time; without it, lower sample.batch (--batch)"
    with noted(less):
        shown("sample", draw_samples(chain, samples, mine, **settings))
    state.wait_for_everyone()
    if state.is_main_process:
        ready.record(choices, sum(map(len, mine)))
        samples.write_grids()
    return Sampled(samples, found, weights, lock, time.perf_counter() - began, chain.seconds)


def other_samples(assembly: Assembly) -> UserError:
    """The refusal of a request in whose place there are samples of another, with the settings that differ."""
    held = assembly.held() or assembly.loaded
    found = dict(differences([settings_of(held), settings_of(assembly.loaded)]))
    told = ", ".join([*found][:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
    return UserError(
        f"the samples in {assembly.out / 'samples'} are of other {f'settings ({told})' if told else 'weights'}",
        hint="--replace deletes them and samples again; --out FOLDER keeps them and samples there, with the weights of "
        f'this run if you add --set "stages.*.weights={assembly.out}"',
    )


def nothing_runs(assembly: Assembly) -> str:
    """Why a request samples nothing, and what to give instead so that stages run."""
    request, given, chain, told = assembly.request.plan, assembly.recipe.sample.given, assembly.chain(), []
    read = {made: step.inputs[0] for step in request.steps for made in step.outputs}  # encoders read one variable each

    def runs(want: str, given: Sequence[str]) -> bool:
        try:
            return bool(chain.plan([want], given).running)
        except UserError:
            return False

    for want in request.want:
        origin = want
        while origin not in given:
            origin = read[origin]
        text = f"'{want}' is computed from the given '{origin}'" if origin != want else f"'{want}' is given"
        others = [name for name in given if name != origin]
        ways = (name for name in pictured(assembly, want) if name not in given and runs(want, [name, *others]))
        if way := next(ways, None):
            value = given[origin] if isinstance(given[origin], str) else "FILE"
            text += f"; to sample variations of a picture, condition its stage on one: --given {way}={value}"
        told.append(text)
    return f"no stage runs: {'; '.join(told)}"


def pictured(assembly: Assembly, variable: str) -> list[str]:
    """What a variable's stage is conditioned on and a picture can supply."""
    specs = assembly.recipe.variables
    stages = [n for n in assembly.recipe.stages if variable in {v.name for v in assembly.stages[n].generates}]
    links = [link.name for stage in stages for link, _ in assembly.stages[stage].links]
    return [name for name in links if specs[name].kind == "image" or specs[name].encoder is not None]
